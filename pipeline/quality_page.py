"""The quality page: the numbers of report.json as one HTML file that needs no network. The same input gives the same bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from pipeline import quality_page_field, quality_page_observations

TEMPLATES = Path(__file__).parent / "templates"
_ABOUT = {
    "source": "source", "attribution": "attribution", "licence": "licence", "history": "made by", "zone": "zone of the source",
    "source_time_label": "time label of the source", "time_label": "time label here",
}  # fmt: skip


def render(key: str, gate: Any, findings: Any, report: Mapping[str, Any], provenance: Mapping[str, Any]) -> str:
    """The page of one source. `gate` are its parameters, `findings` what the checks found, `provenance` what ingest recorded."""
    observed = gate.kind != "field"
    about = quality_page_observations.shown(gate, findings, report) if observed else quality_page_field.shown(findings, report)
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.ChainableUndefined)
    return environment.get_template("quality.html").render(
        key=key,
        title=provenance.get("title") or f"Quality of {key}",
        style=(TEMPLATES / "style.css").read_text(encoding="utf-8"),
        verdict=_verdict(report, about.pop("sentence")),
        rules=[_rule(name, entry) for name, entry in report["rules"].items()],
        provenance=[(words, provenance[name]) for name, words in _ABOUT.items() if provenance.get(name)],
        files=_files(provenance),
        tests=[_test(name, report["flags"].get(name, {})) for name in about.pop("tests", ())],
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


def _test(name: str, flags: Mapping[str, int]) -> dict[str, Any]:
    count = {flag: flags.get(flag, 0) for flag in ("pass", "suspect", "fail", "not_evaluated")}
    judged = count["pass"] + count["suspect"] + count["fail"]
    share = f"{(count['suspect'] + count['fail']) / judged:.3%}" if judged else "-"
    return {"name": "verdict" if name == "aggregate" else name.replace("_", " "), "share": share, **count}


def _files(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Names and hashes of the raw files that ingest read."""
    return [(name, entry["sha256"]) for name, entry in sorted(provenance.get("raw", {}).items())]
