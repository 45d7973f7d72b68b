"""Block protocols: days of buses in the benchmark's own format against a plain reading of its rules, and the real anchor of Kolkata."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from sklearn.model_selection import KFold

from models import registry
from models.baselines.per_case import CaseInverseDistance, CaseMean
from models.contract import Frames
from models.scent import around
from models.scent.config import ScentConfig
from models.scent.model import Scent
from pipeline import baselines, evaluate, observations, params, sensors, subsample, train
from pipeline.batches import TrainingBatches, Windows
from pipeline.cases import cases
from tests import worlds
from tests.drops import bus_day, bus_row, ingested

ROOT = Path(__file__).parents[1]
DAYS = [f"2020-11-{day:02d}" for day in range(8, 15)]
BLOCKS = {
    "step": 0.5, "utc_offset": 5.5, "cells": {"longitude": 0.0102, "latitude": 0.009, "origin": [77.1, 28.48]}, "measured": [5.5, 23.5],
    "slots": [5.5, 22.5], "least": 20, "history": 1, "learn": ["2020-11-08", "2020-11-11"], "validation": 0.34,
    "test": ["2020-11-11", "2020-11-15"],
}  # fmt: skip


def day_files() -> dict[str, bytes]:
    """Three buses that report every 11 minutes, day and night, and wander over 3 km, south-west of the origin too; one day has few rows."""
    rng, files = np.random.default_rng(0), {}
    for day in DAYS:
        lines = []
        for minute in range(0, 1440, 11 if day != "2020-11-12" else 240):
            for bus in range(3):
                lat, long = 28.475 + 0.03 * rng.random(), 77.095 + 0.03 * rng.random()
                pm = round(100 + 60 * np.sin(minute / 200 + 40 * (lat - 28.48)) + 10 * rng.normal())
                clock = f"{day} {minute // 60:02d}:{minute % 60:02d}:{13 * bus:02d}+05:30"
                lines.append(bus_row(clock, f"{bus:016x}", round(lat, 6), round(long, 6), f"{pm}.0,{pm + 20}.0,{pm + 40}.0"))
        files[f"{day}_all.csv"] = bus_day(*lines)
    return files


def flagged(folder: Path) -> Path:
    """What validate would hand on where it finds no fault."""
    for path in observations.partitions(folder):
        observations.write_partition(observations.read_partition(path).assign(flag_aggregate=np.int8(1)), path)
    return folder


@pytest.fixture(scope="module")
def delhi(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return flagged(ingested(tmp_path_factory.mktemp("delhi"), "airdelhi", day_files(), structure="raw", variables=["pm2p5"]))


def made(checked: Path, out: Path, source: str = "airdelhi", **changes: Any) -> sensors.SensorDataset:
    raw = {"source": source, "variables": ["pm2p5"], "max_flag": 4, "blocks": {**BLOCKS, **changes}}
    section = params.validated(raw, subsample.Subsample, "subsample.key")
    subsample.run(section, "key", ingested=checked, checked=checked, out=out)
    return sensors.read(out)


def read_plainly() -> list[pd.DataFrame]:
    """Steps 1 to 6 of the benchmark's preparation, file by file, as its program does them; days with few rows left out."""
    out = []
    for content in day_files().values():
        table = pd.read_csv(pd.io.common.BytesIO(content))
        utc = pd.to_datetime(table["dateTime"], utc=True)
        table = table[(utc.dt.hour * 3600 + utc.dt.minute * 60 + utc.dt.second <= 18 * 3600)].assign(utc=utc)
        local = table["utc"].dt.tz_convert("Asia/Kolkata")
        table["minute"] = (local.dt.round("30min") - local.dt.normalize()).dt.total_seconds() // 60
        table = table[(table["minute"] >= 300) & (table["minute"] <= 1350)].copy()
        for name, origin, step in (("lat", 28.48, 0.009), ("long", 77.1, 0.0102)):
            table[name] = [round(origin + int((v - origin) / step) * step, 4) for v in table[name]]
        table = table[table["utc"].dt.date == table["utc"].dt.tz_convert("Asia/Kolkata").dt.date]
        cells = table.groupby(["minute", "lat", "long"], as_index=False)["pm2_5"].mean().round(2)
        if len(cells) >= BLOCKS["least"]:
            out.append(cells)
    return out


