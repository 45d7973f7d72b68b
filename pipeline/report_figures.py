"""Drawings of a report page as inline SVG: the same input gives the same bytes, text stays text, colours suit colour-blind eyes."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import matplotlib.dates
import matplotlib.patches
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from models.contract import DatasetInfo
from pipeline.metrics import METRICS, Below
from pipeline.scores import Table, distance_labels
from pipeline.verdict import lead_text, unit_text

INK, SOFT, LINE = "#16202b", "#5b6875", "#d5dce3"
_MODELS = ("#0b6bcb", "#d1480f", "#0a8f6a", "#9a3fb5", "#b8860b")
_BASELINES = ("#8a6d3b", "#5f7f3a", "#a0527a", "#4f7a8c", "#8c8c8c", "#b07a1a", "#6b5b95", "#3d8577")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "h")
_DASHES = ((0, (4, 1.5)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)), (0, (2.5, 1.5)))
ROLES = {
    "context": ("#0b6bcb", "o", "context"),
    "validation": ("#b8860b", "s", "held out for validation"),
    "test": ("#d1480f", "D", "held out for the test"),
}
SPLIT_COLOURS = {"train": "#9db8d2", "validation": "#e3c16f", "test": "#d1480f", "gap": "#e8ecf0"}
_SIGNED = ("vorticity", "u10", "v10")
_STYLE: Any = {
    "svg.hashsalt": "fieldcast",
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.sans-serif": ["system-ui", "Segoe UI", "Roboto", "Helvetica Neue", "DejaVu Sans"],
    "font.size": 9.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
}


def look(table: Table) -> dict[str, dict[str, Any]]:
    """Line style of every predictor, the same in all figures: models solid and bold, baselines broken and muted."""
    out = {}
    for i, name in enumerate(table.models):
        out[name] = {"color": _MODELS[i % len(_MODELS)], "marker": "o", "linewidth": 2.4, "zorder": 4}
    for i, name in enumerate(table.baselines):
        dash = _DASHES[i % len(_DASHES)]
        out[name] = {
            "color": _BASELINES[i % len(_BASELINES)],
            "marker": _MARKERS[1 + i % 9],
            "linestyle": dash,
            "linewidth": 1.3,
            "zorder": 3,
        }
    return out


def by_lead(table: Table, metric: str, variable: str, stratum: str, unit: str) -> str:
    """A metric by lead with its interval, one line a predictor."""
    rows = _telling(table.select(metric=metric, variable=variable, stratum=stratum, distance="all"), stratum)
    with _drawing(f"lead-{metric}-{variable}-{stratum}", (6.4, 3.5), f"{METRICS[metric].title} of {variable} by lead") as (figure, result):
        axes = figure.add_subplot()
        styles = look(table)
        for name in [*table.baselines, *table.models]:
            part = rows[rows["model"] == name].sort_values("lead")
            if part.empty:
                continue
            line = styles[name]
            if len(part) > 1:
                axes.fill_between(part["lead"], part["low"], part["high"], color=line["color"], alpha=0.13, linewidth=0)
            else:
                _whisker(axes, part["lead"], part, line)
            axes.plot(part["lead"], part["value"], label=name, **line)
        axes.set_ylabel(f"{METRICS[metric].title}{_in(unit)}")
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
    with _drawing(f"skill-{model}-{variable}-{stratum}", (6.4, 3.5), f"Skill of {model} for {variable} by lead") as (figure, result):
        axes = figure.add_subplot()
        axes.axhspan(-10, 0, color="#d1480f", alpha=0.05, linewidth=0)
        axes.axhline(0, color=INK, linewidth=1)
        for name in table.baselines:
            part = rows[rows["baseline"] == name].sort_values("lead")
            if part.empty:
                continue
            line = styles[name]
            if len(part) > 1:
                axes.fill_between(part["lead"], part["low"], part["high"], color=line["color"], alpha=0.15, linewidth=0)
            else:
                _whisker(axes, part["lead"], part.assign(value=part["skill"]), line)
            axes.plot(part["lead"], part["skill"], label=f"against {name}", **line)
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
    with _drawing(
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
            axes.set_xlabel(f"distance{_in(table.about['position_unit'])}")
            axes.set_title(lead_text(table, lead))
        panels[0].set_ylim(bottom=0)
        panels[0].set_ylabel(f"RMSE{_in(unit)}")
        panels[-1].legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return result[0]


def calibration(table: Table, variable: str, stratum: str) -> str:
    """Left: share of truths under each predicted quantile, all leads together. Right: coverage of the 90 % interval by lead."""
    rows = _telling(table.select(variable=variable, stratum=stratum, distance="all"), stratum)
    rows = rows[[able(table, name, "coverage_90") for name in rows["model"]]] if len(rows) else rows
    levels = {name: METRICS[name].level for name in METRICS if isinstance(METRICS[name], Below)}  # type: ignore[attr-defined]
    styles = look(table)
    with _drawing(f"calibration-{variable}-{stratum}", (8.6, 3.3), f"Calibration of {variable}") as (figure, result):
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
            right.fill_between(part["lead"], part["low"], part["high"], color=styles[name]["color"], alpha=0.12, linewidth=0)
            right.plot(part["lead"], part["value"], label=name, **styles[name])
        left.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted probability", ylabel="share of truths below", aspect="equal")
        right.set_ylabel("inside the 90 % interval")
        right.set_ylim(min(0.7, right.get_ylim()[0]), 1.01)
        _lead_axis(right, table, rows["lead"])
        right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), reverse=True)
    return result[0]


def pictures(
    examples: pd.DataFrame, info: DatasetInfo, shape: tuple[int, int], model: str, prior: str | None, sensors: np.ndarray, table: Table
) -> str:
    """Truth, the model's prediction and error, and its background (or a baseline) with its error: one row a lead. Sensors [N,2] as dots."""
    leads, variable = sorted(examples["lead"].unique()), str(examples["variable"].iloc[0])
    rows, columns = shape
    own = {name: examples[examples["model"] == name] for name in (model, prior) if name}
    names = [name for name, part in own.items() if len(part)]
    first = own[names[0]].drop_duplicates("point").sort_values("point")
    x, y = (first[axis].to_numpy().reshape(shape) for axis in ("x", "y"))
    extent = (*_edges(x[0]), *_edges(y[:, 0]))
    truth = {lead: _grid(own[names[0]], lead, "truth", shape) for lead in leads}
    low, high = np.nanquantile(np.stack(list(truth.values())), [0.002, 0.998])
    signed = variable in _SIGNED
    low, high = (-max(-low, high), max(-low, high)) if signed else (low, high)
    errors = {
        (name, lead): _grid(own[name], lead, "mean", shape) - truth[lead] for name in names for lead in leads if _has(own[name], lead)
    }
    reach = float(np.nanquantile(np.abs(np.stack(list(errors.values()))), 0.995)) or 1.0
    width = 2.05 * (1 + 2 * len(names))
    height = max(1.0, 2.05 * rows / columns) * len(leads) + 0.75
    unit = dict(zip(info.variables, info.units, strict=True))[variable]
    with _drawing(f"pictures-{variable}", (width, height), f"Truth, prediction and error of {variable} at {len(leads)} leads") as (
        figure,
        result,
    ):
        ratios = [1.0] * len(leads) + [0.05]
        grid = figure.subplots(len(leads) + 1, 1 + 2 * len(names), squeeze=False, height_ratios=ratios)
        panels, bars = grid[:-1], grid[-1]
        field = error = None
        for line, lead in zip(panels, leads, strict=True):
            shown: list[tuple[str, np.ndarray | None, bool]] = [("truth", truth[lead], False)]
            for name in names:
                shown += [(name, _grid(own[name], lead, "mean", shape), False), (f"error of {name}", errors.get((name, lead)), True)]
            for axes, (title, values, is_error) in zip(line, shown, strict=True):
                axes.grid(False)
                axes.set(xticks=[], yticks=[])
                axes.spines[:].set_visible(False)
                if lead == leads[0]:
                    axes.set_title(title)
                if values is None or np.isnan(values).all():
                    axes.text(0.5, 0.5, "not predicted", ha="center", va="center", transform=axes.transAxes, color=SOFT)
                    continue
                bounds = (-reach, reach) if is_error else (low, high)
                colours = "PuOr_r" if is_error else "RdBu_r" if signed else "viridis"
                image = axes.imshow(
                    values, origin="lower", extent=extent, vmin=bounds[0], vmax=bounds[1], cmap=colours, interpolation="none"
                )
                field, error = (field, image) if is_error else (image, error)
            line[0].set_ylabel(lead_text(table, lead), color=INK)
            line[0].scatter(
                sensors[:, 0], sensors[:, 1], s=3.5 if len(sensors) > 150 else 9, facecolor="white", edgecolor=INK, linewidth=0.4
            )
        for axes in bars:
            axes.set_axis_off()
        for image, axes, text in ((field, bars[0], variable), (error, bars[2], "error")):
            if image is not None:
                axes.set_axis_on()
                bar = figure.colorbar(image, cax=axes, orientation="horizontal")
                bar.outline.set_visible(False)
                bar.ax.xaxis.set_major_locator(MaxNLocator(4))
                bar.set_label(f"{text}{_in(unit)}")
    return result[0]


