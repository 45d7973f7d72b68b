"""Cross-fitting of baselines that are to be a background.

A baseline with many parameters is closer to the windows it was fitted to than to new ones, and a field model that learns on top of it there
learns little. So the training frames are cut into K folds. Copy k of the baseline is fitted to windows with no frame in fold k, and a
training window inside fold k gets its background from it; validation, test and use take the baseline that was fitted to everything.
(Out-of-fold predictions as in stacking: Wolpert, "Stacked generalization", Neural Networks 5, 1992.)
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pipeline.sensors import GAP, TRAIN, SensorDataset


def folds(dataset: SensorDataset, count: int) -> np.ndarray:
    """Fold 0..count-1 [M] of each training frame, -1 for the others: whole trajectories where there are enough, else stretches of time."""
    frame = np.flatnonzero(np.asarray(dataset["frame/split"]) == TRAIN)
    trajectories, rank = np.unique(dataset.trajectory_of(frame), return_inverse=True)
    out = np.full(dataset.n_frames, -1)
    out[frame] = rank * count // len(trajectories) if len(trajectories) >= count else np.arange(len(frame)) * count // len(frame)
    return out


def without(dataset: SensorDataset, count: int, fold: int) -> SensorDataset:
    """The dataset with the other folds for training."""
    number = folds(dataset, count)
    return _only(dataset, (number >= 0) & (number != fold))


def within(dataset: SensorDataset, count: int, fold: int) -> SensorDataset:
    """The dataset with this fold for training."""
    return _only(dataset, folds(dataset, count) == fold)


def _only(dataset: SensorDataset, kept: np.ndarray) -> SensorDataset:
    """Training frames that are not kept become a gap, which no window crosses."""
    split = np.asarray(dataset["frame/split"])
    return replace(dataset, arrays={**dataset.arrays, "frame/split": np.where((split == TRAIN) & ~kept, GAP, split)})
