"""The field contract: a gridded variable or several as CF Zarr v3, opened lazily with xarray.

    FOLDER/field.zarr   dims (trajectory?, time, y, x), float32, one array per variable named by the lexicon
    FOLDER/ingest.json  what was done, with counts

In place of (y, x) a field may have (x), (z, y, x), or (point): places without a grid, which every trajectory has for itself.

Geographic fields carry `latitude(y)`, `longitude(x)` (longitude -180..180) and UTC datetime64 `time`; simulations carry model coordinates
`y`, `x` (on [0, 1) on a torus) and float `time` in model units. Coordinates increase; those of points, `x(trajectory?, point)` and maybe
`y` and `z`, need not. Dataset attributes: `Conventions`, `title`, `license`, `source`, `history` without any clock, `geometry` ("plane" |
"torus" | "sphere", where x is longitude and y latitude in degrees). Optional coordinates say more about a frame or a trajectory:
`expver(time)`, `role(trajectory)` ("train", "validation", "test"), `seed(trajectory)`, or whatever a simulation drew for it.

A field is written in two steps, so that it never has to fit in memory: `create` lays down everything but the values, `write_block` fills
one stretch of trajectories or frames. Where there is nothing to measure (inside a body, on land, beyond the points of a small mesh) it is
NaN. `block_length` is how long a stretch should be.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
import zarr.codecs

from pipeline import lexicon

DIMS = ("trajectory", "time", "z", "y", "x", "point")  # in this order, as far as a field has them
SPACES = (("x",), ("y", "x"), ("z", "y", "x"), ("point",))
GEOMETRIES = ("plane", "torus", "sphere")
DESCRIBED_BY = ("title", "license", "source", "history", "geometry")
CHUNK_BYTES = 4 << 20

_AXES = {
    "time": {"standard_name": "time", "axis": "T"},
    "latitude": {"standard_name": "latitude", "units": "degrees_north"},
    "longitude": {"standard_name": "longitude", "units": "degrees_east"},
    "z": {"axis": "Z"},
    "y": {"axis": "Y"},
    "x": {"axis": "X"},
}


def open_field(folder: Path) -> xr.Dataset:
    """Open FOLDER/field.zarr lazily and check it."""
    path = folder / "field.zarr"
    if not path.exists():
        raise ValueError(f"{path} does not exist: run the stage that writes it first")
    field = xr.open_zarr(path, consolidated=False, chunks={})
    field = field[sorted(field.data_vars)]  # a folder lists its arrays in no order
    problems = check(field)
    if problems:
        raise ValueError(f"{path} breaks the field contract:\n  " + "\n  ".join(problems))
    return field


def is_field(folder: Path) -> bool:
    """Does a source folder hold a field rather than observations?"""
    return (folder / "field.zarr").exists()


def space(field: xr.Dataset) -> tuple[str, ...]:
    """The dims of place of a field, one of SPACES; () where it has none of them."""
    found = tuple(dim for dim in DIMS[2:] if dim in field.dims)
    return found if found in SPACES else ()


def axes(field: xr.Dataset) -> tuple[str, ...]:
    """The coordinates of place of a simulated field, x first."""
    return tuple(name for name in ("x", "y", "z") if name in field.coords)


def check(field: xr.Dataset) -> list[str]:
    """Every way in which a dataset breaks the contract; values are not read."""
    problems = []
    place = space(field)
    expected = ("trajectory", "time", *place)
    if not place:
        problems.append(f"the dims are {tuple(field.sizes)}, expected time and one of {', '.join(map(str, SPACES))}")
    for name, array in field.data_vars.items():
        variable = lexicon.VARIABLES.get(str(name))
        if variable is None:
            problems.append(f"variable {name!r} is not in the lexicon")
            continue
        if tuple(array.dims) not in (expected, expected[1:]):
            problems.append(f"{name} has dims {array.dims}, expected {expected} or {expected[1:]}")
        if array.dtype != np.float32:
            problems.append(f"{name} is {array.dtype}, expected float32")
        if array.attrs.get("units") != variable.unit:
            problems.append(f"{name} has units {array.attrs.get('units')!r}, expected {variable.unit!r}")
    if not field.data_vars:
        problems.append("there is no variable")
    if field.attrs.get("geometry") not in GEOMETRIES:
        problems.append(f"attribute geometry is {field.attrs.get('geometry')!r}, expected one of {', '.join(GEOMETRIES)}")
    geographic = "latitude" in field.coords
    scattered = place == ("point",)
    if scattered and not axes(field):
        problems.append("points have no coordinate x")
    problems += [
        f"coordinate {name} has dims {field[name].dims}, expected ('trajectory', 'point') or ('point',)"
        for name in axes(field)
        if scattered and field[name].dims not in (("trajectory", "point"), ("point",))
    ]
    for name in ("time", *(("latitude", "longitude") if geographic else () if scattered else place)):
        if name not in field.coords:
            problems.append(f"coordinate {name} is missing")
        elif not (np.diff(field[name].values.astype("f8")) > 0).all():
            problems.append(f"coordinate {name} does not increase strictly")
    if geographic and "longitude" in field.coords and (field["longitude"].max() > 180 or field["longitude"].min() < -180):
        problems.append("longitude must lie in -180..180")
    return problems


def block_length(sizes: Mapping[Hashable, int]) -> int:
    """How many trajectories (or frames, where there are no trajectories) make one chunk of about 4 MiB of one variable."""
    first = next(dim for dim in DIMS if dim in sizes)
    row = 4 * math.prod(size for dim, size in sizes.items() if dim in DIMS and dim != first)
    return max(1, min(sizes[first], CHUNK_BYTES // max(1, row)))


def create(path: Path, coordinates: xr.Dataset, variables: Mapping[str, Mapping[str, Any]], positions: Sequence[str] = ()) -> None:
    """Lay down a field whose values are still missing: CF coordinates, attributes, empty float32 arrays (NaN).

    `coordinates` has the coordinates, the sizes of all dimensions and the attributes DESCRIBED_BY; `variables` maps each short name of
    the lexicon to attributes on top of the lexicon's (`cell_methods`, ...); `positions` are coordinates (trajectory, point) that are
    written like the values. The same arguments give the same bytes.
    """
    missing = [name for name in DESCRIBED_BY if name not in coordinates.attrs]
    if missing:
        raise ValueError(f"{path}: a field needs the attributes {', '.join(DESCRIBED_BY)}; {', '.join(missing)} not given")
    field = _described(coordinates)
    field.to_zarr(path, mode="w-", zarr_format=3, consolidated=False, encoding=_encoding(field))
    group = zarr.open_group(path, mode="r+")
    length, more_coordinates = block_length(field.sizes), " ".join([_auxiliary(field), *positions]).strip()

    def lay_down(name: str, dims: Sequence[str], attrs: Mapping[str, Any]) -> None:
        shape = tuple(field.sizes[dim] for dim in dims)
        group.create_array(
            name,
            shape=shape,
            chunks=(length, *shape[1:]),
            dtype="f4",
            fill_value=float("nan"),
            compressors=zarr.codecs.ZstdCodec(level=3),
            dimension_names=dims,
            attributes=dict(sorted({**attrs, "_FillValue": "AAAAAAAA+H8="}.items())),
        )

    for name in positions:
        lay_down(name, ("trajectory", "point"), _AXES[name])
    for name, more in variables.items():
        known = lexicon.lookup(name)
        attrs = {"long_name": known.long_name, "units": known.unit, "coordinates": more_coordinates, **more}
        if known.standard_name:
            attrs["standard_name"] = known.standard_name
        lay_down(name, [dim for dim in DIMS if dim in field.sizes], attrs)


def write_block(path: Path, name: str, start: int, values: np.ndarray) -> None:
    """Fill `values` (block, ...) into a created field from trajectory or frame `start` on; blocks of `block_length` rewrite no chunk."""
    array = zarr.open_array(path / name, mode="r+")
    array[start : start + len(values)] = values.astype("f4", copy=False)


def _described(field: xr.Dataset) -> xr.Dataset:
    """Add CF and ACDD attributes that follow from the coordinates."""
    field = field.drop_encoding()
    for name, attrs in _AXES.items():
        if name in field.coords:
            field[name].attrs.update(attrs)
    field.attrs["Conventions"] = "CF-1.11, ACDD-1.3"
    if "latitude" in field.coords:
        for name, short in (("latitude", "lat"), ("longitude", "lon")):
            field.attrs[f"geospatial_{short}_min"] = float(field[name].min())
            field.attrs[f"geospatial_{short}_max"] = float(field[name].max())
        first, last = (np.datetime_as_string(field["time"].values[i], unit="s") + "Z" for i in (0, -1))
        field.attrs.update(time_coverage_start=first, time_coverage_end=last)
    else:
        field["time"].attrs["long_name"] = "model time"
        field["time"].attrs.pop("standard_name")  # CF's `time` needs a unit of time; this one is dimensionless
        field["time"].attrs["units"] = "1"
    field.attrs = dict(sorted(field.attrs.items()))
    return field


def _encoding(field: xr.Dataset) -> dict[Hashable, dict[str, Any]]:
    encoding: dict[Hashable, dict[str, Any]] = {name: {"chunks": field[name].shape} for name in field.coords if field[name].ndim}
    if np.issubdtype(field["time"].dtype, np.datetime64):
        encoding["time"] |= {"units": "seconds since 1970-01-01T00:00:00Z", "calendar": "standard", "dtype": "int64"}
    return encoding


def _auxiliary(field: xr.Dataset) -> str:
    return " ".join(str(name) for name in field.coords if name not in field.dims)