def series(history: pd.DataFrame, examples: pd.DataFrame, names: Sequence[str], table: Table, title: str, unit: str, origin: str) -> str:
    """One station of one case: what it reported (history: time, value), and the predictions with their 90 % intervals by lead.

    Times are leads: hours (or model time) from the end of the context.
    """
    styles = look(table)
    with _drawing(f"series-{title}-{origin}", (6.4, 2.7), f"Predictions at {title} from {origin}") as (figure, result):
        axes = figure.add_subplot()
        axes.axvline(0, color=SOFT, linewidth=0.9, linestyle=(0, (3, 2)))
        past, later = history[history["lead"] <= 0], history[history["lead"] > 0]
        axes.plot(past["lead"], past["value"], color=INK, linewidth=1.1, label="observed")
        axes.plot(
            later["lead"], later["value"], color=INK, linewidth=0, marker=".", markersize=4, markerfacecolor="white", label="observed later"
        )
        for name in names:
            part = examples[examples["model"] == name].sort_values("lead")
            axes.fill_between(part["lead"], part["low"], part["high"], color=styles[name]["color"], alpha=0.16, linewidth=0)
            axes.plot(part["lead"], part["mean"], label=name, **styles[name])
        axes.set_title(f"{title}, from {origin}")
        axes.set_ylabel(unit_text(unit))
        axes.set_xlabel(f"lead{_in(table.about['time_unit'])}")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return result[0]


