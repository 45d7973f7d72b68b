"""Splits, sensor layouts and the local map."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from pipeline import geometry, splits
from pipeline.sensors import CONTEXT, GAP, HELD_TEST, HELD_VALIDATION, TEST, TRAIN, VALIDATION
from pipeline.strategies import Layout, hole, walk

shares = st.floats(0.05, 0.4)


@given(st.integers(1, 3000), shares, shares, st.integers(0, 100))
def test_time_blocks_are_ordered_and_apart(n: int, validation: float, test: float, gap: int) -> None:
    blocks = splits.TimeBlocks(validation=validation, test=test, gap=gap)
    if n - round(test * n) - round(validation * n) <= gap or round(validation * n) <= gap or round(test * n) < 1:
        with pytest.raises(ValueError, match=rf"it has {n} frames, too few") as caught:
            splits.time_blocks(n, blocks, "it")
        needed = int(str(caught.value).split("at least ")[1].split()[0])
        assert needed > n
        splits.time_blocks(needed, blocks, "it")  # with as many as it asks for, it works
        return
    split = splits.time_blocks(n, blocks, "it")
    at = {code: np.flatnonzero(split == code) for code in (TRAIN, VALIDATION, TEST)}
    assert at[VALIDATION][0] - at[TRAIN][-1] == gap + 1
    assert at[TEST][0] - at[VALIDATION][-1] == gap + 1
    assert at[TEST][-1] == n - 1
    assert (split == GAP).sum() == 2 * gap
    assert abs(len(at[TEST]) - test * n) <= 0.5


def test_shares_that_leave_nothing_to_train_on() -> None:
    with pytest.raises(ValueError, match="nothing is left for train"):
        splits.time_blocks(1000, splits.TimeBlocks(validation=0.5, test=0.5, gap=0), "it")


@given(st.integers(0, 4), st.integers(0, 4), st.integers(0, 50))
def test_drawn_sensors_have_the_wanted_counts(validation: int, test: int, seed: int) -> None:
    position = np.random.default_rng(0).uniform(-10, 10, (12, 2))
    frames = np.array([100] * 10 + [3, 3])
    role = splits.held_out([str(i) for i in range(12)], position, frames, splits.HeldOut(validation=validation, test=test, least=10), seed)
    assert (role == HELD_VALIDATION).sum() == validation
    assert (role == HELD_TEST).sum() == test
    assert (role[10:] == CONTEXT).all()


def test_drawn_sensors_are_spread() -> None:
    """Of a row of points, each quarter gives one."""
    position = np.stack([np.arange(40.0), np.zeros(40)], axis=1)
    for seed in range(20):
        assert (splits.spread(position, 4, np.random.default_rng(seed)) // 10).tolist() == [0, 1, 2, 3]


def test_named_sensors() -> None:
    ids, place, frames = ["a", "b", "c"], np.zeros((3, 2)), np.ones(3)
    role = splits.held_out(ids, place, frames, splits.HeldOut(validation=("c",), test=("a",)), 0)
    assert role.tolist() == [HELD_TEST, CONTEXT, HELD_VALIDATION]
    with pytest.raises(ValueError, match=r"no sensor z; there are a, b, c"):
        splits.held_out(ids, place, frames, splits.HeldOut(test=("z",)), 0)
    with pytest.raises(ValueError, match="a is named for validation and for test"):
        splits.HeldOut(validation=("a", "b"), test=("a",))
    with pytest.raises(ValueError, match="only 3 of 3 are left"):
        splits.held_out(ids, place, frames, splits.HeldOut(test=4), 0)


def test_unknown_role_of_a_trajectory() -> None:
    assert splits.by_role(["train", "test"], np.array([2, 1])).tolist() == [TRAIN, TRAIN, TEST]
    with pytest.raises(ValueError, match="holds valid: expected train, validation, test"):
        splits.by_role(["train", "valid"], np.array([2, 1]))


def test_cases_by_hand() -> None:
    """Two trajectories of 10: train 0-3, validation 4-6, test 7-9."""
    split = np.tile([TRAIN] * 4 + [VALIDATION] * 3 + [TEST] * 3, 2).astype(np.int8)
    visible = np.ones(20)
    visible[14] = 0
    found = splits.cases(split, np.array([0, 10, 20]), visible, splits.Cases(stride=1, horizon=1, block=2))
    assert found["cases/frame"].tolist() == [4, 5, 7, 8, 15, 17, 18]
    assert found["cases/split"].tolist() == [1, 1, 2, 2, 1, 2, 2]
    assert found["cases/block"].tolist() == [0, 0, 2, 2, 4, 6, 6]
    thinned = splits.cases(split, np.array([0, 10, 20]), np.ones(20), splits.Cases(most=2))
    assert thinned["cases/frame"].tolist() == [4, 7, 16, 19]  # first and last of each split
    assert thinned["cases/block"].tolist() == [0, 1, 2, 3]  # a block is a stretch of a trajectory
    with pytest.raises(ValueError, match=r"validation split holds no case.*3 frames after it"):
        splits.cases(split, np.array([0, 10, 20]), visible, splits.Cases(horizon=3))


SHAPE = (8, 12)


@given(st.sampled_from(["all", "random", "random_per_frame", "random_walk", "missing_region"]), st.booleans(), st.integers(0, 99))
def test_layouts_are_sets_of_grid_points_and_pure(strategy: str, torus: bool, trajectory: int) -> None:
    layout = Layout(strategy=strategy, rate=0.3)  # type: ignore[arg-type]
    at = layout.sensors(np.ones(SHAPE, bool), 5, torus, 0, trajectory)
    assert (at == layout.sensors(np.ones(SHAPE, bool), 5, torus, 0, trajectory)).all()
    assert (np.diff(at, axis=1) > 0).all()
    assert at.min() >= 0
    assert at.max() < 96
    expected = {"all": 96, "missing_region": round(0.3 * (96 - 4 * 6))}.get(strategy, round(0.3 * 96))
    assert at.shape == (5, expected)
    assert (at == at[0]).all() == (strategy in ("all", "random", "missing_region"))
    if strategy != "all":
        assert not np.array_equal(at, layout.sensors(np.ones(SHAPE, bool), 5, torus, 1, trajectory))
        assert not np.array_equal(at, layout.sensors(np.ones(SHAPE, bool), 5, torus, 0, trajectory + 1))


@given(st.integers(0, 200), st.booleans(), st.sampled_from([0.1, 0.25, 0.5]))
def test_hole_is_one_square_of_the_wanted_area(seed: int, torus: bool, share: float) -> None:
    mask = hole((20, 20), share, torus, np.random.default_rng(seed))
    side = round(np.sqrt(share) * 20)
    rows, columns = mask.any(axis=1), mask.any(axis=0)
    assert mask.sum() == side * side
    for line in (rows, columns):
        assert line.sum() == side
        jumps = np.abs(np.diff(line.astype(int), append=int(line[0])) if torus else np.diff(line.astype(int), prepend=0, append=0)).sum()
        assert jumps == 2  # one stretch, on a torus perhaps across the border


@given(st.integers(0, 200), st.booleans())
def test_walkers_step_to_neighbours_and_never_meet(seed: int, torus: bool) -> None:
    rng = np.random.default_rng(seed)
    path = walk(rng.choice(96, 40, replace=False), SHAPE, 6, torus, rng)
    assert all(len(set(frame)) == 40 for frame in path.tolist())
    place = np.stack(np.unravel_index(path, SHAPE))  # (2, frames, n)
    step = np.abs(np.diff(place, axis=1))
    if torus:
        step = np.minimum(step, np.array(SHAPE)[:, None, None] - step)
    assert step.max() <= 1
    assert step.any()


def test_noise_is_multiplicative_and_belongs_to_the_frame() -> None:
    layout = Layout(strategy="all", noise=0.3)
    value = np.full((50, 400, 1), 2.0, np.float32)
    seen = layout.observed(value, 0, 3, 0)
    assert abs(float((seen / value - 1).std()) - 0.3) < 0.005
    assert abs(float(seen.mean()) - 2.0) < 0.02
    assert (layout.observed(np.zeros_like(value), 0, 3, 0) == 0).all()
    assert (layout.observed(value[20:], 0, 3, 20) == seen[20:]).all()  # however the field is cut
    assert Layout(strategy="all").observed(value, 0, 3, 0) is value


def test_a_rate_without_a_sensor() -> None:
    with pytest.raises(ValueError, match=r"rate 0.001 of 96 grid points gives no sensor; it must be at least 0.01"):
        Layout(strategy="random", rate=0.001).sensors(np.ones(SHAPE, bool), 2, True, 0, 0)


@given(st.floats(-179.9, 179.9), st.floats(-80, 80), st.floats(-1, 1), st.floats(-1, 1))
def test_projection_and_back(longitude: float, latitude: float, east: float, north: float) -> None:
    projection = {"longitude": longitude, "latitude": latitude}
    there = np.array([(longitude + east + 180) % 360 - 180]), np.array([latitude + north])
    assume(abs(there[0][0]) < 179.99)
    back = geometry.to_degrees(geometry.to_km(*there, projection), projection)
    assert np.allclose(back, there, atol=1e-9)
    assert abs(geometry.to_km(*there, projection)).max() < 160  # also across the date line


def test_projection_against_the_great_circle() -> None:
    """Beijing, Dongsi to Changping: haversine by hand."""
    longitude, latitude = np.array([116.416883, 116.23]), np.array([39.929287, 40.216999])
    position = geometry.to_km(longitude, latitude, geometry.centred_on(longitude, latitude))
    a, b = np.deg2rad(latitude)
    h = np.sin((b - a) / 2) ** 2 + np.cos(a) * np.cos(b) * np.sin(np.deg2rad(np.diff(longitude)[0]) / 2) ** 2
    great_circle = 2 * 6371.0088 * np.arcsin(np.sqrt(h))
    assert abs(np.linalg.norm(position[0] - position[1]) - great_circle) < 1e-3 * great_circle
