"""The gate of a source of observations: its rules, and which rows of one partition break them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
from pydantic import ConfigDict, field_validator

from pipeline import cross_partition, expectations, lexicon, observations, qc, qc_spatial
from pipeline.expectations import Outcome, Rule
from pipeline.params import Section
from pipeline.qc import Duration

ROW_RULES = ("not_null", "known_variable", "inside_partition", "inside_area", "in_range", "known_after")  # may hold back single rows
RULES = (
    "schema", *ROW_RULES, "unique", "unique_across", "totals", "completeness_partition", "completeness_sensor",
    "varies", "stays_in_place", "own_place", "daily_cycle",
)  # fmt: skip
SERIES = ["variable", "platform_id", "trip_id"]


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
        return expectations.complete(value, RULES)

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

    @property
    def readable(self) -> bool:
        """Whether the columns are those of observations."""
        return self.outcomes[0].passed


def gate_partition(path: Path, gate: ObservationGate) -> Gated:
    name = path.stem
    table = pd.read_parquet(path)
    outcomes = [expectations.columns(table, name, gate.rules)]
    if not outcomes[0].passed:
        nothing = pd.DataFrame(columns=["platform_id", "variable", "moving", "n"])
        return Gated(name, len(table), outcomes, {}, nothing, no_rows())
    limits = {v: (gate.tests(v).fail or lexicon.lookup(v).fail) for v in gate.variables}
    outcomes += expectations.observations(
        table, name, gate.rules, gate.variables, gate.area, period_of(name, gate), limits, gate.known_before
    )
    held: dict[int, str] = {}
    for outcome in outcomes:
        if outcome.severity == "quarantine" and not outcome.passed:
            rows = outcome.rows if outcome.rule != "unique" else _extra_copies(table, outcome.rows)
            for row in rows:
                held[int(row)] = joined(held.get(int(row)), f"{outcome.rule}: {_why(outcome.rule, table.loc[row], gate)}")
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


def period_of(name: str, gate: ObservationGate) -> tuple[pd.Timestamp, pd.Timestamp] | None:
    """First and last instant of the period that names a partition (2013, 2013-03, 2013-03-01), both ends included."""
    try:
        period = pd.Period(name)
    except ValueError:
        return None
    start = pd.Timestamp(period.start_time, tz="UTC") - gate.partition_offset
    end = pd.Timestamp((period + 1).start_time, tz="UTC") - gate.partition_offset
    return start, end


def joined(before: str | None, reason: str) -> str:
    return f"{before}; {reason}" if before else reason


def no_rows() -> pd.DataFrame:
    return observations.OBSERVATIONS.empty_table().to_pandas()
