"""The quality report: what the gate and quality control found, as a JSON metric. No clock, no path, the same bytes for the same input."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline import check_field, check_observations, qc
from pipeline.expectations import Outcome

_NAMES = {1: "pass", 2: "not_evaluated", 3: "suspect", 4: "fail", 9: "missing"}


def provenance(ingested: Path) -> dict[str, Any]:
    """What ingest recorded about the source; empty where it recorded nothing."""
    path = ingested / "ingest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def of_observations(findings: check_observations.Findings) -> dict[str, Any]:
    report: dict[str, Any] = _head(findings.outcomes, findings.blocked)
    report |= {
        "rows": findings.rows,
        "partitions": findings.partitions,
        "quarantined_rows": findings.held_rows,
        "quarantined_partitions": len(findings.held_partitions),
        "quarantined_at_ingest": findings.held_rows_at_ingest,
    }
    if findings.tests is None or findings.sensors is None:
        return report | {"rules": rules(findings.outcomes)}
    verdicts = findings.tests[findings.tests["test"] == "aggregate"].groupby("flag")["n"].sum()
    checked = int(verdicts.sum())
    sensors = findings.sensors
    known = sensors["expected"].notna()
    report |= {
        "checked_rows": checked,
        "suspect_share": _share(verdicts.get(qc.SUSPECT, 0), checked),
        "fail_share": _share(verdicts.get(qc.FAIL, 0), checked),
        "sensors": len(sensors),
        "completeness": _share(sensors["n"][known].sum(), sensors["expected"][known].sum()) if known.any() else None,
        "flags": {
            test: {_NAMES[flag]: int(part["n"][part["flag"] == flag].sum()) for flag in _NAMES if (part["flag"] == flag).any()}
            for test, part in findings.tests.groupby("test")
        },
        "rules": rules(findings.outcomes),
        "not_run": findings.off,
        "per_sensor": [_sensor(row) for row in sensors.to_dict("records")],
    }
    return report


def _sensor(row: Mapping[Any, Any]) -> dict[str, Any]:
    expected = None if math.isnan(row["expected"]) else int(row["expected"])
    return {
        "platform_id": row["platform_id"],
        "rows": int(row["n"]),
        "expected": expected,
        "completeness": None if expected is None else _share(row["n"], expected),
        "suspect": int(row["suspect"]),
        "fail": int(row["fail"]),
    }


def of_field(findings: check_field.Findings) -> dict[str, Any]:
    report = _head(findings.outcomes, findings.blocked) | check_field.counts(findings)
    table = findings.frames
    report["variables"] = {
        name: {
            "min": _number(table[f"{name}_min"].min()),
            "max": _number(table[f"{name}_max"].max()),
            "mean": _number(table[f"{name}_mean"].mean()),
            "missing_share": _number(table[f"{name}_missing"].mean()),
        }
        for name in findings.variables
    }
    return report | {"rules": rules(findings.outcomes)}


def rules(outcomes: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """Counts per rule over all partitions, with their denominators."""
    merged: dict[str, dict[str, Any]] = {}
    for outcome in outcomes:
        entry = merged.setdefault(
            outcome.rule,
            {"severity": outcome.severity, "passed": True, "evaluated": 0, "offenders": 0, "tables": 0, "failed_tables": 0, "detail": ""},
        )
        entry["evaluated"] += outcome.evaluated
        entry["offenders"] += outcome.offenders
        entry["tables"] += 1
        entry["failed_tables"] += not outcome.passed
        entry["passed"] &= outcome.passed
        if outcome.detail and (not entry["detail"] or (not outcome.passed and entry["failed_tables"] == 1)):
            entry["detail"] = outcome.detail if outcome.where.startswith("all ") else f"{outcome.where}: {outcome.detail}"
    return merged


def failures(outcomes: Iterable[Outcome], severity: str) -> list[str]:
    """One line for each failed rule of a severity."""
    return [
        f"{name}: {entry['offenders']:,} of {entry['evaluated']:,}" + (f" ({entry['detail']})" if entry["detail"] else "")
        for name, entry in rules(outcomes).items()
        if entry["severity"] == severity and not entry["passed"]
    ]


def write(report: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _head(outcomes: Iterable[Outcome], blocked: bool) -> dict[str, Any]:
    merged = rules(outcomes)
    failed = {
        severity: sum(not e["passed"] and e["severity"] == severity for e in merged.values())
        for severity in ("block", "quarantine", "warn")
    }
    return {
        "blocked": int(blocked),
        "failed_block": failed["block"],
        "failed_quarantine": failed["quarantine"],
        "failed_warn": failed["warn"],
    }


def _share(part: float, whole: float) -> float:
    return round(float(part) / float(whole), 6) if whole else 0.0


def _number(value: float) -> float | None:
    return None if value != value else float(f"{value:.6g}")
