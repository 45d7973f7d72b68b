"""Quality control against neighbours with titanlib, one call a time slice.

The engine takes a missing value for a good one and says "good" where nobody could judge, so only usable values are passed, and
what the isolation check finds alone stays "not evaluated".
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import titanlib
from pydantic import Field

from pipeline.params import Section
from pipeline.qc import FAIL, NOT_EVALUATED, PASS, SUSPECT


class Consistency(Section):
    """Spatial consistency test (SCT) of dense networks: optimal interpolation from the others, leaving the value out.

    Its limits come from the neighbours alone, never from the value that is judged; tune it on planted errors before switching it on.
    """

    least: int = Field(ge=10)  # values in a time slice, or it is not tested
    inner_km: float = Field(gt=0)
    outer_km: float = Field(gt=0)
    scale_km: float = Field(gt=0)  # smallest distance over which values resemble each other
    noise: float = Field(gt=0)  # variance of a sensor's error relative to that of the field
    suspect: float = Field(gt=0)  # threshold in expected standard deviations
    fail: float = Field(gt=0)


class Neighbors(Section):
    """Buddy check of one variable: a value is compared with the mean of its neighbours at the same time."""

    radius_km: float = Field(gt=0)
    least: int = Field(ge=2)  # with fewer neighbours in the radius a value is not tested
    suspect: float = Field(gt=0)  # threshold in standard deviations of the neighbours
    fail: float = Field(gt=0)
    min_std: float = Field(gt=0)  # in the variable's unit: agreement closer than this is luck
    consistency: Consistency | None = None


def neighbor_flags(value: np.ndarray, time: np.ndarray, latitude: np.ndarray, longitude: np.ndarray, checks: Neighbors) -> np.ndarray:
    """Flags [n] int8 of one variable.

    Args:
        value: [n] float, NaN where missing or failed by an earlier test: such values neither judge nor are judged.
        time: [n] sorted; values of one time are neighbours of each other.
    """
    flag = np.full(len(value), NOT_EVALUATED, np.int8)
    finite = np.flatnonzero(np.isfinite(value))
    edges = np.flatnonzero(np.diff(time[finite]).astype(bool)) + 1
    for rows in np.split(finite, edges):
        if len(rows) <= checks.least:
            continue
        points, company = _network(latitude[rows].tobytes(), longitude[rows].tobytes(), checks.least, checks.radius_km)
        flag[rows] = np.where(company, PASS, NOT_EVALUATED)
        sct = checks.consistency if checks.consistency and len(rows) >= checks.consistency.least else None
        for verdict, buddy, far in ((SUSPECT, checks.suspect, sct and sct.suspect), (FAIL, checks.fail, sct and sct.fail)):
            odd = _buddy(points, value[rows], buddy, checks)
            if sct and far:
                odd |= _inconsistent(points, value[rows], far, sct)
            flag[rows[odd & company]] = verdict
    return flag


def _buddy(points: titanlib.Points, value: np.ndarray, threshold: float, checks: Neighbors) -> np.ndarray:
    n = len(value)
    radius, least = np.full(n, 1000.0 * checks.radius_km), np.full(n, checks.least, np.int32)
    no_elevation = 0.0
    return np.asarray(titanlib.buddy_check(points, value, radius, least, threshold, no_elevation, 0.0, checks.min_std, 2)) == 1


def _inconsistent(points: titanlib.Points, value: np.ndarray, threshold: float, sct: Consistency) -> np.ndarray:
    n, fewest, most, rounds = len(value), 10, 100, 2
    no_profile = (n + 1, 100.0, 1000.0 * sct.scale_km, 200.0)  # elevations are not known: never fit a vertical profile
    limit = np.full(n, threshold)
    radii = (1000.0 * sct.inner_km, 1000.0 * sct.outer_km)
    flags, *_ = titanlib.sct(points, value, fewest, most, *radii, rounds, *no_profile, limit, limit, np.full(n, sct.noise))
    return np.asarray(flags) == 1


@lru_cache(maxsize=4096)
def _network(latitude: bytes, longitude: bytes, least: int, radius_km: float) -> tuple[titanlib.Points, np.ndarray]:
    """Points of a time slice and which of them have company; most slices of a station network share theirs."""
    lat, lon = np.frombuffer(latitude), np.frombuffer(longitude)
    zero = np.zeros(len(lat))
    points = titanlib.Points(lat, lon, zero, zero)
    return points, np.asarray(titanlib.isolation_check(points, least, 1000.0 * radius_km)) == 0
