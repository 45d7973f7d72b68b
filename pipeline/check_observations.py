"""Check a source of observations, partition by partition: first the gate, then quality control of what passed it.

Everything works in bounded memory: one partition and its margins a process. Rows in = rows checked + rows held back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ConfigDict, field_validator

from pipeline import cross_partition, expectations, lexicon, observations, qc, qc_spatial, workers
from pipeline.expectations import Outcome, Rule
from pipeline.params import Section
from pipeline.qc import Duration

ROW_RULES = ("not_null", "known_variable", "inside_partition", "inside_area", "in_range", "known_after")  # may hold back single rows
RULES = (
    "schema", *ROW_RULES, "unique", "unique_across", "totals", "completeness_partition", "completeness_sensor",
    "varies", "stays_in_place", "own_place", "daily_cycle",
)  # fmt: skip
SERIES = ["variable", "platform_id", "trip_id"]
ROWS_A_WORKER = 400_000  # fewer are not worth starting a process for
EXAMPLES = 50


class Ordering(Section):
    variables: tuple[str, ...]  # from the smaller to the larger
    ratio: float  # a value is suspect above ratio * larger + offset
    offset: float


class ObservationGate(Section):
    """All rules, severities and thresholds of one source of observations."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    kind: Literal["observations"]
    variables: tuple[str, ...]
    step: Duration  # nominal time between two observations of a sensor
    area: tuple[float, float, float, float] | None = None  # west, south, east, north
    partition_offset: Duration = pd.Timedelta(0)  # zone of the partition names, ahead of UTC
    campaigns: tuple[tuple[str, str], ...] = ()  # first and last label with zone; empty: what the data span
    fixed: str = ".*"  # platform ids that report at every step; the others come and go and have no expected number
    known_before: Duration = pd.Timedelta(0)  # how much earlier than its own time an observation may be known
    least_values: int = 100  # a sensor with fewer values cannot be called constant
    may_stand_still: tuple[str, ...] = ()  # variables that are allowed to be constant
    daily_cycle: cross_partition.DailyCycle | None = None
    completeness: dict[Literal["partition", "sensor"], float]
    rules: dict[str, Rule]
    series: dict[str, qc.SeriesTests]
    ordering: Ordering | None = None
    neighbors: dict[str, qc_spatial.Neighbors] | str  # or the reason why there is none

    @field_validator("rules")
    @classmethod
    def _all_rules(cls, value: dict[str, Rule]) -> dict[str, Rule]:
        missing, unknown = [r for r in RULES if r not in value], [r for r in value if r not in RULES]
        if missing or unknown:
            raise ValueError(f"missing rules: {missing or 'none'}, unknown rules: {unknown or 'none'}")
        return value

    @field_validator("variables")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for name in value:
            lexicon.lookup(name)
        return value

    def tests(self, variable: str) -> qc.SeriesTests:
        return self.series.get(variable, qc.SeriesTests())

    @property
    def margin(self) -> pd.Timedelta:
        return max([1.5 * self.step, *(tests.margin for tests in self.series.values())])


@dataclass(frozen=True)
class Gated:
    """What the gate saw of one partition."""

    name: str
    rows: int
    outcomes: list[Outcome]
    held: dict[int, str]  # row number -> reasons
    counts: pd.DataFrame  # per platform_id, variable, moving: present rows that were not held
    last: pd.DataFrame  # the last row of every series of a fixed sensor
    first_time: pd.Timestamp | None = None
    last_time: pd.Timestamp | None = None


@dataclass(frozen=True)
class Checked:
    """What quality control found in one partition."""

    tests: pd.DataFrame  # test, flag, n
    sensors: pd.DataFrame  # platform_id, day, n, suspect, fail
    places: pd.DataFrame  # platform_id, moving, longitude, latitude (means), n
    held: pd.DataFrame  # the first rows held back, for the page
    held_rows: int


@dataclass
class Findings:
    outcomes: list[Outcome] = field(default_factory=list)
    rows: int = 0
    partitions: int = 0
    blocked: bool = False
    tests: pd.DataFrame | None = None
    sensors: pd.DataFrame | None = None  # one row a platform
    daily: pd.DataFrame | None = None  # platform_id, day, n, expected
    held: pd.DataFrame | None = None
    held_rows: int = 0
    held_partitions: tuple[str, ...] = ()
    held_at_ingest: pd.DataFrame | None = None  # the first of them: source_file, source_row, reason, raw
    held_rows_at_ingest: int = 0
    off: dict[str, str] = field(default_factory=dict)  # test -> why it did not run
    campaigns: tuple[tuple[pd.Timestamp, pd.Timestamp], ...] = ()  # first and last label between which values are expected


