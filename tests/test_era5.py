"""The ERA5 reader: every layout by synthetic files with known values, and by the real files of the mirror."""

from __future__ import annotations

import shutil
import threading
import zipfile
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pipeline import fields
from pipeline.params import ParamsError, validated
from pipeline.sources import era5

HOURS = pd.date_range("2020-01-01", periods=6, freq="h").values.astype("M8[ns]")
LATITUDE, LONGITUDE = np.array([30.0, 29.75, 29.5]), np.array([76.0, 76.25, 76.5, 76.75])


def truth(time: np.ndarray, latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """A temperature that says where and when it belongs: (time, latitude, longitude), K, exact in float32."""
    hour = ((time - HOURS[0]) / np.timedelta64(1, "h")).astype("f8")
    return 250 + hour[:, None, None] + latitude[:, None] / 16 + longitude / 64


def temperature(time: np.ndarray = HOURS, latitude: np.ndarray = LATITUDE, longitude: np.ndarray = LONGITUDE) -> xr.Dataset:
    """A file of the present Climate Data Store."""
    value = truth(time, latitude, longitude).astype("f4")
    attrs = {"units": "K", "standard_name": "unknown", "GRIB_stepType": "instant", "GRIB_missingValue": 3.4028234663852886e38}
    return xr.Dataset(
        {"t2m": (("valid_time", "latitude", "longitude"), value, attrs)},
        coords={"valid_time": time, "latitude": latitude, "longitude": longitude, "number": 0},
        attrs={"GRIB_centre": "ecmf"},
    )


def section(**values: Any) -> era5.Params:
    return validated({"source": "era5", "variables": ["t2m"], **values}, era5.Params, "ingest.era5")


def read(raw: Path, **values: Any) -> tuple[xr.Dataset, dict[str, Any]]:
    out = raw / "out"
    shutil.rmtree(out, ignore_errors=True)
    counts = era5.field(section(**{"files": ["*.nc"], **values} if "url" not in values else values), raw, out)
    field = fields.open_field(out).load()
    return field, counts


def matches(field: xr.Dataset) -> bool:
    """Is the temperature the true one at every place and time?"""
    return np.array_equal(
        field["t2m"].values, truth(field["time"].values, field["latitude"].values, field["longitude"].values).astype("f4")
    )


# Layouts ------------------------------------------------------------------------------------------------------------------------------


def test_present_layout(tmp_path: Path) -> None:
    versions = np.array(["0001"] * 4 + ["0005"] * 2, dtype=object)
    temperature().assign_coords(expver=("valid_time", versions)).to_netcdf(tmp_path / "a.nc")
    field, counts = read(tmp_path)
    assert matches(field)
    assert field["t2m"].dims == ("time", "y", "x")
    assert field["latitude"].values.tolist() == LATITUDE[::-1].tolist()
    assert field["expver"].values.tolist() == versions.tolist()
    assert counts["expver"] == {"0001": 4, "0005": 2}
    assert field["t2m"].attrs["standard_name"] == "air_temperature"
    assert field["t2m"].attrs["cell_methods"] == "time: point"
    assert field.attrs["acknowledgment"] == "Contains modified Copernicus Climate Change Service information"
    assert not [path for path in tmp_path.iterdir() if path.name not in ("a.nc", "out")]


def test_scalar_version_belongs_to_every_time_step(tmp_path: Path) -> None:
    temperature(HOURS[:3]).assign_coords(expver="0001").to_netcdf(tmp_path / "a.nc")
    temperature(HOURS[3:]).assign_coords(expver="0005").to_netcdf(tmp_path / "b.nc")
    field, counts = read(tmp_path)
    assert matches(field)
    assert field["expver"].values.tolist() == ["0001"] * 3 + ["0005"] * 3
    assert [part["expver"] for part in counts["parts"]] == [{"0001": 3}, {"0005": 3}]


def test_legacy_packed_layout_decodes_in_double_precision(tmp_path: Path) -> None:
    packing = {"dtype": "i2", "scale_factor": 0.00123456789, "add_offset": 258.7654321, "_FillValue": np.int16(-32767)}
    legacy = temperature().rename(valid_time="time").drop_vars("number")
    legacy["t2m"][1, 0, 0] = np.nan
    legacy["time"].encoding = {"units": "hours since 1900-01-01 00:00:00.0", "dtype": "i4"}
    legacy.to_netcdf(tmp_path / "a.nc", format="NETCDF3_64BIT", encoding={"t2m": packing})
    field, counts = read(tmp_path)
    packed = np.round((truth(HOURS, LATITUDE[::-1], LONGITUDE) - 258.7654321) / 0.00123456789)
    expected = (packed * 0.00123456789 + 258.7654321).astype("f4")
    expected[1, -1, 0] = np.nan
    np.testing.assert_array_equal(field["t2m"], expected)
    assert counts["variables"]["t2m"]["missing"] == 1


def test_versions_as_a_dimension_fill_each_others_gaps(tmp_path: Path) -> None:
    whole = temperature().rename(valid_time="time").drop_vars("number")
    final, early = whole.copy(deep=True), whole.copy(deep=True)
    early["t2m"].values += 0.5
    final["t2m"][4:] = np.nan
    final["t2m"][3, 0, 0] = np.nan
    early["t2m"][:2] = np.nan  # where both are there, the final one wins
    versions = xr.concat([early, final], pd.Index([5, 1], name="expver")).transpose("time", "expver", ...)
    versions.to_netcdf(tmp_path / "a.nc")
    field, counts = read(tmp_path)
    expected = truth(HOURS, LATITUDE[::-1], LONGITUDE)
    expected[4:] += 0.5
    expected[3, -1, 0] += 0.5
    np.testing.assert_array_equal(field["t2m"], expected.astype("f4"))
    assert field["expver"].values.tolist() == ["0001"] * 3 + ["0005"] * 3
    assert counts["expver"] == {"0001": 3, "0005": 3}


def test_cfgrib_made_netcdf_is_labelled_by_the_time_it_is_valid_for(tmp_path: Path) -> None:
    """cfgrib's `time` is the start of a forecast, whatever its name."""
    made = temperature().rename(valid_time="time")
    made = made.assign_coords(valid_time=("time", made["time"].values), time=made["time"].values - np.timedelta64(6, "h"))
    made["time"].attrs["standard_name"] = "forecast_reference_time"
    made.to_netcdf(tmp_path / "a.nc")
    assert matches(read(tmp_path)[0])


def grib_sum(handle: Any, base: int, step: int, value: float) -> None:
    """One GRIB message: net solar radiation summed over the hour before 2020-01-01 `base` h + `step` h."""
    import eccodes

    message = eccodes.codes_grib_new_from_samples("regular_ll_sfc_grib1")
    keys = {
        "centre": "ecmf", "dataDate": 20200101, "dataTime": base * 100, "Ni": 3, "Nj": 2,
        "latitudeOfFirstGridPointInDegrees": 11, "latitudeOfLastGridPointInDegrees": 10,
        "longitudeOfFirstGridPointInDegrees": 20, "longitudeOfLastGridPointInDegrees": 22,
        "iDirectionIncrementInDegrees": 1, "jDirectionIncrementInDegrees": 1,
        "stepType": "accum", "stepRange": f"{step - 1}-{step}", "paramId": 176,
    }  # fmt: skip
    for key, each in keys.items():
        eccodes.codes_set(message, key, each)
    eccodes.codes_set_values(message, [value + 3600 * i for i in range(6)])
    eccodes.codes_write(message, handle)
    eccodes.codes_release(message)


def test_grib_sums_by_start_and_step(tmp_path: Path) -> None:
    """Two forecasts of 3 hours; the last message is not there, which is no missing frame."""
    with (tmp_path / "a.bin").open("wb") as handle:
        for base in (6, 18):
            for step in (1, 2, 3):
                if (base, step) != (18, 3):
                    grib_sum(handle, base, step, 3600.0 * (base + step))
    field, counts = read(tmp_path, files=["a.bin"], variables=["ssr"])
    hours = ((field["time"].values - np.datetime64("2020-01-01")) / np.timedelta64(1, "h")).tolist()
    assert hours == [7, 8, 9, 19, 20]
    np.testing.assert_allclose(field["ssr"][:, 1, 0], hours)  # W m-2: the northern row comes first in GRIB, last in ours
    np.testing.assert_allclose(field["ssr"][0], [[10, 11, 12], [7, 8, 9]])
    assert field["ssr"].attrs["cell_methods"] == "time: mean (interval: 1 hour)"
    assert counts["variables"]["ssr"]["empty_frames"]["count"] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "out"]  # no index beside the raw file