def sensor_map(info: DatasetInfo, fixed: Mapping[str, np.ndarray], moving: np.ndarray) -> str:
    """Fixed sensors by role [K,2], and a sample of where moving sensors (or grid sensors of one frame) were [N,2]."""
    with _drawing("sensors", (6.4, 3.9), "Where the sensors are") as (figure, result):
        axes = figure.add_subplot()
        axes.grid(True, axis="both")
        if len(moving):
            axes.scatter(
                moving[:, 0],
                moving[:, 1],
                s=5,
                color=SOFT,
                alpha=0.45,
                linewidth=0,
                label="sensors of one frame" if not fixed else "moving sensors",
            )
        for role, position in fixed.items():
            colour, marker, label = ROLES[role]
            axes.scatter(
                position[:, 0],
                position[:, 1],
                s=44,
                color=colour,
                marker=marker,
                edgecolor="white",
                linewidth=0.8,
                label=f"{label} ({len(position)})",
                zorder=3,
            )
        axes.set_aspect("equal")
        axes.set(xlabel=f"x{_in(info.position_unit)}", ylabel=f"y{_in(info.position_unit)}")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.3)
    return result[0]


def split_line(spans: Sequence[tuple[int, float, float, str]], calendar: bool, time_unit: str) -> str:
    """Stretches (row, start, end, split) of the frames of each trajectory; starts and ends are matplotlib dates if `calendar`."""
    rows = max(row for row, *_ in spans) + 1
    with _drawing("split", (8.6, 0.75 + 0.34 * rows), "Which frames belong to which split") as (figure, result):
        axes = figure.add_subplot()
        for row, start, end, split in spans:
            axes.barh(row, end - start, left=start, height=0.62, color=SPLIT_COLOURS[split], linewidth=0)
        axes.set_yticks(range(rows), [f"{i + 1}" for i in range(rows)] if rows > 1 else [""])
        axes.set_ylim(rows - 0.5, -0.5)
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        if calendar:
            axes.xaxis_date()
            locator = mpl.dates.AutoDateLocator(minticks=4, maxticks=9)
            axes.xaxis.set_major_locator(locator)
            axes.xaxis.set_major_formatter(mpl.dates.ConciseDateFormatter(locator))
        else:
            axes.set_xlabel(f"time{_in(time_unit)}")
        used = [name for name in SPLIT_COLOURS if any(span[3] == name for span in spans)]
        handles = [mpl.patches.Patch(color=SPLIT_COLOURS[name], label=name) for name in used]
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return result[0]


def training_curve(history: pd.DataFrame, best_step: int, name: str) -> str:
    """Losses by step, and which step was kept."""
    with _drawing(f"training-{name.replace(', ', '-')}", (6.4, 2.7), f"Training curve of {name}") as (figure, result):
        axes = figure.add_subplot()
        for column, colour, label in (("loss", SOFT, "training loss"), ("validation_loss", _MODELS[0], "validation loss")):
            if column in history:
                axes.plot(history["step"], history[column], color=colour, label=label, marker="." if len(history) < 60 else None)
        axes.axvline(best_step, color=_MODELS[1], linewidth=1, linestyle=(0, (3, 2)), label=f"kept: step {best_step}")
        axes.set(xlabel="step", ylabel="loss")
        losses = history[[c for c in ("loss", "validation_loss") if c in history]].to_numpy()
        if np.nanmin(losses) > 0 and np.nanmax(losses) > 10 * np.nanmin(losses):
            axes.set_yscale("log")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return result[0]


