"""Stage forecast: ask a trained run for the field and for the fixed sensors after chosen frames of its sensor dataset.

    OUT/forecast.zarr     the cube and the station forecast, pipeline/cube.py
    OUT/sensors.parquet   what the fixed sensors measured before (lead <= 0) and, in archives, after init_time; moving ones at init_time
    OUT/forecast.json     headline numbers, hashes, names of the fixed sensors, sensors used and expected, values clipped at zero

The grid is that of the dense truth where there is one, else a regular one over the sensors' bounding box.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from pydantic import Field, field_validator
from scipy.special import ndtri

from models.contract import DatasetInfo, FieldPrediction
from pipeline import atomic, cube, device, geometry, lexicon, predict, runs
from pipeline import sensors as sensor_data
from pipeline.batches import at_points
from pipeline.cases import distance
from pipeline.initial_frames import context_counts, initial_frames, usual_network
from pipeline.params import Section
from pipeline.sensors import SensorDataset

log = logging.getLogger(__name__)

# A concentration, an amount or a share of something cannot be below zero; what a Gaussian says below it is clipped, and counted.
_NON_NEGATIVE = ("mass_concentration", "mole_fraction", "lwe_thickness", "relative_humidity", "cloud_area_fraction", "atmosphere_boundary")


class Params(Section):
    init: Literal["last", "case"] | list[int | str] = "last"
    """`last`: the newest frame that has a context observation; `case`: the last frozen test case, whose truth is known;
    or frame numbers and ISO times."""
    max_lead: int = Field(ge=1)  # frames
    every: int = Field(default=1, ge=1)  # frames between leads
    levels: tuple[float, ...] = (0.05, 0.25, 0.5, 0.75, 0.95)
    grid: int = Field(default=48, ge=8)  # cells along the longer side, where there is no dense truth
    margin: float = Field(default=0.15, ge=0)  # around the bounding box of the sensors, as a share of its longer side
    history: int = Field(default=24, ge=0)  # frames of fixed sensors kept before init_time, for display

    @field_validator("levels")
    @classmethod
    def _around_the_median(cls, levels: tuple[float, ...]) -> tuple[float, ...]:
        rising = all(a < b for a, b in pairwise(levels))
        if not rising or 0.5 not in levels or levels[0] <= 0 or levels[-1] >= 1:
            raise ValueError(f"levels must increase strictly inside (0, 1) and contain 0.5, found {list(levels)}")
        return levels


SECTION_KEYS = 1  # the models of a dataset forecast alike


def params_model(key: str, model: str) -> type[Params]:
    return Params


@dataclass(frozen=True)
class Grid:
    """Output cells: rows y, columns x, physical positions in `info.position_unit`."""

    y: np.ndarray  # [Y]
    x: np.ndarray  # [X]

    @property
    def points(self) -> np.ndarray:
        """[Y*X, 2] positions, columns (x, y), rows in (y, x) order."""
        return np.stack(np.meshgrid(self.x, self.y, indexing="xy"), axis=-1).reshape(-1, 2)


def run(params: Params, key: str, model: str, *, sensors: Path, run: Path, out: Path) -> None:
    """Write the forecast folder of one run."""
    dataset = sensor_data.read(sensors)
    if dataset.info.classes:
        names = ", ".join(dataset.info.variables)
        raise ValueError(
            f"{key} has classes ({names}), and a forecast cube holds quantiles of numbers: evaluate it, but do not forecast it"
        )
    loaded = runs.load(run, dataset.info, device.name())
    dataset = replace(dataset, info=loaded.info)  # the statistics the model was trained with, whatever data came since
    frames = initial_frames(dataset, params.init)
    grid = output_grid(dataset, params)
    made = [_one(dataset, loaded, frame, grid, params) for frame in frames]
    fields = _joined([one.cube for one in made])
    fields = fields.assign_attrs(cube.global_attributes(dataset.info, model))
    if dataset.info.projection:
        fields = fields.assign(crs=cube.grid_mapping())
    stations = None
    if dataset.info.n_sensors:
        stations = _joined([one.stations for one in made if one.stations is not None]).assign_attrs(
            {**fields.attrs, "featureType": "timeSeries"}
        )
    problems = cube.check(fields)
    if problems:
        raise ValueError(f"{out} would break the forecast cube contract:\n  " + "\n  ".join(problems))
    with atomic.writing(out) as folder:
        folder.mkdir()
        cube.write(folder / "forecast.zarr", fields, stations)
        table = pd.concat([one.observed for one in made], ignore_index=True)
        table.to_parquet(folder / "sensors.parquet", index=False)
        summary = {
            "dataset": key,
            "model": model,
            "weights_sha256": loaded.weights_sha256,
            "dataset_inputs": dict(dataset.inputs),
            "info": dataset.info.to_json(),
            "sensor_names": [dataset.name_of(sensor) for sensor in range(dataset.info.n_sensors)],
            "context_frames": loaded.context_frames,
            "leads": len(fields["lead_time"]),
            "quantiles": [float(level) for level in fields["quantile"].values] if "quantile" in fields.dims else [],
            "runs": [one.summary for one in made],
        }
        (folder / "forecast.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    cells, leads = (len(grid.y), len(grid.x)), len(fields["lead_time"])
    log.info("forecast %s %s: %d runs x %d leads on %d x %d cells", key, model, len(made), leads, *cells)


def _joined(runs: list[xr.Dataset]) -> xr.Dataset:
    return xr.concat(runs, "init_time", data_vars="minimal", coords="minimal", compat="equals", join="exact")


def output_grid(dataset: SensorDataset, params: Params) -> Grid:
    """The grid of the dense truth, or square cells over the sensors' bounding box with a margin."""
    if len(dataset.info.space) != 2 or (dataset.has_truth and len(dataset["truth/shape"]) != 2):
        raise ValueError(f"a forecast is a map of x and y: {dataset.info.name} has the axes {', '.join(dataset.info.space)}")
    if dataset.has_truth:
        rows, columns = map(int, dataset["truth/shape"])
        position = np.asarray(dataset["truth/position"], "f8").reshape(rows, columns, 2)
        return Grid(position[:, 0, 1], position[0, :, 0])
    position = np.asarray(dataset["sensor/position" if dataset.info.n_sensors else "obs/position"], "f8")
    low, high = position.min(axis=0), position.max(axis=0)
    longer = float((high - low).max()) or 1.0
    low, high = low - params.margin * longer, high + params.margin * longer
    cell = float((high - low).max()) / params.grid
    count = np.maximum(2, np.ceil((high - low) / cell)).astype(int)
    start = (low + high - count * cell) / 2 + cell / 2
    x, y = (start[axis] + cell * np.arange(count[axis]) for axis in (0, 1))
    return Grid(y, x)


