"""Every baseline, small and fitted to a tiny world, and what it is asked."""

from __future__ import annotations

from functools import cache
from typing import Any

from models import registry
from models.contract import FieldBatch
from pipeline import sensors
from pipeline.batches import TrainingBatches, Windows
from pipeline.cases import CaseBatch, cases
from tests import worlds

STATIONS = Windows(context_frames=12, max_lead=6, batch=32, query_frames=4, hide=2)
AHEAD = Windows(context_frames=12, min_lead=1, max_lead=6, batch=2, query_frames=4, hide=2)
WAVES = Windows(max_lead=4, batch=8, query_frames=5, query_points=144)
SMALL: dict[str, dict[str, Any]] = {
    "boosting": {"rounds": 40, "spread_rounds": 10},
    "ridge": {"waves": 2},
    "case_forest": {"trees": 3},
    "case_boosting": {"rounds": 3},
    "case_arima": {"order": (1, 1, 0), "iterations": 2},
    "case_nbeats": {"back": 4, "ahead": 3, "blocks": 2, "width": 8, "steps": 3},
    "case_nsgp": {"steps": 2, "batch": 20},
    "case_sage": {"steps": 2},
}
TASKS_OF = {"case_arima": {"forecast"}, "case_nbeats": {"forecast"}, "case_sage": {"reconstruction", "interpolation"}}  # others: all
SLOW = {*TASKS_OF, "case_nsgp"}  # each case is a training or many: few questions, and about the future alone
# Boosting follows fixed sensors, the ridge propagator needs a field, what is fitted to a case a plane; the others serve both worlds.
SERVED = [
    (name, world)
    for name in registry.BASELINES
    for world in ("waves", "stations")
    if (name, world) not in {("boosting", "waves"), ("ridge", "stations")} and (world, name[:5]) != ("waves", "case_")
]


@cache
def world(name: str) -> sensors.SensorDataset:
    return worlds.waves(16) if name == "waves" else worlds.stations()


@cache
def batches(on: str, slow: bool = False) -> list[FieldBatch]:
    training = TrainingBatches(world(on), AHEAD if slow else WAVES if on == "waves" else STATIONS, seed=0)
    return [training[step] for step in range(3 if slow else 20)]


@cache
def fitted(name: str, on: str) -> Any:
    kind = registry.load(name)
    baseline = kind(kind.Config(**SMALL.get(name, {})), world(on).info)
    baseline.fit(iter(batches(on, name in SLOW)))
    return baseline


@cache
def asked(on: str, name: str = "") -> CaseBatch:
    leads = (1, 2, 3, 4) if name in SLOW else (0, 1, 2, 4)
    return next(cases(world(on), "test", 12 if on == "stations" else 1, leads, batch=2 if name in SLOW else 6))
