"""Block bootstrap of metrics: blocks (stretches of time, trajectories) are drawn, never single points, because points of a block are alike.

Draws are counts of blocks, the same for every predictor of a dataset, so comparing two predictors draw by draw is the paired bootstrap.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from arch.bootstrap import StationaryBootstrap
from pydantic import Field

from pipeline.params import Section

FEWEST_BLOCKS = 5  # with fewer an interval would pretend to know what it cannot


class Bootstrap(Section):
    draws: int = Field(default=1000, ge=100)
    run: int = Field(default=1, ge=1)  # mean number of consecutive blocks drawn together; 1 where blocks are independent
    seed: int = 0


def counts(blocks: int, params: Bootstrap) -> np.ndarray:
    """How often each block is in each draw of the stationary bootstrap, [draws, blocks] float64."""
    source = StationaryBootstrap(params.run, np.arange(blocks), seed=np.random.Generator(np.random.PCG64(params.seed)))
    return np.stack([np.bincount(drawn[0][0], minlength=blocks) for drawn in source.bootstrap(params.draws)]).astype(np.float64)


def resample(sums: Mapping[str, np.ndarray], drawn: np.ndarray) -> dict[str, np.ndarray]:
    """Sums [blocks, ...] added up in every draw, [draws, ...]."""
    # einsum without optimisation adds in a fixed order, a threaded matrix product does not
    return {name: np.einsum("db,b...->d...", drawn, array, optimize=False) for name, array in sums.items()}


def interval(each: np.ndarray, blocks: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Central 95 % of draws [draws, ...]; NaN where fewer than FEWEST_BLOCKS blocks hold anything, or too few draws give a number."""
    finite = np.isfinite(each)
    enough = (np.asarray(blocks) >= FEWEST_BLOCKS) & (finite.mean(axis=0) > 0.9)
    usable = np.where(finite & enough, each, np.nan)
    low, high = np.full(each.shape[1:], np.nan), np.full(each.shape[1:], np.nan)
    if enough.any():
        low[enough], high[enough] = np.nanquantile(usable[:, enough], (0.025, 0.975), axis=0)
    return low, high
