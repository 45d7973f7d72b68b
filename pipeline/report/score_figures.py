"""Drawings of scores: by lead, by distance, of calibration, and of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from pipeline.metrics import METRICS, Below
from pipeline.report.drawing import INK, MODELS, SOFT, drawing, in_unit, look
from pipeline.report.wording import lead_text
from pipeline.scores import Table, distance_labels, ranking


def by_lead(table: Table, metric: str, variable: str, stratum: str, unit: str) -> str:
    """A metric by lead, one line a predictor; the intervals of the best model and the best baseline, as a dozen bands hide each other."""
    rows = _telling(table.select(metric=metric, variable=variable, stratum=stratum, distance="all"), stratum)
    leaders = _leaders(table, metric, variable, stratum)
    with drawing(f"lead-{metric}-{variable}-{stratum}", (6.4, 3.5), f"{METRICS[metric].title} of {variable} by lead") as (figure, result):
        axes = figure.add_subplot()
        styles = look(table)
        for name in [*table.baselines, *table.models]:
            part = rows[rows["model"] == name].sort_values("lead")
            if part.empty:
                continue
            _curve(axes, part, name, styles[name], 0.16 if name in leaders else 0.0)
        axes.set_ylabel(f"{METRICS[metric].title}{in_unit(unit)}")
        _lead_axis(axes, table, rows["lead"])
        if (rows["value"] > 0).all() and rows["value"].max() > 30 * rows["value"].min():
            axes.set_yscale("log")
            axes.set_ylim(bottom=max(rows["value"].min() / 1.5, rows["value"].max() * 1e-4))
        else:
            axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return result[0]


def skill_by_lead(table: Table, skills: pd.DataFrame, model: str, variable: str, stratum: str) -> str:
    """Skill in RMSE of one model against each baseline by lead, with 95 % bands; above zero the model is better."""
    cells = (skills["metric"] == "rmse") & (skills["variable"] == variable) & (skills["stratum"] == stratum) & (skills["model"] == model)
    rows, styles = _telling(skills[cells], stratum), look(table)
    with drawing(f"skill-{model}-{variable}-{stratum}", (6.4, 3.5), f"Skill of {model} for {variable} by lead") as (figure, result):
        axes = figure.add_subplot()
        axes.axhspan(-10, 0, color="#d1480f", alpha=0.05, linewidth=0)
        axes.axhline(0, color=INK, linewidth=1)
        for name in table.baselines:
            part = rows[rows["baseline"] == name].sort_values("lead")
            if part.empty:
                continue
            _curve(axes, part.assign(value=part["skill"]), f"against {name}", styles[name], 0.15)
        bottom = np.nanmin([-0.1, *rows["low"], *rows["skill"]]) if len(rows) else -0.1
        axes.set_ylim(max(bottom, -1.0) - 0.03, 1.0)
        axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.0f} %")
        axes.set_ylabel(f"RMSE of {model} lower by")
        _lead_axis(axes, table, rows["lead"])
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return result[0]


def by_distance(table: Table, variable: str, stratum: str, leads: Sequence[float], unit: str) -> str:
    """RMSE by distance to the nearest observation, one panel a lead, one column a distance bin."""
    rows = table.select(metric="rmse", variable=variable, stratum=stratum)
    rows = rows[(rows["distance"] != "all") & rows["lead"].isin(leads)]
    bins = [name for name in distance_labels(tuple(table.about["distance_edges"])) if (rows["distance"] == name).any()]
    names = [name for name in [*table.models, *table.baselines] if (rows["model"] == name).any()]
    styles = look(table)
    with drawing(
        f"distance-{variable}-{stratum}", (3.1 * len(leads) + 1.7, 3.1), f"RMSE of {variable} by distance to the nearest sensor"
    ) as (
        figure,
        result,
    ):
        panels = figure.subplots(1, len(leads), squeeze=False, sharey=len(leads) > 1)[0]
        for axes, lead in zip(panels, leads, strict=True):
            for i, name in enumerate(names):
                part = rows[(rows["model"] == name) & (rows["lead"] == lead)].set_index("distance").reindex(bins)
                x = np.arange(len(bins)) + 0.7 * ((i + 0.5) / len(names) - 0.5)
                _whisker(axes, x, part, styles[name])
                point = {key: styles[name][key] for key in ("color", "marker", "zorder")}
                axes.plot(x, part["value"], linestyle="none", label=name, **point)
            axes.set_xticks(range(len(bins)), bins)
            axes.set_xlabel(f"distance{in_unit(table.about['position_unit'])}")
            axes.set_title(lead_text(table, lead))
        panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel(f"RMSE{in_unit(unit)}")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return result[0]


def calibration(table: Table, variable: str, stratum: str) -> str:
    """Left: share of truths under each predicted quantile, all leads together. Right: coverage of the 90 % interval by lead, with the bands
    of the best model and the best baseline."""
    rows = _telling(table.select(variable=variable, stratum=stratum, distance="all"), stratum)
    rows = rows[[able(table, name, "coverage_90") for name in rows["model"]]] if len(rows) else rows
    levels = {name: METRICS[name].level for name in METRICS if isinstance(METRICS[name], Below)}  # type: ignore[attr-defined]
    styles, leaders = look(table), _leaders(table, "crps", variable, stratum)
    with drawing(f"calibration-{variable}-{stratum}", (8.6, 3.3), f"Calibration of {variable}") as (figure, result):
        left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
        left.plot([0, 1], [0, 1], color=INK, linewidth=0.9)
        right.axhspan(0.87, 0.93, color=SOFT, alpha=0.12, linewidth=0)
        right.axhline(0.9, color=INK, linewidth=0.9)
        for name in [n for n in [*table.baselines, *table.models] if (rows["model"] == n).any()]:
            own = rows[rows["model"] == name]
            below = own[own["metric"].isin(levels)]
            share = below.assign(hits=below["value"] * below["n"]).groupby("metric")[["hits", "n"]].sum().reindex(list(levels))
            left.plot(list(levels.values()), share["hits"] / share["n"], **styles[name])
            part = own[own["metric"] == "coverage_90"].sort_values("lead")
            if name in leaders:
                right.fill_between(part["lead"], part["low"], part["high"], color=styles[name]["color"], alpha=0.16, linewidth=0)
            right.plot(part["lead"], part["value"], label=name, **styles[name])
        left.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted probability", ylabel="share of truths below", aspect="equal")
        right.set_ylabel("inside the 90 % interval")
        right.set_ylim(min(0.7, right.get_ylim()[0]), 1.01)
        _lead_axis(right, table, rows["lead"])
        right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return result[0]


def training_curve(history: pd.DataFrame, best_step: int, name: str) -> str:
    """Losses by step, and which step was kept."""
    with drawing(f"training-{name.replace(', ', '-')}", (6.4, 2.7), f"Training curve of {name}") as (figure, result):
        axes = figure.add_subplot()
        for column, colour, label in (("loss", SOFT, "training loss"), ("validation_loss", MODELS[0], "validation loss")):
            if column in history:
                axes.plot(history["step"], history[column], color=colour, label=label, marker="." if len(history) < 60 else None)
        axes.axvline(best_step, color=MODELS[1], linewidth=1, linestyle=(0, (3, 2)), label=f"kept: step {best_step}")
        axes.set(xlabel="step", ylabel="loss")
        losses = history[[c for c in ("loss", "validation_loss") if c in history]].to_numpy()
        if np.nanmin(losses) > 0 and np.nanmax(losses) > 10 * np.nanmin(losses):
            axes.set_yscale("log")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return result[0]


def able(table: Table, model: str, metric: str) -> bool:
    """Can this predictor have that metric at all?"""
    return metric not in ("coverage_90", "coverage_50", "width_90") or table.about["models"][model]["distribution"] != "mean only"


def _leaders(table: Table, metric: str, variable: str, stratum: str) -> set[str]:
    """The first model and the first baseline by that metric."""
    order = list(ranking(table, metric, variable, stratum)["model"])
    return {next(name for name in order if name in side) for side in (table.models, table.baselines) if {*order} & {*side}}


def _telling(rows: pd.DataFrame, stratum: str) -> pd.DataFrame:
    """Without lead 0 at the sensors themselves, where nearly everybody repeats the reading."""
    later = rows[rows["lead"] > 0]
    return later if stratum == "context" and len(later) else rows


def _curve(axes: Axes, part: pd.DataFrame, label: str, line: Mapping[str, Any], alpha: float) -> None:
    """`value` by lead with its 95 % band (an alpha of 0: none); a bar where there is one lead."""
    if len(part) > 1 and alpha:
        axes.fill_between(part["lead"], part["low"], part["high"], color=line["color"], alpha=alpha, linewidth=0)
    elif len(part) == 1:
        _whisker(axes, part["lead"], part, line)
    axes.plot(part["lead"], part["value"], label=label, **line)


def _whisker(axes: Axes, x: Any, part: pd.DataFrame, line: Mapping[str, Any]) -> None:
    axes.vlines(x, part["low"], part["high"], color=line["color"], alpha=0.55, linewidth=1.6)


def _lead_axis(axes: Axes, table: Table, leads: pd.Series) -> None:
    ticks = sorted(set(leads))
    axes.set_xticks(ticks, [f"{lead:g}" for lead in ticks])
    axes.set_xlabel(f"lead{in_unit(table.about['time_unit'])}")
    if len(ticks) == 1:
        axes.set_xlim(ticks[0] - 1, ticks[0] + 1)
