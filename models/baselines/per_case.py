"""Baselines that are fitted anew to the context of each case, as block protocols do: place and time in, value out.

Minutes are those of the local day plus 1440 for each day of the window before it; days of the window without a frame are not counted, as
the AirDelhi benchmark counts files. A baseline may say how sure it is of one answer against another; how large its errors are is one
number a variable, measured on training questions: enough to be a background.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.baselines.fitted import FLOOR, Fitted
from models.baselines.inverse_distance import weights
from models.contract import DatasetInfo, FieldBatch, FieldPrediction, Frames

_ENOUGH = 3000  # residuals for the standard deviation


@dataclass(frozen=True)
class Points:
    """Where and when something was observed or is asked."""

    minute: np.ndarray  # [N] of the local day, plus 1440 a day; without a calendar the time as it is
    place: np.ndarray  # [N,D] in the dataset's position unit, from its centre
    frame: np.ndarray  # [N] int, number of the frame; 0 is the first of the context

    @property
    def inputs(self) -> np.ndarray:
        """[N,1+D]"""
        return np.concatenate([self.minute[:, None], self.place], axis=1)


@dataclass(frozen=True)
class Case:
    """What a case knows, at least one observation, and what it is asked."""

    known: Points  # by time, then place and value
    value: np.ndarray  # [N,C]
    asked: Points
    frames: int  # of the context

    def scaled(self) -> tuple[np.ndarray, np.ndarray]:
        """Inputs [N,1+D] of what is known and [Q,1+D] of what is asked, 0 and 1 being the least and the greatest of what is known."""
        known, asked = self.known.inputs, self.asked.inputs
        low, span = known.min(0), np.ptp(known, axis=0)
        span[span == 0] = 1
        return (known - low) / span, (asked - low) / span


class PerCase(Fitted):
    """Subclasses say how answers follow from a case; `fit` only measures how large their errors are."""

    parts = ("error",)  # [C] standard deviation of an answer whose stated scale is 1

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        if info.period:
            raise ValueError(f"{type(self).__name__} scales places on a plane, and {info.name} lies on a torus")

    def answers(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        """Means [Q,C] and their scales [Q,C] up to a factor common to all cases: `certain` where none is surer than another."""
        raise NotImplementedError

    def fit(self, batches: Iterable[FieldBatch]) -> None:
        """The factor of the scales is the one that makes the mean variance of training questions their mean squared error."""
        errors: list[Tensor] = []
        scales: list[Tensor] = []
        for batch in batches:
            query = batch.query
            assert query.value is not None
            mean, scale = self._answers(batch.context, query)
            errors.append((query.value.double() - mean)[query.mask])
            scales.append(scale[query.mask])
            if sum(map(len, errors)) >= _ENOUGH:
                break
        if not any(map(len, errors)):
            raise ValueError(f"{self.info.name}: no training batch holds an answered question: there is no error to measure")
        error, scale = torch.cat(errors), torch.cat(scales)
        self._state = {"error": (error.square().mean(0) / scale.square().mean(0)).sqrt()}

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        mean, scale = (tensor.to(query.position) for tensor in self._answers(context, query))
        stated = (self.tensor("error", mean).to(mean) * scale).clamp(min=FLOOR)
        known = context.mask.any(-1).any(-1)[:, None, None, None]
        return FieldPrediction(mean, torch.where(known, stated, 1.0))

    def _answers(self, context: Frames, query: Frames) -> tuple[Tensor, Tensor]:
        """Mean and scale [B,S,Q,C] float64; 0, the climate of the training split, where nothing was observed, and at what is not asked."""
        assert context.value is not None
        value = context.value.double().cpu().numpy()
        seen, wanted = context.mask.cpu().numpy(), query.mask.cpu().numpy()
        known, asked = _points(context, query, self.info)
        mean = np.zeros((*wanted.shape, value.shape[-1]))
        scale = np.ones_like(mean)
        for b in range(len(mean)):
            if not seen[b].any() or not wanted[b].any():
                continue
            observed, points = value[b][seen[b]], _at(known, b, seen[b])
            order = np.lexsort([*observed.T, *points.inputs.T[::-1]])  # so that the order within a frame does not matter to a forest
            points = Points(points.minute[order], points.place[order], points.frame[order])
            case = Case(points, observed[order], _at(asked, b, wanted[b]), context.mask.shape[1])
            mean[b][wanted[b]], scale[b][wanted[b]] = self.answers(case)
        return torch.from_numpy(mean), torch.from_numpy(scale)


def certain(mean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Answers of which none is surer than another."""
    return mean, np.ones_like(mean)


def _at(points: Points, case: int, mask: np.ndarray) -> Points:
    return Points(points.minute[case][mask], points.place[case][mask], points.frame[case][mask])


def _points(context: Frames, query: Frames, info: DatasetInfo) -> tuple[Points, Points]:
    """All points [B,T,N] of the context and [B,S,Q] of the query."""
    time = torch.cat([context.time, query.time], 1).double().cpu().numpy()
    minute, frame = time, np.rint((time - time[:, :1]) / info.step).astype(int)
    length = context.time.shape[1]
    if info.time_origin:
        minute = np.empty_like(time)
        for row, local in enumerate(time + info.utc_offset):
            day = np.floor(local / 24 + 1e-9)
            hour, count = local - 24 * day, np.searchsorted(np.unique(day), day)
            minute[row] = 60 * hour + 1440 * count
            if local[length - 1] - local[0] >= 24:  # whole days say which slots a day has; what they lack, as the night, is not counted
                slots = np.unique(hour[:length].round(6))
                number = count * len(slots) + np.searchsorted(slots, hour.round(6))
                frame[row] = number - number[0]
    return tuple(  # type: ignore[return-value]
        Points(
            np.broadcast_to(minute[:, part, None], frames.mask.shape),
            info.half_extent * frames.position.double().cpu().numpy(),
            np.broadcast_to(frame[:, part, None], frames.mask.shape),
        )
        for part, frames in ((slice(length), context), (slice(length, None), query))
    )


class CaseMean(PerCase):
    """The mean of what is known."""

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        last_day: bool = False  # of the newest day of which anything is known, and not of the whole context

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config

    def answers(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        value = case.value
        if self.config.last_day:
            day = np.floor(case.known.minute / 1440 + 1e-9)
            value = value[day == day.max()]
        return certain(np.broadcast_to(value.mean(0), (len(case.asked.minute), value.shape[1])))


class CaseInverseDistance(PerCase):
    """Inverse distance weighting in scaled (time, place); exact at an observation."""

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        exponent: float = Field(3.0, gt=0)

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config

    def answers(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        known, asked = (torch.from_numpy(inputs) for inputs in case.scaled())
        distance = torch.cdist(asked, known, compute_mode="donot_use_mm_for_euclid_dist")
        return certain(weights(distance, self.config.exponent, None).numpy() @ case.value)
