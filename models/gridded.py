"""What the models on a regular grid share: sensors are rasterised, a network works on the grid, points read it by interpolation.

    context frame -> density, values, covariates on the grid (models/rasterise.py); the frames side by side are the input channels
    lead -> Fourier features, added as constant channels -> network -> features of every node
    features at a point, its background and query covariates -> point-wise MLP -> background + scale * correction

Shapes::

    B batch   T context frames   N observations a frame   S query frames   Q queries   R = B*S rows
    G nodes of an axis   D space   C channels   F covariates   d width

The answer at a point depends on the context and the lead alone, so points are streamed in chunks. A context with fewer frames than the
network reads has empty ones before it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from models.contract import TASKS, DatasetInfo, FieldBatch, FieldModel, FieldPrediction, Frames
from models.layers import Fourier
from models.rasterise import Grid, interpolate, set_convolution

LOSSES = {"mean": ("mse", "relative_mse"), "gaussian": ("nll", "crps")}
_NODES = 1 << 18  # nodes of all rows that predict holds at a time; bounds its memory
_POINTS = 1 << 16  # and points
_EPS = 1e-6
_REACH = 5.0  # a learned log scale stays within exp(-5) .. exp(5) of the background's


class GriddedConfig(BaseModel):
    """Settings of all models on a grid; `mode` fills in the switches that are not given."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    switches: ClassVar[dict[str, dict[str, Any]]]  # mode -> switch -> value

    mode: Literal["paper", "improved"] = "improved"
    horizon: int = Field(ge=1)  # the largest lead in frames, in training and in use
    frames: int = Field(default=1, ge=1)  # context frames read, the last ones
    width: int = Field(ge=1)
    layers: int = Field(ge=1)
    margin: float = Field(default=0.25, ge=0)  # of the grid beyond the domain on every side of a plane, in model units; the domain has 2
    kernel: float = Field(default=2.0, gt=0)  # length of the set convolution at the start, in steps of the grid; it is learned
    lead_bands: int = Field(default=4, ge=1)
    lead_scaling: bool  # the lead also scales and shifts the features before every layer; off: constant channels alone
    head: Literal["mean", "gaussian"]
    head_width: int = Field(default=128, ge=1)
    head_layers: int = Field(ge=1)  # hidden ones
    loss: Literal["mse", "relative_mse", "nll", "crps"]  # mse | relative_mse: mean; nll | crps: gaussian

    @model_validator(mode="before")
    @classmethod
    def _mode(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        head = given.get("head", cls.model_fields["head"].default)
        loss = LOSSES[head][0] if head in LOSSES else "mse"
        return {"loss": loss, **cls.switches.get(given.get("mode", "improved"), {}), **given}

    @model_validator(mode="after")
    def _consistent(self) -> GriddedConfig:
        if self.loss not in LOSSES[self.head]:
            raise ValueError(f"loss {self.loss} does not fit head {self.head}: expected {' or '.join(LOSSES[self.head])}")
        return self


class Gridded(FieldModel):
    """A field model around `blocks`, the network on the grid; see models/contract.py for what it is given and gives.

    Each block takes features [R,G,...,G,d] and what is known of a row's lead [R,f], and gives features of the same shape.
    """

    blocks: nn.ModuleList
    tasks: ClassVar[frozenset[str]] = frozenset(TASKS)

    def __init__(self, config: GriddedConfig, info: DatasetInfo, step: float, extra: int = 0) -> None:
        """`step` of the grid in model units; `extra` channels that the model adds to those of the context."""
        super().__init__()
        self.config, self.info = config, info
        channels, width = len(info.variables), config.width
        self.log_length = nn.Parameter(torch.tensor(math.log(config.kernel * step)))
        self.lead = Fourier(1, config.lead_bands, max(1.0, config.horizon / 2))
        self.lift = nn.Linear(config.frames * (1 + channels + len(info.context_covariates)) + extra, width)
        self.lift_lead = nn.Linear(self.lead.width, width, bias=False)
        sizes = [width + 2 * channels + len(info.query_covariates), *[config.head_width] * config.head_layers]
        self.hidden = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(sizes))
        self.head = nn.Linear(sizes[-1], channels * (1 if config.head == "mean" else 2))
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def grid(self, context: Frames) -> Grid:
        """The grid of each window [B,...], or one for all."""
        raise NotImplementedError

    def extra(self, grid: Grid) -> Tensor | None:
        """More input channels [1,G,...,G,E] that the model wants on the grid."""
        return None

    # ---- the contract

    def loss(self, batch: FieldBatch) -> dict[str, Tensor]:
        """Scalar terms: `loss` as configured, and for reading `mse` and `relative_mse` of the mean, in model units.

        Raises ValueError where a lead is negative or beyond the horizon.
        """
        query = batch.query
        if query.value is None:
            raise ValueError("the query has no values: there is nothing to train on")
        lead = self._leads(batch.context, query)
        grid = self.grid(batch.context)
        features = self._features(self._rasterised(batch.context, grid), lead)
        prediction = self._answer(features, grid.repeated(lead.shape[1]), query)
        known = query.mask.unsqueeze(-1).to(query.value.dtype)
        truth = torch.where(query.mask.unsqueeze(-1), query.value, 0)
        count = (known.sum() * truth.shape[-1]).clamp(min=1)
        square = (prediction.mean - truth).square() * known
        # One sample of the relative error is one query frame of one window; those without any answer count for nothing.
        share = square.sum((2, 3)) / (truth.square().sum((2, 3)) + _EPS)
        terms = {"mse": square.sum() / count, "relative_mse": share.sum() / query.mask.any(-1).sum().clamp(min=1)}
        if self.config.loss in terms:
            loss = terms[self.config.loss]
        else:
            assert prediction.scale is not None
            miss = (prediction.mean - truth) / prediction.scale
            if self.config.loss == "nll":
                each = 0.5 * miss.square() + prediction.scale.log() + 0.5 * math.log(2 * math.pi)
            else:  # CRPS of a Gaussian in closed form (Gneiting et al. 2005)
                density = (-0.5 * miss.square()).exp() / (2 * math.pi) ** 0.5
                each = prediction.scale * (miss * torch.erf(miss / 2**0.5) + 2 * density - math.pi**-0.5)
            loss = (each * known).sum() / count
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}

    @torch.no_grad()
    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        """Answer a query at leads from 0 to the horizon, fractions of a frame included; raises ValueError for others."""
        training = self.training
        self.eval()
        try:
            lead = self._leads(context, query)
            grid = self.grid(context)
            seen = self._rasterised(context, grid)
            b, s, q = query.mask.shape
            together = max(1, _NODES // seen[..., 0].numel())
            chunk = max(1, _POINTS // (b * min(s, together)))
            parts = []
            for start in range(0, s, together):
                frames = slice(start, start + together)
                features = self._features(seen, lead[:, frames])
                here, asked = grid.repeated(lead[:, frames].shape[1]), _frames(query, frames)
                answers = [self._answer(features, here, asked.points(slice(i, i + chunk))) for i in range(0, max(q, 1), chunk)]
                parts.append(FieldPrediction.concatenate(answers))
            scale = None if parts[0].scale is None else torch.cat([part.scale for part in parts if part.scale is not None], 1)
            return FieldPrediction(torch.cat([part.mean for part in parts], 1), scale)
        finally:
            self.train(training)

    # ---- between points and grid

    def _leads(self, context: Frames, query: Frames) -> Tensor:
        """Leads [B,S] in frames."""
        lead = (query.time - context.time[:, -1:]).double() / self.info.step
        if lead.numel() and (float(lead.min()) < -_EPS or float(lead.max()) > self.config.horizon + _EPS):
            raise ValueError(
                f"the query asks for leads {float(lead.min()):g} to {float(lead.max()):g} frames, {type(self).__name__} answers"
                f" 0 to horizon {self.config.horizon}: train with a horizon that covers them"
            )
        return lead.to(self.log_length.dtype)

    def _rasterised(self, context: Frames, grid: Grid) -> Tensor:
        """Channels [B,G,...,G,frames*(1+C+F)] of the context, and the model's own."""
        assert context.value is not None
        b, t, _ = context.mask.shape
        missing = self.config.frames - t
        if missing < 0:
            raise ValueError(f"the context has {t} frames, the network reads {self.config.frames}: set `frames` to {t}")
        value = context.value if context.covariate is None else torch.cat([context.value, context.covariate], -1)
        position, value, mask = (x.flatten(0, 1) for x in (context.position, value, context.mask))
        drawn = set_convolution(position, value, mask, grid.repeated(t), self.log_length.exp()).unflatten(0, (b, t))
        drawn = torch.cat([drawn.new_zeros(b, missing, *drawn.shape[2:]), drawn], 1).movedim(1, -2).flatten(-2)
        extra = self.extra(grid)
        return drawn if extra is None else torch.cat([drawn, extra.expand(b, *extra.shape[1:])], -1)

    def _features(self, seen: Tensor, lead: Tensor) -> Tensor:
        """Features [R,G,...,G,d] for leads [B,S]."""
        known = self.lead((lead / self.config.horizon).unsqueeze(-1))  # [B,S,f]
        shift = self.lift_lead(known).view(*lead.shape, *[1] * (seen.ndim - 2), -1)
        x, known = (self.lift(seen).unsqueeze(1) + shift).flatten(0, 1), known.flatten(0, 1)
        for block in self.blocks:
            x = block(x, known)
        return x

    def _answer(self, features: Tensor, grid: Grid, query: Frames) -> FieldPrediction:
        """The prediction at all points; all zeros of the head give the background and its scale (0 and 1 where there is none)."""
        b, s, q = query.mask.shape
        channels = len(self.info.variables)
        h = interpolate(features, query.position.flatten(0, 1), grid).unflatten(0, (b, s))
        if query.background is None:
            background, scale = h.new_zeros(1), h.new_ones(1)
            prior = h.new_zeros(b, s, q, 2 * channels)
        else:
            assert query.background_scale is not None
            background, scale = query.background.to(h.dtype), query.background_scale.to(h.dtype).clamp(min=_EPS)
            prior = torch.cat([background, scale.log()], -1)
        known = [] if query.covariate is None else [query.covariate.to(h.dtype)]
        h = torch.cat([h, prior, *known], -1)
        for layer in self.hidden:
            h = F.gelu(layer(h))
        out = self.head(h).unflatten(-1, (channels, -1))
        mean = background + scale * out[..., 0]
        if self.config.head == "mean":
            return FieldPrediction(mean)
        return FieldPrediction(mean, scale * (_REACH * (out[..., 1] / _REACH).tanh()).exp())


class Modulation(nn.Module):
    """Scale and shift of features x [R,G,...,G,d] by what is known about a row [R,f]; nothing at the start (Perez et al. 2018, FiLM)."""

    def __init__(self, known: int, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(known, 2 * width)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        by, to = self.linear(known).view(len(x), *[1] * (x.ndim - 2), -1).chunk(2, -1)
        return x * (1 + by) + to


def _frames(frames: Frames, which: slice) -> Frames:
    """Some of the query frames."""
    names = ("position", "mask", "time", "covariate", "background", "background_scale")
    return Frames(**{name: getattr(frames, name)[:, which] for name in names if getattr(frames, name) is not None})
