"""ERA5 files with a temperature that says where and when it belongs; how to ingest them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from pipeline import fields
from pipeline.params import validated
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


def bad(raw: Path, **values: Any) -> str:
    with pytest.raises(ValueError, match="ERA5 input cannot be used") as error:
        read(raw, **values)
    assert not (raw / "out" / "field.zarr").exists()
    return str(error.value)
