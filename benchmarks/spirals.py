"""CST's modes beside each other on spirals: errors at unobserved times, next to linear and cubic interpolation.

    python -m benchmarks.spirals            # half a minute of training for each mode and dataset
    python -m benchmarks.spirals 150        # that many CPU seconds instead

The datasets are `spirals` and `spirals_irregular` of params.yaml, made anew: 10 of 100 noisy points of a curve are seen. `legacy` and
`paper` train as the release does (batches of 10, Adam at 1e-3, no schedule; here its weight decay of 1e-7 is decoupled), at the noisy
points alone, with 64 dummies a curve in place of 500; `improved` as params.yaml says, which at regular times asks for the clean curve
between them. Each gets the same CPU time, within a tenth or as near as whole epochs come, with all that a training does beside its steps.
The score is the mean squared error at the unobserved times of the test curves against the clean curve, in units of the 0.98 quantile of
the absolute observed values. The cubic spline is SciPy's, not-a-knot, held outside the data as the linear one is. Budgets are far from the
release's 10,000 epochs.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from scipy.interpolate import CubicSpline

from models.contract import Predictor
from pipeline import baselines, params, runs, sensors, simulate, subsample, train, validate
from pipeline.cases import cases

DATASETS = ("spirals", "spirals_irregular")
FRAMES = 100
RELEASED = {"batch": 10, "context_frames": FRAMES, "min_lead": 1 - FRAMES, "max_lead": 0, "query_frames": 1, "query_points": 1}
EPOCHS = 2  # validations in a training
TRIES = 6  # at the right number of steps; a busy machine may change its pace as often
DUMMIES = 64  # of legacy and paper; the release has 500, which costs eight times as much a step


def prepare(folder: Path) -> None:
    """Curves, sensors and baselines of both datasets, by their own stages; what is there already stays."""
    source, checked = folder / "ingested", folder / "checked"
    stages: list[tuple[Any, tuple[str, ...], dict[str, Path]]] = [
        (simulate, ("spirals",), {"out": source}),
        (validate, ("spirals",), {"ingested": source, "out": checked}),
    ]
    for key in DATASETS:
        stages.append((subsample, (key,), {"ingested": source, "checked": checked, "out": folder / f"{key}.zarr"}))
        stages.append((baselines, (key,), {"sensors": folder / f"{key}.zarr", "out": folder / f"baselines_{key}"}))
    for stage, keys, paths in stages:
        if not paths["out"].exists():
            dotted = params.name_of(stage, list(keys))
            stage.run(section(dotted, stage.params_model(*keys)), *keys, **paths)


def section(dotted: str, model: Any, change: Any = None) -> Any:
    return params.validated(params.overlaid(params.read(Path("params.yaml"), dotted)[0], change or {}), model, dotted)


def recipe(key: str, mode: str, steps: int) -> Any:
    """The section `train.KEY.cst` for a mode."""
    dotted, kind = f"train.{key}.cst", train.params_model(key, "cst")
    fit: dict[str, Any] = {"steps": steps, "validate_every": steps // EPOCHS}
    if mode == "improved":
        return section(dotted, kind, {"phases": {"fit": fit}})
    validation = params.read(Path("params.yaml"), dotted)[0]["phases"]["fit"]["validation"]
    fit |= {
        "windows": RELEASED,
        "validation": {**validation, "batch": 10, "max_cases": 20},
        "learning_rate": 1e-3,
        "weight_decay": 1e-7,
        "decayed": "all",
    }
    fit |= {"warm_up": 0.0, "final_rate": 1.0, "clip": None}
    return params.validated({"model": {"mode": mode, "dummies": DUMMIES}, "phases": {"fit": fit}}, kind, dotted)


def trained(key: str, mode: str, seconds: float, dataset: sensors.SensorDataset, folder: Path) -> tuple[Predictor, int, float]:
    """A mode trained for about so many CPU seconds, its steps, and the CPU seconds that they took.

    Whole trainings are tried, each longer by the share of the time that the one before left. The time of a step does not tell how many
    fit: a training first takes two more to see what it costs, which in `paper` mode are seconds.
    """
    steps = EPOCHS
    for _ in range(TRIES):
        began = time.process_time()
        with tempfile.TemporaryDirectory() as scratch:
            out = Path(scratch) / "run"
            chosen = recipe(key, mode, steps)
            train.run(chosen, key, "cst", sensors=folder / f"{key}.zarr", baselines=folder / f"baselines_{key}", out=out)
            predictor = runs.load(out, dataset.info).predictor
        taken, spent = steps, time.process_time() - began
        steps = max(1, round(taken * seconds / spent / EPOCHS)) * EPOCHS
        if steps == taken or abs(spent - seconds) < seconds / 10:
            break
    return predictor, taken, spent


def errors(dataset: sensors.SensorDataset, predictors: dict[str, Predictor]) -> dict[str, float]:
    """Scaled MSE at the unobserved times of the test curves."""
    scale = np.quantile(np.abs(np.asarray(dataset["obs/value"])), 0.98)
    std = np.asarray(dataset.info.std)
    squares: dict[str, list[np.ndarray]] = {name: [] for name in ("linear interpolation", "cubic spline", *predictors)}
    for part in cases(dataset, "test", FRAMES, range(1 - FRAMES, 1), batch=25):
        context, query = part.batch.context, part.batch.query
        assert context.value is not None
        assert query.value is not None
        seen = context.mask[..., 0].numpy()
        truth = query.value[:, :, 0].numpy()
        answers = {name: predictor.predict(context, query).mean[:, :, 0].numpy() for name, predictor in predictors.items()}
        noisy, frame = context.value[:, :, 0].numpy(), np.arange(FRAMES)
        answers["linear interpolation"], answers["cubic spline"] = np.empty_like(truth), np.empty_like(truth)
        for b, known in enumerate(seen):
            at = np.flatnonzero(known)
            inside = frame.clip(at[0], at[-1])
            answers["cubic spline"][b] = CubicSpline(at, noisy[b, at])(inside)
            for c in range(truth.shape[-1]):
                answers["linear interpolation"][b, :, c] = np.interp(frame, at, noisy[b, at, c])
        for name, answer in answers.items():
            squares[name].append(((answer - truth) * std / scale)[~seen] ** 2)
    return {name: float(np.concatenate(parts).mean()) for name, parts in squares.items()}


def main(seconds: float, folder: Path) -> int:
    console = Console()
    prepare(folder)
    table = Table(title=f"Spirals, 10 noisy points of 100: MSE at unobserved times; {seconds:.0f} CPU seconds of training each, one seed")
    for column in ("dataset", "side", "steps", "CPU s", "MSE"):
        table.add_column(column, justify="left" if column in ("dataset", "side") else "right")
    for key in DATASETS:
        dataset = sensors.read(folder / f"{key}.zarr")
        predictors, spent, steps = {}, {}, {}
        for mode in ("legacy", "paper", "improved"):
            predictors[mode], steps[mode], spent[mode] = trained(key, mode, seconds, dataset, folder)
            print(f"{key}, {mode}: {steps[mode]} steps in {spent[mode]:.0f} CPU seconds", flush=True)
        for name, error in errors(dataset, predictors).items():
            work = (f"{steps[name]:,}", f"{spent[name]:.0f}") if name in steps else ("", "")
            table.add_row(key, name, *work, f"{error:.5f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    budget = float(sys.argv[1]) if len(sys.argv) > 1 else 30.0
    if len(sys.argv) > 2:
        raise SystemExit(main(budget, Path(sys.argv[2])))
    with tempfile.TemporaryDirectory() as kept:
        raise SystemExit(main(budget, Path(kept)))
