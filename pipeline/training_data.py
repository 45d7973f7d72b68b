"""The batches of one phase of a training, each with its background: those to learn from, and the frozen validation cases."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TypeVar

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from models import background
from models.contract import EncodedFrames, FieldBatch, FieldModel, Predictor
from pipeline import device, folds
from pipeline.batches import TrainingBatches
from pipeline.cases import cases
from pipeline.encoded import EncodedBatches
from pipeline.phase import Phase, Validation
from pipeline.sensors import SensorDataset

B = TypeVar("B")


@dataclass(frozen=True)
class Backgrounds:
    """The fitted baselines that a training corrects."""

    prior: Predictor | None = None  # the one in use
    unseen: Sequence[Predictor] = ()  # copies of it, each fitted without one fold of the training data
    beside: Predictor | None = None  # a poorer one


class TrainingData:
    """Batches by number, so that epoch k starts at its own offset whatever came before, each with its background.

    The background is solved for in a loader process while the network works on the batch before. Where there are `unseen` copies of it,
    batches are drawn from the folds by turns, and the copy that has not seen the fold answers. With an `encoder`, batches hold frames as
    it encodes them now. Every other round of the folds is answered by `beside`, where there is one, until the last fifth of the steps.
    """

    def __init__(
        self, dataset: SensorDataset, backgrounds: Backgrounds, phase: Phase, seed: int, encoder: FieldModel | None = None
    ) -> None:
        self._dataset, self._prior, self._phase = dataset, backgrounds.prior, phase
        unseen = backgrounds.unseen
        self._batches: list[TrainingBatches] | list[EncodedBatches]
        if encoder is None:
            parts = [folds.within(dataset, len(unseen), fold) for fold in range(len(unseen))] or [dataset]
            self._batches = [TrainingBatches(part, phase.windows, seed) for part in parts]
        else:
            self._batches = [EncodedBatches(dataset, phase.windows, seed, encoder, device.name())]
        self._priors: list[Predictor | None] = list(unseen) or [backgrounds.prior]
        self._beside = backgrounds.beside

    def batch(self, number: int, processes: int = 1) -> FieldBatch | EncodedFrames:
        """Training batch `number` of a phase that so many processes share, with its background or of encoded frames."""
        turn = number % len(self._batches)
        batch = self._batches[turn][number]
        if isinstance(batch, EncodedFrames):
            return batch
        whole = self._phase.steps * self._phase.accumulate * processes
        poorer = self._beside is not None and number // len(self._batches) % 2 == 0 and number < 0.8 * whole
        return _with_background(batch, self._beside if poorer else self._priors[turn])

    def epoch(self, number: int, rank: int, processes: int) -> DataLoader[FieldBatch | EncodedFrames]:
        """The batches of an epoch for process `rank` of so many."""
        length = self._phase.validate_every * self._phase.accumulate
        first = number * length * processes
        numbers = range(first + rank, first + length * processes, processes)
        return DataLoader(_ByNumber(partial(self.batch, processes=processes), numbers), batch_size=None, num_workers=loaders())

    def validation(self) -> DataLoader[FieldBatch]:
        """The frozen cases that choose the weights."""
        return DataLoader(_ByNumber(self._frozen.__getitem__, range(len(self._frozen))), batch_size=None)

    @cached_property
    def _frozen(self) -> list[FieldBatch]:
        chosen = validation_cases(self._dataset, self._phase.windows.context_frames, self._phase.validation, self._prior)
        return [batch for batch, _ in chosen]


def validation_cases(
    dataset: SensorDataset, context_frames: int, chosen: Validation, prior: Predictor | None
) -> Iterator[tuple[FieldBatch, np.ndarray]]:
    """Some of the frozen validation cases, and some of their points, with their background; and the block [B] of each case."""
    for part in cases(dataset, "validation", context_frames, chosen.leads, chosen.batch, limit=chosen.max_cases):
        step = -(-part.batch.query.mask.shape[2] // chosen.max_points)
        yield _with_background(FieldBatch(part.batch.context, part.batch.query.points(slice(None, None, step))), prior), part.block


def _with_background(batch: FieldBatch, prior: Predictor | None) -> FieldBatch:
    """The batch with its query's background filled in, where there is one."""
    return batch if prior is None else FieldBatch(batch.context, background.attach(prior, batch.context, batch.query))


class _ByNumber(Dataset[B]):
    """Batches `make(number)`, one after the other."""

    def __init__(self, make: Callable[[int], B], numbers: Sequence[int]) -> None:
        self.make, self.numbers = make, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> B:
        return self.make(self.numbers[index])


def loaders() -> int:
    """Processes that prepare batches: one of the cores on a CPU, four beside a GPU."""
    return 4 if torch.cuda.is_available() else min(1, cores() - 1)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
