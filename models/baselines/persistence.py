"""Persistence: a fixed sensor keeps its last value; anywhere else holds what its nearest observation last said.

The value is searched back over all context frames. Interpolation that is then persisted is `inverse_distance` or `kriging`.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict
from torch import Tensor

from models.baselines.analysis import Method, latest
from models.baselines.spatial import ByDistance, by_weights
from models.contract import DatasetInfo, Frames


class Persistence(ByDistance):
    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config

    def seen(self, context: Frames) -> Frames:
        return latest(context)

    def method(self) -> Method:
        return by_weights(_nearest)


def _nearest(distance: Tensor) -> Tensor:
    """Weights [Q,N]: one at the smallest of distance [Q,N], shared among equals."""
    closest = (distance == distance.amin(1, keepdim=True)).double()
    return closest / closest.sum(1, keepdim=True)
