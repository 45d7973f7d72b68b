"""The subsample stage on small networks and fields whose content is known."""

from __future__ import annotations

from dataclasses import fields as dataclass_fields
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from pipeline import observations, params, recipe, sensors, subsample
from pipeline.batches import TrainingBatches, Windows, at_points
from pipeline.cases import cases
from tests.drops import tree

HOURS = 300
START = pd.Timestamp("2020-01-01T00:00Z")
STATIONS = {f"s{i}": (116.0 + 0.1 * (i % 3), 40.0 + 0.1 * (i // 3)) for i in range(6)}


def station_rows(hours: int = HOURS, seed: int = 0) -> pd.DataFrame:
    """Hourly pm2p5 and t2m of six stations; a tenth of pm2p5 absent, s0 without weather, some flags 3 and 4."""
    rng = np.random.default_rng(seed)
    parts = []
    for number, (name, (longitude, latitude)) in enumerate(STATIONS.items()):
        time = START + pd.to_timedelta(np.arange(hours), "h")
        base = {"longitude": longitude, "latitude": latitude, "platform_id": name}
        pm = pd.DataFrame({"time": time, "variable": "pm2p5", "value": 50 + 10 * number + rng.normal(0, 5, hours), **base})
        parts.append(pm[rng.random(hours) > 0.1])
        if number:
            parts.append(pd.DataFrame({"time": time, "variable": "t2m", "value": 280 + rng.normal(0, 5, hours), **base}))
    rows = pd.concat(parts, ignore_index=True)
    rows["flag_aggregate"] = rng.choice([1, 1, 1, 1, 3, 4], len(rows)).astype("int8")
    rows["trip_id"] = pd.Series([None] * len(rows), dtype="str")
    return rows


def bus_rows(hours: int = 60) -> pd.DataFrame:
    """Two buses that cross a 4 x 4 grid of cells of 0.01 degrees, a reading every 10 minutes."""
    rng = np.random.default_rng(1)
    parts = []
    for bus in ("b0", "b1"):
        n = hours * 6
        x, y = rng.uniform(77.0, 77.04, n), rng.uniform(28.0, 28.04, n)
        time = START + pd.to_timedelta(np.arange(n) * 10, "min")
        base = {"platform_id": bus, "trip_id": f"{bus}-1", "variable": "pm2p5"}
        parts.append(pd.DataFrame({"time": time, "longitude": x, "latitude": y, "value": 1000 * (x - 77) + rng.normal(0, 1, n), **base}))
    return pd.concat(parts, ignore_index=True).assign(flag_aggregate=np.int8(1))


def checked(folder: Path, rows: pd.DataFrame) -> Path:
    rows = rows.assign(knowledge_time=rows["time"])
    for day, part in rows.groupby(rows["time"].dt.floor("4D").dt.strftime("%Y-%m-%d")):
        observations.write_partition(part, folder / "observations" / f"{day}.parquet")
    return folder


def section(**changes: Any) -> dict[str, Any]:
    network = {"covariates": ["t2m"], "utc_offset": 8.0, "held_out": {"validation": ["s4"], "test": ["s5"]}, **changes.pop("network", {})}
    return {
        "source": "net",
        "variables": ["pm2p5"],
        "network": network,
        "split": {"validation": 0.2, "test": 0.2, "gap": 10},
        "cases": {"stride": 2, "horizon": 4, "block": 24},
        **changes,
    }


def made(folder: Path, rows: pd.DataFrame, name: str = "out", **changes: Any) -> sensors.SensorDataset:
    model = params.validated(section(**changes), subsample.Subsample, "subsample.net")
    subsample.run(model, "net", ingested=folder / "none", checked=checked(folder / "checked" / name, rows), out=folder / f"{name}.zarr")
    return sensors.read(folder / f"{name}.zarr")


def test_station_network_by_the_book(tmp_path: Path) -> None:
    """Every stored row against a plain pandas account of the same rules."""
    rows = station_rows()
    dataset = made(tmp_path, rows)
    good = rows[rows["flag_aggregate"] <= 3]
    table = good.pivot_table(index=["time", "platform_id"], columns="variable", values="value").dropna(subset="pm2p5").sort_index()
    hour = ((table.index.get_level_values("time") - pd.Timestamp(0, tz="UTC")) / pd.Timedelta("1h")).to_numpy()
    frame = (hour - dataset["frame/time"][0]).astype(int)
    assert np.array_equal(np.repeat(np.arange(dataset.n_frames), np.diff(dataset["frame/obs_start"])), frame)
    assert [list(STATIONS)[k] for k in dataset["obs/sensor"]] == list(table.index.get_level_values("platform_id"))
    assert np.allclose(dataset["obs/value"][:, 0], table["pm2p5"])
    assert dataset["sensor/role"].tolist() == [0, 0, 0, 0, 1, 2]
    assert dataset.sensor_names == tuple(STATIONS)
    learn = (dataset["frame/split"][frame] == sensors.TRAIN) & (dataset["obs/sensor"] < 4)
    assert dataset.info.mean[0] == pytest.approx(table["pm2p5"][learn].mean())
    assert dataset.info.std[0] == pytest.approx(table["pm2p5"][learn].std(ddof=0))
    assert dataset.info.context_covariates == ("t2m", "availability")
    weather = table["t2m"].to_numpy()
    expected = np.nan_to_num((weather - np.nanmean(weather[learn])) / np.nanstd(weather[learn]), nan=0.0)
    assert np.allclose(dataset["obs/covariate"][:, 0], expected, atol=1e-5)
    assert np.array_equal(dataset["obs/covariate"][:, 1], np.isfinite(weather))
    assert (dataset["obs/covariate"][dataset["obs/sensor"] == 0] == 0).all()  # s0 has no weather
    assert np.linalg.norm(dataset["sensor/position"][1] - dataset["sensor/position"][0]) == pytest.approx(8.5, abs=0.1)  # 0.1 degrees east
    assert np.abs(dataset["sensor/position"]).max() == pytest.approx(dataset.info.half_extent)
    assert dataset.recipe["key"] == "net"
    assert len(dataset.inputs["observations"]) == 64


def test_sensors_go_by_the_id_of_their_platform_without_its_prefix(tmp_path: Path) -> None:
    rows = station_rows()
    rows["platform_id"] = "static:" + rows["platform_id"]
    dataset = made(tmp_path, rows, network={"held_out": {"validation": ["static:s4"], "test": ["static:s5"]}})
    assert dataset.sensor_names == tuple(STATIONS)
    assert dataset.name_of(2) == "s2"
    assert replace(dataset, sensor_names=()).name_of(2) == "3"
    assert sensors.check(replace(dataset, sensor_names=("s0",))) == ["info.n_sensors is 6, but sensor_names has 1"]


def test_stricter_flags_keep_less(tmp_path: Path) -> None:
    rows = station_rows()
    strict = made(tmp_path, rows, "strict", max_flag=1)
    plain = made(tmp_path, rows, "plain")
    assert 0.7 * len(plain["obs/value"]) < len(strict["obs/value"]) < 0.85 * len(plain["obs/value"])


def test_rerun_gives_the_same_bytes_and_follows_its_input(tmp_path: Path) -> None:
    rows = station_rows()
    made(tmp_path, rows)
    first = tree(tmp_path / "out.zarr")
    made(tmp_path, rows.sample(frac=1, random_state=0))
    assert tree(tmp_path / "out.zarr") == first
    other = made(tmp_path, rows.assign(value=rows["value"] + 1e-6), "other")
    assert other.inputs != sensors.read(tmp_path / "out.zarr").inputs


def test_nothing_learnt_changes_with_test_data_or_held_out_sensors(tmp_path: Path) -> None:
    """Perturb all that is not for learning: statistics, positions and every training batch stay as they were."""
    rows = station_rows()
    plain = made(tmp_path, rows, "plain")
    last = pd.Timestamp(0, tz="UTC") + pd.to_timedelta(plain["frame/time"][plain["frame/split"] == sensors.TRAIN][-1], "h")
    forbidden = (rows["time"] > last) | rows["platform_id"].isin(["s4", "s5"])
    poisoned = made(tmp_path, rows.assign(value=rows["value"] + np.where(forbidden, 500.0, 0.0)), "poisoned")
    for f in dataclass_fields(plain.info):
        assert getattr(plain.info, f.name) == getattr(poisoned.info, f.name), f.name
    windows = Windows(context_frames=4, max_lead=6, batch=8, drop=0.1, hide=2)
    for step in range(20):
        a, b = TrainingBatches(plain, windows, 0)[step], TrainingBatches(poisoned, windows, 0)[step]
        for x, y in ((a.context, b.context), (a.query, b.query)):
            assert (x.value == y.value).all()  # type: ignore[union-attr]
            assert (x.mask == y.mask).all()
        assert (a.context.covariate == b.context.covariate).all()  # type: ignore[union-attr]
    # An evaluation case is the furthest a window reaches: it must not touch a training frame at all.
    assert (np.diff(np.flatnonzero(plain["frame/split"] != sensors.GAP)) > 1).sum() == 2
    assert (plain["cases/frame"] - 10 > np.flatnonzero(plain["frame/split"] == sensors.TRAIN)[-1]).all()


def test_a_protocol_with_ranges_sectors_and_the_weather_of_what_is_asked(tmp_path: Path) -> None:
    """Values and covariates from 0 to 1 over the training frames, the wind as the sector it comes from, both given with each question."""
    rows = station_rows()
    hours = rows[rows["variable"] == "t2m"]
    east = hours.assign(variable="u10", value=np.where(np.arange(len(hours)) % 2, -3.0, 0.0))  # from the east, or calm
    north = hours.assign(variable="v10", value=np.where(np.arange(len(hours)) % 2, -0.01, 0.0))
    rows = pd.concat([rows, east, north], ignore_index=True).assign(flag_aggregate=np.int8(1))
    network = {"covariates": ["t2m", "u10", "v10"], "sectors": 4, "known_ahead": True}
    dataset = made(tmp_path, rows, network=network, scale={"by": "range"}, calendar=["hour_sin"])
    names = ("t2m", "wind_0", "wind_1", "wind_2", "wind_3", "availability")
    assert dataset.info.context_covariates == names
    assert dataset.info.query_covariates == ("hour_sin", *names)
    learn = np.asarray(dataset["frame/split"])[np.repeat(np.arange(dataset.n_frames), np.diff(dataset["frame/obs_start"]))] == sensors.TRAIN
    learn &= np.asarray(dataset["obs/sensor"]) < 4  # the others are held out
    value = (np.asarray(dataset["obs/value"])[learn] - dataset.info.mean) / dataset.info.std
    np.testing.assert_allclose([value.min(), value.max()], [0, 1], atol=1e-5)
    covariate = np.asarray(dataset["obs/covariate"])
    np.testing.assert_allclose([covariate[learn, 0].min(), covariate[learn, 0].max()], [0, 1], atol=1e-6)
    assert not covariate[:, [1, 3, 4]].any()
    assert 0.2 < covariate[:, 2].mean() < 0.6
    batch = TrainingBatches(dataset, Windows(context_frames=2, min_lead=1, max_lead=3, query_frames=3, batch=4), 0)[0]
    lead = (batch.query.time - batch.context.time[:, -1:]).numpy()
    assert (lead == [1, 2, 3]).all()
    asked = batch.query.covariate
    assert asked is not None
    assert asked.shape[-1] == 7
    assert (asked[batch.query.mask][:, 1:] != 0).any(dim=0).tolist() == [True, False, True, False, False, True]
    with pytest.raises(ValueError, match=r"gives t2m, .* with each question: only reports"):
        at_points(dataset, 100, 1, np.zeros((1, 2)), [1])


def test_a_frame_holds_what_ends_at_it(tmp_path: Path) -> None:
    """Readings at :10, :20, .. belong to the next full hour, one at :00 to its own; across partitions as well."""
    rows = station_rows(60)
    rows = rows[rows["variable"] == "pm2p5"].assign(flag_aggregate=np.int8(1))
    minute = pd.concat([rows.assign(time=rows["time"] - pd.to_timedelta(m, "min"), value=rows["value"] + m) for m in (0, 10, 50)])
    dataset = made(tmp_path, minute, network={"covariates": []}, split={"validation": 0.2, "test": 0.2, "gap": 2})
    expected = rows.sort_values(["time", "platform_id"])["value"].to_numpy() + 20
    assert np.allclose(dataset["obs/value"][:, 0], expected)


def test_frames_lie_on_hours_of_local_time(tmp_path: Path) -> None:
    """Hourly means at full hours of India arrive at half past in UTC: none is moved, none is mixed with its neighbour."""
    rows = station_rows()
    rows["time"] -= pd.Timedelta("5h30min")
    dataset = made(tmp_path, rows, network={"utc_offset": 5.5})
    assert (dataset["frame/time"] % 1 == 0.5).all()
    plain = made(tmp_path, station_rows(), "plain", network={"utc_offset": 0.0})
    assert np.array_equal(dataset["obs/value"], plain["obs/value"])
    assert np.array_equal(dataset["frame/time"], plain["frame/time"] - 5.5)


def test_periods_are_trajectories(tmp_path: Path) -> None:
    periods = [["2020-01-01", "2020-01-05"], ["2020-01-08", "2020-01-13"]]
    dataset = made(tmp_path, station_rows(), network={"periods": periods})
    length = np.diff(dataset["trajectory/frame_start"])
    assert length.tolist() == [96, 120]
    assert (np.diff(dataset["frame/time"])[length[0] - 1]) == 3 * 24 + 1
    for part in np.split(dataset["frame/split"], [length[0]]):
        assert {sensors.TRAIN, sensors.VALIDATION, sensors.TEST} <= set(part.tolist())
    blocks = {int(t): set(dataset["cases/block"][dataset.trajectory_of(dataset["cases/frame"]) == t].tolist()) for t in (0, 1)}
    assert not blocks[0] & blocks[1]
    with pytest.raises(ValueError, match="no usable observation from 2021-01-01"):
        made(tmp_path, station_rows(), network={"periods": [*periods, ["2021-01-01", "2021-02-01"]]})


def test_fixed_and_moving_sensors_together(tmp_path: Path) -> None:
    buses = bus_rows(HOURS)
    buses = buses.assign(longitude=buses["longitude"] + 39.1, latitude=buses["latitude"] + 12.03)
    dataset = made(tmp_path, pd.concat([station_rows(), buses], ignore_index=True))
    moving = dataset["obs/sensor"] < 0
    assert moving.any()
    assert dataset.info.context_covariates == ("t2m", "availability", "mobile")
    assert np.array_equal(dataset["obs/covariate"][:, 2], moving)
    batch = TrainingBatches(dataset, Windows(max_lead=2, batch=8), 0)[0]
    assert set(batch.query.sensor.flatten().tolist()) == {0, 1, 2, 3}  # type: ignore[union-attr]
    assert (batch.context.sensor[batch.context.mask] == -1).any()  # type: ignore[index]


BUSES = {
    "covariates": [],
    "step": 0.5,
    "cells": {"longitude": 0.01, "latitude": 0.01, "origin": [77.0, 28.0]},
    "held_out": {"validation": 2, "test": 3},
}


def test_moving_sensors_never_report_from_a_held_out_cell(tmp_path: Path) -> None:
    rows = bus_rows()
    dataset = made(tmp_path, rows, network=BUSES, split={"validation": 0.2, "test": 0.2, "gap": 4})
    assert dataset.info.n_sensors == 5
    assert sorted(dataset["sensor/role"].tolist()) == [1, 1, 2, 2, 2]
    assert dataset.info.context_covariates == ()
    moving = dataset["obs/sensor"] < 0
    apart = np.abs(dataset["obs/position"][moving][:, None] - dataset["sensor/position"][None])
    half = np.array([0.005 * np.cos(np.deg2rad(28.02)), 0.005]) * 111.195
    assert (apart > half - 1e-3).any(axis=-1).all()
    # By hand: readings in (t - 30 min, t] of each bus and cell are averaged, then the buses in a held-out cell.
    bin_ = np.ceil(((rows["time"] - pd.Timestamp(0, tz="UTC")) / pd.Timedelta("30min")).to_numpy())
    x, y = np.floor((rows["longitude"] - 77) / 0.01), np.floor((rows["latitude"] - 28) / 0.01)
    each = rows.assign(bin=bin_, x=x, y=y).groupby(["bin", "platform_id", "x", "y"])["value"].mean()
    merged = each.groupby(level=["bin", "x", "y"]).mean()
    assert len(dataset["obs/value"]) < len(each)
    frame = np.repeat(dataset["frame/time"], np.diff(dataset["frame/obs_start"]))
    seen = dict.fromkeys(np.round(merged.to_numpy(), 3))
    assert all(round(float(v), 3) in seen for v in dataset["obs/value"][~moving, 0])
    assert sorted(np.round(dataset["obs/value"][moving & (frame == frame[50]), 0], 3)) == sorted(
        round(v, 3) for (b, _, cx, cy), v in each.items() if b == 2 * frame[50] and f"{int(cx)},{int(cy)}" not in held_cells(dataset)
    )
    batch = TrainingBatches(dataset, Windows(max_lead=0, batch=8, drop=0.3), 0)[0]
    assert batch.query.mask.any()
    part = next(cases(dataset, "test", 2, [0, 2], 4))
    assert part.kind[0, 0].tolist() == [1, 1, 1]


def held_cells(dataset: sensors.SensorDataset) -> set[str]:
    projection = dataset.info.projection
    assert projection is not None
    degrees = np.rad2deg(dataset["sensor/position"] / 6371.0088) / [np.cos(np.deg2rad(projection["latitude"])), 1]
    origin = np.array([projection["longitude"] - 77, projection["latitude"] - 28])
    cell = np.floor((degrees + origin) / 0.01).astype(int)
    return {f"{x},{y}" for x, y in cell.tolist()}


@pytest.mark.parametrize(
    ("change", "rows", "message"),
    [
        ({"variables": ["pm10"]}, station_rows(), "holds no row of pm10; it has pm2p5, t2m"),
        ({}, station_rows().assign(flag_aggregate=np.int8(4)), "no usable observation of pm2p5: .* left out by flag"),
        ({}, station_rows(20), "too few .* needed: at least 58 frames"),
        ({"network": {"held_out": {"validation": [*STATIONS][:3], "test": [*STATIONS][3:]}}}, station_rows(), "all 6 sensors are held out"),
        ({"network": {"held_out": {"test": ["s9"]}}}, station_rows(), "no sensor s9; there are s0"),
        ({}, station_rows().drop(columns="flag_aggregate"), "has no column flag_aggregate"),
        ({"network": {**BUSES, "cells": None}}, bus_rows(), "all platforms move: give network.cells"),
        ({}, bus_rows().assign(trip_id=None), "fixed platforms b0, b1 moved"),
    ],
)  # fmt: skip
def test_what_cannot_be_made_says_why(tmp_path: Path, change: dict[str, Any], rows: pd.DataFrame, message: str) -> None:
    if rows["platform_id"].iloc[0] == "b0":
        change = {**change, "network": {"covariates": [], **change.get("network", {})}}
    with pytest.raises(ValueError, match=message):
        made(tmp_path, rows, **change)
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variables": ["pm99"]}, "unknown variable 'pm99'"),
        ({"strategies": 1}, "subsample.net.strategies: unknown key"),
        ({"network": {"steps": 1}}, "subsample.net.network.steps: unknown key|network.steps"),
        ({"split": None}, "observations need `split`"),
        ({"layout": {"strategy": "all"}}, "either `network`"),
        ({"calendar": ["week"]}, "calendar: unknown week"),
        ({"network": {"sectors": 8}}, "sectors needs u10 and v10 among the covariates, found t2m"),
        ({"network": {"covariates": [], "known_ahead": True}}, "known_ahead says that covariates are known ahead, and there are none"),
    ],
)
def test_params_that_make_no_sense(change: dict[str, Any], message: str) -> None:
    with pytest.raises(params.ParamsError, match=message):
        params.validated(section(**change), subsample.Subsample, "subsample.net")


def test_classes_stand_together(tmp_path: Path) -> None:
    one = {"variables": ["infected"], "layout": {"strategy": "all"}, "network": None}
    settings = params.validated({**section(), **one}, subsample.Subsample, "subsample.net")
    with pytest.raises(ValueError, match="infected are classes: give all classes"):
        recipe.dataset_info(settings, "net", geometry="plane", projection=None, centre=(0.0, 0.0))
