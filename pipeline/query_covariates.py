"""Query covariates: what is known of a question beside its place, the calendar of the local time and what is known ahead."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from models.contract import DatasetInfo

QUERY_COVARIATES = ("hour_sin", "hour_cos", "doy_sin", "doy_cos")


def query_covariate(info: DatasetInfo, time: np.ndarray, points: int, ahead: np.ndarray | None = None) -> Tensor | None:
    """info.query_covariates [B,S,points,F]: the calendar of the local time, see QUERY_COVARIATES, then what is known `ahead`, the context
    covariates [B,S,points,F] of the reports asked for. Raises ValueError where those are needed and there is no report."""
    if not info.query_covariates:
        return None
    cycles = tuple(name for name in info.query_covariates if name in QUERY_COVARIATES)
    known = info.query_covariates[len(cycles) :]
    date = torch.from_numpy(calendar(replace(info, query_covariates=cycles), time).astype(np.float32))
    date = date[:, :, None].expand(-1, -1, points, -1)
    if not known:
        return date
    if ahead is None or known != info.context_covariates:
        raise ValueError(f"{info.name} gives {', '.join(known)} with each question: only reports of its fixed sensors can be asked")
    return torch.cat([date, torch.from_numpy(ahead)], -1)


def calendar(info: DatasetInfo, time: np.ndarray) -> np.ndarray:
    """info.query_covariates (...,F) at `time` (...) in hours since info.time_origin: sine and cosine of local hour and day of year."""
    if not info.query_covariates:
        return np.zeros((*time.shape, 0))
    if info.time_unit != "h":
        raise ValueError(f"query covariates {info.query_covariates} cannot be computed from time in {info.time_unit!r}")
    local = time + info.utc_offset
    origin = np.datetime64(info.time_origin.removesuffix("Z"), "m")
    date = origin + np.round(local * 60).astype("timedelta64[m]")
    day = (date - date.astype("M8[Y]")).astype(np.float64) / 1440
    midnight = (origin - origin.astype("M8[D]")).astype(np.float64) / 60
    angle = {"hour": 2 * np.pi * (local + midnight) / 24, "doy": 2 * np.pi * day / 365.2425}
    parts = [name.split("_") for name in info.query_covariates]
    return np.stack([(np.sin if kind == "sin" else np.cos)(angle[cycle]) for cycle, kind in parts], axis=-1)
