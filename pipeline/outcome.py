"""What was predicted for some points beside what was true, and what one point says of it: error, quantiles, CRPS, log-likelihood.

CRPS of a prediction that is a mean alone is its absolute error. CRPS of a class is (probability - truth)^2, its part of the Brier score;
log-likelihood and Brier score of classes are those of the point, alike for all its classes.
CRPS of quantiles is twice the pinball loss integrated over the levels by midpoints: the tails beyond the outer levels are approximate.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scoringrules
import torch
from scipy.special import ndtri

from models.contract import DatasetInfo, FieldPrediction, Frames


@dataclass(frozen=True)
class Outcome:
    """What was predicted for P points of C variables beside what was true, in physical units."""

    truth: np.ndarray  # [P,C] float64
    mean: np.ndarray  # [P,C]
    scale: np.ndarray | None = None  # [P,C] standard deviation of a Gaussian
    quantiles: np.ndarray | None = None  # [P,C,K]
    samples: np.ndarray | None = None  # [E,P,C]
    levels: tuple[float, ...] = ()  # K
    std: np.ndarray | float = 1.0  # [C] by which values are standardised
    probabilities: np.ndarray | None = None  # [P,C] of the variables as classes, whose truth is a 1 among zeros

    @property
    def distribution(self) -> str:
        """ "gaussian", "quantiles", "ensemble", "classes" or "mean only"."""
        forms = {"gaussian": self.scale, "quantiles": self.quantiles, "ensemble": self.samples, "classes": self.probabilities}
        return next((name for name, array in forms.items() if array is not None), "mean only")

    @cached_property
    def error(self) -> np.ndarray:
        return self.mean - self.truth

    def quantile(self, level: float) -> np.ndarray | None:
        """Predicted quantile [P,C]; None where there is no distribution, or where the given levels do not reach that far."""
        if self.scale is not None:
            return self.mean + ndtri(level) * self.scale
        if self.samples is not None:
            return np.quantile(self.samples, level, axis=0)
        if self.quantiles is None or not self.levels[0] - 1e-9 <= level <= self.levels[-1] + 1e-9:
            return None
        right = min(max(int(np.searchsorted(self.levels, level - 1e-9)), 1), len(self.levels) - 1) if len(self.levels) > 1 else 0
        if right == 0:
            return self.quantiles[..., 0]
        below, above = self.levels[right - 1], self.levels[right]
        share = (level - below) / (above - below)
        return (1 - share) * self.quantiles[..., right - 1] + share * self.quantiles[..., right]

    def nll(self) -> np.ndarray | None:
        """Negative log-likelihood [P,C] in model units of a Gaussian, whose scale counts as at least a thousandth of the standard deviation
        (an exact interpolation would be infinitely good or bad). Of classes the cross-entropy of the point, the same for every class; a
        probability counts as at least a millionth."""
        if self.scale is not None:
            scale = np.maximum(self.scale / self.std, 1e-3)
            return 0.5 * np.log(2 * np.pi) + np.log(scale) + 0.5 * (self.error / self.std / scale) ** 2
        if self.probabilities is not None:
            return self._of_point((-self.truth * np.log(np.clip(self.probabilities, 1e-6, 1.0))).sum(axis=1))
        return None

    def brier(self) -> np.ndarray | None:
        """Brier score [P,C] of the point, sum over the classes of (probability - truth)^2; the same for every class."""
        return None if self.probabilities is None else self._of_point((self.error**2).sum(axis=1))

    def right(self) -> np.ndarray | None:
        """[P,C] 1 where the most probable class is the true one, the first of equals; the same for every class."""
        if self.probabilities is None:
            return None
        return self._of_point((self.probabilities.argmax(axis=1) == self.truth.argmax(axis=1)).astype(float))

    def _of_point(self, value: np.ndarray) -> np.ndarray:
        return np.broadcast_to(value[:, None], self.truth.shape)

    def crps(self) -> np.ndarray:
        if self.scale is not None:
            # A scale of zero is a point mass, whose CRPS is the absolute error; scoringrules would divide by it.
            certain = self.scale <= 0
            spread = np.where(certain, 1.0, self.scale)
            return np.where(certain, np.abs(self.error), scoringrules.crps_normal(self.truth, self.mean, spread))
        if self.samples is not None:
            return scoringrules.crps_ensemble(self.truth, self.samples, m_axis=0)
        if self.quantiles is not None:
            levels = np.asarray(self.levels)
            edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [1.0]])
            return 2 * scoringrules.quantile_score(self.truth[..., None], self.quantiles, levels) @ np.diff(edges)
        if self.probabilities is not None:
            return self.error**2
        return np.abs(self.error)


def outcome_at(
    query: Frames, answer: FieldPrediction, at: tuple[np.ndarray, ...], row: np.ndarray, levels: tuple[float, ...], info: DatasetInfo
) -> Outcome:
    """Predictions and truth at the queries `at` = (b, s, q); `row` [P] is the frame of the answer that holds each."""
    assert query.value is not None
    b, _, q = at

    def points(tensor: torch.Tensor) -> np.ndarray:
        return tensor.numpy()[b, row, q].astype(np.float64)

    return Outcome(
        truth=_physical(query.value.numpy()[at], info),
        mean=points(answer.mean),
        scale=None if answer.scale is None else points(answer.scale),
        quantiles=None if answer.quantiles is None else points(answer.quantiles),
        samples=None if answer.samples is None else answer.samples.numpy()[:, b, row, q].astype(np.float64),
        levels=levels,
        std=np.asarray(info.std),
        probabilities=None if answer.probabilities is None else points(answer.probabilities),
    )


def _physical(value: np.ndarray, info: DatasetInfo) -> np.ndarray:
    return value.astype(np.float64) * np.asarray(info.std) + np.asarray(info.mean)
