"""The smallest honest field model: a network of the query's position, lead and mean context value. Its dropout needs its seeds."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from models.contract import TASKS, DatasetInfo, FieldBatch, FieldModel, FieldPrediction, Frames


class Tiny(FieldModel):
    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")
        width: int = 16

    tasks = frozenset(TASKS)
    levels = ()

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__()
        self.info = info
        inputs = len(info.space) + 1 + len(info.variables)
        self.network = nn.Sequential(
            nn.Linear(inputs, config.width), nn.GELU(), nn.Dropout(0.1), nn.Linear(config.width, len(info.variables))
        )

    def loss(self, batch: FieldBatch) -> dict[str, Tensor]:
        assert batch.query.value is not None
        error = (self.predict(batch.context, batch.query).mean - batch.query.value).square().mean(-1)
        mean = (error * batch.query.mask).sum() / batch.query.mask.sum().clamp(min=1)
        return {"loss": mean, "mse": mean.detach()}

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        assert context.value is not None
        weight = context.mask[..., None].to(context.value.dtype)
        level = (context.value * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)  # [B,C]
        b, s, q, _ = query.position.shape
        lead = ((query.time - context.time[:, -1:]) / self.info.step).to(query.position.dtype)
        features = [query.position, lead[:, :, None, None].expand(b, s, q, 1), level[:, None, None].expand(b, s, q, -1)]
        mean = self.network(torch.cat(features, -1))
        return FieldPrediction(mean if query.background is None else mean + query.background)


class TwoPhases(Tiny):
    """The whole network first, its last layer once more; it takes no background."""

    phases = ("fit", "refine")
    corrects = False

    def begin(self, phase: str) -> None:
        for parameter in self.network[0].parameters():
            parameter.requires_grad_(phase == "fit")
