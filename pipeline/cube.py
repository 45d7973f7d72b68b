"""The forecast cube contract: what `forecast.zarr` and the published Icechunk repository hold, readable by plain xarray.

    root       one float32 array per variable, dims (init_time, lead_time, [quantile], y, x), in the lexicon's unit
               valid_time (init_time, lead_time)   trajectory (init_time) index of the history the forecast continues
               distance_to_sensor (init_time, y, x) float32, from each cell to the nearest observation of the last frame the model saw
    /stations  the same variables at the fixed sensors, dims (init_time, lead_time, [quantile], station), where there are any

Geographic cubes carry `latitude(y)`, `longitude(x)` in degrees, datetime64 `init_time` and `valid_time` in UTC and timedelta64 `lead_time`.
Simulations carry `y`, `x` in model units and float times in model time: a dimensionless time is not a duration in seconds.
Coordinates increase. CF-1.11 and ACDD-1.3 attributes; no clock: whoever publishes a cube adds when.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from models.contract import DatasetInfo
from pipeline import geometry, lexicon

STATIONS = "stations"
_SECONDS = {"h": 3600}


def is_calendar(info: DatasetInfo) -> bool:
    """Does the dataset's time count from a calendar date? Simulations have a time of their own."""
    return bool(info.time_origin)


def to_time(info: DatasetInfo, time: np.ndarray) -> np.ndarray:
    """Dataset time (float, `info.time_unit` since `info.time_origin`) as datetime64[s] in UTC; simulations keep their floats."""
    if not is_calendar(info):
        return np.asarray(time, "f8")
    origin = np.datetime64(info.time_origin.removesuffix("Z"), "s")
    return origin + np.rint(np.asarray(time) * _SECONDS[info.time_unit]).astype("m8[s]")


def to_duration(info: DatasetInfo, duration: np.ndarray) -> np.ndarray:
    """Dataset durations as timedelta64[s]; simulations keep their floats."""
    if not is_calendar(info):
        return np.asarray(duration, "f8")
    return np.rint(np.asarray(duration) * _SECONDS[info.time_unit]).astype("m8[s]")


def global_attributes(info: DatasetInfo, model: str) -> dict[str, Any]:
    names = ", ".join(lexicon.lookup(name).long_name for name in info.variables)
    return {
        "Conventions": "CF-1.11, ACDD-1.3",
        "title": f"{names} forecast for {info.name}",
        "summary": f"Field forecast from sparse sensors: dataset {info.name}, model {model}.",
        "source": f"Fieldcast model {model}",
        "history": "made by the Fieldcast forecast stage",
        "dataset": info.name,
        "model": model,
        "geometry": info.geometry,
        "position_unit": info.position_unit,
    }


def coordinate_attributes(info: DatasetInfo) -> dict[str, dict[str, Any]]:
    """Attributes by coordinate name; units of times are an encoding where the calendar is known (see `encoding`)."""
    time: dict[str, dict[str, Any]] = {
        "init_time": {"standard_name": "forecast_reference_time", "long_name": "last time data were taken from", "axis": "T"},
        "lead_time": {"standard_name": "forecast_period", "long_name": "time since init_time"},
        "valid_time": {"standard_name": "time", "long_name": "time the forecast is for"},
    }
    if not is_calendar(info):
        time = {name: {"long_name": attrs["long_name"] + ", model time", "units": "1"} for name, attrs in time.items()}
    if info.projection:
        space: dict[str, dict[str, Any]] = {
            "latitude": {"standard_name": "latitude", "long_name": "latitude", "units": "degrees_north", "axis": "Y"},
            "longitude": {"standard_name": "longitude", "long_name": "longitude, -180..180", "units": "degrees_east", "axis": "X"},
        }
    else:
        space = {name: {"long_name": f"model coordinate {name}", "units": "1", "axis": name.upper()} for name in ("x", "y")}
    return {
        **time,
        **space,
        "quantile": {"long_name": "level of the quantile, P(value <= quantile)", "units": "1"},
        "trajectory": {"long_name": "index of the history that the forecast continues"},
    }


def grid_mapping() -> xr.DataArray:
    """Geographic coordinates on the sphere the projection of the sensors uses."""
    attributes = {
        "grid_mapping_name": "latitude_longitude",
        "earth_radius": 1000 * geometry.EARTH_RADIUS,
        "longitude_of_prime_meridian": 0.0,
    }
    return xr.DataArray(np.int8(0), attrs=attributes)


def encoding(cube: xr.Dataset) -> dict[str, dict[str, Any]]:
    """Encoding of a new store: seconds since 1970, one init_time a chunk, coordinates of a long series in few chunks."""
    many = 1024
    result: dict[str, dict[str, Any]] = {}
    for name, array in cube.variables.items():
        own: dict[str, Any] = {}
        if array.dims:
            own["chunks"] = tuple(
                (many if array.ndim < 3 else 1) if dim == "init_time" else size for dim, size in zip(array.dims, array.shape, strict=True)
            )
        if array.dtype.kind == "M":
            own |= {"units": "seconds since 1970-01-01", "calendar": "standard", "dtype": "int64"}
        elif array.dtype.kind == "m":
            own |= {"units": "seconds", "dtype": "int64"}
        result[str(name)] = own
    return result


