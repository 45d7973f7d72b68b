"""Stage `subsample`: checked observations, or a field and a sensor layout, become one sensor dataset (pipeline/sensors.py).

Observations are averaged in bins that end at a frame: the frame at 05:00 local time holds what was measured in (04:00, 05:00], so that at
05:00 all of it is known. Fields are read in the pieces they are stored in, and their sensors drawn by a layout (pipeline/strategies.py),
or their points are parted into context and questions (pipeline/tasks.py).
Standardisation knows only what context sensors reported in training frames, where `scale` does not give its numbers.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import xarray as xr
from pydantic import Field, model_validator

from models.contract import DatasetInfo
from pipeline import atomic, fields, geometry, lexicon, observations, protocol, sensors, splits
from pipeline.batches import QUERY_COVARIATES
from pipeline.geometry import Cells
from pipeline.params import Section
from pipeline.strategies import FIXED, Layout
from pipeline.tasks import Tasks

log = logging.getLogger(__name__)


class Network(Section):
    """How observations become frames."""

    step: float = Field(default=1.0, gt=0)  # hours between frames
    covariates: tuple[str, ...] = ()  # variables seen beside the value at context sensors; with them comes their availability
    sectors: int | None = Field(default=None, ge=2)  # u10 and v10 give way to one column for each direction the wind comes from
    known_ahead: bool = False  # covariates are given with a question too, as some benchmarks have it; a forecast cannot be made then
    utc_offset: float = 0.0  # hours; frames lie at whole steps of local time, and the hour of the day is the local one
    periods: tuple[tuple[date, date], ...] | None = None  # [first, last) days in UTC, each a trajectory; None: everything is one
    moving: str | None = None  # regular expression: platforms that are moving sensors though they have no trips
    cells: Cells | None = None  # moving sensors are averaged per cell, and held-out cells are scored as fixed sensors
    held_out: splits.HeldOut = splits.HeldOut()

    @model_validator(mode="after")
    def _wind(self) -> Network:
        if self.sectors and not {"u10", "v10"} <= set(self.covariates):
            raise ValueError(f"sectors needs u10 and v10 among the covariates, found {', '.join(self.covariates) or 'none'}")
        if self.known_ahead and not self.covariates:
            raise ValueError("known_ahead needs covariates")
        return self


class Scale(Section):
    """How values are scaled; and numbers in place of measured ones, in physical units: for values that need no scaling, and for datasets
    that share a model."""

    by: Literal["moments", "range"] = "moments"  # range: the least training value becomes 0, the greatest 1, covariates as well
    mean: tuple[float, ...] | None = None  # one a variable
    std: tuple[float, ...] | None = None
    centre: tuple[float, ...] | None = None  # one a coordinate
    half_extent: float | None = Field(default=None, gt=0)


class Subsample(Section):
    source: str
    variables: tuple[str, ...] = Field(min_length=1)
    seed: int = 0
    max_flag: int = Field(default=3, ge=1, le=4)  # worst aggregate QARTOD flag of a value, or of a frame of a field, that is used
    network: Network | None = None  # for a source of observations
    blocks: protocol.Blocks | None = None  # for a source of observations: the days and folds of a benchmark
    layout: Layout | None = None  # for a source that is a field: its sensors
    tasks: Tasks | None = None  # for a source that is a field: its points are context or asked
    scale: Scale = Scale()
    split: splits.TimeBlocks | None = None  # None: trajectories are split by the role the source gives them
    cases: splits.Cases = splits.Cases()  # `blocks` make their own
    calendar: tuple[str, ...] = ("hour_sin", "hour_cos")  # query covariates; simulations have none

    @model_validator(mode="after")
    def _consistent(self) -> Subsample:
        if sum(how is not None for how in (self.network, self.blocks, self.layout, self.tasks)) != 1:
            raise ValueError(
                "give either `network` or `blocks` (a source of observations), or `layout` or `tasks` (a source that is a field)"
            )
        if self.blocks is not None and (len(self.variables) > 1 or {"split", "cases"} & self.model_fields_set):
            raise ValueError("`blocks` are of one variable, and they make the split and the cases: leave out `split` and `cases`")
        if self.network is None and self.scale.by == "range":
            raise ValueError("scale.by: range is for observations (`network`); of a field or of `blocks` give scale.mean and scale.std")
        if self.network is not None and self.split is None:
            raise ValueError("observations need `split`: {validation, test, gap}")
        unknown = sorted(set(self.calendar) - set(QUERY_COVARIATES))
        if unknown:
            raise ValueError(f"calendar: unknown {', '.join(unknown)}; known: {', '.join(QUERY_COVARIATES)}")
        for name in (*self.variables, *(self.network.covariates if self.network else ())):
            lexicon.lookup(name)
        for name in ("mean", "std"):
            given = getattr(self.scale, name)
            if given is not None and len(given) != len(self.variables):
                raise ValueError(f"scale.{name} must have one number for each of {', '.join(self.variables)}, found {list(given)}")
        return self


def params_model(*keys: str) -> type[Subsample]:
    return Subsample


def run(params: Subsample, key: str, *, ingested: Path, checked: Path, out: Path) -> None:
    """Write the sensor dataset `key` to `out` (Zarr)."""
    recipe = {"key": key, **params.model_dump(mode="json")}
    with atomic.writing(out) as temporary:
        writer = sensors.Writer(temporary)
        if params.network is not None or params.blocks is not None:
            if fields.is_field(ingested):
                raise ValueError(f"{ingested} holds a field: subsample.{key} needs `layout` or `tasks` in place of `network` or `blocks`")
            if params.network is not None:
                info = _from_observations(params, params.network, key, checked, writer)
            else:
                info = _from_blocks(params, key, checked, writer)
            inputs = {"observations": tree_sha256(checked / "observations")}
        else:
            if not fields.is_field(ingested):
                hint = f"run its stage first or, for observations, give subsample.{key} `network`"
                raise ValueError(f"{ingested} holds no field.zarr: {hint}")
            field = fields.open_field(ingested)
            if params.tasks is not None:
                recipe |= _drawn(field)
            info = _from_field(params, key, field, checked, writer)
            inputs = {"field.zarr": tree_sha256(ingested / "field.zarr"), "frames.parquet": sha256(checked / "frames.parquet")}
        dataset = writer.finish(info, recipe, inputs)
    split = np.asarray(dataset["frame/split"])
    log.info(
        "%s: %d observations in %d frames of %d trajectories, %d fixed sensors; frames by split %s; %d cases",
        key,
        dataset["obs/value"].shape[0],
        dataset.n_frames,
        len(dataset["trajectory/frame_start"]) - 1,
        info.n_sensors,
        {name: int((split == code).sum()) for name, code in sensors.SPLITS.items()},
        len(dataset["cases/frame"]),
    )


def sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def tree_sha256(folder: Path) -> str:
    """One hash of all files below a folder, their names included."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256("".join(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n" for path in files).encode()).hexdigest()


