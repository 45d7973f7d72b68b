"""Persistence: a fixed sensor keeps its last value, searched back over all context frames; any other place has its nearest observation's.

Interpolation that is then persisted is `inverse_distance` or `kriging`.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from models.baselines.analysis import Method
from models.baselines.spatial import ByDistance, by_weights
from models.contract import DatasetInfo


class Persistence(ByDistance):
    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config

    def keeps(self, age: Tensor, variance: Tensor) -> Tensor:
        return age.isfinite()

    def method(self) -> Method:
        return by_weights(_nearest)


def _nearest(distance: Tensor) -> Tensor:
    """Weights [Q,N]: one at the smallest of distance [Q,N], shared among equals."""
    closest = (distance == distance.amin(1, keepdim=True)).double()
    return closest / closest.sum(1, keepdim=True)
