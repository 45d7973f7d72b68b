"""What a trained model's answers are to be corrected by, from the frozen validation cases (models/calibrated.py says what is done with it).

The weight of a correction to a background, within [0, 1], and the factor of a spread are those of least CRPS (squared errors and the
likelihood would follow the few largest misses); of a model that states a mean alone, the weight is that of least squared error. A lead
with few questions says little, and is left as it is.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from models.calibrated import Calibration, at_seen_sensor
from models.contract import DatasetInfo, FieldBatch, Predictor
from pipeline import predict
from pipeline.outcome import Outcome, outcome_at

_FACTORS = np.geomspace(1 / 8, 8, 97)
_WEIGHTS = np.linspace(0, 1, 51)
_ROUNDS = 3
_FEWEST = 50  # questions of a lead


def calibrate(model: Predictor, batches: Iterable[FieldBatch], info: DatasetInfo, device: str = "cpu") -> Calibration:
    """From cases with the background that `model` corrects, if it corrects one, all asked at the same leads."""
    outcomes: dict[tuple[int, int], list[Outcome]] = defaultdict(list)
    priors: dict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
    leads: tuple[float, ...] = ()
    for batch in batches:
        context, query = batch.context, batch.query
        with torch.inference_mode():
            answer = predict.physical(model.predict(context.to(device), query.to(device)), info)
        leads = tuple((query.time - context.time[:, -1:])[0].tolist())
        seen = at_seen_sensor(context, query)
        for group in (0, 1):
            for lead in range(len(leads)):
                b, q = (query.mask[:, lead] & (seen[:, lead] == bool(group))).nonzero(as_tuple=True)
                at = (b.numpy(), np.full(len(b), lead), q.numpy())
                outcomes[group, lead].append(outcome_at(query, answer, at, at[1], model.levels, info))
                if query.background is not None:
                    prior = query.background.detach().cpu().numpy()[at].astype(np.float64)
                    priors[group, lead].append(prior * np.asarray(info.std) + np.asarray(info.mean))
    found = [[_of_lead(outcomes[g, s], priors[g, s]) for s in range(len(leads))] for g in (0, 1)]
    weight, factor = (tuple(tuple(pair[i] for pair in group) for group in found) for i in (0, 1))
    return Calibration(leads, weight, factor)


def _of_lead(outcomes: list[Outcome], priors: list[np.ndarray]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Weight and factor of every variable, found in turn."""
    asked = _joined(outcomes)
    points, variables = asked.truth.shape
    if points < _FEWEST:
        return (1.0,) * variables, (1.0,) * variables
    certain = asked.distribution in ("mean only", "classes")
    prior = np.concatenate(priors) if priors else asked.mean
    step = asked.mean - prior
    weight, factor = np.ones(variables), np.ones(variables)
    for _ in range(_ROUNDS):
        if priors:
            tried = [_widened(_moved(asked, prior + share * step), factor) for share in _WEIGHTS]
            losses = np.array([(o.error**2 if certain else o.crps()).mean(axis=0) for o in tried])
            weight = _WEIGHTS[len(_WEIGHTS) - 1 - losses[::-1].argmin(axis=0)]  # of equals the largest
        if not certain:
            moved = _moved(asked, prior + weight * step)
            factor = _FACTORS[np.argmin([_widened(moved, f).crps().mean(axis=0) for f in _FACTORS], axis=0)]
    return tuple(float(f"{w:.4g}") for w in weight), tuple(float(f"{f:.4g}") for f in factor)


def _joined(parts: list[Outcome]) -> Outcome:
    def join(name: str, axis: int = 0) -> Any:
        arrays = [getattr(part, name) for part in parts]
        return None if arrays[0] is None else np.concatenate(arrays, axis=axis)

    means = {"truth": join("truth"), "mean": join("mean")}
    return replace(parts[0], **means, scale=join("scale"), quantiles=join("quantiles"), samples=join("samples", 1))


def _moved(o: Outcome, mean: np.ndarray) -> Outcome:
    """The same distributions about other means."""
    by = mean - o.mean
    quantiles = None if o.quantiles is None else o.quantiles + by[..., None]
    return replace(o, mean=mean, quantiles=quantiles, samples=None if o.samples is None else o.samples + by)


def _widened(o: Outcome, factor: float | np.ndarray) -> Outcome:
    scale = None if o.scale is None else factor * o.scale
    samples = None if o.samples is None else o.mean + factor * (o.samples - o.mean)
    quantiles = None if o.quantiles is None else (o.mean + factor * (o.quantiles.transpose(2, 0, 1) - o.mean)).transpose(1, 2, 0)
    return replace(o, scale=scale, quantiles=quantiles, samples=samples)
