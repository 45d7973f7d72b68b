"""Cases of a block protocol: of a test day and a fold, which observations are known and which are asked (the AirDelhi benchmark).

The observations of a day are dealt into folds, single ones at random (`unit: rows`) or whole cells (`unit: cells`). With a day and the
days before it as its history, fold k cuts them into blocks:

                    not in fold k   in fold k
    history         A               B
    day             C               D

    task            known           asked   folds
    interpolation   A + C           D       all
    same_day        C               D       all
    missing         A + B + C       D       all
    forecast        A + B           C + D   one: it is the same whatever the fold

With `unit: cells` a cell that is asked is not known in the history either, which the released program leaves in where it was in another
fold of an earlier day; `asked_cells_in_history` brings that back. The cells are dealt in the order of their corners, where the program
takes the order of a Python set, which changes from run to run. Days with fewer observations than `least` do not exist: the day before is
the one before that was kept, as the program counts files.

The program this follows: github.com/sachin-iitd/DelhiPMDatasetBenchmark @ f2142b5. As there, a time is rounded to the nearest slot, a
tie to the even one; a coordinate is cut toward zero, so that the first cells beyond the origin count as the first ones inside; and cell
means have two decimals.
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import date
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import Field, model_validator
from sklearn.model_selection import KFold

from pipeline.geometry import Cells
from pipeline.params import Section
from pipeline.sensors import TEST, TRAIN, VALIDATION

Days = tuple[date, date]  # first, last + 1, local


class Blocks(Section):
    """How the observations of moving sensors become days, folds and cases."""

    step: float = Field(default=1.0, gt=0)  # hours from slot to slot
    utc_offset: float = 0.0  # hours; days are local
    platforms: str = ".*"  # regular expression: whose observations take part
    cells: Cells | None = None  # observations of a cell and slot are averaged; None: places are cells already
    measured: tuple[float, float] = (0.0, 24.0)  # local hours, both included: what is measured outside them is left out
    slots: tuple[float, float] = (0.0, 23.0)  # local hours of the first and the last slot of a day
    below: float | None = None  # values from here on are left out
    least: int = Field(default=1, ge=1)  # a day with fewer observations is left out
    learn: Days  # trained on; the last `validation` of these days choose the weights
    validation: float = Field(default=0.2, gt=0, lt=1)
    test: Days
    history: int = Field(default=3, ge=0)  # days; the first ones of `test` are history only
    task: Literal["interpolation", "same_day", "missing", "forecast"] = "interpolation"
    unit: Literal["rows", "cells"] = "rows"
    asked_cells_in_history: bool = False
    folds: int = Field(default=5, ge=2)
    order: Literal["time", "place"] = "time"  # in which the rows of a day are dealt: by (time, latitude, longitude), or time last
    seed: int = 0  # of the dealing

    @model_validator(mode="after")
    def _consistent(self) -> Blocks:
        (first, last), (begin, end) = self.learn, self.test
        if first >= last or begin >= end or (first < end and begin < last):
            raise ValueError(f"learn and test must be [first, last) days that do not overlap, found {self.learn} and {self.test}")
        slots = (self.slots[1] - self.slots[0]) / self.step
        if slots < 0 or abs(slots - round(slots)) > 1e-9 or self.slots[1] >= 24:
            raise ValueError(f"slots must be whole steps of {self.step} h apart within a day, found {list(self.slots)}")
        if self.task == "forecast" and not self.history:
            raise ValueError(f"task forecast needs days of history to forecast from: set history to 1 or more, found {self.history}")
        return self

    @property
    def slots_a_day(self) -> int:
        return round((self.slots[1] - self.slots[0]) / self.step) + 1


def slotted(rows: pd.DataFrame, blocks: Blocks) -> pd.DataFrame:
    """Of observations (time in UTC, longitude, latitude, value) those that take part, with `day` (local, since 1970), `slot` of the day,
    and the place of their cell: rows of one slot and cell are still apart."""
    local = rows["time"].dt.tz_localize(None).to_numpy("datetime64[us]").astype(np.int64) / 3600e6 + blocks.utc_offset
    hour = local - 24 * np.floor(local / 24)
    low, high = blocks.measured
    kept = (hour >= low) & (hour <= high) & rows["value"].notna().to_numpy()
    if blocks.below is not None:
        kept &= rows["value"].to_numpy() < blocks.below
    nearest = np.rint(local / blocks.step) * blocks.step  # a tie goes to the even number, as pandas rounds
    day = np.floor(nearest / 24)
    slot = np.rint((nearest - 24 * day - blocks.slots[0]) / blocks.step)
    kept &= (slot >= 0) & (slot < blocks.slots_a_day)
    found = rows.loc[kept, ["longitude", "latitude", "value"]].assign(day=day[kept].astype(np.int64), slot=slot[kept].astype(np.int64))
    if blocks.cells is not None:
        for axis, name in enumerate(("longitude", "latitude")):
            size = getattr(blocks.cells, name)
            corner = blocks.cells.origin[axis] + np.trunc((found[name] - blocks.cells.origin[axis]) / size) * size
            found[name] = corner.round(4) + size / 2
    return found


def averaged(rows: pd.DataFrame, blocks: Blocks) -> pd.DataFrame:
    """One row a (day, slot, place) of the days that are kept, in the order in which they are dealt within a day."""
    means = rows.groupby(["day", "slot", "latitude", "longitude"], as_index=False)["value"].mean()
    if blocks.cells is not None:
        means["value"] = means["value"].round(2)
    means = means[means.groupby("day")["value"].transform("size") >= blocks.least]
    inner = ["slot", "latitude", "longitude"] if blocks.order == "time" else ["latitude", "longitude", "slot"]
    return means.sort_values(["day", *inner], ignore_index=True)


def fold(rows: pd.DataFrame, blocks: Blocks) -> np.ndarray:
    """Fold [n] of the rows of one day, in the order given."""
    if blocks.unit == "rows":
        return _dealt(len(rows), blocks)
    cell = pd.MultiIndex.from_frame(rows[["latitude", "longitude"]])
    distinct = cell.unique().sort_values()
    return _dealt(len(distinct), blocks)[distinct.get_indexer(cell)]


def _dealt(count: int, blocks: Blocks) -> np.ndarray:
    if count < blocks.folds:
        raise ValueError(f"a day has {count} {blocks.unit}, fewer than the {blocks.folds} folds: raise blocks.least")
    out = np.zeros(count, np.int64)
    for number, (_, part) in enumerate(KFold(blocks.folds, shuffle=True, random_state=blocks.seed).split(out)):
        out[part] = number
    return out


def arrays(rows: pd.DataFrame, blocks: Blocks) -> dict[str, np.ndarray]:
    """The frames and cases of the sensor dataset (pipeline/sensors.py), from `averaged` rows with columns `frame` and `fold`, sorted by
    frame. Every kept day is a run of frames, one a slot; `learn` and `test` are a trajectory each."""
    days, trajectory, split = calendar(rows, blocks)
    n, per_day = len(days), blocks.slots_a_day
    first = np.searchsorted(rows["frame"].to_numpy(), np.arange(n + 1) * per_day)
    place = pd.MultiIndex.from_frame(rows[["latitude", "longitude"]]).factorize()[0]
    hours = 24.0 * days[:, None] + blocks.slots[0] + blocks.step * np.arange(per_day)
    found = list(_cases(rows["fold"].to_numpy(), place, first, trajectory, split, blocks))
    if {case[1] for case in found} != {VALIDATION, TEST}:
        raise ValueError(f"the days of learn and test must each leave one with {blocks.history} days before it, found {n} days in all")
    frames, codes, owners, seen, asked = zip(*found, strict=True)
    return {
        "frame/time": hours.ravel() - blocks.utc_offset,
        "frame/split": np.repeat(split, per_day),
        "trajectory/frame_start": np.searchsorted(trajectory, [0, 1, 2]) * per_day,
        "cases/frame": np.array(frames),
        "cases/split": np.array(codes),
        "cases/block": np.array(owners),
        "cases/seen_start": np.cumsum([0, *map(len, seen)]),
        "cases/seen": np.concatenate(seen),
        "cases/asked_start": np.cumsum([0, *map(len, asked)]),
        "cases/asked": np.concatenate(asked),
    }


def calendar(rows: pd.DataFrame, blocks: Blocks) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The days that take part, first those of `learn`, then those of `test`: number since 1970, trajectory 0 or 1, split code."""
    all_days = np.unique(rows["day"])
    learn, test = (all_days[(all_days >= _number(first)) & (all_days < _number(last))] for first, last in (blocks.learn, blocks.test))
    checked = round(blocks.validation * len(learn))
    if not checked or checked == len(learn) or not len(test):
        raise ValueError(f"learn {blocks.learn} has {len(learn)} days with at least {blocks.least} observations, test {len(test)}: too few")
    split = np.concatenate([np.full(len(learn) - checked, TRAIN), np.full(checked, VALIDATION), np.full(len(test), TEST)])
    return np.concatenate([learn, test]), np.repeat([0, 1], [len(learn), len(test)]), split


