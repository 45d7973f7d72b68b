"""A field becomes frames: the sensors of a layout (pipeline/strategies.py) or points that are seen or asked (pipeline/tasks.py).

The field is read in the pieces it is stored in. Standardisation knows only the observations of training frames, where `scale` does not
give its numbers.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

from models.contract import DatasetInfo
from pipeline import fields, places, sensors, splits
from pipeline.recipe import Subsample, dataset_info
from pipeline.strategies import FIXED, Layout

log = logging.getLogger(__name__)


def write(params: Subsample, key: str, field: xr.Dataset, checked: Path, writer: sensors.Writer) -> DatasetInfo:
    """Append the frames, truth and cases of a field to a sensor dataset."""
    absent = [name for name in params.variables if name not in field]
    if absent:
        raise ValueError(f"{params.source} has no variable {', '.join(absent)}; it has {', '.join(map(str, field.data_vars))}")
    variables = field[list(params.variables)]
    trajectories, frames = field.sizes.get("trajectory", 1), field.sizes["time"]
    split = _field_split(params, key, field, trajectories, frames)
    unfit = _unfit(checked, trajectories * frames, params.max_flag)
    frame_start = np.arange(trajectories + 1) * frames
    part: _Sensors | _Points = _Sensors(params, params.layout, field, key) if params.layout is not None else _Points(params, field, split)
    counts, moments = np.zeros(trajectories * frames, np.int64), _Moments(len(params.variables))
    visible = np.zeros(trajectories * frames, np.int64)
    for trajectory, first, truth in _pieces(variables, params.variables):
        start = trajectory * frames + first
        truth[unfit[start : start + len(truth)]] = np.nan
        rows = part.rows(trajectory, first, truth)
        counts[start : start + len(truth)] = rows.count
        visible[start : start + len(truth)] = rows.visible
        for name, array in rows.arrays.items():
            writer.append(name, array)
        moments.add(rows.arrays["obs/value"][np.repeat(split[start : start + len(truth)] == sensors.TRAIN, rows.count)])
    if not moments.n:
        raise ValueError(f"{key}: no training frame of {params.source} has a finite value at a sensor")
    step, time, calendar = _time(field)
    for name, array in {
        "frame/obs_start": np.concatenate([[0], np.cumsum(counts)]),
        "frame/time": np.tile(time, trajectories),
        "frame/split": split,
        "trajectory/frame_start": frame_start,
        **part.fixed,
        **splits.cases(split, frame_start, visible, params.cases),
    }.items():
        writer.append(name, array)
    return dataset_info(
        params,
        key,
        mean=moments.mean,
        std=moments.std,
        geometry=field.attrs["geometry"],
        step=step,
        utc_offset=0.0,
        n_sensors=len(part.fixed.get("sensor/role", ())),
        context_covariates=(),
        simulated=not calendar,
        space=places.space(field),
        **places.scale(field),
    )


@dataclass(frozen=True)
class _Rows:
    """What some frames in a row give to a dataset."""

    arrays: dict[str, np.ndarray]
    count: np.ndarray  # [t] observations
    visible: np.ndarray  # [t] those a model may see


class _Sensors:
    """A layout of sensors on places that all trajectories share; the whole field stays as truth beside them."""

    def __init__(self, params: Subsample, layout: Layout, field: xr.Dataset, key: str) -> None:
        if "point" in field.dims and any(field[name].dims != ("point",) for name in fields.axes(field)):
            raise ValueError(
                f"the points of {params.source} differ from trajectory to trajectory: subsample.{key} needs `tasks`, not `layout`"
            )
        self.layout, self.seed, self.place = layout, params.seed, places.positions(field, 0)
        self.shape = tuple(field.sizes[dim] for dim in fields.space(field))
        self.frames, self.torus = field.sizes["time"], field.attrs["geometry"] == "torus"
        # The same sensors in every frame of the one trajectory are fixed sensors; another trajectory has others.
        self.stay = field.sizes.get("trajectory", 1) == 1 and layout.strategy in FIXED
        self.fixed: dict[str, np.ndarray] = {"truth/position": self.place, "truth/shape": np.array(self.shape)}
        self._owner, self._points = -1, np.zeros((0, 0), np.int64)

    def rows(self, trajectory: int, first: int, truth: np.ndarray) -> _Rows:
        if trajectory != self._owner:
            here = np.isfinite(truth[0]).all(axis=-1)  # not where the first frame has nothing, unless it has nothing at all
            there = (here if here.any() else ~here).reshape(self.shape)
            self._points = self.layout.sensors(there, self.frames, self.torus, self.seed, trajectory)
            self._owner = trajectory
            if self.stay:
                place = self.place[self._points[0]]
                self.fixed |= {"sensor/position": place, "sensor/role": np.full(len(place), sensors.CONTEXT)}
        at = self._points[first : first + len(truth)]
        value = self.layout.observed(np.take_along_axis(truth, at[..., None], axis=1), self.seed, trajectory, first)
        seen = self.layout.seen(self.frames, self.seed, trajectory)[first : first + len(truth)]
        valid = np.isfinite(value).all(axis=-1) & seen[:, None]
        count = valid.sum(axis=1)
        sensor = np.broadcast_to(np.arange(at.shape[1]) if self.stay else np.full(at.shape[1], -1), at.shape)
        arrays = {
            "obs/value": value[valid],
            "obs/position": self.place[at[valid]],
            "obs/covariate": np.zeros((int(count.sum()), 0)),
            "obs/sensor": sensor[valid],
            "truth/value": truth,
        }
        return _Rows(arrays, count, count)


class _Points:
    """Tasks: all points in training frames, and in the others those that are seen or asked, which need not be the same places."""

    def __init__(self, params: Subsample, field: xr.Dataset, split: np.ndarray) -> None:
        assert params.tasks is not None
        self.tasks, self.seed, self.field, self.split = params.tasks, params.seed, field, split
        self.frames = field.sizes["time"]
        names = _drawn_names(field)
        self.fixed = {"trajectory/parameter": np.stack([field[name].values for name in names], axis=1)} if names else {}
        self._owner, self._place = -1, np.zeros((0, 0))

    def rows(self, trajectory: int, first: int, truth: np.ndarray) -> _Rows:
        if trajectory != self._owner:
            self._owner, self._place = trajectory, places.positions(self.field, trajectory)
        parts = []
        for frame, value in enumerate(truth, first):
            if self.split[trajectory * self.frames + frame] == sensors.TRAIN:
                point = np.flatnonzero(np.isfinite(value).all(axis=1))
                parts.append((point, value[point], np.full(len(point), sensors.SEEN)))
            else:
                parts.append(self.tasks.frozen(value, self.seed, trajectory, frame))
        point, value, role = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
        arrays = {
            "obs/value": value,
            "obs/position": self._place[point],
            "obs/covariate": np.zeros((len(point), 0)),
            "obs/sensor": np.full(len(point), -1),
            "obs/role": role,
        }
        count, seen = (np.array([f(role) for _, _, role in parts]) for f in (len, lambda role: (role != sensors.ASKED).sum()))
        return _Rows(arrays, count, seen)


class _Moments:
    """Mean and standard deviation, merged piece by piece (Chan et al. 1983)."""

    def __init__(self, variables: int) -> None:
        self.n, self.mean, self._spread = 0, np.zeros(variables), np.zeros(variables)

    def add(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        rows = rows.astype(np.float64)
        shift = rows.mean(axis=0) - self.mean
        self._spread += ((rows - rows.mean(axis=0)) ** 2).sum(axis=0) + shift**2 * self.n * len(rows) / (self.n + len(rows))
        self.mean, self.n = self.mean + shift * len(rows) / (self.n + len(rows)), self.n + len(rows)

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self._spread / self.n)


def drawn(field: xr.Dataset) -> dict[str, Any]:
    """What the recipe says of a simulation that drew numbers for each trajectory: its own params, and the names of those numbers."""
    names = _drawn_names(field)
    return {"simulation": json.loads(field.attrs["parameters"]), "drawn": names} if names else {}


def _drawn_names(field: xr.Dataset) -> list[str]:
    return sorted(str(name) for name, c in field.coords.items() if c.dims == ("trajectory",) and np.issubdtype(c.dtype, np.floating))


def _pieces(field: xr.Dataset, variables: tuple[str, ...]) -> Iterator[tuple[int, int, np.ndarray]]:
    """(trajectory, first frame, values [t,P,C]) in order, as the field is stored, so that each stored chunk is read once or few times."""
    times = _stored(field[variables[0]], "time")
    for block in _stored(field[variables[0]], "trajectory") if "trajectory" in field.dims else [None]:
        part = field if block is None else field.isel(trajectory=block)
        if len(times) == 1:
            part = part.compute()
        for number in range(part.sizes.get("trajectory", 1)):
            one = part.isel(trajectory=number) if block is not None else part
            for piece in times:
                cube = [one[name].isel(time=piece).to_numpy() for name in variables]
                values = np.stack(cube, axis=-1).reshape(len(cube[0]), -1, len(variables))
                yield (block.start if block is not None else 0) + number, piece.start, values


def _stored(array: xr.DataArray, dim: str) -> list[slice]:
    """The chunks of a dimension, as slices."""
    edges = np.concatenate([[0], np.cumsum(array.variable.chunksizes.get(dim, (array.sizes[dim],)))])
    return [slice(int(a), int(b)) for a, b in pairwise(edges)]


def _unfit(checked: Path, frames: int, max_flag: int) -> np.ndarray:
    """Which frames of a field quality control has failed: their values count as missing."""
    path = checked / "frames.parquet"
    if not path.exists():
        raise ValueError(f"{path} does not exist: run the validate stage first")
    flags = pd.read_parquet(path, columns=["flag_aggregate"])["flag_aggregate"].to_numpy()
    if len(flags) != frames:
        raise ValueError(f"{path} has {len(flags)} rows, the field {frames} frames: run the validate stage again")
    unfit = flags > max_flag
    log.info("%s: %d of %d frames left out with a flag above %d", path, unfit.sum(), frames, max_flag)
    return unfit


def _field_split(params: Subsample, key: str, field: xr.Dataset, trajectories: int, frames: int) -> np.ndarray:
    if params.split is not None:
        return np.tile(splits.time_blocks(frames, params.split, f"each trajectory of {key}"), trajectories)
    if "role" not in field.coords:
        raise ValueError(
            f"subsample.{key} has no `split`, and the field of {params.source} no coordinate role(trajectory): give one of them"
        )
    return splits.by_role(field["role"].values.tolist(), np.full(trajectories, frames))


def _time(field: xr.Dataset) -> tuple[float, np.ndarray, bool]:
    """Nominal step, time of the frames, and whether they are hours of the calendar (since 1970)."""
    time = field["time"].values
    calendar = bool(np.issubdtype(time.dtype, np.datetime64))
    if calendar:
        time = (time - np.datetime64("1970-01-01")) / np.timedelta64(1, "h")
    time = time.astype(np.float64)
    return float(np.median(np.diff(time))) if len(time) > 1 else 1.0, time, calendar
