"""What a score table says, in sentences: who won where, by how much, and where nobody can tell. Losses are said like wins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline import metrics
from pipeline.report.wording import lead_text, unit_text
from pipeline.scores import STRATA, Table, compare, ranking

JUDGED = "rmse"
TASKS = {  # strata in the order in which they speak for a task
    "forecast": (("field", "context"), "Forecast"),
    "interpolation": (("between", "held_out"), "Interpolation"),
}


def against_best(table: Table, model: str, metric: str, variable: str, stratum: str) -> list[dict[str, Any]]:
    """The model against the baseline with the lowest value at each lead: lead, baseline, value, floor, and the fields of scores.compare.

    Which baseline is best is only known afterwards, so this is the hardest comparison there is.
    """
    out = []
    rows = table.select(metric=metric, variable=variable, stratum=stratum, distance="all")
    for lead in sorted(set(rows["lead"])):
        part = rows[rows["lead"] == lead]
        own = part[part["model"] == model]
        others = part[part["model"].isin(table.baselines)]
        if own.empty or others.empty:
            continue
        best = others.sort_values(["value", "model"]).iloc[0]
        found = compare(table, model, str(best["model"]), metric, variable, stratum, float(lead))
        value = float(own["value"].iloc[0])
        out.append({"lead": float(lead), "baseline": str(best["model"]), "value": value, "floor": float(best["value"]), **found})
    return out


def primary(table: Table, task: str) -> str | None:
    """The stratum that speaks for a task in this dataset; None where no lead of it was scored."""
    present = set(table.select(task=task)["stratum"])
    return next((stratum for stratum in TASKS[task][0] if stratum in present), None)


def best_model(table: Table, variable: str, stratum: str, task: str | None = None) -> str | None:
    """The trained model with the lowest mean rank of RMSE in a stratum at the leads of a task (None: all), of those that answer most."""
    leads = None if task is None else {*table.select(variable=variable, stratum=stratum, task=task)["lead"]}
    order = [name for name in ranking(table, JUDGED, variable, stratum, leads)["model"] if name in table.models]
    return order[0] if order else None


def headline(table: Table) -> list[str]:
    """One sentence a task (and variable), the first of them the main one; then one on calibration."""
    sentences = []
    for variable in table.about["units"]:
        for task, (_, title) in TASKS.items():
            stratum = primary(table, task)
            if stratum is not None:
                prefix = title if len(table.about["units"]) == 1 else f"{title} of {variable}"
                sentences.append(f"{prefix} {STRATA[stratum]}: {_task(table, variable, stratum, task)}")
        sentences += [*_against_background(table, variable), *_calibration(table, variable)]
    return sentences


def background(table: Table, model: str) -> str | None:
    """The baseline a model corrects, found by its weights; None where it has none or that baseline was not scored."""
    sha256 = table.about["models"][model].get("background_sha256")
    return next((name for name in table.baselines if sha256 and table.about["models"][name].get("weights_sha256") == sha256), None)


def _task(table: Table, variable: str, stratum: str, task: str) -> str:
    model = best_model(table, variable, stratum, task)
    if model is None:
        rows = table.select(metric=JUDGED, variable=variable, stratum=stratum, distance="all", task=task)
        best = rows.loc[rows.groupby("lead")["value"].idxmin()]
        nobody = "no trained model does this" if table.models else "no trained model was scored"
        return f"{nobody}; the best baselines are {_list(dict.fromkeys(best['model']))}."
    found = [row for row in against_best(table, model, JUDGED, variable, stratum) if (row["lead"] > 0) == (task == "forecast")]
    if not found:
        return f"there is no baseline beside {model}."
    by = {verdict: [row for row in found if row["verdict"] == verdict] for verdict in ("better", "within noise", "worse", "too few blocks")}
    if by["too few blocks"]:
        numbers = "; ".join(f"{lead_text(table, row['lead'])}: {row['value']:.3g} against {row['floor']:.3g}" for row in found)
        return f"{found[0]['blocks']} blocks are too few to tell {model} from the best baseline (RMSE at {numbers})."
    unit = unit_text(metrics.unit(JUDGED, table.about["units"][variable]))
    if len(found) == 1:
        row = found[0]
        numbers = f"RMSE {row['value']:.3g} against {row['floor']:.3g} {unit}".rstrip()
        text = {"better": "beats", "worse": "loses to", "within noise": "cannot be told from"}[row["verdict"]]
        return f"{model} {text} the best baseline, {row['baseline']} ({numbers})."
    parts = []
    if by["better"]:
        where = "every lead" if len(by["better"]) == len(found) else _leads(table, by["better"])
        parts.append(f"beats the best baseline at {where} (RMSE {change([row['skill'] for row in by['better']])})")
    if by["within noise"]:
        where = "every lead" if len(by["within noise"]) == len(found) else _leads(table, by["within noise"])
        parts.append(
            f"cannot be told from the best baseline ({_list(dict.fromkeys(r['baseline'] for r in by['within noise']))}) at {where}"
        )
    if by["worse"]:
        where = "every lead" if len(by["worse"]) == len(found) else _leads(table, by["worse"])
        names = _list(dict.fromkeys(row["baseline"] for row in by["worse"]))
        parts.append(f"loses to {names} at {where} (RMSE {change([row['skill'] for row in by['worse']])})")
    return f"{model} {_list(parts)}."


def _against_background(table: Table, variable: str) -> list[str]:
    """Is a model worth its background? It must never be worse by more than noise."""
    out = []
    for model in table.models:
        prior = background(table, model)
        if prior is None:
            continue
        count = dict.fromkeys(("better", "within noise", "worse", "too few blocks"), 0)
        strata = [stratum for stratum in (primary(table, task) for task in TASKS) if stratum]
        cells = table.select(metric=JUDGED, variable=variable, model=model, distance="all")
        for stratum, lead in cells.loc[cells["stratum"].isin(strata), ["stratum", "lead"]].itertuples(index=False):
            if (prior, variable, stratum, "all", lead) in table.cells:
                count[compare(table, model, prior, JUDGED, variable, stratum, lead)["verdict"]] += 1
        said = _list([f"{verdict} in {number}" for verdict, number in count.items() if number] or ["not scored"])
        out.append(f"Against its own background, {prior}, {model} is {said} of {sum(count.values())} combinations of place and lead.")
    return out


def _calibration(table: Table, variable: str) -> list[str]:
    out = []
    for model in table.models:
        rows = table.select(metric="coverage_90", variable=variable, model=model, distance="all")
        rows = rows[rows["stratum"].isin([primary(table, task) for task in TASKS])]
        if len(rows):
            low, high = rows["value"].min(), rows["value"].max()
            span = f"{low:.2f}" if f"{low:.2f}" == f"{high:.2f}" else f"{low:.2f} to {high:.2f}"
            what = "of the truth" if len(table.about["units"]) == 1 else f"of the true {variable}"
            out.append(f"Calibration: the 90 % intervals of {model} hold {span} {what} (0.90 would be right).")
    return out


def _leads(table: Table, rows: Sequence[dict[str, Any]]) -> str:
    unit = table.about["time_unit"]
    numbers = _list([f"{row['lead']:g}" for row in rows])
    return f"{'lead ' if len(rows) == 1 else 'leads '}{numbers}{'' if unit == '1' else ' ' + unit}"


def change(skills: Sequence[float]) -> str:
    """What skills (1 - ratio) of one sign say: "12 to 50 % lower", "3 to 7 % higher", "2.1 to 30 times as large"."""
    ratios = sorted(1 - float(x) for x in skills if np.isfinite(x))
    if not ratios:
        return "undefined"
    if ratios[-1] > 2:
        numbers, end = [f"{r:.2g}" if r < 10 else f"{r:,.0f}" for r in ratios], " times as large"
    else:
        numbers, end = [f"{100 * abs(1 - r):.0f}" for r in ratios], " % lower" if ratios[0] < 1 else " % higher"
    first, last = (numbers[-1], numbers[0]) if ratios[0] < 1 and ratios[-1] <= 2 else (numbers[0], numbers[-1])
    return (first if first == last else f"{first} to {last}") + end


def _list(items: Any) -> str:
    words = [str(item) for item in items]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
