"""The field contract: what is written opens with plain xarray, is CF, has the same bytes every time, and never has to fit in memory."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import dask.array as da
import numpy as np
import pytest
import xarray as xr

from pipeline import fields
from tests import worlds

DESCRIBED = {"title": "t", "license": "CC0-1.0", "source": "s", "history": "h", "geometry": "plane"}


def weather(n_time: int = 5) -> xr.Dataset:
    time = np.datetime64("2020-01-01T01:00", "ns") + np.arange(n_time) * np.timedelta64(1, "h")
    value = np.arange(n_time * 6, dtype="f4").reshape(n_time, 2, 3)
    coordinates = {"time": time, "latitude": ("y", [10.0, 20.0]), "longitude": ("x", [-5.0, 0.0, 5.0])}
    return xr.Dataset({"t2m": (("time", "y", "x"), value, {"cell_methods": "time: point"})}, coordinates, DESCRIBED)


def digest(folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return total.hexdigest()


def test_a_written_field_opens_with_plain_xarray_and_is_cf(tmp_path: Path) -> None:
    worlds.write_field(weather(), tmp_path / "field.zarr")
    with xr.open_zarr(tmp_path / "field.zarr", consolidated=False) as found:
        assert found["t2m"].dtype == np.float32
        assert found["t2m"].attrs == {
            "cell_methods": "time: point", "long_name": "2 m temperature", "standard_name": "air_temperature", "units": "K",
        }  # fmt: skip
        assert {"latitude", "longitude"} <= set(found.coords)
        assert found["latitude"].attrs == {"standard_name": "latitude", "units": "degrees_north"}
        assert found["time"].attrs["axis"] == "T"
        assert found.attrs["Conventions"] == "CF-1.11, ACDD-1.3"
        assert found.attrs["time_coverage_start"] == "2020-01-01T01:00:00Z"
        assert found.attrs["time_coverage_end"] == "2020-01-01T05:00:00Z"
        assert (found.attrs["geospatial_lat_min"], found.attrs["geospatial_lon_max"]) == (10, 5)
        np.testing.assert_array_equal(found["t2m"], weather()["t2m"])
        np.testing.assert_array_equal(found["time"], weather()["time"])
    assert fields.is_field(tmp_path)
    assert fields.open_field(tmp_path)["t2m"].dims == ("time", "y", "x")


def test_the_same_field_has_the_same_bytes_in_any_blocks_and_order_of_dims(tmp_path: Path) -> None:
    field = weather()
    worlds.write_field(field, tmp_path / "a")
    worlds.write_field(field.chunk(time=2).transpose("x", "time", "y"), tmp_path / "b")
    coordinates = field.drop_vars("t2m")
    fields.create(tmp_path / "c", coordinates, {"t2m": field["t2m"].attrs})
    for start in (3, 0):
        fields.write_block(tmp_path / "c", "t2m", start, field["t2m"].values[start : start + 3])
    assert digest(tmp_path / "a") == digest(tmp_path / "b") == digest(tmp_path / "c")
    assert field.identical(weather())  # writing leaves the caller's dataset alone


def test_what_was_not_written_is_missing(tmp_path: Path) -> None:
    field = weather()
    fields.create(tmp_path / "field.zarr", field.drop_vars("t2m"), {"t2m": {}})
    fields.write_block(tmp_path / "field.zarr", "t2m", 4, field["t2m"].values[4:])
    found = fields.open_field(tmp_path)["t2m"]
    assert found[:4].isnull().all()
    assert found[4].notnull().all()


def test_a_lazy_field_is_read_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 20 frames never more than one block of 2 is asked for at a time."""
    asked = []

    def frames(block_info: dict[None, dict[str, list[tuple[int, int]]]] | None = None) -> np.ndarray:
        assert block_info is not None
        start, stop = block_info[None]["array-location"][0]
        asked.append((start, stop))
        return np.zeros((stop - start, 2, 3), "f4")

    monkeypatch.setattr(fields, "CHUNK_BYTES", 2 * 2 * 3 * 4)
    lazy = weather(20)
    lazy["t2m"] = (("time", "y", "x"), da.map_blocks(frames, chunks=((2,) * 10, (2,), (3,)), dtype="f4", meta=np.zeros((0, 0, 0), "f4")))
    worlds.write_field(lazy, tmp_path / "field.zarr")
    assert asked == [(i, i + 2) for i in range(0, 20, 2)]
    assert len(list((tmp_path / "field.zarr" / "t2m" / "c").iterdir())) == 10


def test_trajectories_share_chunks_of_whole_trajectories() -> None:
    assert fields.block_length({"trajectory": 304, "time": 20, "y": 64, "x": 64}) == 12
    assert fields.block_length({"trajectory": 304, "time": 40, "y": 256, "x": 256}) == 1
    assert fields.block_length({"trajectory": 3, "time": 2, "y": 8, "x": 8}) == 3
    assert fields.block_length({"time": 744, "y": 33, "x": 49}) == 648


def test_a_field_without_a_description_or_with_an_unknown_variable_is_refused(tmp_path: Path) -> None:
    bare = weather().drop_attrs()
    with pytest.raises(ValueError, match="title, license, source, history, geometry not given"):
        worlds.write_field(bare, tmp_path / "a")
    with pytest.raises(ValueError, match="unknown variable 'heat'"):
        worlds.write_field(weather().rename(t2m="heat"), tmp_path / "b")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.isel(y=[1, 0]), "coordinate latitude does not increase strictly"),
        (lambda f: f.assign_coords(longitude=("x", [355.0, 360.0, 365.0])), r"longitude must lie in -180\.\.180"),
        (lambda f: f.astype("f8"), "t2m is float64, expected float32"),
        (lambda f: f.assign(t2m=f["t2m"].assign_attrs(units="degC")), "t2m has units 'degC', expected 'K'"),
        (lambda f: f.transpose("y", "time", "x"), r"t2m has dims \('y', 'time', 'x'\)"),
        (lambda f: f.assign_attrs(geometry="disc"), "attribute geometry is 'disc'"),
        (lambda f: f.drop_vars("time"), "coordinate time is missing"),
    ],
)
def test_every_break_of_the_contract_is_named(change: object, message: str) -> None:
    field = weather()
    field["t2m"].attrs["units"] = "K"
    assert fields.check(field) == []
    assert callable(change)
    assert any(re.search(message, problem) for problem in fields.check(change(field)))


def test_a_broken_field_is_refused_on_opening(tmp_path: Path) -> None:
    worlds.write_field(weather().isel(y=[1, 0]), tmp_path / "field.zarr")
    with pytest.raises(ValueError, match="breaks the field contract"):
        fields.open_field(tmp_path)
    with pytest.raises(ValueError, match="does not exist: run the stage that writes it first"):
        fields.open_field(tmp_path / "nowhere")
