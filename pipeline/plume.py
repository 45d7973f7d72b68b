"""A hot plume in a closed room, the stand-in of a fire: buoyant flow in three dimensions on a staggered grid, many rooms at once.

    u_t + div(u u) = -grad p + T e_z + nu lap u      div u = 0      T_t + div(u T) = kappa lap T + S

T is the temperature above that of the room at first, in units in which it is its own buoyancy (Boussinesq); the floor is a unit square and
the room `height` high. Walls let no heat through and do not brake (free slip). The source S is a Gaussian of radius 0.1 above the floor
whose power pulses; a trajectory draws its place in the central half of the floor, its power, frequency and phase, and a whirl of the air.
DSQ's fire data are not public: this is a declared substitute (advection and diffusion of heat from a pulsing source).

Space: finite volumes on a MAC grid (Harlow and Welch 1965), central fluxes of momentum, van Leer's limited fluxes of heat, which keep it
from falling below zero. Pressure: cosine transforms, which solve the discrete equation exactly, so that what flows into a cell flows out.
Time: the third-order Runge-Kutta method of Shu and Osher. Sums and transforms go room by room: the bytes depend on the seed alone.

Shapes: B trajectories, T frames; cells (Z, Y, X); velocities on faces have one more along their own axis, the walls' included, which
are zero. Axis 0 of a list of velocities is x.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import xarray as xr
from pydantic import Field, model_validator
from scipy import fft

from pipeline import trajectories
from pipeline.trajectories import Stepped

VARIABLES = ("temperature_excess", "vertical_velocity")
RADIUS, LIFT = 0.1, 0.1  # of the source, and height of its middle
POWER, PULSE, FREQUENCY = (0.02, 0.04), 0.6, (0.25, 0.75)  # heat per unit of time, share of it that pulses, pulses per unit of time
WHIRL = 0.1  # of the air at the start: largest speed about one axis, on a square
AXES = (-1, -2, -3)  # of x, y, z

Velocity = list[np.ndarray]


class Params(Stepped):
    """One set of trajectories. Lengths in widths of the room."""

    equation: Literal["plume"]
    grid: int = Field(ge=8)  # cells of the width
    height: float = Field(default=1.5, gt=0)
    viscosity: float = Field(gt=0)  # of the air, and its conductivity

    @model_validator(mode="after")
    def _whole_cells(self) -> Params:
        if abs(self.height * self.grid % 1) > 1e-9:
            raise ValueError(f"height must be a whole number of cells of 1 / {self.grid}, found {self.height * self.grid:g} cells")
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        return round(self.height * self.grid), self.grid, self.grid


def coordinates(params: Params) -> xr.Dataset:
    """The data set without its values; positions are centres of cells."""
    return trajectories.described(
        params,
        {
            "time": params.interval * np.arange(params.frames),
            **{name: (np.arange(size) + 0.5) / params.grid for name, size in zip(("z", "y", "x"), params.shape, strict=True)},
        },
        {
            "title": "Pulsing hot plume in a closed room",
            "source": "finite-volume simulation (pipeline/plume.py), a substitute for the fire data of DSQ",
            "history": "simulated on a staggered grid with an exact projection",
            "geometry": "plane",
        },
    )


@dataclass(frozen=True)
class Source:
    """Where heat comes from, and how much."""

    x: float
    y: float
    power: float
    frequency: float = 0.0
    phase: float = 0.0
    whirl: tuple[float, float, float] = (0.0, 0.0, 0.0)  # about the axes x, y, z at the start

    def at(self, time: float) -> float:
        """Power at a time."""
        return self.power * (1 + PULSE * np.sin(2 * np.pi * (self.frequency * time + self.phase))) if self.frequency else self.power

    def share(self, shape: tuple[int, int, int]) -> np.ndarray:
        """What a unit of heat adds to the temperature of each cell [Z,Y,X]."""
        z, y, x = ((np.arange(size) + 0.5) / shape[-1] for size in shape)
        weight = np.exp(-(((x - self.x) ** 2 + ((y - self.y) ** 2)[:, None] + ((z - LIFT) ** 2)[:, None, None]) / RADIUS**2))
        return weight / weight.sum() * shape[-1] ** 3


def drawn(seed: int) -> Source:
    """The source of the trajectory with this seed."""
    rng = np.random.default_rng(seed)
    x, y = rng.uniform(0.25, 0.75, 2)
    about_x, about_y, about_z = map(float, rng.uniform(-WHIRL, WHIRL, 3))
    return Source(
        float(x), float(y), float(rng.uniform(*POWER)), float(rng.uniform(*FREQUENCY)), float(rng.uniform()), (about_x, about_y, about_z)
    )


def solve(params: Params, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """VARIABLES (B, T, Z, Y, X) float32 of the trajectories with these seeds (B,), each independent of the others."""
    room = Room(params.shape, params.viscosity, tuple(drawn(int(seed)) for seed in seeds))
    found = room.frames(params.dt, *params.steps, params.frames)
    return {name: found[:, :, number].astype(np.float32) for number, name in enumerate(VARIABLES)}


@dataclass(frozen=True)
class Room:
    """Rooms of one shape (Z, Y, X), each with a source of heat."""

    shape: tuple[int, int, int]
    viscosity: float
    sources: tuple[Source, ...]

    @property
    def cell(self) -> float:
        return 1 / self.shape[-1]

    def frames(self, dt: float, burn_in: int, interval: int, count: int) -> np.ndarray:
        """Step from the start and record `count` frames of VARIABLES [B,count,2,Z,Y,X], the first after `burn_in` steps, the others
        `interval` steps apart. A flow that blows up is an error: `dt` is too long."""
        velocity, heat = self.start()
        shares = np.stack([source.share(self.shape) for source in self.sources])
        out = np.empty((len(self.sources), count, 2, *self.shape))
        step = 0
        for number in range(count):
            for _ in range(interval if number else burn_in):
                velocity, heat = self.step(velocity, heat, shares, step * dt, dt)
                step += 1
            out[:, number, 0], out[:, number, 1] = heat, _middle(velocity[2], 2)
        if not np.isfinite(out).all():
            raise ValueError(
                f"the flow blew up: dt = {dt} is too long for viscosity {self.viscosity} on {self.shape[-1]} cells; take a shorter one"
            )
        return out

    def start(self) -> tuple[Velocity, np.ndarray]:
        """The velocity of whirls about the room's axes, without divergence, and a temperature of zero."""
        size = tuple(n * self.cell for n in self.shape[::-1])  # x, y, z
        velocity = [np.zeros((len(self.sources), *self._faces(axis))) for axis in range(3)]
        for about in range(3):
            first, second = (about + 1) % 3, (about + 2) % 3
            for axis, other, sign in ((first, second, 1.0), (second, first, -1.0)):
                wave = np.ones(1)
                for along in (axis, other):
                    places = np.arange(self._faces(axis)[AXES[along]]) * self.cell + (0 if along == axis else self.cell / 2)
                    angle = np.pi * places / size[along]
                    wave = wave * _on_axis(np.sin(angle) if along == axis else np.cos(angle) * size[axis], along)
                strength = np.array([source.whirl[about] for source in self.sources])
                velocity[axis] += _inside(_cut(sign * strength[:, None, None, None] * wave, axis), axis)  # sin(pi) is not quite zero
        return self.projected(velocity), np.zeros((len(self.sources), *self.shape))

    def step(self, velocity: Velocity, heat: np.ndarray, shares: np.ndarray, time: float, dt: float) -> tuple[Velocity, np.ndarray]:
        """Velocity and temperature one step later."""

        def euler(velocity: Velocity, heat: np.ndarray, time: float) -> tuple[Velocity, np.ndarray]:
            power = np.array([source.at(time) for source in self.sources])
            forces = self._forces(velocity, heat)
            warmed = heat + dt * (self._warming(velocity, heat) + power[:, None, None, None] * shares)
            return self.projected([u + dt * force for u, force in zip(velocity, forces, strict=True)]), warmed

        def mixed(share: float, later: tuple[Velocity, np.ndarray]) -> tuple[Velocity, np.ndarray]:
            return (
                [(1 - share) * u + share * v for u, v in zip(velocity, later[0], strict=True)],
                (1 - share) * heat + share * later[1],
            )

        one = euler(velocity, heat, time)
        two = mixed(1 / 4, euler(*one, time + dt))
        return mixed(2 / 3, euler(*two, time + dt / 2))

    def projected(self, velocity: Velocity) -> Velocity:
        """The nearest velocity without divergence."""
        spectrum = fft.dctn(self.divergence(velocity), axes=(-3, -2, -1))
        pressure = fft.idctn(spectrum * _inverse_laplacian(self.shape), axes=(-3, -2, -1))
        return [u - _inside(np.diff(pressure, axis=AXES[axis]), axis) / self.cell for axis, u in enumerate(velocity)]

    def divergence(self, velocity: Velocity) -> np.ndarray:
        """[B,Z,Y,X]."""
        x, y, z = (np.diff(u, axis=AXES[axis]) for axis, u in enumerate(velocity))
        return (x + y + z) / self.cell

    def _faces(self, axis: int) -> tuple[int, ...]:
        return tuple(n + (AXES[axis] == place - 3) for place, n in enumerate(self.shape))

    def _forces(self, velocity: Velocity, heat: np.ndarray) -> Velocity:
        """What changes the velocity but for pressure: its own transport, friction, and buoyancy; nothing on the walls."""
        out = []
        for axis, u in enumerate(velocity):
            force = np.zeros_like(u)
            for along, v in enumerate(velocity):
                # Momentum through the faces of the volume around each face, in the cells for its own axis, else on edges.
                if along == axis:
                    flux = _middle(u, axis) ** 2 - self.viscosity * np.diff(u, axis=AXES[axis]) / self.cell
                    force += _inside(-np.diff(flux, axis=AXES[axis]) / self.cell, axis)
                else:  # no momentum through walls along which the air slips
                    flow = _middle(_cut(v, along), axis)
                    carried = flow * _cut(_middle(u, along), axis) - self.viscosity * _cut(np.diff(u, axis=AXES[along]), axis) / self.cell
                    force += _inside(-np.diff(_inside(carried, along), axis=AXES[along]) / self.cell, axis)
            if axis == 2:
                force += _inside(_middle(heat, axis), axis)
            out.append(force)
        return out

    def _warming(self, velocity: Velocity, heat: np.ndarray) -> np.ndarray:
        """What changes the temperature but for the source."""
        change = np.zeros_like(heat)
        for axis, u in enumerate(velocity):
            step = np.diff(heat, axis=AXES[axis])
            slope = _limited(_cut(_inside(step, axis), axis, first=0, last=-1), _cut(_inside(step, axis), axis, first=1, last=None))
            flow = _cut(u, axis)
            left, right = _cut(heat + slope / 2, axis, first=0, last=-1), _cut(heat - slope / 2, axis, first=1, last=None)
            flux = np.where(flow > 0, flow * left, flow * right) - self.viscosity * step / self.cell
            change -= np.diff(_inside(flux, axis), axis=AXES[axis]) / self.cell
        return change


