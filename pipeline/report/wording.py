"""Numbers, times and names as people read them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from pipeline import cube, lexicon
from pipeline.scores import Table
from pipeline.sensors import SensorDataset


def variable_name(name: str) -> str:
    return lexicon.VARIABLES[name].long_name if name in lexicon.VARIABLES else name


def number(value: float) -> str:
    """Three digits, without an exponent where one can do without."""
    if not np.isfinite(value):
        return "–"
    if value == 0 or 1e-4 <= abs(value) < 1e5:
        digits = 2 - int(np.floor(np.log10(abs(value)))) if value else 2
        return f"{value:.{max(0, min(digits, 6))}f}"
    return f"{value:.2e}"


def percent(skill: float) -> str:
    """A skill as people read it: percent, or how many times as large where it is more than twice."""
    if not np.isfinite(skill):
        return "–"
    return (
        f"{100 * skill:+.0f} %".replace("-0 %", "0 %").replace("+0 %", "0 %")
        if skill > -1
        else f"×{1 - skill:.1f}"
        if skill > -9
        else f"×{1 - skill:,.0f}"
    )


def span(row: Mapping[Any, Any]) -> str:
    return "" if pd.isna(row["low"]) else f"{percent(row['low'])} to {percent(row['high'])}"


def amount(number: float, unit: str) -> str:
    return f"{number:g} of model time" if unit == "1" else f"{number:g} {unit}"


def moment(time: Any) -> str:
    return f"{float(time):g}" if np.asarray(time).dtype.kind == "f" else str(np.datetime64(time, "m")).replace("T", " ")


def origin(dataset: SensorDataset, frame: int) -> str:
    time = cube.to_time(dataset.info, np.asarray(dataset["frame/time"])[[frame]])[0]
    return moment(time) + (" UTC" if cube.is_calendar(dataset.info) else "")


def lead_name(dataset: SensorDataset, lead: Any) -> str:
    if np.asarray(lead).dtype.kind == "m":
        return f"+{lead / np.timedelta64(3600, 's'):g} h"
    return f"lead {float(lead):g}"


def lead_text(table: Table, lead: float) -> str:
    return f"{lead:g} {table.about['time_unit']}" if table.about["time_unit"] != "1" else f"lead {lead:g}"


def unit_text(unit: str) -> str:
    """A unit as people write it; "" for a number without one."""
    written = {"1": "", "ug m-3": "µg/m³", "(ug m-3)2": "(µg/m³)²", "(K)2": "K²", "m s-1": "m/s", "W m-2": "W/m²"}
    return written.get(unit, unit)
