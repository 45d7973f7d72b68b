"""Tasks drawn from Gaussian processes: one trajectory is one function at random points of its own, and its kernel parameters are kept.

    rbf        exp(-d^2 / (2 l^2)), l ~ Beta(3, 7)                         2-D and multiscale GP of BSA-TNP (arXiv 2506.09163)
    sphere     exp(-d / l), d degrees on a great circle, l ~ InvGamma(3, 30)   SO(3) GP of the same paper; x is longitude, y latitude
    gneiting   v g^-nu exp(-(sum_i (d_i / l_i)^2 / g^b)^gamma), g = 1 + a |u|^(2 alpha)      space and time, Gneiting (2002)

A small `jitter` on the diagonal is part of the process, in what is drawn and in what is known of it. A Gneiting process has observation
noise too and a mean: values are 6 + 0.9 (mean + process + noise). The paper names the parts of its mean (terrain, clock, harmonic, moving
bump) but not their form, so `mean` is ours.

Shapes: P points, T frames, N = T P points of space and time, each a row (x, y, t).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr
from pydantic import Field, model_validator
from scipy.linalg import cholesky, solve_triangular
from scipy.spatial.distance import cdist
from scipy.spatial.transform import Rotation

from pipeline import trajectories
from pipeline.trajectories import TEST_SEED, Trajectories

VARIABLES = ("signal",)
POSITIONS = ("x", "y")
DRAWN = {
    "rbf": ("length_scale",),
    "sphere": ("length_scale",),
    "gneiting": ("variance", "length_scale_x", "length_scale_y", "a", "alpha", "b", "nu", "gamma", "noise"),
}
RANGES = {  # of the parameters of a Gneiting process, uniform
    "variance": (0.85, 1.75), "length_scale_x": (0.05, 0.15), "length_scale_y": (0.05, 0.15), "a": (0.25, 2.5), "alpha": (0.35, 1.0),
    "b": (0.0, 0.75), "nu": (1.1, 4.0), "gamma": (0.55, 1.0), "noise": (0.01, 0.06),
}  # fmt: skip
OFFSET, SCALE = 6.0, 0.9  # of a Gneiting process


class Params(Trajectories):
    """One set of tasks."""

    equation: Literal["gaussian_process"]
    kernel: Literal["rbf", "sphere", "gneiting"]
    points: int = Field(ge=2)
    boxes: tuple[tuple[float, float], ...] = Field(min_length=1)  # squares [low, high]^2, each with an equal share of the points
    rotation: tuple[float, float, float] = (0.0, 0.0, 0.0)  # sphere: degrees about the axes z, y, x, after the points are drawn
    frames: int = Field(default=1, ge=1)  # gneiting: evenly spread on [0, 1]
    group: int = Field(default=1, ge=1)  # so many tasks in a row share their points and kernel parameters
    jitter: float = Field(default=1e-5, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        if self.points % len(self.boxes):
            raise ValueError(f"points must be a multiple of the {len(self.boxes)} boxes, found {self.points}")
        if self.frames > 1 and self.kernel != "gneiting":
            raise ValueError(f"kernel {self.kernel} knows no time: frames must be 1, found {self.frames}")
        if any(self.rotation) and self.kernel != "sphere":
            raise ValueError(f"rotation is for kernel sphere, found kernel {self.kernel}")
        apart = [name for name in ("trajectories", "validation_trajectories") if getattr(self, name) % self.group]
        if apart:
            raise ValueError(f"{', '.join(apart)} must be multiples of group {self.group}, so that no group is in two splits")
        return self


@dataclass(frozen=True)
class Process:
    """A Gaussian process whose kernel parameters are known. Places are rows (x, y, t)."""

    kernel: str
    drawn: Mapping[str, float]  # names in DRAWN
    jitter: float

    @property
    def nugget(self) -> float:
        """Variance that neighbours do not share, in every value."""
        return (SCALE * self.drawn["noise"]) ** 2 + self.jitter if self.kernel == "gneiting" else self.jitter

    def mean(self, place: np.ndarray) -> np.ndarray:
        """Prior mean [N]."""
        if self.kernel != "gneiting":
            return np.zeros(len(place))
        x, y, t = place.T
        terrain = 0.5 * np.cos(np.pi * x) * np.sin(np.pi * y)
        clock, harmonic = 0.5 * np.sin(2 * np.pi * t), 0.25 * np.sin(4 * np.pi * t + np.pi * x)
        bump = np.exp(-((x - 0.5 * np.cos(2 * np.pi * t)) ** 2 + (y - 0.5 * np.sin(2 * np.pi * t)) ** 2) / (2 * 0.3**2))
        return OFFSET + SCALE * (terrain + clock + harmonic + bump)

    def covariance(self, one: np.ndarray, other: np.ndarray) -> np.ndarray:
        """Prior covariance [N,M], without the nugget."""
        p = self.drawn
        if self.kernel == "rbf":
            return np.exp(cdist(one[:, :2], other[:, :2], "sqeuclidean") / (-2 * p["length_scale"] ** 2))
        if self.kernel == "sphere":
            return np.exp(-great_circle(one[:, :2], other[:, :2]) / p["length_scale"])
        scales = np.array([p["length_scale_x"], p["length_scale_y"]])
        g = 1 + p["a"] * np.abs(one[:, 2:] - other[:, 2]) ** (2 * p["alpha"])
        squared = cdist(one[:, :2] / scales, other[:, :2] / scales, "sqeuclidean")
        return SCALE**2 * p["variance"] * g ** -p["nu"] * np.exp(-((squared / g ** p["b"]) ** p["gamma"]))

    def root(self, place: np.ndarray, noise: float = 0.0) -> np.ndarray:
        """Lower Cholesky factor [N,N] of the covariance of observations, each with noise of this standard deviation of its own."""
        covariance = self.covariance(place, place)
        covariance[np.diag_indices_from(covariance)] += self.nugget + noise**2
        return cholesky(covariance, lower=True, overwrite_a=True, check_finite=False)

    def given(self, seen: np.ndarray, value: np.ndarray, asked: np.ndarray, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation [M] of values at `asked` (M,3), given `value` [N] at `seen` (N,3), observed with `noise`."""
        root = self.root(seen, noise)
        cross = solve_triangular(root, self.covariance(seen, asked), lower=True, check_finite=False)
        mean = self.mean(asked) + cross.T @ solve_triangular(root, value - self.mean(seen), lower=True, check_finite=False)
        prior = self.nugget + (SCALE**2 * self.drawn["variance"] if self.kernel == "gneiting" else 1.0)
        return mean, np.sqrt(np.maximum(prior - (cross**2).sum(axis=0), self.nugget))


