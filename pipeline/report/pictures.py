"""Which predictions a report shows: fields of one test case, single stations, and the newest forecast."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from markupsafe import Markup

from pipeline import cube
from pipeline import scores as score_tables
from pipeline.cases import CONTEXT_SENSOR, GRID_POINT
from pipeline.report import field_figures as figures
from pipeline.report import verdict
from pipeline.report.wording import lead_name, moment, origin, variable_name
from pipeline.scores import Table
from pipeline.sensors import SensorDataset


def fields(picture_leads: Sequence[int], dataset: SensorDataset, table: Table, examples: pd.DataFrame) -> list[Markup]:
    """Truth, prediction, error and background of the first example case, for truth on a grid of two axes."""
    gridded = examples[examples["kind"] == GRID_POINT]
    if gridded.empty or len(dataset["truth/shape"]) != 2 or 1 in dataset["truth/shape"]:
        return []
    case = int(gridded["case"].min())
    frame = int(np.asarray(dataset["cases/frame"])[case])
    start = np.asarray(dataset["frame/obs_start"])
    place = np.asarray(dataset["obs/position"])[start[frame] : start[frame + 1]]
    leads = [lead * dataset.info.step for lead in picture_leads]
    shape = (int(dataset["truth/shape"][0]), int(dataset["truth/shape"][1]))
    out = []
    for variable in dataset.info.variables:
        shown = gridded[(gridded["case"] == case) & (gridded["variable"] == variable) & gridded["lead"].isin(leads)]
        model, prior = _pair(table, variable)
        out.append(Markup(figures.pictures(shown, dataset.info, shape, model, prior, place, table)))
    return out


def stations(dataset: SensorDataset, table: Table, examples: pd.DataFrame) -> list[Markup]:
    """What stations reported and what was predicted for them: a context and a held-out station of each example case."""
    fixed = examples[examples["sensor"] >= 0]
    out = []
    for variable, unit in zip(dataset.info.variables, dataset.info.units, strict=True):
        model, prior = _pair(table, variable)
        names = [name for name in (prior, model) if name]
        for case in sorted(fixed["case"].unique()):
            part = fixed[(fixed["case"] == case) & (fixed["variable"] == variable)]
            frame = int(np.asarray(dataset["cases/frame"])[case])
            for kind, text in ((CONTEXT_SENSOR, "context station"), (1 - CONTEXT_SENSOR, "held-out station")):
                known = part[(part["kind"] == kind) & part["truth"].notna()]
                if known.empty:
                    continue
                sensor = int(known["sensor"].value_counts().sort_index().idxmax())
                own = part[part["sensor"] == sensor]
                title = f"{variable_name(variable)} at {text} {dataset.name_of(sensor)}"
                history = _history(dataset, frame, sensor, variable, float(part["lead"].max()))
                out.append(Markup(figures.series(history, own, names, table, title, unit, origin(dataset, frame))))
    return out


def maps(dataset: SensorDataset, table: Table, forecasts: Path) -> list[Markup]:
    """The newest forecast field of a station network at a few leads, with what its sensors had last reported."""
    if dataset.has_truth:
        return []
    out = []
    for variable in dataset.info.variables:
        model, _ = _pair(table, variable)
        folder = forecasts / model
        if not (folder / "forecast.zarr").exists():
            continue
        forecast, _ = cube.read_folder(folder)
        last = forecast.isel(init_time=-1)
        middle = last[variable].sel(quantile=0.5, method="nearest") if "quantile" in last[variable].dims else last[variable]
        observed = pd.read_parquet(folder / "sensors.parquet")
        seen = observed[(observed["variable"] == variable) & (observed["lead"] == 0)]
        seen = seen[seen["init_time"] == seen["init_time"].max()]
        horizontal, vertical = ("longitude", "latitude") if dataset.info.projection else ("x", "y")
        steps = np.linspace(0, len(middle["lead_time"]) - 1, 3).round().astype(int)
        axes = (middle[horizontal].values, middle[vertical].values)
        panels = [(lead_name(dataset, middle["lead_time"].values[i]), middle.isel(lead_time=int(i)).values) for i in steps]
        title = f"{variable_name(variable)} by {model} from {moment(last['init_time'].values)}"
        sensors = seen[[horizontal, vertical, "value"]].to_numpy(float)
        unit = dict(zip(dataset.info.variables, dataset.info.units, strict=True))[variable]
        aspect = 1 / np.cos(np.deg2rad(dataset.info.projection["latitude"])) if dataset.info.projection else 1.0
        out.append(Markup(figures.maps(panels, axes, sensors, title, variable, unit, aspect)))
    return out


def _pair(table: Table, variable: str) -> tuple[str, str | None]:
    """The model to show, and beside it its background, or else the best baseline."""
    stratum = verdict.primary(table, "forecast") or verdict.primary(table, "interpolation")
    assert stratum is not None
    order = [str(name) for name in score_tables.ranking(table, verdict.JUDGED, variable, stratum)["model"]]
    baselines = [name for name in order if name in table.baselines]
    model = verdict.best_model(table, variable, stratum)
    if model is None:
        return baselines[0], baselines[1] if len(baselines) > 1 else None
    return model, verdict.background(table, model) or (baselines[0] if baselines else None)


def _history(dataset: SensorDataset, frame: int, sensor: int, variable: str, longest: float) -> pd.DataFrame:
    """What a fixed sensor reported around a frame: lead (time unit), value."""
    info = dataset.info
    ahead = round(longest / info.step)
    first, last = max(0, frame - max(2 * ahead, 12)), min(dataset.n_frames, frame + ahead + 1)
    start = np.asarray(dataset["frame/obs_start"])
    rows = slice(int(start[first]), int(start[last]))
    owner = np.repeat(np.arange(first, last), np.diff(start[first : last + 1]))
    own = np.asarray(dataset["obs/sensor"][rows]) == sensor
    own &= dataset.trajectory_of(owner) == dataset.trajectory_of(np.array([frame]))
    time = np.asarray(dataset["frame/time"])
    value = np.asarray(dataset["obs/value"][rows])[own, info.variables.index(variable)]
    return pd.DataFrame({"lead": time[owner[own]] - time[frame], "value": value})
