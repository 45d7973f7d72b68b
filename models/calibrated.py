"""A trained model whose answers are corrected by what validation cases said of them: how far its corrections go, and how wide
its distributions are. `pipeline/calibration.py` finds the numbers.

    mean'   = background + weight (mean - background)
    spread' = factor * spread about the mean'

by lead, by variable, and by whether the question is at a sensor that the context holds. Without a background the mean stays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from models.contract import FieldPrediction, Frames, Predictor

ELSEWHERE, SEEN = 0, 1


@dataclass(frozen=True)
class Calibration:
    """Between two leads the numbers are interpolated, beyond the first and the last one they stay."""

    leads: tuple[float, ...]  # L, increasing, in the dataset's time unit
    weight: tuple[tuple[tuple[float, ...], ...], ...]  # [2,L,C], ELSEWHERE and SEEN
    factor: tuple[tuple[tuple[float, ...], ...], ...]  # [2,L,C]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        tables = {name: tuple(tuple(tuple(row) for row in group) for group in data[name]) for name in ("weight", "factor")}
        return cls(tuple(data["leads"]), **tables)

    def at(self, lead: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """lead [B,S], seen [B,S,Q] -> weight and factor [B,S,Q,C]."""
        table = lead.new_tensor([self.weight, self.factor])  # [2,2,L,C]
        leads = lead.new_tensor(self.leads)
        right = torch.searchsorted(leads, lead.contiguous()).clamp(1, max(1, len(leads) - 1))
        left = right - 1
        right = right.clamp(max=len(leads) - 1)
        share = ((lead - leads[left]) / (leads[right] - leads[left])).nan_to_num(0.0).clamp(0, 1)[..., None]
        both = table[:, :, left] * (1 - share) + table[:, :, right] * share  # [2,2,B,S,C]
        here = torch.where(seen[..., None], both[:, SEEN, :, :, None], both[:, ELSEWHERE, :, :, None])
        return here[0], here[1]


class Calibrated:
    """A predictor like `model`; goes between a model and its background."""

    def __init__(self, model: Predictor, calibration: Calibration) -> None:
        self.model, self.calibration = model, calibration
        self.tasks, self.levels = model.tasks, model.levels

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        answer = self.model.predict(context, query)
        weight, factor = self.calibration.at(query.time - context.time[:, -1:], at_seen_sensor(context, query))
        return corrected(answer, query.background, weight.to(answer.mean), factor.to(answer.mean))


def corrected(answer: FieldPrediction, background: Tensor | None, weight: Tensor, factor: Tensor) -> FieldPrediction:
    """`answer` with weight and factor that broadcast to its mean; probabilities of classes stay."""
    mean = answer.mean if background is None else torch.lerp(background.to(answer.mean), answer.mean, weight)

    def widened(values: Tensor) -> Tensor:  # [...,B,S,Q,C]
        return mean + factor * (values - answer.mean)

    return replace(
        answer,
        mean=mean,
        scale=None if answer.scale is None else factor * answer.scale,
        quantiles=None if answer.quantiles is None else widened(answer.quantiles.movedim(-1, 0)).movedim(0, -1),
        samples=None if answer.samples is None else widened(answer.samples),
    )


def at_seen_sensor(context: Frames, query: Frames) -> Tensor:
    """[B,S,Q], whether a question is at a fixed sensor of which the context holds a reading."""
    if context.sensor is None or query.sensor is None:
        return torch.zeros_like(query.mask)
    rows, asked = len(query.mask), query.sensor.flatten(1)
    reported = torch.where(context.mask, context.sensor, -1).flatten(1)
    count = 1 + max(int(x.max()) if x.numel() else -1 for x in (reported, asked))
    seen = torch.zeros(rows, count + 1, dtype=torch.bool, device=asked.device)
    seen.scatter_(1, torch.where(reported < 0, count, reported), True)
    seen[:, count] = False  # where those go that are no fixed sensor
    return seen.gather(1, torch.where(asked < 0, count, asked)).view_as(query.mask)
