"""Beijing multi-site air quality (UCI 501, doi 10.24432/C5RK5G): 12 stations, hourly, March 2013 to February 2017.

Files `PRSA_Data_STATION_FIRST_LAST.csv`, plain, gzipped or in the official zip in a zip: year, month, day, hour as local time without a
zone, pollutants in ug m-3, weather, the station's name, which is the platform_id. Zone (UTC+8) and which end of the hour is labelled are
not stated. Weather is copied from the nearest weather station, so several sites share it. Values at a cap (PM10 999, CO 10000) stay for
quality control, as do hours with PM2.5 above PM10.
"""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import members, tables
from pipeline.raw import Drop, Remote, read_manifest

_UCI = "https://archive.ics.uci.edu/static/public/501"
DROP = Drop(
    licence="CC-BY-4.0",
    attribution="Beijing Multi-Site Air Quality, S. Chen, UCI Machine Learning Repository, doi 10.24432/C5RK5G",
    page="https://archive.ics.uci.edu/dataset/501/beijing+multi+site+air+quality+data",
    mirror=("PRSA_Data_*.csv*", "PRSA*.zip", "stations.csv"),
    official=(Remote("PRSA2017_Data.zip", f"{_UCI}/beijing+multi+site+air+quality+data.zip"),),
)

# Longitude, latitude. The official archive has no coordinates: these are the stations of the same names in the Urban Air project's list.
# A file stations.csv in the drop (station, latitude, longitude) is used in their place.
STATIONS = {
    "Aotizhongxin": (116.3974, 39.982053),
    "Changping": (116.23, 40.216999),
    "Dingling": (116.22, 40.292),
    "Dongsi": (116.416883, 39.929287),
    "Guanyuan": (116.351029, 39.929302),
    "Gucheng": (116.184239, 39.914409),
    "Huairou": (116.628, 40.328),
    "Nongzhanguan": (116.460742, 39.937119),
    "Shunyi": (116.655, 40.127),
    "Tiantan": (116.407355, 39.886491),
    "Wanliu": (116.287451, 39.987313),
    "Wanshouxigong": (116.351974, 39.878193),
}
# short name -> column, factor, offset from the source's unit to the lexicon's
SCALED = {
    "pm2p5": ("PM2.5", 1.0, 0.0),
    "pm10": ("PM10", 1.0, 0.0),
    "so2": ("SO2", 1.0, 0.0),
    "no2": ("NO2", 1.0, 0.0),
    "co": ("CO", 1.0, 0.0),
    "o3": ("O3", 1.0, 0.0),
    "t2m": ("TEMP", 1.0, 273.15),
    "d2m": ("DEWP", 1.0, 273.15),
    "sp": ("PRES", 100.0, 0.0),
    "tp": ("RAIN", 1e-3, 0.0),
}
# where the wind comes from, 22.5 degrees apart
COMPASS = ("N", "NNE", "NE", "ENE", "E", "ESE", "SE", "SSE", "S", "SSW", "SW", "WSW", "W", "WNW", "NW", "NNW")
ALONGSIDE = ("stations.csv",)
MEMBER = re.compile(r"PRSA_Data_[^/]*_(?P<first>\d{8})-(?P<last>\d{8})\.csv(\.gz)?$")
Variable = Literal["pm2p5", "pm10", "so2", "no2", "co", "o3", "t2m", "d2m", "sp", "tp", "u10", "v10"]


class Params(tables.Params):
    source: Literal["beijing"]
    variables: tuple[Variable, ...] = tuple(get_args(Variable))
    zone: str = "Asia/Shanghai"
    region: tuple[float, float, float, float] | None = (115.0, 39.0, 118.0, 41.5)


def partitions(params: Params, raw: Path) -> list[tables.Partition]:
    """A local year each, fed by every file whose name spans it."""
    spans = {}
    for member in (member for name in sorted(read_manifest(raw).files) for member in members.members(raw, name)):
        if match := MEMBER.search(member):
            spans[member] = (pd.Timestamp(match["first"]), pd.Timestamp(match["last"]) + pd.Timedelta(days=1))
    found = []
    for year in sorted({year for first, last in spans.values() for year in range(first.year, (last - pd.Timedelta(hours=1)).year + 1)}):
        feeding = [m for m, (first, last) in spans.items() if first < pd.Timestamp(year + 1, 1, 1) and last > pd.Timestamp(year, 1, 1)]
        start, end = min(spans[m][0] for m in feeding), max(spans[m][1] for m in feeding)
        whole = tables.Partition.of(str(year), params.zone, feeding)
        found.append(whole.within(*(edge.tz_localize(params.zone).tz_convert("UTC") for edge in (start, end))))
    return found


def columns(params: Params) -> dict[str, pa.DataType]:
    scaled = {SCALED[v][0]: pa.float64() for v in params.variables if v in SCALED}
    wind = {"wd": pa.string(), "WSPM": pa.float64()} if {"u10", "v10"} & set(params.variables) else {}
    return {**dict.fromkeys(("year", "month", "day", "hour"), pa.int32()), **scaled, **wind, "station": pa.string()}


def rows(params: Params, raw: Path, member: str, table: pa.Table) -> tables.Rows:
    parts = pd.DataFrame({name: table[name].to_numpy() for name in ("year", "month", "day", "hour")})
    local = pd.to_datetime(parts, errors="coerce").where(parts["hour"].between(0, 23)).to_numpy().astype("M8[us]")
    utc = tables.local_to_utc(local, params.zone)
    platform = table["station"].combine_chunks().dictionary_encode()
    known = stations(raw)
    places = np.array([known.get(name, (np.nan, np.nan)) for name in platform.dictionary.to_pylist()] + [(np.nan, np.nan)])
    longitude, latitude = places[platform.indices.fill_null(len(platform.dictionary)).to_numpy(zero_copy_only=False)].T
    valid = platform.is_valid().to_numpy(zero_copy_only=False)
    problems = [
        (np.isnat(local), "year, month, day and hour make no time"),
        tables.unclear_local_time(local, utc, params.zone),
        (valid & np.isnan(longitude), f"unknown station; coordinates are known of {', '.join(known)}"),
    ]
    values: dict[str, np.ndarray] = {
        v: tables.floats(table, SCALED[v][0]) * SCALED[v][1] + SCALED[v][2] for v in params.variables if v in SCALED
    }
    if "wd" in table.column_names:
        u, v, odd = wind(table["wd"].combine_chunks(), tables.floats(table, "WSPM"))
        values |= {"u10": u, "v10": v}
        problems.append((odd, f"wd is none of {' '.join(COMPASS)}"))
    return tables.Rows(utc, platform, longitude, latitude, values, problems)


def wind(direction: pa.Array, speed: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """16-point text of where the wind comes from, speed in m s-1 -> eastward and northward wind, and which texts are no direction."""
    point = pc.index_in(direction, pa.array(list(COMPASS))).cast(pa.float64()).to_numpy(zero_copy_only=False)
    angle = np.radians(22.5 * point)
    odd = np.isnan(point) & direction.is_valid().to_numpy(zero_copy_only=False)
    return -speed * np.sin(angle), -speed * np.cos(angle), odd


def stations(raw: Path) -> dict[str, tuple[float, float]]:
    """Station -> (longitude, latitude): of stations.csv in the drop, or those known here."""
    path = raw / "stations.csv"
    if not path.is_file():
        return STATIONS
    with path.open(encoding="utf-8", newline="") as stream:
        try:
            return {row["station"]: (float(row["longitude"]), float(row["latitude"])) for row in csv.DictReader(stream)}
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{path}: expected columns station, latitude, longitude with numbers, found {error}") from None
