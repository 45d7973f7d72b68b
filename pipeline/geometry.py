"""A local map: degrees to kilometres east and north of a reference point and back, good for a region of some hundred kilometres.

Equirectangular with the reference latitude as standard parallel, on the sphere of mean radius. A distance is wrong by about the
relative change of cos(latitude) over the region.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from pydantic import Field

from pipeline.params import Section

EARTH_RADIUS = 6371.0088  # km, mean radius of WGS 84 (IUGG)


class Cells(Section):
    """A grid in degrees."""

    longitude: float = Field(gt=0)  # size of a cell
    latitude: float = Field(gt=0)
    origin: tuple[float, float]  # longitude, latitude of a corner


def to_km(longitude: np.ndarray, latitude: np.ndarray, projection: Mapping[str, float]) -> np.ndarray:
    """Degrees (...) to (x, y) in km (...,2); the projection names its reference `longitude` and `latitude`."""
    east = np.mod(np.asarray(longitude, float) - projection["longitude"] + 180, 360) - 180  # the short way round
    north = np.asarray(latitude, float) - projection["latitude"]
    return EARTH_RADIUS * np.deg2rad(np.stack([east * np.cos(np.deg2rad(projection["latitude"])), north], axis=-1))


def to_degrees(position: np.ndarray, projection: Mapping[str, float]) -> tuple[np.ndarray, np.ndarray]:
    """(x, y) in km (...,2) to longitude in -180..180 and latitude."""
    east, north = np.moveaxis(np.rad2deg(np.asarray(position, float) / EARTH_RADIUS), -1, 0)
    longitude = projection["longitude"] + east / np.cos(np.deg2rad(projection["latitude"]))
    return np.mod(longitude + 180, 360) - 180, projection["latitude"] + north


def centred_on(longitude: np.ndarray, latitude: np.ndarray) -> dict[str, float]:
    """A projection centred on the box around some points, to four decimals of a degree."""
    return {name: round(float((v.min() + v.max()) / 2), 4) for name, v in (("longitude", longitude), ("latitude", latitude))}
