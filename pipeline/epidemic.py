"""An epidemic on a lattice: every cell is susceptible, infected or recovered, and passes through them in this order.

    infection  of a susceptible cell in a step: with probability min(1, beta sum over infected cells of its 9 x 9 neighbourhood of d^-2)
    recovery   of an infected cell in a step: with probability min(1, gamma)
    beta ~ Beta(2, 8), gamma ~ InvGamma(5, 0.4), and one to four cells are infected at first

d is in cells; outside the lattice nobody is ill. This is the SIR set of BSA-TNP (arXiv 2506.09163), whose published program draws all
recoveries of a task with one random key: here they are independent. The three states are three variables of zeros and ones, so that a
model's means are probabilities.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import xarray as xr
from pydantic import Field
from scipy.ndimage import convolve

from pipeline import trajectories
from pipeline.trajectories import Trajectories

VARIABLES = ("susceptible", "infected", "recovered")
REACH = 4  # cells to each side


class Params(Trajectories):
    """One set of epidemics; a step is one unit of time."""

    equation: Literal["epidemic"]
    grid: int = Field(ge=2)  # cells an axis
    box: tuple[float, float] = (-2.0, 2.0)  # the lattice covers [low, high]^2, its outer cells lie on the border
    frames: int = Field(ge=1)


def coordinates(params: Params) -> xr.Dataset:
    """The data set without values; beta and gamma of a trajectory are coordinates (trajectory)."""
    rates = np.array([rates_of(int(seed)) for seed in trajectories.seeds(params)])
    axis = np.linspace(*params.box, params.grid)
    return trajectories.described(
        params,
        {
            "time": np.arange(params.frames, dtype=np.float64),
            "y": axis,
            "x": axis,
            "beta": ("trajectory", rates[:, 0]),
            "gamma": ("trajectory", rates[:, 1]),
        },
        {
            "title": "Epidemic on a lattice: susceptible, infected, recovered",
            "source": "random simulation (pipeline/epidemic.py)",
            "history": "simulated step by step",
            "geometry": "plane",
        },
    )


def rates_of(seed: int) -> tuple[float, float]:
    """beta and gamma of the trajectory with this seed."""
    rng = np.random.default_rng([seed, 0])
    return float(rng.beta(2, 8)), float(0.4 / rng.gamma(5))


def solve(params: Params, seeds: np.ndarray) -> dict[str, np.ndarray]:
    """The three variables (B, T, N, N), of which one is 1 and the others are 0."""
    state = np.stack([_one(params, int(seed)) for seed in seeds])
    return {name: (state == code).astype(np.float32) for code, name in enumerate(VARIABLES)}


def _one(params: Params, seed: int) -> np.ndarray:
    """States (T, N, N), codes in the order of VARIABLES."""
    beta, gamma = rates_of(seed)
    rng = np.random.default_rng([seed, 1])
    state = np.zeros((params.grid, params.grid), np.int8)
    state.flat[rng.choice(state.size, rng.integers(1, 5), replace=False)] = 1
    states = [state]
    for _ in range(params.frames - 1):
        pressure = convolve((state == 1).astype(np.float64), _WEIGHTS, mode="constant")
        chance = np.select([state == 0, state == 1], [beta * pressure, gamma], 0.0)
        state = state + (rng.random(state.shape) < chance).astype(np.int8)
        states.append(state)
    return np.stack(states)


def _weights() -> np.ndarray:
    offset = np.arange(-REACH, REACH + 1)
    squared = (offset[:, None] ** 2 + offset**2).astype(np.float64)
    squared[REACH, REACH] = np.inf
    return 1 / squared


_WEIGHTS = _weights()
