"""Stage report: one offline page that says what a dataset is, who predicts it how well, and what that rests on.

    OUT/report.html    self-contained: no script, font or picture comes from elsewhere
    OUT/quality.html   the quality page of the source, so that the report's link holds wherever both are put
    OUT/summary.json   the headline and the main numbers, for an index of datasets

It needs no model: predictions come from the examples that evaluate kept, fields of station networks from the forecast stage.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Mapping, Sequence
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

import jinja2
import matplotlib.dates
import numpy as np
import pandas as pd
from markupsafe import Markup
from pydantic import Field

from pipeline import atomic, cube, lexicon, metrics, verdict
from pipeline import report_figures as figures
from pipeline import scores as score_tables
from pipeline import sensors as sensor_data
from pipeline.batches import CONTEXT_SENSOR, GRID_POINT
from pipeline.params import Section
from pipeline.scores import STRATA, Table
from pipeline.sensors import SensorDataset

TABLED = ("rmse", "crps", "mae", "rel_mse", "rel_l2", "bias", "coverage_90", "width_90")
SIGNS = {"better": "▲", "worse": "▼", "within noise": "≈", "too few blocks": "?"}
_LIBRARIES = ("torch", "numpy", "scipy", "pandas", "zarr", "lightgbm", "gstools", "scoringrules", "arch", "matplotlib")


class Params(Section):
    title: str
    source: str = Field(min_length=1)  # what the data are, in a sentence
    license: str = Field(min_length=1)  # SPDX identifier of the data, or LicenseRef-...
    attribution: str = Field(min_length=1)
    picture_leads: tuple[int, ...] = Field(min_length=1, max_length=4)  # frames; leads of field pictures and of error by distance


def params_model(key: str) -> type[Params]:
    return Params


def run(params: Params, key: str, *, checked: Path, sensors: Path, runs: Path, scores: Path, forecasts: Path, out: Path) -> None:
    """Write the report folder of a dataset."""
    dataset = sensor_data.read(sensors)
    table = score_tables.read_all(scores)
    skills = score_tables.skill(table)
    examples = pd.concat([pd.read_parquet(path) for path in sorted(scores.glob("*/examples.parquet"))], ignore_index=True)
    quality = checked / "page.html"
    headline = verdict.headline(table)
    page = (
        _environment()
        .get_template("report.html")
        .render(
            key=key,
            params=params,
            headline=headline,
            about=table.about,
            data=data_facts(dataset),
            checks=quality_facts(checked / "report.json"),
            quality_page=quality.exists(),
            split=split_figure(dataset),
            split_rows=split_rows(dataset),
            sensors=sensor_figure(dataset),
            scores=score_sections(table, skills),
            fields=field_figures(params, dataset, table, examples),
            stations=station_figures(dataset, table, examples),
            maps=map_figures(dataset, table, forecasts),
            training=training(runs, table),
            recipe=json.dumps(dataset.recipe, indent=1),
            inputs=dict(dataset.inputs),
            configs=configs(runs),
            versions={"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}},
            signs=SIGNS,
            strata=STRATA,
        )
    )
    with atomic.writing(out) as folder:
        folder.mkdir()
        (folder / "report.html").write_text(page, encoding="utf-8")
        (folder / "summary.json").write_text(json.dumps(summary(params, key, table, headline), indent=1) + "\n", encoding="utf-8")
        if quality.exists():
            shutil.copyfile(quality, folder / "quality.html")


def summary(params: Params, key: str, table: Table, headline: Sequence[str]) -> dict[str, Any]:
    """What an index of datasets shows."""
    return {
        "dataset": key,
        "title": params.title,
        "headline": list(headline),
        "models": table.models,
        "baselines": table.baselines,
        "cases": table.about["cases"]["count"],
        "blocks": table.about["cases"]["blocks"],
    }


# What the dataset is ------------------------------------------------------------------------------------------------------------------


def data_facts(dataset: SensorDataset) -> list[tuple[str, str]]:
    """Names and values of a definition list."""
    info = dataset.info
    facts = [(_variable(name), _statistics(dataset, i)) for i, name in enumerate(info.variables)]
    facts.append(
        ("Observations", f"{dataset['obs/value'].shape[0]:,} in {dataset.n_frames:,} frames, every {_amount(info.step, info.time_unit)}")
    )
    trajectories = len(dataset["trajectory/frame_start"]) - 1
    if trajectories > 1:
        facts.append(("Trajectories", f"{trajectories:,}"))
    if cube.is_calendar(info):
        first, last = cube.to_time(info, np.asarray(dataset["frame/time"])[[0, -1]])
        facts.append(("Time", f"{_moment(first)} to {_moment(last)} UTC"))
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


def quality_facts(path: Path) -> list[tuple[str, str]]:
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


# Who predicts it how well ---------------------------------------------------------------------------------------------------------------


def score_sections(table: Table, skills: pd.DataFrame) -> list[dict[str, Any]]:
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
            sections.append(
                {
                    "variable": _variable(variable),
                    "stratum": stratum,
                    "leads": [f"{lead:g}" for lead in leads],
                    "curve": Markup(figures.by_lead(table, "rmse", variable, stratum, unit)) if several else None,
                    "skill_curve": Markup(figures.skill_by_lead(table, skills, best, variable, stratum)) if best and several else None,
                    "distance": Markup(figures.by_distance(table, variable, binned, _shown(leads), unit))
                    if far and stratum != "between"
                    else None,
                    "calibration": Markup(figures.calibration(table, variable, stratum)) if probabilistic else None,
                    "tables": [score_table(table, name, variable, stratum, leads) for name in TABLED if (rows["metric"] == name).any()],
                    "skill": skill_table(skills, variable, stratum, leads),
                    "unbeaten": unbeaten(skills, variable, stratum),
                    "folded": "field" in set(table.rows["stratum"]) and stratum != "field",
                    "n": f"{int(rows['n'].max()):,}",
                    "spread": _number(float(rows.loc[rows["metric"] == "truth_std", "value"].max())),
                    "unit": verdict.unit_text(unit),
                }
            )
    return sections


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
                    "value": _number(row["value"]),
                    "interval": "" if pd.isna(row["low"]) else f"{_number(row['low'])} – {_number(row['high'])}",
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
    return {"metric": metric, "title": metrics.METRICS[metric].title, "unit": verdict.unit_text(unit), "rows": lines, "judged": judged}


def skill_table(skills: pd.DataFrame, variable: str, stratum: str, leads: Sequence[float]) -> list[dict[str, Any]]:
    """RMSE of each model relative to each baseline, with verdicts; one line a pair."""
    rows = skills[(skills["metric"] == "rmse") & (skills["variable"] == variable) & (skills["stratum"] == stratum)]
    lines = []
    for (model, baseline), part in rows.groupby(["model", "baseline"], sort=False):
        by = part.set_index("lead").to_dict("index")
        cells = [None if lead not in by else {**by[lead], "text": _percent(by[lead]["skill"]), "span": _span(by[lead])} for lead in leads]
        lines.append({"model": model, "baseline": baseline, "cells": cells})
    return lines


def unbeaten(skills: pd.DataFrame, variable: str, stratum: str) -> list[str]:
    """Baselines that no model beat, with the leads where that is so."""
    if skills.empty:
        return []
    left = score_tables.unbeaten(skills)
    left = left[(left["variable"] == variable) & (left["stratum"] == stratum)]
    return [f"{name} (lead {', '.join(f'{lead:g}' for lead in part['lead'])})" for name, part in left.groupby("baseline", sort=False)]


# Pictures -------------------------------------------------------------------------------------------------------------------------------


def field_figures(params: Params, dataset: SensorDataset, table: Table, examples: pd.DataFrame) -> list[Markup]:
    """Truth, prediction, error and background of the first example case, for truth on a grid of two axes."""
    gridded = examples[examples["kind"] == GRID_POINT]
    if gridded.empty or len(dataset["truth/shape"]) != 2 or 1 in dataset["truth/shape"]:
        return []
    case = int(gridded["case"].min())
    frame = int(np.asarray(dataset["cases/frame"])[case])
    start = np.asarray(dataset["frame/obs_start"])
    place = np.asarray(dataset["obs/position"])[start[frame] : start[frame + 1]]
    leads = [lead * dataset.info.step for lead in params.picture_leads]
    shape = (int(dataset["truth/shape"][0]), int(dataset["truth/shape"][1]))
    out = []
    for variable in dataset.info.variables:
        shown = gridded[(gridded["case"] == case) & (gridded["variable"] == variable) & gridded["lead"].isin(leads)]
        model, prior = _pair(table, variable)
        out.append(Markup(figures.pictures(shown, dataset.info, shape, model, prior, place, table)))
    return out


def station_figures(dataset: SensorDataset, table: Table, examples: pd.DataFrame) -> list[Markup]:
    """What stations reported and what was predicted for them: a context and a held-out station of each example case."""
    stations = examples[examples["sensor"] >= 0]
    out = []
    for variable, unit in zip(dataset.info.variables, dataset.info.units, strict=True):
        model, prior = _pair(table, variable)
        names = [name for name in (prior, model) if name]
        for case in sorted(stations["case"].unique()):
            part = stations[(stations["case"] == case) & (stations["variable"] == variable)]
            frame = int(np.asarray(dataset["cases/frame"])[case])
            for kind, text in ((CONTEXT_SENSOR, "context station"), (1 - CONTEXT_SENSOR, "held-out station")):
                known = part[(part["kind"] == kind) & part["truth"].notna()]
                if known.empty:
                    continue
                sensor = int(known["sensor"].value_counts().sort_index().idxmax())
                own = part[part["sensor"] == sensor]
                title = f"{_variable(variable)} at {text} {sensor}"
                origin = _origin(dataset, frame)
                history = _history(dataset, frame, sensor, variable, float(part["lead"].max()))
                out.append(Markup(figures.series(history, own, names, table, title, unit, origin)))
    return out


def map_figures(dataset: SensorDataset, table: Table, forecasts: Path) -> list[Markup]:
    """The newest forecast field of a station network at a few leads, with what its sensors had last reported."""
    if dataset.has_truth:
        return []
    out = []
    for variable in dataset.info.variables:
        model, _ = _pair(table, variable)
        folder = forecasts / model
        if not (folder / "forecast.zarr").exists():
            continue
        fields, _ = cube.read_folder(folder)
        last = fields.isel(init_time=-1)
        middle = last[variable].sel(quantile=0.5, method="nearest") if "quantile" in last[variable].dims else last[variable]
        observed = pd.read_parquet(folder / "sensors.parquet")
        seen = observed[(observed["variable"] == variable) & (observed["lead"] == 0)]
        seen = seen[seen["init_time"] == seen["init_time"].max()]
        horizontal, vertical = ("longitude", "latitude") if dataset.info.projection else ("x", "y")
        steps = np.linspace(0, len(middle["lead_time"]) - 1, 3).round().astype(int)
        axes = (middle[horizontal].values, middle[vertical].values)
        panels = [(_lead_name(dataset, middle["lead_time"].values[i]), middle.isel(lead_time=int(i)).values) for i in steps]
        title = f"{_variable(variable)} by {model} from {_moment(last['init_time'].values)}"
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


# What it rests on -----------------------------------------------------------------------------------------------------------------------


def training(folder: Path, table: Table) -> list[dict[str, Any]]:
    """The training curve of each phase of each model that was trained."""
    out = []
    for model in table.models:
        path = folder / model / "history.csv"
        if not path.exists():
            continue
        history = pd.read_csv(path)
        about = json.loads((folder / model / "summary.json").read_text(encoding="utf-8"))
        for phase, rows in history.groupby("phase", sort=False):
            known, name = about["phases"][phase], model if len(about["phases"]) == 1 else f"{model}, {phase}"
            figure = Markup(figures.training_curve(rows, known["best_step"], name))
            out.append({"name": name, "figure": figure, "trained": known["trained"], "steps": int(rows["step"].iloc[-1])})
    return out


def configs(folder: Path) -> list[dict[str, str]]:
    """Settings and weights of every run, baselines included."""
    out = []
    for path in sorted(folder.glob("**/run.json")):
        if "background" in path.relative_to(folder).parts[:-1]:
            continue
        text = json.loads(path.read_text(encoding="utf-8"))
        out.append(
            {
                "name": path.parent.relative_to(folder).as_posix(),
                "weights": text["weights_sha256"],
                "config": json.dumps({"context_frames": text["context_frames"], **text["config"]}, indent=1),
            }
        )
    return out


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )


def _shown(leads: Sequence[float]) -> list[float]:
    """The first lead, and one in the middle where there are several."""
    return [leads[0]] if len(leads) < 3 else [leads[0], leads[len(leads) // 2]]


def _statistics(dataset: SensorDataset, channel: int) -> str:
    info = dataset.info
    unit = verdict.unit_text(info.units[channel])
    return f"{info.mean[channel]:.4g} ± {info.std[channel]:.4g} {unit}".rstrip() + " (mean and standard deviation, training split)"


def _variable(name: str) -> str:
    return lexicon.VARIABLES[name].long_name if name in lexicon.VARIABLES else name


def _amount(number: float, unit: str) -> str:
    return f"{number:g} of model time" if unit == "1" else f"{number:g} {unit}"


def _moment(time: Any) -> str:
    return f"{float(time):g}" if np.asarray(time).dtype.kind == "f" else str(np.datetime64(time, "m")).replace("T", " ")


def _origin(dataset: SensorDataset, frame: int) -> str:
    time = cube.to_time(dataset.info, np.asarray(dataset["frame/time"])[[frame]])[0]
    return _moment(time) + (" UTC" if cube.is_calendar(dataset.info) else "")


def _lead_name(dataset: SensorDataset, lead: Any) -> str:
    if np.asarray(lead).dtype.kind == "m":
        return f"+{lead / np.timedelta64(3600, 's'):g} h"
    return f"lead {float(lead):g}"


def _number(value: float) -> str:
    """Three digits, without an exponent where one can do without."""
    if not np.isfinite(value):
        return "–"
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        digits = 2 - int(np.floor(np.log10(abs(value)))) if value else 2
        return f"{value:.{max(0, min(digits, 6))}f}"
    return f"{value:.2e}"


def _percent(skill: float) -> str:
    """A skill as people read it: percent, or how many times as large where it is more than twice."""
    if not np.isfinite(skill):
        return "–"
    return (
        f"{100 * skill:+.0f} %".replace("-0 %", "0 %").replace("+0 %", "0 %")
        if skill > -1
        else f"×{1 - skill:.1f}"
        if skill > -9
        else f"×{1 - skill:,.0f}"
    )


def _span(row: Mapping[Any, Any]) -> str:
    return "" if pd.isna(row["low"]) else f"{_percent(row['low'])} to {_percent(row['high'])}"
