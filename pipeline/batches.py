"""From a sensor dataset to batches: gathered by row number, padded to the longest frame of the batch, in model units.

A *window* is `context_frames` consecutive frames that end at its frame, and leads counted from there. Training windows lie
inside one trajectory and one split as a whole. An evaluation case may look back into the gap or an earlier split, since the past
is known when a forecast is made; its answers never leave their split.

Context: what moving sensors and fixed sensors of role 0 reported. Held-out sensors and observations are never in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator
from scipy.spatial import cKDTree
from torch import Tensor

from models.contract import DatasetInfo, FieldBatch, Frames
from pipeline.params import Section
from pipeline.sensors import ASKED, CONTEXT, HELD_TEST, HELD_VALIDATION, SEEN, SEEN_AND_ASKED, SPLITS, SensorDataset

QUERY_COVARIATES = ("hour_sin", "hour_cos", "doy_sin", "doy_cos")
CONTEXT_SENSOR, HELD_SENSOR, GRID_POINT = 0, 1, 2
HELD_OUT_FOR = {"train": -1, "validation": HELD_VALIDATION, "test": HELD_TEST}  # role of the sensors a split may be scored at


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
        self._rows = _Rows(dataset)
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


@dataclass(frozen=True)
class CaseBatch:
    """Some of the frozen evaluation cases of a dataset, NumPy beside the torch batch."""

    batch: FieldBatch  # query.value is the truth in model units, mask False where it is unknown
    index: np.ndarray  # [B] number of the case in the dataset
    block: np.ndarray  # [B] bootstrap block
    kind: np.ndarray  # [B,S,Q] int8: 0 context sensor, 1 held-out sensor or observation, 2 grid point
    # [B,S,Q] to the nearest observation of the last context frame, or of the frame asked for where the lead is negative; in
    # info.position_unit, inf where there is none
    distance: np.ndarray
    leads: tuple[int, ...]  # [S] frames; -3 is three frames before the last context frame


def cases(
    dataset: SensorDataset, split: str, context_frames: int, leads: Sequence[int], batch: int, limit: int | None = None
) -> Iterator[CaseBatch]:
    """The frozen cases of a split in the order stored, or `limit` of them evenly spread. The questions are the same for every model:
    all points of the dense truth where there is one, else the observations to be asked (by the case, or by their role), else the context
    sensors and the sensors held out for this split. Leads that end outside the trajectory or the split are masked out."""
    if not leads or min(leads) <= -context_frames:
        raise ValueError(f"leads must lie after {-context_frames}, where the context begins, and be at least one, found {list(leads)}")
    rows = _Rows(dataset)
    number = np.flatnonzero(np.asarray(dataset["cases/split"]) == SPLITS[split])
    if not len(number):
        raise ValueError(f"{dataset.info.name} has no {split} case: subsample made none; lower its `stride` or enlarge the split")
    by_case = "cases/asked" in dataset
    if not dataset.has_truth and not rows.n_sensors and "obs/role" not in dataset and not by_case:
        raise ValueError(f"{dataset.info.name} has no dense truth, observation to ask or fixed sensor: there is nothing to score against")
    if limit is not None and limit < len(number):
        number = number[np.linspace(0, len(number) - 1, limit).round().astype(int)]
    role = np.asarray(dataset["sensor/role"]) if rows.n_sensors else np.zeros(0, int)
    asked = np.flatnonzero((role == CONTEXT) | (role == HELD_OUT_FOR[split]))
    for start in range(0, len(number), batch):
        index = number[start : start + batch]
        frame = np.asarray(dataset["cases/frame"])[index]
        target = frame[:, None] + np.asarray(leads)
        inside = np.clip(target, 0, dataset.n_frames - 1)
        known = (target == inside) & (dataset.trajectory_of(inside) == dataset.trajectory_of(frame)[:, None])
        known &= np.asarray(dataset["frame/split"])[inside] == SPLITS[split]
        context = rows.context(frame, context_frames, shown=rows.of_cases("seen", index) if by_case else None)
        if by_case:
            query = rows.picked(target, known, frame, rows.of_cases("asked", index))
            kind = np.full(query.mask.shape[-1], HELD_SENSOR)
        elif dataset.has_truth:
            query = rows.truth(target, known, None, frame)
            kind = np.full(query.mask.shape[-1], GRID_POINT)
        elif "obs/role" in dataset:
            query, kind = rows.asked(target, known, frame)
        else:
            query = rows.fixed(target, known, asked, frame)
            kind = np.where(role[asked] == CONTEXT, CONTEXT_SENSOR, HELD_SENSOR)
        # Only single observations are asked at other places from lead to lead, and only negative leads look at other frames.
        differ = min(leads) < 0 or by_case or ("obs/role" in dataset and not dataset.has_truth)
        places = zip(query.position.transpose(0, 1) if differ else query.position[None, :, 0], leads, strict=False)
        far = np.stack([distance(dataset.info, context, position, min(lead, 0) - 1) for position, lead in places], axis=1)
        yield CaseBatch(
            batch=FieldBatch(context, query),
            index=index,
            block=np.asarray(dataset["cases/block"])[index],
            kind=np.broadcast_to(kind.astype(np.int8), query.mask.shape),
            distance=np.broadcast_to(far, query.mask.shape),
            leads=tuple(leads),
        )


def at_points(dataset: SensorDataset, frame: int, context_frames: int, position: np.ndarray, leads: Sequence[int]) -> FieldBatch:
    """One window that ends at `frame`, asked at `position` [P,D] (physical units of info.position_unit); answers are not known."""
    rows, info = _Rows(dataset), dataset.info
    if not 0 <= frame < dataset.n_frames:
        raise ValueError(f"frame {frame} is outside 0..{dataset.n_frames - 1} of {info.name}")
    if position.ndim != 2 or position.shape[1] != len(info.space):
        raise ValueError(f"position must be [P,{len(info.space)}], found {position.shape}")
    anchor = np.array([frame])
    target = anchor[:, None] + np.asarray(leads)
    shape = (1, len(leads), len(position))
    time = rows.time(target, anchor)
    query = Frames(
        position=_tensor(_model_position(info, position)).expand(*shape, -1),
        mask=torch.ones(shape, dtype=torch.bool),
        time=_tensor(time),
        covariate=_query_covariate(info, time, len(position)),
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


def distance(info: DatasetInfo, context: Frames, position: Tensor, frame: int = -1) -> np.ndarray:
    """Distance [B,Q] from model positions [B,Q,D] to the nearest observation of one context frame, the last, in info.position_unit."""
    out = np.full(position.shape[:2], np.inf)
    for b, (seen, asked) in enumerate(zip(context.position[:, frame], position, strict=True)):
        near = seen[context.mask[b, frame]].double().numpy()
        if len(near):
            wrap = (lambda p: np.mod(p + 1.0, 2.0)) if info.period else (lambda p: p)
            out[b] = cKDTree(wrap(near), boxsize=info.period).query(wrap(asked.double().numpy()))[0]
    return out * info.half_extent


class _Rows:
    """Gathers rows of a dataset for windows, without a Python loop over observations."""

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
        """The observations to be asked in frames [B,S], and their kind [B,S,Q]; `known` [B,S] False hides all."""
        row, mask = _spread(self._start, np.clip(frames, 0, self.dataset.n_frames - 1), known)
        row, mask = _compressed(row, mask & (_take(self.dataset["obs/role"], row, mask) != SEEN))
        role = _take(self.dataset["obs/role"], row, mask)
        sensor = _take(self.dataset["obs/sensor"], row, mask).astype(np.int64)
        kind = np.where(role == SEEN_AND_ASKED, CONTEXT_SENSOR, HELD_SENSOR)
        return self._frames(row, mask, sensor, self.time(frames, anchor), context=False), kind

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
        place = _model_position(self.info, position)
        return Frames(
            position=_tensor(place).expand(*mask.shape, -1),
            mask=_tensor(mask),
            time=_tensor(time),
            value=_tensor(value),
            covariate=_query_covariate(self.info, time, mask.shape[-1], ahead),
            sensor=_tensor(index.astype(np.int64)).expand(mask.shape),
        )

    def _frames(self, row: np.ndarray, mask: np.ndarray, sensor: np.ndarray, time: np.ndarray, context: bool) -> Frames:
        """Rows [B,T,N] as frames. What is masked is zero everywhere, so that nothing hidden can shine through."""
        valid = mask[..., None]
        covariate = None
        if context and self.info.context_covariates:
            covariate = _tensor(np.where(valid, _take(self.dataset["obs/covariate"], row, mask), 0).astype(np.float32))
        elif not context:
            covariate = _query_covariate(self.info, time, mask.shape[-1])
        return Frames(
            position=_tensor(np.where(valid, _model_position(self.info, _take(self.dataset["obs/position"], row, mask)), np.float32(0))),
            mask=_tensor(mask),
            time=_tensor(time),
            value=_tensor(np.where(valid, self._model_value(_take(self.dataset["obs/value"], row, mask)), np.float32(0))),
            covariate=covariate,
            sensor=_tensor(np.where(mask, sensor, -1)),
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


def _model_position(info: DatasetInfo, position: np.ndarray) -> np.ndarray:
    return ((position - np.asarray(info.centre)) / info.half_extent).astype(np.float32)


def _query_covariate(info: DatasetInfo, time: np.ndarray, points: int, ahead: np.ndarray | None = None) -> Tensor | None:
    """info.query_covariates [B,S,points,F]: the calendar of the local time, see QUERY_COVARIATES, then what is known `ahead`, the context
    covariates [B,S,points,F] of the reports asked for. Raises ValueError where those are needed and there is no report."""
    if not info.query_covariates:
        return None
    cycles = tuple(name for name in info.query_covariates if name in QUERY_COVARIATES)
    known = info.query_covariates[len(cycles) :]
    date = _tensor(calendar(replace(info, query_covariates=cycles), time).astype(np.float32))[:, :, None].expand(-1, -1, points, -1)
    if not known:
        return date
    if ahead is None or known != info.context_covariates:
        raise ValueError(f"{info.name} gives {', '.join(known)} with each question: only reports of its fixed sensors can be asked")
    return torch.cat([date, _tensor(ahead)], -1)


def calendar(info: DatasetInfo, time: np.ndarray) -> np.ndarray:
    """info.query_covariates (...,F) at `time` (...) in hours since info.time_origin: sine and cosine of local hour and day of year."""
    if not info.query_covariates:
        return np.zeros((*time.shape, 0))
    if info.time_unit != "h":
        raise ValueError(f"query covariates {info.query_covariates} cannot be computed from time in {info.time_unit!r}")
    local = time + info.utc_offset
    origin = np.datetime64(info.time_origin.removesuffix("Z"), "m")
    date = origin + np.round(local * 60).astype("timedelta64[m]")
    day = (date - date.astype("M8[Y]")).astype(np.float64) / 1440
    midnight = (origin - origin.astype("M8[D]")).astype(np.float64) / 60
    angle = {"hour": 2 * np.pi * (local + midnight) / 24, "doy": 2 * np.pi * day / 365.2425}
    parts = [name.split("_") for name in info.query_covariates]
    return np.stack([(np.sin if kind == "sin" else np.cos)(angle[cycle]) for cycle, kind in parts], axis=-1)


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array))
