"""Observations become the frames and cases of a block protocol (pipeline/protocol.py): slots of whole days, places that are cells.

All sensors move. Standardisation knows only the training days, where `scale` does not give its numbers.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from models.contract import DatasetInfo
from pipeline import geometry, observations, protocol, sensors
from pipeline.recipe import Subsample, dataset_info


def write(params: Subsample, key: str, checked: Path, writer: sensors.Writer) -> DatasetInfo:
    """Append the frames and cases of the checked observations to a sensor dataset."""
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
    return dataset_info(
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
