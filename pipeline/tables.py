"""What all sources of tables share: settings, partitions by local time, and the way from blocks of a file to clean, wide rows.

Order of work, block by block: mask sentinels in source units; let the adapter convert units and place each row in time and space; hold
back what it cannot place; then, for the partition, take out exact duplicates and hold back contradicting ones; number the trips.
Every row read is kept, a counted exact duplicate, or held back with its line and a reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Literal
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import Field, field_validator

from pipeline import delimited, members
from pipeline.params import Section

HUGE = 1e19  # fills such as 1e20, whatever their last digits
EARTH_RADIUS = 6_371_000.0  # m
Label = Literal["instant", "begin", "centre", "end", "unknown"]


class Trips(Section):
    """When the path of a moving platform is cut into two trips."""

    gap: timedelta = timedelta(minutes=5)
    jump: float = Field(default=1000.0, gt=0)  # m


class Params(Section):
    """The part of `ingest.KEY` that every source of tables has; each source sets its own defaults."""

    source: str
    variables: tuple[str, ...] = Field(min_length=1)
    zone: str  # IANA name, of local times without an offset and of the calendar that partitions follow
    label: Label = "unknown"  # which end of the averaging interval the source writes; unknown counts as end
    interval: timedelta = timedelta(hours=1)  # averaged over; has no meaning for instants
    latency: timedelta = timedelta(0)  # knowledge_time - time
    sentinels: tuple[float, ...] = (-999.0, -9999.0)  # missing, in source units; so is anything from 1e19 on
    region: tuple[float, float, float, float] | None = None  # west, south, east, north: a position outside is wrong
    trips: Trips | None = None
    max_file_bytes: int = Field(default=4 << 30, gt=0)  # of one table, decompressed

    @field_validator("zone")
    @classmethod
    def _zone_exists(cls, name: str) -> str:
        try:
            ZoneInfo(name)
        except (ZoneInfoNotFoundError, OSError, ValueError):
            raise ValueError("not a time zone of the IANA database, such as Asia/Kolkata") from None
        return name

    @property
    def shift(self) -> timedelta:
        """From the label the source writes to ours, the end of the interval."""
        return {"begin": self.interval, "centre": self.interval / 2}.get(self.label, timedelta(0))


@dataclass(frozen=True)
class Partition:
    """A stretch of local calendar time and the members of the raw drop that feed it."""

    name: str  # a calendar period: 2013, 2023-09, 2021-01-30
    start: pd.Timestamp  # of the labels as the source writes them, UTC; belongs to it
    end: pd.Timestamp  # does not belong to it
    members: tuple[str, ...]

    @classmethod
    def of(cls, name: str, zone: str, feeding: Sequence[str]) -> Partition:
        period = pd.Period(name)
        start, end = (each.start_time.tz_localize(zone).tz_convert("UTC") for each in (period, period + 1))
        return cls(name, start, end, tuple(sorted(feeding)))

    def within(self, start: pd.Timestamp, end: pd.Timestamp) -> Partition:
        """Cut to what the source can have delivered."""
        return Partition(self.name, max(self.start, start), min(self.end, end), self.members)


@dataclass(frozen=True)
class Rows:
    """What an adapter makes of a block, one entry a row."""

    time: np.ndarray  # datetime64[us], UTC, the label as the source writes it; NaT where it cannot be told
    platform: pa.DictionaryArray  # platform_id; null where there is none
    longitude: np.ndarray  # degrees_east
    latitude: np.ndarray  # degrees_north
    values: dict[str, np.ndarray]  # short name -> float64 in the lexicon's unit, NaN where missing
    problems: list[tuple[np.ndarray, str]] = field(default_factory=list)  # (which rows, what is wrong with them)


@dataclass
class Clean:
    """A partition, clean and wide: rows sorted by (time, platform)."""

    time: np.ndarray  # datetime64[us], UTC, end of the interval
    platform: np.ndarray  # int32, index into `platforms`
    platforms: list[str]  # sorted
    longitude: np.ndarray
    latitude: np.ndarray
    trip: np.ndarray | None  # int32, index into `trips`
    trips: list[str]
    values: dict[str, np.ndarray]
    held_back: list[tuple[str, int, str]]  # (member, line, reason), sorted; line -1 is the whole member
    counts: dict[str, dict[str, int]]  # member -> {rows, duplicates, held_back, masked:CODE ..}


def local_to_utc(naive: np.ndarray, zone: str) -> np.ndarray:
    """datetime64[us] in local time -> UTC; NaT where local time is ambiguous or skipped (daylight saving), so nothing is guessed."""
    local = pd.DatetimeIndex(naive).tz_localize(zone, ambiguous="NaT", nonexistent="NaT")
    return local.tz_convert("UTC").tz_localize(None).to_numpy().astype("M8[us]")


def unclear_local_time(naive: np.ndarray, utc: np.ndarray, zone: str) -> tuple[np.ndarray, str]:
    return np.isnat(utc) & ~np.isnat(naive), f"the clock of {zone} shows this time twice or never (daylight saving)"


def floats(table: pa.Table, name: str) -> np.ndarray:
    """A numeric column as float64, NaN where missing."""
    return table[name].to_numpy().astype("f8", copy=False)


def named(codes: np.ndarray, name: Callable[[int], str]) -> pa.DictionaryArray:
    """Names for integer codes; `name` is called once per distinct code."""
    distinct, index = np.unique(codes, return_inverse=True)
    return pa.DictionaryArray.from_arrays(index.astype("i4"), pa.array([name(int(code)) for code in distinct], pa.string()))


def read(
    params: Params, adapter: ModuleType, raw: Path, partition: Partition, spans: dict[str, list[tuple]], home: frozenset[str]
) -> Clean:
    """Read one partition.

    `spans`: member -> the (start, end) of every partition it feeds. `home`: members whose stray rows (unreadable, or in no span) are
    accounted for here, so that they are accounted for once.
    """
    parts: list[_Part] = []
    held_back: list[tuple[str, int, str]] = []
    counts: dict[str, dict[str, int]] = {}
    for member in partition.members:
        try:
            part = _read_member(params, adapter, raw, partition, member, spans[member], member in home)
        except delimited.Unreadable as error:  # what was read of it before the fault is not trusted either
            if member in home:
                held_back.append((member, -1, str(error)))
            counts[member] = {"unreadable": 1}
            continue
        parts.append(part)
        held_back += [(member, line, reason) for line, reason in part.rejected]
        counts[member] = {"rows": len(part.time) + len(part.rejected), "duplicates": 0, **part.masked}
    clean = _merged(params, parts, held_back, counts)
    for member, line, _ in clean.held_back:
        if line > 0:
            counts[member]["held_back"] = counts[member].get("held_back", 0) + 1
    return clean


@dataclass(frozen=True)
class _Part:
    """The rows of one member that fall into the partition."""

    member: str
    time: np.ndarray
    platform: np.ndarray  # int32 index into `platforms`
    platforms: list[str]
    longitude: np.ndarray
    latitude: np.ndarray
    values: dict[str, np.ndarray]
    line: np.ndarray
    rejected: list[tuple[int, str]]
    masked: Counter[str]


def _read_member(
    params: Params, adapter: ModuleType, raw: Path, partition: Partition, member: str, spans: list[tuple], at_home: bool
) -> _Part:
    columns = adapter.columns(params)
    codes: dict[str, int] = {}
    kept: list[tuple[np.ndarray, ...]] = []
    rejected: list[tuple[int, str]] = []
    masked: Counter[str] = Counter()
    with members.opened(raw, member) as stream:
        for block in delimited.blocks(stream, columns, params.max_file_bytes):
            if at_home:
                rejected += block.rejected
            if not len(block.line):
                continue
            table, holes = mask_sentinels(block.table, params.sentinels)
            rows = adapter.rows(params, raw, member, table)
            inside = (rows.time >= _naive(partition.start)) & (rows.time < _naive(partition.end))
            if at_home:
                inside |= ~_within(rows.time, spans)
            bad = np.zeros(len(block.line), dtype=bool)
            for where, reason in [*_misplaced(params, rows, spans), *rows.problems]:
                new = where & inside & ~bad
                rejected += [(int(line), reason) for line in block.line[new]]
                bad |= where
            for name, where in holes.items():
                if count := int((where & inside).sum()):
                    masked[f"masked {name}"] += count
            keep = inside & ~bad
            platform = _shared_codes(rows.platform, codes)
            shift = np.timedelta64(params.shift)
            kept.append(
                tuple(
                    array[keep]
                    for array in (
                        rows.time + shift,
                        platform,
                        rows.longitude,
                        rows.latitude,
                        block.line,
                        *(rows.values[v] for v in params.variables),
                    )
                )
            )
    empty = (
        np.empty(0, "M8[us]"),
        np.empty(0, "i4"),
        np.empty(0),
        np.empty(0),
        np.empty(0, "i8"),
        *(np.empty(0) for _ in params.variables),
    )
    time, platform, longitude, latitude, line, *values = (np.concatenate(each) for each in zip(*kept or [empty], strict=True))
    named_values = dict(zip(params.variables, values, strict=True))
    return _Part(member, time, platform, list(codes), longitude, latitude, named_values, line, rejected, masked)


def mask_sentinels(table: pa.Table, sentinels: Sequence[float]) -> tuple[pa.Table, dict[str, np.ndarray]]:
    """Declared codes, and anything from 1e19 on, become missing in every float column; and `COLUMN as CODE` -> where that was."""
    holes: dict[str, np.ndarray] = {}
    for i, name in enumerate(table.column_names):
        if not pa.types.is_floating(table.schema.types[i]):
            continue
        values = floats(table, name)
        found = {f"{name} as {code:g}": values == code for code in sentinels}
        found[f"{name} as 1e19 or more"] = np.isfinite(values) & (np.abs(values) >= HUGE)
        found = {what: where for what, where in found.items() if where.any()}
        if found:
            hidden = np.any(list(found.values()), axis=0)
            table = table.set_column(i, name, pa.array(np.where(hidden, np.nan, values), from_pandas=True))
            holes |= found
    return table, holes


def _naive(moment: pd.Timestamp) -> np.datetime64:
    return moment.tz_localize(None).to_datetime64()


def _within(time: np.ndarray, spans: list[tuple]) -> np.ndarray:
    """Which labels fall into one of the spans; NaT falls into none."""
    inside = np.zeros(len(time), dtype=bool)
    for start, end in spans:
        inside |= (time >= _naive(start)) & (time < _naive(end))
    return inside


def _misplaced(params: Params, rows: Rows, spans: list[tuple]) -> list[tuple[np.ndarray, str]]:
    """Rows without a proper time, platform or place. A problem that the adapter names is more telling than a bare NaT."""
    named_already = np.any([where for where, _ in rows.problems], axis=0) if rows.problems else np.zeros(len(rows.time), dtype=bool)
    longitude, latitude = rows.longitude, rows.latitude
    unplaced = ~(np.isfinite(longitude) & np.isfinite(latitude))
    first, last = min(start for start, _ in spans), max(end for _, end in spans)
    found = [
        (np.isnat(rows.time) & ~named_already, "there is no time"),
        (
            ~np.isnat(rows.time) & ~_within(rows.time, spans),
            f"the time lies outside what this file covers, {first.tz_convert(params.zone)} to {last.tz_convert(params.zone)}",
        ),
        (_nulls(rows.platform) & ~named_already, "there is no platform"),
        (unplaced & ~named_already, "there is no position"),
    ]
    west, south, east, north = params.region or (-180.0, -90.0, 180.0, 90.0)
    outside = ~unplaced & ~((longitude >= west) & (longitude <= east) & (latitude >= south) & (latitude <= north))
    swapped = outside & (latitude >= west) & (latitude <= east) & (longitude >= south) & (longitude <= north)
    if params.region is not None:
        found.append((swapped, "latitude and longitude are swapped"))
    found.append((outside, f"the position lies outside {west}..{east} E, {south}..{north} N"))
    found += [(np.isinf(values), f"{name} is infinite") for name, values in rows.values.items()]
    return found


def _nulls(array: pa.DictionaryArray) -> np.ndarray:
    return array.is_null().to_numpy(zero_copy_only=False)


def _shared_codes(platform: pa.DictionaryArray, codes: dict[str, int]) -> np.ndarray:
    """Codes of a block's platforms in a table that grows from block to block; -1 where there is none."""
    table = np.array([codes.setdefault(name, len(codes)) for name in platform.dictionary.to_pylist()], dtype="i4")
    index = platform.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return np.where(index < 0, -1, table[index] if len(table) else -1).astype("i4")


