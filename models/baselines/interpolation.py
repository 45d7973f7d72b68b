"""Observations of several frames as a function of time and place: linear in time, weighted by distance in space, held outside the data.

Observations at the same place are one series. At (time, place) the nearest series are each interpolated linearly in time, then averaged
with weights ((1 - d^2 / R^2) / d)^2, where R is the distance of the first series left out (R. Franke and G. Nielson's localised Shepard
weights, 1980, in squared distances). So the function meets every observation, is continuous, and can be differentiated in time and place.

Shapes: B batch, T frames, N observations a frame, M places, S points asked, D space, C channels, K nearest places.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from models.contract import Frames

NEIGHBOURS = 4  # series that are averaged
_SAME = 1e-5  # frames: so near a time is the same


@dataclass(frozen=True)
class Series:
    """The series of a context, as made by `series`."""

    time: Tensor  # [B,T] frames after the first one
    place: Tensor  # [B,M,D]
    value: Tensor  # [B,T,M,C], 0 where there is none
    before: Tensor  # [B,T,M] the newest frame with a value up to this one, -1 where there is none
    after: Tensor  # [B,T,M] the next frame with a value from this one on, T where there is none
    period: float | None

    @property
    def there(self) -> Tensor:
        """[B,M] True where a place is one, not padding."""
        return self.before[:, -1] >= 0

    def at(self, time: Tensor, place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Values [B,S,C] at time [B,S] (frames after the first one) and place [B,S,D]; then of the nearest series how far [B,S] in frames
        its nearest observation is, and whether [B,S] it has none on one side of the time, so that the nearest one is held.

        Where nothing was observed at all the value is 0, held from infinitely far.
        """
        square, which = self._nearest(place)
        b, frames = self.time.shape
        # The frames around the time asked: `left` is the last one that is not later.
        left = (torch.searchsorted(self.time, time.detach().contiguous(), right=True) - 1).clamp(0, frames - 1)
        right = (left + 1).clamp(max=frames - 1)
        row = torch.arange(b, device=time.device).view(b, 1, 1)
        low = self.before[row, left.unsqueeze(-1), which]
        high = torch.where((left + 1 < frames).unsqueeze(-1), self.after[row, right.unsqueeze(-1), which], frames)
        none_before, none_after = low < 0, high >= frames
        low, high = torch.where(none_before, high, low).clamp(max=frames - 1), torch.where(none_after, low, high).clamp(min=0)
        start, end = self.time[row, low], self.time[row, high]
        span = end - start
        inner = span > 0
        asked = time.unsqueeze(-1)
        share = torch.where(inner, (asked - start) / torch.where(inner, span, 1.0), 0.0).clamp(0, 1).unsqueeze(-1)
        each = self.value[row, low, which] * (1 - share) + self.value[row, high, which] * share  # [B,S,K,C]
        there = self.there[row, which]
        value = (_weights(square, there).unsqueeze(-1) * each).sum(2)
        gap = torch.minimum((asked - start).abs(), (end - asked).abs())[..., 0].detach()
        held = (none_before | none_after)[..., 0] & (gap > _SAME) | ~there[..., 0]
        return value, torch.where(there[..., 0], gap, torch.inf), held

    def _nearest(self, place: Tensor) -> tuple[Tensor, Tensor]:
        """Squared distances [B,S,K+1] to the nearest places and, of the first K, their numbers [B,S,K]; the last one may be inf."""
        away = place.unsqueeze(2) - self.place.unsqueeze(1)
        if self.period is not None:
            away = away - self.period * (away / self.period).round()
        square = away.square().sum(-1).masked_fill(~self.there.unsqueeze(1), torch.inf)
        count = min(NEIGHBOURS + 1, square.shape[-1])
        which = square.detach().topk(count, dim=-1, largest=False, sorted=True).indices
        near = square.gather(-1, which)
        if count <= NEIGHBOURS:
            near = torch.cat([near, torch.full_like(near[..., :1], torch.inf)], -1)
        return near, which[..., :NEIGHBOURS]


