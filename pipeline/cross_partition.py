"""Checks that no single partition can answer, on all partitions at once with DuckDB, out of core."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd

from pipeline.expectations import Outcome, Rule
from pipeline.params import Section

WHERE = "all partitions"
MEMORY = "1GB"


class DailyCycle(Section):
    """The mean daily cycle of a variable peaks in these hours of local solar time; elsewhere, when times are in the wrong zone."""

    variable: str
    peak: tuple[float, float]  # hours, first and last


def connect(files: Sequence[Path], scratch: Path) -> duckdb.DuckDBPyConnection:
    """A connection whose view `rows` is all files, with `file` (name without suffix) and `number` (row in the file)."""
    connection = duckdb.connect()
    connection.execute(f"SET memory_limit = '{MEMORY}'; SET temp_directory = '{scratch}'; SET TimeZone = 'UTC'")
    names = ", ".join("'" + str(path).replace("'", "''") + "'" for path in files)
    connection.execute(
        "CREATE VIEW rows AS SELECT * EXCLUDE (filename, file_row_number), parse_filename(filename, true) AS file, "
        f"file_row_number AS number FROM read_parquet([{names}], filename = true, file_row_number = true)"
    )
    return connection


def repeated(
    connection: duckdb.DuckDBPyConnection, spans: pd.DataFrame, rules: Mapping[str, Rule], total: int
) -> tuple[Outcome, pd.DataFrame]:
    """Keys (time, platform, variable) that occur in more than one partition.

    Only times that lie in the range of two partitions can hold any, so only those are read. `spans`: index partition, columns
    first, last. Returns the outcome and the rows to hold back (partition, row, platform_id, variable): all but the first of
    identical copies, every one of copies that contradict each other.
    """
    clauses = []
    ordered = spans.sort_values("first")
    reach = pd.Timestamp.min.tz_localize("UTC")
    for first, last in ordered.itertuples(index=False):
        if first <= reach:
            clauses.append(f"time BETWEEN '{first.isoformat()}' AND '{min(last, reach).isoformat()}'")
        reach = max(reach, last)
    held = pd.DataFrame({"partition": [], "row": [], "platform_id": [], "variable": [], "keys": [], "first_key": []})
    if clauses:
        held = connection.execute(
            f"""
            WITH shared AS (SELECT * FROM rows WHERE {" OR ".join(clauses)}),
            keys AS (SELECT time, platform_id, variable, min(value) = max(value) AS same FROM shared
                     GROUP BY time, platform_id, variable HAVING count(DISTINCT file) > 1),
            copies AS (SELECT shared.*, same, row_number() OVER (PARTITION BY time, platform_id, variable ORDER BY file, number) AS copy
                       FROM shared JOIN keys USING (time, platform_id, variable))
            SELECT file AS partition, number AS row, platform_id, variable, same, time FROM copies WHERE copy > 1 OR NOT same
            ORDER BY file, number
            """
        ).df()
    detail = ""
    if len(held):
        one = held.iloc[0]
        detail = f"first: {one['platform_id']}, {one['variable']}, {one['time']}, in partition {one['partition']}"
    return Outcome.of("unique_across", WHERE, rules, total, len(held), detail), held


def constant_sensors(connection: duckdb.DuckDBPyConnection, rules: Mapping[str, Rule], least: int, skip: Sequence[str]) -> Outcome:
    """Sensors that always say the same, among those with at least `least` values."""
    found = connection.execute(
        """SELECT platform_id, variable, count(*) AS n, min(value) AS lowest, max(value) AS highest FROM rows
           WHERE NOT list_contains(?, variable) GROUP BY 1, 2 HAVING n >= ? ORDER BY 1, 2""",
        [list(skip), least],
    ).df()
    bad = found[found["lowest"] == found["highest"]]
    detail = "; ".join(f"{r.platform_id} {r.variable} is {r.lowest:g} in all {r.n} values" for r in bad.head(5).itertuples())
    return Outcome.of("varies", WHERE, rules, len(found), len(bad), detail)


def positions(connection: duckdb.DuckDBPyConnection, rules: Mapping[str, Rule]) -> list[Outcome]:
    """Fixed platforms have one position each, and no two share one (bar the pairs that a source keeps on purpose)."""
    places = connection.execute(
        """SELECT platform_id, count(DISTINCT (round(longitude, 5), round(latitude, 5))) AS n,
                  round(min(longitude), 5) AS lon, round(min(latitude), 5) AS lat
           FROM rows WHERE trip_id IS NULL GROUP BY 1 ORDER BY 1"""
    ).df()
    moved = places[places["n"] > 1]
    shared = places[places.duplicated(["lon", "lat"], keep=False)]
    told = "; ".join(" = ".join(map(str, ids)) for _, ids in list(shared.groupby(["lon", "lat"])["platform_id"])[:5])
    return [
        Outcome.of("stays_in_place", WHERE, rules, len(places), len(moved), ", ".join(moved["platform_id"].astype(str)[:5])),
        Outcome.of("own_place", WHERE, rules, len(places), len(shared), told),
    ]


def daily_cycle(connection: duckdb.DuckDBPyConnection, rules: Mapping[str, Rule], cycle: DailyCycle) -> Outcome:
    """Local time taken for UTC (or a wrong zone) moves the warmest hour. The peak is that of the first harmonic of the hourly means."""
    hours = connection.execute(
        "SELECT hour(time) AS hour, avg(value) AS mean, avg(longitude) AS lon FROM rows WHERE variable = ? GROUP BY 1 ORDER BY 1",
        [cycle.variable],
    ).df()
    return cycle_outcome(hours["hour"].to_numpy(), hours["mean"].to_numpy(), float(hours["lon"].mean()), cycle, rules)


def cycle_outcome(hour: np.ndarray, mean: np.ndarray, longitude: float, cycle: DailyCycle, rules: Mapping[str, Rule]) -> Outcome:
    """Judge the means of hours of the day (UTC) at a longitude in degrees; all 24 are needed."""
    if len(hour) < 24:
        return Outcome.of("daily_cycle", WHERE, rules, 0, 0, f"{cycle.variable} covers {len(hour)} of 24 hours")
    angle = 2 * np.pi * hour / 24
    phase = math.atan2(float(mean @ np.sin(angle)), float(mean @ np.cos(angle)))
    peak = (phase * 12 / math.pi + longitude / 15) % 24
    first, last = cycle.peak
    detail = f"{cycle.variable} peaks at {peak:.1f} h local solar time, expected {first:g} to {last:g} h"
    return Outcome.of("daily_cycle", WHERE, rules, 1, 0 if first <= peak <= last else 1, detail)
