"""Latents in the units of the stepper's noise."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_FLOOR = 1e-2  # of a measured standard deviation, as a share of the largest: what says nothing is not blown up


class Standard(nn.Module):
    """Latents [...,M,d] to zero mean and unit variance and back, per channel [d] or per token and channel [M,d], by measured statistics;
    unmeasured, divided by `scale`."""

    mean: Tensor
    variance: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...], scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape))
        self.register_buffer("variance", torch.full(shape, scale**2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def measure(self, latents: Tensor) -> None:
        """Add latents [n,M,d] to the statistics of all so far (Chan, Golub & LeVeque, 1983)."""
        rows = latents.to(self.mean.dtype)
        rows = rows if self.mean.ndim == 2 else rows.flatten(0, 1)
        if not len(rows):
            return
        self.count += len(rows)
        weight = len(rows) / self.count.to(rows.dtype)
        away = rows.mean(0) - self.mean
        between = weight * (1 - weight) * away.square()
        self.variance.copy_((1 - weight) * self.variance + weight * rows.var(0, correction=0) + between)
        self.mean.add_(weight * away)

    @property
    def _deviation(self) -> Tensor:
        deviation = self.variance.sqrt()
        return torch.maximum(deviation, _FLOOR * deviation.max())

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self._deviation

    def undo(self, x: Tensor) -> Tensor:
        return x * self._deviation + self.mean