@dataclass(frozen=True)
class _Made:
    cube: xr.Dataset
    stations: xr.Dataset | None
    observed: pd.DataFrame
    summary: dict[str, Any]


def _one(dataset: SensorDataset, loaded: runs.Run, frame: int, grid: Grid, params: Params) -> _Made:
    """The forecast from one frame."""
    info = dataset.info
    # A model that does not forecast still says what the field is now.
    leads = np.arange(0, (params.max_lead if "forecast" in loaded.predictor.tasks else 0) + 1, params.every)
    fixed = np.asarray(dataset["sensor/position"], "f8") if info.n_sensors else np.zeros((0, len(info.space)))
    batch = at_points(dataset, frame, loaded.context_frames, np.concatenate([grid.points, fixed]), leads.tolist())
    answer = predict.answer(loaded.predictor, batch.context, batch.query, info, device.name())
    values, levels = distribution(answer, loaded.predictor.levels, params.levels)
    clipped = _clip(values, info)
    trajectory = int(dataset.trajectory_of(np.array([frame]))[0])
    origin = float(dataset["frame/time"][frame])
    shared = _coordinates(info, origin, batch.query.time[0].double().numpy() - origin, trajectory, levels)
    cells = len(grid.points)
    far = distance(info, batch.context, batch.query.position[:, 0, :cells])
    fields = _fields(info, grid, shared, values[:, :, :cells], far, clipped)
    stations = _stations(dataset, fixed, shared, values[:, :, cells:]) if info.n_sensors else None
    counts = context_counts(dataset)
    summary = {
        "init_time": as_text(fields["init_time"].values[0]),
        "frame": frame,
        "trajectory": trajectory,
        "sensors_used": int(counts[frame]),
        "sensors_expected": usual_network(dataset, counts),
        "clipped_at_zero": clipped,
        "range": {name: [float(fields[name].min()), float(fields[name].max())] for name in info.variables},
    }
    return _Made(fields, stations, observed(dataset, frame, max(params.history, loaded.context_frames), params.max_lead), summary)


