"""Baselines that are fitted anew to the context of each case, as block protocols do: place and time in, value out.

Inputs are minutes of the local day plus 1440 for each day of the window before it, and the position, each scaled to 0..1 by the smallest
and the largest of the context; days of the window without a frame are not counted, as the AirDelhi benchmark counts files. The standard
deviation is one number a variable, the root mean square error of training questions: enough to be a background.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.baselines.fitted import FLOOR, Fitted
from models.baselines.inverse_distance import weights
from models.contract import DatasetInfo, FieldBatch, FieldPrediction, Frames

_ENOUGH = 3000  # residuals for the standard deviation


class PerCase(Fitted):
    """Subclasses say how a case's answers [Q,C] follow from its context; `fit` only measures how well they do."""

    parts = ("error",)  # [C]

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        if info.period:
            raise ValueError(f"{type(self).__name__} scales places on a plane, and {info.name} lies on a torus")

    def answers(self, known: np.ndarray, value: np.ndarray, asked: np.ndarray) -> np.ndarray:
        """Answers [Q,C] at scaled inputs `asked` [Q,1+D], from scaled inputs [N,1+D] and values [N,C] of the context, N > 0."""
        raise NotImplementedError

    def fit(self, batches: Iterable[FieldBatch]) -> None:
        parts: list[Tensor] = []
        for batch in batches:
            query = batch.query
            assert query.value is not None
            parts.append((query.value.double() - self._mean(batch.context, query))[query.mask])
            if sum(map(len, parts)) >= _ENOUGH:
                break
        if not any(map(len, parts)):
            raise ValueError(f"{self.info.name}: no training batch holds an answered question: there is no error to measure")
        self._state = {"error": torch.cat(parts).square().mean(0).sqrt()}

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        mean = self._mean(context, query).to(query.position)
        error = self.tensor("error", mean).to(mean).clamp(min=FLOOR)
        known = context.mask.any(-1).any(-1)[:, None, None, None]
        return FieldPrediction(mean, torch.where(known, error.expand_as(mean), 1.0))

    def _mean(self, context: Frames, query: Frames) -> Tensor:
        """[B,S,Q,C] float64; the climate of the training split, 0, where nothing was observed, and at what is not asked."""
        assert context.value is not None
        value = context.value.double().cpu().numpy()
        seen, asked = context.mask.cpu().numpy(), query.mask.cpu().numpy()
        known, questions = _inputs(context, query, self.info)
        mean = np.zeros((*asked.shape, value.shape[-1]))
        for b in range(len(mean)):
            if not seen[b].any() or not asked[b].any():
                continue
            inputs, observed, wanted = known[b][seen[b]], value[b][seen[b]], questions[b][asked[b]]
            order = np.lexsort([*observed.T, *inputs.T[::-1]])  # by time, so that the order within a frame does not matter to a forest
            inputs, observed = inputs[order], observed[order]
            low, span = inputs.min(0), np.ptp(inputs, axis=0)
            span[span == 0] = 1
            mean[b][asked[b]] = self.answers((inputs - low) / span, observed, (wanted - low) / span)
        return torch.from_numpy(mean).to(query.position.device)


def _inputs(context: Frames, query: Frames, info: DatasetInfo) -> tuple[np.ndarray, np.ndarray]:
    """Minutes and positions [B,T,N,1+D] of the context and [B,S,Q,1+D] of the query. Without a calendar time is what it is."""
    times = [frames.time.double().cpu().numpy() for frames in (context, query)]
    if info.time_origin:
        local = [time + info.utc_offset for time in times]
        day = [np.floor(time / 24 + 1e-9) for time in local]
        number = [np.empty_like(days) for days in day]
        for b in range(len(day[0])):
            distinct = np.unique(np.concatenate([days[b] for days in day]))
            for out, days in zip(number, day, strict=True):
                out[b] = np.searchsorted(distinct, days[b])
        times = [60 * (time - 24 * days) + 1440 * n for time, days, n in zip(local, day, number, strict=True)]
    return tuple(  # type: ignore[return-value]
        np.concatenate([np.broadcast_to(time[..., None, None], (*frames.mask.shape, 1)), frames.position.double().cpu().numpy()], axis=-1)
        for time, frames in zip(times, (context, query), strict=True)
    )


class CaseMean(PerCase):
    """The mean of what is known."""

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        last_day: bool = False  # of the newest day of which anything is known, and not of the whole context

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config

    def _mean(self, context: Frames, query: Frames) -> Tensor:
        assert context.value is not None
        mask = context.mask
        if self.config.last_day:
            day = ((context.time + self.info.utc_offset) / 24 + 1e-9).floor()
            newest = torch.where(mask.any(-1), day, -torch.inf).amax(-1, keepdim=True)
            mask = mask & (day == newest)[..., None]
        count = mask.sum((1, 2)).clamp(min=1)[:, None]
        total = torch.where(mask[..., None], context.value.double(), 0.0).sum((1, 2))
        return (total / count)[:, None, None].expand(*query.mask.shape, -1)


class CaseInverseDistance(PerCase):
    """Inverse distance weighting in scaled (time, place); exact at an observation."""

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        exponent: float = Field(3.0, gt=0)

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config

    def answers(self, known: np.ndarray, value: np.ndarray, asked: np.ndarray) -> np.ndarray:
        distance = torch.cdist(torch.from_numpy(asked), torch.from_numpy(known), compute_mode="donot_use_mm_for_euclid_dist")
        return weights(distance, self.config.exponent, None).numpy() @ value
