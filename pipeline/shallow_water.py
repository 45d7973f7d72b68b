"""Barotropic instability of two mirrored jets in shallow water on the rotating Earth, pseudo-spectral in spherical harmonics.

    w_t = -div((w + f) v)     d_t = k . curl((w + f) v) - lap(v^2 / 2 + g h)     h_t = -div(h v)       each with -K lap^2

w vorticity, d divergence, f = 2 Omega sin(latitude), h depth of mean H = 10 km. The start is that of Galewsky, Scott and Polvani 2004
(doi 10.1111/j.1600-0870.2004.00071.x) on both hemispheres, as in the shallow water set of DINo (arXiv 2209.14855, doi
10.6084/m9.figshare.21298179), which AROMA and DSQ use: a jet of 60 to 80 m/s in balance, and a bump of 120 m in its depth. A trajectory
draws the speed of its jets and the longitude of the bump; the published set draws the speed alone. This is a declared substitute for
that set, made from its description.

Transforms are products with associated Legendre functions at Gaussian latitudes and FFTs along circles of latitude; time steps are
Runge-Kutta 4 with an exact factor for the damping, which is matched at degree 32 (Galewsky: 1e5 m2/s). Why no library: ducc0 is under the
GPL, shtns and dedalus want FFTW and a compiler, dinosaur wants JAX, torch's bytes depend on threads. One trajectory is stepped at a time,
and its matrices are too small for BLAS to share between threads: the bytes depend on the seed alone.

Values as that set is used: (h - H) in Earth radii x 3000, vorticity per hour x 2. Time in hours, as plain numbers. y is latitude, x is
longitude, in degrees.

Shapes: B trajectories, T frames, J latitudes, I = 2 J longitudes, M + 1 orders and degrees.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import xarray as xr
from pydantic import Field
from scipy import fft

from pipeline import trajectories
from pipeline.trajectories import Stepped

VARIABLES = ("height", "vorticity")
RADIUS, OMEGA, GRAVITY, DEPTH = 6.37122e6, 7.292e-5, 9.80616, 1.0e4  # SI
HOUR = 3600.0
UNITS = {"height": 3000 / RADIUS, "vorticity": 2 * HOUR}  # what SI values are multiplied by
JET = (np.pi / 7, np.pi / 2 - np.pi / 7)  # latitudes between which it blows
SPEEDS = (60.0, 80.0)
BUMP = {"height": 120.0, "latitude": np.pi / 4, "width": 1 / 3, "breadth": 1 / 15}


class Params(Stepped):
    """One set of trajectories. Times are in hours."""

    equation: Literal["shallow_water"]
    grid: int = Field(ge=8, multiple_of=2)  # latitudes of the solver, with twice as many longitudes; (2 grid - 1) / 3 degrees are resolved
    every: int = Field(default=1, ge=1)  # every so many-th grid point an axis is kept
    diffusion: float = Field(ge=0)  # m2/s at degree 32


def coordinates(params: Params) -> xr.Dataset:
    """The data set without its values."""
    latitude = np.degrees(np.arcsin(_nodes(params.grid)[0]))
    longitude = np.arange(2 * params.grid) * 180 / params.grid
    return trajectories.described(
        params,
        {
            "time": params.interval * np.arange(params.frames),
            "y": latitude[:: params.every],
            "x": longitude[:: params.every],
            "speed": ("trajectory", [drawn(int(seed))[0] for seed in trajectories.seeds(params)]),
        },
        {
            "title": "Barotropic instability of two jets in shallow water on a sphere",
            "source": "pseudo-spectral simulation (pipeline/shallow_water.py), a substitute for doi 10.6084/m9.figshare.21298179",
            "history": "simulated with spherical harmonics and a fourth-order Runge-Kutta method",
            "geometry": "sphere",
        },
    )


def drawn(seed: int) -> tuple[float, float]:
    """Speed of the jets in m/s, and longitude of the bump in radians, of the trajectory with this seed."""
    rng = np.random.default_rng(seed)
    return float(rng.uniform(*SPEEDS)), float(rng.uniform(0, 2 * np.pi))


def solve(params: Params, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """height and vorticity (B, T, J, I) float32 of the trajectories with these seeds (B,), each independent of the others."""
    sphere = Sphere(params.grid)
    found = []
    for seed in map(int, seeds):
        state = sphere.jets(*drawn(seed))
        frames = sphere.frames(state, params.dt * HOUR, *params.steps, params.frames, params.diffusion)
        found.append(frames[:, :, :: params.every, :: params.every])
    fields = np.stack(found)
    return {
        "height": ((fields[:, :, 1] - DEPTH) * UNITS["height"]).astype(np.float32),
        "vorticity": (fields[:, :, 0] * UNITS["vorticity"]).astype(np.float32),
    }


@dataclass(frozen=True)
class Sphere:
    """Shallow water on a sphere with J = `grid` Gaussian latitudes. A state is the spectra [3, M+1, M+1] (order, degree) of vorticity,
    divergence and depth, in SI units."""

    grid: int
    omega: float = OMEGA

    @property
    def degrees(self) -> int:
        return (2 * self.grid - 1) // 3

    def spectrum(self, values: np.ndarray) -> np.ndarray:
        """[...,J,I] on the grid -> [...,M+1,M+1]."""
        _, weight = _nodes(self.grid)
        legendre, _ = _legendre(self.grid)
        return np.einsum("mjl,...jm->...ml", legendre * weight[:, None], self._orders(values))

    def values(self, spectrum: np.ndarray) -> np.ndarray:
        """[...,M+1,M+1] -> [...,J,I]."""
        legendre, _ = _legendre(self.grid)
        return self._circles(np.einsum("mjl,...ml->...jm", legendre, spectrum))

    def wind(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Eastward and northward wind [J,I] times the cosine of latitude."""
        eastward, northward = self._synthesis(state)[2:]
        return eastward, northward

    def laplacian(self) -> np.ndarray:
        """What the Laplacian multiplies each degree with [M+1]."""
        degree = np.arange(self.degrees + 1)
        return -degree * (degree + 1) / RADIUS**2

    def jets(self, speed: float, longitude: float) -> np.ndarray:
        """The state at the start: jets of this speed in balance with the depth, and a bump of the depth at this longitude."""
        sine, _ = _nodes(self.grid)
        latitude = np.arcsin(sine)
        inside = (abs(latitude) > JET[0]) & (abs(latitude) < JET[1])
        shape = np.where(inside, (abs(latitude) - JET[0]) * (abs(latitude) - JET[1]), -1)
        zonal = np.where(inside, speed * np.exp(1 / shape) / np.exp(-4 / (JET[1] - JET[0]) ** 2), 0)
        state = self.zonal(zonal)
        away = np.angle(np.exp(1j * (2 * np.pi * np.arange(2 * self.grid) / (2 * self.grid) - longitude)))
        across = sum(np.exp(-(((side * BUMP["latitude"] - latitude) / BUMP["breadth"]) ** 2)) for side in (-1, 1))
        state[2] += self.spectrum(BUMP["height"] * np.outer(np.cos(latitude) * across, np.exp(-((away / BUMP["width"]) ** 2))))
        return state

    def zonal(self, wind: np.ndarray) -> np.ndarray:
        """The state of a zonal wind [J] in m/s without divergence, and the depth of mean H that keeps it so."""
        sine, weight = _nodes(self.grid)
        _, slope = _legendre(self.grid)
        state = np.zeros((3, self.degrees + 1, self.degrees + 1), complex)
        # vorticity is -d(u cos) / (a d sine): integrated by parts, as there is no wind at the poles
        state[0, 0] = (weight * wind / np.sqrt(1 - sine**2)) @ slope[0] / RADIUS
        state[2, 0, 0] = np.sqrt(2) * DEPTH
        tendency = self._tendency(state)[1]  # of the divergence, with a flat surface
        laplacian = self.laplacian()
        state[2, 0, 1:] += (tendency[0, 1:] / (GRAVITY * laplacian[1:])).real
        return state

    def frames(self, state: np.ndarray, dt: float, burn_in: int, interval: int, count: int, diffusion: float) -> np.ndarray:
        """Step a state forward and record `count` frames [count,2,J,I] of vorticity and depth, the first after `burn_in` steps of `dt`
        seconds, the others `interval` steps apart. A flow that blows up is an error: `dt` is too long."""
        degree = np.arange(self.degrees + 1)
        # Solid rotation, which has degree 1, is not damped.
        rate = diffusion / 32**2 / RADIUS**2 * np.maximum((degree * (degree + 1.0)) ** 2 - 4, 0)
        half = np.exp(-rate * dt / 2)
        out = np.empty((count, 2, self.grid, 2 * self.grid))
        for number in range(count):
            for _ in range(interval if number else burn_in):
                first = self._tendency(state)
                second = self._tendency(half * (state + dt / 2 * first))
                third = self._tendency(half * state + dt / 2 * second)
                damped = half * (half * state + dt * third)
                state = half * (half * (state + dt / 6 * first) + dt / 3 * (second + third)) + dt / 6 * self._tendency(damped)
            out[number] = self.values(state[[0, 2]])
            if not np.isfinite(out[number]).all():
                raise ValueError(f"the flow blew up: dt = {dt:g} s is too long for {self.grid} latitudes; take a shorter one")
        return out

    def _tendency(self, state: np.ndarray) -> np.ndarray:
        vorticity, depth, u, v = self._synthesis(state)
        sine, _ = _nodes(self.grid)
        absolute = vorticity + 2 * self.omega * sine[:, None]
        products = np.stack([absolute * u, absolute * v, depth * u, depth * v, (u**2 + v**2) / 2])
        orders = np.moveaxis(self._orders(products), -1, 0)  # [M+1,5,J]
        plain, slope = (_real(part) for part in np.split(_product(_analysis(self.grid), _real_columns(orders)), 2, axis=1))
        turned = 1j * np.arange(self.degrees + 1)[:, None] / RADIUS
        a, b, c, _, energy = np.moveaxis(plain, -1, 0)
        a_slope, b_slope, _, d_slope = np.moveaxis(slope[..., :4], -1, 0) / RADIUS
        return np.stack(
            [
                b_slope - turned * a,
                a_slope + turned * b - self.laplacian() * (energy + GRAVITY * state[2]),
                d_slope - turned * c,
            ]
        )

    def _synthesis(self, state: np.ndarray) -> np.ndarray:
        """Vorticity, depth, and the wind times the cosine of latitude [4,J,I]."""
        laplacian = self.laplacian()
        inverse = np.divide(1, laplacian, out=np.zeros_like(laplacian), where=laplacian != 0)
        stream, potential = inverse * state[0], inverse * state[1]
        turned = 1j * np.arange(self.degrees + 1)[:, None] / RADIUS
        plain, slope = _legendre(self.grid)
        straight = _real(_product(plain, _real_columns(np.stack([state[0], state[2], turned * potential, turned * stream], axis=1))))
        bent = _real(_product(slope, _real_columns(np.stack([-stream, potential], axis=1) / RADIUS)))
        straight[..., 2:] += bent
        return self._circles(np.moveaxis(straight, -1, 0).swapaxes(1, 2))

    def _orders(self, values: np.ndarray) -> np.ndarray:
        """[...,J,I] -> Fourier coefficients along circles of latitude [...,J,M+1]."""
        return fft.rfft(values, norm="forward")[..., : self.degrees + 1]

    def _circles(self, orders: np.ndarray) -> np.ndarray:
        """[...,J,M+1] -> [...,J,I]."""
        return fft.irfft(orders, n=2 * self.grid, norm="forward")