def scored_plainly(unit: str, task: str) -> list[tuple[float, float]]:
    """RMSE of inverse distance and of the mean, day by day and fold by fold."""
    days = read_plainly()[-3:]
    folds = []
    for day in days:
        cells = sorted(set(zip(day["lat"], day["long"], strict=True)))
        dealt = np.arange(len(day)) if unit == "rows" else np.array([cells.index(c) for c in zip(day["lat"], day["long"], strict=True)])
        out = np.zeros(len(day), int)
        for k, (_, part) in enumerate(
            KFold(5, shuffle=True, random_state=0).split(np.zeros((len(day) if unit == "rows" else len(cells), 1)))
        ):
            out[np.isin(dealt, part)] = k
        folds.append(out)
    found = []
    for i in (1, 2):
        for k in range(1 if task == "forecast" else 5):
            before, today = days[i - 1], days[i]
            a, c = before[folds[i - 1] != k], today[folds[i] != k]
            d = today if task == "forecast" else today[folds[i] == k]
            known = {"interpolation": [a, c], "same_day": [before[:0], c], "missing": [before, c], "forecast": [before, c[:0]]}[task]
            x = np.concatenate([part[["minute", "lat", "long"]].to_numpy() + np.array([1440 * n, 0, 0]) for n, part in enumerate(known)])
            y = np.concatenate([part["pm2_5"].to_numpy() for part in known])
            q = d[["minute", "lat", "long"]].to_numpy() + np.array([1440, 0, 0])
            if unit == "cells":
                kept = ~(x[:, None, 1:] == q[None, :, 1:]).all(-1).any(1)
                x, y = x[kept], y[kept]
            low, high = x.min(0), x.max(0)
            apart = np.linalg.norm(((q - low) / (high - low))[:, None] - ((x - low) / (high - low))[None], axis=-1)
            weight = 1 / apart**3
            truth = d["pm2_5"].to_numpy()
            found.append(tuple(np.sqrt(((mean - truth) ** 2).mean()) for mean in (weight @ y / weight.sum(1), y.mean())))
    return found


@pytest.mark.parametrize(
    ("unit", "task"),
    [("rows", "interpolation"), ("cells", "interpolation"), ("rows", "same_day"), ("rows", "missing"), ("rows", "forecast")],
)
def test_scores_are_those_of_a_plain_reading_of_the_rules(unit: str, task: str, delhi: Path, tmp_path: Path) -> None:
    dataset = made(delhi, tmp_path / "sensors.zarr", unit=unit, task=task)
    ahead = task == "forecast"
    window = {"context_frames": 35, "max_lead": 35} if ahead else {"context_frames": 70, "min_lead": -34, "max_lead": 0, "hold": 0.2}
    fit = {"windows": {"batch": 4, "query_frames": 35, **window}, "steps": 2, "fit": {"case_mean": {}, "case_inverse_distance": {}}}
    section = params.validated(fit, baselines.params_model("key"), "baselines.key")
    baselines.run(section, "key", sensors=tmp_path / "sensors.zarr", out=tmp_path / "runs")
    leads = tuple(range(1, 36)) if ahead else tuple(range(-34, 1))
    evaluate.run(
        evaluate.Params(leads=leads, batch=3),
        "key",
        "baselines",
        sensors=tmp_path / "sensors.zarr",
        run=tmp_path / "runs",
        out=tmp_path / "scores",
    )
    table = pd.read_csv(tmp_path / "scores" / "cases.csv")
    expected = np.array(scored_plainly(unit, task))
    for name, column in (("case_inverse_distance", 0), ("case_mean", 1)):
        rows = table[table["model"] == name]
        np.testing.assert_allclose(rows["rmse"], expected[:, column], rtol=2e-3)  # float32 values and positions
        assert rows["fold"].tolist() == [*range(1 if ahead else 5)] * 2
    assert dataset.info.n_sensors == 0
    assert (tmp_path / "scores" / "metrics.json").read_text().count('"cases": 2' if ahead else '"cases": 10') == 2