def series(context: Frames, step: float, period: float | None) -> Series:
    """The series of a context. What is masked is never looked at; several observations of a place in a frame count as their mean."""
    assert context.value is not None
    b, t, n = context.mask.shape
    mask = context.mask.flatten(1)
    position = context.position.flatten(1, 2).masked_fill(~mask.unsqueeze(-1), 0)
    value = context.value.flatten(1, 2).masked_fill(~mask.unsqueeze(-1), 0)
    number, place = _places(position, mask)  # [B,T*N], [B,M,D]
    m = place.shape[1]
    frame = torch.arange(t, device=mask.device).repeat_interleave(n)
    slot = torch.where(mask, frame * m + number, t * m)
    count = torch.zeros(b, t * m + 1, dtype=value.dtype, device=mask.device).scatter_add(1, slot, mask.to(value.dtype))
    total = torch.zeros(b, t * m + 1, value.shape[-1], dtype=value.dtype, device=mask.device)
    total = total.scatter_add(1, slot.unsqueeze(-1).expand_as(value), value)
    mean = (total / count.clamp(min=1).unsqueeze(-1))[:, :-1].view(b, t, m, -1)
    seen = count[:, :-1].view(b, t, m) > 0
    index = torch.arange(t, device=mask.device).view(1, t, 1)
    before = torch.where(seen, index, -1).cummax(1).values
    after = torch.where(seen, index, t).flip(1).cummin(1).values.flip(1)
    time = ((context.time - context.time[:, :1]) / step).to(value.dtype)
    return Series(time, place, mean, before, after, period)


def _places(position: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Number [B,R] of the place of each observation, and the places [B,M,D] in the order of their coordinates; padding is zero."""
    order = torch.arange(mask.shape[1], device=mask.device).expand(mask.shape)
    # The least significant key first; each sort keeps the order of its equals.
    for key in (*position.unbind(-1)[::-1], (~mask).to(torch.uint8)):
        order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
    rows = position.gather(1, order.unsqueeze(-1).expand_as(position))
    known = mask.gather(1, order)
    new = torch.cat([known[:, :1], (rows[:, 1:] != rows[:, :-1]).any(-1) & known[:, 1:]], 1)
    rank = new.long().cumsum(1) - 1
    most = max(1, int(new.sum(1).max())) if new.numel() else 1
    rank = rank.clamp(min=0)
    number = torch.zeros_like(rank).scatter(1, order, rank)
    place = position.new_zeros(len(position), most + 1, position.shape[-1])
    at = torch.where(known, rank, most).unsqueeze(-1).expand_as(rows)
    return number, place.scatter(1, at, rows)[:, :-1]


def _weights(square: Tensor, there: Tensor) -> Tensor:
    """Weights [B,S,K] that sum to one (to zero where no place is there) of squared distances [B,S,K+1], without dividing by one of them."""
    reach = square[..., -1:]
    near = torch.where(there, square[..., :-1], 1.0)
    scale = torch.where(there, near, 0.0).amax(-1, keepdim=True).detach()
    factor = torch.where(there, near / torch.where(scale > 0, scale, 1.0), 1.0)
    fade = torch.where(reach.isfinite(), 1 - near / torch.where(reach.isfinite() & (reach > 0), reach, 1.0), 1.0).clamp(min=0).square()
    columns = []
    for k in range(factor.shape[-1]):
        weight = fade[..., k] * there[..., k].to(factor.dtype)
        for j in range(factor.shape[-1]):
            if j != k:
                weight = weight * factor[..., j]
        columns.append(weight)
    weights = torch.stack(columns, -1)
    total = weights.sum(-1, keepdim=True)
    # All K as far as the first one left out: any of them will do, so all count alike.
    even = there.to(factor.dtype) / there.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(total > 0, weights / torch.where(total > 0, total, 1.0), even)
