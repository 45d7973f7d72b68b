"""Stage report: one offline page that says what a dataset is, who predicts it how well, and what that rests on.

    OUT/report.html    self-contained: no script, font or picture comes from elsewhere
    OUT/quality.html   the quality page of the source, so that the report's link holds wherever both are put
    OUT/summary.json   the headline and the main numbers, for an index of datasets
    OUT/leads.csv      the RMSE of all predictors by lead, and
    OUT/training.csv   the losses of all models by step, for `dvc plots show`

It needs no model: predictions come from the examples that evaluate kept, fields of station networks from the forecast stage.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from pydantic import Field

from pipeline import atomic
from pipeline import scores as score_tables
from pipeline import sensors as sensor_data
from pipeline.params import Section
from pipeline.report import dataset, pictures, tables, trained, verdict
from pipeline.scores import STRATA, Table

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
    data = sensor_data.read(sensors)
    if len(data.info.space) > 2:
        raise ValueError(f"a report draws maps of x and y: {data.info.name} has the axes {', '.join(data.info.space)}")
    table = score_tables.read_all(scores)
    skills = score_tables.skill(table)
    examples = pd.concat([pd.read_parquet(path) for path in sorted(scores.glob("*/examples.parquet"))], ignore_index=True)
    headline = verdict.headline(table)
    page = (
        _environment()
        .get_template("report.html")
        .render(
            key=key,
            params=params,
            headline=headline,
            about=table.about,
            data=dataset.facts(data),
            checks=dataset.quality(checked / "report.json"),
            split=dataset.split_figure(data),
            split_rows=dataset.split_rows(data),
            sensors=dataset.sensor_figure(data),
            rankings=tables.rankings(table, skills, trained.budgets(runs, table.models)),
            scores=tables.sections(table, skills),
            fields=pictures.fields(params.picture_leads, data, table, examples),
            stations=pictures.stations(data, table, examples),
            maps=pictures.maps(data, table, forecasts),
            training=trained.training(runs, table.models),
            calibrations=trained.calibrations(runs, table.models, data.info.variables),
            recipe=json.dumps(data.recipe, indent=1),
            inputs=dict(data.inputs),
            configs=trained.configs(runs),
            versions={"python": platform.python_version(), **{name: metadata.version(name) for name in _LIBRARIES}},
            signs=SIGNS,
            strata=STRATA,
        )
    )
    with atomic.writing(out) as folder:
        folder.mkdir()
        (folder / "report.html").write_text(page, encoding="utf-8")
        (folder / "summary.json").write_text(json.dumps(summary(params, key, table, headline), indent=1) + "\n", encoding="utf-8")
        curves = trained.curves(runs, table.models).rename(columns={"phase": "panel"})
        for name, rows in (("leads", tables.by_lead(table)), ("training", curves)):
            rows.to_csv(folder / f"{name}.csv", index=False, float_format="%.6g", lineterminator="\n")
        shutil.copyfile(checked / "page.html", folder / "quality.html")


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


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("pipeline"), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
