"""Small forecast folders, made by the real forecast stage from the analytic worlds with a predictor simple enough to check by hand."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel
from torch import Tensor

from models import registry
from models.contract import DatasetInfo, FieldPrediction, Frames
from pipeline import forecast, runs, sensors

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)


class Plane:
    """mean = x + y/2 + 0.01 hours, scale = 0.2 (1 + lead), all in model units; deterministic where `scale` is off."""

    class Config(BaseModel):
        scale: bool = True

    tasks = frozenset({"forecast"})
    levels: tuple[float, ...] = ()

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        self.config, self.info = config, info

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        lead = (query.time - context.time[:, -1:]).float()[..., None]
        mean = (query.position[..., 0] + query.position[..., 1] / 2 + 0.01 * lead)[..., None]
        scale = (0.2 * (1 + lead))[..., None].expand_as(mean) if self.config.scale else None
        return FieldPrediction(mean, scale)

    def state(self) -> dict[str, Tensor | str]:
        return {"nothing": torch.zeros(1)}

    def load(self, state: Mapping[str, Tensor | str]) -> None: ...


@contextmanager
def plane_registered() -> Iterator[None]:
    registry.BASELINES["plane"] = "tests.forecasts:Plane"
    try:
        yield
    finally:
        del registry.BASELINES["plane"]


def make(folder: Path, dataset: sensors.SensorDataset, scale: bool = True, **params: Any) -> Path:
    """A forecast folder `folder/forecast` by the stage itself."""
    sensors.write(folder / "sensors.zarr", dataset)
    runs.save(folder / "run", "plane", {"scale": scale}, dataset.info, {"nothing": torch.zeros(1)}, context_frames=2)
    settings = forecast.Params(**{"max_lead": 6, "every": 2, "grid": 16, **params})
    with plane_registered():
        forecast.run(settings, dataset.info.name, "plane", sensors=folder / "sensors.zarr", run=folder / "run", out=folder / "forecast")
    return folder / "forecast"