def _telling(rows: pd.DataFrame, stratum: str) -> pd.DataFrame:
    """Without lead 0 at the sensors themselves, where nearly everybody repeats the reading."""
    later = rows[rows["lead"] > 0]
    return later if stratum == "context" and len(later) else rows


def able(table: Table, model: str, metric: str) -> bool:
    """Can this predictor have that metric at all?"""
    return metric not in ("coverage_90", "coverage_50", "width_90") or table.about["models"][model]["distribution"] != "mean only"


@contextmanager
def _drawing(name: str, size: tuple[float, float], alt: str) -> Iterator[tuple[Figure, list[str]]]:
    """A figure to draw in; afterwards its SVG is the one item of the list. Ids get the figure's name, so that many fit in one page."""
    result: list[str] = []
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="findfont|Font family")
        figure = Figure(size, layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, result
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    body = text.getvalue()
    body = body[body.index("<svg") :]
    prefix = re.sub(r"[^a-z0-9]+", "-", name.lower())
    seen: dict[str, int] = {}

    def unique(match: re.Match[str]) -> str:  # equal images get equal ids from Matplotlib; whoever refers to one may have the first
        seen[match[1]] = seen.get(match[1], 0) + 1
        return f'id="{prefix}-{match[1]}' + (f'-{seen[match[1]]}"' if seen[match[1]] > 1 else '"')

    body = re.sub(r'\bid="([^"]+)"', unique, body)
    body = re.sub(r'((?:xlink:)?href="#|url\(#)', rf"\g<1>{prefix}-", body)
    label = alt.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    result.append(re.sub(r'<svg [^>]*?viewBox="([^"]+)"[^>]*>', _opening(size, label), body, count=1))


def _opening(size: tuple[float, float], label: str) -> str:
    width = round(size[0] * 92)
    start = '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
    return start + rf'viewBox="\1" role="img" aria-label="{label}" style="width:{width}px">'


def _whisker(axes: Axes, x: Any, part: pd.DataFrame, line: Mapping[str, Any]) -> None:
    axes.vlines(x, part["low"], part["high"], color=line["color"], alpha=0.55, linewidth=1.6)


def _lead_axis(axes: Axes, table: Table, leads: pd.Series) -> None:
    ticks = sorted(set(leads))
    axes.set_xticks(ticks, [f"{lead:g}" for lead in ticks])
    axes.set_xlabel(f"lead{_in(table.about['time_unit'])}")
    if len(ticks) == 1:
        axes.set_xlim(ticks[0] - 1, ticks[0] + 1)


def _in(unit: str) -> str:
    text = unit_text(unit)
    return f", {text}" if text else ""


def _grid(part: pd.DataFrame, lead: float, column: str, shape: tuple[int, int]) -> np.ndarray:
    out = np.full(shape[0] * shape[1], np.nan)
    rows = part[part["lead"] == lead]
    out[rows["point"].to_numpy()] = rows[column].to_numpy()
    return out.reshape(shape)


def _has(part: pd.DataFrame, lead: float) -> bool:
    return bool((part["lead"] == lead).any())


def _edges(centres: np.ndarray) -> tuple[float, float]:
    half = (centres[-1] - centres[0]) / (2 * max(1, len(centres) - 1)) or 0.5
    return float(centres[0] - half), float(centres[-1] + half)


def maps(
    panels: Sequence[tuple[str, np.ndarray]],
    at: tuple[np.ndarray, np.ndarray],
    sensors: np.ndarray,
    title: str,
    variable: str,
    unit: str,
    aspect: float,
) -> str:
    """Forecast fields [y,x] on x and y `at`, one panel a lead; sensors [N,3] (x, y, value) in the colours of the field."""
    everything = np.concatenate([*(values.ravel() for _, values in panels), sensors[:, 2]])
    low, high = np.nanquantile(everything, [0.01, 0.99])
    colours = "RdBu_r" if variable in _SIGNED else "viridis"
    extent = (*_edges(at[0]), *_edges(at[1]))
    with _drawing(f"map-{variable}", (3.0 * len(panels), 3.6), f"Forecast field of {variable}") as (figure, result):
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        drawn = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
        for axes, (name, values) in zip(drawn, panels, strict=True):
            axes.grid(False)
            image = axes.imshow(
                values, origin="lower", extent=extent, vmin=low, vmax=high, cmap=colours, interpolation="none", aspect=aspect
            )
            axes.scatter(
                sensors[:, 0], sensors[:, 1], s=26, c=sensors[:, 2], vmin=low, vmax=high, cmap=colours, edgecolor="white", linewidth=1
            )
            axes.set_title(name)
            axes.xaxis.set_major_locator(MaxNLocator(3))
        bar = figure.colorbar(image, ax=drawn, location="bottom", fraction=0.05, pad=0.03, aspect=40)
        bar.outline.set_visible(False)
        bar.set_label(f"{variable}{_in(unit)}")
    return result[0]
