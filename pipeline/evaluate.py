"""Stage evaluate: score a run, or all baselines, on the frozen test cases of a sensor dataset.

    OUT/blocks.parquet, scores.parquet, scores.json   the score table, pipeline/scores.py
    OUT/metrics.json     RMSE by lead for `dvc metrics show`
    OUT/leads.csv        scores by lead for `dvc plots show`
    OUT/examples.parquet predictions of a few cases beside the truth, for pictures
    OUT/cases.csv        RMSE of each case over all its questions; metrics.json has their mean where the dataset says what a case is asked

Cases stream through in batches; what stays in memory are sums per bootstrap block (pipeline/sums.py). The batch size does not change a
byte of them, as far as it does not change the predictions.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pydantic import Field, field_validator

from models.contract import DatasetInfo, FieldPrediction, Frames, Predictor
from pipeline import atomic, device, oracle, predict, runs, scores
from pipeline import sensors as sensor_data
from pipeline.bootstrap import Bootstrap
from pipeline.cases import CaseBatch, cases, numbers
from pipeline.oracle import Oracle
from pipeline.outcome import outcome_at
from pipeline.params import Section
from pipeline.sensors import SensorDataset
from pipeline.sums import STRATA, Sums

log = logging.getLogger(__name__)

BASELINES = "baselines"  # the MODEL whose run folder holds one folder per baseline
SPLIT = "test"
_EXAMPLE = {
    "model": "str", "case": "int64", "time": "float64", "lead": "float64", "point": "int32", "sensor": "int32", "kind": "int8",
    "x": "float32", "y": "float32", "variable": "str", "truth": "float32", "mean": "float32", "low": "float32", "high": "float32",
}  # fmt: skip
_SHOWN = ("rmse", "mae", "crps", "nll", "rel_mse", "rel_l2", "coverage_90", "brier", "accuracy")


class Params(Section):
    leads: tuple[int, ...] = Field(min_length=1)  # frames; -3 is three frames before the last one of the context
    batch: int = Field(ge=1)  # cases at once
    cases: int | None = Field(default=None, ge=1)  # so many of the frozen cases, evenly spread; None is all
    distance_edges: tuple[float, ...] = ()  # inner edges of the distance bins, in the dataset's position unit
    examples: int = Field(default=2, ge=0)  # cases whose predictions are kept for pictures
    bootstrap: Bootstrap = Bootstrap()
    trained_on: str | None = None  # the dataset that runs were trained on, where it is another one of the same kind

    @field_validator("leads", "distance_edges")
    @classmethod
    def _rising(cls, numbers: tuple[float, ...]) -> tuple[float, ...]:
        if list(numbers) != sorted(set(numbers)):
            raise ValueError(f"must increase strictly, found {list(numbers)}")
        return numbers

    @field_validator("distance_edges")
    @classmethod
    def _not_negative(cls, edges: tuple[float, ...]) -> tuple[float, ...]:
        if edges and edges[0] < 0:
            raise ValueError(f"must not be negative, found {list(edges)}")
        return edges


SECTION_KEYS = 1  # the models of a dataset are scored alike


def params_model(key: str, model: str) -> type[Params]:
    return Params


def run(params: Params, key: str, model: str, *, sensors: Path, run: Path, out: Path) -> None:
    """Score the run folder `run` (or each one in it) and write the score folder."""
    dataset = sensor_data.read(sensors)
    folders = runs.folders(run)
    if not folders:
        raise ValueError(f"{run} holds no run folder: fit the baselines or train the model first")
    baselines = model == BASELINES  # always fitted to the dataset itself
    known = dataset.info if baselines else replace(dataset.info, name=params.trained_on or dataset.info.name)
    loaded = [runs.load(folder, known, device.name()) for folder in folders]
    scored = []
    for folder, fitted in zip(folders, loaded, strict=True):
        name = folder.name if baselines else model
        what = {
            "role": "baseline" if baselines else "model",
            "kind": fitted.name,
            "tasks": sorted(fitted.predictor.tasks),
            "context_frames": fitted.context_frames,
            "weights_sha256": fitted.weights_sha256,
            "background_sha256": _background(folder),
        }
        scored.append(score(dataset, fitted.predictor, fitted.context_frames, name, what, params, device.name()))
        log.info("scored %s on %d cases of %s: %s", name, scored[-1][0].about["cases"]["count"], key, overall(scored[-1][0]))
    truth = oracle.of_dataset(dataset) if baselines else None
    if truth is not None:  # the floor, beside the baselines and with as much context as any of them
        frames = max(fitted.context_frames for fitted in loaded)
        what = {"role": "baseline", "kind": "oracle", "tasks": sorted(truth.tasks), "context_frames": frames}
        scored.append(score(dataset, truth, frames, "oracle", what, params))
    tables, examples, by_case = zip(*scored, strict=True)
    table = scores.merge(tables)
    cases_table = pd.concat(by_case, ignore_index=True)
    metrics = mean_of_cases(cases_table) if "cases/asked" in dataset else headline(table)
    with atomic.writing(out) as made:
        scores.write(made, table)
        cases_table.to_csv(made / "cases.csv", index=False, float_format="%.6g", lineterminator="\n")
        (made / "metrics.json").write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")
        by_lead(table).to_csv(made / "leads.csv", index=False, float_format="%.6g", lineterminator="\n")
        pd.concat(examples, ignore_index=True).to_parquet(made / "examples.parquet", index=False, compression="zstd")


def score(
    dataset: SensorDataset,
    predictor: Predictor | Oracle,
    context_frames: int,
    name: str,
    what: Mapping[str, Any],
    params: Params,
    device: str = "cpu",
) -> tuple[scores.Table, pd.DataFrame, pd.DataFrame]:
    """The score table of one predictor, its predictions of the example cases, and the RMSE of each case."""
    info = dataset.info
    number = numbers(dataset, SPLIT, params.cases)
    blocks = np.unique(np.asarray(dataset["cases/block"])[number])
    shown = set(number[np.linspace(0, len(number) - 1, params.examples + 2).round().astype(int)[1:-1]]) if len(number) else set()
    sums = Sums(blocks, params.leads, params.distance_edges, len(info.variables))
    digest, examples, distribution = hashlib.sha256(), [], "mean only"
    able = np.array([bool(predictor.tasks & {scores.task(stratum, lead) for stratum in STRATA}) for lead in params.leads])
    if not able.any():
        raise ValueError(f"{name} claims the tasks {sorted(predictor.tasks)}, none of which the leads {list(params.leads)} ask for")
    for part in cases(dataset, SPLIT, context_frames, params.leads, params.batch, params.cases):
        strata = sums.strata(part, info.half_extent)
        _update(digest, part, strata)
        answer = _predict(predictor.of(part) if isinstance(predictor, Oracle) else predictor, part, able, device, info)
        problem = _not_finite(answer, part, able)
        if problem:
            raise ValueError(f"{name} on {info.name}: {problem}")
        distribution = sums.add(part, strata, answer, able, predictor.levels, info)
        examples += [_example(part, b, answer, able, name, predictor.levels, info) for b, i in enumerate(part.index) if i in shown]
    about = {
        "dataset": info.name,
        "split": SPLIT,
        "cases": {"count": len(number), "blocks": len(blocks), "sha256": digest.hexdigest()},
        "leads": [lead * info.step for lead in params.leads],
        "time_unit": info.time_unit,
        "position_unit": info.position_unit,
        "units": dict(zip(info.variables, info.units, strict=True)),
        "distance_edges": list(params.distance_edges),
        "bootstrap": params.bootstrap.model_dump(),
        "models": {name: {**what, "distribution": distribution}},
    }
    table = scores.build(about, sums.table(name, info, predictor.tasks))
    empty = pd.DataFrame({column: pd.Series(dtype=kind) for column, kind in _EXAMPLE.items()})
    shown_cases = pd.concat(examples, ignore_index=True).astype(_EXAMPLE) if examples else empty
    return table, shown_cases, sums.by_case(name, info)


def headline(table: scores.Table) -> dict[str, Any]:
    """The RMSE of each model by lead, small enough for `dvc metrics show`: model -> variable -> lead -> RMSE; of classes the NLL.

    At the sensors held out where there are any, else on the whole field, else at the context sensors; leads.csv has all.
    """
    rows = table.select(distance="all")
    classes = {what["distribution"] for what in table.about["models"].values()} == {"classes"}
    rows = rows[rows["metric"] == ("nll" if classes else "rmse")]
    stratum = next(name for name in ("held_out", "field", "context") if (rows["stratum"] == name).any())
    out: dict[str, Any] = {}
    for row in rows[rows["stratum"] == stratum].to_dict("records"):
        place = out.setdefault(row["model"], {}).setdefault(row["variable"], {})
        place[f"lead {row['lead']:g}"] = float(f"{row['value']:.4g}")
    return out


def mean_of_cases(cases: pd.DataFrame) -> dict[str, Any]:
    """The mean of the RMSE of all cases, as block protocols report it, small enough for `dvc metrics show`."""
    out: dict[str, Any] = {}
    for (model, variable), rows in cases.groupby(["model", "variable"], sort=False)["rmse"]:
        out.setdefault(str(model), {})[variable] = {"cases": len(rows), "mean rmse": float(f"{rows.mean():.5g}")}
    return out


def overall(table: scores.Table) -> str:
    """The mean squared error by stratum and variable over all leads at once, in words."""
    rows = table.blocks[table.blocks["distance"] == "all"]
    sums = rows.groupby(["stratum", "variable"], sort=False, as_index=False)[["squared", "n"]].sum().to_dict("records")
    return ", ".join(f"MSE {row['squared'] / row['n']:.4g} ({row['variable']}, {row['stratum']})" for row in sums)


def by_lead(table: scores.Table) -> pd.DataFrame:
    """Scores by lead, one column a metric: lead, model, variable, stratum, n, ..."""
    rows = table.select(distance="all")
    rows = rows[rows["metric"].isin(_SHOWN)]
    index = ["model", "variable", "stratum", "lead", "n"]
    shown = [name for name in _SHOWN if (rows["metric"] == name).any()]
    wide = rows.pivot(index=index, columns="metric", values="value").reindex(columns=shown).reset_index()
    order = pd.Categorical(wide["model"], list(table.about["models"]))
    return wide.assign(order=order).sort_values(["stratum", "variable", "order", "lead"]).drop(columns="order")


def _background(folder: Path) -> str | None:
    """The weights of the baseline inside a run folder, by which a report finds its scores; None where there is none."""
    path = folder / "background" / "run.json"
    return json.loads(path.read_text(encoding="utf-8"))["weights_sha256"] if path.exists() else None


def _predict(predictor: Predictor, part: CaseBatch, able: np.ndarray, device: str, info: DatasetInfo) -> FieldPrediction:
    """Physical predictions of the query frames `able` [S]; the truth does not leave this file."""
    hidden = {f.name: getattr(part.batch.query, f.name) for f in fields(Frames) if f.name != "value"}
    query = Frames(**{name: tensor[:, able] for name, tensor in hidden.items() if tensor is not None})
    return predict.answer(predictor, part.batch.context, query, info, device)


def _not_finite(answer: FieldPrediction, part: CaseBatch, able: np.ndarray) -> str:
    """What is wrong with predictions at scored points, "" if nothing."""
    known = part.batch.query.mask[:, able]
    members = None if answer.samples is None else answer.samples.movedim(0, -1)
    given = {"mean": answer.mean, "scale": answer.scale, "quantiles": answer.quantiles, "samples": members}
    given["probabilities"] = answer.probabilities
    for name, array in given.items():
        if array is None:
            continue
        bad = ~torch.isfinite(array).flatten(3).all(-1) & known
        if bad.any():
            b, s, q = (int(i) for i in bad.nonzero()[0])
            lead = np.asarray(part.leads)[able][s]
            first = f"first in case {part.index[b]}, lead {lead}, point {q}"
            return f"{int(bad.sum())} predictions ({name}) are not finite, {first}: the model or its training data must be mended"
    if answer.scale is not None and (answer.scale < 0).any():
        least = float(answer.scale.min())
        return f"{int((answer.scale < 0).sum())} standard deviations are below zero, the least is {least:.3g}: the model must be mended"
    return ""


def _example(
    part: CaseBatch, b: int, answer: FieldPrediction, able: np.ndarray, model: str, levels: tuple[float, ...], info: DatasetInfo
) -> pd.DataFrame:
    """One case as long rows; truth is NaN where it is unknown, low and high (5 % and 95 %) where there is no distribution."""
    query = part.batch.query
    frames, points = int(able.sum()), query.mask.shape[2]
    at = tuple(np.indices((1, frames, points)).reshape(3, -1))
    assert query.value is not None
    only = slice(b, b + 1)
    one = Frames(query.position[only, able], query.mask[only, able], query.time[only, able], query.value[only, able])
    alone = FieldPrediction(
        mean=answer.mean[only],
        scale=None if answer.scale is None else answer.scale[only],
        quantiles=None if answer.quantiles is None else answer.quantiles[only],
        samples=None if answer.samples is None else answer.samples[:, only],
        probabilities=None if answer.probabilities is None else answer.probabilities[only],
    )
    outcome = outcome_at(one, alone, at, at[1], levels, info)
    _, s, q = at
    position = one.position.numpy()[at].astype(np.float64) * info.half_extent + np.asarray(info.centre)
    if position.shape[1] == 1:  # a picture needs two axes
        position = np.pad(position, ((0, 0), (0, 1)))
    low, high = outcome.quantile(0.05), outcome.quantile(0.95)
    unknown = ~one.mask.numpy()[at]
    parts = [
        pd.DataFrame(
            {
                "model": model,
                "case": part.index[b],
                "time": one.time.numpy()[0, s],
                "lead": np.asarray(part.leads)[able][s] * info.step,
                "point": q,
                "sensor": -1 if query.sensor is None else query.sensor.numpy()[b][able][s, q],
                "kind": part.kind[b][able][s, q],
                "x": position[:, 0],
                "y": position[:, 1],
                "variable": name,
                "truth": np.where(unknown, np.nan, outcome.truth[:, c]),
                "mean": outcome.mean[:, c],
                "low": np.nan if low is None else low[:, c],
                "high": np.nan if high is None else high[:, c],
            }
        )
        for c, name in enumerate(info.variables)
    ]
    return pd.concat(parts, ignore_index=True)


def _update(digest: Any, part: CaseBatch, strata: tuple[np.ndarray, np.ndarray]) -> None:
    """Add the questions and answers of a batch to the hash of the cases, case by case, so that the batch size does not matter."""
    query = part.batch.query
    assert query.value is not None
    for b in range(len(part.index)):
        for array in (
            np.array([part.index[b], part.block[b]], "<i8"),
            query.time[b].numpy().astype("<f8"),
            query.position[b].numpy().astype("<f4"),
            query.mask[b].numpy().astype("u1"),
            np.where(query.mask[b].numpy()[..., None], query.value[b].numpy(), 0).astype("<f4"),
            strata[0][b].astype("<i8"),
            strata[1][b].astype("<i8"),
        ):
            digest.update(np.ascontiguousarray(array).tobytes())
