"""Check a source of observations, partition by partition: first the gate, then quality control of what passed it.

Everything works in bounded memory: one partition and its margins a process. Rows in = rows checked + rows held back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq

from pipeline import completeness, cross_partition, observation_flags, observation_gate, observations, qc, workers
from pipeline.completeness import Campaign
from pipeline.expectations import Outcome
from pipeline.observation_flags import EXAMPLES, Checked
from pipeline.observation_gate import SERIES, Gated, ObservationGate, joined, no_rows

ROWS_A_WORKER = 400_000  # fewer are not worth starting a process for


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
    campaigns: tuple[Campaign, ...] = ()  # first and last label between which values are expected


def check(ingested: Path, gate: ObservationGate, out: Path) -> Findings:
    """Gate and flag every partition of `ingested` into `out`/observations and `out`/quarantine."""
    paths = observations.partitions(ingested)
    total = sum(pq.read_metadata(path).num_rows for path in paths)
    processes = min(workers.count(), 1 + total // ROWS_A_WORKER)
    gated = workers.over(observation_gate.gate_partition, [(path, gate) for path in paths], processes)
    campaigns = completeness.campaigns_of(gated, gate)
    findings = Findings([outcome for each in gated for outcome in each.outcomes], total, len(paths), campaigns=campaigns)
    findings.held_at_ingest, findings.held_rows_at_ingest = _held_at_ingest(ingested)

    sound = {each.name: path for each, path in zip(gated, paths, strict=True) if each.readable}
    held = {each.name: dict(each.held) for each in gated}
    expected = completeness.expected_steps(gated, gate, campaigns)
    whole: set[str] = {each.name for each in gated if not each.readable}
    if sound:
        outcomes, repeats = _across(sound, gated, ingested, gate, total, out)
        findings.outcomes += outcomes
        if gate.rules["unique_across"].severity == "quarantine":
            for name, row in repeats[["partition", "row"]].itertuples(index=False):
                held[name][int(row)] = joined(held[name].get(int(row)), "unique_across: the same time, platform and variable elsewhere")
        outcomes, thin = completeness.judge(gated, repeats, expected, gate)
        findings.outcomes += outcomes
        whole |= thin
    findings.blocked = any(not o.passed and o.severity == "block" for o in findings.outcomes)
    if findings.blocked:
        return findings

    rows = {each.name: each.rows for each in gated}
    for name in whole & set(sound):
        reason = "completeness_partition: too few rows of those expected, the partition is held back"
        held[name] = {row: joined(held[name].get(row), reason) for row in range(rows[name])}
    checked = _flagged(paths, gated, held, gate, out, processes)
    return _merged(findings, checked, gated, expected, gate, tuple(sorted(whole)))


def _flagged(
    paths: list[Path], gated: list[Gated], held: Mapping[str, Mapping[int, str]], gate: ObservationGate, out: Path, processes: int
) -> list[Checked]:
    """Quality control of every partition, each with the rows around it that its tests need; unreadable ones are set aside whole."""
    tasks, tail = [], no_rows()
    for number, (each, path) in enumerate(zip(gated, paths, strict=True)):
        if not each.readable:
            observation_flags.set_aside(path, out, f"schema: {each.outcomes[0].detail}")
            continue
        near = [
            (g, p) for g, p in zip(gated, paths, strict=True) if g is not each and g.readable and observation_flags.touches(g, each, gate)
        ]
        tasks.append((path, held[each.name], [(p, held[g.name]) for g, p in near], tail, gate, out))
        tail = pd.concat([tail, each.last.assign(order=number)]).drop_duplicates(SERIES, keep="last")
    return workers.over(observation_flags.flag_partition, tasks, processes)


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
    findings.held_rows = sum(each.held_rows for each in checked) + sum(each.rows for each in gated if not each.readable)
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
