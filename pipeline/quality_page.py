"""The quality page: the numbers of report.json as one HTML file that needs no network. The same input gives the same bytes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import pandas as pd

from pipeline import check_field, check_observations, drawings, lexicon, qc

TEMPLATES = Path(__file__).parent / "templates"
COLUMNS = 120  # of a heat map
ROWS = 60
WORST = 15
RING = 0.01  # share of flagged values that puts a ring around a sensor

_SHARE_LEGEND = [
    ("a5", "97 % and more"), ("a4", "90 to 97 %"), ("a3", "75 to 90 %"), ("a2", "50 to 75 %"), ("a1", "25 to 50 %"),
    ("a0", "below 25 %"), ("none", "nothing expected"),
]  # fmt: skip


_ABOUT = {
    "source": "source", "attribution": "attribution", "licence": "licence", "history": "made by", "zone": "zone of the source",
    "source_time_label": "time label of the source", "time_label": "time label here",
}  # fmt: skip


def render(key: str, gate: Any, findings: Any, report: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """The page of one source. `gate` are its parameters, `findings` what the checks found, `provenance` what ingest recorded."""
    about = _of_field(findings, report) if gate.kind == "field" else _of_observations(gate, findings, report)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.ChainableUndefined)
    return environment.get_template("quality.html").render(
        key=key,
        title=provenance.get("title") or f"Quality of {key}",
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        verdict=_verdict(report, about.pop("sentence")),
        rules=[_rule(name, entry) for name, entry in report["rules"].items()],
        provenance=[(words, provenance[name]) for name, words in _ABOUT.items() if provenance.get(name)],
        files=_files(provenance),
        **about,
    )


def _verdict(report: Mapping[str, Any], sentence: str) -> dict[str, str]:
    if report["blocked"]:
        return {"tone": "bad", "word": "Not fit for use: the run is stopped", "sentence": sentence}
    if report["failed_quarantine"]:
        return {"tone": "warn", "word": "Fit for use, with data held back", "sentence": sentence}
    if report["failed_warn"]:
        return {"tone": "warn", "word": "Fit for use, with warnings", "sentence": sentence}
    return {"tone": "good", "word": "Fit for use", "sentence": sentence}


def _rule(name: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    if not entry["passed"]:
        tone, result = ("bad", "failed") if entry["severity"] == "block" else ("warn", "failed")
    elif not entry["evaluated"]:
        tone, result = "soft", "not judged"
    else:
        tone, result = "good", "passed"
    return {
        "name": name.replace("_", " "),
        "tone": tone,
        "result": result,
        **{k: entry[k] for k in ("severity", "evaluated", "offenders", "detail")},
    }


def _files(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and hashes of the raw files that ingest read."""
    return [(name, entry["sha256"]) for name, entry in sorted(provenance.get("raw", {}).items())]


# Observations


def _of_observations(
    gate: check_observations.ObservationGate, findings: check_observations.Findings, report: Mapping[str, Any]
) -> dict[str, Any]:
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
        "tests": [_test(name, report["flags"].get(name, {})) for name in (*qc.TESTS, "aggregate")],
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


def _test(name: str, flags: Mapping[str, int]) -> dict[str, Any]:
    count = {flag: flags.get(flag, 0) for flag in ("pass", "suspect", "fail", "not_evaluated")}
    judged = count["pass"] + count["suspect"] + count["fail"]
    share = f"{(count['suspect'] + count['fail']) / judged:.3%}" if judged else "-"
    return {"name": "verdict" if name == "aggregate" else name.replace("_", " "), "share": share, **count}


def _availability(gate: check_observations.ObservationGate, findings: check_observations.Findings) -> dict[str, Any]:
    """Present over expected values per sensor and stretch of days. A sensor without an expected number is measured against one that
    reports at every step, so its colours say how often it was there."""
    daily, sensors = findings.daily, findings.sensors
    assert daily is not None
    assert sensors is not None
    days = pd.date_range(daily["day"].min(), daily["day"].max(), freq="D")
    per_column = math.ceil(len(days) / COLUMNS)
    first = days[0]
    columns = math.ceil(len(days) / per_column)
    wanted = np.zeros(columns)
    column_of_day = np.arange(len(days)) // per_column
    np.add.at(wanted, column_of_day, np.array([_covers(gate, findings, day) for day in days]))
    fixed_first = sensors.assign(moves=sensors["expected"].isna()).sort_values(["moves", "n"], ascending=[True, False], kind="stable")
    shown = fixed_first.head(ROWS)
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
        "heat_legend": _SHARE_LEGEND,
    }