def test_zip_of_instants_and_sums_whatever_its_suffix(tmp_path: Path) -> None:
    energy = temperature().rename(t2m="ssr")
    energy["ssr"].attrs |= {"units": "J m**-2", "GRIB_stepType": "accum", "standard_name": "surface_net_downward_shortwave_flux"}
    energy.to_netcdf(tmp_path / "data_stream-oper_stepType-accum.nc")
    temperature().to_netcdf(tmp_path / "data_stream-oper_stepType-instant.nc")
    with zipfile.ZipFile(tmp_path / "download.nc", "w") as archive:
        for path in sorted(tmp_path.glob("data_stream*")):
            archive.write(path, path.name)
            path.unlink()
    field, _ = read(tmp_path, variables=["t2m", "ssr"])
    assert matches(field)
    np.testing.assert_allclose(field["ssr"], field["t2m"] / 3600, rtol=1e-6)


def test_longitudes_of_0_to_360_and_ascending_latitudes(tmp_path: Path) -> None:
    longitude = np.arange(0, 360, 45.0)
    east = temperature(latitude=np.array([-10.0, 0, 10]), longitude=longitude)
    east["t2m"].values[:] = truth(HOURS, np.array([-10.0, 0, 10]), (longitude + 180) % 360 - 180)
    east.to_netcdf(tmp_path / "a.nc")
    field, _ = read(tmp_path)
    assert field["longitude"].values.tolist() == [-180, -135, -90, -45, 0, 45, 90, 135]
    assert matches(field)
    field, _ = read(tmp_path, box={"north": 5, "south": -10, "west": -50, "east": 45})
    assert field["longitude"].values.tolist() == [-45, 0, 45]
    assert field["latitude"].values.tolist() == [-10, 0]
    assert matches(field)


