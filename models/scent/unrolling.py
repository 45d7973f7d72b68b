"""Warp-unrolled forecasting (section 5 of the paper's method): jump by the horizon, read the own forecast, go on from there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from models.contract import DatasetInfo, FieldPrediction, Frames

_EPS = 1e-6  # of a frame, or of a horizon, that counts as nothing


@dataclass(frozen=True)
class Unrolling:
    """Answers beyond `horizon` frames, from a `direct` forecast (context, query) that reaches as far."""

    direct: Callable[[Frames, Frames], FieldPrediction]
    horizon: int
    warp: Literal["sensors", "queries"]  # where a forecast is decoded and read again
    info: DatasetInfo

    def __call__(self, context: Frames, query: Frames) -> FieldPrediction:
        """Network evaluations: one a jump, and one for all the leads asked after each.

        Raises ValueError beyond the horizon where the query has a background or lacks the covariates of the times in between.
        """
        ahead = lead(context, query, self.info)  # [B,S]
        # Whole jumps before the last evaluation; what is within 1e-6 of a whole number of horizons counts as whole.
        jumps = ((ahead / self.horizon - _EPS).ceil() - 1).clamp(min=0).long()
        last = int(jumps.max())
        if last and query.background is not None:
            raise ValueError(
                f"a lead of {float(ahead.max()):g} frames is beyond the horizon {self.horizon}, and no background is known at the sensors"
                " in between: train with a horizon that covers it, or without a background"
            )
        columns, parts = [], []
        for jump in range(last + 1):
            now = (jumps == jump).any(0).nonzero()[:, 0]
            if len(now):
                columns.append(now)
                parts.append((jumps[:, now] == jump, self.direct(context, some_frames(query, now))))
            if jump < last:
                context = self.jump(context, query)
        if len(parts) == 1:
            return parts[0][1]
        return _merge(columns, parts, query.mask.shape[1])

    def jump(self, context: Frames, query: Frames) -> Frames:
        """The context `horizon` frames later: frames already observed stay, the others are forecast at the sensors of the last frame."""
        b, t, _ = context.mask.shape
        time = context.time + self.horizon * self.info.step
        ahead = min(t, self.horizon)  # of the T frames, so many are in the future
        future = time[:, t - ahead :]
        place = Frames(context.position[:, -1], context.mask[:, -1], time, covariate=context.covariate, sensor=context.sensor)
        covariate = None if context.covariate is None else context.covariate[:, -1]
        sensor = None if context.sensor is None else context.sensor[:, -1]
        if self.warp == "queries":
            if covariate is not None:
                raise ValueError("warp: queries cannot read a forecast again at points without context covariates: set warp to sensors")
            place = replace(place, position=query.position[:, 0], mask=query.mask.any(1))
            sensor = None if query.sensor is None else query.sensor[:, 0]

        def each(x: Tensor) -> Tensor:
            return x.unsqueeze(1).expand(b, ahead, *x.shape[1:])

        points = place.mask.shape[-1]
        calendar = (
            torch.stack([self._covariate_at(query, future[:, k], points) for k in range(ahead)], 1) if query.covariate is not None else None
        )
        ask = Frames(each(place.position), each(place.mask), future, covariate=calendar)
        answer = self.direct(context, ask)
        forecast = Frames(
            position=ask.position,
            mask=ask.mask,
            time=future,
            value=answer.mean,
            covariate=None if covariate is None else each(covariate),
            sensor=None if sensor is None else each(sensor),
        )
        if ahead == t:
            return forecast
        return _append(some_frames(context, slice(ahead, t)), forecast)

    def _covariate_at(self, query: Frames, time: Tensor, points: int) -> Tensor:
        """Query covariates [B,points,F] at time [B]: they are functions of time alone, so a frame asked for at that time has them."""
        assert query.covariate is not None
        near = (query.time - time.unsqueeze(1)).abs() < _EPS * self.info.step
        if not near.any(1).all():
            raise ValueError(
                f"the forecast must be unrolled over horizon {self.horizon}, but the query has no frame at the time of the jump, "
                f"to take {', '.join(self.info.query_covariates)} from: ask for every frame, or train with a longer horizon"
            )
        row = torch.arange(len(time), device=time.device)
        return query.covariate[row, near.long().argmax(1), :1].expand(-1, points, -1)


def lead(context: Frames, query: Frames, info: DatasetInfo) -> Tensor:
    """Leads [B,S] in frames, float64."""
    frames = (query.time - context.time[:, -1:]).double() / info.step
    if frames.numel() and float(frames.min()) < -_EPS:
        raise ValueError(f"the query asks for {-float(frames.min()):g} frames before the last context time: SCENT looks ahead only")
    return frames


def some_frames(frames: Frames, which: Tensor | slice) -> Frames:
    """Some of the frames."""
    names = ("position", "mask", "time", "value", "covariate", "sensor", "background", "background_scale")
    return replace(frames, **{name: getattr(frames, name)[:, which] for name in names if getattr(frames, name) is not None})


def _append(first: Frames, then: Frames) -> Frames:
    """Two stretches of context frames, one after the other, padded to the same number of observations."""
    points = max(first.mask.shape[2], then.mask.shape[2])

    def joined(name: str) -> Tensor | None:
        a, b = getattr(first, name), getattr(then, name)
        if a is None or b is None:
            return None
        if name == "time":
            return torch.cat([a, b], 1)
        fill = -1 if name == "sensor" else 0
        return torch.cat([F.pad(x, (*[0] * 2 * (x.ndim - 3), 0, points - x.shape[2]), value=fill) for x in (a, b)], 1)

    parts = {name: joined(name) for name in ("position", "mask", "time", "value", "covariate", "sensor")}
    return Frames(**parts)  # type: ignore[arg-type]


def _merge(columns: list[Tensor], parts: list[tuple[Tensor, FieldPrediction]], frames: int) -> FieldPrediction:
    """Put predictions for some query frames together; of each, the windows [B,len(columns)] marked True are taken."""

    def merged(name: str) -> Tensor | None:
        first = getattr(parts[0][1], name)
        if first is None:
            return None
        out = first.new_zeros(first.shape[0], frames, *first.shape[2:])
        for column, (mine, prediction) in zip(columns, parts, strict=True):
            value = getattr(prediction, name)
            out[:, column] = torch.where(mine.view(*mine.shape, *[1] * (value.ndim - 2)), value, out[:, column])
        return out

    mean = merged("mean")
    assert mean is not None
    return FieldPrediction(mean, merged("scale"), merged("quantiles"))