def _covers(gate: check_observations.ObservationGate, findings: check_observations.Findings, day: pd.Timestamp) -> float:
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


def _worst(findings: check_observations.Findings) -> dict[str, Any]:
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


# Fields


def _of_field(findings: check_field.Findings, report: Mapping[str, Any]) -> dict[str, Any]:
    table = findings.frames
    good = 1 - report["suspect_share"] - report["fail_share"]
    histories = "1 history" if report["trajectories"] == 1 else f"{report['trajectories']} histories"
    names = ", ".join(lexicon.lookup(name).long_name for name in findings.variables)
    verdict = table["flag_aggregate"].to_numpy()
    bad = table[verdict >= qc.SUSPECT].head(WORST)
    flags = [name for name in check_field.FLAGS if name != "flag_aggregate"]
    return {
        "sentence": f"{report['frames']:,} frames of {names} in {histories} on {findings.cells:,} cells were checked: {good:.2%} passed "
        f"every test, {report['suspect_share']:.2%} are suspect and {report['fail_share']:.2%} failed.",
        "tiles": [
            (f"{report['frames']:,}", "frames"),
            (report["trajectories"], "histories"),
            (report["empty_frames"], "empty frames"),
            (f"{report['suspect_share']:.2%}", "suspect"),
            (f"{report['fail_share']:.2%}", "failed"),
        ],
        "tests": [_test(name.removeprefix("flag_"), report["flags"].get(name.removeprefix("flag_"), {})) for name in check_field.FLAGS],
        "not_run": [],
        "curves": _curves(findings),
        "worst_title": "Frames with a flag",
        "worst_columns": ["frame", "history", *(name.removeprefix("flag_").replace("_", " ") for name in flags)],
        "worst": [
            [_label(row["time"]), int(row["trajectory"]), *(_word(int(row[name])) for name in flags)] for row in bad.to_dict("records")
        ],
    } | _frame_map(table)


def _word(flag: int) -> str:
    return {1: "pass", 2: "·", 3: "suspect", 4: "fail", 9: "missing"}[flag]


def _label(time: Any) -> str:
    return pd.Timestamp(time).strftime("%Y-%m-%d %H:%M") if isinstance(time, pd.Timestamp | np.datetime64) else f"{time:g}"


def _frame_map(table: pd.DataFrame) -> dict[str, Any]:
    """Share of sound frames: histories down, stretches of frames across."""
    histories = table["trajectory"].nunique()
    sound = (table["flag_aggregate"] <= qc.NOT_EVALUATED).to_numpy(float).reshape(histories, -1)
    frames = sound.shape[1]
    times = table["time"].iloc[:frames]
    wide = math.ceil(frames / COLUMNS)
    share = np.stack([sound[:, start : start + wide].mean(axis=1) for start in range(0, frames, wide)], axis=1)
    together = math.ceil(histories / ROWS)
    names = [
        str(start) if together == 1 else f"{start} to {min(start + together, histories) - 1}" for start in range(0, histories, together)
    ]
    share = np.stack([share[start : start + together].mean(axis=0) for start in range(0, histories, together)])
    columns = "one frame" if wide == 1 else f"{wide} frames"
    return {
        "heat_map": drawings.heat_map(
            share, names, drawings.time_ticks([_label(t) for t in times[::wide]], 6), 15.0 if len(names) <= 40 else 13.0
        ),
        "heat_note": f"Share of frames without a flag; one column is {columns}, one row "
        + ("one history." if together == 1 else f"{together} histories."),
        "heat_legend": _SHARE_LEGEND[:-1],
    }


def _curves(findings: check_field.Findings) -> list[dict[str, Any]]:
    """Smallest, mean and largest value over time, over all histories."""
    drawn = []
    for name in findings.variables:
        by_time = findings.frames.groupby("time")
        low, middle, high = by_time[f"{name}_min"].min(), by_time[f"{name}_mean"].mean(), by_time[f"{name}_max"].max()
        wide = math.ceil(len(low) / 600)
        block = np.arange(len(low)) // wide
        series = [getattr(s.groupby(block), how)().to_numpy() for s, how in ((low, "min"), (middle, "mean"), (high, "max"))]
        labels = [_label(time) for time in low.index[::wide]]
        variable = lexicon.lookup(name)
        svg = drawings.curve(series[0], series[1], series[2], drawings.time_ticks(labels, 6), variable.unit if variable.unit != "1" else "")
        drawn.append({"name": variable.long_name, "svg": svg})
    return drawn
