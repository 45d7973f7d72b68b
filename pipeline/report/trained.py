"""What the scores rest on: the training of each model, the budget it had, and the settings and weights of every run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from markupsafe import Markup

from models.calibrated import ELSEWHERE, SEEN
from pipeline import runs
from pipeline.report import score_figures as figures


def curves(folder: Path, models: Sequence[str]) -> pd.DataFrame:
    """The training history of the models that were trained: model, phase, step, loss, validation_loss, ..."""
    found = [pd.read_csv(path).assign(model=model) for model in models if (path := folder / model / "history.csv").exists()]
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=["model", "phase", "step", "loss", "validation_loss"])


def training(folder: Path, models: Sequence[str]) -> list[dict[str, Any]]:
    """The training curve of each phase of each model that was trained, with its steps and its budget."""
    out = []
    for (model, phase), rows in curves(folder, models).groupby(["model", "phase"], sort=False):
        about = summary(folder / str(model))
        known, name = about["phases"][phase], str(model) if len(about["phases"]) == 1 else f"{model}, {phase}"
        figure = Markup(figures.training_curve(rows.dropna(axis="columns", how="all"), known["best_step"], name))
        steps = int(rows["step"].iloc[-1])
        out.append({"name": name, "figure": figure, "trained": known["trained"], "steps": steps, "budget": about["budget"]})
    return out


def budgets(folder: Path, models: Sequence[str]) -> dict[str, str]:
    """The preset that each model was trained with."""
    return {model: summary(folder / model)["budget"] for model in models if (folder / model / "summary.json").exists()}


def calibrations(folder: Path, models: Sequence[str], variables: Sequence[str]) -> dict[str, Any]:
    """How validation cases corrected the answers of each model: `leads`, and rows of a weight and a factor for each of them, None where
    they did not say. A row that changes nothing is left out."""
    found = {model: one for model in models if (one := runs.calibration(folder / model)) is not None}
    leads = sorted({lead for one in found.values() for lead in one.leads})
    rows = []
    for model, one in found.items():
        for place, where in ((ELSEWHERE, "elsewhere"), (SEEN, "at sensors of the context")):
            for v, variable in enumerate(variables):
                pairs = {
                    lead: (weight[v], factor[v])
                    for lead, weight, factor in zip(one.leads, one.weight[place], one.factor[place], strict=True)
                }
                if set(pairs.values()) != {(1.0, 1.0)}:
                    name = model if len(variables) == 1 else f"{model}, {variable}"
                    rows.append({"name": name, "where": where, "cells": [pairs.get(lead) for lead in leads]})
    return {"leads": leads, "rows": rows}


def summary(run: Path) -> dict[str, Any]:
    """What training says of a run: its budget, its parameters, its phases."""
    return dict(json.loads((run / "summary.json").read_text(encoding="utf-8")))


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
