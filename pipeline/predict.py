"""Ask a predictor, and go from model units back to physical units: the inverse of what `pipeline/rows.py` does to values."""

from __future__ import annotations

import torch

from models.contract import DatasetInfo, FieldPrediction, Frames, Predictor


def answer(predictor: Predictor, context: Frames, query: Frames, info: DatasetInfo, device: torch.device | str) -> FieldPrediction:
    """What a predictor that lives on `device` says to a query, in info.units and on the CPU."""
    with torch.inference_mode():
        return physical(predictor.predict(context.to(device), query.to(device)), info)


def physical(prediction: FieldPrediction, info: DatasetInfo) -> FieldPrediction:
    """The same prediction in info.units, detached and on the CPU. Values are not clipped: a sanity gate must see what was predicted.

    Of classes it is always `probabilities`: those stated, or the means of a predictor that states none (the mean of a class's zeros and
    ones is its probability), clipped to [0, 1] and divided by their sum.
    """
    mean, std = torch.tensor(info.mean), torch.tensor(info.std)

    def values(x: torch.Tensor) -> torch.Tensor:
        return x.detach().cpu().float() * std + mean

    if info.classes:
        stated = prediction.probabilities
        chance = _shares(values(prediction.mean)) if stated is None else stated.detach().cpu().float()
        return FieldPrediction(mean=chance, probabilities=chance)
    return FieldPrediction(
        mean=values(prediction.mean),
        scale=None if prediction.scale is None else prediction.scale.detach().cpu().float() * std,
        quantiles=None if prediction.quantiles is None else values(prediction.quantiles.movedim(-1, 0)).movedim(0, -1),
        samples=None if prediction.samples is None else values(prediction.samples),
    )


def _shares(mean: torch.Tensor) -> torch.Tensor:
    """Means [...,C] as probabilities; all alike where every one is zero or below. What is not finite stays so."""
    clipped = mean.clamp(0, 1)
    whole = clipped.sum(-1, keepdim=True)
    return torch.where(whole == 0, 1 / mean.shape[-1], clipped / whole)
