"""Which points of a grid are sensors, frame by frame: the regimes S1-S5 of sparse, faulty and moving sensors.

all               every point                                     (S1 clean and complete; with noise: S2)
missing_region    a share of the points outside one square hole   (S3)
random            a random share, fixed for the trajectory        (S4 with rate 0.5)
random_per_frame  a fresh random share each frame                 (S5)
random_walk       a random share that walks over the grid         (S5, second variant)
frames            every point, but in some of the frames only     (series to be interpolated in time)
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from pydantic import Field, model_validator

from pipeline.params import Section

FIXED = ("all", "missing_region", "random", "frames")  # the same sensors in every frame of a trajectory


class Layout(Section):
    strategy: Literal["all", "missing_region", "random", "random_per_frame", "random_walk", "frames"]
    rate: float = Field(default=1.0, gt=0, le=1)  # share of the grid points (outside the hole, in the middle) that are sensors
    hole: float = Field(default=0.25, gt=0, lt=1)  # missing_region: share of the area
    noise: float = Field(default=0.0, ge=0)  # multiplicative: observed = true * (1 + noise * N(0, 1)); the truth stays clean
    central: float = Field(default=1.0, gt=0, le=1)  # random: sensors lie in so large a middle part of every axis
    additive: float = Field(default=0.0, ge=0)  # standard deviation of noise that is added, in the unit of the variable
    observed_frames: int | None = Field(default=None, ge=2)  # frames: so many of a trajectory, evenly spread from the first to the last
    irregular: bool = False  # frames: the first one and random others

    @model_validator(mode="after")
    def _frames(self) -> Layout:
        if (self.strategy == "frames") != (self.observed_frames is not None):
            raise ValueError(f"observed_frames belongs to strategy frames: found {self.observed_frames} with {self.strategy}")
        if self.central < 1 and self.strategy != "random":
            raise ValueError(f"central belongs to strategy random: found {self.central} with {self.strategy}")
        return self

    def seen(self, frames: int, seed: int, trajectory: int) -> np.ndarray:
        """[frames] True where the sensors report; depends on (seed, trajectory) alone."""
        if self.observed_frames is None:
            return np.ones(frames, bool)
        if self.observed_frames > frames:
            raise ValueError(f"observed_frames is {self.observed_frames}, but a trajectory has only {frames} frames")
        if self.irregular:
            later = np.random.default_rng([seed, trajectory, 2]).choice(np.arange(1, frames), self.observed_frames - 1, replace=False)
            return np.isin(np.arange(frames), [0, *later])
        return np.isin(np.arange(frames), np.linspace(0, frames - 1, self.observed_frames).astype(int))

    def sensors(self, there: np.ndarray, frames: int, torus: bool, seed: int, trajectory: int) -> np.ndarray:
        """Indices [frames, n] into the flattened grid (z?, y?, x), increasing in each frame; `there` has its shape and is False where
        there is no value to report, inside a body or on land. Depends on `there` and (seed, trajectory) alone."""
        rng = np.random.default_rng([seed, trajectory, 0])
        shape, free = there.shape, np.flatnonzero(there)
        if self.strategy == "missing_region":
            free = np.flatnonzero(there & ~hole(shape, self.hole, torus, rng))
        if self.central < 1:
            free = np.flatnonzero(there & middle(shape, self.central))
        count = len(free) if self.strategy in ("all", "frames") else round(self.rate * len(free))
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
        for kind, size in ((1, self.noise), (3, self.additive)):
            if size:
                streams = [np.random.default_rng([seed, trajectory, kind, first_frame + t]) for t in range(len(value))]
                draws = np.stack([stream.standard_normal(value.shape[1:]) for stream in streams])
                value = (value * (1 + size * draws) if kind == 1 else value + size * draws).astype(value.dtype)
        return value


def hole(shape: tuple[int, ...], share: float, torus: bool, rng: np.random.Generator) -> np.ndarray:
    """Mask of this shape, True in one cube (in units of the domain's sides) of `share` of the volume; it may cross a torus's border."""
    inside = []
    for length in shape:
        side = round(share ** (1 / len(shape)) * length)
        start = int(rng.integers(0, length if torus else length - side + 1))
        inside.append(np.isin(np.arange(length), (start + np.arange(side)) % length))
    return np.logical_and.reduce(np.meshgrid(*inside, indexing="ij"))


def middle(shape: tuple[int, ...], share: float) -> np.ndarray:
    """Mask of this shape, True in the middle `share` of every axis."""
    inside = [abs(np.arange(length) + 0.5 - length / 2) <= share * length / 2 for length in shape]
    return np.logical_and.reduce(np.meshgrid(*inside, indexing="ij"))


def walk(start: np.ndarray, shape: tuple[int, ...], frames: int, torus: bool, rng: np.random.Generator) -> np.ndarray:
    """Random walk [frames, n] from distinct grid points: each step to one of the neighbours (eight on a plane) or none.

    Two walkers never share a point: a step is taken only onto a point that was free before, by the first walker that wants it.
    Walkers stop at the border of a plane.
    """
    path = [start]
    for _ in range(frames - 1):
        now = path[-1]
        place = np.stack(np.unravel_index(now, shape)) + rng.integers(-1, 2, (len(shape), len(now)))
        bounds = np.array(shape)[:, None]
        place = place % bounds if torus else np.clip(place, 0, bounds - 1)
        wanted = np.ravel_multi_index(tuple(place), shape)
        first = np.zeros(len(now), bool)
        first[np.unique(wanted, return_index=True)[1]] = True
        path.append(np.where(first & ~np.isin(wanted, now), wanted, now))
    return np.stack(path)
