"""Linear interpolation in time: each place between its own observations, the nearest places averaged; the nearest value outside them.

It is what one gets without a model where a series is to be completed, and persistence where it is to be continued. The standard deviation
is the root mean square error of training questions by their distance in time from the nearest observation.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from models.baselines.fitted import FLOOR, Fitted, along, by_lead
from models.baselines.interpolation import series
from models.contract import DatasetInfo, FieldBatch, FieldPrediction, Frames

_CHUNK = 1 << 20  # pairs of question and place at a time: bounds the memory


class LinearTime(Fitted):
    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

    parts = ("variance",)  # [L,C] by the distance in frames from the nearest observation

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config

    def fit(self, batches: Iterable[FieldBatch]) -> None:
        parts: list[tuple[Tensor, Tensor]] = []
        for batch in batches:
            query = batch.query
            assert query.value is not None
            mean, gap = self._at(batch.context, query)
            at = query.mask & gap.isfinite()
            parts.append(((query.value - mean)[at].double().square(), gap[at].double()))
        if not any(len(gap) for _, gap in parts):
            raise ValueError(f"{self.info.name}: no training batch holds an answered question beside an observation; nothing to fit from")
        square, gap = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        self._state = {"variance": by_lead(square, gap)}

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        mean, gap = self._at(context, query)
        table = self.tensor("variance", gap)
        known = gap.isfinite()
        variance = along(torch.arange(len(table), dtype=torch.float64, device=gap.device), table, torch.where(known, gap, 0.0))
        variance = torch.where(known[..., None], variance, 1.0)  # nothing observed: the climate of the training split
        return FieldPrediction(mean, variance.sqrt().clamp(min=FLOOR).to(mean.dtype))

    def _at(self, context: Frames, query: Frames) -> tuple[Tensor, Tensor]:
        """Mean [B,S,Q,C] and distance in time [B,S,Q] from the nearest observation, in frames."""
        known = series(context, self.info.step, self.info.period)
        time = ((query.time - context.time[:, :1]) / self.info.step).to(query.position.dtype)
        s, q = query.mask.shape[1:]
        chunk = max(1, _CHUNK // max(1, s * known.place[..., 0].numel()))
        means, gaps = [], []
        for start in range(0, max(q, 1), chunk):
            place = query.position[:, :, start : start + chunk]
            mean, gap, _ = known.at(time[..., None].expand(place.shape[:3]).flatten(1), place.flatten(1, 2))
            means.append(mean.unflatten(1, (s, -1)))
            gaps.append(gap.unflatten(1, (s, -1)))
        return torch.cat(means, 2), torch.cat(gaps, 2)