def test_period_and_order_of_files(tmp_path: Path) -> None:
    for name, piece in (("b.nc", HOURS[:2]), ("a.nc", HOURS[2:5]), ("c.nc", HOURS[5:])):
        temperature(piece).to_netcdf(tmp_path / name)
    field, counts = read(tmp_path, period=["2020-01-01T01:00", "2020-01-01T09:30+05:30"])
    assert field["time"].values.tolist() == HOURS[1:5].tolist()
    assert matches(field)
    assert [part["name"] for part in counts["parts"]] == ["a.nc", "b.nc"]


def test_of_a_repeated_time_the_final_version_is_kept(tmp_path: Path) -> None:
    early = temperature(HOURS[:4]).assign_coords(expver="0005")
    early["t2m"] += 7
    early["t2m"].attrs = temperature()["t2m"].attrs
    early.to_netcdf(tmp_path / "a.nc")
    temperature(HOURS[:3]).assign_coords(expver="0001").to_netcdf(tmp_path / "b.nc")
    field, counts = read(tmp_path)
    assert field["expver"].values.tolist() == ["0001"] * 3 + ["0005"]
    assert matches(field.isel(time=slice(3)))
    assert counts["repeated_frames"] == 3


# Values -------------------------------------------------------------------------------------------------------------------------------


