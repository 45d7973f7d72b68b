"""Training: exact resume after a kill, best weights kept, a self-contained run folder."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from models import registry
from pipeline import runs, sensors, train, training_loop
from pipeline.params import ParamsError, load, validated
from pipeline.phase import Phase
from pipeline.training_data import Backgrounds, TrainingData
from tests import worlds

SETTINGS: dict[str, Any] = {
    "model": {"width": 8},
    "phases": {
        "fit": {
            "windows": {"batch": 4, "max_lead": 3, "query_points": 40, "context_frames": 2},
            "validation": {"leads": [0, 2], "batch": 8, "max_cases": 8},
            "steps": 40,
            "validate_every": 5,
            "learning_rate": 0.01,
        }
    },
    "seed": 3,
}

SMALL_AROMA = {"width": 8, "tokens": 4, "channels": 2, "stepper_width": 8, "stepper_depth": 1}
AROMA: dict[str, Any] = {
    "model": {**SMALL_AROMA, "heads": 2, "head_width": 4, "bands": 4, "field_width": 8, "stepper_heads": 2},
    "windows": {"batch": 4, "max_lead": 0, "query_points": 40, "context_frames": 2},
}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.FIELD_MODELS, "tiny", "tests.tiny_model:Tiny")
    monkeypatch.setitem(registry.FIELD_MODELS, "two_phases", "tests.tiny_model:TwoPhases")


@pytest.fixture
def world(tmp_path: Path) -> Path:
    sensors.write(tmp_path / "waves.zarr", worlds.waves())
    return tmp_path / "waves.zarr"


def fit(world: Path, out: Path, name: str = "tiny", **changes: Any) -> None:
    """Train with SETTINGS; changes to what a phase holds go to every phase of the model."""
    phases = registry.load(name).phases
    phase = {**SETTINGS["phases"]["fit"], **{key: value for key, value in changes.items() if key in Phase.model_fields}}
    whole = {key: value for key, value in changes.items() if key not in Phase.model_fields}
    settings = {**SETTINGS, **whole, "phases": dict.fromkeys(phases, phase)}
    params = validated(settings, train.params_model("waves", name), f"train.waves.{name}")
    train.run(params, "waves", name, sensors=world, baselines=out.parent / "baselines", out=out)


def test_the_run_folder_predicts_and_holds_the_curve(tiny: None, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "tiny"
    fit(world, out)
    dataset = sensors.read(world)
    loaded = runs.load(out, dataset.info)
    batch = worlds.batch(dataset.info, t=2)
    assert torch.equal(loaded.predictor.predict(batch.context, batch.query).mean, loaded.predictor.predict(batch.context, batch.query).mean)
    assert loaded.context_frames == 2
    rows = list(csv.DictReader((out / "history.csv").open()))
    assert [int(float(row["step"])) for row in rows] == list(range(5, 41, 5))
    assert float(rows[-1]["loss"]) < float(rows[0]["loss"])
    summary = json.loads((out / "summary.json").read_text())
    kept = summary["phases"]["fit"]
    assert kept["validation_loss"] == pytest.approx(min(float(row["validation_loss"]) for row in rows), rel=1e-5)
    assert kept["trained"] == summary["parameters"] == sum(p.numel() for p in loaded.predictor.parameters())
    assert not list(out.rglob("*.ckpt"))
    assert not (out.parent / ".tiny.resume").exists()


def test_a_smaller_budget_than_asked_for_is_said_and_kept(
    tiny: None, world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for presets, said in (({}, ["train.waves.tiny is trained with the budget quick (no `paper` preset)"]), ({"paper": {"seed": 4}}, [])):
        caplog.clear()
        file = tmp_path / "params.yaml"
        file.write_text(yaml.safe_dump({"preset": "paper", "train": {"waves": {"tiny": {**SETTINGS, "presets": presets}}}}))
        params = load(file, "train.waves.tiny", train.params_model("waves", "tiny"))
        train.run(params, "waves", "tiny", sensors=world, baselines=tmp_path / "baselines", out=tmp_path / "tiny")
        assert [record.message for record in caplog.records if record.levelname == "WARNING" and record.name == "pipeline.train"] == said
        kept = json.loads((tmp_path / "tiny" / "summary.json").read_text())["budget"]
        assert kept == ("quick (no `paper` preset)" if said else "paper")


def test_two_runs_give_the_same_bytes(tiny: None, world: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        fit(world, tmp_path / name / "tiny", average=0.9)
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file())
    assert [f for f in files if (tmp_path / "one" / f).read_bytes() != (tmp_path / "two" / f).read_bytes()] == []


@pytest.mark.parametrize(
    ("model", "average", "phase", "changes"),
    [("tiny", 0.0, 0, {}), ("tiny", 0.9, 0, {}), ("aroma", 0.9, 1, AROMA)],  # the last phase on encoded frames
)
def test_resume_after_kill_9_gives_the_weights_of_an_uninterrupted_run(
    tiny: None, world: Path, tmp_path: Path, model: str, average: float, phase: int, changes: dict[str, Any]
) -> None:
    fit(world, tmp_path / "whole" / model, model, average=average, **changes)
    out = tmp_path / "killed" / model
    # The child stops by itself, hard, in the middle of its fourth epoch.
    code = f"""
        import os, signal
        from pathlib import Path
        from models import registry
        from pipeline import training_loop
        from tests.test_train import fit
        registry.FIELD_MODELS["tiny"] = "tests.tiny_model:Tiny"
        step = training_loop.Training.training_step
        def killed(self, batch, index):
            if self.global_step == 17 and self.seed[1] == {phase}:
                os.kill(os.getpid(), signal.SIGKILL)
            return step(self, batch, index)
        training_loop.Training.training_step = killed
        fit(Path({str(world)!r}), Path({str(out)!r}), {model!r}, average={average}, **{changes!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists()
    assert len(list(out.parent.rglob("last.ckpt"))) == phase + 1
    seen = []
    original = training_loop.Training.training_step

    def counted(self: training_loop.Training, batch: Any, index: int) -> torch.Tensor:
        seen.append((self.seed[1], self.global_step))
        return original(self, batch, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop.Training, "training_step", counted)
        fit(world, out, model, average=average, **changes)
    assert seen == [(phase, step) for step in range(15, 40)], "it went on from the end of the third epoch"
    whole, resumed = (load_file(tmp_path / name / model / "weights.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert (tmp_path / "whole" / model / "history.csv").read_text() == (out / "history.csv").read_text()


def test_a_phase_trains_its_part_from_the_best_weights_of_the_one_before(tiny: None, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "two_phases"
    fit(world, out, "two_phases")
    rows = list(csv.DictReader((out / "history.csv").open()))
    assert [row["phase"] for row in rows] == ["fit"] * 8 + ["refine"] * 8
    kept = json.loads((out / "summary.json").read_text())["phases"]
    assert kept["refine"]["trained"] < kept["fit"]["trained"]
    assert float(rows[8]["validation_loss"]) < 1.2 * kept["fit"]["validation_loss"], "it did not start anew"
    with pytest.raises(ParamsError, match=r"train\.waves\.tiny\.phases\.refine: unknown key"):
        phases = {**SETTINGS["phases"], "refine": SETTINGS["phases"]["fit"]}
        validated({**SETTINGS, "phases": phases}, train.params_model("waves", "tiny"), "train.waves.tiny")


def test_a_model_without_corrections_takes_no_background(tiny: None, world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="two_phases takes no background: set it to null"):
        fit(world, tmp_path / "two_phases", "two_phases", background="kriging")


def test_a_checkpoint_of_other_params_is_not_resumed(tiny: None, world: Path, tmp_path: Path) -> None:
    params = [validated({**SETTINGS, "seed": seed}, train.params_model("waves", "tiny"), "train") for seed in (1, 2)]
    first, second = (train._fingerprint(p, world, None) for p in params)
    assert first != second


def test_a_run_of_another_dataset_is_refused_with_every_difference(tiny: None, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "tiny"
    fit(world, out, steps=5)
    other = worlds.stations().info
    with pytest.raises(ValueError, match="trained on another dataset") as caught:
        runs.load(out, other)
    for word in ("name: checkpoint has 'waves', data has 'stations'", "variables", "geometry", "n_sensors"):
        assert word in str(caught.value)


def test_damaged_weights_are_refused(tiny: None, world: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "tiny"
    fit(world, out, steps=5)
    weights = out / "weights.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match="the file is damaged"):
        runs.load(out, sensors.read(world).info)


def test_unknown_keys_and_baselines_are_errors(tiny: None, world: Path, tmp_path: Path) -> None:
    with pytest.raises(ParamsError, match=r"train\.waves\.tiny\.model\.widht: unknown key"):
        validated({**SETTINGS, "model": {"widht": 8}}, train.params_model("waves", "tiny"), "train.waves.tiny")
    with pytest.raises(ValueError, match="krigging"):
        fit(world, tmp_path / "runs" / "tiny", background="krigging")


@pytest.mark.parametrize(("epsilon", "followed"), [(1e-8, 1e-3), (1e-14, 1.0)])
def test_a_gradient_is_followed_as_far_as_epsilon_lets_it(tiny: None, epsilon: float, followed: float) -> None:
    """The first step of Adam is learning_rate x g / (|g| + epsilon), here with g = 1e-11."""
    network = registry.load("tiny")(registry.load("tiny").Config(width=8), worlds.waves().info)
    phase = Phase.model_validate({**SETTINGS["phases"]["fit"], "epsilon": epsilon, "weight_decay": 0.0, "warm_up": 0.0})
    optimizer = training_loop.Training(network, phase, TrainingData(worlds.waves(), Backgrounds(), phase, 0), (0,)).configure_optimizers()[
        "optimizer"
    ]
    before = [p.detach().clone() for p in network.parameters()]
    for p in network.parameters():
        p.grad = torch.full_like(p, 1e-11)
    optimizer.step()
    for old, new in zip(before, network.parameters(), strict=True):
        torch.testing.assert_close(old - new, torch.full_like(old, 0.01 * followed), rtol=0.02, atol=1e-7)


def test_a_diverging_loss_stops_with_the_step(tiny: None, world: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the loss is (nan|inf) at step \d+: lower learning_rate"):
        fit(world, tmp_path / "runs" / "tiny", learning_rate=1e30, warm_up=0.0)


def test_only_held_out_validation_sensors_choose_the_weights(tiny: None, tmp_path: Path) -> None:
    """The test sensor of the station world never enters training or validation batches."""
    dataset = worlds.stations()
    settings = {**SETTINGS["phases"]["fit"], "windows": {"batch": 4, "max_lead": 3, "context_frames": 2, "hide": 2}}
    data = TrainingData(dataset, Backgrounds(), validated(settings, Phase, "train.stations.tiny.phases.fit"), seed=3)
    asked = {int(s) for batch in data.validation() for s in batch.query.sensor.unique()}
    held_test = int((dataset["sensor/role"] == sensors.HELD_TEST).nonzero()[0][0])
    assert held_test not in asked
    assert int((dataset["sensor/role"] == sensors.HELD_VALIDATION).nonzero()[0][0]) in asked
