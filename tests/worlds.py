"""Tiny analytic worlds: sensor datasets and batches whose right answers are known in closed form."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import xarray as xr

from models.contract import DatasetInfo, FieldBatch, Frames
from pipeline import fields, sensors

Module = TypeVar("Module", bound=torch.nn.Module)


def wave(position: np.ndarray, time: np.ndarray, phase: float = 0.0) -> np.ndarray:
    """A wave on the unit torus that moves 0.1 a time unit: position (..., 2), time broadcastable to (...)."""
    x, y = position[..., 0], position[..., 1]
    return np.sin(2 * np.pi * (x - 0.1 * time) + phase) + 0.5 * np.cos(2 * np.pi * (y + x))


def torus_info(name: str = "waves", **changes: object) -> DatasetInfo:
    values: dict[str, object] = dict(
        name=name, variables=("vorticity",), units=("1",), mean=(0.0,), std=(0.8,), limits=((None, None),), space=("x", "y"),
        geometry="torus", centre=(0.5, 0.5), half_extent=0.5, position_unit="1", projection=None, time_unit="1", time_origin="",
        step=1.0, utc_offset=0.0, n_sensors=0,
    )  # fmt: skip
    return DatasetInfo(**{**values, **changes})  # type: ignore[arg-type]


def waves(trajectories: int = 8, frames: int = 10, grid: int = 12, rate: float = 0.25, seed: int = 0) -> sensors.SensorDataset:
    """Travelling waves with dense truth; a random set of grid points per trajectory are its sensors; split by trajectory."""
    rng = np.random.default_rng(seed)
    axis = np.arange(grid) / grid
    points = np.stack(np.meshgrid(axis, axis, indexing="xy"), -1).reshape(-1, 2)  # rows are (y, x) order, columns (x, y)
    count = round(rate * len(points))
    truth, position, value = [], [], []
    for _ in range(trajectories):
        phase = rng.uniform(0, 2 * np.pi)
        field = wave(points[None], np.arange(frames)[:, None].astype(float), phase)
        chosen = np.sort(rng.choice(len(points), count, replace=False))
        truth.append(field)
        position.append(np.broadcast_to(points[chosen], (frames, count, 2)))
        value.append(field[:, chosen])
    n_frames = trajectories * frames
    test = max(1, trajectories // 4)
    role = np.repeat([sensors.TRAIN] * (trajectories - 2 * test) + [sensors.VALIDATION] * test + [sensors.TEST] * test, frames)
    cases = np.flatnonzero((role != sensors.TRAIN) & (np.tile(np.arange(frames), trajectories) < frames // 2))
    arrays = {
        "obs/position": np.concatenate(position).reshape(-1, 2),
        "obs/value": np.concatenate(value).reshape(-1, 1),
        "obs/covariate": np.zeros((n_frames * count, 0)),
        "obs/sensor": np.full(n_frames * count, -1),
        "frame/obs_start": np.arange(n_frames + 1) * count,
        "frame/time": np.tile(np.arange(frames, dtype=float), trajectories),
        "frame/split": role,
        "trajectory/frame_start": np.arange(trajectories + 1) * frames,
        "truth/value": np.concatenate(truth)[..., None],
        "truth/position": points,
        "truth/shape": np.array([grid, grid]),
        "cases/frame": cases,
        "cases/split": role[cases],
        "cases/block": cases // frames,
    }
    return sensors.SensorDataset(torus_info(), arrays, {"strategy": "test"}, {})


def stations(n_sensors: int = 8, hours: int = 400, seed: int = 0) -> sensors.SensorDataset:
    """Stations on a 40 km plane: a daily cycle plus a smooth trend in space plus noise; a tenth of the values are missing."""
    rng = np.random.default_rng(seed)
    position = rng.uniform(-20, 20, (n_sensors, 2))
    time = 400_000.0 + np.arange(hours)  # hours since 1970
    value = 50 + 20 * np.sin(2 * np.pi * time / 24)[:, None] + position[:, 0] + rng.normal(0, 2, (hours, n_sensors))
    frame, sensor = np.nonzero(rng.random((hours, n_sensors)) > 0.1)
    split = np.full(hours, sensors.TRAIN)
    split[int(hours * 0.7) :] = sensors.VALIDATION
    split[int(hours * 0.85) :] = sensors.TEST
    cases = np.flatnonzero((split != sensors.TRAIN) & (np.arange(hours) < hours - 24))
    seen = split[frame] == sensors.TRAIN
    values = value[frame, sensor]
    info = DatasetInfo(
        name="stations", variables=("pm2p5",), units=("ug m-3",), mean=(float(values[seen].mean()),), std=(float(values[seen].std()),),
        limits=((-20.0, 1500.0),), space=("x", "y"), geometry="plane", centre=(0.0, 0.0), half_extent=20.0, position_unit="km",
        projection={"latitude": 40.0, "longitude": 116.0}, time_unit="h", time_origin="1970-01-01T00:00:00Z", step=1.0, utc_offset=8.0,
        n_sensors=n_sensors, context_covariates=("t2m",), query_covariates=("hour_sin", "hour_cos"),
    )  # fmt: skip
    role = np.full(n_sensors, sensors.CONTEXT)
    role[-2], role[-1] = sensors.HELD_VALIDATION, sensors.HELD_TEST
    arrays = {
        "obs/position": position[sensor],
        "obs/value": values[:, None],
        "obs/covariate": np.cos(2 * np.pi * time[frame] / 24)[:, None],
        "obs/sensor": sensor,
        "frame/obs_start": np.searchsorted(frame, np.arange(hours + 1)),
        "frame/time": time,
        "frame/split": split,
        "trajectory/frame_start": np.array([0, hours]),
        "sensor/position": position,
        "sensor/role": role,
        "cases/frame": cases,
        "cases/split": split[cases],
        "cases/block": cases // 48,
    }
    return sensors.SensorDataset(info, arrays, {"strategy": "test"}, {})


def batch(
    info: DatasetInfo,
    b: int = 3,
    t: int = 1,
    n: int = 20,
    s: int = 2,
    q: int = 15,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    padded: bool = True,
) -> FieldBatch:
    """Random context and query of the right shapes for `info`, smooth values, leads 0, 1, ... frames; with or without padding."""
    g = torch.Generator().manual_seed(seed)
    d = len(info.space)

    def frames(n_frames: int, points: int, time: torch.Tensor, covariates: int) -> Frames:
        position = torch.rand(b, 1, points, d, generator=g, dtype=dtype).expand(b, n_frames, points, d) * 2 - 1
        mask = torch.rand(b, n_frames, points, generator=g) > (0.2 if padded else -1)
        mask[:, :, 0] = True
        signal = torch.sin(torch.pi * position.sum(-1, keepdim=True) + 0.3 * time.to(dtype)[..., None, None])
        return Frames(
            position=position.clone(),
            mask=mask,
            time=time,
            value=signal.expand(-1, -1, -1, len(info.variables)) * mask[..., None],
            covariate=torch.randn(b, n_frames, points, covariates, generator=g, dtype=dtype) if covariates else None,
        )

    last = torch.randint(5, 50, (b, 1), generator=g).double()
    context = frames(t, n, (last + torch.arange(1 - t, 1)) * info.step, len(info.context_covariates))
    query = frames(s, q, (last + torch.arange(s)) * info.step, len(info.query_covariates))
    return FieldBatch(context, query)


def ahead(batch: FieldBatch, *leads: float) -> Frames:
    """The first query frame, asked at other leads (in time units)."""
    query = batch.query

    def again(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[:, :1].expand(-1, len(leads), *x.shape[2:])

    time = batch.context.time[:, -1:] + torch.tensor(leads, dtype=torch.float64)
    return Frames(again(query.position), again(query.mask), time, again(query.value), again(query.covariate))  # type: ignore[arg-type]


def write_field(field: xr.Dataset, path: Path) -> None:
    """Write a whole field, which may be lazy, block by block."""
    fields.create(path, field.drop_vars(list(field.data_vars)), {str(name): field[name].attrs for name in field.data_vars})
    length = fields.block_length(field.sizes)
    for name, array in field.data_vars.items():
        ordered = array.transpose(*(dim for dim in fields.DIMS if dim in array.dims))
        for start in range(0, len(ordered), length):
            fields.write_block(path, str(name), start, ordered[start : start + length].values)


def stirred(model: Module, std: float = 0.3) -> Module:
    """The model with what starts at zero drawn at random, so that its answers depend on everything."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=std)
    return model
