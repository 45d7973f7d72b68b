"""Batch sampling against selecting each sample with xarray: windows per second, both in memory, in one run.

    python -m benchmarks.batches

The xarray side is what a data loader does that opens a Dataset and calls `isel` for every window, scales, pads and stacks. Both sides
draw the same windows and must give the same numbers before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import torch
import xarray as xr
from rich.console import Console
from rich.table import Table

from models.contract import FieldBatch
from pipeline.batches import TrainingBatches, Windows
from pipeline.sensors import CONTEXT, SensorDataset
from tests import worlds

SECONDS = 3.0


def station_windows(dataset: SensorDataset, batch: FieldBatch) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The windows of `batch` from a (time, sensor) Dataset with NaN where nothing was reported."""
    frame = np.repeat(np.arange(dataset.n_frames), np.diff(dataset["frame/obs_start"]))
    cube = np.full((dataset.n_frames, dataset.info.n_sensors), np.nan, np.float32)
    cube[frame, dataset["obs/sensor"]] = dataset["obs/value"][:, 0]
    cov = np.zeros_like(cube)
    cov[frame, dataset["obs/sensor"]] = dataset["obs/covariate"][:, 0]
    ds = xr.Dataset({"value": (("time", "sensor"), cube), "covariate": (("time", "sensor"), cov)}, {"time": dataset["frame/time"]})
    ds = ds.isel(sensor=np.flatnonzero(dataset["sensor/role"] == CONTEXT))
    mean, std = dataset.info.mean[0], dataset.info.std[0]
    last = np.searchsorted(dataset["frame/time"], batch.context.time[:, -1].numpy())
    asked = np.searchsorted(dataset["frame/time"], batch.query.time.numpy())
    frames = batch.context.time.shape[1]

    def draw() -> tuple[torch.Tensor, ...]:
        contexts, covariates, answers = [], [], []
        for f, leads in zip(last, asked, strict=True):
            window = ds.isel(time=slice(f - frames + 1, f + 1))
            target = ds.isel(time=leads)
            contexts.append((window["value"] - mean) / std)
            covariates.append(window["covariate"])
            answers.append((target["value"] - mean) / std)
        return tuple(torch.from_numpy(np.stack([part.values for part in parts])) for parts in (contexts, covariates, answers))

    return draw


def simulation_windows(dataset: SensorDataset, batch: FieldBatch) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The windows of `batch` from a (trajectory, time, point) Dataset, the sensors of a trajectory as an index array."""
    trajectories = len(dataset["trajectory/frame_start"]) - 1
    frames = dataset.n_frames // trajectories
    truth = dataset["truth/value"][..., 0].astype(np.float32).reshape(trajectories, frames, -1)
    ds = xr.Dataset({"value": (("trajectory", "time", "point"), truth)})
    side = int(dataset["truth/shape"][0])
    per_frame = int(dataset["frame/obs_start"][1])
    at = np.rint(dataset["obs/position"].reshape(trajectories, frames, per_frame, 2)[:, 0] * side).astype(int)
    sensors = at[..., 1] * side + at[..., 0]
    mean, std = dataset.info.mean[0], dataset.info.std[0]
    layout = {tuple(np.rint(s).astype(int)): t for t, s in enumerate(sensors)}
    place = np.rint((batch.context.position[:, 0].numpy() / 2 + 0.5) * side).astype(int)
    owner = [layout[tuple(p[:, 1] * side + p[:, 0])] for p in place]
    asked = np.rint((batch.query.position[0, 0].numpy() / 2 + 0.5) * side).astype(int)
    points = asked[:, 1] * side + asked[:, 0]
    last = batch.context.time[:, -1].numpy().astype(int)
    leads = batch.query.time.numpy().astype(int)
    length = batch.context.time.shape[1]

    def draw() -> tuple[torch.Tensor, ...]:
        contexts, answers = [], []
        for t, f, target in zip(owner, last, leads, strict=True):
            one = ds.isel(trajectory=t)
            contexts.append((one.isel(time=slice(f - length + 1, f + 1), point=sensors[t])["value"] - mean) / std)
            answers.append((one.isel(time=target, point=points)["value"] - mean) / std)
        return tuple(torch.from_numpy(np.stack([part.values for part in parts])) for parts in (contexts, answers))

    return draw


def stations_agree(batch: FieldBatch, drawn: tuple[torch.Tensor, ...]) -> bool:
    value, answer = drawn[0], drawn[2]
    seen, mask = batch.query.value, batch.query.mask
    same = torch.equal(torch.isfinite(answer), mask) and torch.allclose(answer[mask], seen[..., 0][mask], atol=1e-4)  # type: ignore[index]
    return bool(same and torch.isfinite(value).sum() == batch.context.mask.sum())


def simulation_agrees(batch: FieldBatch, drawn: tuple[torch.Tensor, ...]) -> bool:
    pairs = ((drawn[0], batch.context.value), (drawn[1], batch.query.value))
    return all(torch.allclose(ours, theirs[..., 0], atol=1e-4) for ours, theirs in pairs)  # type: ignore[index]


def rate(draw: Callable[[int], object], windows: int) -> float:
    """Windows per second over a few seconds."""
    draw(0)
    start, step = time.perf_counter(), 0
    while time.perf_counter() - start < SECONDS:
        step += 1
        draw(step)
    return step * windows / (time.perf_counter() - start)


def main() -> None:
    torch.set_num_threads(1)
    table = Table("dataset", "window", "ours, windows/s", "xarray, windows/s", "ratio", title="batch sampling, batches of 32")
    stations = worlds.stations(n_sensors=14, hours=35_000)
    simulation = worlds.waves(trajectories=64, frames=20, grid=64, rate=0.1)
    hourly = Windows(context_frames=24, max_lead=24, batch=32, query_frames=4)
    sparse = Windows(max_lead=10, batch=32, query_points=1024)
    rows = (
        ("12 stations, 4 years", "24 + 4 frames", stations, hourly, station_windows, stations_agree),
        ("64 x 64, 10 % sensors", "1 + 1 frames, 1024 points", simulation, sparse, simulation_windows, simulation_agrees),
    )
    for name, window, dataset, windows, xarray_side, agree in rows:
        batches = TrainingBatches(dataset, windows, seed=0)
        draw = xarray_side(dataset, batches[0])
        if not agree(batches[0], draw()):
            raise SystemExit(f"{name}: the two sides draw different windows, so that no time means anything")
        ours, theirs = rate(batches.__getitem__, windows.batch), rate(lambda _, draw=draw: draw(), windows.batch)  # type: ignore[misc]
        table.add_row(name, window, f"{ours:,.0f}", f"{theirs:,.0f}", f"{ours / theirs:.1f}x")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
