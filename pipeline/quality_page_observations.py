"""What the quality page of a source of observations shows: availability, a map, the worst sensors, what was held back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from pipeline import drawings, qc
from pipeline.check_observations import Findings
from pipeline.observation_gate import ObservationGate

WORST = 15
RING = 0.01  # share of flagged values that puts a ring around a sensor


def shown(gate: ObservationGate, findings: Findings, report: Mapping[str, Any]) -> dict[str, Any]:
    if findings.sensors is None or findings.tests is None or findings.daily is None:
        sentence = (
            f"{report['rows']:,} rows in {report['partitions']} partitions arrived; nothing was passed on. The failed rules are below."
        )
        return {"sentence": sentence, "tiles": [(f"{report['rows']:,}", "rows arrived"), (report["failed_block"], "blocking rules failed")]}
    complete = (
        "" if report["completeness"] is None else f" Of the values expected from fixed sensors {report['completeness']:.1%} are there."
    )
    passed = 1 - report["suspect_share"] - report["fail_share"]
    about: dict[str, Any] = {
        "sentence": f"{report['checked_rows']:,} rows from {report['sensors']} sensors in {report['partitions']} partitions were checked: "
        f"{passed:.2%} passed every test, {report['suspect_share']:.2%} are suspect and {report['fail_share']:.2%} failed.{complete}",
        "tiles": [
            (f"{report['rows']:,}", "rows arrived"),
            ("-" if report["completeness"] is None else f"{report['completeness']:.1%}", "complete"),
            (f"{report['suspect_share']:.2%}", "suspect"),
            (f"{report['fail_share']:.2%}", "failed"),
            (f"{report['quarantined_rows'] + report['quarantined_at_ingest']:,}", "rows held back"),
            (report["sensors"], "sensors"),
        ],
        "tests": [*qc.TESTS, "aggregate"],
        "not_run": [(name.replace("_", " "), why) for name, why in report["not_run"].items()],
    }
    about |= _availability(gate, findings) | _map(findings.sensors) | _worst(findings) | _by_sensor(findings.tests)
    if findings.held_at_ingest is not None:
        unread = findings.held_at_ingest
        about |= {
            "unread_note": f"{findings.held_rows_at_ingest:,} rows or files never became observations; they are in ingest's quarantine. "
            f"The first {len(unread)} are shown.",
            "unread": [[_cell(value) for value in row] for row in unread.itertuples(index=False)],
        }
    if findings.held is not None:
        shown = findings.held[["reason", *[c for c in findings.held.columns if c not in ("reason", "knowledge_time", "trip_id")]]]
        about |= {
            "held_note": f"{findings.held_rows:,} rows are in quarantine/ with all their columns; the first {len(shown)} are shown.",
            "held_columns": list(shown.columns),
            "held": [[_cell(value) for value in row] for row in shown.itertuples(index=False)],
        }
    return about


def _cell(value: Any) -> str:
    if isinstance(value, pd.Timestamp):
        return value.strftime("%Y-%m-%d %H:%M:%SZ")
    return f"{value:g}" if isinstance(value, float) else str(value)


def _availability(gate: ObservationGate, findings: Findings) -> dict[str, Any]:
    """Present over expected values per sensor and stretch of days. A sensor without an expected number is measured against one that
    reports at every step, so its colours say how often it was there."""
    daily, sensors = findings.daily, findings.sensors
    assert daily is not None
    assert sensors is not None
    days = pd.date_range(daily["day"].min(), daily["day"].max(), freq="D")
    per_column = math.ceil(len(days) / drawings.COLUMNS)
    first = days[0]
    columns = math.ceil(len(days) / per_column)
    wanted = np.zeros(columns)
    column_of_day = np.arange(len(days)) // per_column
    np.add.at(wanted, column_of_day, np.array([_covers(gate, findings, day) for day in days]))
    fixed_first = sensors.assign(moves=sensors["expected"].isna()).sort_values(["moves", "n"], ascending=[True, False], kind="stable")
    shown = fixed_first.head(drawings.ROWS)
    shown = pd.concat([shown[~shown["moves"]].sort_values("platform_id"), shown[shown["moves"]]])
    steps = pd.Timedelta("1D") / gate.step
    share = np.full((len(shown), columns), np.nan)
    column = ((daily["day"] - first) // pd.Timedelta("1D")).to_numpy() // per_column
    number = {(row.platform_id, row.moving): i for i, row in enumerate(shown.itertuples())}
    present = np.zeros_like(share)
    at = np.array([number.get(pair, -1) for pair in zip(daily["platform_id"], daily["moving"], strict=True)])
    use = (at >= 0) & (column >= 0) & (column < columns)
    np.add.at(present, (at[use], column[use]), daily["n"].to_numpy(float)[use])
    known = wanted > 0
    share[:, known] = np.minimum(present[:, known] / (wanted[known] * steps * shown["variables"].to_numpy()[:, None]), 1.0)
    labels = [(first + pd.Timedelta(days=int(c) * per_column)).strftime("%Y-%m-%d") for c in range(columns)]
    more = f" {len(shown)} of {len(sensors)} sensors are shown." if len(shown) < len(sensors) else ""
    stretch = "one day" if per_column == 1 else f"{per_column} days"
    loose = " Sensors that come and go are in blue: the stronger, the more often they reported." if shown["moves"].any() else ""
    height = 15.0 if len(shown) <= 40 else 13.0
    return {
        "heat_map": drawings.heat_map(share, list(shown["platform_id"]), drawings.time_ticks(labels), height, list(~shown["moves"])),
        "heat_note": f"Values present of those expected, over all variables; one column is {stretch}.{loose}{more}",
        "heat_legend": drawings.SHARE_LEGEND,
    }


def _covers(gate: ObservationGate, findings: Findings, day: pd.Timestamp) -> float:
    """Share of a UTC day in which values are expected."""
    end = day + pd.Timedelta("1D")
    spans = [(max(day, first), min(end, last + gate.step)) for first, last in findings.campaigns]
    return min(sum(max((b - a) / pd.Timedelta("1D"), 0.0) for a, b in spans), 1.0)


def _map(sensors: pd.DataFrame) -> dict[str, Any]:
    flagged = ((sensors["suspect"] + sensors["fail"]) / sensors["n"]).to_numpy()
    complete = sensors["completeness"].to_numpy()
    share = np.where(np.isnan(complete), 1 - flagged, np.minimum(complete, 1.0))
    ringed = flagged > RING
    order = np.argsort(share, kind="stable")
    labelled = np.ones(len(sensors), bool) if len(sensors) <= 30 else np.isin(np.arange(len(sensors)), order[:6])
    kind = (
        "completeness"
        if not np.isnan(complete).any()
        else "completeness, or by the share of values without a flag where no number is expected"
    )
    return {
        "map": drawings.sensor_map(
            sensors["longitude"].to_numpy(), sensors["latitude"].to_numpy(), share, ringed, list(sensors["platform_id"]), list(labelled)
        ),
        "map_note": f"Coloured by {kind}; a ring marks sensors with more than {RING:.0%} of their values suspect or failed "
        f"({int(ringed.sum())} of {len(sensors)}). A moving sensor stands at the mean of its positions.",
    }


def _worst(findings: Findings) -> dict[str, Any]:
    assert findings.sensors is not None
    assert findings.tests is not None
    sensors = findings.sensors.copy()
    sensors["flagged"] = (sensors["suspect"] + sensors["fail"]) / sensors["n"]
    sensors["usable"] = (sensors["n"] - sensors["suspect"] - sensors["fail"]) / sensors["expected"].fillna(sensors["n"])
    worst = sensors.sort_values(["usable", "platform_id"], kind="stable").head(WORST)
    return {
        "worst_title": "Worst sensors" if len(sensors) > WORST else "Sensors, worst first",
        "worst_columns": ["sensor", "rows", "expected", "complete", "suspect", "fail", "flagged", "usable"],
        "worst": [_worst_row(row) for row in worst.to_dict("records")],
    }


def _worst_row(row: Mapping[Any, Any]) -> list[str]:
    expected = not math.isnan(row["expected"])
    return [
        row["platform_id"],
        f"{row['n']:,}",
        f"{int(row['expected']):,}" if expected else "-",
        f"{row['completeness']:.1%}" if expected else "-",
        f"{row['suspect']:,}",
        f"{row['fail']:,}",
        f"{row['flagged']:.2%}",
        f"{row['usable']:.1%}",
    ]


def _by_sensor(tests: pd.DataFrame) -> dict[str, Any]:
    bad = tests[tests["flag"].isin([qc.SUSPECT, qc.FAIL])]
    table = bad.pivot_table(index="platform_id", columns="test", values="n", aggfunc="sum", fill_value=0, observed=True)
    if table.empty:
        return {}
    table = table.reindex(columns=[*qc.TESTS, "aggregate"], fill_value=0)
    table = table.sort_values(["aggregate"], ascending=False, kind="stable").head(WORST)
    return {
        "by_sensor_columns": ["sensor", *(name.replace("_", " ") for name in qc.TESTS), "verdict"],
        "by_sensor": [
            [name, *(f"{int(value):,}" if value else "·" for value in row)] for name, row in zip(table.index, table.to_numpy(), strict=True)
        ],
    }
