"""What a run shows in the Prefect UI: the outcome of each stage, the score table, where to look."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prefect.artifacts import create_markdown_artifact, create_table_artifact

SCORES = Path("data/scores")


def show(outcome: Mapping[str, str], unavailable: Mapping[str, str], published: Mapping[str, str]) -> None:
    """Attach the tables of a finished walk to the flow run."""
    rows = [{"stage": stage, "outcome": result} for stage, result in outcome.items()]
    create_table_artifact(key="stages", table=rows, description="Every stage of the plan and what became of it")
    if scores := score_rows(SCORES):
        create_table_artifact(key="scores", table=scores, description="RMSE on the frozen test cases, in physical units, by lead")
    lines = ["# Where to look", *(f"- **{dataset}**: {text}" for dataset, text in published.items())]
    if unavailable:
        lines += ["", "# Sources that could not be had", *(f"- {reason}" for reason in unavailable.values())]
    create_markdown_artifact(key="summary", markdown="\n".join(lines))


def score_rows(folder: Path) -> list[dict[str, Any]]:
    """RMSE by lead, one row for each dataset, stratum, variable and model."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for path in sorted(folder.glob("*/*/leads.csv")):
        with path.open(newline="", encoding="utf-8") as handle:
            for line in csv.DictReader(handle):
                key = (path.parts[-3], line["stratum"], line["variable"], line["model"])
                names = dict(zip(("dataset", "stratum", "variable", "model"), key, strict=True))
                rows.setdefault(key, names)[f"RMSE lead {line['lead']}"] = line["rmse"]
    return [rows[key] for key in sorted(rows)]
