"""The tables of docs/results.md, from the score tables and run folders of a build.

    python -m benchmarks.results data/scores data/runs > tables.md

For every dataset: the numbers of parameters and the steps kept, then a table for each metric that says something there, by lead, with its
95 % block-bootstrap interval. Bold is the lowest value of a column, with every other one whose paired difference from it is within noise.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from pipeline import metrics, scores
from pipeline.report.wording import unit_text
from pipeline.scores import Table

MEASURED = ("rmse", "crps", "coverage_90")  # of a dataset of measurements
SIMULATED = ("rel_mse",)
LIKELIHOOD = ("nll",)


def wanted(table: Table) -> list[tuple[str, str, str]]:
    """(variable, stratum, metric) worth a table: a field is scored as a whole where it is known, sensors by what they are to the models."""
    strata = {*table.rows["stratum"]}
    places = ["field"] if "field" in strata else [name for name in ("context", "between", "held_out") if name in strata]
    simulated = table.about["time_unit"] == "1"
    names = {*table.rows["metric"]}
    measures = [m for m in ((SIMULATED if simulated else MEASURED) + (LIKELIHOOD if "oracle" in table.baselines else ())) if m in names]
    return [
        (variable, place, metric)
        for variable in table.about["units"]
        for place in places
        for metric in measures
        if not (metric == "coverage_90" and place == "context")
    ]


def markdown(table: Table, variable: str, stratum: str, metric: str) -> str:
    """One table: a row a predictor, baselines first, a column a lead."""
    rows = table.select(variable=variable, stratum=stratum, metric=metric, distance="all")
    leads = sorted({*rows["lead"]})
    cells = {(row["model"], row["lead"]): row for row in rows.to_dict("records")}
    unit = unit_text(metrics.unit(metric, table.about["units"][variable]))
    time = "" if table.about["time_unit"] == "1" else f" {table.about['time_unit']}"
    name = metrics.METRICS[metric].title
    what = f"{name[:1].upper()}{name[1:]} of {variable}{f' in {unit}' if unit else ''}"
    lines = [f"{what}, {scores.STRATA[stratum]}, by lead{f' in{time}' if time else ''}:", ""]
    lines += ["| model |" + "".join(f" {lead:.4g} |" for lead in leads), "|---|" + "---|" * len(leads)]
    ties = {lead: level(table, variable, stratum, metric, lead) for lead in leads} if metrics.METRICS[metric].best == "low" else {}
    for name in (*table.baselines, *table.models):
        if any((name, lead) in cells for lead in leads):
            texts = [_cell(cells.get((name, lead)), name in ties.get(lead, ())) for lead in leads]
            lines.append(f"| {name} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def level(table: Table, variable: str, stratum: str, metric: str, lead: float) -> set[str]:
    """The predictor with the lowest value and those that cannot be told from it."""
    found = table.best(metric, variable, stratum, lead)
    if found is None:
        return set()
    rows = table.select(variable=variable, stratum=stratum, metric=metric, distance="all", lead=lead)
    same = {str(name) for name in rows["model"] if name != found[0] and _tied(table, found[0], str(name), metric, variable, stratum, lead)}
    return {found[0]} | same


def trained(runs: Path, table: Table) -> str:
    """Parameters of each model and the step kept in each phase."""
    parts = []
    for name in table.models:
        path = runs / table.about["dataset"] / name / "summary.json"
        if not path.exists():  # as where evaluate says `trained_on`
            parts.append(f"{name} (trained on another dataset)")
            continue
        summary = json.loads(path.read_text(encoding="utf-8"))
        phases = ", ".join(f"{phase} {what['best_step']}" for phase, what in summary["phases"].items())
        parts.append(f"{name} {summary['parameters']:,} ({phases})")
    return f"Parameters, and the step kept in each phase: {'; '.join(parts)}." if parts else "No model was trained on this dataset."


def _tied(table: Table, best: str, other: str, metric: str, variable: str, stratum: str, lead: float) -> bool:
    return scores.compare(table, best, other, metric, variable, stratum, lead)["verdict"] == "within noise"


def _cell(row: dict[str, float] | None, bold: bool) -> str:
    if row is None:
        return "-"
    value = f"**{row['value']:.3g}**" if bold else f"{row['value']:.3g}"
    return value if row["low"] != row["low"] else f"{value} ({row['low']:.3g} to {row['high']:.3g})"


def main(score_root: Path, run_root: Path) -> int:
    for folder in sorted(path for path in score_root.iterdir() if path.is_dir()):
        table = scores.read_all(folder)
        print(f"## {folder.name}, {table.about['cases']['count']} test cases in {table.about['cases']['blocks']} blocks\n")
        print(trained(run_root, table))
        for variable, stratum, metric in wanted(table):
            print("\n" + markdown(table, variable, stratum, metric))
        print()
    return 0


if __name__ == "__main__":
    raise SystemExit(main(*map(Path, sys.argv[1:3] or ("data/scores", "data/runs"))))
