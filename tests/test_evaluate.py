"""The evaluate stage and the score table on analytic worlds, with predictors whose errors can be worked out."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import BaseModel
from torch import Tensor

from models import registry
from models.contract import DatasetInfo, FieldPrediction, Frames
from pipeline import evaluate, runs, scores, sensors
from pipeline.bootstrap import Bootstrap
from pipeline.params import ParamsError, validated
from tests import worlds

ALL = frozenset({"reconstruction", "interpolation", "forecast"})


@dataclass
class Nearest:
    """The last frame's nearest observation, plus a constant error, in model units."""

    offset: float = 0.0
    scale: float | None = None
    tasks: frozenset[str] = ALL
    levels: tuple[float, ...] = ()
    period: float | None = None

    class Config(BaseModel):
        offset: float = 0.0
        scale: float | None = None

    def __init__(self, config: Any = None, info: DatasetInfo | None = None, **changes: Any) -> None:
        self.offset, self.scale = (config.offset, config.scale) if config else (0.0, None)
        self.period = info.period if info else None
        self.__dict__.update(changes)

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        assert query.value is None, "the truth must not reach a predictor"
        assert context.value is not None
        delta = query.position[:, :1, :, None] - context.position[:, -1:, None]
        if self.period:
            delta = delta - self.period * torch.round(delta / self.period)
        distance = delta.square().sum(-1).masked_fill(~context.mask[:, -1:, None], torch.inf)  # [B,1,Q,N]
        value = torch.take_along_dim(context.value[:, -1], distance.argmin(-1)[:, 0, :, None], dim=1)
        mean = (value[:, None] + self.offset).expand(*query.mask.shape, -1)
        return FieldPrediction(mean, None if self.scale is None else torch.full_like(mean, self.scale))

    def state(self) -> dict[str, Tensor | str]:
        return {"offset": torch.tensor(self.offset)}

    def load(self, state: dict[str, Tensor | str]) -> None:
        self.offset = float(state["offset"])


def many_waves() -> sensors.SensorDataset:
    return worlds.waves(trajectories=32, frames=6, grid=8)


def params(**changes: Any) -> evaluate.Params:
    return evaluate.Params(**{"leads": (0, 1, 2), "batch": 4, "bootstrap": Bootstrap(draws=200), **changes})


def score(dataset: sensors.SensorDataset, predictor: Any, name: str = "nearest", role: str = "baseline", **changes: Any) -> scores.Table:
    return evaluate.score(dataset, predictor, 1, name, {"role": role}, params(**changes))[0]


def value(table: scores.Table, metric: str, stratum: str, lead: float, **more: Any) -> float:
    rows = table.select(**{"metric": metric, "stratum": stratum, "lead": lead, "distance": "all", **more})
    assert len(rows) == 1, rows
    return float(rows["value"].iloc[0])


def test_scores_agree_with_a_plain_loop_over_the_stations() -> None:
    dataset = worlds.stations()
    table = score(dataset, Nearest(), leads=(0, 3))
    role, frame = (
        dataset["sensor/role"],
        np.searchsorted(dataset["frame/obs_start"], np.arange(len(dataset["obs/value"])), side="right") - 1,
    )
    seen = {(f, s): v for f, s, v in zip(frame, dataset["obs/sensor"], dataset["obs/value"][:, 0], strict=True)}
    errors: dict[tuple[str, int], list[float]] = {}
    for anchor in dataset["cases/frame"][dataset["cases/split"] == sensors.TEST]:
        near = [s for s in range(8) if role[s] == sensors.CONTEXT and (anchor, s) in seen]
        for lead in (0, 3):
            for s in range(8):
                if role[s] == sensors.HELD_VALIDATION or (anchor + lead, s) not in seen:
                    continue
                distance = [np.linalg.norm(dataset["sensor/position"][n] - dataset["sensor/position"][s]) for n in near]
                error = seen[anchor, near[int(np.argmin(distance))]] - seen[anchor + lead, s]
                errors.setdefault(("held_out" if role[s] else "context", lead), []).append(error)
    for (stratum, lead), listed in errors.items():
        rows = table.select(metric="rmse", stratum=stratum, lead=float(lead), distance="all")
        assert rows["value"].item() == pytest.approx(np.sqrt(np.mean(np.square(listed))), rel=1e-4, abs=1e-4)
        assert rows["n"].item() == len(listed)
        assert value(table, "bias", stratum, lead) == pytest.approx(np.mean(listed), abs=1e-3)
    assert set(table.rows["stratum"]) == {"context", "held_out"}
    assert value(table, "rmse", "context", 0.0) < 1e-4