def test_a_case_knows_and_is_asked_what_its_blocks_say(delhi: Path, tmp_path: Path) -> None:
    """A + C is known and D asked; the folds of a day ask each of its observations once; nothing is asked that is known."""
    dataset = made(delhi, tmp_path / "rows.zarr")
    frame = np.searchsorted(dataset["frame/obs_start"], np.arange(len(dataset["obs/value"])), side="right") - 1
    number, test = frame // 35, np.flatnonzero(dataset["cases/split"] == sensors.TEST)
    per_day = [np.flatnonzero(number == day) for day in range(int(number.max()) + 1)]
    assert len(per_day) == 6, "the day with few rows does not exist"
    for first in range(0, len(test), 5):
        day = int(dataset["cases/frame"][test[first]]) // 35
        parts = []
        for case in test[first : first + 5]:
            seen, asked = (
                dataset[f"cases/{what}"][dataset[f"cases/{what}_start"][case] : dataset[f"cases/{what}_start"][case + 1]]
                for what in ("seen", "asked")
            )
            assert set(number[asked]) == {day}
            assert set(number[seen]) == {day - 1, day}
            assert not set(seen) & set(asked)
            assert {*seen[number[seen] == day], *asked} == set(per_day[day])
            parts.append(asked)
        assert sorted(np.concatenate(parts)) == per_day[day].tolist()
    part = next(cases(dataset, "test", 70, (-34, -3, 0), batch=2))
    assert part.batch.context.mask.sum(dim=(1, 2)).tolist() == [
        int(dataset["cases/seen_start"][case + 1] - dataset["cases/seen_start"][case]) for case in test[:2]
    ]
    short = next(cases(dataset, "test", 35, (-34, -3, 0), batch=2))
    assert torch.equal(short.batch.query.value, part.batch.query.value)
    assert short.batch.context.mask.sum() < part.batch.context.mask.sum()


def test_asked_cells_are_known_nowhere(delhi: Path, tmp_path: Path) -> None:
    def shared(dataset: sensors.SensorDataset) -> int:
        place = np.unique(dataset["obs/position"], axis=0, return_inverse=True)[1].ravel()
        starts = [zip(dataset[f"cases/{what}_start"][:-1], dataset[f"cases/{what}_start"][1:], strict=True) for what in ("seen", "asked")]
        return sum(
            int(np.isin(place[dataset["cases/asked"][a:b]], place[dataset["cases/seen"][c:d]]).sum())
            for (c, d), (a, b) in zip(*starts, strict=True)
        )

    assert shared(made(delhi, tmp_path / "cells.zarr", unit="cells", task="missing")) == 0
    assert shared(made(delhi, tmp_path / "official.zarr", unit="cells", task="missing", asked_cells_in_history=True)) > 0


