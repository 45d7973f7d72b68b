"""The forced Burgers equation on a ring of length 16, finite volumes, many trajectories at once.

    u_t + (u^2 / 2)_x = nu u_xx + F      F(t, x) = sum of 5 waves A sin(w t + 2 pi l x / 16 + phi),   u(0, x) = F(0, x)

A in (-0.5, 0.5), w in (-0.4, 0.4), phi in (0, 2 pi), l in {1, 2}: experiment E1 of message-passing neural solvers (arXiv 2202.03376), which
has nu = 0 and forms shocks. Space: WENO5 (Jiang and Shu 1996, doi 10.1006/jcph.1996.0130) with the flux of Godunov; time: the third-order
Runge-Kutta method of Shu and Osher, with steps that each trajectory chooses for itself. Values are means over cells. Positions are x / 16.

Shapes: B trajectories, T frames, N cells.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import xarray as xr
from pydantic import Field, model_validator

from pipeline import trajectories
from pipeline.trajectories import Trajectories

VARIABLES = ("velocity",)
LENGTH = 16.0
WAVES = 5
COURANT = 0.4  # cells the fastest wave crosses in a step
DIFFUSION = 0.4  # nu dt / dx^2 of a step
_TINY = 1e-6  # of WENO5


class Params(Trajectories):
    """One set of trajectories. Times are in model units."""

    equation: Literal["burgers"]
    viscosity: float = Field(default=0.0, ge=0)
    grid: int = Field(ge=8)  # cells
    mean: int = Field(default=1, ge=1)  # each value kept is the mean of so many cells ...
    every: int = Field(default=1, ge=1)  # ... and every so many-th is kept
    frames: int = Field(ge=2)
    end: float = Field(gt=0)  # time of the last frame, the first is at 0

    @model_validator(mode="after")
    def _consistent(self) -> Params:
        if self.grid % self.every or self.mean % 2 == 0:
            raise ValueError(f"grid must be a multiple of every, and mean be odd: found {self.grid}, {self.every}, {self.mean}")
        return self


def coordinates(params: Params) -> xr.Dataset:
    """The data set without its values; positions are centres of cells."""
    return trajectories.described(
        params,
        {"time": np.linspace(0, params.end, params.frames), "x": ((np.arange(params.grid) + 0.5) / params.grid)[:: params.every]},
        {
            "title": f"Forced Burgers equation on a ring, viscosity {params.viscosity:g}",
            "source": "finite-volume simulation (pipeline/burgers.py)",
            "history": "simulated with WENO5, Godunov's flux and a third-order Runge-Kutta method",
            "geometry": "torus",
        },
    )


def solve(params: Params, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """velocity (B, T, N) float32 of the trajectories with these seeds (B,), each independent of the others."""
    force = _Force(seeds, params.grid)
    found = frames(force(np.zeros(len(seeds))), np.linspace(0, params.end, params.frames), params.viscosity, force)
    shifts = range(-(params.mean // 2), params.mean // 2 + 1)
    smooth = np.stack([np.roll(found, shift, axis=-1)[..., :: params.every] for shift in shifts]).mean(axis=0)
    return {"velocity": smooth.astype(np.float32)}


class _Force:
    """F of the trajectories with these seeds, as means over cells."""

    def __init__(self, seeds: np.ndarray, grid: int) -> None:
        draws = [np.random.default_rng(int(seed)) for seed in seeds]
        self.amplitude, self.speed, self.phase = (
            np.array([rng.uniform(low, high, WAVES) for rng in draws]) for low, high in ((-0.5, 0.5), (-0.4, 0.4), (0, 2 * np.pi))
        )
        periods = np.array([rng.integers(1, 3, WAVES) for rng in draws])
        angle = 2 * np.pi * periods[:, :, None] * (np.arange(grid) + 0.5) / grid
        shrunk = self.amplitude * np.sinc(periods / grid)  # the mean of a sine over a cell
        self._sine, self._cosine = shrunk[:, :, None] * np.sin(angle), shrunk[:, :, None] * np.cos(angle)

    def __call__(self, time: np.ndarray) -> np.ndarray:
        """F (B, N) at times (B,)."""
        turn = self.speed * time[:, None] + self.phase
        return (self._sine * np.cos(turn)[:, :, None] + self._cosine * np.sin(turn)[:, :, None]).sum(axis=1)


def frames(
    start: np.ndarray, times: np.ndarray, viscosity: float = 0.0, force: Callable[[np.ndarray], np.ndarray] | None = None
) -> np.ndarray:
    """Step means over cells (B, N) in float64 from times[0] on and record frames (B, T, N) at `times` (T,). `force` maps times (B,) to
    means over cells (B, N)."""
    u, width = np.array(start, np.float64), LENGTH / start.shape[-1]
    out = np.empty((len(u), len(times), u.shape[-1]))
    out[:, 0] = u
    now = np.full(len(u), float(times[0]))

    def rate(u: np.ndarray, time: np.ndarray) -> np.ndarray:
        change = -_difference(u) / width
        if viscosity:
            change += viscosity / width**2 * (np.roll(u, -1, -1) - 2 * u + np.roll(u, 1, -1))
        return change if force is None else change + force(time)

    for number, end in enumerate(times[1:], 1):
        while (now < end).any():
            fastest = np.maximum(np.abs(u).max(axis=-1), 1e-12)
            most = COURANT * width / fastest
            if viscosity:
                most = np.minimum(most, DIFFUSION * width**2 / viscosity)
            left = end - now
            step = left / np.ceil(np.maximum(left / most, 1e-9))  # whole steps to the next frame; none where it is reached
            dt = step[:, None]
            one = u + dt * rate(u, now)
            two = 0.75 * u + 0.25 * (one + dt * rate(one, now + step))
            u = (u + 2 * (two + dt * rate(two, now + step / 2))) / 3
            now = np.where(left <= most, end, now + step)
        out[:, number] = u
    return out


def _difference(u: np.ndarray) -> np.ndarray:
    """Godunov's flux of u^2 / 2 out of each cell at its right side, less what comes in at its left."""
    left, right = _reconstructed(u), _reconstructed(u[..., ::-1])[..., ::-1]
    # `left` is u just left of the right side of cell i, `right` is u just right of the left side of cell i.
    right = np.roll(right, -1, axis=-1)
    flux = np.maximum(np.maximum(left, 0.0) ** 2, np.minimum(right, 0.0) ** 2) / 2
    return flux - np.roll(flux, 1, axis=-1)


def _reconstructed(u: np.ndarray) -> np.ndarray:
    """WENO5 values at the right side of each cell, from the cell and its two neighbours to each side."""
    a, b, c, d, e = (np.roll(u, shift, axis=-1) for shift in (2, 1, 0, -1, -2))
    values = ((2 * a - 7 * b + 11 * c) / 6, (-b + 5 * c + 2 * d) / 6, (2 * c + 5 * d - e) / 6)
    rough = (
        13 / 12 * (a - 2 * b + c) ** 2 + (a - 4 * b + 3 * c) ** 2 / 4,
        13 / 12 * (b - 2 * c + d) ** 2 + (b - d) ** 2 / 4,
        13 / 12 * (c - 2 * d + e) ** 2 + (3 * c - 4 * d + e) ** 2 / 4,
    )
    weights = [share / (_TINY + r) ** 2 for share, r in zip((0.1, 0.6, 0.3), rough, strict=True)]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights)
