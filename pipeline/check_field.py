"""Check a field frame by frame: empty, partly empty, out of range, frozen, jumping frames; the gate sits on the table of frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import xarray as xr
from pydantic import Field, field_validator

from pipeline import cross_partition, expectations, fields, lexicon, qc
from pipeline.expectations import Outcome, Rule
from pipeline.params import Section

RULES = ("unique", "no_empty_frame", "no_missing_cells", "in_range", "not_frozen", "no_jump", "steady_steps", "daily_cycle")
FLAGS = ("flag_missing", "flag_gross_range", "flag_flat_line", "flag_rate_of_change", "flag_gap", "flag_aggregate")


class FieldGate(Section):
    """All rules, severities and thresholds of one gridded source."""

    kind: Literal["field"]
    limits: dict[str, tuple[float | None, float | None]] = Field(default_factory=dict)  # replaces the lexicon's physical range
    jump: float = Field(gt=1)  # a frame that changes more than so many times the 90th percentile of all changes is suspect
    daily_cycle: cross_partition.DailyCycle | None = None
    rules: dict[str, Rule]

    @field_validator("rules")
    @classmethod
    def _all_rules(cls, value: dict[str, Rule]) -> dict[str, Rule]:
        return expectations.complete(value, RULES)


@dataclass
class Findings:
    outcomes: list[Outcome]
    frames: pd.DataFrame  # one row a frame: trajectory, time, VARIABLE_* statistics, flag_*
    variables: tuple[str, ...]
    cells: int
    blocked: bool


def check(ingested: Path, gate: FieldGate) -> Findings:
    """Measure every frame of `ingested`/field.zarr, flag it and judge the table of frames."""
    field = fields.open_field(ingested)
    names = tuple(str(name) for name in field.data_vars)
    table = _measured(field, names, gate)
    table = table.assign(**_flags(table, names, gate))
    outcomes = expectations.frames(table, gate.rules, names)
    if gate.daily_cycle is not None:
        outcomes.append(_daily_cycle(field, table, gate.daily_cycle, gate.rules))
    cells = int(np.prod([field.sizes[dim] for dim in fields.space(field)]))
    return Findings(outcomes, table, names, cells, any(not o.passed and o.severity == "block" for o in outcomes))


def _daily_cycle(field: xr.Dataset, table: pd.DataFrame, cycle: cross_partition.DailyCycle, rules: Mapping[str, Rule]) -> Outcome:
    if "longitude" not in field.coords or cycle.variable not in field.data_vars:
        raise ValueError(f"daily_cycle asks for {cycle.variable} on a map; the field has {', '.join(map(str, field.data_vars))}")
    hours = table.groupby(table["time"].dt.hour)[f"{cycle.variable}_mean"].mean().dropna()
    longitude = float(field["longitude"].mean())
    return cross_partition.cycle_outcome(hours.index.to_numpy(), hours.to_numpy(), longitude, cycle, rules)


def _measured(field: xr.Dataset, names: tuple[str, ...], gate: FieldGate) -> pd.DataFrame:
    """One row a frame, read one chunk after the other, each with the frame before it."""
    per_variable = []
    for name in names:
        array = field[name] if "trajectory" in field[name].dims else field[name].expand_dims("trajectory")
        low, high = _limits(name, gate)
        frames = []
        for trajectory in range(array.sizes["trajectory"]):
            before = None
            for start in range(0, array.sizes["time"], length := _frames_at_once(array)):
                block = array[trajectory, start : start + length].values.astype("f8")
                frames.append(_statistics(block, before, low, high))
                before = block[-1]
        per_variable.append(pd.concat(frames, ignore_index=True).add_prefix(f"{name}_"))
    trajectories = field.sizes.get("trajectory", 1)
    where = pd.DataFrame(
        {"trajectory": np.repeat(np.arange(trajectories), field.sizes["time"]), "time": np.tile(field["time"].values, trajectories)}
    )
    table = pd.concat([where, *per_variable], axis=1)
    for name in names:  # cells that a trajectory never has (land in a sea-surface field, a body in a flow) are no fault of a frame
        least = table.groupby("trajectory")[f"{name}_missing"].transform("min")
        table[f"{name}_mask"] = np.where(least < 1, least, 0.0)
    return table


def _frames_at_once(array: xr.DataArray) -> int:
    return max(1, (32 << 20) // (8 * int(np.prod(array.shape[2:]))))


def _statistics(block: np.ndarray, before: np.ndarray | None, low: float, high: float) -> pd.DataFrame:
    """Of frames [t,y,x]: share missing, cells outside the limits, minimum, maximum, mean, and rms change from the frame before."""
    flat = block.reshape(len(block), -1)
    finite = np.isfinite(flat)
    count = finite.sum(axis=1)
    filled = np.where(finite, flat, 0.0)
    previous = np.concatenate([np.full((1, flat.shape[1]), np.nan) if before is None else before.reshape(1, -1), flat[:-1]])
    both = finite & np.isfinite(previous)
    step = np.where(both, flat - np.where(both, previous, 0.0), 0.0)
    shared = both.sum(axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return pd.DataFrame(
            {
                "missing": 1 - count / flat.shape[1],
                "outside": (finite & ((flat < low) | (flat > high))).sum(axis=1),
                "min": np.where(count > 0, np.where(finite, flat, np.inf).min(axis=1), np.nan),
                "max": np.where(count > 0, np.where(finite, flat, -np.inf).max(axis=1), np.nan),
                "mean": np.where(count > 0, filled.sum(axis=1) / count, np.nan),
                "change": np.where(shared > 0, np.sqrt((step**2).sum(axis=1) / shared), np.nan),
            }
        )


def _limits(name: str, gate: FieldGate) -> tuple[float, float]:
    low, high = gate.limits.get(name, lexicon.lookup(name).fail)
    return -np.inf if low is None else low, np.inf if high is None else high


def _flags(table: pd.DataFrame, names: tuple[str, ...], gate: FieldGate) -> dict[str, np.ndarray]:
    """The worst flag over the variables, for each test. An absolutely uniform frame (night-time radiation) is not judged frozen."""
    worst = {flag: np.full(len(table), qc.NOT_EVALUATED, np.int8) for flag in FLAGS}

    def vote(flag: str, verdict: np.ndarray) -> None:
        worst[flag] = qc.aggregate({"before": worst[flag], "now": verdict.astype(np.int8)})

    for name in names:
        missing, mask = table[f"{name}_missing"].to_numpy(), table[f"{name}_mask"].to_numpy()
        change, spread = table[f"{name}_change"].to_numpy(), (table[f"{name}_max"] - table[f"{name}_min"]).to_numpy()
        vote("flag_missing", np.select([missing >= 1, missing > mask], [qc.FAIL, qc.SUSPECT], qc.PASS))
        outside = table[f"{name}_outside"].to_numpy() > 0
        vote("flag_gross_range", np.select([missing >= 1, outside], [qc.NOT_EVALUATED, qc.FAIL], qc.PASS))
        known = np.isfinite(change)
        typical = np.quantile(change[known], 0.9) if known.any() else np.inf
        vote("flag_flat_line", np.select([~known | (spread == 0), change == 0], [qc.NOT_EVALUATED, qc.FAIL], qc.PASS))
        vote("flag_rate_of_change", np.select([~known, change > gate.jump * typical], [qc.NOT_EVALUATED, qc.SUSPECT], qc.PASS))
    worst["flag_gap"] = _gaps(table)
    worst["flag_aggregate"] = qc.aggregate({name: flag for name, flag in worst.items() if name != "flag_aggregate"})
    return worst


def _gaps(table: pd.DataFrame) -> np.ndarray:
    """Suspect: the first frame after a step longer than the usual one."""
    time = table["time"].to_numpy()
    time = time.astype("datetime64[us]").astype("i8") if np.issubdtype(time.dtype, np.datetime64) else time.astype("f8")
    step = np.concatenate([[np.nan], np.diff(time.astype("f8"))])
    step[np.concatenate([[True], np.diff(table["trajectory"]) != 0])] = np.nan
    usual = np.nanmedian(step) if np.isfinite(step).any() else np.inf
    return np.select([np.isnan(step), step > 1.5 * usual], [qc.NOT_EVALUATED, qc.SUSPECT], qc.PASS).astype(np.int8)


def write_frames(findings: Findings, path: Path) -> None:
    """Write trajectory, time, statistics and flags, one row a frame."""
    table = pa.Table.from_pandas(findings.frames, preserve_index=False).replace_schema_metadata()
    pq.write_table(table, path, compression="zstd")


def counts(findings: Findings) -> dict[str, Any]:
    """Numbers for the report: frames and how many carry which verdict."""
    table = findings.frames
    verdict = table["flag_aggregate"]
    return {
        "frames": len(table),
        "trajectories": int(table["trajectory"].nunique()),
        "suspect_share": float((verdict == qc.SUSPECT).mean()),
        "fail_share": float((verdict == qc.FAIL).mean()),
        "empty_frames": int((table[[f"{v}_missing" for v in findings.variables]] >= 1).any(axis=1).sum()),
        "flags": flag_counts(table),
    }


def flag_counts(table: pd.DataFrame) -> Mapping[str, Mapping[str, int]]:
    names = {1: "pass", 2: "not_evaluated", 3: "suspect", 4: "fail", 9: "missing"}
    return {
        flag.removeprefix("flag_"): {names[int(k)]: int(n) for k, n in zip(*np.unique(table[flag], return_counts=True), strict=True)}
        for flag in FLAGS
    }
