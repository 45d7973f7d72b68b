"""Climatology: mean and standard deviation by local hour of the day, per fixed sensor, pooled over all of them anywhere else.

A dataset without a calendar (a simulation) has one hour: the mean field is a constant. What is observed now is not used.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.baselines.fitted import FLOOR, Fitted
from models.contract import DatasetInfo, FieldBatch, FieldPrediction, Frames


class Climatology(Fitted):
    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        least: int = Field(10, ge=1)  # training values a sensor needs in an hour; below, the pooled climate of that hour stands in

    parts = ("mean", "std")  # [K+1,H,C]; the last row is pooled

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config
        self.hours = 24 if info.time_unit == "h" and info.time_origin else 1

    def fit(self, batches: Iterable[FieldBatch]) -> None:
        """Count every answered question. Hours without any value take the mean over all hours."""
        channels, pooled = len(self.info.variables), self.info.n_sensors
        count = torch.zeros(pooled + 1, self.hours, 1, dtype=torch.float64)
        total = torch.zeros(pooled + 1, self.hours, channels, dtype=torch.float64)
        square = torch.zeros_like(total)
        for batch in batches:
            query = batch.query
            assert query.value is not None
            value = query.value[query.mask].double()
            sensor, hour = self._sensor(query)[query.mask], self._hour(query)[query.mask]
            for row in (sensor[sensor < pooled], torch.full_like(sensor, pooled)):
                use = slice(None) if len(row) == len(sensor) else sensor < pooled
                at = (row, hour[use])
                count.index_put_(at, torch.ones(len(row), 1, dtype=torch.float64), accumulate=True)
                total.index_put_(at, value[use], accumulate=True)
                square.index_put_(at, value[use].square(), accumulate=True)
        if not count[pooled].any():
            raise ValueError(f"{self.info.name}: no training batch holds an answered question: there is no climate to take the mean of")
        mean, std = _moments(count, total, square)
        overall_mean, overall_std = _moments(count[pooled].sum(0), total[pooled].sum(0), square[pooled].sum(0))
        few = count[pooled] < self.config.least
        mean[pooled], std[pooled] = torch.where(few, overall_mean, mean[pooled]), torch.where(few, overall_std, std[pooled])
        few = count < self.config.least
        self._state = {"mean": torch.where(few, mean[pooled], mean), "std": torch.where(few, std[pooled], std).clamp(min=FLOOR)}

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        at = (self._sensor(query), self._hour(query))
        dtype = query.position.dtype
        return FieldPrediction(self.tensor("mean", query.position)[at].to(dtype), self.tensor("std", query.position)[at].to(dtype))

    def _sensor(self, query: Frames) -> Tensor:
        """Row of the tables [B,S,Q]."""
        pooled = self.info.n_sensors
        if query.sensor is None:
            return torch.full(query.mask.shape, pooled, device=query.mask.device)
        return torch.where(query.sensor >= 0, query.sensor, pooled)

    def _hour(self, query: Frames) -> Tensor:
        """Local hour of the day [B,S,Q], 0 where there is no calendar."""
        if self.hours == 1:
            return torch.zeros_like(query.mask, dtype=torch.int64)
        return local_hour(self.info, query.time).floor().long()[..., None].expand(query.mask.shape)


def local_hour(info: DatasetInfo, time: Tensor) -> Tensor:
    """Local hour of the day in [0, 24) of hours since info.time_origin (an ISO 8601 text with Z)."""
    hour, minute = (int(part) for part in info.time_origin.partition("T")[2][:5].split(":"))
    return (time + info.utc_offset + hour + minute / 60) % 24


def _moments(count: Tensor, total: Tensor, square: Tensor) -> tuple[Tensor, Tensor]:
    mean = total / count.clamp(min=1)
    return mean, (square / count.clamp(min=1) - mean.square()).clamp(min=FLOOR**2).sqrt()
