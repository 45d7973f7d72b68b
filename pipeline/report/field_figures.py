"""Drawings of fields and series: truth beside predictions, a station's hours, a forecast map."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from models.contract import DatasetInfo
from pipeline.report.drawing import INK, SOFT, drawing, in_unit, look
from pipeline.report.wording import lead_text, unit_text, variable_name
from pipeline.scores import Table

_SIGNED = ("vorticity", "u10", "v10")


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
    with drawing(f"pictures-{variable}", (width, height), f"Truth, prediction and error of {variable} at {len(leads)} leads") as (
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
        for image, axes, text in ((field, bars[0], variable_name(variable)), (error, bars[2], "error")):
            if image is not None:
                axes.set_axis_on()
                bar = figure.colorbar(image, cax=axes, orientation="horizontal")
                bar.outline.set_visible(False)
                bar.ax.xaxis.set_major_locator(MaxNLocator(4))
                bar.set_label(f"{text}{in_unit(unit)}")
    return result[0]


def series(history: pd.DataFrame, examples: pd.DataFrame, names: Sequence[str], table: Table, title: str, unit: str, origin: str) -> str:
    """One station of one case: what it reported (history: time, value), and the predictions with their 90 % intervals by lead.

    Times are leads: hours (or model time) from the end of the context.
    """
    styles = look(table)
    with drawing(f"series-{title}-{origin}", (6.4, 2.7), f"Predictions at {title} from {origin}") as (figure, result):
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
        axes.set_xlabel(f"lead{in_unit(table.about['time_unit'])}")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return result[0]


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
    with drawing(f"map-{variable}", (3.0 * len(panels), 3.6), f"Forecast field of {variable}") as (figure, result):
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
        bar.set_label(f"{variable_name(variable)}{in_unit(unit)}")
    return result[0]


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
