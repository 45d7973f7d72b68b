"""Training windows of frames that are encoded once, for the phases in which a model learns how its own encoded frames follow each other
(FieldModel.follows).

The encoding parts do not learn in such a phase, so what a frame is encoded to does not change: asking once, before the phase, is the same
as asking at every step, provided that nothing of a frame is hidden or disturbed at random. What is kept depends on the weights that the
phase begins with alone, so a resumed phase makes it anew.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from models.contract import EncodedFrames, FieldModel
from pipeline.batches import TrainingBatches, Windows
from pipeline.sensors import SensorDataset

_FRAMES = 64  # encoded at a time


class EncodedBatches:
    """The windows that TrainingBatches draws, as encoded frames: those of the context and of leads 0, 1, ..., max_lead."""

    def __init__(self, dataset: SensorDataset, windows: Windows, seed: int, network: FieldModel, device: torch.device | str) -> None:
        if not windows.undisturbed:
            raise ValueError("frames can be encoded once only where nothing is hidden: leave out drop, hide, context_points, context_noise")
        self._batches = TrainingBatches(dataset, windows, seed)
        self._offsets = np.arange(1 - windows.context_frames, windows.max_lead + 1)
        self._number = np.unique(self._batches.anchors[:, None] + self._offsets)  # of the frames kept
        self._kept = _encoded(network, self._batches, self._number, device)

    def __getitem__(self, step: int) -> EncodedFrames:
        frame = self._batches.ends(self._batches.generator(step))[:, None] + self._offsets
        row = torch.from_numpy(np.searchsorted(self._number, frame))
        return EncodedFrames(self._kept.value[row], self._kept.mask[row], self._kept.time[row])


@torch.no_grad()
def _encoded(network: FieldModel, batches: TrainingBatches, number: np.ndarray, device: torch.device | str) -> EncodedFrames:
    """All frames on the CPU, one after another: value [n,...], mask [n], time [n]."""
    training, network = network.training, network.to(device).eval()
    parts = []
    for start in range(0, len(number), _FRAMES):
        encoded = network.encode(batches.alone(number[start : start + _FRAMES], start).to(device)).to("cpu")
        parts.append((encoded.value[:, 0], encoded.mask[:, 0], encoded.time[:, 0]))
    network.train(training)
    columns: list[Tensor] = [torch.cat(column) for column in zip(*parts, strict=True)]
    return EncodedFrames(*columns)