def test_a_constant_error_in_model_units_comes_out_in_physical_units() -> None:
    dataset = worlds.stations()
    table = score(dataset, Nearest(offset=0.5), leads=(0,))
    expected = 0.5 * dataset.info.std[0]
    assert value(table, "bias", "context", 0.0) == pytest.approx(expected, rel=1e-5)
    assert value(table, "rmse", "context", 0.0) == pytest.approx(expected, rel=1e-5)
    assert set(table.select(metric="rmse")["unit"]) == {"ug m-3"}
    assert value(table, "crps", "context", 0.0) == value(table, "mae", "context", 0.0)
    assert table.about["models"]["nearest"]["distribution"] == "mean only"


def test_strata_tasks_and_distances_of_a_gridded_truth() -> None:
    dataset = many_waves()
    table = score(dataset, Nearest(period=2.0), distance_edges=(0.15,))
    counted = table.select(metric="rmse", lead=0.0).set_index(["stratum", "distance"])["n"]
    cases = table.about["cases"]["count"]
    assert counted["field", "all"] == cases * 64
    assert counted["context", "all"] == cases * 16
    assert counted["between", "all"] == counted["between", "0-0.15"] + counted["between", ">0.15"] == cases * 48
    assert value(table, "rmse", "context", 0.0) < 1e-5 < value(table, "rmse", "between", 0.0)
    far, near = (value(table, "rmse", "between", 0.0, distance=name) for name in (">0.15", "0-0.15"))
    assert far > near
    tasks = table.rows.drop_duplicates(["stratum", "lead"]).set_index(["stratum", "lead"])["task"]
    assert tasks["context", 0.0] == tasks["field", 0.0] == "reconstruction"
    assert tasks["between", 0.0] == "interpolation"
    assert set(tasks[["context", "between", "field"]].xs(2.0, level="lead")) == {"forecast"}


def test_batches_of_any_size_give_the_same_bytes(tmp_path: Path) -> None:
    dataset, written = worlds.waves(), []
    for batch in (1, 3, 64):
        table = score(dataset, Nearest(scale=0.3, period=2.0), batch=batch, distance_edges=(0.1,))
        scores.write(tmp_path / str(batch), table)
        written.append([(tmp_path / str(batch) / name).read_bytes() for name in ("blocks.parquet", "scores.parquet", "scores.json")])
    assert written[0] == written[1] == written[2]


def test_chunks_of_blocks_merge_to_one_pass_exactly() -> None:
    dataset = many_waves()
    whole = score(dataset, Nearest(scale=0.3, period=2.0))
    test = dataset["cases/split"] == sensors.TEST
    half = np.where(dataset["cases/block"] < np.median(dataset["cases/block"][test]), sensors.TEST, 7)
    parts = []
    for split in (np.where(test, half, 7), np.where(test & (half == 7), sensors.TEST, 7)):
        part = replace(dataset, arrays={**dataset.arrays, "cases/split": split})
        parts.append(score(part, Nearest(scale=0.3, period=2.0)).blocks)
    offset = parts[0]["block"].max() + 1
    merged = pd.concat([parts[0], parts[1].assign(block=parts[1]["block"] + offset)], ignore_index=True)
    pd.testing.assert_frame_equal(merged, whole.blocks, check_exact=True)
    pd.testing.assert_frame_equal(scores.build(whole.about, merged).rows, whole.rows, check_exact=True)


