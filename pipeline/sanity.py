"""The sanity gate: may this forecast be published? Every reason against it is named, and the clock comes in as an argument."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from pydantic import Field

from models.contract import DatasetInfo
from pipeline import cube as cubes
from pipeline import lexicon
from pipeline.params import Section


class Limits(Section):
    """What a forecast must satisfy; part of the `publish` params of each dataset."""

    max_age_hours: float | None = Field(default=None, gt=0)
    """Oldest admissible input; None for archives and simulations, which are always old."""
    min_sensor_share: float = Field(default=0.5, ge=0, le=1)  # of the usual network, in the last context frame
    max_deviation: float = Field(default=25.0, gt=0)
    """Training standard deviations from the training mean; stops a diverged run of a variable without physical limits."""


def refusals(cube: xr.Dataset, stations: xr.Dataset | None, summary: Mapping[str, Any], limits: Limits, now: datetime) -> list[str]:
    """Every reason not to publish a forecast; empty if there is none.

    `summary` is forecast.json, `now` a time with a zone.
    """
    reasons = cubes.check(cube)
    if reasons:
        return reasons
    if len(cube["lead_time"]) != summary["leads"]:
        reasons.append(f"{summary['leads'] - len(cube['lead_time'])} of {summary['leads']} leads are missing")
    info = DatasetInfo.from_json(summary["info"])
    for dataset, where in ((cube, "the grid"), (stations, "the stations")):
        if dataset is not None:
            for name in cubes.variables(dataset):
                reasons += [f"{name} on {where}: {reason}" for reason in _values(dataset[name], name, info, limits)]
    for name in cubes.variables(cube):
        reasons += [f"{name}: {reason}" for reason in _constant(cube[name])]
    if not np.isfinite(cube["distance_to_sensor"].values).all():
        reasons.append("distance_to_sensor is not finite: a run had no observation in its last frame")
    reasons += _age(cube["init_time"].values, limits.max_age_hours, now)
    for run in summary["runs"]:
        used, expected = run["sensors_used"], run["sensors_expected"]
        if used < limits.min_sensor_share * expected:
            reasons.append(
                f"run of {run['init_time']}: {used} of the usual {expected} observations in the last frame, "
                f"the least allowed share is {limits.min_sensor_share:g}"
            )
    return reasons


def _values(array: xr.DataArray, name: str, info: DatasetInfo, limits: Limits) -> list[str]:
    values = array.values
    finite = np.isfinite(values)
    reasons = []
    if not finite.all():
        reasons.append(f"{int((~finite).sum())} of {values.size} values are not finite, first at {_where(array, ~finite)}")
    channel = info.variables.index(name)
    spread = limits.max_deviation * info.std[channel]
    bounds = {
        "physical range": lexicon.lookup(name).fail,
        f"range of {limits.max_deviation:g} training standard deviations": (info.mean[channel] - spread, info.mean[channel] + spread),
    }
    for what, (low, high) in bounds.items():
        outside = finite & ((values < (-np.inf if low is None else low)) | (values > (np.inf if high is None else high)))
        if outside.any():
            found = f"{values[outside].min():g}..{values[outside].max():g}"
            reasons.append(f"{int(outside.sum())} values outside the {what} {low}..{high} {array.attrs['units']}, found {found}")
    if "quantile" in array.dims:
        crossing = np.diff(values, axis=array.dims.index("quantile")) < 0
        if crossing.any():
            reasons.append(f"{int(crossing.sum())} quantiles cross: a higher level has a lower value")
    return reasons


def _constant(array: xr.DataArray) -> list[str]:
    middle = array.sel(quantile=0.5) if "quantile" in array.dims else array
    flat = (middle.max(("y", "x")) - middle.min(("y", "x"))).values == 0
    if not flat.any():
        return []
    return [f"the field is constant in space at {int(flat.sum())} of {flat.size} leads, first at lead {int(np.argwhere(flat)[0][1])}"]


def _age(init_time: np.ndarray, max_age_hours: float | None, now: datetime) -> list[str]:
    if now.tzinfo is None:
        raise ValueError(f"now must have a time zone, found {now.isoformat()}")
    if init_time.dtype.kind != "M":
        return [] if max_age_hours is None else ["max_age_hours is set, but a simulation has no calendar: set it to null"]
    newest = pd.Timestamp(init_time.max()).to_pydatetime().replace(tzinfo=UTC)
    age = now - newest
    if age < timedelta(0):
        return [f"init_time {newest.isoformat()} lies in the future of {now.isoformat()}"]
    if max_age_hours is not None and age > timedelta(hours=max_age_hours):
        return [
            f"stale input: init_time {newest.isoformat()} is {age.total_seconds() / 3600:.1f} h old, at most {max_age_hours:g} h allowed"
        ]
    return []


def _where(array: xr.DataArray, mask: np.ndarray) -> str:
    first = np.argwhere(mask)[0]
    return ", ".join(f"{dim} {index}" for dim, index in zip(array.dims, first, strict=True))
