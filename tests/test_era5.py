"""The ERA5 reader: every layout by synthetic files with known values, and by the real files of the mirror."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pipeline import fields
from tests.era5_files import HOURS, LATITUDE, LONGITUDE, grib_sum, matches, read, temperature, truth

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
