"""Observations become frames: means in bins, each platform a fixed or a moving sensor, with covariates beside the values.

A bin ends at its frame: the frame at 05:00 local time holds what was measured in (04:00, 05:00], so that at 05:00 all of it is known.
Standardisation knows only what context sensors reported in training frames, where `scale` does not give its numbers.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pandas as pd

from models.contract import DatasetInfo
from pipeline import geometry, observations, sensors, splits
from pipeline.geometry import Cells
from pipeline.recipe import Network, Subsample, dataset_info

log = logging.getLogger(__name__)

BIN = ["period", "bin", "platform_id", "moving", "cell_x", "cell_y"]


def write(params: Subsample, key: str, checked: Path, writer: sensors.Writer) -> DatasetInfo:
    """Append the frames of the checked observations to a sensor dataset, and its fixed sensors and cases."""
    network = params.network
    assert network is not None
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
    if "name" in fixed:
        writer.name_sensors(fixed["name"])
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
    return dataset_info(
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

    Fixed sensors are the fixed platforms, named by their id without the prefix that some sources give it (`static:`). Where all platforms
    move, the held-out cells are the fixed sensors: what any platform measured in one is averaged, stands at the cell's centre, and is not
    context; they have no names.
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
        fixed["name"] = [str(platform).rpartition(":")[2] for platform in fixed.index]
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
