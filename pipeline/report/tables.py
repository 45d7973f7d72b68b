"""Who predicts a dataset how well: the ranking, and for each variable and place the score tables with their figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from markupsafe import Markup

from pipeline import metrics
from pipeline import scores as score_tables
from pipeline.report import score_figures as figures
from pipeline.report import verdict
from pipeline.report.wording import number, percent, span, unit_text, variable_name
from pipeline.scores import Table

TABLED = ("rmse", "crps", "mae", "rel_mse", "rel_l2", "bias", "coverage_90", "width_90")


def sections(table: Table, skills: pd.DataFrame) -> list[dict[str, Any]]:
    """One section a variable and stratum: figures, the score tables of all metrics, skill against each baseline."""
    sections = []
    for variable, unit in table.about["units"].items():
        for stratum in ("field", "context", "held_out", "between"):
            rows = table.select(variable=variable, stratum=stratum, distance="all")
            if rows.empty:
                continue
            leads = sorted(set(rows["lead"]))
            probabilistic = any(figures.able(table, name, "coverage_90") for name in table.about["models"])
            binned = "between" if stratum == "field" else stratum
            far = binned in set(table.rows.loc[table.rows["distance"] != "all", "stratum"])
            best = verdict.best_model(table, variable, stratum)
            several = len(leads) > 1
            told = [lead for lead in leads if lead > 0 or stratum != "context" or not several]  # at a sensor, now: all repeat the reading
            sections.append(
                {
                    "variable": variable_name(variable),
                    "stratum": stratum,
                    "leads": [f"{lead:g}" for lead in leads],
                    "curve": Markup(figures.by_lead(table, "rmse", variable, stratum, unit)) if several else None,
                    "skill_curve": Markup(figures.skill_by_lead(table, skills, best, variable, stratum)) if best and several else None,
                    "distance": Markup(figures.by_distance(table, variable, binned, _shown(leads), unit))
                    if far and stratum != "between"
                    else None,
                    "calibration": Markup(figures.calibration(table, variable, stratum)) if probabilistic else None,
                    "tables": [score_table(table, name, variable, stratum, leads) for name in TABLED if (rows["metric"] == name).any()],
                    "best": best,
                    "skill": skill_table(skills, variable, stratum, told),
                    "told": [f"{lead:g}" for lead in told],
                    "unbeaten": unbeaten(skills, variable, stratum, told),
                    "folded": "field" in set(table.rows["stratum"]) and stratum != "field",
                    "n": f"{int(rows['n'].max()):,}",
                    "spread": number(float(rows.loc[rows["metric"] == "truth_std", "value"].max())),
                    "unit": unit_text(unit),
                }
            )
    return sections


def rankings(table: Table, skills: pd.DataFrame, budgets: Mapping[str, str]) -> list[dict[str, Any]]:
    """One ranking a variable and task: predictors by mean rank of RMSE with its interval, and by lead the baselines that no model beat."""
    out = []
    for variable, unit in table.about["units"].items():
        for task in verdict.TASKS:
            stratum = verdict.primary(table, task)
            if stratum is None:
                continue
            leads = sorted(set(table.select(variable=variable, stratum=stratum, distance="all", task=task)["lead"]))
            lines = {line["model"]: line for line in score_table(table, verdict.JUDGED, variable, stratum, leads)["rows"]}
            standing = score_tables.standing(table, verdict.JUDGED, variable, stratum, leads)
            out.append(
                {
                    "variable": variable_name(variable),
                    "task": task,
                    "stratum": stratum,
                    "unit": unit_text(unit),
                    "leads": [f"{lead:g}" for lead in leads],
                    "rows": [
                        {
                            **lines[row["model"]],
                            "budget": budgets.get(row["model"], ""),
                            "rank": f"{row['rank']:.1f}",
                            "span": "" if pd.isna(row["low"]) else f"{row['low']:.1f} – {row['high']:.1f}",
                            "missing": len(leads) - row["leads"],
                        }
                        for row in standing.to_dict("records")
                    ],
                    "unbeaten": _unbeaten_by_lead(skills, variable, stratum, leads, list(standing["model"])) if table.models else None,
                }
            )
    return out


def by_lead(table: Table) -> pd.DataFrame:
    """RMSE by lead in every stratum: model, variable, stratum, lead, rmse, and `panel` for one drawing each."""
    rows = table.select(metric="rmse", distance="all").rename(columns={"value": "rmse"})
    return rows.assign(panel=rows["variable"] + ", " + rows["stratum"])[["panel", "model", "variable", "stratum", "lead", "rmse"]]


def score_table(table: Table, metric: str, variable: str, stratum: str, leads: Sequence[float]) -> dict[str, Any]:
    """Predictors by leads; the best of a lead is marked only if it beats every other by more than noise."""
    rows = table.select(metric=metric, variable=variable, stratum=stratum, distance="all")
    judged = metrics.METRICS[metric].best == "low"
    best = {lead: table.best(metric, variable, stratum, lead) if judged else None for lead in leads}
    against = {
        (name, row["lead"]): row
        for name in (table.models if judged else ())
        for row in verdict.against_best(table, name, metric, variable, stratum)
    }
    order = score_tables.ranking(table, metric, variable, stratum)["model"] if judged else list(table.about["models"])
    cells = rows.set_index(["model", "lead"])
    lines = []
    for name in order:
        what = table.about["models"][name]
        line: list[dict[str, Any] | None] = []
        for lead in leads:
            if (name, lead) not in cells.index:
                line.append(None)
                continue
            row, versus = cells.loc[(name, lead)], against.get((name, lead))
            title = "" if versus is None else f"{versus['verdict']} than the best baseline, {versus['baseline']}"
            title = title.replace("within noise than", "within noise of").replace("too few blocks than", "too few blocks to compare with")
            winner = best[lead]
            line.append(
                {
                    "value": number(row["value"]),
                    "interval": "" if pd.isna(row["low"]) else f"{number(row['low'])} – {number(row['high'])}",
                    "raw": float(row["value"]),
                    "best": winner is not None and winner == (name, True),
                    "verdict": versus["verdict"] if versus else "",
                    "title": title,
                }
            )
        if any(line):
            note = "CRPS = MAE" if metric == "crps" and what["distribution"] == "mean only" else ""
            lines.append({"model": name, "role": what["role"], "cells": line, "note": note})
    unit = metrics.unit(metric, table.about["units"][variable])
    return {"metric": metric, "title": metrics.METRICS[metric].title, "unit": unit_text(unit), "rows": lines, "judged": judged}


def skill_table(skills: pd.DataFrame, variable: str, stratum: str, leads: Sequence[float]) -> list[dict[str, Any]]:
    """RMSE of each model relative to each baseline, with verdicts; one line a pair."""
    rows = skills[(skills["metric"] == "rmse") & (skills["variable"] == variable) & (skills["stratum"] == stratum)]
    lines = []
    for (model, baseline), part in rows.groupby(["model", "baseline"], sort=False):
        by = part.set_index("lead").to_dict("index")
        cells = [None if lead not in by else {**by[lead], "text": percent(by[lead]["skill"]), "span": span(by[lead])} for lead in leads]
        if any(cells):
            lines.append({"model": model, "baseline": baseline, "cells": cells})
    return lines


def _unbeaten_by_lead(
    skills: pd.DataFrame, variable: str, stratum: str, leads: Sequence[float], order: Sequence[str]
) -> list[list[str] | None]:
    """For each lead the baselines that no model beat, in the order given; None where no model answered."""
    asked = set(skills.loc[(skills["variable"] == variable) & (skills["stratum"] == stratum), "lead"])
    left = score_tables.unbeaten(skills)
    left = left[(left["variable"] == variable) & (left["stratum"] == stratum)]
    names = {lead: set(left.loc[left["lead"] == lead, "baseline"]) for lead in leads}
    return [[name for name in order if name in names[lead]] if lead in asked else None for lead in leads]


def unbeaten(skills: pd.DataFrame, variable: str, stratum: str, leads: Sequence[float]) -> list[str]:
    """Baselines that no model beat, with those of `leads` where that is so."""
    left = score_tables.unbeaten(skills)
    left = left[(left["variable"] == variable) & (left["stratum"] == stratum) & left["lead"].isin(leads)]
    return [f"{name} (lead {', '.join(f'{lead:g}' for lead in part['lead'])})" for name, part in left.groupby("baseline", sort=False)]


def _shown(leads: Sequence[float]) -> list[float]:
    """The first lead, and one in the middle where there are several."""
    return [leads[0]] if len(leads) < 3 else [leads[0], leads[len(leads) // 2]]
