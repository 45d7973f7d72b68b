"""The score table contract: what evaluate writes for one run (or all baselines of a dataset) and what everybody reads.

    FOLDER/blocks.parquet   the exact truth: additive statistics (pipeline/metrics.py) per model, stratum, distance, lead, variable, block
    FOLDER/scores.parquet   tidy: metric, variable, unit, dataset, model, split, task, stratum, distance, lead, value, low, high, n, blocks
    FOLDER/scores.json      the same rows, with what they were made from (`about`)

Strata: `context` where a context sensor stands, `held_out` sensors no model saw, `between` grid points without a sensor, `field` all grid
points. `distance` to the nearest observation is "all" or a bin such as "5-10" in `about.position_unit`; `lead` is in `about.time_unit`.
`low` and `high` bound the central 95 % of a block bootstrap; NaN (null) where there are too few blocks.

Tables merge only if they were made from the same frozen cases, the same truth and the same bootstrap draws.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipeline import bootstrap, metrics
from pipeline.bootstrap import Bootstrap
from pipeline.metrics import METRICS, STATISTICS

KEYS = ["model", "variable", "stratum", "distance", "lead"]
COLUMNS = ["metric", "variable", "unit", "dataset", "model", "split", "task", "stratum", "distance", "lead"]
COLUMNS += ["value", "low", "high", "n", "blocks"]
STRATA = {
    "context": "at the context sensors",
    "held_out": "at sensors no model saw",
    "between": "at grid points without a sensor",
    "field": "at all grid points",
}
SKILL_METRICS = ("mse", "rmse", "mae", "crps")
_SHARED = ("dataset", "split", "cases", "leads", "time_unit", "position_unit", "units", "distance_edges", "bootstrap")
_DIGITS = 7
_NEGLIGIBLE, _ROUNDING = 0.005, 1e-5  # of the baseline's value, and of the size of the truth: a smaller difference is nobody's win


@dataclass(frozen=True)
class Cell:
    """Statistics [blocks] of one model in one cell, and the draws of all cells of the dataset."""

    sums: dict[str, np.ndarray]
    drawn: np.ndarray

    @cached_property
    def whole(self) -> dict[str, np.ndarray]:
        return {name: array.sum() for name, array in self.sums.items()}

    @cached_property
    def each(self) -> dict[str, np.ndarray]:
        return bootstrap.resample(self.sums, self.drawn)


@dataclass(frozen=True)
class Table:
    """Scores of some predictors of one dataset."""

    about: Mapping[str, Any]  # _SHARED, and `models`: name -> {"role": "baseline" | "model", "distribution", ...}
    blocks: pd.DataFrame  # KEYS, block, STATISTICS
    rows: pd.DataFrame  # COLUMNS

    @property
    def models(self) -> list[str]:
        return [name for name, what in self.about["models"].items() if what["role"] == "model"]

    @property
    def baselines(self) -> list[str]:
        return [name for name, what in self.about["models"].items() if what["role"] == "baseline"]

    @cached_property
    def cells(self) -> dict[tuple[Any, ...], Cell]:
        """The statistics of every cell, keyed by KEYS; all distances together only."""
        drawn, whole = _drawn(self.about), self.blocks[self.blocks["distance"] == "all"]
        return {
            (model, *cell): Cell({name: array[:, i] for name, array in sums.items()}, drawn)
            for model, part in whole.groupby("model", sort=False)
            for keys, sums in [_cube(part, self.about["cases"]["blocks"])]
            for i, cell in enumerate(keys.itertuples(index=False, name=None))
        }

    def select(self, **equal: Any) -> pd.DataFrame:
        """Rows whose columns have the given values."""
        mask = np.ones(len(self.rows), bool)
        for name, value in equal.items():
            mask &= (self.rows[name] == value).to_numpy()
        return self.rows[mask]

    def best(self, metric: str, variable: str, stratum: str, lead: float) -> tuple[str, bool] | None:
        """Who has the lowest value, and whether it beats every other predictor by more than noise. None where nobody was scored."""
        rows = self.select(metric=metric, variable=variable, stratum=stratum, lead=lead, distance="all").dropna(subset="value")
        if rows.empty:
            return None
        first = str(rows.sort_values(["value", "model"])["model"].iloc[0])
        others = [str(name) for name in rows["model"] if name != first]
        verdicts = [compare(self, first, other, metric, variable, stratum, lead)["verdict"] for other in others]
        return first, bool(others) and set(verdicts) == {"better"}


def build(about: Mapping[str, Any], blocks: pd.DataFrame) -> Table:
    """The tidy rows of block statistics, with their intervals."""
    drawn, parts = _drawn(about), []
    for model, part in blocks.groupby("model", sort=False):
        keys, sums = _cube(part, about["cases"]["blocks"])
        held = (sums["n"] > 0).sum(axis=0)
        whole, each = {name: array.sum(axis=0) for name, array in sums.items()}, bootstrap.resample(sums, drawn)
        for name in METRICS:
            low, high = bootstrap.interval(metrics.evaluate(name, each), held)
            value = metrics.evaluate(name, whole)
            rows = keys.assign(metric=name, value=value, low=low, high=high, n=whole["n"].astype(np.int64), blocks=held)
            parts.append(rows.assign(model=model).dropna(subset="value"))
    rows = pd.concat(parts, ignore_index=True).assign(dataset=about["dataset"], split=about["split"])
    rows["unit"] = [
        metrics.unit(metric, about["units"][variable]) for metric, variable in zip(rows["metric"], rows["variable"], strict=True)
    ]
    rows["task"] = [task(stratum, lead) for stratum, lead in zip(rows["stratum"], rows["lead"], strict=True)]
    for name in ("value", "low", "high"):
        rows[name] = _rounded(rows[name].to_numpy(np.float64))
    return Table(about, blocks, rows[COLUMNS])


def task(stratum: str, lead: float) -> str:
    """The task (models.contract.TASKS) that a stratum at a lead belongs to."""
    if lead > 0:
        return "forecast"
    return "reconstruction" if stratum in ("context", "field") else "interpolation"


def distance_labels(edges: tuple[float, ...]) -> list[str]:
    """Names of the distance bins, in order: "0-5", "5-10", ">10"; none where there is a single bin."""
    if not edges:
        return ["any"]
    return [*(f"{low:g}-{high:g}" for low, high in zip((0.0, *edges), edges, strict=False)), f">{edges[-1]:g}"]


def write(folder: Path, table: Table) -> None:
    """Write a table into `folder`, which the caller makes appear atomically; the same table gives the same bytes."""
    problems = check(table)
    if problems:
        raise ValueError(f"{folder} would break the score table contract:\n  " + "\n  ".join(problems))
    folder.mkdir(parents=True, exist_ok=True)
    table.blocks.to_parquet(folder / "blocks.parquet", index=False, compression="zstd")
    table.rows.to_parquet(folder / "scores.parquet", index=False, compression="zstd")
    rows = [json.dumps(_plain(row), allow_nan=False) for row in table.rows.to_dict("records")]
    about = json.dumps(dict(table.about), indent=1, allow_nan=False)
    (folder / "scores.json").write_text('{"about": ' + about + ',\n"rows": [\n' + ",\n".join(rows) + "\n]}\n", encoding="utf-8")


def read(folder: Path) -> Table:
    """Read and check a table that `write` wrote."""
    missing = [name for name in ("blocks.parquet", "scores.parquet", "scores.json") if not (folder / name).exists()]
    if missing:
        raise ValueError(f"{folder} is not a score folder: {', '.join(missing)} missing; run the evaluate stage first")
    about = json.loads((folder / "scores.json").read_text(encoding="utf-8"))["about"]
    table = Table(about, pd.read_parquet(folder / "blocks.parquet"), pd.read_parquet(folder / "scores.parquet"))
    problems = check(table)
    if problems:
        raise ValueError(f"{folder} breaks the score table contract:\n  " + "\n  ".join(problems))
    return table


def check(table: Table) -> list[str]:
    """Every way in which a table breaks the contract."""
    absent = [f"about.{name} is missing" for name in (*_SHARED, "models") if name not in table.about]
    absent += [f"scores has no column {name}" for name in COLUMNS if name not in table.rows]
    absent += [f"blocks has no column {name}" for name in (*KEYS, "block", *STATISTICS) if name not in table.blocks]
    if absent:
        return absent
    problems = []
    unknown = sorted({*table.rows["metric"]} - {*METRICS}) + sorted({*table.rows["stratum"]} - {*STRATA})
    if unknown:
        problems.append(f"unknown metrics or strata: {', '.join(unknown)}")
    nameless = sorted(({*table.blocks["model"]} | {*table.rows["model"]}) - {*table.about["models"]})
    if nameless:
        problems.append(f"models without an entry in about.models: {', '.join(nameless)}")
    doubled = table.rows.duplicated(["metric", *KEYS])
    if doubled.any():
        problems.append(f"{int(doubled.sum())} doubled rows, first {table.rows.loc[doubled, ['metric', *KEYS]].iloc[0].tolist()}")
    infinite = ~np.isfinite(table.rows["value"].to_numpy(float))
    if infinite.any():
        problems.append(
            f"{int(infinite.sum())} values are not finite, first {table.rows.loc[infinite, ['metric', *KEYS]].iloc[0].tolist()}"
        )
    crossed = (table.rows["low"] > table.rows["high"]).to_numpy()
    if crossed.any():
        problems.append(
            f"{int(crossed.sum())} intervals have low > high, first {table.rows.loc[crossed, ['metric', *KEYS]].iloc[0].tolist()}"
        )
    if len(table.blocks) and not (table.blocks["block"].between(0, table.about["cases"]["blocks"] - 1)).all():
        problems.append(f"blocks.block must lie in 0..{table.about['cases']['blocks'] - 1}")
    return problems


def merge(tables: Sequence[Table]) -> Table:
    """One table of all predictors; tables made from different cases, truth or draws are refused with every difference."""
    if not tables:
        raise ValueError("there is no score table to merge: run the evaluate stage first")
    first, problems = tables[0], []
    for other in tables[1:]:
        names = f"{', '.join(first.about['models'])} | {', '.join(other.about['models'])}"
        problems += [
            f"{names}: {name}: {first.about[name]!r} | {other.about[name]!r}" for name in _SHARED if first.about[name] != other.about[name]
        ]
    models: dict[str, Any] = {}
    for table in tables:
        problems += [f"{name} is in two tables" for name in table.about["models"] if name in models]
        models |= table.about["models"]
    if problems:
        raise ValueError(
            "scores of different cases cannot be compared; evaluate all models on the same dataset:\n  " + "\n  ".join(problems)
        )
    return Table(
        {**first.about, "models": models},
        pd.concat([table.blocks for table in tables], ignore_index=True),
        pd.concat([table.rows for table in tables], ignore_index=True),
    )


def read_all(folder: Path) -> Table:
    """The merged table of a dataset: every score folder below `folder`."""
    found = sorted(path.parent for path in folder.glob("*/scores.json"))
    if not found:
        raise ValueError(f"{folder}: no score table below it; run the evaluate stage first")
    return merge([read(one) for one in found])


def compare(table: Table, model: str, baseline: str, metric: str, variable: str, stratum: str, lead: float) -> dict[str, Any]:
    """Paired comparison in one cell (all distances together): skill = 1 - ratio of the metric, its interval and a verdict.

    The verdict looks at the difference draw by draw: "better" or "worse" if its central 95 % lie on one side of zero and it is not
    negligible (half a percent, or what single precision rounds away), "within noise" otherwise, "too few blocks" without an interval.
    """
    mine, theirs = (table.cells[name, variable, stratum, "all", lead] for name in (model, baseline))
    if not np.array_equal(mine.sums["n"], theirs.sums["n"]):
        counted = f"{mine.whole['n']:g} and {theirs.whole['n']:g}"
        raise ValueError(f"{model} and {baseline} were scored on different points of {variable}, {stratum}, lead {lead}: {counted}")
    held = (mine.sums["n"] > 0).sum()
    ours, other = metrics.evaluate(metric, mine.each), metrics.evaluate(metric, theirs.each)
    below, above = bootstrap.interval(other - ours, held)
    here, there = metrics.evaluate(metric, mine.whole), metrics.evaluate(metric, theirs.whole)
    size = np.sqrt(theirs.whole["truth_squared"] / theirs.whole["n"])
    rounding = (_ROUNDING * size) ** 2 if metrics.METRICS[metric].unit == "squared" else _ROUNDING * size
    negligible = abs(here - there) <= max(_NEGLIGIBLE * abs(there), rounding)
    verdict = "better" if below > 0 else "worse" if above < 0 else "within noise" if np.isfinite(below) else "too few blocks"
    verdict = "within noise" if negligible and np.isfinite(below) else verdict
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.asarray(here / there)
        low, high = bootstrap.interval(1 - ours / other, held)
    numbers = {"skill": 1 - ratio, "low": low, "high": high, "ratio": ratio}
    return {**{name: float(_rounded(x)) for name, x in numbers.items()}, "verdict": verdict, "n": int(mine.whole["n"]), "blocks": int(held)}


def skill(table: Table) -> pd.DataFrame:
    """Every model against every baseline, in every stratum, lead and variable both were scored in (all distances together).

    Columns: model, baseline, metric (SKILL_METRICS), variable, stratum, lead, skill, low, high, ratio, verdict, n, blocks.
    """
    rows = []
    for model, variable, stratum, distance, lead in table.cells:
        for baseline in table.baselines if model in table.models else ():
            if (baseline, variable, stratum, distance, lead) in table.cells:
                for metric in SKILL_METRICS:
                    cell = {"variable": variable, "stratum": stratum, "lead": lead}
                    rows.append(
                        {"model": model, "baseline": baseline, "metric": metric, **cell, **compare(table, model, baseline, metric, **cell)}
                    )
    columns = ["model", "baseline", "metric", "variable", "stratum", "lead", "skill", "low", "high", "ratio", "verdict", "n", "blocks"]
    return pd.DataFrame(rows, columns=columns)


def unbeaten(skills: pd.DataFrame, metric: str = "rmse") -> pd.DataFrame:
    """The cells in which a baseline is better than no model by its own verdict: variable, stratum, lead, baseline."""
    rows = skills[skills["metric"] == metric]
    beaten = rows.assign(won=rows["verdict"] == "better").groupby(["variable", "stratum", "lead", "baseline"], sort=False)["won"].any()
    return beaten[~beaten].reset_index().drop(columns="won")


def ranking(table: Table, metric: str, variable: str, stratum: str, leads: Collection[float] | None = None) -> pd.DataFrame:
    """Predictors by mean rank of a metric over the leads (None: all), those that answer most leads first: model, rank, leads."""
    rows = table.select(metric=metric, variable=variable, stratum=stratum, distance="all")
    rows = rows if leads is None else rows[rows["lead"].isin(leads)]
    ranks = rows.assign(rank=rows.groupby("lead")["value"].rank(method="min"))
    found = ranks.groupby("model").agg(rank=("rank", "mean"), leads=("rank", "size")).reset_index()
    return found.sort_values(["leads", "rank", "model"], ascending=[False, True, True], ignore_index=True)


def standing(table: Table, metric: str, variable: str, stratum: str, leads: Sequence[float]) -> pd.DataFrame:
    """The ranking over `leads` with its interval: model, rank, low, high, leads.

    `low` and `high` bound the central 95 % of the mean rank over the bootstrap draws, all predictors ranked anew in each draw.
    """
    order = ranking(table, metric, variable, stratum, leads)
    drawn = np.full((len(leads), len(order), table.about["bootstrap"]["draws"]), np.nan)
    held = table.about["cases"]["blocks"]
    for row, lead in enumerate(leads):
        for column, model in enumerate(order["model"]):
            cell = table.cells.get((model, variable, stratum, "all", lead))
            if cell is not None:
                drawn[row, column] = metrics.evaluate(metric, cell.each)
                held = min(held, int((cell.sums["n"] > 0).sum()))
    ranks = np.stack([pd.DataFrame(each).rank(method="min").to_numpy() for each in drawn])
    low, high = bootstrap.interval(np.nanmean(ranks, axis=0).T, held)
    return order.assign(low=low, high=high)


def _drawn(about: Mapping[str, Any]) -> np.ndarray:
    """[draws, blocks] the bootstrap draws that all predictors of a dataset share."""
    return bootstrap.counts(about["cases"]["blocks"], Bootstrap.model_validate(about["bootstrap"]))


def _cube(part: pd.DataFrame, blocks: int) -> tuple[pd.DataFrame, dict[str, np.ndarray]]:
    """The cells of one model's statistics, and the statistics as [blocks, cells]."""
    names = KEYS[1:]
    keys = part[names].drop_duplicates(ignore_index=True)
    cell = part[names].merge(keys.assign(cell=np.arange(len(keys))), on=names, how="left")["cell"].to_numpy()
    out = {name: np.zeros((blocks, len(keys))) for name in STATISTICS}
    for name in STATISTICS:
        out[name][part["block"].to_numpy(), cell] = part[name].to_numpy(np.float64)
    return keys, out


def _rounded(numbers: np.ndarray) -> np.ndarray:
    """To _DIGITS significant digits: what differs beyond them is the order of additions, not the score."""
    text = [f"{number:.{_DIGITS}g}" for number in numbers.ravel()]
    return np.array(text, dtype=np.float64).reshape(numbers.shape)


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and not np.isfinite(value) else value for key, value in row.items()}
