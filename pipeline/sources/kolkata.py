"""Kolkata (IIT Delhi, CC BY 4.0): hourly PM2.5 of fixed low-cost sensors and, averaged per cell of 0.01 degrees, of sensors on buses.

Files `Static_SEASON.csv` and `Mobile_SEASON.csv`: lat, long (2 decimals), time as month/day/year without a zone, pm. Nothing says which bus
measured, so a cell is a pseudo-station: platform_id is `static:LAT,LON` or `mobile:LAT,LON`. Sites are told apart by place, since their
list has the id S21 twice. The zone is not stated (buses rest at 00-04 h, which fits India), nor which end of the hour is labelled.
Outliers (1775.85 on 2023-10-31) are no codes and stay; quality control judges them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline import members, tables
from pipeline.raw import Drop, Remote, read_manifest

SEASONS = {"Spring": ("2023-03-27", "2023-04-28"), "Autumn": ("2023-09-15", "2023-11-01"), "Winter": ("2023-12-01", "2024-02-01")}
Kind = Literal["static", "mobile"]
KINDS: tuple[Kind, ...] = ("static", "mobile")
_NAMES = tuple(f"{kind.title()}_{season}.csv" for kind in KINDS for season in SEASONS)
_REPOSITORY = "https://raw.githubusercontent.com/sachin-iitd/KolkataDataset/7f6834a5b97de5630949a7436283d7ec91aa8152"
DROP = Drop(
    licence="CC-BY-4.0",
    attribution="Kolkata Pollution Dataset, IIT Delhi",
    page="http://cse.iitd.ac.in/pollutiondata/kolkata",
    mirror=("Static_*.csv*", "Mobile_*.csv*"),
    official=tuple(Remote(name, f"{_REPOSITORY}/{name}") for name in _NAMES),
)

FORMAT = "%m/%d/%Y %H:%M"
MEMBER = re.compile(r"(?P<kind>Static|Mobile)_(?P<season>\w+)\.csv(\.gz)?$")


class Params(tables.Params):
    source: Literal["kolkata"]
    kinds: tuple[Kind, ...] = Field(default=KINDS, min_length=1)
    variables: tuple[Literal["pm2p5"], ...] = ("pm2p5",)
    zone: str = "Asia/Kolkata"
    region: tuple[float, float, float, float] | None = (88.0, 22.2, 88.8, 23.0)


def partitions(params: Params, raw: Path) -> list[tables.Partition]:
    """A local month each, fed by the files of its season; months a season touches."""
    feeding: dict[str, list[str]] = {}
    for member in (member for name in sorted(read_manifest(raw).files) for member in members.members(raw, name)):
        match = MEMBER.search(member)
        if match and match["season"] not in SEASONS:
            raise ValueError(f"{raw / member}: unknown season {match['season']!r}, expected {', '.join(SEASONS)}")
        if match and match["kind"].lower() in params.kinds:
            feeding.setdefault(match["season"], []).append(member)
    found = []
    for season, names in feeding.items():
        first, last = (pd.Timestamp(day) for day in SEASONS[season])
        start, end = (day.tz_localize(params.zone).tz_convert("UTC") for day in (first, last + pd.Timedelta(days=1)))
        months = pd.period_range(first, last, freq="M")
        found += [tables.Partition.of(str(month), params.zone, names).within(start, end) for month in months]
    return sorted(found, key=lambda partition: partition.name)


def columns(params: Params) -> dict[str, pa.DataType]:
    return {"lat": pa.float64(), "long": pa.float64(), "time": pa.string(), "pm": pa.float64()}


def rows(params: Params, raw: Path, member: str, table: pa.Table) -> tables.Rows:
    match = MEMBER.search(member)
    assert match, member
    text = table["time"].combine_chunks()
    local = pc.strptime(text, format=FORMAT, unit="us", error_is_null=True).to_numpy(zero_copy_only=False).astype("M8[us]")
    utc = tables.local_to_utc(local, params.zone)
    latitude, longitude = np.round(tables.floats(table, "lat"), 2), np.round(tables.floats(table, "long"), 2)
    place = np.rint(np.nan_to_num(latitude) * 100).astype("i8") * 100_000 + np.rint(np.nan_to_num(longitude) * 100).astype("i8")
    kind = match["kind"].lower()
    platform = tables.named(place, lambda code: f"{kind}:{code // 100_000 / 100:.2f},{code % 100_000 / 100:.2f}")
    unread = np.isnat(local) & text.is_valid().to_numpy(zero_copy_only=False)
    problems = [(unread, "the time is not month/day/year hour:minute"), tables.unclear_local_time(local, utc, params.zone)]
    return tables.Rows(utc, platform, longitude, latitude, {"pm2p5": tables.floats(table, "pm")}, problems)
