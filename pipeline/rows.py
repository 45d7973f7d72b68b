"""Rows of a sensor dataset, gathered for windows without a Python loop over observations: padded to the longest frame of the batch, in
model units.

Context: what moving sensors and fixed sensors of role 0 reported. Held-out sensors and observations are never in it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.contract import DatasetInfo, Frames
from pipeline.query_covariates import query_covariate
from pipeline.sensors import ASKED, CONTEXT, SEEN, SensorDataset


class Rows:
    """Gathers rows of one dataset."""

    def __init__(self, dataset: SensorDataset) -> None:
        self.dataset, self.info = dataset, dataset.info
        self.n_sensors = dataset.info.n_sensors
        self._start = np.asarray(dataset["frame/obs_start"])
        self._time = np.asarray(dataset["frame/time"], dtype=np.float64)
        self._bounds = np.asarray(dataset["trajectory/frame_start"])
        role = np.asarray(dataset["sensor/role"]) if self.n_sensors else np.zeros(0, np.int8)
        self.context_sensors = np.flatnonzero(role == CONTEXT)
        self._place: np.ndarray | None = None  # [O] number of each row's place, once asked for
        self._visible: np.ndarray | None = None  # row numbers a model may see, None: all
        self._visible_start = self._start
        of_row = np.asarray(dataset["obs/role"][...]) if "obs/role" in dataset else np.zeros(0, np.int8)
        if (role != CONTEXT).any() or (of_row == ASKED).any():
            sensor = np.asarray(dataset["obs/sensor"][...])
            seen = (sensor < 0) | (np.append(role, CONTEXT)[sensor] == CONTEXT)
            if len(of_row):
                seen &= of_row != ASKED
            self._visible = np.flatnonzero(seen)
            self._visible_start = np.concatenate([[0], np.cumsum(seen)])[self._start]

    def time(self, frames: np.ndarray, anchor: np.ndarray) -> np.ndarray:
        """Time [B,S] of frames, carried on at the nominal step where they lie outside the trajectory of anchor [B]."""
        owner = self.dataset.trajectory_of(anchor)
        inside = np.clip(frames, self._bounds[owner][:, None], self._bounds[owner + 1][:, None] - 1)
        return self._time[inside] + (frames - inside) * self.info.step

    def context(
        self,
        anchor: np.ndarray,
        context_frames: int,
        hidden: np.ndarray | None = None,
        drop: float = 0.0,
        rng: np.random.Generator | None = None,
        shown: np.ndarray | None = None,
    ) -> Frames:
        """What could be seen in the frames [B,T] that end at anchor [B]; frames before the trajectory began are empty. `shown` [B,O] is
        True at the rows that a sample may see."""
        frames = anchor[:, None] + np.arange(1 - context_frames, 1)
        known = frames >= self._bounds[self.dataset.trajectory_of(anchor)][:, None]
        row, mask = _spread(self._visible_start, np.where(known, frames, anchor[:, None]), known)
        if self._visible is not None:
            row = self._visible[row] if len(self._visible) else row
        sensor = _take(self.dataset["obs/sensor"], row, mask).astype(np.int64)
        if hidden is not None:
            mask = mask & ~(hidden[np.arange(len(anchor))[:, None, None], sensor] & (sensor >= 0))
        if shown is not None:
            mask = mask & shown[np.arange(len(anchor))[:, None, None], row]
        if drop and rng is not None:
            mask = mask & (rng.random(mask.shape) >= drop)
        return self._frames(row, mask, sensor, self.time(frames, anchor), context=True)

    def some(
        self, frames: np.ndarray, most: np.ndarray, rng: np.random.Generator, without: np.ndarray | None = None
    ) -> tuple[Frames, np.ndarray]:
        """At most `most` [B,S] of what is visible in frames [B,S], at random and in random order, with their answers; and the rows [B,n]
        they are. Rows that `without` [B,n] has for the same sample are left out."""
        row, mask = _spread(self._visible_start, frames, np.ones(frames.shape, bool))
        if self._visible is not None:
            row = self._visible[row] if len(self._visible) else row
        if without is not None:
            sample = len(self.dataset["obs/sensor"]) * np.arange(len(frames))  # two samples may share a frame
            mask &= ~np.isin(row + sample[:, None, None], (without + sample[:, None])[without >= 0])
        order = np.where(mask, rng.random(mask.shape), 2.0).argsort(axis=-1)[..., : max(1, int(most.max()))]
        row, mask = np.take_along_axis(row, order, -1), np.take_along_axis(mask, order, -1)
        mask &= np.arange(mask.shape[-1]) < most[..., None]
        width = max(1, int(mask.sum(axis=-1).max()))
        row, mask = row[..., :width], mask[..., :width]
        taken = np.where(mask, row, -1).reshape(len(frames), -1)
        sensor = np.full(mask.shape, -1, np.int64)
        return self._frames(row, mask, sensor, self._time[frames], context=without is None), taken

    def asked(self, frames: np.ndarray, known: np.ndarray, anchor: np.ndarray) -> tuple[Frames, np.ndarray]:
        """The observations to be asked in frames [B,S], and their role [B,S,Q]; `known` [B,S] False hides all."""
        row, mask = _spread(self._start, np.clip(frames, 0, self.dataset.n_frames - 1), known)
        row, mask = _compressed(row, mask & (_take(self.dataset["obs/role"], row, mask) != SEEN))
        role = _take(self.dataset["obs/role"], row, mask)
        sensor = _take(self.dataset["obs/sensor"], row, mask).astype(np.int64)
        return self._frames(row, mask, sensor, self.time(frames, anchor), context=False), role

    def picked(self, frames: np.ndarray, known: np.ndarray, anchor: np.ndarray, wanted: np.ndarray) -> Frames:
        """The rows that `wanted` [B,O] marks in frames [B,S], as questions with their answers; `known` [B,S] False hides all."""
        row, mask = _spread(self._start, np.clip(frames, 0, self.dataset.n_frames - 1), known)
        row, mask = _compressed(row, mask & wanted[np.arange(len(frames))[:, None, None], row])
        sensor = _take(self.dataset["obs/sensor"], row, mask).astype(np.int64)
        return self._frames(row, mask, sensor, self.time(frames, anchor), context=False)

    def of_cases(self, what: str, index: np.ndarray) -> np.ndarray:
        """[B,O] True at the rows that cases `index` [B] have in `what`: "seen" or "asked"."""
        start, row = self.dataset[f"cases/{what}_start"], self.dataset[f"cases/{what}"]
        out = np.zeros((len(index), len(self.dataset["obs/sensor"])), bool)
        for b, case in enumerate(index):
            out[b, row[start[case] : start[case + 1]]] = True
        return out

    def held(self, samples: int, share: float, places: bool, rng: np.random.Generator) -> np.ndarray:
        """[B,O] True at rows drawn for each sample, one by one or whole places at a time."""
        if not places:
            return rng.random((samples, len(self.dataset["obs/sensor"])), np.float32) < share
        if self._place is None:
            self._place = np.unique(np.asarray(self.dataset["obs/position"][...]), axis=0, return_inverse=True)[1].ravel()
        return (rng.random((samples, int(self._place.max()) + 1)) < share)[:, self._place]

    def reported(self, frames: np.ndarray) -> Frames:
        """Everything visible in frames [B,S], as questions with their answers."""
        row, mask = _spread(self._visible_start, frames, np.ones(frames.shape, bool))
        if self._visible is not None:
            row = self._visible[row] if len(self._visible) else row
        sensor = _take(self.dataset["obs/sensor"], row, mask).astype(np.int64)
        return self._frames(row, mask, sensor, self._time[frames], context=False)

    def fixed(self, frames: np.ndarray, known: np.ndarray, which: np.ndarray, anchor: np.ndarray | None = None) -> Frames:
        """The fixed sensors `which` [Q] in frames [B,S], with the answers of those that reported; `known` [B,S] False hides all."""
        row, mask = _spread(self._start, np.clip(frames, 0, self.dataset.n_frames - 1), known)
        sensor = _take(self.dataset["obs/sensor"], row, mask)
        column = np.full(self.n_sensors + 1, -1)  # the last entry serves sensor -1
        column[which] = np.arange(len(which))
        mask &= column[sensor] >= 0
        b, s, _ = at = np.nonzero(mask)
        c = column[sensor[at]]
        shape = (*frames.shape, len(which))
        value, answered = np.zeros((*shape, len(self.info.variables)), np.float32), np.zeros(shape, bool)
        value[b, s, c] = self._model_value(_take(self.dataset["obs/value"], row[at]))
        answered[b, s, c] = True
        time = self._time[frames] if anchor is None else self.time(frames, anchor)
        ahead = np.zeros((*shape, len(self.info.context_covariates)), np.float32)
        ahead[b, s, c] = _take(self.dataset["obs/covariate"], row[at])
        return self._query(np.asarray(self.dataset["sensor/position"])[which], value, answered, time, which, ahead)

    def truth(self, frames: np.ndarray, known: np.ndarray, points: np.ndarray | None, anchor: np.ndarray | None = None) -> Frames:
        """Dense truth in frames [B,S] at `points` [Q] (None: all); missing truth is masked out."""
        array = self.dataset["truth/value"]
        inside = np.clip(frames, 0, self.dataset.n_frames - 1)
        if isinstance(array, np.ndarray):
            value = array[inside] if points is None else array[inside[..., None], points]
        else:  # lazy: each frame is read once
            unique, inverse = np.unique(inside, return_inverse=True)
            columns = slice(None) if points is None else points
            value = array.oindex[unique, columns][inverse.reshape(inside.shape)]
        answered = np.isfinite(value).all(axis=-1) & known[..., None]
        value = np.where(answered[..., None], self._model_value(value), np.float32(0))
        position = np.asarray(self.dataset["truth/position"])
        time = self._time[frames] if anchor is None else self.time(frames, anchor)
        return self._query(position if points is None else position[points], value, answered, time, None)

    def _query(
        self,
        position: np.ndarray,
        value: np.ndarray,
        mask: np.ndarray,
        time: np.ndarray,
        sensor: np.ndarray | None,
        ahead: np.ndarray | None = None,
    ) -> Frames:
        index = np.full(mask.shape[-1], -1) if sensor is None else sensor
        place = model_position(self.info, position)
        return Frames(
            position=tensor(place).expand(*mask.shape, -1),
            mask=tensor(mask),
            time=tensor(time),
            value=tensor(value),
            covariate=query_covariate(self.info, time, mask.shape[-1], ahead),
            sensor=tensor(index.astype(np.int64)).expand(mask.shape),
        )

    def _frames(self, row: np.ndarray, mask: np.ndarray, sensor: np.ndarray, time: np.ndarray, context: bool) -> Frames:
        """Rows [B,T,N] as frames. What is masked is zero everywhere, so that nothing hidden can shine through."""
        valid = mask[..., None]
        covariate = None
        if context and self.info.context_covariates:
            covariate = tensor(np.where(valid, _take(self.dataset["obs/covariate"], row, mask), 0).astype(np.float32))
        elif not context:
            covariate = query_covariate(self.info, time, mask.shape[-1])
        return Frames(
            position=tensor(np.where(valid, model_position(self.info, _take(self.dataset["obs/position"], row, mask)), np.float32(0))),
            mask=tensor(mask),
            time=tensor(time),
            value=tensor(np.where(valid, self._model_value(_take(self.dataset["obs/value"], row, mask)), np.float32(0))),
            covariate=covariate,
            sensor=tensor(np.where(mask, sensor, -1)),
        )

    def _model_value(self, value: np.ndarray) -> np.ndarray:
        return ((value - np.asarray(self.info.mean)) / np.asarray(self.info.std)).astype(np.float32)


def _spread(start: np.ndarray, frames: np.ndarray, known: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers [B,T,N] of frames [B,T] padded to the longest, and the mask of those that exist. N is at least 1."""
    first = start[frames]
    count = np.where(known, start[frames + 1] - first, 0)
    step = np.arange(max(1, count.max(initial=0)))
    mask = step < count[..., None]
    return np.where(mask, first[..., None] + step, 0), mask


def _compressed(row: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and mask [B,S,N] with the valid ones first, and no more columns than they need (at least 1)."""
    order = np.argsort(~mask, axis=-1, kind="stable")[..., : max(1, int(mask.sum(axis=-1).max(initial=0)))]
    return np.take_along_axis(row, order, -1), np.take_along_axis(mask, order, -1)


def _take(array: Any, row: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
    """array[row], also where the array is a lazy Zarr array or has no row at all (then zeros, all masked)."""
    if not array.shape[0]:
        return np.zeros((*row.shape, *array.shape[1:]), array.dtype)
    if isinstance(array, np.ndarray):
        return array[row]
    unique, inverse = np.unique(row, return_inverse=True)
    return array.oindex[unique][inverse.reshape(row.shape)]


def model_position(info: DatasetInfo, position: np.ndarray) -> np.ndarray:
    return ((position - np.asarray(info.centre)) / info.half_extent).astype(np.float32)


def tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
