"""Metrics as functions of additive statistics, so that chunks of cases merge without losing anything.

A *point* statistic is a number per scored point, summed over the points of a sample. A *sample* is one stratum of one frame of one case;
a sample statistic is a function of its point sums (so a ratio per frame is possible). Both are summed over samples, blocks and chunks;
a metric is a function of those sums. To add one: write its class, most often a `Mean`, add a line to METRICS.

What one point counts is in pipeline/outcome.py. Score tables say which predictors state a mean alone (`distribution`). NLL is in model
units, where values are standardised, so that it does not depend on the unit of a variable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from pipeline.outcome import Outcome

Sums = Mapping[str, np.ndarray]


def _squared(o: Outcome) -> np.ndarray:
    return o.error**2


def _truth_squared(o: Outcome) -> np.ndarray:
    return o.truth**2


PointStatistic = Callable[[Outcome], np.ndarray | None]  # None where the prediction has no such thing
SampleStatistic = Callable[[Sums], np.ndarray]


class Metric:
    """One number of the score table. `value` receives the sums of its statistics, of `n` (points) and of `samples`."""

    name: str
    title: str
    unit: Literal["variable", "squared", "1"]
    best: Literal["low", "none"] = "low"  # "none": nearness to a nominal value, or no judgement at all

    def points(self) -> Mapping[str, PointStatistic]:
        raise NotImplementedError

    def samples(self) -> Mapping[str, SampleStatistic]:
        return {}

    def value(self, sums: Sums) -> np.ndarray:
        raise NotImplementedError


class Mean(Metric):
    """The mean over points of one statistic, which `of` gives for each."""

    statistic: str

    def of(self, o: Outcome) -> np.ndarray | None:
        raise NotImplementedError

    def points(self) -> Mapping[str, PointStatistic]:
        return {self.statistic: self.of}

    def value(self, sums: Sums) -> np.ndarray:
        return sums[self.statistic] / sums["n"]


class Mse(Mean):
    name, title, unit = "mse", "MSE", "squared"
    statistic = "squared"

    def of(self, o: Outcome) -> np.ndarray:
        return _squared(o)


class Rmse(Metric):
    name, title, unit = "rmse", "RMSE", "variable"

    def points(self) -> Mapping[str, PointStatistic]:
        return {"squared": _squared}

    def value(self, sums: Sums) -> np.ndarray:
        return np.sqrt(sums["squared"] / sums["n"])


class Mae(Mean):
    name, title, unit = "mae", "MAE", "variable"
    statistic = "absolute"

    def of(self, o: Outcome) -> np.ndarray:
        return np.abs(o.error)


class Bias(Mean):
    name, title, unit, best = "bias", "bias (prediction - truth)", "variable", "none"
    statistic = "error"

    def of(self, o: Outcome) -> np.ndarray:
        return o.error


class TruthSpread(Metric):
    """The RMSE of always saying the mean of what is scored: how hard the stratum is."""

    name, title, unit, best = "truth_std", "standard deviation of the truth", "variable", "none"

    def points(self) -> Mapping[str, PointStatistic]:
        return {"truth": lambda o: o.truth, "truth_squared": _truth_squared}

    def value(self, sums: Sums) -> np.ndarray:
        return np.sqrt(np.maximum(sums["truth_squared"] / sums["n"] - (sums["truth"] / sums["n"]) ** 2, 0))


class RelMse(Metric):
    """Mean over samples of sum(e^2) / sum(u^2). Not to be mixed with RelL2, the mean of its root."""

    name, title, unit = "rel_mse", "RelMSE", "1"

    def points(self) -> Mapping[str, PointStatistic]:
        return {"squared": _squared, "truth_squared": _truth_squared}

    def samples(self) -> Mapping[str, SampleStatistic]:
        return {
            "relative_squared": lambda s: _ratio(s["squared"], s["truth_squared"]),
            "relative_samples": lambda s: (s["truth_squared"] > 0).astype(float),
        }

    def value(self, sums: Sums) -> np.ndarray:
        return sums["relative_squared"] / sums["relative_samples"]


class RelL2(Metric):
    """Mean over samples of ||e|| / ||u||, the relative L2 error of neural-operator papers."""

    name, title, unit = "rel_l2", "rel-L2", "1"

    def points(self) -> Mapping[str, PointStatistic]:
        return {"squared": _squared, "truth_squared": _truth_squared}

    def samples(self) -> Mapping[str, SampleStatistic]:
        return {
            "relative_norm": lambda s: np.sqrt(_ratio(s["squared"], s["truth_squared"])),
            "relative_samples": lambda s: (s["truth_squared"] > 0).astype(float),
        }

    def value(self, sums: Sums) -> np.ndarray:
        return sums["relative_norm"] / sums["relative_samples"]


class Crps(Mean):
    name, title, unit = "crps", "CRPS", "variable"
    statistic = "crps"

    def of(self, o: Outcome) -> np.ndarray:
        return o.crps()


class Nll(Mean):
    """Mean negative log-likelihood in model units, see Outcome.nll."""

    name, title, unit = "nll", "NLL", "1"
    statistic = "nll"

    def of(self, o: Outcome) -> np.ndarray | None:
        return o.nll()


class Brier(Mean):
    """Mean Brier score of classes, between 0 and 2; see Outcome.brier."""

    name, title, unit = "brier", "Brier score", "1"
    statistic = "brier"

    def of(self, o: Outcome) -> np.ndarray | None:
        return o.brier()


class Accuracy(Mean):
    """Share of points whose most probable class is the true one."""

    name, title, unit, best = "accuracy", "accuracy", "1", "none"
    statistic = "right"

    def of(self, o: Outcome) -> np.ndarray | None:
        return o.right()


class Coverage(Mean):
    """Share of truths inside the central interval, ends included."""

    unit, best = "1", "none"

    def __init__(self, percent: int) -> None:
        self.name, self.title, self.nominal = f"coverage_{percent}", f"coverage of the {percent} % interval", percent / 100
        self.statistic = f"inside_{percent}"

    def of(self, o: Outcome) -> np.ndarray | None:
        low, high = o.quantile((1 - self.nominal) / 2), o.quantile((1 + self.nominal) / 2)
        return None if low is None or high is None else ((low <= o.truth) & (o.truth <= high)).astype(float)


class Width(Mean):
    """Mean width of the central 90 % interval."""

    name, title, unit, best = "width_90", "width of the 90 % interval", "variable", "none"
    statistic = "width_90"

    def of(self, o: Outcome) -> np.ndarray | None:
        low, high = o.quantile(0.05), o.quantile(0.95)
        return None if low is None or high is None else high - low


class Below(Mean):
    """Share of truths at or under a predicted quantile; a calibrated prediction gives the level itself."""

    unit, best = "1", "none"

    def __init__(self, percent: int) -> None:
        self.name, self.title, self.level = f"below_{percent:02d}", f"truths at or under the {percent} % quantile", percent / 100
        self.statistic = self.name

    def of(self, o: Outcome) -> np.ndarray | None:
        quantile = o.quantile(self.level)
        return None if quantile is None else (o.truth <= quantile).astype(float)


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Rmse(),
        Mse(),
        Mae(),
        Bias(),
        RelMse(),
        RelL2(),
        Crps(),
        Nll(),
        Brier(),
        Accuracy(),
        Coverage(90),
        Coverage(50),
        Width(),
        Below(5),
        Below(25),
        Below(50),
        Below(75),
        Below(95),
        TruthSpread(),
    )
}

POINT_STATISTICS: dict[str, PointStatistic] = {name: f for metric in METRICS.values() for name, f in metric.points().items()}
SAMPLE_STATISTICS: dict[str, SampleStatistic] = {name: f for metric in METRICS.values() for name, f in metric.samples().items()}
STATISTICS = ("n", "samples", *POINT_STATISTICS, *SAMPLE_STATISTICS)


def evaluate(metric: str, sums: Sums) -> np.ndarray:
    """A metric of sums of any shape; NaN where nothing was scored or the prediction has no such thing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return METRICS[metric].value(sums)


def unit(metric: str, variable_unit: str) -> str:
    """The unit of a metric of a variable."""
    kind = METRICS[metric].unit
    return "1" if kind == "1" or variable_unit == "1" else variable_unit if kind == "variable" else f"({variable_unit})2"


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, and 0 where whole is 0 (such a sample is not counted)."""
    return np.divide(part, whole, out=np.zeros_like(part), where=whole > 0)