def _clip(values: np.ndarray, info: DatasetInfo) -> dict[str, int]:
    """Set what cannot be below zero to zero, in values [S,K,P,C]; how many there were, by variable."""
    clipped = {}
    for channel, name in enumerate(info.variables):
        if (lexicon.lookup(name).standard_name or "").startswith(_NON_NEGATIVE):
            negative = values[..., channel] < 0
            clipped[name] = int(negative.sum())
            values[..., channel][negative] = 0.0
    return clipped


def _coordinates(info: DatasetInfo, origin: float, ahead: np.ndarray, trajectory: int, levels: tuple[float, ...]) -> dict[str, Any]:
    """Coordinates of grid and stations alike; `origin` and `ahead` [S] in dataset time."""
    init, lead_time, attributes = cube.to_time(info, np.array([origin])), cube.to_duration(info, ahead), cube.coordinate_attributes(info)
    coordinates: dict[str, Any] = {
        "init_time": ("init_time", init, attributes["init_time"]),
        "lead_time": ("lead_time", lead_time, attributes["lead_time"]),
        "valid_time": (("init_time", "lead_time"), init[:, None] + lead_time, attributes["valid_time"]),
        "trajectory": ("init_time", np.array([trajectory], "i4"), attributes["trajectory"]),
    }
    if levels:
        coordinates["quantile"] = ("quantile", np.array(levels), attributes["quantile"])
    return coordinates


def _fields(
    info: DatasetInfo, grid: Grid, shared: dict[str, Any], values: np.ndarray, far: np.ndarray, clipped: dict[str, int]
) -> xr.Dataset:
    """The cube of values [S,K,Y*X,C] on the grid, with how far [1,Y*X] each cell is from an observation."""
    shape = (len(grid.y), len(grid.x))
    arrays: dict[str, Any] = {
        name: (
            (*_dims(shared), "y", "x"),
            _run_of(values[..., channel].reshape(*values.shape[:2], *shape), shared),
            _attributes(info, name, clipped.get(name, 0)),
        )
        for channel, name in enumerate(info.variables)
    }
    arrays["distance_to_sensor"] = (
        ("init_time", "y", "x"),
        far.reshape(1, *shape).astype("f4"),
        {"long_name": "distance to the nearest observation of the last frame the model saw", "units": info.position_unit},
    )
    return xr.Dataset(arrays, coords={**shared, **_axes(info, grid.x, grid.y, ("x", "y"), cube.coordinate_attributes(info))})


def _stations(dataset: SensorDataset, place: np.ndarray, shared: dict[str, Any], values: np.ndarray) -> xr.Dataset:
    """Values [S,K,N,C] at the fixed sensors, whose place is [N,2]."""
    info = dataset.info
    arrays = {
        name: ((*_dims(shared), "station"), _run_of(values[..., channel], shared), _attributes(info, name, None))
        for channel, name in enumerate(info.variables)
    }
    coordinates = {**shared, **_axes(info, place[:, 0], place[:, 1], ("station", "station"), cube.coordinate_attributes(info))}
    coordinates["station"] = ("station", np.arange(info.n_sensors, dtype="i4"), {"long_name": "index of the fixed sensor"})
    role = np.asarray(dataset["sensor/role"], "i1")
    meanings = {"flag_values": np.array([0, 1, 2], "i1"), "flag_meanings": "context validation test"}
    coordinates["role"] = ("station", role, {"long_name": "what the sensor is used for", **meanings})
    return xr.Dataset(arrays, coords=coordinates)


def _dims(coordinates: dict[str, Any]) -> tuple[str, ...]:
    return ("init_time", "lead_time", "quantile") if "quantile" in coordinates else ("init_time", "lead_time")


def _run_of(values: np.ndarray, coordinates: dict[str, Any]) -> np.ndarray:
    """Values [S,K,...] with the axis of init_time; without quantiles the axis of levels goes."""
    return (values if "quantile" in coordinates else values[:, 0])[None]


