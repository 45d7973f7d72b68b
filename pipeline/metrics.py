"""Metrics as functions of additive statistics, so that chunks of cases merge without losing anything.

A *point* statistic is a number per scored point, summed over the points of a sample. A *sample* is one stratum of one frame of one case;
a sample statistic is a function of its point sums (so a ratio per frame is possible). Both are summed over samples, blocks and chunks;
a metric is a function of those sums. To add one: write its class, add a line to METRICS.

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


def _absolute(o: Outcome) -> np.ndarray:
    return np.abs(o.error)


def _signed(o: Outcome) -> np.ndarray:
    return o.error


def _truth(o: Outcome) -> np.ndarray:
    return o.truth


def _width(o: Outcome) -> np.ndarray | None:
    low, high = o.quantile(0.05), o.quantile(0.95)
    return None if low is None or high is None else high - low


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


class Mse(Metric):
    name, title, unit = "mse", "MSE", "squared"

    def points(self) -> Mapping[str, PointStatistic]:
        return {"squared": _squared}

    def value(self, sums: Sums) -> np.ndarray:
        return sums["squared"] / sums["n"]


class Rmse(Metric):
    name, title, unit = "rmse", "RMSE", "variable"

    def points(self) -> Mapping[str, PointStatistic]:
        return {"squared": _squared}

    def value(self, sums: Sums) -> np.ndarray:
        return np.sqrt(sums["squared"] / sums["n"])


class Mae(Metric):
    name, title, unit = "mae", "MAE", "variable"

    def points(self) -> Mapping[str, PointStatistic]:
        return {"absolute": _absolute}

    def value(self, sums: Sums) -> np.ndarray:
        return sums["absolute"] / sums["n"]


class Bias(Metric):
    name, title, unit, best = "bias", "bias (prediction - truth)", "variable", "none"

    def points(self) -> Mapping[str, PointStatistic]:
        return {"error": _signed}

    def value(self, sums: Sums) -> np.ndarray:
        return sums["error"] / sums["n"]


class TruthSpread(Metric):
    """The RMSE of always saying the mean of what is scored: how hard the stratum is."""

    name, title, unit, best = "truth_std", "standard deviation of the truth", "variable", "none"

    def points(self) -> Mapping[str, PointStatistic]:
        return {"truth": _truth, "truth_squared": _truth_squared}

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


class Crps(Metric):
    name, title, unit = "crps", "CRPS", "variable"

    def points(self) -> Mapping[str, PointStatistic]:
        return {"crps": Outcome.crps}

    def value(self, sums: Sums) -> np.ndarray:
        return sums["crps"] / sums["n"]


class Nll(Metric):
    """Mean negative log-likelihood in model units, see Outcome.nll."""

    name, title, unit = "nll", "NLL", "1"

    def points(self) -> Mapping[str, PointStatistic]:
        return {"nll": Outcome.nll}

    def value(self, sums: Sums) -> np.ndarray:
        return sums["nll"] / sums["n"]


class Brier(Metric):
    """Mean Brier score of classes, between 0 and 2; see Outcome.brier."""

    name, title, unit = "brier", "Brier score", "1"

    def points(self) -> Mapping[str, PointStatistic]:
        return {"brier": Outcome.brier}

    def value(self, sums: Sums) -> np.ndarray:
        return sums["brier"] / sums["n"]


class Accuracy(Metric):
    """Share of points whose most probable class is the true one."""

    name, title, unit, best = "accuracy", "accuracy", "1", "none"

    def points(self) -> Mapping[str, PointStatistic]:
        return {"right": Outcome.right}

    def value(self, sums: Sums) -> np.ndarray:
        return sums["right"] / sums["n"]


class Coverage(Metric):
    """Share of truths inside the central interval, ends included."""

    unit, best = "1", "none"

    def __init__(self, percent: int) -> None:
        self.name, self.title, self.nominal = f"coverage_{percent}", f"coverage of the {percent} % interval", percent / 100
        self.statistic = f"inside_{percent}"

    def points(self) -> Mapping[str, PointStatistic]:
        return {self.statistic: self._inside}

    def _inside(self, o: Outcome) -> np.ndarray | None:
        low, high = o.quantile((1 - self.nominal) / 2), o.quantile((1 + self.nominal) / 2)
        return None if low is None or high is None else ((low <= o.truth) & (o.truth <= high)).astype(float)

    def value(self, sums: Sums) -> np.ndarray:
        return sums[self.statistic] / sums["n"]


class Width(Metric):
    """Mean width of the central 90 % interval."""

    name, title, unit, best = "width_90", "width of the 90 % interval", "variable", "none"

    def points(self) -> Mapping[str, PointStatistic]:
        return {"width_90": _width}

    def value(self, sums: Sums) -> np.ndarray:
        return sums["width_90"] / sums["n"]


class Below(Metric):
    """Share of truths at or under a predicted quantile; a calibrated prediction gives the level itself."""

    unit, best = "1", "none"

    def __init__(self, percent: int) -> None:
        self.name, self.title, self.level = f"below_{percent:02d}", f"truths at or under the {percent} % quantile", percent / 100

    def points(self) -> Mapping[str, PointStatistic]:
        return {self.name: self._below}

    def _below(self, o: Outcome) -> np.ndarray | None:
        quantile = o.quantile(self.level)
        return None if quantile is None else (o.truth <= quantile).astype(float)

    def value(self, sums: Sums) -> np.ndarray:
        return sums[self.name] / sums["n"]


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