def write(store: Any, cube: xr.Dataset, stations: xr.Dataset | None) -> None:
    """Write a whole forecast to a new Zarr v3 store (a path or a Zarr store)."""
    cube.to_zarr(store, mode="w", encoding=encoding(cube), zarr_format=3, consolidated=False)
    if stations is not None:
        stations.to_zarr(store, group=STATIONS, mode="a", encoding=encoding(stations), zarr_format=3, consolidated=False)


def read(store: Any, group: str | None = None) -> xr.Dataset:
    """Open a forecast (or its stations) lazily, with times decoded."""
    return xr.open_zarr(store, group=group, consolidated=False, decode_timedelta=True, chunks=None)


def read_folder(folder: Path) -> tuple[xr.Dataset, xr.Dataset | None]:
    """The cube and the station forecast of a forecast folder, checked."""
    path = folder / "forecast.zarr"
    if not path.exists():
        raise ValueError(f"{path} does not exist: run the forecast stage first")
    cube = read(path).load()
    problems = check(cube)
    if problems:
        raise ValueError(f"{path} breaks the forecast cube contract:\n  " + "\n  ".join(problems))
    return cube, read(path, STATIONS).load() if (path / STATIONS).exists() else None


def variables(cube: xr.Dataset) -> list[str]:
    """Names of the forecast variables, in order."""
    return [str(name) for name, array in cube.data_vars.items() if "lead_time" in array.dims and name in lexicon.VARIABLES]


def check(cube: xr.Dataset) -> list[str]:
    """Every way in which a cube breaks the contract, its values apart (those are judged by pipeline/sanity.py)."""
    problems = []
    quantile = ("quantile",) if "quantile" in cube.dims else ()
    dims = ("init_time", "lead_time", *quantile, "y", "x")
    names = variables(cube)
    if not names:
        problems.append(f"there is no forecast variable of the lexicon, found {', '.join(map(str, cube.data_vars)) or 'none'}")
    for name in names:
        array = cube[name]
        if array.dims != dims:
            problems.append(f"{name} has dims {array.dims}, expected {dims}")
        if array.dtype != np.float32:
            problems.append(f"{name} is {array.dtype}, expected float32")
        if array.attrs.get("units") != lexicon.lookup(name).unit:
            problems.append(f"{name} has units {array.attrs.get('units')!r}, expected {lexicon.lookup(name).unit!r}")
    geographic = "latitude" in cube.coords
    expected = {"init_time": ("init_time",), "lead_time": ("lead_time",), "valid_time": dims[:2], "trajectory": dims[:1]}
    expected |= {"latitude": ("y",), "longitude": ("x",)} if geographic else {"y": ("y",), "x": ("x",)}
    expected |= {"quantile": quantile} if quantile else {}
    for coordinate, own in expected.items():
        if coordinate not in cube.coords or cube[coordinate].dims != own:
            found = cube[coordinate].dims if coordinate in cube.coords else "no such coordinate"
            problems.append(f"coordinate {coordinate}: expected dims {own}, found {found}")
        elif len(own) == 1 and coordinate != "trajectory" and not (np.diff(cube[coordinate].values.astype("f8")) > 0).all():
            problems.append(f"coordinate {coordinate} does not increase strictly")
    if "distance_to_sensor" not in cube or cube["distance_to_sensor"].dims != ("init_time", "y", "x"):
        problems.append("distance_to_sensor(init_time, y, x) is missing")
    if not problems:
        problems += _check_times(cube)
    problems += [f"attribute {name} is missing" for name in ("Conventions", "title", "dataset", "model") if name not in cube.attrs]
    return problems


def _check_times(cube: xr.Dataset) -> list[str]:
    init, lead, valid = (cube[name].values for name in ("init_time", "lead_time", "valid_time"))
    if (init.dtype.kind, lead.dtype.kind, valid.dtype.kind) not in (("M", "m", "M"), ("f", "f", "f")):
        return [f"times are {init.dtype}, {lead.dtype}, {valid.dtype}: expected datetime, timedelta and datetime, or floats"]
    close = (valid == init[:, None] + lead) if init.dtype.kind == "M" else np.isclose(valid, init[:, None] + lead, atol=1e-9)
    return [] if close.all() else ["valid_time is not init_time + lead_time everywhere"]


def same_layout(a: xr.Dataset, b: xr.Dataset) -> list[str]:
    """Why two cubes cannot lie in one array along init_time; empty if they can."""
    differences = []
    if variables(a) != variables(b):
        differences.append(f"variables {variables(a)} and {variables(b)}")
    for name in ("lead_time", "quantile", "latitude", "longitude", "y", "x", "station"):
        left, right = (d[name].values if name in d.coords else None for d in (a, b))
        if (left is None) != (right is None) or (left is not None and right is not None and not np.array_equal(left, right)):
            differences.append(f"coordinate {name}")
    return differences