def _real_columns(values: np.ndarray) -> np.ndarray:
    """Complex [m,k,n] -> real [m,n,2k]."""
    return np.concatenate([values.real, values.imag], axis=1).swapaxes(1, 2)


def _real(columns: np.ndarray) -> np.ndarray:
    """Real [m,n,2k] -> complex [m,n,k]."""
    half = columns.shape[-1] // 2
    return columns[..., :half] + 1j * columns[..., half:]


def _product(matrices: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """[m,a,b] times [m,b,k], one small product an order."""
    return np.matmul(matrices, np.ascontiguousarray(columns))


@cache
def _nodes(grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Sines of the Gaussian latitudes, from south to north, and their weights [J], which sum to 2."""
    return np.polynomial.legendre.leggauss(grid)


@cache
def _legendre(grid: int) -> tuple[np.ndarray, np.ndarray]:
    """Associated Legendre functions [M+1,J,M+1] (order, latitude, degree), their squares integrating to 1 over the sine of latitude, and
    (1 - sine^2) times their slopes."""
    last = (2 * grid - 1) // 3
    sine, _ = _nodes(grid)
    found = np.zeros((last + 1, grid, last + 2))  # one degree more, for the slopes
    sector = np.full(grid, np.sqrt(0.5))
    for order in range(last + 1):
        if order:
            sector = sector * np.sqrt((2 * order + 1) / (2 * order)) * np.sqrt(1 - sine**2)
        found[order, :, order] = sector
        for degree in range(order + 1, last + 2):
            below = found[order, :, degree - 2] if degree > order + 1 else 0.0
            found[order, :, degree] = (sine * found[order, :, degree - 1] - _step(degree - 1, order) * below) / _step(degree, order)
    orders, degrees = np.meshgrid(np.arange(last + 1), np.arange(last + 1), indexing="ij")
    up, down = _step(degrees + 1, orders), _step(degrees, orders)
    lower = np.concatenate([np.zeros_like(found[..., :1]), found[..., :last]], axis=-1)
    slope = ((degrees + 1) * down)[:, None] * lower - (degrees * up)[:, None] * found[..., 1:]
    return found[..., :-1].copy(), np.where((degrees >= orders)[:, None], slope, 0.0)


def _step(degree: np.ndarray | int, order: np.ndarray | int) -> np.ndarray:
    """sqrt((n^2 - m^2) / (4 n^2 - 1)), 0 where the degree n is below the order m."""
    return np.sqrt(np.maximum(np.square(degree) - np.square(order), 0) / (4.0 * np.square(degree) - 1))


@cache
def _analysis(grid: int) -> np.ndarray:
    """Weights [M+1,2(M+1),J] that give the spectra of X / cos^2, and of X times a slope over cos^2, from X on the grid."""
    sine, weight = _nodes(grid)
    both = np.concatenate(_legendre(grid), axis=-1) * (weight / (1 - sine**2))[:, None]
    return np.ascontiguousarray(both.swapaxes(1, 2))
