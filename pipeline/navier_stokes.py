"""Two-dimensional incompressible flow on the unit torus in vorticity form, pseudo-spectral, many trajectories at once.

    w_t + u . grad w = nu lap w + f      u = (psi_y, -psi_x)      -lap psi = w      f = 0.1 (sin 2 pi (x + y) + cos 2 pi (x + y))

The recipe is that of the DINo data set (github.com/mkirchmeyer/DINo): advection in physical space at the old time with the 2/3 rule on
the product, explicit Euler for advection and force, Crank-Nicolson for diffusion, a Gaussian random field (alpha 2.5, tau 7) as start.
What differs: the random coefficients are drawn in shells of growing wavenumber, so a seed gives the same flow at every resolution, and
the Nyquist modes, which have no derivative, are zero.

SciPy's FFT and not a solver library: the nearest one found, torch-cfd, steps with Runge-Kutta and Crank-Nicolson, not as the recipe does.
It gives the same bytes for any batch and thread count, which torch's does not, at the same speed.

Shapes: B trajectories, T frames, N grid points an axis; arrays are (..., y, x).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import xarray as xr
from pydantic import Field
from scipy import fft

from pipeline import trajectories
from pipeline.trajectories import Stepped

ALPHA, TAU = 2.5, 7.0
FORCE = 0.1
VARIABLES = ("vorticity",)


class Params(Stepped):
    """One simulated data set. Times are in model units."""

    equation: Literal["navier_stokes"]
    viscosity: float = Field(gt=0)
    grid: int = Field(ge=8, multiple_of=2)  # points an axis


def coordinates(params: Params) -> xr.Dataset:
    """The data set without its values: coordinates (trajectory, time, y, x), the role of each trajectory, and what describes it."""
    axis = np.arange(params.grid) / params.grid
    return trajectories.described(
        params,
        {"time": params.interval * np.arange(params.frames), "y": axis, "x": axis},
        {
            "title": f"Forced 2-D Navier-Stokes vorticity on the unit torus, viscosity {params.viscosity:g}",
            "source": "pseudo-spectral simulation (pipeline/navier_stokes.py)",
            "history": "simulated with Crank-Nicolson diffusion and explicit Euler advection",
            "geometry": "torus",
        },
    )


def solve(params: Params, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """Vorticity (B, T, N, N) float32 of the trajectories with these seeds (B,), each independent of the others."""
    start = np.stack([random_field(int(seed), params.grid) for seed in seeds]).astype(np.float32)
    return {"vorticity": frames(start, params.viscosity, params.dt, *params.steps, params.frames)}


def frames(start: np.ndarray, viscosity: float, dt: float, burn_in: int, interval: int, count: int, force: float = FORCE) -> np.ndarray:
    """Step fields (B, N, N) forward and record `count` frames (B, count, N, N) in the same precision.

    The first frame comes after `burn_in` steps, the others `interval` steps apart. A flow that blows up is an error: `dt` is too long.
    """
    operators = _operators(start.shape[-1], viscosity, dt, force, start.dtype.name)
    out = np.empty((len(start), count, *start.shape[1:]), start.dtype)
    spectrum = fft.rfft2(start)
    for i in range(count):
        spectrum = _advance(spectrum, operators, interval if i else burn_in)
        out[:, i] = fft.irfft2(spectrum, s=start.shape[1:])
    if not np.isfinite(out).all():
        raise ValueError(
            f"the flow blew up: dt = {dt} is too long for viscosity {viscosity} on {start.shape[-1]} points; take a shorter one"
        )
    return out


def random_field(seed: int, grid: int) -> np.ndarray:
    """The starting field (N, N), float64, of mean zero: the same function of (x, y) for a seed whatever the resolution."""
    rng = np.random.default_rng(seed)
    row, column, amplitude = _shells(grid)
    draws = rng.standard_normal((len(amplitude), 2))
    spectrum = np.zeros((grid, grid), complex)
    spectrum[row, column] = amplitude * (draws[:, 0] + 1j * draws[:, 1]) / np.sqrt(2)
    return fft.ifft2(spectrum, norm="forward").real


@cache
def _shells(grid: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Modes below Nyquist in shells max(|kx|, |ky|) = 1, 2, ...: their row, column and amplitude."""
    k = np.arange(1 - grid // 2, grid // 2)
    ky, kx = (axis.ravel() for axis in np.meshgrid(k, k, indexing="ij"))
    order = np.lexsort((kx, ky, np.maximum(abs(kx), abs(ky))))[1:]  # without the mean
    ky, kx = ky[order], kx[order]
    amplitude = np.sqrt(2) * TAU ** (ALPHA - 1) * (4 * np.pi**2 * (kx**2 + ky**2) + TAU**2) ** (-ALPHA / 2)
    return ky % grid, kx % grid, amplitude


@dataclass(frozen=True)
class _Operators:
    """Factors on the half spectrum (N, N / 2 + 1): w' = keep w + advect F[u . grad w] + push, and `derive` gives u, v, w_x, w_y."""

    derive: np.ndarray
    keep: np.ndarray
    advect: np.ndarray
    push: np.ndarray


@cache
def _operators(grid: int, viscosity: float, dt: float, force: float, precision: str) -> _Operators:
    ky, kx = fft.fftfreq(grid, 1 / grid)[:, None], fft.rfftfreq(grid, 1 / grid)[None]
    square = 4 * np.pi**2 * (kx**2 + ky**2)
    inverse = np.divide(1, square, out=np.zeros_like(square), where=square > 0)
    axis = np.arange(grid) / grid
    phase = 2 * np.pi * (axis + axis[:, None])
    resolved = (abs(kx) <= grid / 3) & (abs(ky) <= grid / 3)  # the 2/3 rule
    denominator = 1 + dt * viscosity * square / 2
    slope = 2j * np.pi * np.stack(np.broadcast_arrays(ky * inverse, -kx * inverse, kx, ky))
    real, complex_ = np.dtype(precision), np.result_type(precision, np.complex64)
    return _Operators(
        derive=slope[:, None].astype(complex_),
        keep=((2 - denominator) / denominator).astype(real),
        advect=(-dt * resolved / denominator).astype(real),
        push=(dt * fft.rfft2(force * (np.sin(phase) + np.cos(phase))) / denominator).astype(complex_),
    )


def _advance(spectrum: np.ndarray, o: _Operators, steps: int) -> np.ndarray:
    """`steps` time steps of half spectra (B, N, N / 2 + 1)."""
    shape = (spectrum.shape[-2], spectrum.shape[-2])
    derived: Any = np.empty((4, *spectrum.shape), spectrum.dtype)
    for _ in range(steps):
        np.multiply(o.derive, spectrum, out=derived)
        u, v, w_x, w_y = fft.irfft2(derived, s=shape)
        u *= w_x
        v *= w_y
        u += v
        spectrum = o.keep * spectrum + o.advect * fft.rfft2(u)
        spectrum += o.push
    return spectrum
