"""SCENT: a conditioned neural field for sparse, noisy sensors and any lead time.

Paper: Park, Luo, Zhao, Lee, Oprescu, Yoo, "SCENT: Robust Spatiotemporal Learning for Continuous Scientific Data via Scalable
Conditioned Neural Fields", ICML 2025, arXiv 2504.12262. Written from the description; the authors' full code is not public.

    tokens of the sensors -> context embedding network (CEN, sparse self-attention) -> learned queries summarise them (TTSE)
    -> temporal warp processor (TWP, self-attention of latents) -> queries read the latents (decoder) -> calibration network (CN)

Shapes::

    B batch   T context frames   N observations a frame   S query frames   Q queries   R = B*S rows
    D space   C channels   F covariates   d width   M latents   A anchors   K neighbours a frame

What differs from the paper, `mode: paper` as well as `improved`:

- the context may hold T > 1 frames: all their tokens are one set, each with its own time feature t_j (T = 1 is the paper);
- covariates join the tokens and the queries, and a background (models/contract.py) makes the output a correction that starts at zero, in
  units of the background's standard deviation; the head starts at zero in any case, so an untrained model gives its background, or the
  mean of the training data;
- Gaussian and quantile heads beside the mean;
- the sizes that the paper does not state are ours.

`improved` also: sensors are sorted by place before the random groups are cut, so their order never matters; CN reads fixed anchor points
instead of the other queries, so an answer does not depend on what else is asked; the lead enters the processor by adaptive layer norms;
times are (t_j - t_i, t_o - t_i); frequencies on a torus are whole numbers. Every one of these is a key of `Config` of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from models.contract import TASKS, DatasetInfo, FieldBatch, FieldModel, FieldPrediction, Frames
from models.layers import Attention, FeedForward, Fourier, Spacing

MODES: dict[str, dict[str, Any]] = {
    "paper": {"order": "given", "calibration": "plain", "clock": "absolute", "adaptive_norm": False, "spacing": "linear"},
    "improved": {"order": "canonical", "calibration": "anchored", "clock": "lead", "adaptive_norm": True, "spacing": None},
}
LOSSES = {"mean": ("relative_mse", "mse"), "gaussian": ("nll", "crps"), "quantile": ("pinball",)}
_ROWS = 1 << 16  # rows of tokens or queries that predict holds at a time; bounds its memory
_EPS = 1e-6
_REACH = 5.0  # a learned log scale stays within exp(-5) .. exp(5) of where it starts


class ScentConfig(BaseModel):
    """Settings; `mode` fills in the switches that are not given. Defaults are the sheet's sizes, about 12.6 M parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["paper", "improved"] = "improved"
    horizon: int = Field(ge=1)  # t_h: the largest training lead in frames; predict unrolls beyond it
    width: int = Field(default=256, ge=1)
    latents: int = Field(default=128, ge=1)
    heads: int = Field(default=8, ge=1)
    cen_layers: int = Field(default=2, ge=0)  # 0 is the ablation without CEN
    processor_layers: int = Field(default=6, ge=0)
    cn_layers: int = Field(default=2, ge=0)  # 0 is the ablation without CN
    group: int = Field(default=64, ge=1)  # tokens a token attends to in CEN and in plain CN
    ffn_factor: int = Field(default=4, ge=1)
    query_residual: bool = True  # keep the decoder's query beside what it read
    bands: int = Field(default=32, ge=1)  # of space
    highest: float = Field(default=32.0, gt=0)  # highest linear frequency of space: half the resolution across the domain
    time_bands: int = Field(default=16, ge=1)
    time_scale: float | None = Field(default=None, gt=0)  # frames that count as 1 in the time features; None: the horizon
    projection: Literal["frozen", "trainable", "none"] = "frozen"  # of the values; none: raw values
    projection_width: int = Field(default=32, ge=1)
    time_targeting: bool = True  # the encoder sees the time asked for
    absolute_position: bool = True  # off: tokens and queries do not see coordinates, better with few stations
    neighbours: int = Field(default=0, ge=0)  # each query also reads so many nearest observations of every context frame
    head: Literal["mean", "gaussian", "quantile"] = "mean"
    loss: Literal["relative_mse", "mse", "nll", "crps", "pinball"]  # relative_mse | mse: mean; nll | crps: gaussian; pinball: quantile
    levels: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)  # of the quantile head
    warp: Literal["sensors", "queries"] = "sensors"  # where an unrolled forecast is decoded and read again
    permutation_seed: int = 0  # of the random groups outside training
    order: Literal["given", "canonical"]  # canonical: observations sorted by place before anything else
    calibration: Literal["plain", "anchored"]
    anchors: int = Field(default=64, ge=1)  # points that anchored CN reads
    clock: Literal["absolute", "lead"]  # absolute: simulations see t_i and t_o; calendar data always have (0, lead) and covariates
    adaptive_norm: bool
    spacing: Spacing | None = None  # of space frequencies; None: integers on a torus, else linear

    @model_validator(mode="before")
    @classmethod
    def _mode(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        head, mode = given.get("head", "mean"), given.get("mode", "improved")
        return {"loss": LOSSES.get(head, ("mse",))[0], **MODES.get(mode, {}), **given}

    @model_validator(mode="after")
    def _consistent(self) -> ScentConfig:
        if self.loss not in LOSSES[self.head]:
            raise ValueError(f"loss {self.loss} does not fit head {self.head}: expected {' or '.join(LOSSES[self.head])}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        levels = self.levels
        if len(levels) < 2 or levels[0] <= 0 or levels[-1] >= 1 or any(a >= b for a, b in pairwise(levels)):
            raise ValueError(f"levels must be two or more, increasing, inside 0..1, found {levels}")
        if self.cn_layers and self.calibration == "anchored" and not self.absolute_position:
            raise ValueError("anchored CN tells its anchors apart by their coordinates: set cn_layers to 0 or absolute_position to true")
        return self


class Scent(FieldModel):
    """The field model; see models/contract.py for what it is given and gives."""

    Config = ScentConfig
    tasks: ClassVar[frozenset[str]] = frozenset(TASKS)

    frozen: Tensor
    anchor: Tensor
    z: Tensor

    def __init__(self, config: ScentConfig, info: DatasetInfo) -> None:
        super().__init__()
        self.config, self.info = config, info
        self.levels = config.levels if config.head == "quantile" else ()
        c, space, width = config, len(info.space), config.width
        channels, covariates = len(info.variables), len(info.context_covariates)
        # Absolute hours since an epoch mean nothing to a network; calendar data bring their hour and season as covariates.
        self.absolute_clock = c.clock == "absolute" and not info.time_origin
        self.time_scale = float(c.time_scale or c.horizon)

        spacing: Spacing = c.spacing or ("linear" if info.period is None else "integers")
        # A raw coordinate jumps where a torus closes, as do frequencies that are not whole.
        self.place = Fourier(space, c.bands, c.highest, spacing, raw=spacing != "integers")
        self.time = Fourier(1, c.time_bands, max(1.0, self.time_scale / 2))
        values = channels
        if c.projection == "frozen":
            self.register_buffer("frozen", torch.randn(channels, c.projection_width) / channels**0.5)
            values = c.projection_width
        elif c.projection == "trainable":
            self.projection = nn.Linear(channels, c.projection_width)
            values = c.projection_width
        features = c.absolute_position * self.place.width + self.time.width + values + covariates
        self.token = nn.Linear(features, width)
        self.token_target = nn.Linear(self.time.width, width, bias=False) if c.time_targeting else None
        asked = c.absolute_position * self.place.width + len(info.query_covariates)
        self.query_place = nn.Linear(asked, width, bias=False) if asked else None
        self.query_time = nn.Linear(self.time.width, width)
        self.query_background = nn.Linear(2 * channels, width, bias=False)

        def block(cross: bool = False, condition: int = 0) -> Block:
            return Block(width, c.heads, c.ffn_factor, cross, condition)

        self.cen = nn.ModuleList(block() for _ in range(c.cen_layers))
        self.latents = nn.Parameter(torch.randn(c.latents, width))
        self.summary = block(cross=True)
        self.processor = nn.ModuleList(block(condition=c.adaptive_norm * self.time.width) for _ in range(c.processor_layers))
        self.neighbours = Neighbours(width, c.heads, c.neighbours, features, space, info.period) if c.neighbours else None
        self.decoder = block(cross=True)
        self.cn = nn.ModuleList(block() for _ in range(c.cn_layers))
        self.register_buffer("anchor", _halton(c.anchors, space).to(self.latents.dtype), persistent=False)
        self.register_buffer("z", torch.special.ndtri(torch.tensor(c.levels, dtype=torch.float64)).to(self.latents.dtype), persistent=False)
        self.head = nn.Linear(width, channels * {"mean": 1, "gaussian": 2, "quantile": len(c.levels)}[c.head])
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    # ---- the contract

    def loss(self, batch: FieldBatch) -> dict[str, Tensor]:
        """Scalar terms: `loss` as configured, and for reading `mse` and `relative_mse` of the mean, in model units.

        Raises ValueError where a lead is negative or beyond the horizon.
        """
        query, context = batch.query, batch.context
        if query.value is None:
            raise ValueError("the query has no values: there is nothing to train on")
        lead = self._lead(context, query)
        if float(lead.max()) > self.config.horizon + _EPS:
            raise ValueError(f"a training lead is {float(lead.max()):g} frames, horizon is {self.config.horizon}: make them agree")
        seen = self._see(context)
        prediction = self._answer(seen, self._encode(seen, lead), query, lead)
        known = query.mask.unsqueeze(-1).to(query.value.dtype)
        truth = torch.where(query.mask.unsqueeze(-1), query.value, 0)
        count = (known.sum() * truth.shape[-1]).clamp(min=1)
        square = (prediction.mean - truth).square() * known
        mse = square.sum() / count
        # One sample is one query frame of one window; those without any answer count for nothing.
        asked = query.mask.any(-1)
        share = square.sum((2, 3)) / (truth.square().sum((2, 3)) + _EPS)
        relative = share.sum() / asked.sum().clamp(min=1)
        terms = {"mse": mse.detach(), "relative_mse": relative.detach()}
        if self.config.loss == "mse":
            return {"loss": mse, **terms}
        if self.config.loss == "relative_mse":
            return {"loss": relative, **terms}
        if prediction.scale is not None:
            miss = (prediction.mean - truth) / prediction.scale
            if self.config.loss == "nll":
                each = 0.5 * miss.square() + prediction.scale.log()
            else:  # CRPS of a Gaussian in closed form (Gneiting et al. 2005): outliers weigh less than in the likelihood
                density = (-0.5 * miss.square()).exp() / (2 * torch.pi) ** 0.5
                each = prediction.scale * (miss * torch.erf(miss / 2**0.5) + 2 * density - torch.pi**-0.5)
        else:
            assert prediction.quantiles is not None
            under = truth.unsqueeze(-1) - prediction.quantiles
            level = torch.special.ndtr(self.z)
            each = torch.maximum(level * under, (level - 1) * under).mean(-1)
        return {"loss": (each * known).sum() / count, **terms}

    @torch.no_grad()
    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        """Answer a query; beyond the horizon by warp-unrolled forecasting: jump by the horizon, read the own forecast at the sensors
        (`warp`), go on from there. Points are streamed in chunks, except with plain CN, whose answers depend on what is asked together.

        Raises ValueError for times before the last context time, and beyond the horizon where the query has a background or lacks the
        covariates of the times in between.
        """
        training = self.training
        self.eval()
        try:
            return self._unroll(context, query)
        finally:
            self.train(training)

    # ---- unrolling (section 5 of the paper's method)

    def _unroll(self, context: Frames, query: Frames) -> FieldPrediction:
        horizon = self.config.horizon
        lead = self._lead(context, query)  # [B,S]
        # Whole jumps before the last evaluation; what is within 1e-6 of a whole number of horizons counts as whole.
        jumps = ((lead / horizon - 1e-6).ceil() - 1).clamp(min=0).long()
        last = int(jumps.max())
        if last and query.background is not None:
            raise ValueError(
                f"a lead of {float(lead.max()):g} frames is beyond the horizon {horizon}, and no background is known at the sensors in "
                "between: train with a horizon that covers it, or without a background"
            )
        columns, parts = [], []
        for jump in range(last + 1):
            now = (jumps == jump).any(0).nonzero()[:, 0]
            if len(now):
                columns.append(now)
                parts.append((jumps[:, now] == jump, self._direct(context, _frames(query, now))))
            if jump < last:
                context = self._jump(context, query)
        if len(parts) == 1:
            return parts[0][1]
        return _merge(columns, parts, query.mask.shape[1])

    def _jump(self, context: Frames, query: Frames) -> Frames:
        """The context `horizon` frames later: frames already observed stay, the others are forecast at the sensors of the last frame."""
        b, t, _ = context.mask.shape
        steps = self.config.horizon
        time = context.time + steps * self.info.step
        ahead = min(t, steps)  # of the T frames, so many are in the future
        future = time[:, t - ahead :]
        place = Frames(context.position[:, -1], context.mask[:, -1], time, covariate=context.covariate, sensor=context.sensor)
        covariate = None if context.covariate is None else context.covariate[:, -1]
        sensor = None if context.sensor is None else context.sensor[:, -1]
        if self.config.warp == "queries":
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
        answer = self._direct(context, ask)
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
        kept = _frames(context, torch.arange(ahead, t, device=context.time.device))
        return _append(kept, forecast)

    def _covariate_at(self, query: Frames, time: Tensor, points: int) -> Tensor:
        """Query covariates [B,points,F] at time [B]: they are functions of time alone, so a frame asked for at that time has them."""
        assert query.covariate is not None
        near = (query.time - time.unsqueeze(1)).abs() < _EPS * self.info.step
        if not near.any(1).all():
            raise ValueError(
                f"the forecast must be unrolled over horizon {self.config.horizon}, but the query has no frame at the time of the jump, "
                f"to take {', '.join(self.info.query_covariates)} from: ask for every frame, or train with a longer horizon"
            )
        row = torch.arange(len(time), device=time.device)
        return query.covariate[row, near.long().argmax(1), :1].expand(-1, points, -1)

    def _direct(self, context: Frames, query: Frames) -> FieldPrediction:
        """One evaluation for all leads of `query`."""
        seen = self._see(context)
        lead = self._steps(query.time - context.time[:, -1:])
        b, s, q = query.mask.shape
        together = max(1, _ROWS // (b * max(1, seen.mask.shape[1])))
        frames = []
        for k in range(0, s, together):
            part, leads = _frames(query, slice(k, k + together)), lead[:, k : k + together]
            latents = self._encode(seen, leads)
            rows = leads.numel()  # a point needs
            if self.neighbours is not None:  # and so many pairs with observations, which weigh more than anything else
                t, n = context.mask.shape[1:]
                once = part.position.stride(1) == 0  # the same points in every query frame
                rows = max(rows, (b if once else rows) * t * min(self.neighbours.count, n) // 4)
            chunk = q if self._coupled else max(1, _ROWS // rows)
            answers = [self._answer(seen, latents, part.points(slice(i, i + chunk)), leads) for i in range(0, max(q, 1), chunk)]
            frames.append(FieldPrediction.concatenate(answers))
        if len(frames) == 1:
            return frames[0]
        return FieldPrediction(*[_cat([getattr(f, name) for f in frames], 1) for name in ("mean", "scale", "quantiles")])

    # ---- the network

    def _lead(self, context: Frames, query: Frames) -> Tensor:
        """Leads [B,S] in frames, float64."""
        lead = (query.time - context.time[:, -1:]).double() / self.info.step
        if lead.numel() and float(lead.min()) < -_EPS:
            raise ValueError(f"the query asks for {-float(lead.min()):g} frames before the last context time: SCENT looks ahead only")
        return lead

    def _steps(self, duration: Tensor) -> Tensor:
        return (duration / self.info.step).to(self.latents.dtype)

    @property
    def _coupled(self) -> bool:
        """Whether an answer depends on what else is asked."""
        return bool(self.cn) and self.config.calibration == "plain"

    def _clock(self, steps: Tensor) -> Tensor:
        """Time features (...,) -> (...,width) of times in frames."""
        return self.time(steps.unsqueeze(-1) / self.time_scale)

    def _see(self, context: Frames) -> _Seen:
        """Sensor tokens before they know what is asked."""
        assert context.value is not None
        if self.config.order == "canonical":
            context = _sorted(context)
        assert context.value is not None
        mask = context.mask.unsqueeze(-1)
        value, position = torch.where(mask, context.value, 0), torch.where(mask, context.position, 0)
        if self.config.projection == "frozen":
            value = value @ self.frozen
        elif self.config.projection == "trainable":
            value = self.projection(value)
        own = context.time / self.info.step if self.absolute_clock else (context.time - context.time[:, -1:]) / self.info.step
        own = self._clock(own.to(self.latents.dtype)).unsqueeze(2).expand(*context.mask.shape, -1)
        parts = [value, own]
        if self.config.absolute_position:
            parts.append(self.place(position))
        if context.covariate is not None:
            parts.append(torch.where(mask, context.covariate, 0))
        features = torch.cat(parts, -1)
        start = (
            self._steps(context.time[:, -1:]) if self.absolute_clock else torch.zeros_like(context.time[:, -1:], dtype=self.latents.dtype)
        )
        return _Seen(features, self.token(features).flatten(1, 2), position, context.mask.flatten(1), start)

    def _encode(self, seen: _Seen, lead: Tensor) -> Tensor:
        """Latents [B,S,M,d] for leads [B,S]. Without time targeting and adaptive norms they are the same for all leads: [B,1,M,d]."""
        lead = lead.to(self.latents.dtype)
        h = seen.token.unsqueeze(1)
        if self.token_target is not None:
            h = h + self.token_target(self._clock(seen.start + lead)).unsqueeze(2)
        b, s = h.shape[:2]
        h, mask = h.flatten(0, 1), seen.mask.repeat_interleave(s, 0)
        for number, layer in enumerate(self.cen):
            h = in_groups(layer, h, mask, self._order(mask, number), self.config.group)
        latents = self.summary(self.latents.expand(b * s, -1, -1), h, None if bool(mask.all()) else mask.unsqueeze(1))
        condition = None
        if self.config.adaptive_norm and self.processor:
            if s < lead.shape[1]:
                latents, s = latents.repeat_interleave(lead.shape[1], 0), lead.shape[1]
            condition = self._clock(lead).flatten(0, 1).unsqueeze(1)
        for layer in self.processor:
            latents = layer(latents, condition=condition)
        return latents.unflatten(0, (b, s))

    def _answer(self, seen: _Seen, latents: Tensor, query: Frames, lead: Tensor) -> FieldPrediction:
        """The prediction for all points of `query` at leads [B,S]."""
        b, s = query.mask.shape[:2]
        lead = lead.to(self.latents.dtype)
        latents = latents.expand(b, s, -1, -1).flatten(0, 1)
        v = self._decode(seen, latents, query.position, query.covariate, self._prior(query), lead)
        if self._coupled:
            mask = query.mask.flatten(0, 1)
            for number, layer in enumerate(self.cn):
                v = in_groups(layer, v, mask, self._order(mask, len(self.cen) + number), self.config.group)
        elif self.cn:
            place = self.anchor.expand(b, s, -1, -1)
            unknown = place.new_zeros(1, 1, 1, len(self.info.query_covariates)) if query.covariate is not None else None
            fixed = self._decode(seen, latents, place, unknown, place.new_zeros(1, 1, 1, 2 * len(self.info.variables)), lead)
            for number, layer in enumerate(self.cn):
                v = layer(v, fixed)
                if number + 1 < len(self.cn):
                    fixed = layer(fixed)
        return self._head(self.head(v).unflatten(0, (b, s)), query)

    def _decode(self, seen: _Seen, latents: Tensor, position: Tensor, covariate: Tensor | None, prior: Tensor, lead: Tensor) -> Tensor:
        """Features [R,Q,d] of points [B,S,Q,D] from latents [R,M,d]."""
        asked = self.query_time(self._clock(seen.start + lead)).unsqueeze(2) + self.query_background(prior)
        parts = [self.place(_unexpanded(position))] if self.config.absolute_position else []
        if covariate is not None:
            parts.append(covariate)
        if self.query_place is not None:
            # Linear in its parts: a layout shared by the whole batch is embedded once.
            weights = self.query_place.weight.split([part.shape[-1] for part in parts], dim=1)
            asked = asked + sum(F.linear(_unexpanded(part), weight) for part, weight in zip(parts, weights, strict=True))
        b, s, q, _ = position.shape
        asked = asked.expand(b, s, q, -1)
        near = None if self.neighbours is None else self.neighbours(asked, position, seen).flatten(0, 1)
        return self.decoder(asked.flatten(0, 1), latents, residual=self.config.query_residual, beside=near)

    def _prior(self, query: Frames) -> Tensor:
        """Background and the logarithm of its scale [B,S,Q,2C]; zero, the training mean and scale 1, where there is none."""
        if query.background is None:
            return self.anchor.new_zeros(1, 1, 1, 2 * len(self.info.variables))
        mean = query.background.to(self.latents.dtype)
        return torch.cat([mean, self._prior_scale(query).log().expand_as(mean)], -1)

    def _prior_scale(self, query: Frames) -> Tensor:
        if query.background_scale is None:
            return self.latents.new_ones(1)
        return query.background_scale.to(self.latents.dtype).clamp(min=_EPS)

    def _head(self, out: Tensor, query: Frames) -> FieldPrediction:
        """out [B,S,Q,C*k] as a prediction around the background; all zeros give the background and its scale.

        The correction is in units of that scale: where the background is sure of itself, at a sensor now, little can be lost.
        """
        out = out.unflatten(-1, (len(self.info.variables), -1))
        background = 0.0 if query.background is None else query.background.to(out.dtype)
        scale = self._prior_scale(query)
        centre, spread = background + scale * out[..., 0], _REACH * (out[..., 1:] / _REACH).tanh()
        if self.config.head == "mean":
            return FieldPrediction(centre)
        if self.config.head == "gaussian":
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

    def _order(self, mask: Tensor, block: int) -> Tensor | None:
        """A random order [R,N] of what is valid, padding last; None where one group holds all. In training from the global generator,
        else a fixed function of the rank among the valid ones, so that padding changes nothing."""
        if mask.shape[1] <= self.config.group:
            return None
        if self.training:
            key = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, 2.0)
        else:
            key = _hash(mask.cumsum(-1), self.config.permutation_seed * 7919 + block).masked_fill(~mask, torch.iinfo(torch.int64).max)
        return key.argsort(dim=-1, stable=True)


@dataclass(frozen=True)
class _Seen:
    """A context as tokens."""

    features: Tensor  # [B,T,N,f]
    token: Tensor  # [B,T*N,d] without the time asked for
    position: Tensor  # [B,T,N,D]
    mask: Tensor  # [B,T*N]
    start: Tensor  # [B,1] t_i on the model's clock, in frames


class Block(nn.Module):
    """x + attention(norm x; norm keys), then x + feed-forward(norm x). x [R,N,d], keys [R,K,d]; keys default to x."""

    def __init__(self, width: int, heads: int, factor: int, cross: bool = False, condition: int = 0) -> None:
        super().__init__()
        self.norm, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_keys = nn.LayerNorm(width) if cross else None
        self.attention, self.ffn = Attention(width, heads), FeedForward(width, factor)
        self.modulation = nn.Linear(condition, 4 * width) if condition else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        x: Tensor,
        keys: Tensor | None = None,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
        residual: bool = True,
        beside: Tensor | None = None,
    ) -> Tensor:
        """`condition` [R,1,c] scales and shifts both norms; `beside` [R,N,d] is added to what attention read."""
        query, shift, scale = self.norm(x), None, None
        if self.modulation is not None:
            by, to, scale, shift = self.modulation(condition).chunk(4, dim=-1)
            query = query * (1 + by) + to
        keys = query if keys is None else (self.norm_keys or self.norm)(keys)
        read = self.attention(query, keys, mask)
        if beside is not None:
            read = read + beside
        x = x + read if residual else read
        inner = self.norm_ffn(x)
        if scale is not None and shift is not None:
            inner = inner * (1 + scale) + shift
        return x + self.ffn(inner)


def in_groups(layer: nn.Module, x: Tensor, mask: Tensor, order: Tensor | None, size: int) -> Tensor:
    """A self-attention block inside groups of `size` cut from `order` [R,N], valid tokens first; order None: all N are one group.

    Cost O(N size d). x [R,N,d]; mask [R,N] is True where a token is valid.
    """
    rows, n, width = x.shape
    if order is None:
        return layer(x, mask=None if bool(mask.all()) else mask.unsqueeze(1))
    pad = -n % size
    flat = (order + n * torch.arange(rows, device=x.device).unsqueeze(1)).flatten()
    back = torch.empty_like(flat).scatter_(0, flat, torch.arange(len(flat), device=x.device))
    cut = F.pad(x.flatten(0, 1).index_select(0, flat).view(rows, n, width), (0, 0, 0, pad)).view(-1, size, width)
    keys = F.pad(mask.gather(1, order), (0, pad)).view(-1, 1, size)
    out = layer(cut, mask=None if bool(keys.all()) else keys).view(rows, n + pad, width)[:, :n]
    return out.flatten(0, 1).index_select(0, back).view(rows, n, width)


class Neighbours(nn.Module):
    """What the observations near a point say: attention of each query to its K nearest observations of every context frame.

    A key knows the token and where it lies from the query; a value is linear in the token's features, without a norm in between, so that
    a large reading stays large. Head by head this can become the last value of the own station, its mean of some hours, or a kernel
    smoother of its surroundings. Not in the paper.
    """

    def __init__(self, width: int, heads: int, count: int, features: int, space: int, period: float | None) -> None:
        super().__init__()
        self.count, self.heads, self.period = count, heads, period
        self.norm, self.norm_keys = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(features, width, bias=False)
        self.offset = nn.Linear(space + 2, 2 * width)

    def forward(self, asked: Tensor, position: Tensor, seen: _Seen) -> Tensor:
        """asked [B,S,Q,d] queries at position [B,S,Q,D] -> [B,S,Q,d]."""
        b, t, n, _ = seen.position.shape
        if position.stride(1) == 0:  # the same points in every query frame
            position = position[:, :1]
        away = position[:, :, :, None, None] - seen.position[:, None, None]  # [B,s,Q,T,N,D]
        if self.period is not None:
            away = away - self.period * (away / self.period).round()
        square = away.square().sum(-1)
        # Sensors equally far are taken in their order, whatever the selection does with ties.
        tie = 1e-6 / n * torch.arange(n, device=square.device, dtype=square.dtype)
        hidden = ~seen.mask.view(b, 1, 1, t, n)
        nearest = (square + tie).masked_fill(hidden, torch.inf).topk(min(self.count, n), dim=-1, largest=False, sorted=True).indices
        away = away.gather(-2, nearest.unsqueeze(-1).expand(*nearest.shape, away.shape[-1]))
        distance = away.square().sum(-1, keepdim=True).add(1e-12).sqrt()
        offset = self.offset(torch.cat([away, distance, (distance + 0.01).log()], -1))  # [B,s,Q,T,K,2d]
        known = torch.cat([self.key(self.norm_keys(seen.token)), self.value(seen.features).flatten(1, 2)], -1)  # [B,T*N,2d]
        first = torch.arange(b, device=nearest.device).view(b, 1, 1, 1, 1) * (t * n)
        row = nearest + first + n * torch.arange(t, device=nearest.device).view(t, 1)
        pairs = known.flatten(0, 1).index_select(0, row.flatten()).view(*row.shape, -1) + offset
        mask = seen.mask.flatten().index_select(0, row.flatten()).view(row.shape)

        # One attention per point: its S queries against the T*K observations around it.
        shared = pairs.shape[1]
        key, value = pairs.reshape(b, shared, -1, t * nearest.shape[-1], 2, self.heads, pairs.shape[-1] // (2 * self.heads)).unbind(4)
        query = self.query(self.norm(asked)).unflatten(-1, (self.heads, -1))  # [B,S,Q,h,e]
        query = query.permute(0, 2, 3, 1, 4).unsqueeze(1) if shared == 1 else query.unsqueeze(4)  # [B,1,Q,h,S,e] or [B,S,Q,h,1,e]
        sees = mask.flatten(3)[..., None, None, :]
        out = F.scaled_dot_product_attention(query, key.transpose(3, 4), value.transpose(3, 4), sees)
        out = out.squeeze(1).permute(0, 3, 1, 2, 4) if shared == 1 else out.squeeze(4)
        return self.out(out.flatten(-2))


def _sorted(context: Frames) -> Frames:
    """Observations of each frame in the order of their place (then value), padding last: the order given does not matter."""
    assert context.value is not None
    order = torch.arange(context.mask.shape[-1], device=context.mask.device).expand(context.mask.shape)
    keys = [*context.value.unbind(-1)[::-1], *context.position.unbind(-1)[::-1], (~context.mask).to(torch.uint8)]
    for key in keys:  # the least significant first; each sort keeps the order of its equals
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, stable=True))

    def take(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.gather(2, order if x.ndim == 3 else order.unsqueeze(-1).expand(*order.shape, x.shape[-1]))

    position, mask = take(context.position), take(context.mask)
    assert position is not None
    assert mask is not None
    return replace(
        context, position=position, mask=mask, value=take(context.value), covariate=take(context.covariate), sensor=take(context.sensor)
    )


def _frames(frames: Frames, which: Tensor | slice) -> Frames:
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


def _cat(tensors: list[Any], axis: int) -> Any:
    return None if tensors[0] is None else torch.cat(tensors, axis)


def _unexpanded(x: Tensor) -> Tensor:
    """x with size 1 along the leading axes that were only expanded, so that what is shared is computed once."""
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride()[:-1])]


def _halton(count: int, axes: int) -> Tensor:
    """Evenly spread points [count,axes] in (-1, 1), the same on every machine (J. Halton, 1960)."""
    primes = (2, 3, 5, 7, 11)
    if axes > len(primes):
        raise ValueError(f"space has {axes} axes, at most {len(primes)} are supported")
    points = torch.zeros(count, axes, dtype=torch.float64)
    for axis, base in enumerate(primes[:axes]):
        number, weight = torch.arange(1, count + 1), 1.0
        while bool((number > 0).any()):
            weight /= base
            points[:, axis] += weight * (number % base)
            number = number // base
    return 2 * points - 1


def _hash(x: Tensor, salt: int) -> Tensor:
    """Well mixed int64 of int64 x, the same on every device (the finaliser of MurmurHash3 with wrapping products)."""
    x = (x + 1 + salt * 1_000_003) * -7046029254386353131
    x = (x ^ (x >> 33)) * -49064778989728563
    x = (x ^ (x >> 33)) * -4265267296055464877
    return x ^ (x >> 33)
