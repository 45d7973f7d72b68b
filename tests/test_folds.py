"""Cross-fitted baselines: what a fold holds, what a copy of a baseline has seen, which copy answers in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import registry
from models.background import attach
from models.baselines.climatology import Climatology
from models.contract import FieldBatch, FieldPrediction
from pipeline import baselines, folds, runs, sensors, train
from pipeline.batches import TrainingBatches, Windows
from pipeline.params import ParamsError, validated
from pipeline.phase import Phase
from pipeline.training_data import Backgrounds, TrainingData
from tests import worlds

WINDOWS = {"context_frames": 12, "max_lead": 4, "batch": 8, "query_frames": 2, "hide": 2}
SMALL = {"rounds": 10, "spread_rounds": 5, "least": 5, "leaves": 7}


def frames_of(dataset: sensors.SensorDataset, batch: FieldBatch) -> np.ndarray:
    """Numbers [B,T+S] of the frames of a batch of `worlds.stations`, which has one trajectory."""
    start = dataset["frame/time"][0]
    return (torch.cat([batch.context.time, batch.query.time], 1).numpy() - start).astype(int)


def test_a_fold_is_whole_trajectories_or_a_stretch_of_time() -> None:
    waves = worlds.waves(trajectories=8)
    number = folds.folds(waves, 2)
    assert (np.ptp(number.reshape(8, -1), axis=1) == 0).all()
    train_frames = waves["frame/split"] == sensors.TRAIN
    assert (number >= 0).tolist() == train_frames.tolist()
    assert np.bincount(number[train_frames]).tolist() == [20, 20]
    one = worlds.stations(hours=400)
    number = folds.folds(one, 4)[: int(400 * 0.7)]
    assert (np.diff(number) >= 0).all()
    assert np.bincount(number).tolist() == [70] * 4


def test_no_window_holds_a_frame_on_both_sides() -> None:
    dataset = worlds.stations(hours=400)
    number = folds.folds(dataset, 3)
    for fold in range(3):
        for step in range(10):
            here = TrainingBatches(folds.within(dataset, 3, fold), Windows(**WINDOWS), seed=0)[step]
            assert (number[frames_of(dataset, here)] == fold).all()
            elsewhere = TrainingBatches(folds.without(dataset, 3, fold), Windows(**WINDOWS), seed=0)[step]
            assert not np.isin(number[frames_of(dataset, elsewhere)], (fold, -1)).any()


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(registry.FIELD_MODELS, "tiny", "tests.tiny_model:Tiny")
    sensors.write(tmp_path / "s.zarr", worlds.stations(hours=600))
    return tmp_path


def fit_baselines(project: Path, **fit: Any) -> Path:
    section = validated({"windows": WINDOWS, "steps": 12, "fit": fit}, baselines.params_model("stations"), "baselines.stations")
    baselines.run(section, "stations", sensors=project / "s.zarr", out=project / "baselines")
    return project / "baselines"


def fit_model(project: Path, background: str | None, **more: Any) -> None:
    phase = {"windows": WINDOWS, "validation": {"leads": [0, 2], "max_cases": 8}, "steps": 4, "validate_every": 4, "learning_rate": 0.01}
    settings = {"model": {"width": 4}, "background": background, "phases": {"fit": phase}, **more}
    params = validated(settings, train.params_model("stations", "tiny"), "train.stations.tiny")
    train.run(params, "stations", "tiny", sensors=project / "s.zarr", baselines=project / "baselines", out=project / "tiny")


def test_copies_lie_beside_the_baseline_and_do_not_travel_with_the_model(project: Path) -> None:
    folder = fit_baselines(project, climatology={}, boosting={"config": SMALL, "folds": 3})
    assert [path.name for path in runs.folders(folder)] == ["boosting", "climatology"]
    texts = {json.loads((place / "run.json").read_text())["strings"]["mean"] for place in runs.fold_folders(folder / "boosting")}
    whole = json.loads((folder / "boosting" / "run.json").read_text())["strings"]["mean"]
    assert len(texts | {whole}) == 4
    fit_model(project, "boosting")
    assert runs.load(project / "tiny", worlds.stations(hours=600).info).predictor.baseline.state()["mean"] == whole
    assert not (project / "tiny" / "background" / "folds").exists()


def test_a_baseline_that_needs_copies_and_has_none_is_no_background(project: Path) -> None:
    fit_baselines(project, boosting={"config": SMALL})
    with pytest.raises(ValueError, match=r"set `folds` in baselines\.stations\.fit\.boosting"):
        fit_model(project, "boosting")
    with pytest.raises(ParamsError, match=r"boosting\.folds"):
        fit_baselines(project, boosting={"folds": 1})


class _Marked(Climatology):
    """Answers with its number."""

    def __init__(self, number: float) -> None:
        self.number = number

    def predict(self, context: Any, query: Any) -> Any:
        full = torch.full((*query.mask.shape, 1), self.number)
        return FieldPrediction(full, torch.ones_like(full))


def test_in_training_the_copy_that_has_not_seen_the_fold_answers_and_in_validation_the_whole() -> None:
    dataset = worlds.stations(hours=400)
    phase = validated(
        {"windows": WINDOWS, "validation": {"leads": [0]}, "steps": 4, "validate_every": 4, "learning_rate": 0.1}, Phase, "phase"
    )
    data = TrainingData(dataset, Backgrounds(_Marked(9.0), [_Marked(float(fold)) for fold in range(3)]), phase, 0)
    number = folds.folds(dataset, 3)
    for step in range(6):
        batch = data.batch(step)
        assert batch.query.background is not None
        assert (batch.query.background == step % 3).all()
        assert (number[frames_of(dataset, batch)] == step % 3).all()
    assert all((batch.query.background == 9).all() for batch in data.validation())


def test_a_poorer_background_takes_every_other_round_of_the_folds_until_the_last_fifth() -> None:
    phase = validated(
        {"windows": WINDOWS, "validation": {"leads": [0]}, "steps": 20, "validate_every": 20, "learning_rate": 0.1}, Phase, "phase"
    )
    unseen = [_Marked(float(fold)) for fold in range(2)]
    data = TrainingData(worlds.stations(hours=400), Backgrounds(_Marked(9.0), unseen, _Marked(7.0)), phase, 0)
    answers = [float(data.batch(step).query.background.flatten()[0]) for step in range(20)]  # type: ignore[union-attr]
    assert answers == [7, 7, 0, 1] * 4 + [0, 1] * 2
    assert all((batch.query.background == 9).all() for batch in data.validation())  # type: ignore[union-attr]


def test_a_poorer_background_goes_beside_another_and_needs_no_folds(project: Path) -> None:
    fit_baselines(project, climatology={}, boosting={"config": SMALL, "folds": 2})
    for background, beside in ((None, "climatology"), ("climatology", "boosting")):
        with pytest.raises(ValueError, match=rf"beside is '{beside}': it goes with a `background`, and must need no cross-fitting"):
            fit_model(project, background, beside=beside)
    fit_model(project, "boosting", beside="climatology")
    assert json.loads((project / "tiny" / "background" / "run.json").read_text())["name"] == "boosting"


def test_out_of_fold_residuals_are_as_large_as_those_on_new_data() -> None:
    """The reason for all this: a flexible baseline looks better on what it was fitted to than it is."""
    dataset = worlds.stations(hours=900)
    windows, settings = Windows(**WINDOWS), registry.load("boosting").Config(rounds=300, spread_rounds=5, least=2, leaves=31, rate=0.2)

    def error(fitted_on: sensors.SensorDataset, asked_of: sensors.SensorDataset, split: str = "train") -> float:
        boosting = registry.load("boosting")(settings, dataset.info)
        fitting = TrainingBatches(fitted_on, windows, 0)
        boosting.fit(fitting[step] for step in range(16))
        asking, total, count = TrainingBatches(asked_of, windows, 0, split), 0.0, 0
        for step in range(16):
            batch = asking[step]
            query = attach(boosting, batch.context, batch.query)
            assert query.value is not None
            assert query.background is not None
            later = query.mask & (query.time > batch.context.time[:, -1:])[..., None]
            total += float((query.value - query.background)[later].square().sum())
            count += int(later.sum())
        return (total / count) ** 0.5

    seen = error(dataset, dataset)
    unseen = np.mean([error(folds.without(dataset, 2, fold), folds.within(dataset, 2, fold)) for fold in range(2)])
    new = error(dataset, dataset, "validation")
    assert seen < 0.7 * new
    assert 0.8 * new < unseen < 1.5 * new
