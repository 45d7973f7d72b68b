"""Flow past a cylinder in a channel, a von Karman street, by the lattice Boltzmann method (D2Q9).

The channel has height 1 and no-slip walls, water comes in with a parabolic profile of mean speed 1 and leaves freely; so length is in
heights and time in height / mean speed. A trajectory draws its Reynolds number (mean speed x diameter / viscosity), the radius and the
vertical place of its cylinder, and a swirl at the start that lets vortices shed soon. Where the cylinder is there is no value.

This is a declared substitute for two published sets that have no public generator: the meshes of MeshGraphNets (arXiv 2010.03409), which
AROMA uses, and the cylinder wakes of Senseiver and DSQ. The channel is that of the benchmark 2D-2 of Schaefer and Turek 1996, whose
shedding frequency the tests ask for.

Collision: one relaxation time, in the incompressible form of He and Luo 1997 (doi 10.1023/B:JOSS.0000015179.12689.e4), regularised (Latt
and Chopard 2006, doi 10.1016/j.matcom.2006.05.017): without that, or with two relaxation times in its place, some flows blew up. Walls and
cylinder: bounce-back. Inlet: bounce-back from a wall that moves with the profile (Ladd 1994). Outlet: pressure zero, by anti-bounce-back.
Values are kept as differences from rest, so that single precision is enough. Nothing but sums and products cell by cell: the bytes depend
on the seed alone. pylbm compiles generated code and lettuce needs torch: no library for so few lines.

Shapes: B trajectories, T frames, N cells of the height, L of the length; arrays inside the solver are (9, N + 2, L), with the walls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr
from pydantic import Field

from pipeline import trajectories
from pipeline.trajectories import Stepped

VARIABLES = ("velocity_x", "velocity_y", "pressure", "vorticity")
REYNOLDS, RADIUS, SHIFT = (60.0, 150.0), (0.1, 0.15), (-0.05, 0.05)
PLACE = 0.5  # of the centre, behind the inlet
SWIRL = 0.3  # of the mean speed
# right, up, and the two diagonals, each followed by its opposite; then rest
DIRECTIONS = np.array([(1, 0), (-1, 0), (0, 1), (0, -1), (1, 1), (-1, -1), (1, -1), (-1, 1), (0, 0)])
WEIGHTS = np.array([1 / 9] * 4 + [1 / 36] * 4 + [4 / 9])


class Params(Stepped):
    """One set of trajectories. Times are in channel heights over the mean speed; a step of `dt` moves the water by dt x grid cells, and
    a tenth of a cell is plenty, as sound has only 0.58 cells a step."""

    equation: Literal["cylinder_flow"]
    grid: int = Field(ge=16)  # cells of the height
    length: int = Field(default=2, ge=2)  # of the channel, in heights


def coordinates(params: Params) -> xr.Dataset:
    """The data set without its values; what was drawn is a coordinate (trajectory)."""
    flows = [drawn(int(seed)) for seed in trajectories.seeds(params)]
    return trajectories.described(
        params,
        {
            "time": params.interval * np.arange(params.frames),
            "y": (np.arange(params.grid) + 0.5) / params.grid,
            "x": (np.arange(params.grid * params.length) + 0.5) / params.grid,
            "reynolds": ("trajectory", [flow.reynolds for flow in flows]),
            "radius": ("trajectory", [flow.radius for flow in flows]),
        },
        {
            "title": "Flow past a cylinder in a channel",
            "source": "lattice Boltzmann simulation (pipeline/cylinder_flow.py), a substitute for doi 10.48550/arXiv.2010.03409",
            "history": "simulated with one relaxation time, regularised, and bounce-back",
            "geometry": "plane",
        },
    )


@dataclass(frozen=True)
class Flow:
    """One flow, lengths in channel heights."""

    reynolds: float
    radius: float
    shift: float = 0.0  # of the centre, from the middle of the channel
    swirl: float = 0.0  # upward at the start behind the cylinder, in mean speeds


def drawn(seed: int) -> Flow:
    """The flow with this seed."""
    rng = np.random.default_rng(seed)
    return Flow(
        float(rng.uniform(*REYNOLDS)), float(rng.uniform(*RADIUS)), float(rng.uniform(*SHIFT)), float(SWIRL * rng.choice([-1.0, 1.0]))
    )


def solve(params: Params, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """VARIABLES (B, T, N, L) float32 of the trajectories with these seeds (B,), each independent of the others; NaN in the cylinder."""
    shape = (params.grid, params.grid * params.length)
    found = [frames(drawn(int(seed)), shape, params.dt, *params.steps, params.frames) for seed in seeds]
    return dict(zip(VARIABLES, np.moveaxis(np.stack(found), 2, 0), strict=True))


def body(flow: Flow, shape: tuple[int, int]) -> np.ndarray:
    """True [N,L] in the cells whose centre lies in the cylinder."""
    y, x = ((np.arange(size) + 0.5) / shape[0] for size in shape)
    return np.hypot(x - PLACE, (y - 0.5 - flow.shift)[:, None]) < flow.radius


def frames(flow: Flow, shape: tuple[int, int], dt: float, burn_in: int, interval: int, count: int) -> np.ndarray:
    """`count` frames of VARIABLES [count,4,N,L] float32, the first after `burn_in` steps, the others `interval` steps apart.

    Raises ValueError for a flow that blows up, and for a speed or a viscosity beyond what the method can do.
    """
    speed = dt * shape[0]  # cells a step
    viscosity = speed * 2 * flow.radius * shape[0] / flow.reynolds
    if speed > 0.15:
        raise ValueError(f"dt = {dt:g} moves the water by {speed:.2g} cells a step, at most 0.15 can be: take a shorter one")
    lattice = Lattice.of(body(flow, shape), viscosity, speed)
    state = lattice.start(flow.swirl)
    out = np.empty((count, len(VARIABLES), *shape), np.float32)
    for number in range(count):
        for _ in range(interval if number else burn_in):
            state = lattice.step(state)
        out[number] = lattice.fields(state)
    if not np.isfinite(out[:, :, ~lattice.solid[1:-1]]).all():
        raise ValueError(f"the flow blew up at Reynolds number {flow.reynolds:.3g} on {shape[0]} cells: take more")
    return out


@dataclass(frozen=True)
class Lattice:
    """A channel with something solid in it. A state is the populations [9,N+2,L], less those of water at rest."""

    solid: np.ndarray  # [N+2,L], the walls included
    links: tuple[np.ndarray, ...]  # of each direction: flat numbers of the water cells it would come to out of something solid
    rate: np.float32  # of relaxation
    inflow: np.ndarray  # [N+2] x-velocity at the inlet, cells a step

    @classmethod
    def of(cls, body: np.ndarray, viscosity: float, speed: float) -> Lattice:
        """Viscosity in cells squared a step, mean speed in cells a step."""
        solid = np.pad(body, ((1, 1), (0, 0)), constant_values=True)
        links = tuple(np.flatnonzero(~solid & np.roll(solid, (dy, dx), (0, 1))) for dx, dy in DIRECTIONS)
        y = (np.arange(len(solid)) - 0.5) / (len(solid) - 2)
        profile = np.where((y > 0) & (y < 1), 6 * speed * y * (1 - y), 0)
        return cls(solid, links, np.float32(1 / (3 * viscosity + 0.5)), profile.astype(np.float32))

    def start(self, swirl: float) -> np.ndarray:
        """The inlet's profile everywhere, and a whirl behind the cylinder of `swirl` mean speeds."""
        u = np.where(self.solid, np.float32(0), self.inflow[:, None])
        height, x = len(self.solid) - 2, (np.arange(self.solid.shape[1]) + 0.5) / (len(self.solid) - 2)
        bump = swirl * self.inflow.sum() / height * np.exp(-(((x - 2 * PLACE) / 0.15) ** 2))
        v = np.where(self.solid, 0, bump * self.inflow[:, None] / self.inflow.max()).astype(np.float32)
        return _equilibrium(np.zeros_like(u), u, v)

    def moments(self, state: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Density less that at rest, and velocity in cells a step, each [N+2,L]."""
        right, left, up, down, ne, sw, se, nw, rest = state
        u = (right - left) + ((ne - sw) + (se - nw))
        v = (up - down) + ((ne - sw) - (se - nw))
        return (right + left) + (up + down) + ((ne + sw) + (se + nw)) + rest, u, v

    def step(self, state: np.ndarray) -> np.ndarray:
        """The state one step later."""
        density, u, v = self.moments(state)
        after = _equilibrium(density, u, v)
        right, left, up, down, ne, sw, se, nw, _ = state - after
        along, across, shear = right + left, up + down, (ne + sw) - (se + nw)
        diagonal = (ne + sw) + (se + nw)
        after += (1 - self.rate) * _stressed(along + diagonal, across + diagonal, shear)
        moved = np.empty_like(state)
        for number, (dx, dy) in enumerate(DIRECTIONS):
            moved[number] = np.roll(after[number], (dy, dx), (0, 1))
            if self.links[number].size:
                moved[number].flat[self.links[number]] = after[_opposite(number)].flat[self.links[number]]
        self._ends(after, moved, u[:, -1], v[:, -1])
        moved[:, self.solid] = 0
        return moved

    def _ends(self, after: np.ndarray, moved: np.ndarray, u: np.ndarray, v: np.ndarray) -> None:
        """What comes in at the ends, put into `moved` [9,N+2,L]; u and v [N+2] are the velocity of the last column."""
        leaving = _equilibrium(np.zeros_like(u), u, v)
        for number, (dx, _) in enumerate(DIRECTIONS):
            if dx > 0:
                moved[number, :, 0] = after[_opposite(number), :, 0] + np.float32(6 * WEIGHTS[number]) * self.inflow
            if dx < 0:
                even = leaving[number] + leaving[_opposite(number)]
                moved[number, :, -1] = even - after[_opposite(number), :, -1]

    def fields(self, state: np.ndarray) -> np.ndarray:
        """VARIABLES [4,N,L] in mean speeds and channel heights; NaN where it is solid."""
        density, u, v = self.moments(state)
        height = len(self.solid) - 2
        speed = self.inflow.sum(dtype=np.float64) / height
        u, v = u.astype(np.float64) / speed, v.astype(np.float64) / speed
        # the walls lie half way between cells: what is beyond one is the opposite of what is before it
        u[[0, -1]], v[[0, -1]] = -u[[1, -2]], -v[[1, -2]]
        vorticity = (np.gradient(v, axis=1) - np.gradient(u, axis=0)) * height
        found = np.stack([u, v, density / (3 * speed**2), vorticity])
        return np.where(self.solid, np.nan, found)[:, 1:-1].astype(np.float32)


def _opposite(number: int) -> int:
    return number if number == 8 else number ^ 1


def _stressed(xx: np.ndarray, yy: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Populations [9,...] of a momentum flux alone: neither mass nor momentum, nor what the grid has beyond them."""
    out = np.empty((9, *xx.shape), np.float32)
    third = (xx + yy) / 3
    for pair, flux in enumerate((xx - third, yy - third, xx + yy - third + 2 * xy, xx + yy - third - 2 * xy)):
        out[2 * pair] = out[2 * pair + 1] = np.float32(4.5 * WEIGHTS[2 * pair]) * flux
    out[8] = np.float32(-4.5 * WEIGHTS[8]) * third
    return out


def _equilibrium(density: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Populations [9,...] of water of this density, less that at rest, and velocity."""
    out = np.empty((9, *u.shape), np.float32)
    common = density - np.float32(1.5) * (u * u + v * v)
    for pair, along in enumerate((u, v, u + v, u - v)):
        weight = np.float32(WEIGHTS[2 * pair])
        even, odd = weight * (common + np.float32(4.5) * along * along), 3 * weight * along
        np.add(even, odd, out=out[2 * pair])
        np.subtract(even, odd, out=out[2 * pair + 1])
    np.multiply(np.float32(WEIGHTS[8]), common, out=out[8])
    return out
