"""What a run shows in the Prefect UI: the outcome of each stage, the score table, where to look."""

from __future__ import annotations

import json
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
        create_table_artifact(key="scores", table=scores, description="Scores on the frozen test cases, in physical units")
    lines = ["# Where to look", *(f"- **{dataset}**: {text}" for dataset, text in published.items())]
    if unavailable:
        lines += ["", "# Sources that could not be had", *(f"- {reason}" for reason in unavailable.values())]
    create_markdown_artifact(key="summary", markdown="\n".join(lines))


def score_rows(folder: Path) -> list[dict[str, Any]]:
    """The headline metrics of every dataset and model, one row each."""
    rows = []
    for path in sorted(folder.glob("*/*/metrics.json")):
        metrics = json.loads(path.read_text(encoding="utf-8"))
        rows.append({"dataset": path.parts[-3], "model": path.parts[-2], "metrics": metrics})
    return rows