def test_sentinels_are_masked_before_units_are_converted(tmp_path: Path) -> None:
    energy = temperature().rename(t2m="ssr")
    energy["ssr"].attrs |= {"units": "J m**-2", "GRIB_stepType": "accum"}
    values = energy["ssr"].values
    values[:] = 7200
    values[0, 0] = [-999, -9999, 1e20, 3.4028234663852886e38]
    values[1, 0, 0] = -3.6  # noise below zero stays
    energy.to_netcdf(tmp_path / "a.nc", encoding={"ssr": {"_FillValue": None}})
    field, counts = read(tmp_path, variables=["ssr"])
    assert np.isnan(field["ssr"][0, 2]).all()
    assert float(field["ssr"].min()) == pytest.approx(-0.001)
    assert float(field["ssr"].max()) == 2
    assert counts["variables"]["ssr"] == {
        "unit": "J m**-2", "factor": 1 / 3600, "masked_sentinels": 4, "missing": 4, "empty_frames": {"count": 0, "first": []},
    }  # fmt: skip


def test_empty_frames_are_kept_and_reported(tmp_path: Path) -> None:
    gappy = temperature()
    gappy["t2m"][2] = np.nan
    gappy.to_netcdf(tmp_path / "a.nc")
    field, counts = read(tmp_path)
    assert field.sizes["time"] == 6
    assert counts["variables"]["t2m"]["empty_frames"] == {"count": 1, "first": ["2020-01-01T02:00:00"]}


@pytest.mark.parametrize(("unit", "factor"), [("(0 - 1)", 1.0), ("1", 1.0), ("%", 0.01)])
def test_spellings_of_a_fraction(tmp_path: Path, unit: str, factor: float) -> None:
    cloud = temperature().rename(t2m="tcc")
    cloud["tcc"].values[:] = 0.5 / factor
    cloud["tcc"].attrs["units"] = unit
    cloud.to_netcdf(tmp_path / "a.nc")
    assert (read(tmp_path, variables=["tcc"])[0]["tcc"] == 0.5).all()


def test_small_blocks_give_the_same_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    temperature().to_netcdf(tmp_path / "a.nc")
    whole, counts = read(tmp_path)
    monkeypatch.setattr(fields, "CHUNK_BYTES", 2 * 3 * 4 * 4)
    blocks, counted = read(tmp_path)
    assert blocks.identical(whole)
    assert counted == counts


# Bad input ----------------------------------------------------------------------------------------------------------------------------


def bad(raw: Path, **values: Any) -> str:
    with pytest.raises(ValueError, match="ERA5 input cannot be used") as error:
        read(raw, **values)
    assert not (raw / "out" / "field.zarr").exists()
    return str(error.value)


def test_all_mismatches_come_in_one_message(tmp_path: Path) -> None:
    temperature().to_netcdf(tmp_path / "a.nc")
    wrong = temperature()
    wrong["t2m"].attrs["units"] = "degC"
    wrong.to_netcdf(tmp_path / "b.nc")
    temperature().rename(latitude="row").drop_vars("row").to_netcdf(tmp_path / "c.nc")
    temperature(latitude=LATITUDE * 4).to_netcdf(tmp_path / "d.nc")
    average = temperature()
    average["t2m"].attrs["GRIB_stepType"] = "avg"
    average.to_netcdf(tmp_path / "e.nc")
    (tmp_path / "f.nc").write_text("<html>401 Unauthorized</html>")
    (tmp_path / "g.nc").write_bytes(b"")
    message = bad(tmp_path, files=["*.nc", "h.nc"])
    for part in (
        "b.nc: t2m has the unit 'degC', which is not one of K",
        "c.nc: no axis latitude",
        "d.nc: latitude runs 118.0 to 120.0: are latitude and longitude swapped?",
        "e.nc: t2m is of step type 'avg', expected 'instant'",
        "f.nc cannot be read (it starts with b'<htm', which is neither netCDF, GRIB nor zip)",
        "g.nc cannot be read (it starts with b''",
        "no file h.nc in ",
    ):
        assert part in message


