"""Quality control against neighbours: what the engine does with missing values and thin networks must not leak into flags."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline import qc
from pipeline.qc_spatial import Neighbors, neighbor_flags

CHECKS = Neighbors(radius_km=60, least=5, suspect=5, fail=10, min_std=5)


def network(stations=12, hours=6, seed=0):
    """Stations within 30 km that agree to about 3 units: value, time, latitude, longitude, each [hours * stations]."""
    rng = np.random.default_rng(seed)
    latitude, longitude = 39.9 + rng.normal(0, 0.1, stations), 116.4 + rng.normal(0, 0.1, stations)
    value = 80 + 10 * np.arange(hours)[:, None] + rng.normal(0, 3, (hours, stations))
    time = np.datetime64("2020-01-01", "us") + np.repeat(np.arange(hours), stations) * np.timedelta64(1, "h")
    return value, time, np.tile(latitude, hours), np.tile(longitude, hours)


def test_outlier_fails_and_nobody_else():
    value, time, latitude, longitude = network()
    value[3, 7] = 400
    flag = neighbor_flags(value.ravel(), time, latitude, longitude, CHECKS).reshape(value.shape)
    assert flag[3, 7] == qc.FAIL
    assert (np.delete(flag.ravel(), 3 * 12 + 7) == qc.PASS).all()


def dense(seed=0):
    """400 sensors in one hour on a field with steep slopes, over which a mean of neighbours is a poor guess."""
    rng = np.random.default_rng(seed)
    latitude, longitude = rng.uniform(39.5, 40.3, 400), rng.uniform(116.0, 117.0, 400)
    value = 100 + 300 * (latitude - 39.9) + 60 * np.sin(12 * longitude) + rng.normal(0, 2, 400)
    return value, np.full(400, np.datetime64("2020-01-01", "us")), latitude, longitude


SCT = {"least": 30, "inner_km": 15, "outer_km": 30, "scale_km": 8, "noise": 0.1, "suspect": 10, "fail": 40}


def test_consistency_finds_what_the_buddy_check_cannot_in_a_dense_network():
    value, time, latitude, longitude = dense()
    planted = np.arange(0, 400, 40)
    value[planted] += 45
    buddies = CHECKS.model_copy(update={"radius_km": 15.0, "least": 5})
    alone = neighbor_flags(value, time, latitude, longitude, buddies)
    both = neighbor_flags(value, time, latitude, longitude, Neighbors(**{**buddies.model_dump(), "consistency": SCT}))
    assert (alone[planted] >= qc.SUSPECT).mean() < 0.5
    assert (both[planted] >= qc.SUSPECT).mean() > 0.9
    assert (np.delete(both, planted) >= qc.SUSPECT).mean() < 0.01


def test_consistency_is_left_out_of_thin_slices():
    value, time, latitude, longitude = network()
    with_sct = Neighbors(**{**CHECKS.model_dump(), "consistency": SCT})
    plain = neighbor_flags(value.ravel(), time, latitude, longitude, CHECKS)
    assert neighbor_flags(value.ravel(), time, latitude, longitude, with_sct).tolist() == plain.tolist()


def test_missing_value_is_not_good_and_changes_no_other_flag():
    value, time, latitude, longitude = network()
    value[3, 7] = 400
    whole = neighbor_flags(value.ravel(), time, latitude, longitude, CHECKS)
    value[3, 2] = np.nan
    flag = neighbor_flags(value.ravel(), time, latitude, longitude, CHECKS)
    assert flag[3 * 12 + 2] == qc.NOT_EVALUATED
    assert (np.delete(flag, 3 * 12 + 2) == np.delete(whole, 3 * 12 + 2)).all()


def test_too_few_neighbours_is_not_evaluated_rather_than_good():
    value, time, latitude, longitude = network(stations=5)
    value[0, 0] = 4000
    assert (neighbor_flags(value.ravel(), time, latitude, longitude, CHECKS) == qc.NOT_EVALUATED).all()


def test_far_station_is_not_evaluated():
    value, time, latitude, longitude = network()
    latitude = latitude.copy()
    latitude[::12] += 5  # 550 km away
    value[0, 0] = 4000
    flag = neighbor_flags(value.ravel(), time, latitude, longitude, CHECKS).reshape(value.shape)
    assert (flag[:, 0] == qc.NOT_EVALUATED).all()
    assert (flag[:, 1:] == qc.PASS).all()


def test_common_rise_of_all_stations_is_no_outlier():
    value, time, latitude, longitude = network()
    value[4] += 500
    assert (neighbor_flags(value.ravel(), time, latitude, longitude, CHECKS) == qc.PASS).all()


@pytest.mark.parametrize(("offset", "expected"), [(20, qc.PASS), (40, qc.SUSPECT), (200, qc.FAIL)])
def test_thresholds(offset, expected):
    value, time, latitude, longitude = network(seed=3)
    value[2, 4] = np.delete(value[2], 4).mean() + offset
    assert neighbor_flags(value.ravel(), time, latitude, longitude, CHECKS)[2 * 12 + 4] == expected
