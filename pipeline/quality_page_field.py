"""What the quality page of a field shows: the share of sound frames, the range of values, the frames with a flag."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from pipeline import drawings, lexicon, qc
from pipeline.check_field import FLAGS, Findings

WORST = 15


def shown(findings: Findings, report: Mapping[str, Any]) -> dict[str, Any]:
    table = findings.frames
    good = 1 - report["suspect_share"] - report["fail_share"]
    histories = "1 history" if report["trajectories"] == 1 else f"{report['trajectories']} histories"
    names = ", ".join(lexicon.lookup(name).long_name for name in findings.variables)
    verdict = table["flag_aggregate"].to_numpy()
    bad = table[verdict >= qc.SUSPECT].head(WORST)
    flags = [name for name in FLAGS if name != "flag_aggregate"]
    return {
        "sentence": f"{report['frames']:,} frames of {names} in {histories} on {findings.cells:,} cells were checked: {good:.2%} passed "
        f"every test, {report['suspect_share']:.2%} are suspect and {report['fail_share']:.2%} failed.",
        "tiles": [
            (f"{report['frames']:,}", "frames"),
            (report["trajectories"], "histories"),
            (report["empty_frames"], "empty frames"),
            (f"{report['suspect_share']:.2%}", "suspect"),
            (f"{report['fail_share']:.2%}", "failed"),
        ],
        "tests": [name.removeprefix("flag_") for name in FLAGS],
        "not_run": [],
        "curves": _curves(findings),
        "worst_title": "Frames with a flag",
        "worst_columns": ["frame", "history", *(name.removeprefix("flag_").replace("_", " ") for name in flags)],
        "worst": [
            [_label(row["time"]), int(row["trajectory"]), *(_word(int(row[name])) for name in flags)] for row in bad.to_dict("records")
        ],
    } | _frame_map(table)


def _word(flag: int) -> str:
    return {1: "pass", 2: "·", 3: "suspect", 4: "fail", 9: "missing"}[flag]


def _label(time: Any) -> str:
    return pd.Timestamp(time).strftime("%Y-%m-%d %H:%M") if isinstance(time, pd.Timestamp | np.datetime64) else f"{time:g}"


def _frame_map(table: pd.DataFrame) -> dict[str, Any]:
    """Share of sound frames: histories down, stretches of frames across."""
    histories = table["trajectory"].nunique()
    sound = (table["flag_aggregate"] <= qc.NOT_EVALUATED).to_numpy(float).reshape(histories, -1)
    frames = sound.shape[1]
    times = table["time"].iloc[:frames]
    wide = math.ceil(frames / drawings.COLUMNS)
    share = np.stack([sound[:, start : start + wide].mean(axis=1) for start in range(0, frames, wide)], axis=1)
    together = math.ceil(histories / drawings.ROWS)
    names = [
        str(start) if together == 1 else f"{start} to {min(start + together, histories) - 1}" for start in range(0, histories, together)
    ]
    share = np.stack([share[start : start + together].mean(axis=0) for start in range(0, histories, together)])
    columns = "one frame" if wide == 1 else f"{wide} frames"
    return {
        "heat_map": drawings.heat_map(
            share, names, drawings.time_ticks([_label(t) for t in times[::wide]], 6), 15.0 if len(names) <= 40 else 13.0
        ),
        "heat_note": f"Share of frames without a flag; one column is {columns}, one row "
        + ("one history." if together == 1 else f"{together} histories."),
        "heat_legend": drawings.SHARE_LEGEND[:-1],
    }


def _curves(findings: Findings) -> list[dict[str, Any]]:
    """Smallest, mean and largest value over time, over all histories."""
    drawn = []
    for name in findings.variables:
        by_time = findings.frames.groupby("time")
        low, middle, high = by_time[f"{name}_min"].min(), by_time[f"{name}_mean"].mean(), by_time[f"{name}_max"].max()
        wide = math.ceil(len(low) / 600)
        block = np.arange(len(low)) // wide
        series = [getattr(s.groupby(block), how)().to_numpy() for s, how in ((low, "min"), (middle, "mean"), (high, "max"))]
        labels = [_label(time) for time in low.index[::wide]]
        variable = lexicon.lookup(name)
        svg = drawings.curve(series[0], series[1], series[2], drawings.time_ticks(labels, 6), variable.unit if variable.unit != "1" else "")
        drawn.append({"name": variable.long_name, "svg": svg})
    return drawn
