"""What a trained model's answers are to be corrected by, from the frozen validation cases (models/calibrated.py says what is done with it).

Scores are CRPS (squared errors and the likelihood would follow the few largest misses), or squared errors of a model that states a mean
alone. The weight of a correction to a background, within [0, 1], and the factor of a spread are those nearest to 1 whose score is worse
than the best one by no more than its standard error over the blocks of the cases (the one-standard-error rule of Breiman et al. 1984). So
a few days of validation, which say little of another season, change little, and a single block changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from models.calibrated import Calibration, at_seen_sensor, corrected
from models.contract import DatasetInfo, FieldBatch, FieldPrediction, Predictor
from pipeline import predict
from pipeline.outcome import Outcome, outcome_at

_FACTORS = np.geomspace(1 / 8, 8, 97)
_WEIGHTS = np.linspace(0, 1, 51)
_ROUNDS = 3  # weight and factor are found in turn


@dataclass
class _Asked:
    """The questions of one lead at one kind of place, batch by batch."""

    outcomes: list[Outcome] = field(default_factory=list)
    backgrounds: list[np.ndarray] = field(default_factory=list)  # means [P,C], none where there is none
    blocks: list[np.ndarray] = field(default_factory=list)  # [P]


def calibrate(model: Predictor, batches: Iterable[tuple[FieldBatch, np.ndarray]], info: DatasetInfo, device: str = "cpu") -> Calibration:
    """From cases, all asked at the same leads, with the background that `model` corrects, if it corrects one, and their blocks [B]."""
    asked: dict[tuple[int, int], _Asked] = defaultdict(_Asked)
    leads: tuple[float, ...] = ()
    for batch, block in batches:
        context, query = batch.context, batch.query
        answer = predict.answer(model, context, query, info, device)
        background = None if query.background is None else predict.physical(FieldPrediction(query.background), info).mean.numpy()
        leads = tuple((query.time - context.time[:, -1:])[0].tolist())
        seen = at_seen_sensor(context, query)
        for group in (0, 1):
            for lead in range(len(leads)):
                b, q = (x.numpy() for x in (query.mask[:, lead] & (seen[:, lead] == bool(group))).nonzero(as_tuple=True))
                here, at = asked[group, lead], (b, np.full(len(b), lead), q)
                here.outcomes.append(outcome_at(query, answer, at, at[1], model.levels, info))
                here.blocks.append(block[b])
                if background is not None:
                    here.backgrounds.append(background[at].astype(np.float64))
    found = [[_of_lead(asked[group, lead]) for lead in range(len(leads))] for group in (0, 1)]
    weight, factor = (tuple(tuple(pair[i] for pair in group) for group in found) for i in (0, 1))
    return Calibration(leads, weight, factor)


def _of_lead(asked: _Asked) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Weight and factor of every variable."""
    outcome, block = _joined(asked.outcomes), np.unique(np.concatenate(asked.blocks), return_inverse=True)[1]
    certain = outcome.distribution in ("mean only", "classes")
    background = torch.from_numpy(np.concatenate(asked.backgrounds)) if asked.backgrounds else None
    weight, factor = np.ones(outcome.truth.shape[1]), np.ones(outcome.truth.shape[1])

    def score(weight: float | np.ndarray, factor: float | np.ndarray) -> np.ndarray:
        tried = _corrected(outcome, background, weight, factor)
        return tried.error**2 if certain else tried.crps()

    for _ in range(_ROUNDS if block.any() else 0):  # one block has no standard error
        if background is not None:
            weight = _modest(_WEIGHTS, lambda w: score(w, factor), block)  # noqa: B023 - called at once
        if not certain:
            factor = _modest(_FACTORS, lambda f: score(weight, f), block)  # noqa: B023
    return tuple(float(f"{w:.4g}") for w in weight), tuple(float(f"{f:.4g}") for f in factor)


def _modest(candidates: np.ndarray, score: Callable[[float], np.ndarray], block: np.ndarray) -> np.ndarray:
    """Of every variable [C] the candidate nearest to 1 whose score [P,C] cannot be told from the best one's, given the `block` [P]."""
    count = np.bincount(block)
    sums = np.array([[np.bincount(block, column) for column in score(candidate).T] for candidate in candidates])  # [K,C,B]
    best = sums.sum(axis=2).argmin(axis=0)
    worse = sums - np.take_along_axis(sums, best[None, :, None], axis=0)
    mean = worse.sum(axis=2, keepdims=True) / count.sum()
    error = np.sqrt(np.square(worse - mean * count).sum(axis=2) * len(count) / (len(count) - 1)) / count.sum()
    away = np.where(mean[..., 0] <= error, np.abs(np.log(np.maximum(candidates, 1e-9)))[:, None], np.inf)
    return candidates[away.argmin(axis=0)]


def _joined(parts: list[Outcome]) -> Outcome:
    def join(name: str, axis: int = 0) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays, axis=axis)

    means = {"truth": join("truth"), "mean": join("mean")}
    return replace(parts[0], **means, scale=join("scale"), quantiles=join("quantiles"), samples=join("samples", 1))


def _corrected(o: Outcome, background: torch.Tensor | None, weight: float | np.ndarray, factor: float | np.ndarray) -> Outcome:
    """What would have been predicted with this weight and factor, of all variables or of each [C]."""
    forms = (None if array is None else torch.from_numpy(array) for array in (o.scale, o.quantiles, o.samples))
    numbers = (torch.as_tensor(number, dtype=torch.float64) for number in (weight, factor))
    made = corrected(FieldPrediction(torch.from_numpy(o.mean), *forms), background, *numbers)
    scale, quantiles, samples = (None if tensor is None else tensor.numpy() for tensor in (made.scale, made.quantiles, made.samples))
    return replace(o, mean=made.mean.numpy(), scale=scale, quantiles=quantiles, samples=samples)