def great_circle(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Degrees [N,M] between places (longitude, latitude) in degrees; by the chord, which is exact for small distances."""
    return np.degrees(2 * np.arcsin(np.clip(cdist(_vector(one), _vector(other)) / 2, 0, 1)))


def rotated(place: np.ndarray, angles: tuple[float, float, float]) -> np.ndarray:
    """Places [P,2] (longitude, latitude) turned about the axes z, y, x by so many degrees."""
    x, y, z = Rotation.from_euler("zyx", angles, degrees=True).apply(_vector(place)).T
    return np.degrees(np.stack([np.arctan2(y, x), np.arcsin(np.clip(z, -1, 1))], axis=1))


def _vector(place: np.ndarray) -> np.ndarray:
    longitude, latitude = np.radians(np.asarray(place, np.float64)).T
    return np.stack([np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)], axis=1)


def coordinates(params: Params) -> xr.Dataset:
    """The data set without values and positions; what was drawn for a trajectory is a coordinate (trajectory)."""
    seeds = trajectories.seeds(params)
    drawn = [draw(params, int(seed)) for seed in seeds]
    place = {"sphere": "the sphere, degrees"}.get(params.kernel, "the plane")
    return trajectories.described(
        params,
        {
            "time": np.linspace(0, 1, params.frames) if params.frames > 1 else np.zeros(1),
            **{name: ("trajectory", [one[name] for one in drawn]) for name in DRAWN[params.kernel]},
        },
        {
            "title": f"Gaussian process with kernel {params.kernel} at random points of {place}",
            "source": "random draws (pipeline/gaussian_process.py)",
            "history": "drawn with a Cholesky factor in double precision",
            "geometry": "sphere" if params.kernel == "sphere" else "plane",
        },
        points=params.points,
    )


def draw(params: Params, seed: int) -> dict[str, float]:
    """The kernel parameters of the task with this seed, which are those of its group."""
    rng = np.random.default_rng([_leader(params, seed), 1])
    if params.kernel == "rbf":
        return {"length_scale": float(rng.beta(3, 7))}
    if params.kernel == "sphere":
        return {"length_scale": float(30 / rng.gamma(3))}
    return {name: float(rng.uniform(*RANGES[name])) for name in DRAWN["gneiting"]}


def places(params: Params, seed: int) -> np.ndarray:
    """The points [P,2] of the task with this seed, in single precision as they are stored, before any rotation, in random order."""
    rng = np.random.default_rng([_leader(params, seed), 0])
    share = params.points // len(params.boxes)
    return rng.permutation(np.concatenate([rng.uniform(*box, (share, 2)) for box in params.boxes])).astype(np.float32)


def solve(params: Params, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """signal (B, T, P) and x, y (B, P) of the tasks with these seeds (B,)."""
    times = np.linspace(0, 1, params.frames) if params.frames > 1 else np.zeros(1)
    signal = np.empty((len(seeds), params.frames, params.points), np.float32)
    x, y = np.empty((2, len(seeds), params.points), np.float32)
    leader = None
    for number, seed in enumerate(map(int, seeds)):
        if leader != (leader := _leader(params, seed)):
            process, point = Process(params.kernel, draw(params, seed), params.jitter), places(params, seed).astype(np.float64)
            place = np.column_stack([np.tile(point, (params.frames, 1)), np.repeat(times, params.points)])
            root, mean = process.root(place), process.mean(place)
            turned = rotated(point, params.rotation) if any(params.rotation) else point
        # One product a task, so that its bits do not depend on which tasks are solved with it.
        white = np.random.default_rng([seed, 2]).standard_normal(len(place))
        signal[number] = (mean + root @ white).reshape(params.frames, params.points)
        x[number], y[number] = turned.T
    return {"signal": signal, "x": x, "y": y}


def _leader(params: Params, seed: int) -> int:
    """The seed of the first task of a group; training seeds count up, test seeds down."""
    if seed < TEST_SEED // 2:
        return seed - (seed - params.seed) % params.group
    return seed + (TEST_SEED - params.seed - seed) % params.group
