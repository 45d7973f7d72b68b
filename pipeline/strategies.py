"""Which points of a grid are sensors, frame by frame: the regimes S1-S5 of sparse, faulty and moving sensors.

all               every point                                     (S1 clean and complete; with noise: S2)
missing_region    a share of the points outside one square hole   (S3)
random            a random share, fixed for the trajectory        (S4 with rate 0.5)
random_per_frame  a fresh random share each frame                 (S5)
random_walk       a random share that walks over the grid         (S5, second variant)
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field

from pipeline.params import Section

FIXED = ("all", "missing_region", "random")  # the same sensors in every frame of a trajectory


class Layout(Section):
    strategy: Literal["all", "missing_region", "random", "random_per_frame", "random_walk"]
    rate: float = Field(default=1.0, gt=0, le=1)  # share of the grid points (outside the hole) that are sensors
    hole: float = Field(default=0.25, gt=0, lt=1)  # missing_region: share of the area
    noise: float = Field(default=0.0, ge=0)  # multiplicative: observed = true * (1 + noise * N(0, 1)); the truth stays clean

    def sensors(self, shape: tuple[int, int], frames: int, torus: bool, seed: int, trajectory: int) -> np.ndarray:
        """Indices [frames, n] into the flattened (y, x) grid, increasing in each frame; depends on (seed, trajectory) alone."""
        rng = np.random.default_rng([seed, trajectory, 0])
        free = np.arange(shape[0] * shape[1])
        if self.strategy == "missing_region":
            free = np.flatnonzero(~hole(shape, self.hole, torus, rng).ravel())
        count = len(free) if self.strategy == "all" else round(self.rate * len(free))
        if count < 1:
            raise ValueError(f"rate {self.rate} of {len(free)} grid points gives no sensor; it must be at least {1 / len(free):.2g}")
        if self.strategy == "random_per_frame":
            return np.sort(np.stack([rng.choice(free, count, replace=False) for _ in range(frames)]), axis=1)
        chosen = np.sort(rng.choice(free, count, replace=False))
        if self.strategy == "random_walk":
            return np.sort(walk(chosen, shape, frames, torus, rng), axis=1)
        return np.broadcast_to(chosen, (frames, count))

    def observed(self, value: np.ndarray, seed: int, trajectory: int, first_frame: int) -> np.ndarray:
        """What sensors report of true values [t,n,C] of the frames from `first_frame` on, each frame with noise of its own stream."""
        if not self.noise:
            return value
        draws = [np.random.default_rng([seed, trajectory, 1, first_frame + t]).standard_normal(value.shape[1:]) for t in range(len(value))]
        return (value * (1 + self.noise * np.stack(draws))).astype(value.dtype)


def hole(shape: tuple[int, int], share: float, torus: bool, rng: np.random.Generator) -> np.ndarray:
    """Mask (y, x), True in one square (in units of the domain's sides) of `share` of the area; on a torus it may cross the border."""
    inside = []
    for length in shape:
        side = round(np.sqrt(share) * length)
        start = int(rng.integers(0, length if torus else length - side + 1))
        inside.append(np.isin(np.arange(length), (start + np.arange(side)) % length))
    return inside[0][:, None] & inside[1]


def walk(start: np.ndarray, shape: tuple[int, int], frames: int, torus: bool, rng: np.random.Generator) -> np.ndarray:
    """Random walk [frames, n] from distinct grid points: each step to one of the eight neighbours or none.

    Two walkers never share a point: a step is taken only onto a point that was free before, by the first walker that wants it.
    Walkers stop at the border of a plane.
    """
    path = [start]
    for _ in range(frames - 1):
        now = path[-1]
        place = np.stack(np.unravel_index(now, shape)) + rng.integers(-1, 2, (2, len(now)))
        bounds = np.array(shape)[:, None]
        place = place % bounds if torus else np.clip(place, 0, bounds - 1)
        wanted = np.ravel_multi_index(tuple(place), shape)
        first = np.zeros(len(now), bool)
        first[np.unique(wanted, return_index=True)[1]] = True
        path.append(np.where(first & ~np.isin(wanted, now), wanted, now))
    return np.stack(path)
