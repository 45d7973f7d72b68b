"""The frames that forecasts start from, and how many observations one of them has, beside how many are usual."""

from __future__ import annotations

import numpy as np
import pandas as pd

from pipeline import cube
from pipeline import sensors as sensor_data
from pipeline.sensors import SensorDataset


def initial_frames(dataset: SensorDataset, init: str | list[int | str]) -> list[int]:
    """Frame numbers to forecast from, in time order; a frame that does not exist is an error."""
    if init == "last":
        return [int(np.flatnonzero(context_counts(dataset))[-1])]
    if init == "case":
        cases = np.asarray(dataset["cases/frame"])[np.asarray(dataset["cases/split"]) == sensor_data.TEST]
        if not len(cases):
            raise ValueError("init is 'case', but the dataset has no test case: use 'last' or frame numbers")
        return [int(cases[-1])]
    return sorted({_frame(dataset, one) for one in init}, key=lambda frame: float(dataset["frame/time"][frame]))


def _frame(dataset: SensorDataset, wanted: int | str) -> int:
    time = np.asarray(dataset["frame/time"])
    if isinstance(wanted, int):
        if not 0 <= wanted < len(time):
            raise ValueError(f"init frame {wanted} does not exist: the dataset has frames 0..{len(time) - 1}")
        return wanted
    if not cube.is_calendar(dataset.info):
        raise ValueError(f"init {wanted!r}: {dataset.info.name} has no calendar, give a frame number")
    known = cube.to_time(dataset.info, time)
    moment = pd.Timestamp(wanted)
    exact = np.datetime64(moment.tz_convert("UTC").tz_localize(None) if moment.tzinfo else moment, "s")
    match = np.flatnonzero(known == exact)
    if not len(match):
        nearest = known[np.argmin(np.abs(known - exact))]
        raise ValueError(
            f"init {wanted}: no frame at this time (UTC), the nearest is {nearest}Z, the dataset spans {known[0]}Z..{known[-1]}Z"
        )
    return int(match[0])


def context_counts(dataset: SensorDataset) -> np.ndarray:
    """[M] observations in each frame that a model may see as context."""
    visible = np.ones(len(dataset["obs/sensor"]), bool)
    if dataset.info.n_sensors:
        sensor = np.asarray(dataset["obs/sensor"])
        visible = (sensor < 0) | (np.asarray(dataset["sensor/role"])[sensor] == sensor_data.CONTEXT)
    total = np.concatenate([[0], np.cumsum(visible)])
    return np.diff(total[np.asarray(dataset["frame/obs_start"])])


def usual_network(dataset: SensorDataset, counts: np.ndarray) -> int:
    """Observations to be expected in a frame: the fixed context sensors, or the median training frame where sensors move."""
    if dataset.info.n_sensors:
        return int((np.asarray(dataset["sensor/role"]) == sensor_data.CONTEXT).sum())
    trained = counts[np.asarray(dataset["frame/split"]) == sensor_data.TRAIN]
    return int(np.median(trained[trained > 0]))