# Observations -------------------------------------------------------------------------------------------------------------------------


def _from_observations(params: Subsample, network: Network, key: str, checked: Path, writer: sensors.Writer) -> DatasetInfo:
    bins = _binned(params, network, checked)
    frame_start, first_bin = _periods(bins, network)
    table, fixed = _sensors(bins, params, network)
    n_frames = int(frame_start[-1])
    split = np.concatenate(
        [
            splits.time_blocks(int(n), params.split, f"trajectory {number} of {key}")
            for number, n in enumerate(np.diff(frame_start))
            if params.split is not None
        ]
    )
    table["frame"] = frame_start[table["period"]] + table["bin"] - first_bin[table["period"]]
    table = table.sort_values(["frame", "sensor", "platform_id", "cell_x", "cell_y"], kind="stable", ignore_index=True)
    frame, sensor = table["frame"].to_numpy(), table["sensor"].to_numpy()
    role = fixed["role"].to_numpy(np.int8)
    visible = (sensor < 0) | (np.append(role, sensors.CONTEXT)[sensor] == sensors.CONTEXT)
    learn = visible & (split[frame] == sensors.TRAIN)
    if not visible.any():
        raise ValueError(f"{key}: all {len(role)} sensors are held out; leave at least one as context")
    if not learn.any():
        raise ValueError(f"{key}: no context sensor has an observation of {', '.join(params.variables)} in the training frames")

    known = np.concatenate([table.loc[learn, ["longitude", "latitude"]], fixed[["longitude", "latitude"]]])
    projection = geometry.centred_on(known[:, 0], known[:, 1])
    position = geometry.to_km(table["longitude"].to_numpy(), table["latitude"].to_numpy(), projection)
    place = geometry.to_km(fixed["longitude"].to_numpy(), fixed["latitude"].to_numpy(), projection)
    half_extent = float(np.abs(geometry.to_km(known[:, 0], known[:, 1], projection)).max())
    value = table[list(params.variables)].to_numpy(np.float64)
    centre, width = _unit(value[learn], params.scale.by)
    covariate, names = _covariates(
        table, network, learn, params.scale.by, mixed=bool((sensor < 0).any() and (role == sensors.CONTEXT).any())
    )

    counts = np.bincount(frame[visible], minlength=n_frames)
    for name, array in {
        "obs/position": position,
        "obs/value": value,
        "obs/covariate": covariate,
        "obs/sensor": sensor,
        "frame/obs_start": np.searchsorted(frame, np.arange(n_frames + 1)),
        "frame/time": (np.arange(n_frames) + np.repeat(first_bin - frame_start[:-1], np.diff(frame_start))) * network.step
        - network.utc_offset,
        "frame/split": split,
        "trajectory/frame_start": frame_start,
        "sensor/position": place,
        "sensor/role": role,
        **splits.cases(split, frame_start, counts, params.cases),
    }.items():
        writer.append(name, array)
    return _info(
        params,
        key,
        mean=centre,
        std=width,
        centre=(0.0, 0.0),
        half_extent=half_extent or 1.0,
        geometry="plane",
        projection=projection,
        step=network.step,
        utc_offset=network.utc_offset,
        n_sensors=len(role),
        context_covariates=names,
        ahead=names if network.known_ahead else (),
    )


