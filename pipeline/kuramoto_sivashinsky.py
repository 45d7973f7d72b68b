"""The Kuramoto-Sivashinsky equation on a ring of length L, pseudo-spectral, many trajectories at once.

    u_t + u u_x + u_xx + u_xxxx = 0

Time stepping is ETDRK4 with contour integrals (Kassam and Trefethen 2005, doi 10.1137/S1064827502410633), with the 2/3 rule on the product.
It starts from ten random sine waves; what comes before chaos has set in, some tens of units of time, `burn_in` leaves out. Positions are
x / L, on [0, 1).

Shapes: B trajectories, T frames, N grid points.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

import numpy as np
import xarray as xr
from pydantic import Field
from scipy import fft

from pipeline import trajectories
from pipeline.trajectories import Stepped

VARIABLES = ("velocity",)
WAVES, LONGEST = 10, 3  # number of waves at the start, and the most periods of one on the ring
ROOTS = 32  # points on the contour


class Params(Stepped):
    """One set of trajectories. Times are in model units."""

    equation: Literal["kuramoto_sivashinsky"]
    length: float = Field(gt=0)  # of the ring
    grid: int = Field(ge=8, multiple_of=2)


def coordinates(params: Params) -> xr.Dataset:
    """The data set without its values."""
    return trajectories.described(
        params,
        {"time": params.interval * np.arange(params.frames), "x": np.arange(params.grid) / params.grid},
        {
            "title": f"Kuramoto-Sivashinsky equation on a ring of length {params.length:g}",
            "source": "pseudo-spectral simulation (pipeline/kuramoto_sivashinsky.py)",
            "history": "simulated with ETDRK4",
            "geometry": "torus",
        },
    )


def solve(params: Params, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """velocity (B, T, N) float32 of the trajectories with these seeds (B,), each independent of the others."""
    start = np.stack([waves(int(seed), params.grid) for seed in seeds])
    return {"velocity": frames(start, params.length, params.dt, *params.steps, params.frames).astype(np.float32)}


def waves(seed: int, grid: int) -> np.ndarray:
    """The start (N,): a sum of sines with random amplitude in (-0.5, 0.5), number of periods and phase."""
    rng = np.random.default_rng(seed)
    amplitude, phase = rng.uniform(-0.5, 0.5, WAVES), rng.uniform(0, 2 * np.pi, WAVES)
    periods = rng.integers(1, LONGEST + 1, WAVES)
    return (amplitude * np.sin(2 * np.pi * np.arange(grid)[:, None] / grid * periods + phase)).sum(axis=1)


def frames(start: np.ndarray, length: float, dt: float, burn_in: int, interval: int, count: int) -> np.ndarray:
    """Step fields (B, N) forward in float64 and record `count` frames (B, count, N), the first after `burn_in` steps, the others
    `interval` steps apart."""
    grid = start.shape[-1]
    full, half, q, first, middle, last = _factors(grid, length, dt)
    slope = _slope(grid, length)
    spectrum = fft.rfft(np.asarray(start, np.float64))
    out = np.empty((len(start), count, grid))

    def advected(v: np.ndarray) -> np.ndarray:
        return slope * fft.rfft(fft.irfft(v, n=grid) ** 2)

    for number in range(count):
        for _ in range(interval if number else burn_in):
            n_v = advected(spectrum)
            a = half * spectrum + q * n_v
            n_a = advected(a)
            b = half * spectrum + q * n_a
            n_b = advected(b)
            c = half * a + q * (2 * n_b - n_v)
            spectrum = full * spectrum + first * n_v + middle * (n_a + n_b) + last * advected(c)
        out[:, number] = fft.irfft(spectrum, n=grid)
    if not np.isfinite(out).all():
        raise ValueError(f"the solution blew up: dt = {dt} is too long for length {length} on {grid} points; take a shorter one")
    return out


@cache
def _slope(grid: int, length: float) -> np.ndarray:
    """-i k / 2 on the half spectrum, without the upper third and so without the mode that has no derivative."""
    mode = np.arange(grid // 2 + 1)
    return -0.5j * (2 * np.pi / length) * mode * (mode < grid / 3)


@cache
def _factors(grid: int, length: float, dt: float) -> tuple[np.ndarray, ...]:
    """exp(L dt), exp(L dt / 2) and the four weights of ETDRK4, as means over a circle around each L dt."""
    k = 2 * np.pi / length * np.arange(grid // 2 + 1)
    linear = dt * (k**2 - k**4)
    z = linear[:, None] + np.exp(1j * np.pi * (np.arange(1, ROOTS + 1) - 0.5) / ROOTS)
    e = np.exp(z)
    weights = (
        (np.exp(z / 2) - 1) / z,
        (-4 - z + e * (4 - 3 * z + z**2)) / z**3,
        2 * (2 + z + e * (z - 2)) / z**3,
        (-4 - 3 * z - z**2 + e * (4 - z)) / z**3,
    )
    return (np.exp(linear), np.exp(linear / 2), *(dt * weight.mean(axis=1).real for weight in weights))
