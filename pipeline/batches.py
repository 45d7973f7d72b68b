"""Windows of a sensor dataset as batches: those a model is trained on, and one that is asked anywhere.

A *window* is `context_frames` consecutive frames that end at its frame, and leads counted from there. Training windows lie
inside one trajectory and one split as a whole; evaluation cases are in pipeline/cases.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from pydantic import Field, model_validator

from models.contract import FieldBatch, Frames
from pipeline.params import Section
from pipeline.query_covariates import query_covariate
from pipeline.rows import Rows, model_position, tensor
from pipeline.sensors import SPLITS, SensorDataset


class Windows(Section):
    """How training windows are drawn; part of the params of train and baselines."""

    context_frames: int = Field(default=1, ge=1)
    max_lead: int = Field(ge=0)  # frames; leads are drawn from min_lead..max_lead
    min_lead: int = 0  # frames; negative: questions about the frames of the context before the last one
    batch: int = Field(ge=1)
    query_frames: int = Field(default=1, ge=1)  # leads a sample is asked for
    query_points: int | None = Field(default=None, ge=1)  # points drawn from the dense truth, or of a frame; None: what was reported
    drop: float = Field(default=0.0, ge=0, lt=1)  # share of context observations hidden at random
    hide: int = Field(default=0, ge=0)  # up to so many whole fixed sensors hidden from the context, and asked for
    context_points: tuple[int, int] | None = None  # [least, most) random points of each frame are the context, the rest can be asked
    context_noise: float = Field(default=0.0, ge=0)  # standard deviation, in model units, of what is added to context values
    hold: float = Field(default=0.0, ge=0, lt=1)  # share of what was reported that is hidden from the whole window, and alone asked for
    hold_places: bool = False  # whole places are held, and not single observations
    trajectories: int | None = Field(default=None, ge=1)  # distinct trajectories in a batch, each with batch / trajectories windows

    @model_validator(mode="after")
    def _whole_groups(self) -> Windows:
        if self.trajectories and self.batch % self.trajectories:
            raise ValueError(f"batch {self.batch} is not a multiple of trajectories {self.trajectories}")
        if self.min_lead > self.max_lead:
            raise ValueError(f"min_lead {self.min_lead} is above max_lead {self.max_lead}")
        if self.min_lead <= -self.context_frames:
            first = 1 - self.context_frames
            raise ValueError(f"min_lead is {self.min_lead}, but a window of {self.context_frames} frames begins at {first}")
        if self.context_points is not None:
            low, high = self.context_points
            if not 0 <= low < high:
                raise ValueError(f"context_points must be [least, most) with 0 <= least < most, found {[low, high]}")
            if self.drop or self.hide:
                raise ValueError("context_points already hides all other points: leave out drop and hide")
        if self.hold and (self.drop or self.hide or self.context_points or self.query_points):
            raise ValueError("hold says what is hidden and asked: leave out drop, hide, context_points and query_points")
        return self

    @property
    def undisturbed(self) -> bool:
        """Whether a frame of the context is the same in every window it is in."""
        return not (self.drop or self.hide or self.context_noise) and self.context_points is None


class TrainingBatches:
    """An endless sequence of training batches; number `step` depends on (seed, step) alone, so a resumed run sees what it would have seen.

    Questions: the role-0 fixed sensors; or, with `query_points`, that many grid points of the dense truth, the same for the whole
    batch; or, where all context sensors move, what they reported. Windows of one trajectory lie side by side in the batch.
    With `context_points` and no dense truth: of each frame the points that are not in the context, at most `query_points` of them.
    With `hold`: what is held.
    """

    def __init__(self, dataset: SensorDataset, windows: Windows, seed: int, split: str = "train") -> None:
        self.windows, self.seed = windows, seed
        self._rows = Rows(dataset)
        if windows.context_points is not None and dataset.info.n_sensors:
            raise ValueError(f"context_points is for moving sensors, {dataset.info.name} has {dataset.info.n_sensors} fixed ones: use hide")
        if windows.query_points is not None and not dataset.has_truth and windows.context_points is None:
            raise ValueError(f"query_points is {windows.query_points}, but {dataset.info.name} has no dense truth: leave it out")
        if windows.query_points is not None and dataset.has_truth and windows.query_points > len(dataset["truth/position"]):
            raise ValueError(f"query_points is {windows.query_points}, but the truth has only {len(dataset['truth/position'])} points")
        if windows.hide and windows.hide >= len(self._rows.context_sensors):
            raise ValueError(f"hide is {windows.hide}, but {dataset.info.name} has {len(self._rows.context_sensors)} fixed context sensors")
        self.anchors = anchors(dataset, split, windows.context_frames, windows.max_lead)  # frames at which a window may end
        if not len(self.anchors):
            needed = windows.context_frames + windows.max_lead
            raise ValueError(f"{dataset.info.name}: no {split} window fits: {needed} consecutive frames are needed in one trajectory")
        owner = dataset.trajectory_of(self.anchors)
        self._first = np.flatnonzero(np.diff(owner, prepend=-1))  # first anchor of each trajectory that has one
        self._count = np.diff(np.append(self._first, len(owner)))

    def generator(self, step: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, step]))

    def ends(self, rng: np.random.Generator) -> np.ndarray:
        """The frames [B] at which the windows of a batch end; the first draw of its generator."""
        w = self.windows
        if not w.trajectories:
            return self.anchors[rng.integers(0, len(self.anchors), w.batch)]
        groups = rng.choice(len(self._first), w.trajectories, replace=w.trajectories > len(self._first))
        groups = np.repeat(groups, w.batch // w.trajectories)
        return self.anchors[self._first[groups] + rng.integers(0, self._count[groups])]

    def alone(self, frames: np.ndarray, number: int) -> FieldBatch:
        """Frames [B], each windows of their own, asked at lead 0; `number` decides which points of the dense truth are asked."""
        return FieldBatch(self._rows.context(frames, 1), self._query(frames[:, None], self.generator(number)))

    def __getitem__(self, step: int) -> FieldBatch:
        w, rng = self.windows, self.generator(step)
        frame = self.ends(rng)
        every = np.arange(w.min_lead, w.max_lead + 1)
        leads = rng.permuted(np.broadcast_to(every, (w.batch, len(every))), axis=1)[:, : w.query_frames]
        if w.query_frames > len(every):  # more questions than leads: repeat some
            leads = rng.integers(w.min_lead, w.max_lead + 1, (w.batch, w.query_frames))
        asked = frame[:, None] + np.sort(leads, axis=1)
        if w.context_points is not None:
            seen = frame[:, None] + np.arange(1 - w.context_frames, 1)
            context, rows = self._rows.some(seen, rng.integers(*w.context_points, seen.shape), rng)
            if self._rows.dataset.has_truth:
                return FieldBatch(self._noisy(context, rng), self._query(asked, rng))
            most = np.full(asked.shape, w.query_points or np.iinfo(np.int64).max)
            return FieldBatch(self._noisy(context, rng), self._rows.some(asked, most, rng, without=rows)[0])
        if w.hold:
            held = self._rows.held(w.batch, w.hold, w.hold_places, rng)
            context = self._rows.context(frame, w.context_frames, shown=~held)
            return FieldBatch(self._noisy(context, rng), self._rows.picked(asked, np.ones(asked.shape, bool), frame, held))
        context = self._rows.context(frame, w.context_frames, self._hidden(rng), w.drop, rng)
        return FieldBatch(self._noisy(context, rng), self._query(asked, rng))

    def _noisy(self, context: Frames, rng: np.random.Generator) -> Frames:
        if not self.windows.context_noise or context.value is None:
            return context
        noise = self.windows.context_noise * torch.from_numpy(rng.standard_normal(context.value.shape, np.float32))
        return replace(context, value=context.value + noise * context.mask[..., None])

    def _hidden(self, rng: np.random.Generator) -> np.ndarray | None:
        """[B,K] True where a fixed sensor is hidden for the whole window."""
        if not self.windows.hide:
            return None
        eligible = self._rows.context_sensors
        order = rng.random((self.windows.batch, len(eligible))).argsort(axis=1).argsort(axis=1)
        hidden = np.zeros((self.windows.batch, self._rows.n_sensors), bool)
        hidden[:, eligible] = order < rng.integers(0, self.windows.hide + 1, (self.windows.batch, 1))
        return hidden

    def _query(self, frames: np.ndarray, rng: np.random.Generator) -> Frames:
        rows, known = self._rows, np.ones(frames.shape, bool)
        if self.windows.query_points is not None:
            points = np.sort(rng.choice(len(rows.dataset["truth/position"]), self.windows.query_points, replace=False))
            return rows.truth(frames, known, points)
        if len(rows.context_sensors):
            return rows.fixed(frames, known, rows.context_sensors)
        return rows.reported(frames)


def at_points(dataset: SensorDataset, frame: int, context_frames: int, position: np.ndarray, leads: Sequence[int]) -> FieldBatch:
    """One window that ends at `frame`, asked at `position` [P,D] (physical units of info.position_unit); answers are not known."""
    rows, info = Rows(dataset), dataset.info
    if not 0 <= frame < dataset.n_frames:
        raise ValueError(f"frame {frame} is outside 0..{dataset.n_frames - 1} of {info.name}")
    if position.ndim != 2 or position.shape[1] != len(info.space):
        raise ValueError(f"position must be [P,{len(info.space)}], found {position.shape}")
    anchor = np.array([frame])
    target = anchor[:, None] + np.asarray(leads)
    shape = (1, len(leads), len(position))
    time = rows.time(target, anchor)
    query = Frames(
        position=tensor(model_position(info, position)).expand(*shape, -1),
        mask=torch.ones(shape, dtype=torch.bool),
        time=tensor(time),
        covariate=query_covariate(info, time, len(position)),
        sensor=torch.full(shape, -1, dtype=torch.int64),
    )
    return FieldBatch(rows.context(anchor, context_frames), query)


def anchors(dataset: SensorDataset, split: str, context_frames: int, max_lead: int) -> np.ndarray:
    """Frames at which a window ends whose context and all leads 0..max_lead lie in one trajectory and one split."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: expected one of {', '.join(SPLITS)}")
    inside = np.asarray(dataset["frame/split"]) == SPLITS[split]
    owner = dataset.trajectory_of(np.arange(dataset.n_frames))
    # A stretch is a run of frames of one trajectory inside the split; a window fits where its ends lie in the same stretch.
    change = np.flatnonzero(np.diff(owner) | (np.diff(inside.astype(int)) != 0)) + 1
    stretch = np.zeros(dataset.n_frames, np.int64)
    stretch[change] = 1
    stretch = np.cumsum(stretch)
    frame = np.arange(context_frames - 1, dataset.n_frames - max_lead)
    return frame[inside[frame] & (stretch[frame - context_frames + 1] == stretch[frame + max_lead])]
