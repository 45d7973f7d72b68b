"""The frozen evaluation cases of a sensor dataset as batches, with what a score needs of each question: its kind and how far it is from
what was seen.

A case may look back into the gap or an earlier split, since the past is known when a forecast is made; its answers never leave their split.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree
from torch import Tensor

from models.contract import DatasetInfo, FieldBatch, Frames
from pipeline.rows import Rows
from pipeline.sensors import CONTEXT, HELD_TEST, HELD_VALIDATION, SEEN_AND_ASKED, SPLITS, SensorDataset

CONTEXT_SENSOR, HELD_SENSOR, GRID_POINT = 0, 1, 2
HELD_OUT_FOR = {"train": -1, "validation": HELD_VALIDATION, "test": HELD_TEST}  # role of the sensors a split may be scored at


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
    rows = Rows(dataset)
    number = numbers(dataset, split, limit)
    if not len(number):
        raise ValueError(f"{dataset.info.name} has no {split} case: subsample made none; lower its `stride` or enlarge the split")
    by_case = "cases/asked" in dataset
    if not dataset.has_truth and not rows.n_sensors and "obs/role" not in dataset and not by_case:
        raise ValueError(f"{dataset.info.name} has no dense truth, observation to ask or fixed sensor: there is nothing to score against")
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
            query, of_row = rows.asked(target, known, frame)
            kind = np.where(of_row == SEEN_AND_ASKED, CONTEXT_SENSOR, HELD_SENSOR)
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


def numbers(dataset: SensorDataset, split: str, limit: int | None = None) -> np.ndarray:
    """Numbers of the cases of a split in the order stored, or of `limit` of them evenly spread."""
    number = np.flatnonzero(np.asarray(dataset["cases/split"]) == SPLITS[split])
    if limit is None or limit >= len(number):
        return number
    return number[np.linspace(0, len(number) - 1, limit).round().astype(int)]


def distance(info: DatasetInfo, context: Frames, position: Tensor, frame: int = -1) -> np.ndarray:
    """Distance [B,Q] from model positions [B,Q,D] to the nearest observation of one context frame, the last, in info.position_unit."""
    out = np.full(position.shape[:2], np.inf)
    for b, (seen, asked) in enumerate(zip(context.position[:, frame], position, strict=True)):
        near = seen[context.mask[b, frame]].double().numpy()
        if len(near):
            wrap = (lambda p: np.mod(p + 1.0, 2.0)) if info.period else (lambda p: p)
            out[b] = cKDTree(wrap(near), boxsize=info.period).query(wrap(asked.double().numpy()))[0]
    return out * info.half_extent
