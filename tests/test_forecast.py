"""The forecast stage against a predictor known in closed form, the cube contract, and every reason of the sanity gate."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from scipy.special import ndtri

from models.contract import FieldPrediction, Frames
from pipeline import cube as cubes
from pipeline import device, forecast, geometry, sanity, sensors
from pipeline.initial_frames import initial_frames
from tests import forecasts, worlds

NOW = datetime(2026, 11, 22, 6, tzinfo=UTC)


@pytest.fixture(scope="module")
def stations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forecasts.make(tmp_path_factory.mktemp("stations"), worlds.stations())


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return forecasts.make(tmp_path_factory.mktemp("waves"), worlds.waves(), init="case", max_lead=4)


def opened(folder: Path) -> tuple[xr.Dataset, xr.Dataset | None, dict]:
    return *cubes.read_folder(folder), json.loads((folder / "forecast.json").read_text())


def test_station_cube_holds_the_predictors_quantiles(stations: Path) -> None:
    cube, at_stations, summary = opened(stations)
    info = worlds.stations().info
    assert at_stations is not None
    assert cube["pm2p5"].dims == ("init_time", "lead_time", "quantile", "y", "x")
    assert (cube["lead_time"].values == np.arange(0, 7, 2).astype("m8[h]")).all()
    assert cube["init_time"].values[0] == np.datetime64(0, "h") + np.timedelta64(400_399, "h")
    km = geometry.to_km(*np.meshgrid(cube["longitude"], cube["latitude"]), info.projection)
    hours = np.arange(0, 7, 2.0)[:, None, None, None]
    mean = (km[..., 0] + km[..., 1] / 2) / 20 + 0.01 * hours
    expected = (mean + 0.2 * (1 + hours) * ndtri(cube["quantile"].values)[None, :, None, None]) * info.std[0] + info.mean[0]
    np.testing.assert_allclose(cube["pm2p5"].values[0], np.maximum(expected, 0), atol=2e-3)
    assert summary["runs"][0]["clipped_at_zero"]["pm2p5"] >= (expected < 0).sum() > 0
    x, y = worlds.stations()["sensor/position"].T
    assert np.allclose(
        at_stations["pm2p5"].sel(quantile=0.5)[0, 0], np.maximum((x + y / 2) / 20 * info.std[0] + info.mean[0], 0), atol=2e-3
    )
    assert list(at_stations["role"].values) == [0, 0, 0, 0, 0, 0, 1, 2]


def test_the_cube_says_how_far_its_sensors_are(stations: Path) -> None:
    cube, _, summary = opened(stations)
    table = pd.read_parquet(stations / "sensors.parquet")
    seen = table[(table["lead"] == 0) & (table["role"] == 0)]
    km = geometry.to_km(*np.meshgrid(cube["longitude"], cube["latitude"]), worlds.stations().info.projection)
    brute = np.hypot(km[..., None, 0] - seen["x"].to_numpy(), km[..., None, 1] - seen["y"].to_numpy()).min(axis=-1)
    np.testing.assert_allclose(cube["distance_to_sensor"][0], brute, atol=2e-3)
    assert summary["runs"][0]["sensors_used"] == len(seen) <= summary["runs"][0]["sensors_expected"] == 6


def test_simulation_cube_is_on_the_grid_of_its_truth_in_model_time(waves: Path) -> None:
    cube, at_stations, _ = opened(waves)
    assert at_stations is None
    np.testing.assert_allclose(cube["x"], np.arange(12) / 12, atol=1e-6)
    assert cube["init_time"].dtype == cube["lead_time"].dtype == np.float64
    assert cube["init_time"].item() == 4.0  # the last test case has its whole future in the data
    assert cube["trajectory"].item() == 7
    assert cube["distance_to_sensor"].max() < 0.5  # measured around the torus


def test_observations_after_init_time_are_told_from_those_before(tmp_path: Path) -> None:
    dataset = worlds.stations()
    folder = forecasts.make(tmp_path, dataset, init="case", history=10)
    table = pd.read_parquet(folder / "sensors.parquet")
    assert table["lead"].min() == -9
    assert table["lead"].max() == 6
    init = table["init_time"].iloc[0]
    assert ((table["time"] - init) == pd.to_timedelta(table["lead"], unit="h")).all()
    assert cubes.read_folder(folder)[0]["init_time"].values[0] == init


def test_a_forecast_is_the_same_to_the_byte(tmp_path: Path, stations: Path) -> None:
    from pipeline.receipt import tree_sha256

    (tmp_path / "again").mkdir()
    again = forecasts.make(tmp_path / "again", worlds.stations())
    assert tree_sha256(again) == tree_sha256(stations)


def test_several_initial_frames_and_no_uncertainty(tmp_path: Path) -> None:
    folder = forecasts.make(tmp_path, worlds.stations(), scale=False, init=[390, "2015-09-05T00:00:00Z"])
    cube, _, summary = opened(folder)
    assert cube["pm2p5"].dims == ("init_time", "lead_time", "y", "x")
    assert [run["frame"] for run in summary["runs"]] == [390, 392]
    assert summary["quantiles"] == []


def test_a_model_that_does_not_forecast_says_what_the_field_is_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forecasts.Plane, "tasks", frozenset({"reconstruction", "interpolation"}))
    fields, _, summary = opened(forecasts.make(tmp_path, worlds.waves(), init="case"))
    assert fields["lead_time"].values.tolist() == [0]
    assert summary["leads"] == 1


@pytest.mark.parametrize(
    ("init", "words"),
    [([400], "0..399"), (["2015-09-05T00:30"], "nearest"), (["1999-01-01"], "2015-08-19T16:00:00Z..2015-09-05T07:00:00Z")],
)
def test_an_initial_frame_that_does_not_exist_is_an_error(init: list, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        initial_frames(worlds.stations(), init)


def test_the_last_frame_is_one_with_context() -> None:
    dataset = worlds.stations()
    start = np.asarray(dataset["frame/obs_start"]).copy()
    keep = slice(0, start[398])
    start[399:] = start[398]
    emptied = dataclasses.replace(
        dataset, arrays={**dataset.arrays, "frame/obs_start": start, **{f"obs/{n}": dataset[f"obs/{n}"][keep] for n in ("sensor", "value")}}
    )
    assert initial_frames(emptied, "last") == [397]


@pytest.mark.parametrize("kind", ["scale", "quantiles", "samples"])
def test_every_form_of_uncertainty_becomes_the_same_quantiles(kind: str) -> None:
    levels, mean = (0.1, 0.5, 0.9), torch.tensor([1.0, -2.0]).reshape(1, 1, 2, 1)
    own = tuple(np.linspace(0.02, 0.98, 97).tolist())
    z = torch.tensor(ndtri(np.array(own)), dtype=torch.float32)
    members = torch.tensor(ndtri((np.arange(4001) + 0.5) / 4001), dtype=torch.float32)
    answer = {
        "scale": FieldPrediction(mean, scale=torch.full_like(mean, 3.0)),
        "quantiles": FieldPrediction(mean, quantiles=mean[..., None] + 3 * z),
        "samples": FieldPrediction(mean, samples=mean[None] + 3 * members[:, None, None, None, None]),
    }[kind]
    values, found = forecast.distribution(answer, own, levels)
    assert found == levels
    assert values.shape == (1, 3, 2, 1)
    np.testing.assert_allclose(values[0, :, :, 0], mean[0, 0, :, 0].numpy() + 3 * ndtri(levels)[:, None], atol=5e-3)


def test_levels_beyond_the_quantile_head_are_an_error() -> None:
    answer = FieldPrediction(torch.zeros(1, 1, 1, 1), quantiles=torch.zeros(1, 1, 1, 1, 3))
    with pytest.raises(ValueError, match=r"0\.05.*0\.1"):
        forecast.distribution(answer, (0.1, 0.5, 0.9), (0.05, 0.5, 0.95))


def test_the_cube_contract_names_every_offender(stations: Path) -> None:
    cube = opened(stations)[0]
    broken = cube.assign(pm2p5=cube["pm2p5"].astype("f8").assign_attrs(units="mg")).drop_vars("distance_to_sensor")
    broken = broken.assign_coords(latitude=("y", cube["latitude"].values[::-1]))
    text = "\n".join(cubes.check(broken))
    for words in ("expected float32", "'mg'", "distance_to_sensor", "latitude does not increase"):
        assert words in text
    late = cube.assign_coords(valid_time=cube["valid_time"] + np.timedelta64(1, "h"))
    assert cubes.check(late) == ["valid_time is not init_time + lead_time everywhere"]
    assert cubes.check(cube) == []


def _refusals(folder: Path, change=lambda cube: cube, limits: dict | None = None, now: datetime = NOW, **summary: object) -> str:
    cube, at_stations, text = opened(folder)
    return "\n".join(sanity.refusals(change(cube), at_stations, {**text, **summary}, sanity.Limits(**(limits or {})), now))


def _with(value: float):
    def change(cube: xr.Dataset) -> xr.Dataset:
        changed = cube.copy(deep=True)
        changed["pm2p5"].values[0, 1, 4, 3, 2] = value
        return changed

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_with(np.nan), "1 of 4800 values are not finite, first at init_time 0, lead_time 1, quantile 4, y 3, x 2"),
        (_with(1e6), "outside the physical range -20..1500 ug m-3, found 1e+06..1e+06"),
        (_with(700.0), "outside the range of 25 training standard deviations"),
        (_with(0.0), "1 quantiles cross"),
        (lambda cube: cube.isel(lead_time=slice(0, 3)), "1 of 4 leads are missing"),
        (lambda cube: cube.assign(pm2p5=cube["pm2p5"] * 0 + 7), "constant in space at 4 of 4 leads"),
        (lambda cube: cube.assign(distance_to_sensor=cube["distance_to_sensor"] + np.inf), "had no observation"),
    ],
)
def test_the_gate_refuses_bad_values(stations: Path, change, words: str) -> None:
    assert words in _refusals(stations, change)


def test_the_gate_refuses_old_future_and_thin_input(stations: Path) -> None:
    init = datetime(2015, 9, 5, 7, tzinfo=UTC)
    assert "stale input" in _refusals(stations, limits={"max_age_hours": 3}, now=init + timedelta(hours=3.1))
    assert _refusals(stations, limits={"max_age_hours": 3}, now=init + timedelta(hours=2.9)) == ""
    assert "future" in _refusals(stations, now=init - timedelta(hours=1))
    run = {"init_time": "x", "sensors_used": 2, "sensors_expected": 6}
    assert "2 of the usual 6" in _refusals(stations, runs=[run])
    with pytest.raises(ValueError, match="time zone"):
        _refusals(stations, now=datetime(2026, 1, 1))


def test_the_gate_lets_good_forecasts_pass_and_lists_all_reasons_at_once(stations: Path, waves: Path) -> None:
    assert _refusals(stations) == _refusals(waves) == ""
    both = _refusals(stations, _with(np.inf), limits={"max_age_hours": 1})
    assert len(both.splitlines()) == 2


def test_sensors_are_written_as_the_contract_says(stations: Path) -> None:
    table = pd.read_parquet(stations / "sensors.parquet")
    dataset = worlds.stations()
    last = slice(*np.asarray(dataset["frame/obs_start"])[-2:])
    now = table[table["lead"] == 0]
    assert list(now["sensor"]) == list(dataset["obs/sensor"][last])
    np.testing.assert_allclose(now["value"], dataset["obs/value"][last, 0], rtol=1e-6)
    assert set(now["role"]) <= {sensors.CONTEXT, sensors.HELD_VALIDATION, sensors.HELD_TEST}


def test_classes_are_not_forecast(tmp_path: Path) -> None:
    waves = worlds.waves()
    with pytest.raises(ValueError, match=r"waves has classes \(vorticity\), and a forecast cube holds quantiles"):
        forecasts.make(tmp_path, replace(waves, info=replace(waves.info, classes=True)), init="case", max_lead=4)


def test_a_model_is_asked_where_it_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without numbers stands for a GPU: the answer is made from shapes alone."""
    asked = []

    def predict(self: forecasts.Plane, context: Frames, query: Frames) -> FieldPrediction:
        asked.extend([context.position.device.type, query.position.device.type])
        return FieldPrediction(torch.zeros(*query.mask.shape, 1))

    monkeypatch.setattr(device, "name", lambda: "meta")
    monkeypatch.setattr(forecasts.Plane, "predict", predict)
    forecasts.make(tmp_path, worlds.stations(hours=200))
    assert asked == ["meta", "meta"]