def check(ingested: Path, gate: ObservationGate, out: Path) -> Findings:
    """Gate and flag every partition of `ingested` into `out`/observations and `out`/quarantine."""
    paths = observations.partitions(ingested)
    total = sum(pq.read_metadata(path).num_rows for path in paths)
    processes = min(workers.count(), 1 + total // ROWS_A_WORKER)
    gated = workers.over(_gate, [(path, gate) for path in paths], processes)
    campaigns = _campaigns(gated, gate)
    findings = Findings([outcome for each in gated for outcome in each.outcomes], total, len(paths), campaigns=campaigns)
    findings.held_at_ingest, findings.held_rows_at_ingest = _held_at_ingest(ingested)

    sound = {each.name: path for each, path in zip(gated, paths, strict=True) if _readable(each)}
    held = {each.name: dict(each.held) for each in gated}
    expected = _expected(gated, gate, campaigns)
    whole: set[str] = {each.name for each in gated if not _readable(each)}
    if sound:
        outcomes, repeats = _across(sound, gated, ingested, gate, total, out)
        findings.outcomes += outcomes
        if gate.rules["unique_across"].severity == "quarantine":
            for name, row in repeats[["partition", "row"]].itertuples(index=False):
                held[name][int(row)] = _joined(held[name].get(int(row)), "unique_across: the same time, platform and variable elsewhere")
        outcomes, thin = _completeness(gated, repeats, expected, gate)
        findings.outcomes += outcomes
        whole |= thin
    findings.blocked = any(not o.passed and o.severity == "block" for o in findings.outcomes)
    if findings.blocked:
        return findings

    schema = {o.where: o.detail for o in findings.outcomes if o.rule == "schema" and not o.passed}
    for name in whole & set(sound):
        reason = "completeness_partition: too few rows of those expected, the partition is held back"
        held[name] = {row: _joined(held[name].get(row), reason) for row in range(_rows(gated, name))}
    tasks, tail = [], _nothing_before()
    for number, (each, path) in enumerate(zip(gated, paths, strict=True)):
        if each.name not in sound:
            _set_aside(path, out, f"schema: {schema[each.name]}")
            continue
        around = [
            (p, held[g.name]) for g, p in zip(gated, paths, strict=True) if g is not each and g.name in sound and _touches(g, each, gate)
        ]
        tasks.append((path, held[each.name], around, tail, gate, out))
        tail = pd.concat([tail, each.last.assign(order=number)]).drop_duplicates(SERIES, keep="last")
    checked = workers.over(_flag, tasks, processes)
    return _merged(findings, checked, gated, expected, gate, tuple(sorted(whole)))


# The gate


def _gate(path: Path, gate: ObservationGate) -> Gated:
    name = path.stem
    table = pd.read_parquet(path)
    outcomes = [expectations.columns(table, name, gate.rules)]
    if not outcomes[0].passed:
        nothing = pd.DataFrame(columns=["platform_id", "variable", "moving", "n"])
        return Gated(name, len(table), outcomes, {}, nothing, _nothing_before())
    limits = {v: (gate.tests(v).fail or lexicon.lookup(v).fail) for v in gate.variables}
    outcomes += expectations.observations(
        table, name, gate.rules, gate.variables, gate.area, _period(name, gate), limits, gate.known_before
    )
    held: dict[int, str] = {}
    for outcome in outcomes:
        if outcome.severity == "quarantine" and not outcome.passed:
            rows = outcome.rows if outcome.rule != "unique" else _extra_copies(table, outcome.rows)
            for row in rows:
                held[int(row)] = _joined(held.get(int(row)), f"{outcome.rule}: {_why(outcome.rule, table.loc[row], gate)}")
    kept = table.drop(index=list(held))
    counts = kept.assign(moving=kept["trip_id"].notna()).groupby(["platform_id", "variable", "moving"], observed=True).size()
    fixed = kept[kept["trip_id"].isna()].sort_values("time", kind="stable")
    return Gated(
        name, len(table), outcomes, held, counts.rename("n").reset_index(), fixed.drop_duplicates(SERIES, keep="last"),
        kept["time"].min() if len(kept) else None, kept["time"].max() if len(kept) else None,
    )  # fmt: skip


def _why(rule: str, row: pd.Series, gate: ObservationGate) -> str:
    match rule:
        case "not_null":
            return "no " + ", ".join(name for name in expectations.REQUIRED if pd.isna(row[name]))
        case "known_variable":
            return f"{row['variable']} is none of {', '.join(gate.variables)}"
        case "inside_area":
            return f"({row['longitude']:g}, {row['latitude']:g}) lies outside {gate.area}"
        case "inside_partition":
            return f"{row['time']} does not belong into this partition"
        case "in_range":
            return f"{row['value']:g} is outside what {row['variable']} can be"
        case "known_after":
            return f"known at {row['knowledge_time']}, before its time {row['time']}"
        case _:
            return "the same time, platform and variable twice"


def _extra_copies(table: pd.DataFrame, rows: np.ndarray) -> np.ndarray:
    """Of identical copies all but the first; of copies that contradict each other, every one."""
    copies = table.loc[rows]
    keys = copies.groupby(observations.KEY, dropna=False, sort=False)["value"]
    contradict = keys.transform("nunique").to_numpy() > 1
    return rows[contradict | copies.duplicated(observations.KEY).to_numpy()]


def _period(name: str, gate: ObservationGate) -> tuple[pd.Timestamp, pd.Timestamp] | None:
    """First and last instant of the period that names a partition (2013, 2013-03, 2013-03-01), both ends included."""
    try:
        period = pd.Period(name)
    except ValueError:
        return None
    start = pd.Timestamp(period.start_time, tz="UTC") - gate.partition_offset
    end = pd.Timestamp((period + 1).start_time, tz="UTC") - gate.partition_offset
    return start, end


def _readable(each: Gated) -> bool:
    return each.outcomes[0].passed


def _rows(gated: list[Gated], name: str) -> int:
    return next(each.rows for each in gated if each.name == name)


def _joined(before: str | None, reason: str) -> str:
    return f"{before}; {reason}" if before else reason


def _nothing_before() -> pd.DataFrame:
    return observations.OBSERVATIONS.empty_table().to_pandas()


def _across(
    sound: Mapping[str, Path], gated: list[Gated], ingested: Path, gate: ObservationGate, total: int, out: Path
) -> tuple[list[Outcome], pd.DataFrame]:
    out.mkdir(parents=True, exist_ok=True)
    spans = pd.DataFrame(
        [(each.name, each.first_time, each.last_time) for each in gated if each.first_time is not None], columns=["name", "first", "last"]
    ).set_index("name")
    scratch = out / ".duckdb"
    connection = cross_partition.connect(list(sound.values()), scratch)
    try:
        repeated, repeats = cross_partition.repeated(connection, spans, gate.rules, total)
        outcomes = [
            repeated,
            cross_partition.constant_sensors(connection, gate.rules, gate.least_values, gate.may_stand_still),
            *cross_partition.positions(connection, gate.rules),
        ]
        if gate.daily_cycle is not None:
            outcomes.append(cross_partition.daily_cycle(connection, gate.rules, gate.daily_cycle))
    finally:
        connection.close()
    outcomes.append(_totals(ingested, total, gate))
    return outcomes, repeats


def _totals(ingested: Path, total: int, gate: ObservationGate) -> Outcome:
    """Does the number of rows agree with what ingest says it wrote?"""
    path, where = ingested / "ingest.json", cross_partition.WHERE
    told = json.loads(path.read_text(encoding="utf-8")).get("rows") if path.exists() else None
    if told is None:
        return Outcome.of("totals", where, gate.rules, 0, 0, "ingest.json tells no number of rows")
    return Outcome.of("totals", where, gate.rules, 1, int(told != total), f"{total} rows found, {told} written by ingest")


def _held_at_ingest(ingested: Path) -> tuple[pd.DataFrame | None, int]:
    paths = observations.partitions(ingested, "quarantine")
    parts: list[pd.DataFrame] = []
    total = 0
    for path in paths:
        total += pq.read_metadata(path).num_rows
        if sum(len(part) for part in parts) < EXAMPLES:
            parts.append(next(pq.ParquetFile(path).iter_batches(EXAMPLES)).to_pandas())
    return (pd.concat(parts).head(EXAMPLES)[observations.QUARANTINE.names], total) if total else (None, 0)


# Completeness


def _campaigns(gated: list[Gated], gate: ObservationGate) -> tuple[tuple[pd.Timestamp, pd.Timestamp], ...]:
    """When values are expected: as the parameters say, or the whole span of the data."""
    if gate.campaigns:
        return tuple((pd.Timestamp(first).tz_convert("UTC"), pd.Timestamp(last).tz_convert("UTC")) for first, last in gate.campaigns)
    times = [(each.first_time, each.last_time) for each in gated if each.first_time is not None and each.last_time is not None]
    return ((min(first for first, _ in times), max(last for _, last in times)),) if times else ()


def _expected(gated: list[Gated], gate: ObservationGate, campaigns: tuple[tuple[pd.Timestamp, pd.Timestamp], ...]) -> dict[str, int]:
    """Steps of the time axis in each partition: what one sensor that never fails would have delivered."""
    known = [each for each in gated if each.first_time is not None]
    periods = {each.name: _period(each.name, gate) or (each.first_time, each.last_time) for each in known}
    at_end = any(each.last_time == periods[each.name][1] for each in known)  # labels at the end of their interval
    step = gate.step

    def labels(period: tuple[pd.Timestamp, pd.Timestamp], named: bool) -> int:
        count = 0
        for first, last in campaigns:
            start, end = max(first, period[0]), min(last, period[1])
            if start > end:
                continue
            inside = int((end - start) / step) + 1
            if named and at_end and start == period[0]:
                inside -= 1
            if named and not at_end and end == period[1]:
                inside -= 1
            count += inside
        return count

    return {each.name: labels(periods[each.name], _period(each.name, gate) is not None) for each in known}  # type: ignore[arg-type]


def _presence(gated: list[Gated], gate: ObservationGate) -> pd.DataFrame:
    """present rows per partition and sensor that has an expected number; sensors known anywhere are known everywhere."""
    counts = pd.concat([each.counts.assign(partition=each.name) for each in gated if len(each.counts)])
    fixed = ~counts["moving"].astype(bool) & counts["platform_id"].astype(str).str.fullmatch(gate.fixed)
    return counts[fixed].groupby(["partition", "platform_id", "variable"], observed=True)["n"].sum().reset_index()


def _completeness(
    gated: list[Gated], repeats: pd.DataFrame, expected: Mapping[str, int], gate: ObservationGate
) -> tuple[list[Outcome], set[str]]:
    rules = gate.rules
    present = _presence(gated, gate) if any(len(each.counts) for each in gated) else pd.DataFrame()
    names = ["completeness_partition", "completeness_sensor"]
    if not len(present):
        return [Outcome.of(name, cross_partition.WHERE, rules, 0, 0, "no sensor reports at every step") for name in names], set()
    if len(repeats):
        again = repeats.groupby(["partition", "platform_id", "variable"]).size()
        key = pd.MultiIndex.from_frame(present[["partition", "platform_id", "variable"]])
        present["n"] -= again.reindex(key, fill_value=0).to_numpy()
    sensors = present[["platform_id", "variable"]].drop_duplicates()
    by_sensor = present.groupby(["platform_id", "variable"])["n"].sum().rename("present").reset_index()
    by_sensor["expected"] = sum(expected.values())
    steps = pd.Series(dict(expected), name="steps")
    by_partition = (steps[steps > 0] * len(sensors)).rename("expected").to_frame()
    by_partition["present"] = present.groupby("partition")["n"].sum().reindex(by_partition.index, fill_value=0)
    by_partition = by_partition.rename_axis("partition").reset_index()
    outcomes, thin = [], set()
    for name, table, least in (
        (names[0], by_partition, gate.completeness["partition"]),
        (names[1], by_sensor, gate.completeness["sensor"]),
    ):
        judged = expectations.completeness(table, cross_partition.WHERE, {"completeness": rules[name]}, least)
        bad = table.loc[judged.rows].assign(share=lambda t: t["present"] / t["expected"]).sort_values("share", kind="stable")
        label = bad["partition"] if name == names[0] else bad["platform_id"] + " " + bad["variable"]
        detail = (
            f"below {least:.0%}: " + ", ".join(f"{a} {b:.1%}" for a, b in zip(label[:5], bad["share"][:5], strict=True)) if len(bad) else ""
        )
        outcomes.append(Outcome.of(name, cross_partition.WHERE, rules, judged.evaluated, judged.offenders, detail))
        if name == names[0] and rules[name].severity == "quarantine" and not judged.passed:
            thin = set(bad["partition"])
    return outcomes, thin


# Quality control


def _touches(other: Gated, each: Gated, gate: ObservationGate) -> bool:
    if other.first_time is None or each.first_time is None:
        return False
    return bool(other.first_time <= each.last_time + gate.margin and other.last_time >= each.first_time - gate.margin)  # type: ignore[operator]


def _flag(
    path: Path, held: Mapping[int, str], around: list[tuple[Path, Mapping[int, str]]], tail: pd.DataFrame, gate: ObservationGate, out: Path
) -> Checked:
    """Flag one partition, write it and what is held back of it."""
    table = pd.read_parquet(path)
    kept = table.drop(index=list(held)).reset_index(drop=True)
    kept["trip_id"] = kept["trip_id"].astype("str")
    flags = _flags(kept, _context(kept, around, tail, gate), gate)
    if len(kept):
        observations.write_partition(kept.assign(**flags), out / "observations" / path.name)
    reasons = table.loc[list(held)].assign(reason=pd.Series(held, dtype="str"))
    if len(reasons):
        write_quarantine(reasons.sort_index(), out / "quarantine" / path.name)
    return _summary(kept, flags, reasons)


def _context(kept: pd.DataFrame, around: list[tuple[Path, Mapping[int, str]]], tail: pd.DataFrame, gate: ObservationGate) -> pd.DataFrame:
    """Rows of other partitions that the series tests need: the margins on both sides, and the last word of sensors silent for longer."""
    if not len(kept):
        return _nothing_before()
    start, end = kept["time"].min() - gate.margin, kept["time"].max() + gate.margin
    near = []
    for path, gone in around:
        other = pd.read_parquet(path).drop(index=list(gone))
        near.append(other[(other["time"] >= start) & (other["time"] <= end)])
    rows = pd.concat([*near, tail[observations.OBSERVATIONS.names]])
    return rows.drop_duplicates(observations.KEY)


def _flags(kept: pd.DataFrame, context: pd.DataFrame, gate: ObservationGate) -> dict[str, np.ndarray]:
    columns = ["time", *SERIES, "value"]
    rows = pd.concat([kept[columns].assign(own=np.arange(len(kept))), context[columns].assign(own=-1)], ignore_index=True)
    series = pd.factorize(rows["platform_id"].astype("str") + "\x1f" + rows["trip_id"].astype("str").fillna(""), sort=True)[0]
    rows = rows.assign(series=series).sort_values(["series", "time"], kind="stable", ignore_index=True)
    flags = {name: np.full(len(kept), qc.NOT_EVALUATED, np.int8) for name in qc.FLAGS}
    for variable in np.unique(kept["variable"].to_numpy("U")):
        part = rows[rows["variable"] == variable]
        own = part["own"].to_numpy()
        time = _utc(part["time"])
        found = qc.series_flags(
            part["value"].to_numpy(), time, part["series"].to_numpy(), lexicon.lookup(variable), gate.tests(variable), gate.step
        )
        for name, flag in found.items():
            flags[name][own[own >= 0]] = flag[own >= 0]
    comes_and_goes = kept["trip_id"].notna() | ~kept["platform_id"].str.fullmatch(gate.fixed)
    flags["flag_gap"][comes_and_goes.to_numpy(bool)] = qc.NOT_EVALUATED  # silence means nothing there
    usable = flags["flag_gross_range"] != qc.FAIL
    flags["flag_neighbor"] = _neighbors(kept, usable, gate)
    if gate.ordering is not None:
        order = gate.ordering
        flags["flag_multi_variate"] = qc.ordering_flags(kept, order.variables, order.ratio, order.offset, usable)
    flags["flag_aggregate"] = qc.aggregate({name: flag for name, flag in flags.items() if name != "flag_aggregate"})
    return flags


def _neighbors(kept: pd.DataFrame, usable: np.ndarray, gate: ObservationGate) -> np.ndarray:
    flag = np.full(len(kept), qc.NOT_EVALUATED, np.int8)
    if isinstance(gate.neighbors, str):
        return flag
    time, value, latitude, longitude = _utc(kept["time"]), *(kept[name].to_numpy() for name in ("value", "latitude", "longitude"))
    for variable, checks in gate.neighbors.items():
        rows = np.flatnonzero((kept["variable"] == variable).to_numpy())
        rows = rows[np.argsort(time[rows], kind="stable")]
        flag[rows] = qc_spatial.neighbor_flags(np.where(usable, value, np.nan)[rows], time[rows], latitude[rows], longitude[rows], checks)
    return flag


def _utc(time: pd.Series) -> np.ndarray:
    """Plain datetime64 in UTC; `to_numpy` alone would make a Python object of every instant."""
    return time.dt.tz_localize(None).to_numpy("datetime64[us]")


def write_quarantine(rows: pd.DataFrame, path: Path) -> None:
    """Write held rows with all their columns and `reason`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pandas(rows, preserve_index=False).replace_schema_metadata(), path, compression="zstd")


def _set_aside(path: Path, out: Path, reason: str) -> None:
    """Hold back a whole partition whose columns cannot be read as observations."""
    write_quarantine(pd.read_parquet(path).assign(reason=reason), out / "quarantine" / path.name)


def _summary(kept: pd.DataFrame, flags: Mapping[str, np.ndarray], held: pd.DataFrame) -> Checked:
    verdict = flags["flag_aggregate"]
    tests = pd.concat(
        [
            pd.DataFrame({"platform_id": kept["platform_id"], "test": name.removeprefix("flag_"), "flag": flag}).value_counts()
            for name, flag in flags.items()
        ]
    )
    platform = kept["platform_id"]
    daily = pd.DataFrame(
        {
            "platform_id": platform,
            "day": kept["time"].dt.floor("D"),
            "moving": kept["trip_id"].notna(),
            "n": 1,
            "suspect": verdict == qc.SUSPECT,
            "fail": verdict == qc.FAIL,
        }
    )
    place = kept.assign(moving=kept["trip_id"].notna()).groupby(["platform_id", "moving"], observed=True)
    return Checked(
        tests.rename("n").reset_index(),
        daily.groupby(["platform_id", "moving", "day"], observed=True).sum().reset_index(),
        place.agg(longitude=("longitude", "sum"), latitude=("latitude", "sum"), n=("value", "size")).reset_index(),
        held.head(EXAMPLES),
        len(held),
    )


def _merged(
    findings: Findings,
    checked: list[Checked],
    gated: list[Gated],
    expected: Mapping[str, int],
    gate: ObservationGate,
    whole: tuple[str, ...],
) -> Findings:
    summed = partial(pd.DataFrame.groupby, observed=True)
    tests = summed(pd.concat([each.tests for each in checked]), ["platform_id", "test", "flag"])["n"].sum().reset_index()
    daily = summed(pd.concat([each.sensors for each in checked]), ["platform_id", "moving", "day"]).sum().reset_index()
    place = summed(pd.concat([each.places for each in checked]), ["platform_id", "moving"]).sum()
    place[["longitude", "latitude"]] = place[["longitude", "latitude"]].div(place["n"], axis=0)
    sensors = place.join(summed(daily, ["platform_id", "moving"])[["suspect", "fail"]].sum()).reset_index()
    variables = pd.concat([each.counts for each in gated]).groupby("platform_id")["variable"].nunique()
    fixed = ~sensors["moving"].astype(bool) & sensors["platform_id"].astype(str).str.fullmatch(gate.fixed)
    sensors["variables"] = variables.reindex(sensors["platform_id"]).to_numpy()
    sensors["expected"] = np.where(fixed, sum(expected.values()) * sensors["variables"], np.nan)
    sensors["completeness"] = sensors["n"] / sensors["expected"]
    findings.tests, findings.daily = tests, daily
    findings.sensors = sensors.sort_values("platform_id", ignore_index=True)
    examples = [each.held for each in checked if len(each.held)]
    findings.held = pd.concat(examples).head(EXAMPLES) if examples else None
    in_whole = sum(each.rows for each in gated if each.name in whole)
    findings.held_rows = sum(each.held_rows for each in checked) + sum(each.rows for each in gated if not _readable(each))
    findings.held_partitions = whole
    assert findings.held_rows >= in_whole
    findings.off = _tests_off(tests, gate)
    return findings


def _tests_off(tests: pd.DataFrame, gate: ObservationGate) -> dict[str, str]:
    """Why a test judged nothing."""
    judged = tests[tests["flag"] != qc.NOT_EVALUATED].groupby("test")["n"].sum()
    off = {}
    for test in qc.TESTS:
        if judged.get(test, 0):
            continue
        if test == "neighbor":
            if isinstance(gate.neighbors, str):
                off[test] = gate.neighbors
            else:
                off[test] = "no value ever has enough neighbours: " + "; ".join(
                    f"{name} needs {c.least} within {c.radius_km:g} km" for name, c in gate.neighbors.items()
                )
        elif test == "multi_variate":
            off[test] = "no two variables with a known order at one place and time"
        else:
            off[test] = "no threshold for it in params.yaml, or no value with neighbours in time"
    return off
