"""SCENT beyond its training horizon: warp-unrolled forecasting against unrolling one frame at a time, on Navier-Stokes.

    python -m benchmarks.unrolling                  # 600 training steps for each horizon and set of sensors
    python -m benchmarks.unrolling 2000 ns_s3 ns_s5 # more steps, only these sets

A network trained on leads up to t_h is asked for leads of 2, 5 and 10 t_h. Warp-unrolled (the paper's section 5), it jumps by t_h, decodes
at the sensors, reads its own forecast and goes on; step by step, the same network jumps by one frame. Either way a jump may also be decoded
on the whole grid, the last two columns. t_h = 1 is the usual autoregression: both ways are then the same.

The simulation is `simulate.ns` of params.yaml with a coarser grid and more frames; sensors are the sets S3 (a hole), S4 (a random half,
fixed) and S5 (a new random half each frame) of the paper; the model is the quick one of `train.ns.scent` without a background, since none
is known at a jump. The error is the sum of squared errors over the sum of squares on all grid points, mean over test cases.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from models.scent.model import Scent
from pipeline import params, runs, sensors, simulate, subsample, train, validate
from pipeline.cases import cases

SETS = ("ns_s3", "ns_s4", "ns_s5")
HORIZONS = (1, 2, 5)  # t_h in frames
TIMES = (2, 5, 10)  # leads, in t_h
FIELD = {"grid": 32, "frames": 57, "trajectories": 136, "validation_trajectories": 8, "test_trajectories": 16}
WARPS = {"sensors": "decoded at the sensors", "queries": "decoded on the grid"}


def prepare(folder: Path, sets: tuple[str, ...]) -> None:
    """The field, and the sensors of each set, by their own stages."""
    source, checked = folder / "ingested", folder / "checked"
    cut = {"cases": {"stride": 3, "horizon": max(HORIZONS) * max(TIMES)}}
    stages: list[tuple[Any, str, Any, dict[str, Path]]] = [
        (simulate, "ns", FIELD, {"out": source}),
        (validate, "ns", {}, {"ingested": source, "out": checked}),
        *((subsample, key, cut, {"ingested": source, "checked": checked, "out": folder / f"{key}.zarr"}) for key in sets),
    ]
    for stage, key, change, paths in stages:
        stage.run(section(params.name_of(stage, [key]), stage.params_model(key), change), key, **paths)


def section(dotted: str, model: Any, change: Any) -> Any:
    return params.validated(params.overlaid(params.read(Path("params.yaml"), dotted)[0], change), model, dotted)


def trained(path: Path, horizon: int, steps: int, folder: Path) -> Scent:
    """The quick SCENT without a background, trained on leads up to `horizon`."""
    fit = {
        "windows": {"max_lead": horizon, "query_frames": min(4, horizon + 1), "drop": 0.0},
        "validation": {"leads": [horizon], "max_cases": 32},
        "steps": steps,
        "validate_every": steps,  # the last weights
    }
    whole = {"background": None, "beside": None, "calibration": None}
    change = {"model": {"horizon": horizon, "loss": "relative_mse"}, **whole, "phases": {"fit": fit}}
    out = folder / "run"
    train.run(section("train.ns.scent", train.params_model("ns", "scent"), change), "ns", "scent", sensors=path, baselines=folder, out=out)
    model = runs.load(out, sensors.read(path).info).predictor
    assert isinstance(model, Scent)
    return model


def unrolled_by(model: Scent, frames: int, warp: str) -> Scent:
    """The same network, its clock included, that jumps by `frames`."""
    config = model.config.model_copy(update={"horizon": frames, "time_scale": model.encoder.coordinates.scale, "warp": warp})
    other = Scent(config, model.info)
    other.load_state_dict(model.state_dict())
    return other.eval()


def errors(dataset: sensors.SensorDataset, model: Scent, leads: list[int]) -> torch.Tensor:
    """Relative squared error [S] on all grid points."""
    found = []
    for part in cases(dataset, "test", 1, leads, batch=16):
        context, query = part.batch.context, part.batch.query
        assert query.value is not None
        answer = model.predict(context, query).mean
        found.append((answer - query.value).square().sum((2, 3)) / query.value.square().sum((2, 3)))
    return torch.cat(found).mean(0)


def main(steps: int, folder: Path, sets: tuple[str, ...]) -> int:
    console = Console()
    prepare(folder, sets)
    table = Table(title=f"Relative squared error beyond the training horizon t_h, {steps} steps of training each, one seed")
    sides = [f"{by}, {where}" for where in WARPS.values() for by in ("jumps of t_h", "of one frame")]
    for column in ("set", "t_h", "lead", "jumps", *sides):
        table.add_column(column, justify="left" if column == "set" else "right")
    for key in sets:
        path = folder / f"{key}.zarr"
        dataset = sensors.read(path)
        for horizon in HORIZONS:
            leads = [horizon, *(horizon * times for times in TIMES)]
            with tempfile.TemporaryDirectory() as scratch:
                model = trained(path, horizon, steps, Path(scratch))
            found = [errors(dataset, unrolled_by(model, by, warp), leads) for warp in WARPS for by in (horizon, 1)]
            for row, lead in enumerate(leads):
                numbers = [f"{float(error[row]):.4f}" for error in found]
                table.add_row(key, str(horizon), str(lead), f"{lead // horizon} / {lead}", *numbers)
            console.print(f"{key}, t_h {horizon}: trained and unrolled")
    console.print(table)
    return 0


if __name__ == "__main__":
    budget = int(sys.argv[1]) if len(sys.argv) > 1 else 600
    with tempfile.TemporaryDirectory() as kept:
        raise SystemExit(main(budget, Path(kept), tuple(sys.argv[2:]) or SETS))
