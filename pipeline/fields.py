"""The field contract: a gridded variable or several as CF Zarr v3, opened lazily with xarray.

    FOLDER/field.zarr   dims (trajectory?, time, y, x), float32, one array per variable named by the lexicon
    FOLDER/ingest.json  what was done, with counts

Geographic fields carry `latitude(y)`, `longitude(x)` (longitude -180..180) and UTC datetime64 `time`; simulations carry model coordinates
`y`, `x` on [0, 1) and float `time` in model units. Coordinates increase. Dataset attributes: `Conventions`, `title`, `license`, `source`,
`history` without any clock, `geometry` ("plane" | "torus").
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from pipeline import lexicon

DIMS = ("trajectory", "time", "y", "x")


def open_field(folder: Path) -> xr.Dataset:
    """Open FOLDER/field.zarr lazily and check it."""
    path = folder / "field.zarr"
    if not path.exists():
        raise ValueError(f"{path} does not exist: run the stage that writes it first")
    field = xr.open_zarr(path, consolidated=False, chunks={})
    problems = check(field)
    if problems:
        raise ValueError(f"{path} breaks the field contract:\n  " + "\n  ".join(problems))
    return field


def is_field(folder: Path) -> bool:
    """Does a source folder hold a field rather than observations?"""
    return (folder / "field.zarr").exists()


def check(field: xr.Dataset) -> list[str]:
    """Every way in which a dataset breaks the contract; values are not read."""
    problems = []
    for name, array in field.data_vars.items():
        variable = lexicon.VARIABLES.get(str(name))
        if variable is None:
            problems.append(f"variable {name!r} is not in the lexicon")
            continue
        if tuple(array.dims) not in (DIMS, DIMS[1:]):
            problems.append(f"{name} has dims {array.dims}, expected {DIMS} or {DIMS[1:]}")
        if array.dtype != np.float32:
            problems.append(f"{name} is {array.dtype}, expected float32")
        if array.attrs.get("units") != variable.unit:
            problems.append(f"{name} has units {array.attrs.get('units')!r}, expected {variable.unit!r}")
    if not field.data_vars:
        problems.append("there is no variable")
    if field.attrs.get("geometry") not in ("plane", "torus"):
        problems.append(f"attribute geometry is {field.attrs.get('geometry')!r}, expected 'plane' or 'torus'")
    geographic = "latitude" in field.coords
    for name in ("time", *(("latitude", "longitude") if geographic else ("y", "x"))):
        if name not in field.coords:
            problems.append(f"coordinate {name} is missing")
        elif not (np.diff(field[name].values.astype("f8")) > 0).all():
            problems.append(f"coordinate {name} does not increase strictly")
    if geographic and "longitude" in field.coords and (field["longitude"].max() > 180 or field["longitude"].min() < -180):
        problems.append("longitude must lie in -180..180")
    return problems