def test_a_predictor_is_scored_only_on_the_tasks_it_claims() -> None:
    dataset = many_waves()
    table = score(dataset, Nearest(tasks=frozenset({"interpolation"}), period=2.0))
    assert set(zip(table.rows["stratum"], table.rows["lead"], strict=True)) == {("between", 0.0)}
    forecasts = score(dataset, Nearest(tasks=frozenset({"forecast"}), period=2.0))
    assert set(forecasts.rows["lead"]) == {1.0, 2.0}
    with pytest.raises(ValueError, match="none of which the leads"):
        score(dataset, Nearest(tasks=frozenset({"forecast"})), leads=(0,))


def test_predictions_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match=r"nearest on waves: \d+ predictions \(mean\) are not finite, first in case \d+, lead 0, point 0"):
        score(many_waves(), Nearest(offset=float("nan")))
    with pytest.raises(ValueError, match=r"standard deviations are below zero, the least is -\d"):
        score(many_waves(), Nearest(scale=-1.0))


def test_coverage_and_width_follow_the_scale() -> None:
    table = score(many_waves(), Nearest(scale=100.0, period=2.0))
    assert value(table, "coverage_90", "field", 1.0) == 1.0
    assert value(table, "width_90", "field", 1.0) == pytest.approx(2 * 1.6448536 * 80.0, rel=1e-5)
    assert table.about["models"]["nearest"]["distribution"] == "gaussian"


def test_intervals_hold_the_value_and_need_enough_blocks() -> None:
    table = score(many_waves(), Nearest(period=2.0))
    rows = table.select(metric="rmse", distance="all", stratum="field", lead=2.0)
    assert (rows["low"] < rows["value"]).all()
    assert (rows["value"] < rows["high"]).all()
    assert set(rows["blocks"]) == {8}
    few = score(worlds.waves(), Nearest(period=2.0))
    assert few.rows["low"].isna().all()


def test_only_the_same_cases_may_be_compared() -> None:
    dataset = many_waves()
    mine = score(dataset, Nearest(offset=0.1, period=2.0), "mine", "model")
    changed = {**dataset.arrays, "truth/value": dataset["truth/value"] + np.float32(0.01)}
    other = score(replace(dataset, arrays=changed), Nearest(period=2.0))
    with pytest.raises(ValueError, match=r"mine \| nearest: cases: .*sha256"):
        scores.merge([mine, other])
    with pytest.raises(ValueError, match="leads"):
        scores.merge([mine, score(dataset, Nearest(period=2.0), leads=(0, 1))])
    with pytest.raises(ValueError, match="mine is in two tables"):
        scores.merge([mine, mine])
    assert scores.merge([mine, score(dataset, Nearest(period=2.0))]).models == ["mine"]


def test_the_context_a_model_wants_does_not_change_the_cases() -> None:
    dataset = many_waves()
    one, two = (evaluate.score(dataset, Nearest(), n, f"n{n}", {"role": "model"}, params())[0] for n in (1, 3))
    assert scores.merge([one, two]).models == ["n1", "n3"]


