"""The map page: one self-contained HTML file that shows a forecast, offline. Values are quantised to 16 bits over their range."""

from __future__ import annotations

import base64
import gzip
import json
from pathlib import Path
from typing import Any, Protocol

import jinja2
import matplotlib
import numpy as np
import pandas as pd
import xarray as xr
from markupsafe import Markup
from scipy.spatial import cKDTree

from models.contract import DatasetInfo
from pipeline import cube as cubes
from pipeline import geometry, lexicon

_LEVELS = 65535
# Light to dark for amounts, diverging around zero for signed quantities, cold to warm for temperature.
_COLOURS = {"ug m-3": ("magma_r", 0.03, 0.84), "K": ("RdYlBu_r", 0.04, 0.96)}
_SIGNED = ("vorticity", "u10", "v10")
_DIVERGING, _AMOUNT, _WIDTH = ("RdBu_r", 0.03, 0.97), ("viridis", 0.0, 1.0), ("BuPu", 0.05, 1.0)


class Texts(Protocol):
    """What the page says about the forecast (pipeline/publish.py: Params)."""

    title: str
    license: str
    attribution: str
    max_age_hours: float | None


def render(forecast: Path, texts: Texts, published_at: str) -> str:
    """The page of the last run in a forecast folder."""
    cube, stations = cubes.read_folder(forecast)
    summary = json.loads((forecast / "forecast.json").read_text(encoding="utf-8"))
    observed = pd.read_parquet(forecast / "sensors.parquet")
    data = payload(cube, stations, observed, summary)
    data |= {"published_at": published_at, "archive": texts.max_age_hours is None}
    environment = jinja2.Environment(loader=jinja2.PackageLoader("pipeline"), autoescape=True, undefined=jinja2.StrictUndefined)
    text = Markup(json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"))
    return environment.get_template("map.html").render(texts=texts, data=text, model=summary["model"])


def payload(cube: xr.Dataset, stations: xr.Dataset | None, observed: pd.DataFrame, summary: dict[str, Any]) -> dict[str, Any]:
    """What the page's script reads, as JSON types. Rows of grids run from south to north, times are epoch seconds or model time."""
    info = DatasetInfo.from_json(summary["info"])
    last = cube.isel(init_time=-1)
    own = observed[observed["init_time"] == last["init_time"].values]
    run = summary["runs"][-1]
    geographic = "latitude" in cube.coords
    return {
        "calendar": cubes.is_calendar(info),
        "geographic": geographic,
        "torus": info.geometry == "torus",
        "utc_offset": info.utc_offset,
        "position_unit": info.position_unit,
        "init": _seconds(last["init_time"].values),
        "valid": [_seconds(time) for time in last["valid_time"].values],
        "sensors_used": run["sensors_used"],
        "sensors_expected": run["sensors_expected"],
        "space": _space(last, geographic),
        "variables": [_variable(last, name, own) for name in cubes.variables(cube)],
        "distance": _packed(last["distance_to_sensor"].values),
        "support": support_radius(own, info),
        "sensors": _sensors(own, stations.isel(init_time=-1) if stations is not None else None, summary["sensor_names"], geographic),
    }


def support_radius(observed: pd.DataFrame, info: DatasetInfo) -> float:
    """How far a forecast is taken to rest on sensors: one and a half times the widest usual distance
    (90th percentile) between neighbours in the last frame."""
    seen = observed[(observed["lead"] == 0) & (observed["role"] == 0)].drop_duplicates(["x", "y"])[["x", "y"]].to_numpy()
    if len(seen) < 2:
        return info.half_extent
    return float(1.5 * np.quantile(cKDTree(seen).query(seen, k=2)[0][:, 1], 0.9))


def _variable(last: xr.Dataset, name: str, observed: pd.DataFrame) -> dict[str, Any]:
    variable, array = lexicon.lookup(name), last[name]
    levels = [float(level) for level in last["quantile"].values] if "quantile" in array.dims else []
    values = array.values if levels else array.values[:, None]  # [lead, level, y, x]
    measured = observed.loc[(observed["variable"] == name) & (observed["lead"] <= 0), "value"].to_numpy()
    signed = name in _SIGNED
    low, high = np.quantile(np.concatenate([values.ravel(), measured]), [0.01, 0.995])
    if signed:
        low, high = -max(abs(low), abs(high)), max(abs(low), abs(high))
    elif values.min() >= 0 and low < 0.25 * high:
        low = 0.0
    palette = _DIVERGING if signed else _COLOURS.get(variable.unit, _AMOUNT)
    width = values[:, -1] - values[:, 0]
    narrow, wide = np.quantile(width, [0.01, 0.995])
    return {
        "name": name,
        "label": variable.long_name,
        "unit": "" if variable.unit == "1" else variable.unit.replace("ug m-3", "µg/m³").replace("m s-1", "m/s").replace("W m-2", "W/m²"),
        "levels": levels,
        "grid": _packed(values),
        "range": _rounded(float(low), float(high)),
        "width_range": _rounded(float(min(narrow, 0.5 * wide)), float(wide)),
        "colours": _table(palette),
        "width_colours": _table(_WIDTH),
    }


def _sensors(observed: pd.DataFrame, stations: xr.Dataset | None, names: list[str], geographic: bool) -> list[dict[str, Any]]:
    """One entry a fixed sensor, and one a moving observation of the last frame; what came after init_time was not seen by the model."""
    horizontal, vertical = ("longitude", "latitude") if geographic else ("x", "y")
    result = []
    groups = observed.assign(group=np.where(observed["sensor"] < 0, -1 - observed.groupby("variable").cumcount(), observed["sensor"]))
    for _, rows in groups.groupby("group", sort=True):
        first = rows.iloc[0]
        series = {}
        for name, own in rows.groupby("variable", sort=True):
            ordered = own.sort_values("lead")
            series[str(name)] = [
                [_seconds(t), float(f"{v:.6g}")] for t, v in zip(ordered["time"].to_numpy(), ordered["value"], strict=True)
            ]
        entry: dict[str, Any] = {
            "id": int(first["sensor"]),
            "role": int(first["role"]),
            "at": [float(f"{first[horizontal]:.7g}"), float(f"{first[vertical]:.7g}")],
            "series": series,
        }
        if stations is not None and int(first["sensor"]) >= 0:
            entry["name"] = names[int(first["sensor"])]
            one = stations.isel(station=int(first["sensor"]))
            entry["forecast"] = {
                name: [[float(f"{v:.5g}") for v in np.atleast_1d(row)] for row in one[name].values] for name in cubes.variables(stations)
            }
        result.append(entry)
    return result


def _space(last: xr.Dataset, geographic: bool) -> dict[str, Any]:
    """Cell edges of the regular grid, and how long a unit of each axis is (km a degree; 1 in model units)."""
    x, y = (last[name].values.astype("f8") for name in (("longitude", "latitude") if geographic else ("x", "y")))
    half_x, half_y = (float(np.diff(axis).mean()) / 2 for axis in (x, y))
    km = float(np.pi / 180 * geometry.EARTH_RADIUS)
    length = [km * float(np.cos(np.deg2rad(y.mean()))), km] if geographic else [1.0, 1.0]
    edges = {"x": [float(x[0]) - half_x, float(x[-1]) + half_x], "y": [float(y[0]) - half_y, float(y[-1]) + half_y]}
    return {**edges, "columns": len(x), "rows": len(y), "length": length}


def _packed(values: np.ndarray) -> dict[str, Any]:
    """uint16 codes of an array, gzipped, in base64: value = low + code * step."""
    low, high = float(values.min()), float(values.max())
    step = (high - low) / _LEVELS or 1.0
    codes = np.rint((values.astype("f8") - low) / step).astype("<u2")
    return {"low": low, "step": step, "data": base64.b64encode(gzip.compress(codes.tobytes(), mtime=0)).decode()}


def _table(palette: tuple[str, float, float]) -> str:
    """256 colours of a Matplotlib colour map as one hex string."""
    name, start, stop = palette
    colours = matplotlib.colormaps[name](np.linspace(start, stop, 256))[:, :3]
    return np.rint(255 * colours).astype("u1").tobytes().hex()


def _rounded(low: float, high: float) -> list[float]:
    """A range that ends at round numbers, never empty."""
    if high <= low:
        high = low + (abs(low) or 1.0)
    step = 10.0 ** np.floor(np.log10((high - low) / 4))
    return [float(np.floor(low / step) * step), float(np.ceil(high / step) * step)]


def _seconds(time: Any) -> float:
    """Epoch seconds of a datetime64, or the model time itself."""
    value = np.asarray(time)
    return float(value.astype("M8[s]").astype("i8")) if value.dtype.kind == "M" else float(value)