@pytest.mark.parametrize("kind", ["NETCDF4", "NETCDF3", "grib", "zip"])
def test_a_cut_file_is_an_error(tmp_path: Path, kind: str) -> None:
    whole = tmp_path / "whole"
    if kind == "grib":
        with whole.open("wb") as handle:
            for step in (1, 2, 3):
                grib_sum(handle, 6, step, 1.0)
    else:
        month = temperature(pd.date_range("2020-01-01", periods=744, freq="h").values.astype("M8[ns]"))
        month.to_netcdf(whole, engine="netcdf4", format="NETCDF3_64BIT" if kind == "NETCDF3" else "NETCDF4")
    if kind == "zip":
        with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
            archive.write(whole, "whole.nc")
        whole = tmp_path / "archive"
    content = whole.read_bytes()
    (tmp_path / "a.nc").write_bytes(content[: len(content) * 5 // 6])
    assert "a.nc cannot be read" in bad(tmp_path, variables=["ssr" if kind == "grib" else "t2m"])


def test_a_zip_bomb_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.nc", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.nc", bytes(10**6))
    assert "it would grow from " in bad(tmp_path)


def test_grids_and_times_that_do_not_fit_together(tmp_path: Path) -> None:
    temperature(HOURS[:3]).to_netcdf(tmp_path / "a.nc")
    temperature(HOURS[3:], longitude=LONGITUDE + 0.25).to_netcdf(tmp_path / "b.nc")
    assert "b.nc: longitude 76.25..77 (4) differs from 76..76.75 (4) in a.nc" in bad(tmp_path)
    wind = temperature(HOURS[2:5]).rename(t2m="u10")
    wind["u10"].attrs["units"] = "m s**-1"
    wind.to_netcdf(tmp_path / "b.nc")
    assert "u10 and t2m do not have the same times: 4 differ, first 2020-01-01T00" in bad(tmp_path, variables=["t2m", "u10"])


def test_box_period_or_variable_that_is_not_there(tmp_path: Path) -> None:
    temperature().to_netcdf(tmp_path / "a.nc")
    box = {"north": 60, "south": 50, "west": -10, "east": 0}
    assert "a.nc: no latitude in 50.0..60.0; the data have 29.5..30.0" in bad(tmp_path, box=box)
    assert "a.nc: covers 2020-01-01T00" in bad(tmp_path, period=["2021-01-01", "2021-02-01"])
    assert "no blh anywhere; found t2m" in bad(tmp_path, variables=["t2m", "blh"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"files": ["a.nc"], "variables": ["t3m"]}, r"unknown t3m; .* reads t2m, d2m"),
        ({"variables": ["t2m"]}, "give either files or url"),
        ({"url": "https://example.org/a.zarr"}, "a url needs a box and a period"),
        ({"files": ["a.nc"], "box": {"north": 1, "south": 2, "west": 0, "east": 1}}, "needs south < north"),
        ({"files": ["a.nc"], "period": ["2020-02-01", "2020-01-01"]}, "ends before it starts"),
        ({"files": ["a.nc"], "area": []}, r"ingest\.era5\.area: unknown key"),
    ],
)
def test_wrong_parameters_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ParamsError, match=message):
        section(**change)


# Zarr by URL --------------------------------------------------------------------------------------------------------------------------