def _from_blocks(params: Subsample, key: str, checked: Path, writer: sensors.Writer) -> DatasetInfo:
    """Days, folds and cases of a block protocol; all sensors move, and their places are cells."""
    blocks = params.blocks
    assert blocks is not None
    parts = []
    for path in observations.partitions(checked):
        rows = observations.read_partition(path, variables=list(params.variables))
        rows = rows[(rows["flag_aggregate"] <= params.max_flag) & rows["platform_id"].str.fullmatch(blocks.platforms)]
        parts.append(protocol.slotted(rows, blocks))
    table = protocol.averaged(pd.concat(parts, ignore_index=True), blocks)
    if table.empty:
        raise ValueError(
            f"{checked} has no day with {blocks.least} observations of {params.variables[0]} of platforms {blocks.platforms!r}"
        )
    days, _, split = protocol.calendar(table, blocks)
    table = table[table["day"].isin(days)].reset_index(drop=True)
    table["fold"] = np.concatenate([protocol.fold(part, blocks) for _, part in table.groupby("day")])
    number = pd.Series(np.arange(len(days)), index=days)[table["day"]].to_numpy()
    table["frame"] = number * blocks.slots_a_day + table["slot"]
    table = table.sort_values(["frame", "latitude", "longitude"], ignore_index=True)
    learn = (split == sensors.TRAIN)[table["frame"] // blocks.slots_a_day]
    longitude, latitude = table["longitude"].to_numpy(), table["latitude"].to_numpy()
    projection = geometry.centred_on(longitude, latitude)
    position = geometry.to_km(longitude, latitude, projection)
    value = table[["value"]].to_numpy()
    made = protocol.arrays(table, blocks)
    for name, array in {
        "obs/position": position,
        "obs/value": value,
        "obs/covariate": np.zeros((len(value), 0)),
        "obs/sensor": np.full(len(value), -1),
        "frame/obs_start": np.searchsorted(table["frame"], np.arange(len(made["frame/time"]) + 1)),
        **made,
    }.items():
        writer.append(name, array)
    return _info(
        params,
        key,
        mean=value[learn].mean(axis=0),
        std=value[learn].std(axis=0),
        centre=(0.0, 0.0),
        half_extent=float(np.abs(position).max()) or 1.0,
        geometry="plane",
        projection=projection,
        step=blocks.step,
        utc_offset=blocks.utc_offset,
        n_sensors=0,
        context_covariates=(),
    )


BIN = ["period", "bin", "platform_id", "moving", "cell_x", "cell_y"]


def _binned(params: Subsample, network: Network, checked: Path) -> pd.DataFrame:
    """Means per (period, bin, platform, cell) with one column per variable, read partition by partition.

    A bin may lie across two partitions, so sums and counts are kept until the end. A fixed platform has cell (0, 0).
    """
    wanted = [*params.variables, *network.covariates]
    step, offset = round(network.step * 3600e6), round(network.utc_offset * 3600e6)
    sums: list[pd.DataFrame] = []
    read, flagged, seen = 0, 0, set()
    for path in observations.partitions(checked):
        rows = observations.read_partition(path, variables=wanted)
        if "flag_aggregate" not in rows:
            raise ValueError(f"{path} has no column flag_aggregate: it must come from the validate stage")
        read += len(rows)
        seen |= set(rows["variable"])
        kept = rows[rows["flag_aggregate"] <= params.max_flag]
        flagged += len(rows) - len(kept)
        time = kept["time"].dt.tz_localize(None).to_numpy("datetime64[us]")
        moving = kept["trip_id"].notna()
        if network.moving:
            moving |= kept["platform_id"].str.fullmatch(network.moving)
        kept = kept.assign(period=_period(time, network), bin=-(-(time.astype(np.int64) + offset) // step), moving=moving)
        sums.append(_summed(_celled(kept[kept["period"] >= 0], network.cells), wanted))
    absent = [name for name in wanted if name not in seen]
    if absent:
        held = {name for path in observations.partitions(checked) for name in pd.read_parquet(path, columns=["variable"])["variable"]}
        raise ValueError(f"{checked} holds no row of {', '.join(absent)}; it has {', '.join(sorted(held))}")
    log.info("%s: read %d rows, left out %d with a flag above %d", checked, read, flagged, params.max_flag)
    total = pd.concat(sums).groupby(level=BIN).sum()
    means = pd.DataFrame({name: total[f"sum {name}"] / total[f"count {name}"].replace(0, np.nan) for name in wanted})
    means[["longitude", "latitude"]] = total[["longitude", "latitude"]].div(total["rows"], axis=0)
    means = means[means[list(params.variables)].notna().all(axis=1)]
    if means.empty:
        names = ", ".join(params.variables)
        raise ValueError(f"{checked} has no usable observation of {names}: {read} rows read, {flagged} left out by flag")
    return means.reset_index()


def _summed(rows: pd.DataFrame, wanted: list[str]) -> pd.DataFrame:
    """Sum and count of each variable, of the positions and of the rows, per bin."""
    columns = {name: rows[name] for name in (*BIN, "longitude", "latitude")}
    for name in wanted:
        here = rows["variable"] == name
        columns |= {f"sum {name}": rows["value"].where(here, 0.0), f"count {name}": here.astype(np.int32)}
    return pd.DataFrame({**columns, "rows": np.int32(1)}).groupby(BIN).sum()


def _period(time: np.ndarray, network: Network) -> np.ndarray:
    """Number of the period each time (UTC) lies in, -1 outside all. The first instant of a period belongs to the bin before it."""
    if network.periods is None:
        return np.zeros(len(time), np.int64)
    out = np.full(len(time), -1, np.int64)
    for number, (first, last) in enumerate(network.periods):
        out[(time > np.datetime64(first)) & (time <= np.datetime64(last))] = number
    return out


def _celled(rows: pd.DataFrame, cells: Cells | None) -> pd.DataFrame:
    if cells is None:
        return rows.assign(cell_x=0, cell_y=0)
    x = np.floor((rows["longitude"] - cells.origin[0]) / cells.longitude).astype(int)
    y = np.floor((rows["latitude"] - cells.origin[1]) / cells.latitude).astype(int)
    return rows.assign(cell_x=x.where(rows["moving"], 0), cell_y=y.where(rows["moving"], 0))


def _periods(bins: pd.DataFrame, network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Offsets of the trajectories in frames [R+1] and the bin of their first frame [R]; frames are regular from first to last bin."""
    found = bins.groupby("period")["bin"].agg(["min", "max"])
    expected = len(network.periods) if network.periods else 1
    empty = sorted(set(range(expected)) - set(found.index))
    if empty and network.periods:
        first, last = network.periods[empty[0]]
        raise ValueError(f"network.periods: there is no usable observation from {first} to {last}")
    return np.concatenate([[0], np.cumsum(found["max"] - found["min"] + 1)]), found["min"].to_numpy()


def _sensors(bins: pd.DataFrame, params: Subsample, network: Network) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The observations with the index of their fixed sensor (-1: moving), and the table of fixed sensors with their role.

    Fixed sensors are the fixed platforms. Where all platforms move, the held-out cells are the fixed sensors: what any platform measured
    in one is averaged, stands at the cell's centre, and is not context.
    """
    bins = bins.assign(sensor=-1)
    if not bins["moving"].all():
        still = bins[~bins["moving"]].groupby("platform_id")[["longitude", "latitude"]]
        strayed = ((still.max() - still.min()) > 0.01).any(axis=1)
        if strayed.any():
            names = ", ".join(strayed.index[strayed])
            raise ValueError(f"fixed platforms {names} moved by more than 0.01 degrees: a moving platform needs a trip_id")
        fixed = still.median().assign(frames=still.size())
        fixed["role"] = _roles(fixed, network, params.seed)
        bins["sensor"] = np.where(bins["moving"], -1, fixed.index.get_indexer(pd.Index(bins["platform_id"])))
        at = bins["sensor"].to_numpy()
        for name in ("longitude", "latitude"):
            bins[name] = np.where(at >= 0, fixed[name].to_numpy()[at], bins[name])
        return bins, fixed
    if network.cells is None:
        raise ValueError("all platforms move: give network.cells, so that some cells can be held out and scored")
    cells = network.cells
    table = bins.groupby(["cell_x", "cell_y"])["bin"].nunique().rename("frames").reset_index()
    table["longitude"] = cells.origin[0] + (table["cell_x"] + 0.5) * cells.longitude
    table["latitude"] = cells.origin[1] + (table["cell_y"] + 0.5) * cells.latitude
    table.index = pd.Index(table["cell_x"].astype(str) + "," + table["cell_y"].astype(str))
    table["role"] = _roles(table, network, params.seed)
    fixed = table[table["role"] != sensors.CONTEXT]
    cell = bins["cell_x"].astype(str) + "," + bins["cell_y"].astype(str)
    bins["sensor"] = fixed.index.get_indexer(pd.Index(cell))
    held = bins[bins["sensor"] >= 0]
    values = [*params.variables, *network.covariates]
    merged = held.groupby(["period", "bin", "sensor", "cell_x", "cell_y"], as_index=False)[values].mean()
    merged["longitude"] = fixed["longitude"].to_numpy()[merged["sensor"]]
    merged["latitude"] = fixed["latitude"].to_numpy()[merged["sensor"]]
    return pd.concat([bins[bins["sensor"] < 0], merged.assign(platform_id="", moving=False)], ignore_index=True), fixed


def _roles(fixed: pd.DataFrame, network: Network, seed: int) -> np.ndarray:
    projection = geometry.centred_on(fixed["longitude"].to_numpy(), fixed["latitude"].to_numpy())
    position = geometry.to_km(fixed["longitude"].to_numpy(), fixed["latitude"].to_numpy(), projection)
    return splits.held_out(list(fixed.index), position, fixed["frames"].to_numpy(), network.held_out, seed)


def _unit(values: np.ndarray, by: str) -> tuple[np.ndarray, np.ndarray]:
    """What becomes 0, and how far from it 1 lies, of values [n,C]."""
    return (values.min(axis=0), np.ptp(values, axis=0)) if by == "range" else (values.mean(axis=0), values.std(axis=0))


def _sector(u: np.ndarray, v: np.ndarray, sectors: int) -> np.ndarray:
    """[n,sectors] 1 for the direction the wind comes from, clockwise and the first one around north; none where it is calm or unknown."""
    number = np.round(np.arctan2(-u, -v) / (2 * np.pi) * sectors) % sectors
    return (number[:, None] == np.arange(sectors)) & (np.hypot(u, v) > 0)[:, None]


def _covariates(table: pd.DataFrame, network: Network, learn: np.ndarray, by: str, mixed: bool) -> tuple[np.ndarray, tuple[str, ...]]:
    """Context covariates [O,F] and their names: each variable scaled (absent = its training mean), `wind_I` for each sector of the wind,
    the share of the variables that is there (`availability`), and `mobile` where fixed and moving sensors are context together."""
    columns, names = [], list(network.covariates)
    raw = table[names].to_numpy(np.float64)
    for column, name in zip(raw.T, names, strict=True):
        seen = column[learn & np.isfinite(column)]
        if not len(seen) or not seen.std():
            raise ValueError(f"covariate {name} has {len(seen)} training values, all the same: leave it out of network.covariates")
        zero, one = _unit(seen[:, None], by)
        columns.append((np.nan_to_num(column, nan=seen.mean()) - zero) / one)
    if network.sectors:
        at = [names.index(name) for name in ("u10", "v10")]
        wind = _sector(raw[:, at[0]], raw[:, at[1]], network.sectors)
        columns = [column for i, column in enumerate(columns) if i not in at] + list(wind.T.astype(float))
        names = [name for i, name in enumerate(names) if i not in at] + [f"wind_{i}" for i in range(network.sectors)]
    if names:
        columns.append(np.isfinite(raw).mean(axis=1))
        names.append("availability")
    if mixed:
        columns.append((table["sensor"] < 0).to_numpy(float))
        names.append("mobile")
    return (np.stack(columns, axis=1) if columns else np.zeros((len(table), 0))), tuple(names)


# Fields -------------------------------------------------------------------------------------------------------------------------------


def _from_field(params: Subsample, key: str, field: xr.Dataset, checked: Path, writer: sensors.Writer) -> DatasetInfo:
    absent = [name for name in params.variables if name not in field]
    if absent:
        raise ValueError(f"{params.source} has no variable {', '.join(absent)}; it has {', '.join(map(str, field.data_vars))}")
    variables = field[list(params.variables)]
    trajectories, frames = field.sizes.get("trajectory", 1), field.sizes["time"]
    split = _field_split(params, key, field, trajectories, frames)
    unfit = _unfit(checked, trajectories * frames, params.max_flag)
    frame_start = np.arange(trajectories + 1) * frames
    part: _Sensors | _Points = _Sensors(params, params.layout, field, key) if params.layout is not None else _Points(params, field, split)
    counts, moments = np.zeros(trajectories * frames, np.int64), _Moments(len(params.variables))
    visible = np.zeros(trajectories * frames, np.int64)
    for trajectory, first, truth in _pieces(variables, params.variables):
        start = trajectory * frames + first
        truth[unfit[start : start + len(truth)]] = np.nan
        rows = part.rows(trajectory, first, truth)
        counts[start : start + len(truth)] = rows.count
        visible[start : start + len(truth)] = rows.visible
        for name, array in rows.arrays.items():
            writer.append(name, array)
        moments.add(rows.arrays["obs/value"][np.repeat(split[start : start + len(truth)] == sensors.TRAIN, rows.count)])
    if not moments.n:
        raise ValueError(f"{key}: no training frame of {params.source} has a finite value at a sensor")
    step, time, calendar = _time(field)
    for name, array in {
        "frame/obs_start": np.concatenate([[0], np.cumsum(counts)]),
        "frame/time": np.tile(time, trajectories),
        "frame/split": split,
        "trajectory/frame_start": frame_start,
        **part.fixed,
        **splits.cases(split, frame_start, visible, params.cases),
    }.items():
        writer.append(name, array)
    return _info(
        params,
        key,
        mean=moments.mean,
        std=moments.std,
        geometry=field.attrs["geometry"],
        step=step,
        utc_offset=0.0,
        n_sensors=len(part.fixed.get("sensor/role", ())),
        context_covariates=(),
        simulated=not calendar,
        space=_space(field),
        **_scale(field),
    )


@dataclass(frozen=True)
class _Rows:
    """What some frames in a row give to a dataset."""

    arrays: dict[str, np.ndarray]
    count: np.ndarray  # [t] observations
    visible: np.ndarray  # [t] those a model may see


class _Sensors:
    """A layout of sensors on places that all trajectories share; the whole field stays as truth beside them."""

    def __init__(self, params: Subsample, layout: Layout, field: xr.Dataset, key: str) -> None:
        if "point" in field.dims and any(field[name].dims != ("point",) for name in fields.axes(field)):
            raise ValueError(
                f"the points of {params.source} differ from trajectory to trajectory: subsample.{key} needs `tasks`, not `layout`"
            )
        self.layout, self.seed, self.place = layout, params.seed, _places(field, 0)
        self.shape = tuple(field.sizes[dim] for dim in fields.space(field))
        self.frames, self.torus = field.sizes["time"], field.attrs["geometry"] == "torus"
        # The same sensors in every frame of the one trajectory are fixed sensors; another trajectory has others.
        self.stay = field.sizes.get("trajectory", 1) == 1 and layout.strategy in FIXED
        self.fixed: dict[str, np.ndarray] = {"truth/position": self.place, "truth/shape": np.array(self.shape)}
        self._owner, self._points = -1, np.zeros((0, 0), np.int64)

    def rows(self, trajectory: int, first: int, truth: np.ndarray) -> _Rows:
        if trajectory != self._owner:
            here = np.isfinite(truth[0]).all(axis=-1)  # not where the first frame has nothing, unless it has nothing at all
            there = (here if here.any() else ~here).reshape(self.shape)
            self._points = self.layout.sensors(there, self.frames, self.torus, self.seed, trajectory)
            self._owner = trajectory
            if self.stay:
                place = self.place[self._points[0]]
                self.fixed |= {"sensor/position": place, "sensor/role": np.full(len(place), sensors.CONTEXT)}
        at = self._points[first : first + len(truth)]
        value = self.layout.observed(np.take_along_axis(truth, at[..., None], axis=1), self.seed, trajectory, first)
        seen = self.layout.seen(self.frames, self.seed, trajectory)[first : first + len(truth)]
        valid = np.isfinite(value).all(axis=-1) & seen[:, None]
        count = valid.sum(axis=1)
        sensor = np.broadcast_to(np.arange(at.shape[1]) if self.stay else np.full(at.shape[1], -1), at.shape)
        arrays = {
            "obs/value": value[valid],
            "obs/position": self.place[at[valid]],
            "obs/covariate": np.zeros((int(count.sum()), 0)),
            "obs/sensor": sensor[valid],
            "truth/value": truth,
        }
        return _Rows(arrays, count, count)


class _Points:
    """Tasks: all points in training frames, and in the others those that are seen or asked, which need not be the same places."""

    def __init__(self, params: Subsample, field: xr.Dataset, split: np.ndarray) -> None:
        assert params.tasks is not None
        self.tasks, self.seed, self.field, self.split = params.tasks, params.seed, field, split
        self.frames = field.sizes["time"]
        names = _drawn_names(field)
        self.fixed = {"trajectory/parameter": np.stack([field[name].values for name in names], axis=1)} if names else {}
        self._owner, self._place = -1, np.zeros((0, 0))

    def rows(self, trajectory: int, first: int, truth: np.ndarray) -> _Rows:
        if trajectory != self._owner:
            self._owner, self._place = trajectory, _places(self.field, trajectory)
        parts = []
        for frame, value in enumerate(truth, first):
            if self.split[trajectory * self.frames + frame] == sensors.TRAIN:
                point = np.flatnonzero(np.isfinite(value).all(axis=1))
                parts.append((point, value[point], np.full(len(point), sensors.SEEN)))
            else:
                parts.append(self.tasks.frozen(value, self.seed, trajectory, frame))
        point, value, role = (np.concatenate(pieces) for pieces in zip(*parts, strict=True))
        arrays = {
            "obs/value": value,
            "obs/position": self._place[point],
            "obs/covariate": np.zeros((len(point), 0)),
            "obs/sensor": np.full(len(point), -1),
            "obs/role": role,
        }
        count, seen = (np.array([f(role) for _, _, role in parts]) for f in (len, lambda role: (role != sensors.ASKED).sum()))
        return _Rows(arrays, count, seen)


class _Moments:
    """Mean and standard deviation, merged piece by piece (Chan et al. 1983)."""

    def __init__(self, variables: int) -> None:
        self.n, self.mean, self._spread = 0, np.zeros(variables), np.zeros(variables)

    def add(self, rows: np.ndarray) -> None:
        if not len(rows):
            return
        rows = rows.astype(np.float64)
        shift = rows.mean(axis=0) - self.mean
        self._spread += ((rows - rows.mean(axis=0)) ** 2).sum(axis=0) + shift**2 * self.n * len(rows) / (self.n + len(rows))
        self.mean, self.n = self.mean + shift * len(rows) / (self.n + len(rows)), self.n + len(rows)

    @property
    def std(self) -> np.ndarray:
        return np.sqrt(self._spread / self.n)


def _drawn(field: xr.Dataset) -> dict[str, Any]:
    """What the recipe says of a simulation that drew numbers for each trajectory: its own params, and the names of those numbers."""
    names = _drawn_names(field)
    return {"simulation": json.loads(field.attrs["parameters"]), "drawn": names} if names else {}


def _drawn_names(field: xr.Dataset) -> list[str]:
    return sorted(str(name) for name, c in field.coords.items() if c.dims == ("trajectory",) and np.issubdtype(c.dtype, np.floating))


def _pieces(field: xr.Dataset, variables: tuple[str, ...]) -> Iterator[tuple[int, int, np.ndarray]]:
    """(trajectory, first frame, values [t,P,C]) in order, as the field is stored, so that each stored chunk is read once or few times."""
    times = _stored(field[variables[0]], "time")
    for block in _stored(field[variables[0]], "trajectory") if "trajectory" in field.dims else [None]:
        part = field if block is None else field.isel(trajectory=block)
        if len(times) == 1:
            part = part.compute()
        for number in range(part.sizes.get("trajectory", 1)):
            one = part.isel(trajectory=number) if block is not None else part
            for piece in times:
                cube = [one[name].isel(time=piece).to_numpy() for name in variables]
                values = np.stack(cube, axis=-1).reshape(len(cube[0]), -1, len(variables))
                yield (block.start if block is not None else 0) + number, piece.start, values


def _stored(array: xr.DataArray, dim: str) -> list[slice]:
    """The chunks of a dimension, as slices."""
    edges = np.concatenate([[0], np.cumsum(array.variable.chunksizes.get(dim, (array.sizes[dim],)))])
    return [slice(int(a), int(b)) for a, b in pairwise(edges)]


def _unfit(checked: Path, frames: int, max_flag: int) -> np.ndarray:
    """Which frames of a field quality control has failed: their values count as missing."""
    path = checked / "frames.parquet"
    if not path.exists():
        raise ValueError(f"{path} does not exist: run the validate stage first")
    flags = pd.read_parquet(path, columns=["flag_aggregate"])["flag_aggregate"].to_numpy()
    if len(flags) != frames:
        raise ValueError(f"{path} has {len(flags)} rows, the field {frames} frames: run the validate stage again")
    unfit = flags > max_flag
    log.info("%s: %d of %d frames left out with a flag above %d", path, unfit.sum(), frames, max_flag)
    return unfit


def _field_split(params: Subsample, key: str, field: xr.Dataset, trajectories: int, frames: int) -> np.ndarray:
    if params.split is not None:
        return np.tile(splits.time_blocks(frames, params.split, f"each trajectory of {key}"), trajectories)
    if "role" not in field.coords:
        raise ValueError(
            f"subsample.{key} has no `split`, and the field of {params.source} no coordinate role(trajectory): give one of them"
        )
    return splits.by_role(field["role"].values.tolist(), np.full(trajectories, frames))


def _places(field: xr.Dataset, trajectory: int) -> np.ndarray:
    """Positions [P,D] of the places of a trajectory, grids in the order they are stored in."""
    if "latitude" in field.coords:
        longitude, latitude = np.meshgrid(field["longitude"].values, field["latitude"].values)
        return geometry.to_km(longitude, latitude, geometry.centred_on(longitude, latitude)).reshape(-1, 2)
    if _is_globe(field):
        longitude, latitude = np.radians(np.meshgrid(field["x"].values, field["y"].values))
        vector = (np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude))
        return np.stack(vector, axis=-1).reshape(-1, 3)
    axes = [field[name] for name in fields.axes(field)]
    if "point" in field.dims:
        one = [axis.isel(trajectory=trajectory) if "trajectory" in axis.dims else axis for axis in axes]
        return np.stack([axis.values for axis in one], axis=-1)
    grid = np.meshgrid(*(axis.values for axis in reversed(axes)), indexing="ij")
    return np.stack([axis.ravel() for axis in reversed(grid)], axis=-1)


def _is_globe(field: xr.Dataset) -> bool:
    """A grid on a sphere: its places are unit vectors, so that longitude has no seam and poles are points. Scattered points on a sphere
    stay in degrees, which the great-circle distances of Gaussian process tasks are made of."""
    return field.attrs["geometry"] == "sphere" and fields.space(field) == ("y", "x")


def _space(field: xr.Dataset) -> tuple[str, ...]:
    """The axes of a position."""
    if _is_globe(field):
        return ("x", "y", "z")
    return ("x", "y") if "latitude" in field.coords else fields.axes(field)


def _scale(field: xr.Dataset) -> dict[str, Any]:
    """How positions are scaled."""
    if "latitude" in field.coords:
        projection = geometry.centred_on(*np.meshgrid(field["longitude"].values, field["latitude"].values))
        return {"centre": (0.0, 0.0), "half_extent": float(np.abs(_places(field, 0)).max()), "projection": projection}
    if _is_globe(field):
        return {"centre": (0.0, 0.0, 0.0), "half_extent": 1.0, "projection": None}
    axes = fields.axes(field)
    if field.attrs["geometry"] == "torus":
        return {"centre": (0.5,) * len(axes), "half_extent": 0.5, "projection": None}
    low, high = (np.array([f(field[name]) for name in axes]) for f in (np.min, np.max))
    return {"centre": tuple(((low + high) / 2).tolist()), "half_extent": float((high - low).max() / 2) or 1.0, "projection": None}


def _time(field: xr.Dataset) -> tuple[float, np.ndarray, bool]:
    """Nominal step, time of the frames, and whether they are hours of the calendar (since 1970)."""
    time = field["time"].values
    calendar = bool(np.issubdtype(time.dtype, np.datetime64))
    if calendar:
        time = (time - np.datetime64("1970-01-01")) / np.timedelta64(1, "h")
    time = time.astype(np.float64)
    return float(np.median(np.diff(time))) if len(time) > 1 else 1.0, time, calendar


def _info(params: Subsample, key: str, *, simulated: bool = False, ahead: tuple[str, ...] = (), **values: Any) -> DatasetInfo:
    """`ahead` names covariates that come with a question."""
    known = [lexicon.lookup(name) for name in params.variables]
    classes = [v.name for v in known if v.share]
    if classes and (len(classes) < 2 or len(classes) < len(known)):
        raise ValueError(f"subsample.{key}.variables: {', '.join(classes)} are classes: give all classes, and nothing beside them")
    unit = "km" if values["projection"] else "deg" if values["geometry"] == "sphere" and len(values["centre"]) == 2 else "1"
    values |= {name: value for name, value in params.scale.model_dump(exclude={"by"}).items() if value is not None}
    space = values.setdefault("space", ("x", "y"))
    if len(values["centre"]) != len(space):
        raise ValueError(f"subsample.{key}.scale.centre must have one number for each of {', '.join(space)}, found {values['centre']}")
    for name in ("mean", "std"):
        values[name] = tuple(map(float, values[name]))
    return DatasetInfo(
        name=key,
        variables=params.variables,
        units=tuple(v.unit for v in known),
        limits=tuple(v.fail for v in known),
        position_unit=unit,
        time_unit="1" if simulated else "h",
        time_origin="" if simulated else "1970-01-01T00:00:00Z",
        query_covariates=() if simulated else params.calendar + ahead,
        classes=bool(classes),
        **values,
    )
