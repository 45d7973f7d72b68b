"""Additive statistics of predictions, summed per bootstrap block, lead, stratum and distance: what a score table is made of.

Each sample is summed by itself, and samples are added in the order of the cases, so that the batch size does not change a byte.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from models.contract import DatasetInfo, FieldPrediction
from pipeline import scores
from pipeline.cases import CONTEXT_SENSOR, GRID_POINT, HELD_SENSOR, CaseBatch
from pipeline.metrics import POINT_STATISTICS, SAMPLE_STATISTICS, STATISTICS
from pipeline.outcome import outcome_at

STRATA = tuple(scores.STRATA)  # context, held_out, between, field
_AT_SENSOR = 1e-5  # of half_extent: a grid point this near an observation is the sensor's own


@dataclass
class Sums:
    """Additive statistics [block, lead, stratum, distance, variable, statistic]; distance 0 is all of them together."""

    blocks: np.ndarray
    leads: tuple[int, ...]
    edges: tuple[float, ...]
    variables: int
    total: np.ndarray = field(init=False)
    cases: list[tuple[Any, ...]] = field(init=False, default_factory=list)  # (case, block, questions, [variable] squared errors)

    def __post_init__(self) -> None:
        self.total = np.zeros((len(self.blocks), len(self.leads), len(STRATA), self.bins + 1, self.variables, len(STATISTICS)))

    @property
    def bins(self) -> int:
        return len(self.edges) + 1

    def strata(self, part: CaseBatch, half_extent: float) -> tuple[np.ndarray, np.ndarray]:
        """Stratum (index into STRATA, never `field`) and distance bin of every query, both [B,S,Q]."""
        at_sensor = part.distance <= _AT_SENSOR * half_extent
        stratum = np.where(part.kind == HELD_SENSOR, 1, np.where((part.kind == CONTEXT_SENSOR) | at_sensor, 0, 2))
        return stratum, np.digitize(part.distance, self.edges)

    def add(
        self,
        part: CaseBatch,
        strata: tuple[np.ndarray, np.ndarray],
        answer: FieldPrediction,
        able: np.ndarray,
        levels: tuple[float, ...],
        info: DatasetInfo,
    ) -> str:
        """Add a batch of cases with the predictions of the frames `able` [S]; returns what form of uncertainty these have."""
        query, (stratum, bins) = part.batch.query, strata
        b, s, _ = at = np.nonzero(query.mask.numpy() & able[None, :, None])
        outcome = outcome_at(query, answer, at, (np.cumsum(able) - 1)[s], levels, info)
        shape = (len(part.index), len(self.leads), 3, self.bins)
        cell = np.ravel_multi_index((b, s, stratum[at], bins[at]), shape)
        size = int(np.prod(shape))
        count = np.bincount(cell, minlength=size).reshape(shape)
        sample = np.zeros((*shape, self.variables, len(STATISTICS)))
        sample[..., STATISTICS.index("n")] = count[..., None]
        for name, statistic in POINT_STATISTICS.items():
            values = statistic(outcome)
            for c in range(self.variables):
                column = np.nan if values is None else np.bincount(cell, values[:, c], minlength=size).reshape(shape)
                sample[..., c, STATISTICS.index(name)] = column
        sample = np.concatenate([sample.sum(axis=3, keepdims=True), sample], axis=3)
        gridded = bool((part.kind == GRID_POINT).any())
        whole = sample[:, :, 0:1] + sample[:, :, 2:3] if gridded else np.zeros_like(sample[:, :, 0:1])
        sample = np.concatenate([sample, whole], axis=2)
        sample[..., STATISTICS.index("samples")] = sample[..., STATISTICS.index("n")] > 0
        named = {name: sample[..., i] for i, name in enumerate(STATISTICS)}
        for name, of_sample in SAMPLE_STATISTICS.items():
            sample[..., STATISTICS.index(name)] = of_sample(named)
        n, squared = (sample[:, :, :3, 0, :, STATISTICS.index(statistic)].sum(axis=(1, 2)) for statistic in ("n", "squared"))
        self.cases += zip(part.index, part.block, n, squared, strict=True)
        for row, one in zip(np.searchsorted(self.blocks, part.block), sample, strict=True):
            self.total[row] += one
        return outcome.distribution

    def by_case(self, model: str, info: DatasetInfo) -> pd.DataFrame:
        """RMSE of each case over the questions of all its leads; cases of one block are counted by `fold`."""
        rows = [
            {"model": model, "variable": name, "case": case, "block": block, "n": int(n[c]), "rmse": (squared[c] / n[c]) ** 0.5}
            for case, block, n, squared in self.cases
            for c, name in enumerate(info.variables)
            if n[c]
        ]
        table = pd.DataFrame(rows, columns=["model", "variable", "case", "block", "n", "rmse"])
        table.insert(4, "fold", table.groupby(["variable", "block"]).cumcount())
        return table

    def table(self, model: str, info: DatasetInfo, tasks: frozenset[str]) -> pd.DataFrame:
        """blocks.parquet of one predictor; cells without a point, or of a task it does not claim, are left out."""
        bins = ["all", *scores.distance_labels(self.edges)]
        kept = self.total[..., STATISTICS.index("n")] > 0
        claimed = np.array([[scores.task(stratum, lead) in tasks for stratum in STRATA] for lead in self.leads])
        kept &= claimed[None, :, :, None, None]
        block, lead, stratum, distance, variable = np.nonzero(kept)
        table = pd.DataFrame(
            {
                "model": model,
                "variable": np.array(info.variables)[variable],
                "stratum": np.array(STRATA)[stratum],
                "distance": np.array(bins)[distance],
                "lead": np.array(self.leads)[lead] * info.step,
                "block": block.astype(np.int64),
            }
        )
        # Distances matter where no sensor is; elsewhere they would only repeat "all".
        sums = pd.DataFrame(self.total[kept], columns=list(STATISTICS))
        wanted = (table["distance"] == "all") | table["stratum"].isin(["held_out", "between"]) & bool(self.edges)
        return pd.concat([table, sums], axis=1)[wanted].reset_index(drop=True)
