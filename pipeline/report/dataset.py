"""What a report says of the dataset itself: its facts, its quality control, its splits and its sensors."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib.dates
import numpy as np
from markupsafe import Markup

from pipeline import cube
from pipeline import sensors as sensor_data
from pipeline.report import dataset_figures as figures
from pipeline.report.wording import amount, moment, unit_text, variable_name
from pipeline.sensors import SensorDataset


def facts(dataset: SensorDataset) -> list[tuple[str, str]]:
    """Names and values of a definition list."""
    info = dataset.info
    facts = [(variable_name(name), _statistics(dataset, i)) for i, name in enumerate(info.variables)]
    facts.append(
        ("Observations", f"{dataset['obs/value'].shape[0]:,} in {dataset.n_frames:,} frames, every {amount(info.step, info.time_unit)}")
    )
    trajectories = len(dataset["trajectory/frame_start"]) - 1
    if trajectories > 1:
        facts.append(("Trajectories", f"{trajectories:,}"))
    if cube.is_calendar(info):
        first, last = cube.to_time(info, np.asarray(dataset["frame/time"])[[0, -1]])
        facts.append(("Time", f"{moment(first)} to {moment(last)} UTC"))
    if info.n_sensors:
        role = np.asarray(dataset["sensor/role"])
        counted = ", ".join(f"{int((role == code).sum())} {name}" for code, name in enumerate(("context", "validation", "test")))
        facts.append(("Fixed sensors", f"{info.n_sensors}: {counted}"))
    moving = np.asarray(dataset["obs/sensor"][...]) < 0
    if moving.any():
        usual = int(np.median(np.diff(np.asarray(dataset["frame/obs_start"]))))
        facts.append(("Sensors without a fixed place", f"{int(moving.sum()):,} observations, {usual:,} in the usual frame"))
    if dataset.has_truth:
        shape = " x ".join(str(int(size)) for size in dataset["truth/shape"])
        facts.append(("Dense truth", f"{shape} points, scored at all of them"))
    extent = f"{2 * info.half_extent:.4g} across"
    facts.append(
        (
            "Domain",
            f"{info.geometry}, {extent if info.position_unit == '1' else extent.replace(' across', f' {info.position_unit} across')}",
        )
    )
    if info.context_covariates:
        facts.append(("Seen beside the values", ", ".join(info.context_covariates)))
    if info.query_covariates:
        facts.append(("Known for the question", ", ".join(info.query_covariates)))
    return facts


def quality(path: Path) -> list[tuple[str, str]]:
    """The quality report in a few lines; empty where there is none."""
    if not path.exists():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    names = {
        "rows": "Rows",
        "quarantined_rows": "Held back (quarantine)",
        "frames": "Frames",
        "empty_frames": "Empty frames",
        "sensors": "Sensors",
    }
    facts = [(title, f"{report[name]:,}") for name, title in names.items() if report.get(name) is not None]
    shares = {"suspect_share": "Flagged suspect", "fail_share": "Flagged as failed", "completeness": "Completeness"}
    facts += [(title, f"{100 * report[name]:.2f} %") for name, title in shares.items() if report.get(name) is not None]
    failed = [f"{name} ({rule['severity']})" for name, rule in report.get("rules", {}).items() if not rule["passed"]]
    return [*facts, ("Rules not met", ", ".join(failed) or "none")]


def split_rows(dataset: SensorDataset) -> list[dict[str, Any]]:
    """Frames, observations, trajectories and cases of each split."""
    split, start = np.asarray(dataset["frame/split"]), np.asarray(dataset["frame/obs_start"])
    owner = dataset.trajectory_of(np.arange(dataset.n_frames))
    case = np.asarray(dataset["cases/split"])
    block = np.asarray(dataset["cases/block"])
    return [
        {
            "name": name,
            "frames": int((split == code).sum()),
            "observations": int(np.diff(start)[split == code].sum()),
            "trajectories": len(np.unique(owner[split == code])),
            "cases": int((case == code).sum()) if code != sensor_data.TRAIN else None,
            "blocks": len(np.unique(block[case == code])) if code != sensor_data.TRAIN else None,
        }
        for name, code in sensor_data.SPLITS.items()
    ]


def split_figure(dataset: SensorDataset) -> Markup | None:
    """The time line of the splits; None where there are more trajectories than lines are readable."""
    bounds, split = np.asarray(dataset["trajectory/frame_start"]), np.asarray(dataset["frame/split"])
    if len(bounds) > 7:
        return None
    time = np.asarray(dataset["frame/time"], "f8")
    calendar = cube.is_calendar(dataset.info)
    names = {code: name for name, code in sensor_data.SPLITS.items()} | {sensor_data.GAP: "gap"}
    spans = []
    for row, (first, last) in enumerate(pairwise(bounds)):
        cuts = [first, *(np.flatnonzero(np.diff(split[first:last])) + 1 + first), last]
        for a, b in pairwise(cuts):
            ends = np.array([time[a], time[b - 1] + dataset.info.step])
            start, end = matplotlib.dates.date2num(cube.to_time(dataset.info, ends)) if calendar else ends
            spans.append((row, float(start), float(end), names[int(split[a])]))
    return Markup(figures.split_line(spans, calendar, dataset.info.time_unit))


def sensor_figure(dataset: SensorDataset) -> Markup:
    role = np.asarray(dataset["sensor/role"]) if dataset.info.n_sensors else np.zeros(0)
    place = np.asarray(dataset["sensor/position"]) if dataset.info.n_sensors else np.zeros((0, 2))
    fixed = {name: place[role == code] for code, name in enumerate(figures.ROLES) if (role == code).any()}
    sensor = np.asarray(dataset["obs/sensor"][...])
    moving = np.flatnonzero(sensor < 0)
    if not fixed:  # one frame says how dense they are
        start = np.asarray(dataset["frame/obs_start"])
        case = int(np.asarray(dataset["cases/frame"])[-1])
        moving = np.arange(start[case], start[case + 1])
    moving = moving[:: max(1, len(moving) // 1500)]
    return Markup(figures.sensor_map(dataset.info, fixed, np.asarray(dataset["obs/position"])[moving]))


def _statistics(dataset: SensorDataset, channel: int) -> str:
    info = dataset.info
    unit = unit_text(info.units[channel])
    return f"{info.mean[channel]:.4g} ± {info.std[channel]:.4g} {unit}".rstrip() + " (mean and standard deviation, training split)"