class _Counting(SimpleHTTPRequestHandler):
    """Serves a folder and keeps what was asked for."""

    requests: list[str] = []  # noqa: RUF012

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        if str(getattr(code, "value", code)) == "200":
            self.requests.append(self.path)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "served"
    folder.mkdir()
    _Counting.requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Counting, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def store(path: Path, order: tuple[str, ...], ascending: bool, zarr_format: int, written: int = 48) -> None:
    """A global store of 10 days on 15 degrees, one hour a chunk; the hours after `written` are not there yet."""
    time = pd.date_range("2020-01-01", periods=240, freq="h").values.astype("M8[ns]")
    latitude, longitude = np.linspace(-90, 90, 13)[:: 1 if ascending else -1], np.arange(0, 360, 15.0)
    value = truth(time, latitude, (longitude + 180) % 360 - 180).astype("f4")
    value[written:] = np.nan
    dims = ("time", "latitude", "longitude")
    variables = {"2m_temperature": (dims, value, {"units": "K"}), "geopotential": (dims, value, {"units": "m**2 s**-2"})}
    data = xr.Dataset(variables, coords={"time": time, "latitude": latitude, "longitude": longitude}).transpose("time", *order)
    data.attrs = {"valid_time_start": "2020-01-01", "valid_time_stop": "2020-01-02"} if written < len(time) else {}
    chunks = (1, *(data.sizes[dim] for dim in order))
    encoding = {name: {"chunks": chunks} for name in variables}
    data.to_zarr(path, zarr_format=zarr_format, consolidated=True, encoding=encoding)


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")
@pytest.mark.parametrize(
    ("order", "ascending", "zarr_format"), [(("longitude", "latitude"), True, 2), (("latitude", "longitude"), False, 3)]
)
def test_a_store_is_read_by_url_and_only_where_it_is_needed(
    served: tuple[Path, str], order: tuple[str, ...], ascending: bool, zarr_format: int
) -> None:
    folder, address = served
    store(folder / "era5.zarr", order, ascending, zarr_format, written=240)
    box = {"north": 45, "south": 15, "west": -30, "east": 30}
    field, counts = read(folder, url=f"{address}/era5.zarr", box=box, period=["2020-01-03T05:00", "2020-01-03T08:00"])
    assert matches(field)
    assert field["latitude"].values.tolist() == [15, 30, 45]
    assert field["longitude"].values.tolist() == [-30, -15, 0, 15, 30]
    assert counts["frames"] == 4
    chunks = [path for path in _Counting.requests if "2m_temperature" in path and "json" not in path and "/.z" not in path]
    assert len(chunks) == 4  # one a frame, each once
    assert not [path for path in _Counting.requests if "geopotential/" in path and "json" not in path and "/.z" not in path]


def test_hours_that_a_store_has_not_written_yet_are_not_read(served: tuple[Path, str]) -> None:
    folder, address = served
    store(folder / "era5.zarr", ("latitude", "longitude"), False, 2)
    box = {"north": 45, "south": 15, "west": -30, "east": 30}
    field, counts = read(folder, url=f"{address}/era5.zarr", box=box, period=["2020-01-02T20:00", "2020-01-09"])
    assert field["time"].values[-1] == np.datetime64("2020-01-02T23:00")
    assert matches(field)
    assert counts["variables"]["t2m"]["empty_frames"]["count"] == 0
    message = bad(folder, url=f"{address}/era5.zarr", box=box, period=["2020-01-04", "2020-01-09"])
    assert "covers 2020-01-01T00:00:00.000000000 to 2020-01-02T23" in message


def test_a_store_that_is_not_there(served: tuple[Path, str]) -> None:
    folder, address = served
    box = {"north": 45, "south": 15, "west": -30, "east": 30}
    assert f"{address}/none.zarr cannot be opened as Zarr" in bad(folder, url=f"{address}/none.zarr", box=box, period=["2020", "2021"])


# The real files -----------------------------------------------------------------------------------------------------------------------


def real(mirror: Path, out: Path, files: str, *variables: str, **more: Any) -> tuple[xr.Dataset, dict[str, Any]]:
    counts = era5.field(section(files=[files], variables=variables, **more), mirror / "era5", out)
    return fields.open_field(out).load(), counts


@pytest.mark.real
def test_real_grib_and_netcdf_are_one(mirror: Path, tmp_path: Path) -> None:
    before = sorted((mirror / "era5").iterdir())
    grib, _ = real(mirror, tmp_path / "grib", "era5-2mt-2019-03-uk.grib", "t2m")
    netcdf, _ = real(mirror, tmp_path / "netcdf", "era5_t2m_uk_2019-03.nc", "t2m")
    assert grib.drop_attrs(deep=False).identical(netcdf.drop_attrs(deep=False))
    assert dict(grib.sizes) == {"time": 744, "y": 33, "x": 49}
    assert float(grib["t2m"].min()) == pytest.approx(265.68, abs=0.01)
    assert float(grib["t2m"].max()) == pytest.approx(291.56, abs=0.01)
    assert grib["time"].values[-1] == np.datetime64("2019-03-31T23:00")
    assert sorted((mirror / "era5").iterdir()) == before


