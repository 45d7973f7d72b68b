"""Quality control of one partition of observations: flag what passed the gate, write it, and count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import lexicon, observations, qc, qc_spatial
from pipeline.observation_gate import SERIES, Gated, ObservationGate, no_rows

EXAMPLES = 50  # rows held back that a page shows


@dataclass(frozen=True)
class Checked:
    """What quality control found in one partition."""

    tests: pd.DataFrame  # test, flag, n
    sensors: pd.DataFrame  # platform_id, day, n, suspect, fail
    places: pd.DataFrame  # platform_id, moving, longitude, latitude (means), n
    held: pd.DataFrame  # the first rows held back, for the page
    held_rows: int


def flag_partition(
    path: Path, held: Mapping[int, str], around: list[tuple[Path, Mapping[int, str]]], tail: pd.DataFrame, gate: ObservationGate, out: Path
) -> Checked:
    """Flag one partition, write it and what is held back of it."""
    table = pd.read_parquet(path)
    kept = table.drop(index=list(held)).reset_index(drop=True)
    kept["trip_id"] = kept["trip_id"].astype("str")
    flags = _flags(kept, _context(kept, around, tail, gate), gate)
    if len(kept):
        observations.write_partition(kept.assign(**flags), out / "observations" / path.name)
    reasons = table.loc[list(held)].assign(reason=pd.Series(held, dtype="str"))
    if len(reasons):
        write_quarantine(reasons.sort_index(), out / "quarantine" / path.name)
    return _summary(kept, flags, reasons)


def _context(kept: pd.DataFrame, around: list[tuple[Path, Mapping[int, str]]], tail: pd.DataFrame, gate: ObservationGate) -> pd.DataFrame:
    """Rows of other partitions that the series tests need: the margins on both sides, and the last word of sensors silent for longer."""
    if not len(kept):
        return no_rows()
    start, end = kept["time"].min() - gate.margin, kept["time"].max() + gate.margin
    near = []
    for path, gone in around:
        other = pd.read_parquet(path).drop(index=list(gone))
        near.append(other[(other["time"] >= start) & (other["time"] <= end)])
    rows = pd.concat([*near, tail[observations.OBSERVATIONS.names]])
    return rows.drop_duplicates(observations.KEY)


def touches(other: Gated, each: Gated, gate: ObservationGate) -> bool:
    if other.first_time is None or each.first_time is None:
        return False
    return bool(other.first_time <= each.last_time + gate.margin and other.last_time >= each.first_time - gate.margin)  # type: ignore[operator]


def _flags(kept: pd.DataFrame, context: pd.DataFrame, gate: ObservationGate) -> dict[str, np.ndarray]:
    columns = ["time", *SERIES, "value"]
    rows = pd.concat([kept[columns].assign(own=np.arange(len(kept))), context[columns].assign(own=-1)], ignore_index=True)
    series = pd.factorize(rows["platform_id"].astype("str") + "\x1f" + rows["trip_id"].astype("str").fillna(""), sort=True)[0]
    rows = rows.assign(series=series).sort_values(["series", "time"], kind="stable", ignore_index=True)
    flags = {name: np.full(len(kept), qc.NOT_EVALUATED, np.int8) for name in qc.FLAGS}
    for variable in np.unique(kept["variable"].to_numpy("U")):
        part = rows[rows["variable"] == variable]
        own = part["own"].to_numpy()
        time = _utc(part["time"])
        found = qc.series_flags(
            part["value"].to_numpy(), time, part["series"].to_numpy(), lexicon.lookup(variable), gate.tests(variable), gate.step
        )
        for name, flag in found.items():
            flags[name][own[own >= 0]] = flag[own >= 0]
    comes_and_goes = kept["trip_id"].notna() | ~kept["platform_id"].str.fullmatch(gate.fixed)
    flags["flag_gap"][comes_and_goes.to_numpy(bool)] = qc.NOT_EVALUATED  # silence means nothing there
    usable = flags["flag_gross_range"] != qc.FAIL
    flags["flag_neighbor"] = _neighbors(kept, usable, gate)
    if gate.ordering is not None:
        order = gate.ordering
        flags["flag_multi_variate"] = qc.ordering_flags(kept, order.variables, order.ratio, order.offset, usable)
    flags["flag_aggregate"] = qc.aggregate({name: flag for name, flag in flags.items() if name != "flag_aggregate"})
    return flags


def _neighbors(kept: pd.DataFrame, usable: np.ndarray, gate: ObservationGate) -> np.ndarray:
    flag = np.full(len(kept), qc.NOT_EVALUATED, np.int8)
    if isinstance(gate.neighbors, str):
        return flag
    time, value, latitude, longitude = _utc(kept["time"]), *(kept[name].to_numpy() for name in ("value", "latitude", "longitude"))
    for variable, checks in gate.neighbors.items():
        rows = np.flatnonzero((kept["variable"] == variable).to_numpy())
        rows = rows[np.argsort(time[rows], kind="stable")]
        flag[rows] = qc_spatial.neighbor_flags(np.where(usable, value, np.nan)[rows], time[rows], latitude[rows], longitude[rows], checks)
    return flag


def _utc(time: pd.Series) -> np.ndarray:
    """Plain datetime64 in UTC; `to_numpy` alone would make a Python object of every instant."""
    return time.dt.tz_localize(None).to_numpy("datetime64[us]")


def write_quarantine(rows: pd.DataFrame, path: Path) -> None:
    """Write held rows with all their columns and `reason`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pandas(rows, preserve_index=False).replace_schema_metadata(), path, compression="zstd")


def set_aside(path: Path, out: Path, reason: str) -> None:
    """Hold back a whole partition whose columns cannot be read as observations."""
    write_quarantine(pd.read_parquet(path).assign(reason=reason), out / "quarantine" / path.name)


def _summary(kept: pd.DataFrame, flags: Mapping[str, np.ndarray], held: pd.DataFrame) -> Checked:
    verdict = flags["flag_aggregate"]
    tests = pd.concat(
        [
            pd.DataFrame({"platform_id": kept["platform_id"], "test": name.removeprefix("flag_"), "flag": flag}).value_counts()
            for name, flag in flags.items()
        ]
    )
    platform = kept["platform_id"]
    daily = pd.DataFrame(
        {
            "platform_id": platform,
            "day": kept["time"].dt.floor("D"),
            "moving": kept["trip_id"].notna(),
            "n": 1,
            "suspect": verdict == qc.SUSPECT,
            "fail": verdict == qc.FAIL,
        }
    )
    place = kept.assign(moving=kept["trip_id"].notna()).groupby(["platform_id", "moving"], observed=True)
    return Checked(
        tests.rename("n").reset_index(),
        daily.groupby(["platform_id", "moving", "day"], observed=True).sum().reset_index(),
        place.agg(longitude=("longitude", "sum"), latitude=("latitude", "sum"), n=("value", "size")).reset_index(),
        held.head(EXAMPLES),
        len(held),
    )
