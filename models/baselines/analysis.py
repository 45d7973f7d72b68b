"""Interpolation of one frame of observations to the points asked for. Samples that share a sensor layout share the work.

Distances are Euclidean on a plane and chordal on a torus: each axis is bent into a circle of its own in twice as many dimensions, where
every covariance that is valid in Euclidean space stays valid. (The shorter way round a torus is a distance too, but with it a Matern
covariance need not be positive definite.) Close points are as far apart as on the flat torus.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from models.contract import Frames

_CHUNK = 4096  # points solved at a time: bounds the memory of the weights

# Embedded places [N,D'] -> (distances of points to them [Q,N] -> weights [C or 1,Q,N] and the method's own error variance [C or 1,Q]).
Method = Callable[[Tensor], Callable[[Tensor], tuple[Tensor, Tensor]]]


@dataclass(frozen=True)
class Analysis:
    """float64, in model units. Where nothing was observed: mean 0 and variance 1, the climate of the training split."""

    mean: Tensor  # [B,S,Q,C]
    variance: Tensor  # [B,S,Q,C] as the method states it
    distance: Tensor  # [B,S,Q] to the nearest observation; inf where there is none


def analyse(seen: Frames, query: Frames, period: float | None, method: Method) -> Analysis:
    """Interpolate the last frame of `seen` at the positions of `query`. Several observations at one place count as their mean."""
    assert seen.value is not None
    b, s, q = query.mask.shape
    mean = torch.zeros(b, s, q, seen.value.shape[-1], dtype=torch.float64, device=query.position.device)
    variance = torch.ones_like(mean)
    distance = torch.full_like(mean[..., 0], math.inf)
    for rows in alike([seen.position[i, -1][seen.mask[i, -1]] for i in range(b)]):
        mask = seen.mask[rows[0], -1]
        if not mask.any():
            continue
        place, which = torch.unique(seen.position[rows[0], -1][mask], dim=0, return_inverse=True)
        count = torch.bincount(which)
        place = embed(place, period)
        solve = method(place)
        pairs = [(i, k) for i in rows for k in range(s)]
        for same in alike([query.position[i, k] for i, k in pairs]):
            here = [pairs[j] for j in same]
            values = torch.stack([seen.value[i, -1][seen.mask[i, -1]].double() for i, _ in here])
            values = values.new_zeros(len(here), len(count), values.shape[-1]).index_add_(1, which, values) / count[:, None]
            points = embed(query.position[here[0]], period)
            for start in range(0, q, _CHUNK):
                part = slice(start, start + _CHUNK)
                apart = separation(points[part], place)
                weights, own = solve(apart)
                result = torch.einsum("cqn,rnc->rqc", weights.expand(values.shape[-1], -1, -1), values)
                near = apart.amin(1)
                for (i, k), row in zip(here, result, strict=True):
                    mean[i, k, part], variance[i, k, part], distance[i, k, part] = row, own.T, near
    return Analysis(mean, variance, distance)


def embed(position: Tensor, period: float | None) -> Tensor:
    """Positions (...,D) as float64 coordinates (...,D') between which Euclidean distance is meant."""
    if period is None:
        return position.double()
    angle = position.double() * (2 * math.pi / period)
    return torch.cat([angle.cos(), angle.sin()], dim=-1) * (period / (2 * math.pi))


def separation(a: Tensor, b: Tensor) -> Tensor:
    """Distances (...,Q,N) between embedded points (...,Q,D') and (...,N,D'), exactly zero between equal points."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")


def last_reported(context: Frames, query: Frames, n_sensors: int) -> tuple[Tensor, Tensor]:
    """What the fixed sensor of a question last reported in the context: value [B,S,Q,C] and its age in frames [B,S,Q], inf where never."""
    assert context.value is not None
    b, t, n, c = context.value.shape
    slots = n_sensors + 1  # the last one takes what belongs to no fixed sensor
    fixed = context.mask & (context.sensor >= 0) if context.sensor is not None else torch.zeros_like(context.mask)
    slot = torch.where(fixed, context.sensor, n_sensors).flatten(1) if context.sensor is not None else fixed.long().flatten(1)
    frame = torch.arange(t, device=slot.device)[:, None].expand(b, t, n).flatten(1)
    newest = torch.full((b, slots), -1, device=slot.device).scatter_reduce(1, slot, frame, "amax")
    kept = fixed.flatten(1) & (frame == newest.gather(1, slot))
    value = torch.zeros(b, slots, c, dtype=torch.float64, device=slot.device)
    at = kept.nonzero(as_tuple=True)
    value[at[0], slot[at]] = context.value.flatten(1, 2)[at].double()
    age = torch.full((b, slots), math.inf, dtype=torch.float64, device=slot.device)
    age[at[0], slot[at]] = (t - 1 - frame[at]).double()
    asked = torch.full(query.mask.shape, -1, device=slot.device) if query.sensor is None else query.sensor
    index = torch.where(asked >= 0, asked, n_sensors).flatten(1)
    shape = query.mask.shape
    return value.gather(1, index[..., None].expand(-1, -1, c)).view(*shape, c), age.gather(1, index).view(shape)


def fixed_only(context: Frames) -> Frames:
    """The same frames without what moving sensors reported."""
    assert context.sensor is not None
    return replace(context, mask=context.mask & (context.sensor >= 0))


def alike(tensors: list[Tensor]) -> list[list[int]]:
    """Indices of tensors that are equal bit by bit, grouped, in the order of first appearance."""
    groups: dict[bytes, list[int]] = {}
    for index, tensor in enumerate(tensors):
        groups.setdefault(tensor.contiguous().cpu().numpy().tobytes(), []).append(index)
    return list(groups.values())
