"""Interpolate, then persist: the shared half of persistence, inverse distance and kriging.

mean(point, lead) = analysis of the last frame at the point, for every lead.
variance(point, lead) = variance of the analysis + growth(lead), the second fitted as the excess of the squared errors over the first.

A question at a fixed sensor is answered with what that sensor last reported. If that is `age` frames old, its variance is
growth(lead + age), and it is used as long as that is less than the analysis would have, that is, growth(age) < variance of the analysis.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from models.baselines.analysis import Analysis, Method, analyse, fixed_only, last_reported
from models.baselines.fitted import FLOOR, Fitted, along, by_lead
from models.contract import DatasetInfo, FieldBatch, FieldPrediction, Frames

_ROWS = 4096  # about so many residuals are taken of a batch
_ENOUGH = 100_000  # no further batch is looked at with so many


@dataclass(frozen=True)
class Residuals:
    """Answers minus analysis at questions of training batches."""

    error: Tensor  # [M,C]
    mean: Tensor  # [M,C] of the analysis
    variance: Tensor  # [M,C] of the analysis
    distance: Tensor  # [M] to the nearest observation
    lead: Tensor  # [M] frames, counted from the observation where that is the place's own


class Spatial(Fitted):
    """Predicts the analysis of the last frame at every lead. Subclasses say how what is seen is weighed and how sure that is."""

    def __init__(self, info: DatasetInfo, ignore_moving: bool = False) -> None:
        super().__init__(info)
        if ignore_moving and not info.n_sensors:
            raise ValueError(f"ignore_moving is set, but {info.name} has no fixed sensor: nothing would be left to interpolate")
        self.ignore_moving = ignore_moving

    def seen(self, context: Frames) -> Frames:
        """The observations the analysis rests on."""
        return fixed_only(context) if self.ignore_moving else context

    def method(self) -> Method:
        raise NotImplementedError

    def analyse(self, context: Frames, query: Frames) -> Analysis:
        return analyse(self.seen(context), query, self.info.period, self.method())

    def variance(self, analysis: Analysis) -> Tensor:
        """Error variance [B,S,Q,C] of the analysis itself."""
        return analysis.variance

    def spread(self, mean: Tensor, variance: Tensor, lead: Tensor) -> Tensor:
        """Standard deviation from the variance of the analysis at lead (...); mean and variance are (...,C)."""
        return (variance + self.growth(lead)).sqrt()

    def growth(self, lead: Tensor) -> Tensor:
        table = self.tensor("growth", lead)
        return along(torch.arange(len(table), dtype=torch.float64, device=lead.device), table, lead)

    def keeps(self, age: Tensor, variance: Tensor) -> Tensor:
        """Where [B,S,Q] a sensor's own last value is used; age [B,S,Q] in frames (inf: none), variance [B,S,Q,C] of the analysis."""
        if "growth" not in self._state:
            return age == 0
        return (age == 0) | (age.isfinite() & (self.growth(age.nan_to_num(posinf=0)).mean(-1) < variance.mean(-1)))

    def settle(self, context: Frames, query: Frames, analysis: Analysis, variance: Tensor) -> tuple[Analysis, Tensor]:
        """The analysis with what fixed sensors last reported in its place, and leads [B,S,Q] counted from then."""
        own, age = last_reported(self.seen(context), query, self.info.n_sensors)
        kept = self.keeps(age, variance)
        settled = Analysis(
            mean=torch.where(kept[..., None], own, analysis.mean),
            variance=torch.where(kept[..., None], 0.0, variance),
            distance=torch.where(kept, 0.0, analysis.distance),
        )
        return settled, self.lead(context, query)[..., None] + torch.where(kept, age, 0.0)

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        analysis = self.analyse(context, query)
        analysis, lead = self.settle(context, query, analysis, self.variance(analysis))
        scale = self.spread(analysis.mean, analysis.variance, lead)
        dtype = query.position.dtype
        return FieldPrediction(analysis.mean.to(dtype), scale.clamp(min=FLOOR).to(dtype))

    def residuals(self, batches: Iterable[FieldBatch]) -> Residuals:
        """Residuals of the analysis at the answered questions, a bounded number of points a batch."""
        parts: list[list[Tensor]] = []
        for batch in batches:
            query = batch.query.points(slice(None, None, -(-batch.query.mask.numel() // _ROWS)))
            assert query.value is not None
            analysis = self.analyse(batch.context, query)
            analysis, lead = self.settle(batch.context, query, analysis, analysis.variance)
            at = (query.mask & analysis.distance.isfinite()).nonzero(as_tuple=True)
            error = query.value[at].double() - analysis.mean[at]
            parts.append([error, analysis.mean[at], analysis.variance[at], analysis.distance[at], lead[at]])
            if sum(len(part[0]) for part in parts) >= _ENOUGH:
                break
        if not any(len(part[0]) for part in parts):
            raise ValueError(f"{self.info.name}: no training batch holds an answered question beside an observation; nothing to fit from")
        return Residuals(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))

    def fit_growth(self, residuals: Residuals, variance: Tensor) -> Tensor:
        """Table [L,C] of the error variance that a lead adds to `variance` [M,C] of the analysis; nothing at lead 0."""
        excess = by_lead(residuals.error.square() - variance, residuals.lead).clamp(min=0)
        excess[0] = 0
        return excess


class ByDistance(Spatial):
    """A spatial baseline that states no variance of its own: it is read from a table over the distance to the nearest observation."""

    parts = ("distance", "variance", "growth")

    def fit(self, batches: Iterable[FieldBatch]) -> None:
        residuals = self.residuals(batches)
        knot, table = self._table(residuals)
        self._state = {"distance": knot, "variance": table}
        self._state["growth"] = self.fit_growth(residuals, along(knot, table, residuals.distance))

    def variance(self, analysis: Analysis) -> Tensor:
        knot, table = self.tensor("distance", analysis.mean), self.tensor("variance", analysis.mean)
        known = analysis.distance.isfinite()
        read = along(knot, table, torch.where(known, analysis.distance, 0.0))
        return torch.where(known[..., None], read, analysis.variance)

    def _table(self, residuals: Residuals, bins: int = 10) -> tuple[Tensor, Tensor]:
        """Mean squared error at the smallest lead asked away from the observations, over bins of equal count.

        At distance zero it is that of lead 0: nothing where the observation itself is asked for, its noise where the clean truth is.
        """
        away = residuals.distance > 0
        if not away.any():
            raise ValueError(
                f"{self.info.name}: every training question lies on an observation, so the spread away from them cannot be fitted;"
                " set `hide`, `drop` or `query_points` in windows"
            )
        first = away & (residuals.lead.round() == residuals.lead[away].round().min())
        order = residuals.distance[first].argsort(stable=True)
        distance, square = residuals.distance[first][order], residuals.error[first][order].square()
        parts = torch.arange(len(order)).tensor_split(min(bins, len(order)))
        knot = torch.stack([torch.zeros((), dtype=torch.float64), *(distance[part].mean() for part in parts)])
        there = ~away & (residuals.lead.round() == 0)
        noise = residuals.error[there].square().mean(0) if there.any() else torch.zeros_like(square[0])
        table = torch.stack([noise, *(square[part].mean(0) for part in parts)])
        return knot, table


def by_weights(weigh: Callable[[Tensor], Tensor]) -> Method:
    """A method whose weights [Q,N] follow from the distances [Q,N] alone, and that states no variance."""

    def solve(distance: Tensor) -> tuple[Tensor, Tensor]:
        weights = weigh(distance)
        return weights[None], torch.zeros_like(weights[None, :, 0])

    return lambda place: solve