def test_paired_skill_has_the_right_sign_and_calls_nothing_a_win_that_is_none() -> None:
    dataset = many_waves()
    table = scores.merge(
        [
            score(dataset, Nearest(period=2.0)),
            score(dataset, Nearest(period=2.0, offset=0.0), "same", "model"),
            score(dataset, Nearest(period=2.0, offset=0.8), "worse", "model"),
            score(dataset, Nearest(period=2.0, offset=0.8), "floor"),
        ]
    )
    skills = scores.skill(table)
    cell = skills[(skills["metric"] == "mse") & (skills["stratum"] == "field") & (skills["lead"] == 1.0)].set_index(["model", "baseline"])
    same, worse, better = cell.loc[("same", "nearest")], cell.loc[("worse", "nearest")], cell.loc[("same", "floor")]
    assert (same["skill"], same["verdict"]) == (0.0, "within noise")
    assert worse["verdict"] == "worse"
    assert worse["skill"] <= worse["high"] < 0
    assert better["verdict"] == "better"
    assert 0 < better["low"] <= better["skill"] <= better["high"]
    ratio = value(table, "mse", "field", 1.0, model="same") / value(table, "mse", "field", 1.0, model="floor")
    assert better["skill"] == pytest.approx(1 - ratio, rel=1e-5)
    assert better["ratio"] == pytest.approx(ratio, rel=1e-5)
    left = scores.unbeaten(skills)
    assert set(left[(left["stratum"] == "field") & (left["lead"] == 1.0)]["baseline"]) == {"nearest"}
    assert table.best("rmse", "vorticity", "field", 1.0) == ("nearest", False)  # its twin is as good
    assert scores.ranking(table, "rmse", "vorticity", "field")["model"].tolist() == ["nearest", "same", "floor", "worse"]


def test_few_blocks_give_no_verdict() -> None:
    dataset = worlds.waves()
    table = scores.merge([score(dataset, Nearest()), score(dataset, Nearest(offset=1.0), "mine", "model")])
    assert set(scores.skill(table)["verdict"]) == {"too few blocks"}


def test_a_broken_table_is_refused_with_every_reason(tmp_path: Path) -> None:
    table = score(many_waves(), Nearest())
    doubled = replace(table, rows=pd.concat([table.rows, table.rows.iloc[:1].assign(value=np.inf)], ignore_index=True))
    with pytest.raises(ValueError, match=r"(?s)1 doubled rows.*1 values are not finite"):
        scores.write(tmp_path / "broken", doubled)
    with pytest.raises(ValueError, match=r"blocks\.parquet, scores\.parquet, scores\.json missing; run the evaluate stage"):
        scores.read(tmp_path)


def test_the_stage_writes_a_folder_that_reads_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BASELINES, "nearest", "tests.test_evaluate:Nearest")
    dataset = many_waves()
    sensors.write(tmp_path / "waves.zarr", dataset)
    for name, offset in (("nearest", 0.0), ("shifted", 0.3)):
        runs.save(tmp_path / "runs" / name, "nearest", {"offset": offset}, dataset.info, {"offset": torch.tensor(offset)}, 1)
    given = params(distance_edges=(0.15,), cases=12, examples=1)
    for out in ("first", "second"):
        evaluate.run(given, "waves", "baselines", sensors=tmp_path / "waves.zarr", run=tmp_path / "runs", out=tmp_path / out)
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / out).iterdir()} for out in ("first", "second"))
    assert first == second
    assert set(first) == {"blocks.parquet", "scores.parquet", "scores.json", "metrics.json", "leads.csv", "cases.csv", "examples.parquet"}
    table = scores.read(tmp_path / "first")
    assert table.baselines == ["nearest", "shifted"]
    assert table.about["cases"]["count"] == 12
    assert json.loads(first["scores.json"])["rows"][0]["dataset"] == "waves"
    shown = json.loads(first["metrics.json"])
    assert shown["nearest"]["vorticity"]["lead 1"] == pytest.approx(value(table, "rmse", "field", 1.0, model="nearest"), 1e-3)
    leads = pd.read_csv(tmp_path / "first" / "leads.csv")
    assert {"lead", "model", "stratum", "rmse", "crps"} <= set(leads)
    examples = pd.read_parquet(tmp_path / "first" / "examples.parquet")
    assert set(examples["model"]) == {"nearest", "shifted"}
    assert len(examples) == 2 * 3 * 64
    one = examples[(examples["model"] == "nearest") & (examples["lead"] == 2.0)]
    case = int(one["case"].iloc[0])
    np.testing.assert_allclose(one["truth"], dataset["truth/value"][dataset["cases/frame"][case] + 2, :, 0], atol=1e-5)
    np.testing.assert_allclose(one[["x", "y"]], dataset["truth/position"], atol=1e-6)