@pytest.mark.parametrize("places", [False, True])
def test_a_window_asks_what_it_hides_and_nothing_else(places: bool, delhi: Path, tmp_path: Path) -> None:
    dataset = made(delhi, tmp_path / "rows.zarr")
    window = Windows(context_frames=35, min_lead=-34, max_lead=0, batch=6, query_frames=35, hold=0.3, hold_places=places)
    batch = TrainingBatches(dataset, window, seed=1)[3]
    known, asked = batch.context, batch.query
    frames = torch.stack([asked.time[:, s] for s in range(35)], dim=1)
    assert torch.equal(frames, known.time)
    held = 0
    for b in range(6):
        seen = {(float(known.time[b, t]), *known.position[b, t, n].tolist()) for t, n in known.mask[b].nonzero().tolist()}
        wanted = {(float(asked.time[b, t]), *asked.position[b, t, n].tolist()) for t, n in asked.mask[b].nonzero().tolist()}
        held += len(wanted)
        assert not seen & wanted
        frame = np.searchsorted(dataset["frame/time"], float(known.time[b, 0]))
        assert len(seen) + len(wanted) == int(np.diff(dataset["frame/obs_start"][[frame, frame + 35]])[0])
        if places:
            assert not {tuple(x[1:]) for x in seen} & {tuple(x[1:]) for x in wanted}
    assert held


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learn": ["2020-11-08", "2020-11-12"]}, "do not overlap"),
        ({"slots": [5.5, 22.4]}, "whole steps"),
        ({"history": 0, "task": "forecast"}, "task forecast needs days of history"),
        ({"least": 10_000}, "has no day with 10000 observations"),
        ({"history": 3}, "must each leave one with 3 days before it"),
        ({"unit": "cells", "folds": 40}, "fewer than the 40 folds"),
    ],
)
def test_a_protocol_that_cannot_be_is_an_error(changes: dict[str, Any], message: str, delhi: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        made(delhi, tmp_path / "sensors.zarr", **changes)


PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
BLOCKED = sorted(name for name, section in PARAMS["subsample"].items() if "blocks" in section)


@pytest.mark.parametrize("name", BLOCKED)
def test_windows_and_leads_are_the_days_of_the_protocol(name: str) -> None:
    """What is fitted, trained and scored counts frames, and the protocol slots of days: four days of 24 or 35, asked about the last one."""
    raw = PARAMS["subsample"][name]
    blocks = params.validated(raw, subsample.Subsample, f"subsample.{name}").blocks
    assert blocks is not None
    slots, ahead = blocks.slots_a_day, blocks.task == "forecast"
    days = blocks.history if ahead else 1 if blocks.task == "same_day" else blocks.history + 1
    leads = list(range(1, slots + 1)) if ahead else list(range(1 - slots, 1))
    fit = PARAMS["baselines"][name]
    windows = params.validated(fit, baselines.params_model(name), f"baselines.{name}").windows
    assert windows.context_frames == days * slots
    assert [windows.min_lead, windows.max_lead] == [leads[0], leads[-1]]
    assert windows.hold_places == (blocks.unit == "cells")
    assert PARAMS["evaluate"][name]["leads"] == leads
    kinds = {choice.get("kind", key) for key, choice in fit["fit"].items()}
    listed = {kind for kind in registry.BASELINES if kind.startswith("case_")}
    assert kinds - {"climatology"} == listed - ({"case_sage"} if ahead else {"case_arima", "case_nbeats"})
    for model, section in PARAMS["train"].get(name, {}).items():
        quick = {key: value for key, value in section.items() if key != "presets"}
        phase = params.validated(quick, train.params_model(name, model), f"train.{name}.{model}").phases.fit
        assert phase.windows.context_frames == (slots if model == "bsa_tnp" else days * slots)
        assert [phase.windows.min_lead, phase.windows.max_lead] == [leads[0], leads[-1]]
        assert phase.windows.hold_places == (blocks.unit == "cells")
        assert list(phase.validation.leads) == leads
        assert section["model"] == PARAMS["train"]["kolkata_blocks"][model]["model"]
        assert section["background"] in fit["fit"]


# What is fitted to a case -------------------------------------------------------------------------------------------------------------


def hourly(times: list[float], value: list[float]) -> Frames:
    """One observation a frame, all at one place; local time is UTC."""
    t = torch.tensor([times], dtype=torch.float64)
    return Frames(
        torch.zeros(1, len(times), 1, 2), torch.ones(1, len(times), 1, dtype=torch.bool), t, torch.tensor(value)[None, :, None, None]
    )


def test_days_without_a_frame_are_not_counted() -> None:
    """Known at 12:00 on day 0 and at 06:00 on day 5: from 18:00 on day 5 they are 30 and 12 hours away, not 126 and 12."""
    info = worlds.torus_info("hours", geometry="plane", time_unit="h", time_origin="1970-01-01T00:00:00Z")
    baseline = CaseInverseDistance(CaseInverseDistance.Config(exponent=1), info)
    baseline.load({"error": torch.ones(1).double()})
    context, query = hourly([12, 5 * 24 + 6], [0.0, 1.0]), hourly([5 * 24 + 18], [0.0])
    assert float(baseline.predict(context, query).mean) == pytest.approx((1 / 12) / (1 / 12 + 1 / 30))


def test_the_mean_of_the_day_forgets_the_days_before() -> None:
    info = worlds.torus_info("hours", geometry="plane", time_unit="h", time_origin="1970-01-01T00:00:00Z")
    context, query = hourly([10, 20, 30, 40, 50], [9.0, 9.0, 1.0, 3.0, 0.0]), hourly([41], [0.0])
    context = replace(context, mask=context.mask & (context.time < 48)[..., None])  # of the third day nothing is known
    for last_day, expected in ((False, 5.5), (True, 2.0)):
        baseline = CaseMean(CaseMean.Config(last_day=last_day), info)
        baseline.load({"error": torch.ones(1).double()})
        assert float(baseline.predict(context, query).mean) == pytest.approx(expected)


# SCENT around the frame that is asked -------------------------------------------------------------------------------------------------


def test_scent_reads_the_frames_around_a_question(delhi: Path, tmp_path: Path) -> None:
    dataset = made(delhi, tmp_path / "rows.zarr")
    batch = next(cases(dataset, "test", 70, tuple(range(-34, 1)), batch=2)).batch
    sizes = {"horizon": 1, "width": 16, "heads": 2, "latents": 4, "processor_layers": 1, "cen_layers": 0, "cn_layers": 0, "bands": 4}
    torch.manual_seed(0)
    model = Scent(ScentConfig(around=2, neighbours=2, head="gaussian", time_targeting=False, **sizes), dataset.info)  # type: ignore[call-arg]
    torch.nn.init.normal_(model.head.parameters().__next__())
    answer = model.predict(batch.context, batch.query).mean
    assert torch.isfinite(model.loss(batch)["loss"])
    # What lies more than two frames away does not matter, what lies nearer does: lead -10 is frame 59 of the context.
    for frame, matters in ((56, False), (57, True), (61, True), (62, False)):
        value = batch.context.value.clone()
        value[:, frame] += 3.0 * batch.context.mask[:, frame, :, None]
        changed = (model.predict(replace(batch.context, value=value), batch.query).mean - answer)[:, 24] * batch.query.mask[:, 24, :, None]
        assert bool(changed.abs().max() > 1e-4) == matters, frame
    alone = replace(
        batch.query, **{name: getattr(batch.query, name)[:, 24:25] for name in ("position", "mask", "time", "value", "covariate", "sensor")}
    )
    torch.testing.assert_close(model.predict(batch.context, alone).mean, answer[:, 24:25], atol=1e-5, rtol=1e-5)
    early = replace(batch.query, time=batch.query.time - 1000)
    with pytest.raises(ValueError, match="lie before the context"):
        around.windows(batch.context, early, 2, dataset.info)


# The real anchor ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.real
def test_kolkata_reproduces_the_measured_anchor(mirror: Path, tmp_path: Path) -> None:
    """Winter, random rows: inverse distance 9.47 and the day's mean 15.9 over 275 days and folds, measured apart from this code."""
    files = {path.name: path.read_bytes() for path in (mirror / "kolkata").glob("Mobile_[AW]*.csv.gz")}
    checked = flagged(ingested(tmp_path, "kolkata", files, kinds=["mobile"]))
    section = params.validated(
        params.read(ROOT / "params.yaml", "subsample.kolkata_blocks")[0], subsample.Subsample, "subsample.kolkata_blocks"
    )
    subsample.run(section, "kolkata_blocks", ingested=checked, checked=checked, out=tmp_path / "sensors.zarr")
    dataset = sensors.read(tmp_path / "sensors.zarr")
    fitted = {
        "inverse": CaseInverseDistance(CaseInverseDistance.Config(), dataset.info),
        "mean": CaseMean(CaseMean.Config(last_day=True), dataset.info),
    }
    errors: dict[str, list[float]] = {name: [] for name in fitted}
    for part in cases(dataset, "test", 96, tuple(range(-23, 1)), batch=25):
        query = part.batch.query
        for name, baseline in fitted.items():
            baseline.load({"error": torch.ones(1).double()})
            square = ((baseline.predict(part.batch.context, query).mean - query.value) * dataset.info.std[0]).square()[..., 0] * query.mask
            errors[name] += (square.sum((1, 2)) / query.mask.sum((1, 2))).sqrt().tolist()
    assert len(errors["mean"]) == 275
    assert np.mean(errors["inverse"]) == pytest.approx(9.47, abs=0.02)
    assert np.mean(errors["mean"]) == pytest.approx(15.9, abs=0.05)
