"""Sensor datasets drawn from fields: simulations and weather on a grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pipeline import params, sensors, subsample
from pipeline.cases import cases
from tests import worlds
from tests.drops import tree

ROLES = ["train"] * 4 + ["validation", "test"]


def wave_field(folder: Path, frames: int = 6, grid: int = 8, chunks: dict[str, int] | None = None) -> Path:
    axis = np.arange(grid) / grid
    points = np.stack(np.meshgrid(axis, axis), -1)
    cube = np.stack([worlds.wave(points[None], np.arange(frames)[:, None, None], phase) for phase in range(len(ROLES))]).astype("f4")
    coords = {"time": np.arange(frames, dtype=float), "y": axis, "x": axis, "role": ("trajectory", np.array(ROLES, dtype=object))}
    field = xr.Dataset({"vorticity": (("trajectory", "time", "y", "x"), cube, {"units": "1"})}, coords, {"geometry": "torus"})
    encoding = {"vorticity": {"chunks": tuple((chunks or {}).get(d, field.sizes[d]) for d in ("trajectory", "time", "y", "x"))}}
    field.to_zarr(folder / "field.zarr", zarr_format=3, consolidated=False, encoding=encoding)
    return folder


def weather_field(folder: Path, hours: int = 240) -> Path:
    latitude, longitude = np.arange(50.0, 52, 0.25), np.arange(-2.0, 1, 0.25)
    rng = np.random.default_rng(0)
    time = pd.date_range("2019-03-01", periods=hours, freq="h").to_numpy()
    cube = (280 + 5 * np.sin(2 * np.pi * np.arange(hours) / 24)[:, None, None] + rng.normal(0, 1, (hours, 8, 12))).astype("f4")
    cube[30] = np.nan
    coords = {"time": time, "latitude": ("y", latitude), "longitude": ("x", longitude)}
    field = xr.Dataset({"t2m": (("time", "y", "x"), cube, {"units": "K"})}, coords, {"geometry": "plane"})
    field.to_zarr(folder / "field.zarr", zarr_format=3, consolidated=False, encoding={"t2m": {"chunks": (50, 8, 12)}})
    return folder


def drawn(folder: Path, ingested: Path, name: str = "out", failed: tuple[int, ...] = (), **changes: Any) -> sensors.SensorDataset:
    raw = {"source": "f", "variables": ["vorticity"], "layout": {"strategy": "random", "rate": 0.25}, "cases": {"stride": 2}, **changes}
    model = params.validated(raw, subsample.Subsample, "subsample.ns")
    if (ingested / "field.zarr").exists():
        sizes = xr.open_zarr(ingested / "field.zarr", consolidated=False).sizes
        flags = np.full(sizes.get("trajectory", 1) * sizes["time"], 3, np.int8)
        flags[list(failed)] = 4
        pd.DataFrame({"flag_aggregate": flags}).to_parquet(folder / "frames.parquet")
    subsample.run(model, "ns", ingested=ingested, checked=folder, out=folder / f"{name}.zarr")
    return sensors.read(folder / f"{name}.zarr")


def test_simulation_with_sensors_drawn_per_trajectory(tmp_path: Path) -> None:
    dataset = drawn(tmp_path, wave_field(tmp_path))
    assert dataset["truth/value"].shape == (36, 64, 1)
    frame = np.repeat(np.arange(36), np.diff(dataset["frame/obs_start"]))
    at = np.rint(dataset["obs/position"] * 8).astype(int)
    point = at[:, 1] * 8 + at[:, 0]
    assert np.array_equal(dataset["obs/value"], dataset["truth/value"][frame, point])
    phase = dataset.trajectory_of(frame)
    assert np.allclose(dataset["obs/value"][:, 0], worlds.wave(dataset["obs/position"], frame % 6, phase), atol=1e-5)
    sets = [tuple(point[frame == f]) for f in range(36)]
    assert all(len(s) == 16 for s in sets)
    assert [len({sets[f] for f in range(t * 6, t * 6 + 6)}) for t in range(6)] == [1] * 6
    assert len(set(sets)) == 6
    assert dataset["frame/split"].tolist() == [0] * 24 + [1] * 6 + [2] * 6
    seen = dataset["obs/value"][frame < 24].astype(float)
    assert dataset.info.mean[0] == pytest.approx(seen.mean(), abs=1e-12)
    assert dataset.info.std[0] == pytest.approx(seen.std(), rel=1e-12)
    assert dataset.info.n_sensors == 0
    assert dataset.info.query_covariates == ()
    assert dataset["cases/frame"].tolist() == [24, 26, 28, 30, 32, 34]
    assert dataset["cases/block"].tolist() == [0, 0, 0, 1, 1, 1]


def test_frames_that_failed_quality_control_are_missing(tmp_path: Path) -> None:
    source = wave_field(tmp_path)
    dataset, plain = drawn(tmp_path, source, failed=(2, 31)), drawn(tmp_path, source, "plain")
    assert np.flatnonzero(np.diff(dataset["frame/obs_start"]) == 0).tolist() == [2, 31]
    assert np.isnan(dataset["truth/value"][[2, 31]]).all()
    assert np.array_equal(np.delete(dataset["truth/value"], [2, 31], axis=0), np.delete(plain["truth/value"], [2, 31], axis=0))
    part = next(cases(dataset, "test", 1, [0, 1], 1))  # frame 30, and 31 as its answer
    assert part.batch.query.mask.any(dim=-1).tolist() == [[True, False]]
    (tmp_path / "frames.parquet").unlink()
    recipe = {name: value for name, value in dataset.recipe.items() if name != "key"}
    model = params.validated(recipe, subsample.Subsample, "recipe")  # what is stored is what was asked for
    with pytest.raises(ValueError, match=r"frames.parquet does not exist: run the validate stage"):
        subsample.run(model, "ns", ingested=source, checked=tmp_path, out=tmp_path / "out.zarr")


@pytest.mark.parametrize("chunks", [{"trajectory": 1}, {"trajectory": 4, "time": 2}, {"time": 5, "y": 4}])
def test_how_a_field_is_stored_does_not_matter(tmp_path: Path, chunks: dict[str, int]) -> None:
    layout = {"strategy": "random_walk", "rate": 0.5, "noise": 0.1}
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = drawn(tmp_path / "a", wave_field(tmp_path / "a"), layout=layout)
    cut = drawn(tmp_path / "b", wave_field(tmp_path / "b", chunks=chunks), layout=layout)
    for name in plain.arrays:
        assert np.array_equal(plain[name], cut[name]), name
    assert cut.info.mean == pytest.approx(plain.info.mean)


def test_noise_is_on_the_sensors_alone(tmp_path: Path) -> None:
    source = wave_field(tmp_path)
    clean, noisy = (drawn(tmp_path, source, str(n), layout={"strategy": "all", "noise": n}) for n in (0.0, 0.3))
    assert np.array_equal(clean["truth/value"], noisy["truth/value"])
    ratio = noisy["obs/value"][np.abs(clean["obs/value"]) > 0.1] / clean["obs/value"][np.abs(clean["obs/value"]) > 0.1]
    assert abs(ratio.std() - 0.3) < 0.02
    again = drawn(tmp_path, source, "again", layout={"strategy": "all", "noise": 0.3})
    assert np.array_equal(again["obs/value"], noisy["obs/value"])
    assert tree(tmp_path / "again.zarr") == tree(tmp_path / "0.3.zarr")


def test_weather_field_with_fixed_sensors_in_time_blocks(tmp_path: Path) -> None:
    split = {"validation": 0.25, "test": 0.25, "gap": 12}
    dataset = drawn(tmp_path, weather_field(tmp_path), variables=["t2m"], split=split, cases={"horizon": 6, "block": 24})
    assert dataset.info.n_sensors == 24
    assert (dataset["sensor/role"] == sensors.CONTEXT).all()
    assert dataset["frame/time"][0] == (np.datetime64("2019-03-01") - np.datetime64("1970-01-01")) / np.timedelta64(1, "h")
    assert dataset.info.query_covariates == ("hour_sin", "hour_cos")
    assert dataset.info.position_unit == "km"
    assert np.diff(dataset["frame/obs_start"])[29:32].tolist() == [24, 0, 24]  # an empty frame: absent, not zero
    part = next(cases(dataset, "test", 3, [0, 6], 2))
    assert (part.kind == 2).all()
    assert part.batch.query.mask.all()
    assert (part.distance == 0).sum() == 2 * 2 * 24
    truth = part.batch.query.value[0, 0, :, 0].numpy() * dataset.info.std[0] + dataset.info.mean[0]  # type: ignore[index]
    assert np.allclose(truth, dataset["truth/value"][dataset["cases/frame"][part.index[0]], :, 0], atol=1e-3)
    start = dataset["frame/obs_start"][40]
    assert np.array_equal(dataset["obs/position"][start : start + 24], dataset["sensor/position"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variables": ["t2m"]}, "has no variable t2m; it has vorticity"),
        ({"layout": {"strategy": "random", "rate": 0.001}}, "gives no sensor"),
        ({"split": {"validation": 0.2, "test": 0.2, "gap": 4}}, "each trajectory of ns has 6 frames, too few"),
        ({"cases": {"horizon": 9}}, "holds no case"),
        ({"layout": None, "network": {}, "split": {"validation": 0.2, "test": 0.2, "gap": 4}}, "holds a field: .*needs `layout`"),
    ],
)
def test_what_a_field_cannot_give(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        drawn(tmp_path, wave_field(tmp_path), **change)


def test_layout_needs_a_field_and_roles(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"holds no field.zarr: .*give subsample.ns `network`"):
        drawn(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"no coordinate role\(trajectory\)"):
        drawn(tmp_path, weather_field(tmp_path), variables=["t2m"])


def test_memory_stays_bounded_by_the_stored_chunks(tmp_path: Path) -> None:
    """Pieces of any size give the same array bytes, so the writer may stream."""
    rng = np.random.default_rng(0)
    truth = rng.standard_normal((3000, 500, 1)).astype("f4")  # 6 MB: more than one chunk
    whole, pieces = sensors.Writer(tmp_path / "whole"), sensors.Writer(tmp_path / "pieces")
    whole.append("truth/value", truth)
    for start in range(0, len(truth), 70):
        pieces.append("truth/value", truth[start : start + 70])
    for writer in (whole, pieces):
        with pytest.raises(ValueError, match="not a sensor dataset: missing obs/position"):
            writer.finish(worlds.torus_info(), {}, {})
    assert tree(tmp_path / "whole") == tree(tmp_path / "pieces")
    assert len(list((tmp_path / "whole" / "truth" / "value" / "c").iterdir())) == 2