def test_a_run_of_another_dataset_and_an_empty_folder_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.BASELINES, "nearest", "tests.test_evaluate:Nearest")
    sensors.write(tmp_path / "waves.zarr", many_waves())
    runs.save(tmp_path / "run", "nearest", {}, worlds.stations().info, {"offset": torch.tensor(0.0)}, 1)
    with pytest.raises(ValueError, match="trained on another dataset than 'waves'"):
        evaluate.run(params(), "waves", "nearest", sensors=tmp_path / "waves.zarr", run=tmp_path / "run", out=tmp_path / "out")
    with pytest.raises(ValueError, match="holds no run folder"):
        evaluate.run(params(), "waves", "nearest", sensors=tmp_path / "waves.zarr", run=tmp_path / "nothing", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_params_name_what_is_wrong() -> None:
    with pytest.raises(ParamsError, match=r"(?s)evaluate\.waves\.scent\.leads: .*increase.*evaluate\.waves\.scent\.bach: unknown key"):
        validated({"leads": [2, 1], "batch": 1, "bach": 2}, evaluate.params_model("waves", "scent"), "evaluate.waves.scent")


def signs() -> sensors.SensorDataset:
    """Waves as two classes, above zero and not."""
    waves = many_waves()
    arrays = {name: np.asarray(array) for name, array in waves.arrays.items()}
    for name in ("obs/value", "truth/value"):
        above = arrays[name] > 0
        arrays[name] = np.concatenate([above, ~above], axis=-1).astype(np.float32)
    names = {"variables": ("above", "below"), "units": ("1", "1"), "limits": ((0.0, 1.0),) * 2}
    info = replace(waves.info, **names, mean=(0.4, 0.6), std=(0.5, 0.5), classes=True)  # type: ignore[arg-type]
    return sensors.SensorDataset(info, arrays, waves.recipe, waves.inputs)


@dataclass
class Sure:
    """States the same probability of the first class everywhere."""

    chance: float
    tasks: frozenset[str] = ALL
    levels: tuple[float, ...] = ()

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        chance = torch.tensor([self.chance, 1 - self.chance]).expand(*query.mask.shape, 2)
        return FieldPrediction(torch.zeros_like(chance), probabilities=chance)


def test_classes_are_scored_by_their_probabilities() -> None:
    dataset = signs()
    table = score(dataset, Sure(0.3))
    assert table.about["models"]["nearest"]["distribution"] == "classes"
    share = 1 - value(table, "bias", "field", 1, variable="above") - 0.7  # of the first class: the mean of the truth
    expected = -share * np.log(0.3) - (1 - share) * np.log(0.7)
    for variable in dataset.info.variables:
        assert value(table, "nll", "field", 1, variable=variable) == pytest.approx(expected, rel=1e-5)
        assert value(table, "accuracy", "field", 1, variable=variable) == pytest.approx(1 - share, rel=1e-5)
    assert table.select(metric="coverage_90").empty
    assert evaluate.headline(table)["nearest"]["above"]["lead 1"] == pytest.approx(expected, rel=1e-3)
    assert {"nll", "brier", "accuracy"} <= set(evaluate.by_lead(table).columns)


def test_means_of_classes_count_as_probabilities() -> None:
    dataset = signs()
    near, far = score(dataset, Nearest(period=dataset.info.period)), score(dataset, Nearest(offset=-9.0, period=dataset.info.period))
    assert near.about["models"]["nearest"]["distribution"] == "classes"
    assert value(near, "accuracy", "field", 0, variable="above") > 0.8
    assert value(near, "mse", "context", 0, variable="above") == pytest.approx(0, abs=1e-6)
    assert value(far, "nll", "field", 0, variable="above") == pytest.approx(np.log(2))  # nothing above zero is left: all alike
