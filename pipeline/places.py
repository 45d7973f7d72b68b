"""Where the values of a field lie, as positions of a sensor dataset: kilometres on a plane, unit vectors of a grid on a sphere, or the
coordinates themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from pipeline import fields, geometry


def positions(field: xr.Dataset, trajectory: int) -> np.ndarray:
    """Positions [P,D] of the places of a trajectory, grids in the order they are stored in."""
    if "latitude" in field.coords:
        longitude, latitude = np.meshgrid(field["longitude"].values, field["latitude"].values)
        return geometry.to_km(longitude, latitude, geometry.centred_on(longitude, latitude)).reshape(-1, 2)
    if _is_globe(field):
        longitude, latitude = np.radians(np.meshgrid(field["x"].values, field["y"].values))
        vector = (np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude))
        return np.stack(vector, axis=-1).reshape(-1, 3)
    axes = [field[name] for name in fields.axes(field)]
    if "point" in field.dims:
        one = [axis.isel(trajectory=trajectory) if "trajectory" in axis.dims else axis for axis in axes]
        return np.stack([axis.values for axis in one], axis=-1)
    grid = np.meshgrid(*(axis.values for axis in reversed(axes)), indexing="ij")
    return np.stack([axis.ravel() for axis in reversed(grid)], axis=-1)


def _is_globe(field: xr.Dataset) -> bool:
    """A grid on a sphere: its places are unit vectors, so that longitude has no seam and poles are points. Scattered points on a sphere
    stay in degrees, which the great-circle distances of Gaussian process tasks are made of."""
    return field.attrs["geometry"] == "sphere" and fields.space(field) == ("y", "x")


def space(field: xr.Dataset) -> tuple[str, ...]:
    """The axes of a position."""
    if _is_globe(field):
        return ("x", "y", "z")
    return ("x", "y") if "latitude" in field.coords else fields.axes(field)


def scale(field: xr.Dataset) -> dict[str, Any]:
    """How positions are scaled."""
    if "latitude" in field.coords:
        projection = geometry.centred_on(*np.meshgrid(field["longitude"].values, field["latitude"].values))
        return {"centre": (0.0, 0.0), "half_extent": float(np.abs(positions(field, 0)).max()), "projection": projection}
    if _is_globe(field):
        return {"centre": (0.0, 0.0, 0.0), "half_extent": 1.0, "projection": None}
    axes = fields.axes(field)
    if field.attrs["geometry"] == "torus":
        return {"centre": (0.5,) * len(axes), "half_extent": 0.5, "projection": None}
    low, high = (np.array([f(field[name]) for name in axes]) for f in (np.min, np.max))
    return {"centre": tuple(((low + high) / 2).tolist()), "half_extent": float((high - low).max() / 2) or 1.0, "projection": None}