@pytest.mark.real
def test_real_mixed_versions(mirror: Path, tmp_path: Path) -> None:
    field, counts = real(mirror, tmp_path, "era5_delhi_blh_ssr_2025_cds_original_mixed_expver.nc", "blh", "ssr")
    assert counts["expver"] == {"0001": 1094, "0005": 264}
    assert field["time"].values[np.argmax(field["expver"].values == "0005")] == np.datetime64("2025-10-01T12:00")
    assert field["latitude"].values.tolist() == [28.2, 28.45, 28.7, 28.95]
    with xr.open_dataset(mirror / "era5" / "era5_delhi_blh_ssr_2025_cds_original_mixed_expver.nc") as source:
        joules = source["ssr"].isel(latitude=slice(None, None, -1)).values.astype("f8")
    np.testing.assert_allclose(field["ssr"], joules / 3600, rtol=1e-7)
    assert field["ssr"].attrs["units"] == "W m-2"
    assert field["ssr"].attrs["standard_name"] == "surface_net_downward_shortwave_flux"


@pytest.mark.real
def test_real_years_join(mirror: Path, tmp_path: Path) -> None:
    field, counts = real(mirror, tmp_path / "years", "era5_delhi_blh_ssr_*_cds_original*.nc", "blh")
    assert counts["frames"] == 1464 + 1460 + 1358
    assert counts["expver"] == {"0001": 4018, "0005": 264}
    joined, _ = real(mirror, tmp_path / "joined", "era5_delhi_blh_ssr_2019-2025_6h.nc", "blh")
    assert joined.sizes["time"] == 10126
    np.testing.assert_array_equal(field["blh"], joined["blh"].sel(time=field["time"]))


@pytest.mark.real
def test_real_legacy_packing(mirror: Path, tmp_path: Path) -> None:
    import netCDF4

    field, counts = real(mirror, tmp_path, "era5_t2m_bengaluru_2019-2021_legacy_cds.nc", "t2m")
    assert counts["frames"] == 535
    with netCDF4.Dataset(mirror / "era5" / "era5_t2m_bengaluru_2019-2021_legacy_cds.nc") as source:
        source.set_auto_maskandscale(False)
        packed = source["t2m"][:, ::-1].astype("f8") * source["t2m"].scale_factor + source["t2m"].add_offset
    np.testing.assert_array_equal(field["t2m"], packed.astype("f4"))
    assert field["time"].values[0] == np.datetime64("2019-01-01T05:00")


@pytest.mark.real
def test_real_scalar_version_and_cloud_fraction(mirror: Path, tmp_path: Path) -> None:
    field, _ = real(mirror, tmp_path, "era5_t2m_u10_v10_tcc_karnataka_2024-01-01T12_cds_original.nc", "t2m", "u10", "v10", "tcc")
    assert field["expver"].values.tolist() == ["0001"]
    assert field["tcc"].attrs["units"] == "1"
    assert 0 <= float(field["tcc"].min()) <= float(field["tcc"].max()) <= 1


@pytest.mark.real
@pytest.mark.parametrize(
    ("file", "variables"), [("eraint_uvz_monthly.nc", ["u10"]), ("era5_daily_surface_cancities_1990-1993.nc", ["t2m", "sp"])]
)
def test_real_files_of_other_products_are_refused(mirror: Path, tmp_path: Path, file: str, variables: list[str]) -> None:
    with pytest.raises(ValueError, match=f"no {', '.join(variables)} anywhere; found "):
        real(mirror, tmp_path, file, *variables)
