"""Stage `validate`: is what was ingested fit for use? A gate with severities, quality flags, a report and a page.

    FOLDER/observations/PARTITION.parquet   all rows that passed the gate, raw values untouched, flag_* added (pipeline/qc.py)
    FOLDER/quarantine/PARTITION.parquet     rows held back, all columns and `reason`
    FOLDER/frames.parquet                   instead of the two, for a field: one row a frame with its flags
    FOLDER/report.json, FOLDER/page.html

A `block` rule that fails ends the run; then report and page are in FOLDER.blocked and FOLDER stays as it was.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from pipeline import atomic, check_field, check_observations, fields, observation_gate, quality_page, quality_report
from pipeline.params import ParamsError, Section

log = logging.getLogger(__name__)

KINDS: dict[str, type[Section]] = {"observations": observation_gate.ObservationGate, "field": check_field.FieldGate}


class Validation(Section):
    """A section of `validate`: its `kind` says which further parameters it has."""

    @classmethod
    def chosen(cls, raw: Any) -> type[Section]:
        kind = raw.get("kind") if isinstance(raw, dict) else None
        if kind not in KINDS:
            raise ParamsError(f"unknown kind {kind!r} of a section of `validate`: it must be one of {', '.join(KINDS)}")
        return KINDS[kind]


def params_model(key: str) -> type[Section]:
    return Validation


def run(params: Any, key: str, *, ingested: Path, out: Path) -> None:
    """Check the ingested source into the folder `out`. FIELDCAST_WORKERS sets the number of processes.

    Raises ValueError when a blocking rule fails, naming the rules and where the report is.
    """
    if (params.kind == "field") != fields.is_field(ingested):
        found = "a field" if fields.is_field(ingested) else "observations"
        raise ValueError(f"{ingested} holds {found}, but params.yaml says validate.{key}.kind: {params.kind}; make them agree")
    blocked = out.with_name(f"{out.name}.blocked")
    with atomic.writing(out) as temporary:
        temporary.mkdir()
        findings: Any
        if params.kind == "field":
            findings = check_field.check(ingested, params)
            check_field.write_frames(findings, temporary / "frames.parquet")
            report = quality_report.of_field(findings)
        else:
            findings = check_observations.check(ingested, params, temporary)
            report = quality_report.of_observations(findings)
        page = quality_page.render(key, params, findings, report, quality_report.provenance(ingested))
        if findings.blocked:
            with atomic.writing(blocked) as folder:
                folder.mkdir()
                _write(report, page, folder)
            reasons = quality_report.failures(findings.outcomes, "block")
            raise ValueError(
                f"{ingested} is not fit for use, {len(reasons)} blocking rules failed:\n  "
                + "\n  ".join(reasons)
                + f"\nSee {blocked / 'page.html'} and {blocked / 'report.json'}; {out} stays as it was."
            )
        _write(report, page, temporary)
    atomic.remove(blocked)
    for severity in ("quarantine", "warn"):
        for line in quality_report.failures(findings.outcomes, severity):
            log.warning("%s: %s: %s", key, severity, line)


def _write(report: dict[str, Any], page: str, folder: Path) -> None:
    quality_report.write(report, folder / "report.json")
    (folder / "page.html").write_text(page, encoding="utf-8")
