"""Inverse distance weighting (Shepard 1968) of the last frame, persisted. Exact at an observation."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.baselines.analysis import Method
from models.baselines.spatial import ByDistance, by_weights
from models.contract import DatasetInfo


class InverseDistance(ByDistance):
    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        exponent: float = Field(2.0, gt=0)
        neighbours: int | None = Field(None, ge=1)  # None: all
        ignore_moving: bool = False

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info, config.ignore_moving)
        self.config = config

    def method(self) -> Method:
        return by_weights(lambda distance: weights(distance, self.config.exponent, self.config.neighbours))


def weights(distance: Tensor, exponent: float, neighbours: int | None) -> Tensor:
    """Weights [Q,N] of distance [Q,N], rows summing to one."""
    nearest = distance.amin(1, keepdim=True)
    raw = (nearest / distance).nan_to_num(1.0) ** exponent  # relative to the nearest, so that no power overflows; 0 / 0 is the place itself
    if neighbours is not None and neighbours < distance.shape[1]:
        raw = torch.where(distance <= distance.kthvalue(neighbours, dim=1, keepdim=True).values, raw, 0.0)
    return raw / raw.sum(1, keepdim=True)
