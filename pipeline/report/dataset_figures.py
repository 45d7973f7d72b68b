"""Drawings of a dataset: where its sensors are, which frames belong to which split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib as mpl
import matplotlib.dates
import matplotlib.patches
import numpy as np

from models.contract import DatasetInfo
from pipeline.report.drawing import SOFT, drawing, in_unit

ROLES = {
    "context": ("#0b6bcb", "o", "context"),
    "validation": ("#b8860b", "s", "held out for validation"),
    "test": ("#d1480f", "D", "held out for the test"),
}
SPLIT_COLOURS = {"train": "#9db8d2", "validation": "#e3c16f", "test": "#d1480f", "gap": "#e8ecf0"}


def sensor_map(info: DatasetInfo, fixed: Mapping[str, np.ndarray], moving: np.ndarray) -> str:
    """Fixed sensors by role [K,2], and a sample of where moving sensors (or grid sensors of one frame) were [N,2]."""
    with drawing("sensors", (6.4, 3.9), "Where the sensors are") as (figure, result):
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
        axes.set(xlabel=f"x{in_unit(info.position_unit)}", ylabel=f"y{in_unit(info.position_unit)}")
        axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), handletextpad=0.3)
    return result[0]


def split_line(spans: Sequence[tuple[int, float, float, str]], calendar: bool, time_unit: str) -> str:
    """Stretches (row, start, end, split) of the frames of each trajectory; starts and ends are matplotlib dates if `calendar`."""
    rows = max(row for row, *_ in spans) + 1
    with drawing("split", (8.6, 0.75 + 0.34 * rows), "Which frames belong to which split") as (figure, result):
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
            axes.set_xlabel(f"time{in_unit(time_unit)}")
        used = [name for name in SPLIT_COLOURS if any(span[3] == name for span in spans)]
        handles = [mpl.patches.Patch(color=SPLIT_COLOURS[name], label=name) for name in used]
        axes.legend(handles=handles, loc="center left", bbox_to_anchor=(1.0, 0.5))
    return result[0]
