"""AirDelhi (IIT Delhi, CC BY 4.0): PM from low-cost sensors on buses in Delhi, 2020-11-01 to 2021-01-30, in two structures.

    raw     one file a local day, `YYYY-MM-DD_all*.csv`: uid, dateTime with its offset, deviceId, lat, long, pm1_0, pm2_5, pm10 every 2-3 s.
            platform_id is the deviceId; trips are cut at pauses over 5 minutes and jumps over 1 km, and at local midnight.
    grid    tables of 1 km x 1 h means on Hugging Face: dateTime, lat, long (the cell's lower left corner), pressure, temperature,
            humidity, pm.. Nothing says which bus measured, so each cell is a pseudo-station `cell:ROW,COLUMN` at its centre.

Structures are told apart by the header, so both may lie in one drop. Temperature and humidity are those inside a warm housing (about 14 K
above the air): no variable of the lexicon, so they are not ingested. Which end of the grid's hour is labelled is not stated.
"""

from __future__ import annotations

import re
from datetime import date, timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
from pydantic import model_validator

from pipeline import delimited, members, tables
from pipeline.raw import Drop, Remote, read_manifest

_HUGGING_FACE = "https://huggingface.co/datasets/sachin-iitd/DelhiPollDataset/resolve/main"
DROP = Drop(
    licence="CC-BY-4.0",
    attribution="Delhi Pollution Dataset (AirDelhi), IIT Delhi",
    page="https://www.cse.iitd.ac.in/pollutiondata/delhi",
    mirror=("*_all*.csv", "*_all*.csv.gz", "*.zip", "train.csv*", "test.csv*", "hf_grid*.csv*"),
    official=(
        Remote("train.csv", f"{_HUGGING_FACE}/train.csv"),
        Remote("test.csv", f"{_HUGGING_FACE}/test.csv"),
        # the day files of November and December as MobilityDB keeps them; the official site hands them out by a page only
        Remote("Delhi_Pollution_2020-Nov-Dec.zip", "https://docs.mobilitydb.com/pub/Delhi_Pollution_2020-Nov-Dec.zip", optional=True),
    ),
)

TIME = pa.timestamp("us", "UTC")
COLUMNS = {"pm1": "pm1_0", "pm2p5": "pm2_5", "pm10": "pm10", "sp": "pressure"}
ORIGIN, STEP = (77.1, 28.48), (0.0102, 0.009)  # degrees east, north; steps of about 1 km
DAY = re.compile(r"(\d{4}-\d{2}-\d{2})_all[^/]*\.csv(\.gz)?$")


class Params(tables.Params):
    source: Literal["airdelhi"]
    structure: Literal["raw", "grid"]
    variables: tuple[Literal["pm1", "pm2p5", "pm10", "sp"], ...] = ("pm1", "pm2p5", "pm10")
    zone: str = "Asia/Kolkata"
    region: tuple[float, float, float, float] | None = (76.5, 28.0, 78.0, 29.2)
    period: tuple[date, date] = (date(2020, 11, 1), date(2021, 1, 30))  # of the campaign, local days; both belong to it

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_the_structure(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("structure") == "raw":
            return {"label": "instant", "trips": {}, **given}
        return given

    @model_validator(mode="after")
    def _pressure_is_in_the_grid_only(self) -> Params:
        if self.structure == "raw" and "sp" in self.variables:
            raise ValueError("the raw files have no pressure: leave `sp` out, or take structure: grid")
        return self


def partitions(params: Params, raw: Path) -> list[tables.Partition]:
    """Raw: a local day each, from the files of that day. Grid: a local month each, from all grid tables."""
    found = [member for name in sorted(read_manifest(raw).files) for member in members.members(raw, name)]
    fitting = [member for member in found if ".csv" in member and structure(raw, member) == params.structure]
    first, last = params.period
    start, end = (pd.Timestamp(day).tz_localize(params.zone).tz_convert("UTC") for day in (first, last + timedelta(days=1)))
    if params.structure == "grid":
        months = pd.period_range(first, last, freq="M")
        return [tables.Partition.of(str(month), params.zone, fitting).within(start, end) for month in months] if fitting else []
    days: dict[str, list[str]] = {}
    for member in fitting:
        if match := DAY.search(member):
            days.setdefault(match[1], []).append(member)
        else:
            raise ValueError(f"{raw / member}: expected a name like 2021-01-30_all.csv, since a raw file belongs to one local day")
    return [tables.Partition.of(day, params.zone, feeding) for day, feeding in sorted(days.items())]


def structure(raw: Path, member: str) -> str:
    """`raw` or `grid`, by the header; a header that fits neither counts as raw when the name is that of a day file, else as grid."""
    try:
        with members.opened(raw, member) as stream:
            names = stream.readline(delimited.LINE_BYTES).decode("utf-8-sig", "replace")
    except members.BROKEN:
        names = ""
    if "deviceId" in names or "pressure" in names:
        return "raw" if "deviceId" in names else "grid"
    return "raw" if DAY.search(member) else "grid"


def columns(params: Params) -> dict[str, pa.DataType]:
    who = {"deviceId": pa.string()} if params.structure == "raw" else {}
    return {"dateTime": TIME, **who, "lat": pa.float64(), "long": pa.float64(), **{COLUMNS[v]: pa.float64() for v in params.variables}}


def rows(params: Params, raw: Path, member: str, table: pa.Table) -> tables.Rows:
    time = table["dateTime"].to_numpy().astype("M8[us]")
    longitude, latitude = tables.floats(table, "long"), tables.floats(table, "lat")
    values: dict[str, np.ndarray] = {
        v: tables.floats(table, COLUMNS[v]) * (100.0 if v == "sp" else 1.0) for v in params.variables
    }  # hPa -> Pa
    if params.structure == "raw":
        return tables.Rows(time, table["deviceId"].combine_chunks().dictionary_encode(), longitude, latitude, values)
    column, off_x = _snapped(longitude, ORIGIN[0], STEP[0])
    row, off_y = _snapped(latitude, ORIGIN[1], STEP[1])
    platform = tables.named(row * 10_000 + column, lambda code: f"cell:{(code + 5000) // 10_000},{(code + 5000) % 10_000 - 5000}")
    centre = (longitude + STEP[0] / 2, latitude + STEP[1] / 2)
    problems = [((off_x | off_y) & np.isfinite(longitude + latitude), "the position is no corner of the 1 km grid")]
    return tables.Rows(time, platform, *centre, values, problems)


def _snapped(value: np.ndarray, origin: float, step: float) -> tuple[np.ndarray, np.ndarray]:
    """Index of the grid line at a coordinate (rounded: truncation errs by one), and where there is none within a hundredth of a step."""
    exact = np.nan_to_num((value - origin) / step)
    index = np.clip(np.rint(exact), -4000, 4000)
    return index.astype("i8"), np.abs(exact - index) > 0.01
