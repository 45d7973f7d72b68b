"""ERA5 input that cannot be used: every mismatch is named, and nothing is written."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from pipeline.params import ParamsError
from tests.era5_files import HOURS, LATITUDE, LONGITUDE, bad, grib_sum, section, temperature


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