def _cases(
    fold: np.ndarray, place: np.ndarray, first: np.ndarray, trajectory: np.ndarray, split: np.ndarray, blocks: Blocks
) -> Iterator[tuple[int, int, int, np.ndarray, np.ndarray]]:
    """(last context frame, split, bootstrap block, rows known, rows asked) day by day and fold by fold; `first` [days + 1] row of each."""
    per_day, forecast = blocks.slots_a_day, blocks.task == "forecast"
    for day in np.flatnonzero(split != TRAIN):
        oldest = day - blocks.history
        if oldest < 0 or trajectory[oldest] != trajectory[day]:
            continue
        history, today = np.arange(first[oldest], first[day]), np.arange(first[day], first[day + 1])
        for number in [0] if forecast else range(blocks.folds):
            if forecast:
                yield (int(day) * per_day - 1, int(split[day]), int(day), history, today)
                continue
            asked = today[fold[today] == number]
            before = {"interpolation": history[fold[history] != number], "same_day": history[:0], "missing": history}[blocks.task]
            if blocks.unit == "cells" and not blocks.asked_cells_in_history:
                before = before[~np.isin(place[before], place[asked])]
            seen = np.concatenate([before, today[fold[today] != number]])
            yield (int(day + 1) * per_day - 1, int(split[day]), int(day), seen, asked)


def _number(day: date) -> int:
    return int(np.datetime64(day).astype("M8[D]").astype(np.int64))
