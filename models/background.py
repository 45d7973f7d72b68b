"""A fitted baseline as the background of a field model: prediction = background + learned correction (the correction is the model's)."""

from __future__ import annotations

from dataclasses import replace

import torch

from models.contract import FieldPrediction, Frames, Predictor


@torch.no_grad()
def attach(baseline: Predictor, context: Frames, query: Frames) -> Frames:
    """The query with `background` and `background_scale` [B,S,Q,C] filled by the baseline's mean and standard deviation.

    Raises ValueError where the baseline states no standard deviation, or an asked point gets a number that is not finite.
    """
    prior = baseline.predict(context, query)
    name = type(baseline).__name__
    if prior.scale is None:
        raise ValueError(f"{name} gives no standard deviation: it cannot be a background")
    finite = (prior.mean.isfinite() & prior.scale.isfinite()).all(-1) | ~query.mask
    if not finite.all():
        raise ValueError(f"{name} as background: {int((~finite).sum())} of {int(query.mask.sum())} asked points are not finite")
    return replace(query, background=prior.mean, background_scale=prior.scale)


class WithBackground:
    """A field model together with its background: attaches it to every query, then asks the model."""

    def __init__(self, baseline: Predictor, model: Predictor) -> None:
        self.baseline, self.model = baseline, model
        self.tasks = model.tasks & baseline.tasks
        self.levels = model.levels

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        return self.model.predict(context, attach(self.baseline, context, query))