def _limited(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Van Leer's slope: the harmonic mean of two of one sign, else nothing."""
    product = before * after
    total = before + after
    return np.divide(2 * product, total, out=np.zeros_like(total), where=product > 0)


def _cut(values: np.ndarray, axis: int, first: int | None = 1, last: int | None = -1) -> np.ndarray:
    """Without its ends along an axis."""
    where = [slice(None)] * values.ndim
    where[AXES[axis]] = slice(first, last)
    return values[tuple(where)]


def _middle(values: np.ndarray, axis: int) -> np.ndarray:
    """Means of neighbours along an axis."""
    return (_cut(values, axis, 0, -1) + _cut(values, axis, 1, None)) / 2


def _inside(values: np.ndarray, axis: int) -> np.ndarray:
    """With a zero at both ends of an axis."""
    width = [(0, 0)] * values.ndim
    width[AXES[axis]] = (1, 1)
    return np.pad(values, width)


def _on_axis(values: np.ndarray, axis: int) -> np.ndarray:
    """[n] as an array [.., n, ..] with its values along an axis."""
    return values.reshape([-1 if place == AXES[axis] else 1 for place in (-3, -2, -1)])


@cache
def _inverse_laplacian(shape: tuple[int, int, int]) -> np.ndarray:
    """One over what the discrete Laplacian multiplies each product of cosines with [Z,Y,X]; 0 for the constant."""
    z, y, x = (2 * (np.cos(np.pi * np.arange(n) / n) - 1) * shape[-1] ** 2 for n in shape)
    total = x + y[:, None] + z[:, None, None]
    return np.divide(1, total, out=np.zeros(shape), where=total != 0)