def _merged(params: Params, parts: list[_Part], held_back: list[tuple[str, int, str]], counts: dict[str, dict[str, int]]) -> Clean:
    """The members' rows as one partition: sorted, exact duplicates out, contradictions held back, trips numbered."""
    platforms = sorted({name for part in parts for name in part.platforms})
    rank = {name: i for i, name in enumerate(platforms)}

    def joined(each: Callable[[_Part], np.ndarray], kind: str) -> np.ndarray:
        return np.concatenate([each(part) for part in parts] or [np.empty(0, kind)])

    time = joined(lambda part: part.time, "M8[us]")
    platform = joined(lambda part: np.array([rank[name] for name in part.platforms], "i4")[part.platform], "i4")
    line = joined(lambda part: part.line, "i8")
    member = joined(lambda part: np.full(len(part.time), parts.index(part), "i4"), "i4")
    order = np.lexsort((line, member, platform, time))
    time, platform, line, member = time[order], platform[order], line[order], member[order]
    columns = [
        joined(lambda part: part.longitude, "f8")[order],
        joined(lambda part: part.latitude, "f8")[order],
        *(joined(lambda part, v=v: part.values[v], "f8")[order] for v in params.variables),  # type: ignore[misc]
    ]
    repeated = np.zeros(len(time), dtype=bool)
    repeated[1:] = (time[1:] == time[:-1]) & (platform[1:] == platform[:-1])
    if repeated.any():
        kept_row = np.maximum.accumulate(np.where(repeated, 0, np.arange(len(time))))
        again = np.flatnonzero(repeated)
        same = np.ones(len(again), dtype=bool)
        for column in columns:
            a, b = column[again], column[kept_row[again]]
            same &= (a == b) | (np.isnan(a) & np.isnan(b))
        for row in again[~same]:
            first = kept_row[row]
            there = "" if member[first] == member[row] else f" of {parts[member[first]].member}"
            reason = f"contradicts line {line[first]}{there}, the same platform at the same time"
            held_back.append((parts[member[row]].member, int(line[row]), reason))
        for row in again[same]:
            counts[parts[member[row]].member]["duplicates"] += 1
        keep = ~repeated
        time, platform = time[keep], platform[keep]
        columns = [column[keep] for column in columns]
    longitude, latitude, *values = columns
    trip, trips = number_trips(params.trips, time, platform, platforms, longitude, latitude) if params.trips else (None, [])
    named_values = dict(zip(params.variables, values, strict=True))
    return Clean(time, platform, platforms, longitude, latitude, trip, trips, named_values, sorted(held_back), counts)


def number_trips(
    rule: Trips, time: np.ndarray, platform: np.ndarray, platforms: list[str], longitude: np.ndarray, latitude: np.ndarray
) -> tuple[np.ndarray, list[str]]:
    """Cut each platform's path where it pauses longer than `gap` or moves further than `jump` between two rows (sorted by time).

    Returns the trip of each row as an index into names `PLATFORM/START`, the start being the UTC time of the trip's first row.
    """
    order = np.argsort(platform, kind="stable")
    t, p = time[order], platform[order]
    x, y = np.radians(longitude[order]), np.radians(latitude[order])
    starts = np.ones(len(t), dtype=bool)
    metres = EARTH_RADIUS * np.hypot(np.diff(x) * np.cos((y[1:] + y[:-1]) / 2), np.diff(y))
    starts[1:] = (p[1:] != p[:-1]) | (np.diff(t) > np.timedelta64(rule.gap)) | (metres > rule.jump)
    trip = np.empty(len(t), "i4")
    trip[order] = np.cumsum(starts) - 1
    stamps = pd.DatetimeIndex(t[starts]).strftime("%Y%m%dT%H%M%SZ")
    return trip, [f"{platforms[code]}/{stamp}" for code, stamp in zip(p[starts], stamps, strict=True)]
