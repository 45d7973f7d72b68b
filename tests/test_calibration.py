"""Calibration: a correction is trusted as far as validation cases bear it out, and distributions get the width that scores best there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from models import registry
from models.background import WithBackground
from models.calibrated import ELSEWHERE, SEEN, Calibrated, Calibration, at_seen_sensor, corrected
from models.contract import FieldBatch, FieldPrediction, Frames
from pipeline import baselines, runs, sensors, train, training_loop
from pipeline.calibration import _modest, calibrate
from pipeline.cases import cases
from pipeline.params import validated
from tests import worlds
from tests.tiny_model import Tiny

INFO = worlds.torus_info(mean=(3.0,), std=(2.0,))


def _frames(leads: list[float], points: int, sensor: list[int] | None = None, rows: int = 1) -> Frames:
    shape = (rows, len(leads), points)
    ids = None if sensor is None else torch.tensor(sensor).expand(shape)
    return Frames(
        torch.zeros(*shape, 2), torch.ones(shape, dtype=torch.bool), torch.tensor(leads, dtype=torch.float64).expand(rows, -1), sensor=ids
    )


class _Model:
    """Right at even leads, at odd ones as far off as the background, on the other side; states half of the spread it has."""

    tasks, levels = frozenset({"forecast"}), (0.05, 0.25, 0.5, 0.75, 0.95)

    def __init__(self, form: str) -> None:
        self.form = form

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        assert query.background is not None
        assert query.value is not None
        truth = query.value - query.background_scale  # what is left of it is noise
        right = (query.time % 2 == 0)[:, :, None, None]
        mean = torch.where(right, truth, 2 * query.background - truth)
        half = torch.full_like(mean, 0.25)
        if self.form == "mean":
            return FieldPrediction(mean)
        if self.form == "scale":
            return FieldPrediction(mean, scale=half)
        normal = torch.distributions.Normal(mean, half)
        levels = torch.tensor(self.levels)
        if self.form == "quantiles":
            return FieldPrediction(mean, quantiles=torch.stack([normal.icdf(level) for level in levels], -1))
        return FieldPrediction(mean, samples=torch.stack([normal.icdf(level) for level in torch.linspace(0.02, 0.98, 25)]))


def _cases(count: int = 12, blocks: int = 24) -> Iterator[tuple[FieldBatch, np.ndarray]]:
    """`background_scale` hides the noise of the truth, with a standard deviation of 0.5; only _Model looks at it."""
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float) -> torch.Tensor:
        return scale * torch.randn(2, 2, 200, 1, generator=generator)

    for number in range(count):
        context, query = _frames([5.0], 3, rows=2), _frames([6.0, 7.0], 200, rows=2)
        background, step, noise = normal(1), normal(1), normal(0.5)
        query = replace(query, value=background + step + noise, background=background, background_scale=noise)
        yield FieldBatch(context, query), (2 * number + np.arange(2)) % blocks


@pytest.mark.parametrize("form", ["mean", "scale", "quantiles", "samples"])
def test_weight_and_factor_are_those_that_the_cases_bear_out(form: str) -> None:
    found = calibrate(_Model(form), _cases(), INFO)
    assert found.leads == (1.0, 2.0)
    (right,), (wrong,) = found.weight[ELSEWHERE]
    assert right == pytest.approx(1, abs=0.03)
    assert wrong == pytest.approx(0, abs=0.03)
    if form == "mean":
        assert found.factor[ELSEWHERE] == ((1.0,), (1.0,))
    else:
        (narrow,), (background,) = found.factor[ELSEWHERE]
        assert narrow == pytest.approx(2, rel=0.1)
        assert background > 3  # of the background alone: sqrt(1 + 0.25) against 0.25
    assert found.weight[SEEN] == found.factor[SEEN] == ((1.0,), (1.0,))  # no question was at a sensor


def test_one_block_changes_nothing_and_few_change_little() -> None:
    def factor(count: int, blocks: int, points: int = 200) -> float:
        cases = ((FieldBatch(b.context, b.query.points(slice(0, points))), block) for b, block in _cases(count, blocks))
        found = calibrate(_Model("scale"), cases, INFO)
        return found.factor[ELSEWHERE][1][0]

    assert factor(12, 1) == 1
    assert 1 < factor(3, 4, points=4) < factor(12, 24)


def test_a_weight_is_the_one_nearest_to_1_that_blocks_cannot_tell_from_the_best() -> None:
    block = np.repeat(np.arange(8), 5)
    steady, unsteady = np.full(40, -0.6), np.where(block == 0, -3.4, -0.2)  # the same mean, from all blocks alike or from one of them
    truth = np.stack([steady, unsteady], 1)
    found = _modest(np.linspace(0, 1, 11), lambda share: (truth + share) ** 2, block)
    assert found[0] == pytest.approx(0.6)
    assert found[1] == 1


CALIBRATION = Calibration(
    leads=(0.0, 2.0, 6.0),
    weight=(((0.0,), (0.5,), (1.0,)), ((0.2,), (0.2,), (0.4,))),
    factor=(((1.0,), (2.0,), (4.0,)), ((1.0,), (1.0,), (3.0,))),
)


@pytest.mark.parametrize(
    ("lead", "elsewhere", "seen"),
    [(-3, (0, 1), (0.2, 1)), (0, (0, 1), (0.2, 1)), (1, (0.25, 1.5), (0.2, 1)), (4, (0.75, 3), (0.3, 2)), (9, (1, 4), (0.4, 3))],
)
def test_between_leads_it_is_interpolated_and_beyond_them_it_stays(
    lead: float, elsewhere: tuple[float, float], seen: tuple[float, float]
) -> None:
    weight, factor = CALIBRATION.at(torch.tensor([[float(lead)]], dtype=torch.float64), torch.tensor([[[False, True]]]))
    assert weight.flatten().tolist() == pytest.approx([elsewhere[0], seen[0]])
    assert factor.flatten().tolist() == pytest.approx([elsewhere[1], seen[1]])


def test_one_lead_serves_all() -> None:
    one = Calibration((0.0,), (((0.3,),), ((0.6,),)), (((2.0,),), ((3.0,),)))
    weight, factor = one.at(torch.tensor([[-1.0, 0.0, 5.0]]), torch.zeros(1, 3, 2, dtype=torch.bool))
    assert torch.equal(weight, torch.full((1, 3, 2, 1), 0.3))
    assert torch.equal(factor, torch.full((1, 3, 2, 1), 2.0))


def test_a_sensor_is_seen_where_the_context_of_the_same_row_holds_a_reading_of_it() -> None:
    context, query = _frames([0, 1], 3, [4, 2, -1], rows=2), _frames([2], 4, [2, 3, 4, -1], rows=2)
    context.mask[1, :, 0] = False  # sensor 4 of the second row reported nothing
    assert at_seen_sensor(context, query)[:, 0].tolist() == [[True, False, True, False], [True, False, False, False]]
    assert not at_seen_sensor(_frames([0], 3), query).any()
    assert not at_seen_sensor(context, _frames([2], 4)).any()


def test_the_spread_is_about_the_corrected_mean() -> None:
    mean = torch.tensor([[[[2.0]]]])
    quantiles, samples = torch.tensor([[[[[1.0, 2.0, 4.0]]]]]), torch.tensor([0.0, 3.0]).view(2, 1, 1, 1, 1)
    weight, factor = torch.full_like(mean, 0.5), torch.full_like(mean, 3.0)
    found = corrected(FieldPrediction(mean, quantiles=quantiles), torch.zeros_like(mean), weight, factor)
    assert found.mean.item() == 1
    assert found.quantiles is not None
    assert found.quantiles.flatten().tolist() == [-2, 1, 7]
    members = corrected(FieldPrediction(mean, samples=samples), None, weight, factor)
    assert members.mean.item() == 2  # nothing to weigh the correction against
    assert members.samples is not None
    assert members.samples.flatten().tolist() == [-4, 5]


def test_a_run_folder_keeps_its_calibration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FIELD_MODELS, "tiny", "tests.tiny_model:Tiny")
    torch.manual_seed(0)
    config: dict[str, Any] = {"width": 8}
    dataset = worlds.waves()
    model = Tiny(Tiny.Config.model_validate(config), dataset.info).eval()
    runs.save(tmp_path / "plain", "tiny", config, dataset.info, model.state_dict(), 2)
    runs.save(tmp_path / "calibrated", "tiny", config, dataset.info, model.state_dict(), 2, calibration=CALIBRATION)
    batch = worlds.batch(dataset.info)
    context, query = batch.context, batch.query
    plain, loaded = (runs.load(tmp_path / name, dataset.info).predictor for name in ("plain", "calibrated"))
    assert isinstance(loaded, Calibrated)
    assert loaded.calibration == CALIBRATION
    query = replace(query, background=torch.zeros_like(plain.predict(context, query).mean))
    weight, _ = CALIBRATION.at(query.time - context.time[:, -1:], at_seen_sensor(context, query))
    assert np.allclose(loaded.predict(context, query).mean.detach(), (weight * plain.predict(context, query).mean).detach(), atol=1e-6)


def test_training_ends_with_a_calibration_that_validation_cases_bear_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FIELD_MODELS, "tiny", "tests.tiny_model:Tiny")
    dataset, leads = worlds.stations(hours=600), (0, 2, 4)
    sensors.write(tmp_path / "s.zarr", dataset)
    windows = {"context_frames": 12, "max_lead": 4, "batch": 8, "query_frames": 2, "hide": 2}
    section = {"windows": windows, "steps": 12, "fit": {"climatology": {}}}
    fitted = validated(section, baselines.params_model("stations"), "baselines.stations")
    baselines.run(fitted, "stations", sensors=tmp_path / "s.zarr", out=tmp_path / "baselines")
    phase = {"windows": windows, "validation": {"leads": [0, 2], "max_cases": 8}, "steps": 4, "validate_every": 4, "learning_rate": 0.03}
    whole = {"model": {"width": 4}, "background": "climatology", "phases": {"fit": phase}, "calibration": {"leads": leads}}
    params = validated(whole, train.params_model("stations", "tiny"), "train.stations.tiny")
    train.run(params, "stations", "tiny", sensors=tmp_path / "s.zarr", baselines=tmp_path / "baselines", out=tmp_path / "tiny")

    both = runs.load(tmp_path / "tiny", dataset.info).predictor
    assert isinstance(both, WithBackground)
    assert isinstance(both.model, Calibrated)
    assert both.model.calibration.leads == leads
    predictors = {"plain": WithBackground(both.baseline, both.model.model), "background": both.baseline, "calibrated": both}
    lost = dict.fromkeys(predictors, 0.0)
    for part in cases(dataset, "validation", 12, leads, batch=32):
        for name, predictor in predictors.items():
            with torch.no_grad():
                error = predictor.predict(part.batch.context, part.batch.query).mean - part.batch.query.value
            lost[name] += float((error[part.batch.query.mask] ** 2).sum())
    assert lost["calibrated"] < min(lost["plain"], lost["background"])


def test_a_lead_that_cannot_be_answered_is_found_out_before_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FIELD_MODELS, "tiny", "tests.tiny_model:Tiny")
    sensors.write(tmp_path / "s.zarr", worlds.stations(hours=600))
    phase = {"windows": {"max_lead": 4, "batch": 8}, "validation": {"leads": [0]}, "steps": 4, "validate_every": 4, "learning_rate": 0.03}
    whole = {"model": {"width": 4}, "phases": {"fit": phase}, "calibration": {"leads": [0, 2]}}
    params = validated(whole, train.params_model("stations", "tiny"), "train.stations.tiny")

    def refusing(self: Tiny, context: Frames, query: Frames) -> FieldPrediction:
        raise ValueError("lead 2 is beyond the horizon")

    monkeypatch.setattr(Tiny, "predict", refusing)
    monkeypatch.setattr(training_loop, "fit", lambda *_: pytest.fail("it trained"))
    with pytest.raises(ValueError, match="beyond the horizon"):
        train.run(params, "stations", "tiny", sensors=tmp_path / "s.zarr", baselines=tmp_path, out=tmp_path / "tiny")


def test_a_calibration_does_not_change_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny has dropout: a network left in evaluation, or numbers drawn on the way, would end in other weights."""
    monkeypatch.setitem(registry.FIELD_MODELS, "tiny", "tests.tiny_model:Tiny")
    sensors.write(tmp_path / "s.zarr", worlds.stations(hours=600))
    phase = {"windows": {"max_lead": 4, "batch": 8}, "validation": {"leads": [0]}, "steps": 8, "validate_every": 4, "learning_rate": 0.03}
    for name, calibration in (("plain", None), ("calibrated", {"leads": [0, 2]})):
        whole = {"model": {"width": 4}, "phases": {"fit": phase}, "calibration": calibration}
        params = validated(whole, train.params_model("stations", "tiny"), "train.stations.tiny")
        train.run(params, "stations", "tiny", sensors=tmp_path / "s.zarr", baselines=tmp_path, out=tmp_path / name)
    assert (tmp_path / "plain" / "weights.safetensors").read_bytes() == (tmp_path / "calibrated" / "weights.safetensors").read_bytes()
