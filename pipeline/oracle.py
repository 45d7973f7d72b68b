"""What is known exactly: the conditional distribution of a Gaussian process whose kernel parameters the dataset carries.

No model can have a lower expected NLL, so its row in a score table is the floor.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from models.contract import TASKS, DatasetInfo, FieldPrediction, Frames
from pipeline.cases import CaseBatch
from pipeline.gaussian_process import Process
from pipeline.sensors import SensorDataset


@dataclass(frozen=True)
class Oracle:
    """Predicts the cases of a dataset of Gaussian process tasks, each with the kernel it was drawn from."""

    dataset: SensorDataset
    tasks: frozenset[str] = frozenset(TASKS)
    levels: tuple[float, ...] = ()

    def of(self, part: CaseBatch) -> _Knowing:
        """The predictor of these cases."""
        recipe, info = self.dataset.recipe, self.dataset.info
        owner = self.dataset.trajectory_of(np.asarray(self.dataset["cases/frame"])[part.index])
        processes = tuple(
            Process(recipe["simulation"]["kernel"], dict(zip(recipe["drawn"], row, strict=True)), recipe["simulation"]["jitter"])
            for row in np.asarray(self.dataset["trajectory/parameter"])[owner].tolist()
        )
        return _Knowing(processes, info, recipe["tasks"]["noise"])


def of_dataset(dataset: SensorDataset) -> Oracle | None:
    """The oracle of a dataset, None where its process is not known."""
    simulation: Mapping[str, object] = dataset.recipe.get("simulation", {})
    return Oracle(dataset) if simulation.get("equation") == "gaussian_process" else None


@dataclass
class _Knowing:
    """Knows the process [B] of each sample, and the noise of context values in physical units."""

    processes: tuple[Process, ...]
    info: DatasetInfo
    noise: float
    tasks: frozenset[str] = frozenset(TASKS)
    levels: tuple[float, ...] = ()

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        """See models.contract.Predictor; mean and scale in model units."""
        assert context.value is not None
        mean, scale = torch.zeros(2, *query.mask.shape, 1)
        centre, width = self.info.mean[0], self.info.std[0]
        for b, process in enumerate(self.processes):
            seen, asked = context.mask[b], query.mask[b]
            value = context.value[b][seen].double().numpy()[:, 0] * width + centre
            m, s = process.given(self._places(context, b), value, self._places(query, b), self.noise)
            mean[b][asked], scale[b][asked] = (torch.from_numpy(x).float()[:, None] for x in ((m - centre) / width, s / width))
        return FieldPrediction(mean, scale=scale)

    def _places(self, frames: Frames, b: int) -> np.ndarray:
        """Rows (x, y, t) of the valid points of a sample, in physical units."""
        mask = frames.mask[b]
        place = frames.position[b][mask].double().numpy() * self.info.half_extent + np.asarray(self.info.centre)
        return np.column_stack([place, frames.time[b][:, None].expand(mask.shape)[mask].numpy()])
