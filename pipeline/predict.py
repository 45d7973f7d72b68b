"""From model units back to physical units: the inverse of what `pipeline/batches.py` does to values."""

from __future__ import annotations

import torch

from models.contract import DatasetInfo, FieldPrediction


def physical(prediction: FieldPrediction, info: DatasetInfo) -> FieldPrediction:
    """The same prediction in info.units, detached and on the CPU. Values are not clipped: a sanity gate must see what was predicted."""
    mean, std = torch.tensor(info.mean), torch.tensor(info.std)

    def values(x: torch.Tensor) -> torch.Tensor:
        return x.detach().cpu().float() * std + mean

    return FieldPrediction(
        mean=values(prediction.mean),
        scale=None if prediction.scale is None else prediction.scale.detach().cpu().float() * std,
        quantiles=None if prediction.quantiles is None else values(prediction.quantiles.movedim(-1, 0)).movedim(0, -1),
        samples=None if prediction.samples is None else values(prediction.samples),
    )
