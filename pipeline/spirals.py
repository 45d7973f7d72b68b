"""Spirals: plane curves that solve a Volterra integral equation of the second kind, one curve a trajectory, at one place.

    y(t) = y(0) + integral from 0 to t of K(t - s) cosh(y(s)) ds,   t in [0, 1],   cosh of each coordinate

    K(r) = STRENGTH * [[-sin(TURN r), -cos(TURN r)], [-cos(TURN r), sin(TURN r)]]

After the description of the toy data of Continuous Spatiotemporal Transformers (arXiv 2301.13338): convolution kernels of trigonometric
functions, F = cosh, random starts, Monte Carlo integration with 1000 samples, 10 iterations. It leaves open the equation's constants, the
kernel's entries and the starts; here they are such that the curves start, turn and spread about as the released ones do.
The samples of a curve are drawn once, in shares of [0, t], and kept for all times and iterations, so a curve is smooth. (The released
curves carry a jitter of about 0.02 from frame to frame.) Between frames a curve is taken as linear.

Shapes: B curves, T frames.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import xarray as xr
from pydantic import Field

from pipeline import trajectories
from pipeline.trajectories import Trajectories

VARIABLES = ("curve_x", "curve_y")
STRENGTH, TURN = 1.2, 8.0
START = ((0.0, 2.0), (-2.0, 0.0))  # y(0) is uniform in this box


class Params(Trajectories):
    """One set of curves."""

    equation: Literal["spirals"]
    frames: int = Field(default=100, ge=2)  # evenly spaced in [0, 1]
    samples: int = Field(default=1000, ge=1)  # of the Monte Carlo integration
    iterations: int = Field(default=10, ge=1)


def coordinates(params: Params) -> xr.Dataset:
    """The data set without its values; its grid is the one place."""
    return trajectories.described(
        params,
        {"time": np.linspace(0, 1, params.frames), "y": np.zeros(1), "x": np.zeros(1)},
        {
            "title": "Spirals of a nonlinear integral equation",
            "source": "iterated Monte Carlo integration (pipeline/spirals.py)",
            "history": f"simulated with {params.iterations} iterations of {params.samples} samples",
            "geometry": "plane",
        },
    )


def solve(params: Params, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """Coordinates (B, T, 1, 1) float32 of the curves with these seeds (B,), each independent of the others."""
    curves = np.stack([curve(int(seed), params.frames, params.samples, params.iterations) for seed in seeds]).astype(np.float32)
    return {name: curves[:, :, i, None, None] for i, name in enumerate(VARIABLES)}


def curve(seed: int, frames: int, samples: int, iterations: int) -> np.ndarray:
    """One curve (T, 2) in float64."""
    rng = np.random.default_rng(seed)
    start = np.array([rng.uniform(low, high) for low, high in START])
    even, odd = quadrature(rng.uniform(0, 1, samples), frames)
    y = np.tile(start, (frames, 1))
    for _ in range(iterations):
        f = np.cosh(y)
        y = start + np.stack([-odd @ f[:, 0] - even @ f[:, 1], odd @ f[:, 1] - even @ f[:, 0]], axis=1)
    if not np.abs(y).max() < 10:
        raise ValueError(f"the spiral of seed {seed} blew up with {samples} samples an integral: take more samples")
    return y


def quadrature(share: np.ndarray, frames: int) -> tuple[np.ndarray, np.ndarray]:
    """Matrices (T, T): applied to values f at the frames they give the integrals from 0 to each frame's t of
    STRENGTH cos(TURN (t - s)) f(s) and of STRENGTH sin(TURN (t - s)) f(s), as means over s = share * t [samples], f linear between frames.
    """
    t = np.linspace(0, 1, frames)[:, None]
    s = t * share
    left = np.minimum((s * (frames - 1)).astype(int), frames - 2)
    right_weight = s * (frames - 1) - left
    row = np.arange(frames)[:, None] * frames
    matrices = []
    for wave in (np.cos, np.sin):
        weight = STRENGTH * wave(TURN * (t - s)) * t / len(share)
        both = np.concatenate([weight * (1 - right_weight), weight * right_weight])
        cell = np.concatenate([row + left, row + left + 1])
        matrices.append(np.bincount(cell.ravel(), both.ravel(), minlength=frames * frames).reshape(frames, frames))
    return matrices[0], matrices[1]
