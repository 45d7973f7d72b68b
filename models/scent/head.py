"""The last layer: a prediction around the background (the mean, a Gaussian or quantiles), and its score."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from models.contract import FieldPrediction, Frames
from models.scent.config import ScentConfig

_LEAST_SCALE = 1e-6
_REACH = 5.0  # a learned log scale stays within exp(-5) .. exp(5) of where it starts


class Head(nn.Module):
    """All zeros give the background and its scale, and so it starts.

    The correction is in units of that scale: where the background is sure of itself, at a sensor now, little can be lost.
    """

    z: Tensor

    def __init__(self, config: ScentConfig, channels: int) -> None:
        super().__init__()
        self.kind, self.channels = config.head, channels
        self.out = nn.Linear(config.width, channels * {"mean": 1, "gaussian": 2, "quantile": len(config.levels)}[config.head])
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        levels = torch.tensor(config.levels, dtype=torch.float64)
        self.register_buffer("z", torch.special.ndtri(levels).to(self.out.weight.dtype), persistent=False)

    def forward(self, features: Tensor, query: Frames) -> FieldPrediction:
        """Features [B,S,Q,d] as a prediction for the points of `query`."""
        out = self.out(features).unflatten(-1, (self.channels, -1))
        background = 0.0 if query.background is None else query.background.to(out.dtype)
        scale = prior_scale(query, out)
        centre, spread = background + scale * out[..., 0], _REACH * (out[..., 1:] / _REACH).tanh()
        if self.kind == "mean":
            return FieldPrediction(centre)
        if self.kind == "gaussian":
            return FieldPrediction(centre, scale=scale * spread[..., 0].exp())
        # Quantiles: one in the middle, and positive gaps from there; at zero they are those of a Gaussian.
        middle = int(self.z.abs().argmin())
        gaps = scale.unsqueeze(-1) * self.z.diff() * spread.exp()
        steps = torch.cat([torch.zeros_like(gaps[..., :1]), gaps], -1).cumsum(-1)
        quantiles = (centre + scale * self.z[middle]).unsqueeze(-1) + steps - steps[..., middle, None]
        # The mean of the quantile function, straight between the levels and flat beyond them.
        level = torch.special.ndtr(self.z)
        edges = torch.cat([level.new_zeros(1), (level[1:] + level[:-1]) / 2, level.new_ones(1)])
        return FieldPrediction((quantiles * edges.diff()).sum(-1), quantiles=quantiles)

    def score(self, prediction: FieldPrediction, truth: Tensor, loss: str) -> Tensor:
        """The nll, crps or pinball loss of every answer, like truth [B,S,Q,C]."""
        if prediction.quantiles is not None:
            under = truth.unsqueeze(-1) - prediction.quantiles
            level = torch.special.ndtr(self.z)
            return torch.maximum(level * under, (level - 1) * under).mean(-1)
        assert prediction.scale is not None
        miss = (prediction.mean - truth) / prediction.scale
        if loss == "nll":
            return 0.5 * miss.square() + prediction.scale.log()
        # CRPS of a Gaussian in closed form (Gneiting et al. 2005): outliers weigh less than in the likelihood
        density = (-0.5 * miss.square()).exp() / (2 * torch.pi) ** 0.5
        return prediction.scale * (miss * torch.erf(miss / 2**0.5) + 2 * density - torch.pi**-0.5)


def prior_scale(query: Frames, like: Tensor) -> Tensor:
    """The background's standard deviation, 1 where there is no background."""
    if query.background_scale is None:
        return like.new_ones(1)
    return query.background_scale.to(like.dtype).clamp(min=_LEAST_SCALE)