def distribution(answer: FieldPrediction, own_levels: tuple[float, ...], levels: tuple[float, ...]) -> tuple[np.ndarray, tuple[float, ...]]:
    """Values [S,K,Q,C] float32 at quantile levels of a prediction with B = 1; K = 1 and no levels where only a mean is given."""
    mean = answer.mean[0].double().numpy()  # [S,Q,C]
    if answer.scale is not None:
        z = ndtri(np.array(levels))[:, None, None]
        values = mean[:, None] + z * answer.scale[0].double().numpy()[:, None]
    elif answer.quantiles is not None:
        if levels[0] < own_levels[0] or levels[-1] > own_levels[-1]:
            raise ValueError(f"levels {levels} reach beyond those the model gives, {own_levels}: narrow forecast levels or train with more")
        own = np.sort(answer.quantiles[0].double().numpy(), axis=-1)  # [S,Q,C,K]
        right = np.clip(np.searchsorted(own_levels, levels), 1, len(own_levels) - 1)
        grid = np.array(own_levels)
        weight = (np.array(levels) - grid[right - 1]) / (grid[right] - grid[right - 1])
        values = np.moveaxis(own[..., right - 1] * (1 - weight) + own[..., right] * weight, -1, 1)
    elif answer.samples is not None:
        values = np.moveaxis(np.quantile(answer.samples[:, 0].double().numpy(), levels, axis=0), 0, 1)
    else:
        return mean[:, None].astype("f4"), ()
    return values.astype("f4"), levels


def observed(dataset: SensorDataset, frame: int, before: int, after: int) -> pd.DataFrame:
    """Observations around a frame as long rows: of fixed sensors `before` frames back and `after` ahead, of moving ones at the frame.

    Columns init_time, lead (frames), time, sensor (-1 for moving), role, x, y, [longitude, latitude], variable, value.
    """
    info, start, trajectory = dataset.info, dataset["frame/obs_start"], dataset["trajectory/frame_start"]
    own = int(dataset.trajectory_of(np.array([frame]))[0])
    first, last = max(frame - before + 1, int(trajectory[own])), min(frame + after + 1, int(trajectory[own + 1]))
    rows = slice(int(start[first]), int(start[last]))
    position, value, sensor = (np.asarray(dataset[name][rows]) for name in ("obs/position", "obs/value", "obs/sensor"))
    frames = np.repeat(np.arange(first, last), np.diff(start[first : last + 1]))
    kept = (sensor >= 0) | (frames == frame)
    position, value, sensor, frames = (a[kept] for a in (position.astype("f8"), value, sensor, frames))
    role = np.asarray(dataset["sensor/role"])[sensor] if info.n_sensors else np.zeros(len(sensor))
    times = np.asarray(dataset["frame/time"])
    columns = {
        "init_time": np.repeat(cube.to_time(info, times[[frame]]), len(sensor)),
        "lead": frames - frame,
        "time": cube.to_time(info, times[frames]),
        "sensor": sensor,
        "role": np.where(sensor < 0, sensor_data.CONTEXT, role).astype("i1"),
        "x": position[:, 0],
        "y": position[:, 1],
    }
    if info.projection:
        columns["longitude"], columns["latitude"] = degrees(info, position[:, 0], position[:, 1])
    tables = [pd.DataFrame({**columns, "variable": name, "value": value[:, channel]}) for channel, name in enumerate(info.variables)]
    return pd.concat(tables, ignore_index=True)


def as_text(time: Any) -> str | float:
    """An init_time for JSON: ISO 8601 with Z, or the float of a simulation."""
    return f"{np.datetime_as_string(time, unit='s')}Z" if np.asarray(time).dtype.kind == "M" else float(time)


def degrees(info: DatasetInfo, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Longitude and latitude of plane positions, to 1e-5 degrees (1 m): positions are stored in single precision."""
    assert info.projection is not None
    longitude, latitude = geometry.to_degrees(np.stack([x, y], axis=-1), info.projection)
    return np.round(longitude, 5), np.round(latitude, 5)


def _axes(info: DatasetInfo, x: np.ndarray, y: np.ndarray, dims: tuple[str, str], attributes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    if not info.projection:
        return {"x": (dims[0], x, attributes["x"]), "y": (dims[1], y, attributes["y"])}
    longitude, _ = degrees(info, x, np.zeros_like(x))
    _, latitude = degrees(info, np.zeros_like(y), y)
    return {"longitude": (dims[0], longitude, attributes["longitude"]), "latitude": (dims[1], latitude, attributes["latitude"])}


def _attributes(info: DatasetInfo, name: str, clipped: int | None) -> dict[str, Any]:
    variable = lexicon.lookup(name)
    attributes: dict[str, Any] = {"long_name": variable.long_name, "units": variable.unit}
    if variable.standard_name:
        attributes["standard_name"] = variable.standard_name
    if clipped is not None and info.projection:
        attributes["grid_mapping"] = "crs"
    if clipped:
        attributes["comment"] = f"{clipped} values below zero in this run, grid and stations together, are given as zero."
        attributes["clipped_at_zero"] = clipped
    return attributes
