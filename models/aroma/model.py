"""AROMA: a field of any points as a few latent tokens, stepped in time by a small diffusion transformer, decoded at any point.

Paper: Serrano, Wang, Le Naour, Vittaut, Gallinari, "AROMA: Preserving Spatial Structure for Latent PDE Modeling with Local Neural
Fields", NeurIPS 2024, arXiv 2406.02176. Written from the description; checked against the authors' code (benchmarks/parity_aroma.py).

    observations of one frame -> learned tokens read their places, then their values -> mean and variance of the latents (a VAE)
    -> latents step in time, K + 1 network calls a step (models/aroma/stepper.py, models/aroma/diffusion.py)
    -> self-attention of tokens -> a query reads them once per frequency band -> MLP (a local neural field)

Two phases: "encode" trains the auto-encoder on single frames; "step" freezes it and trains the stepper on pairs of consecutive frames.

Shapes::

    B batch   T context frames   N observations a frame   S query frames   Q queries   R rows   E members
    D space   C channels   F covariates   h width   M tokens   d latent channels   L bands (scales) of the decoder   f features a band

What differs from the paper, `mode: paper` as well as `improved`:

- a forecast starts from the last context frame that has observations; frames before it serve training alone;
- weather covariates join the values;
- the deterministic ablation keeps the adaptive norms, which then see a constant;
- all pairs of a window make one optimiser step, not one each.

`improved` also: frequencies on a torus are whole numbers; values know where they are, by a learned embedding of the place; in training
observations are dropped at random; calendar covariates join the code of a query; latents have zero mean and unit variance before the
stepper, as its noise has - per token and channel, since most of what a channel varies is between tokens and does not move; eight rollouts
make an ensemble. Every one of these is a key of `Config` of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from models.aroma import diffusion
from models.aroma.stepper import LatentStepper
from models.contract import TASKS, DatasetInfo, FieldBatch, FieldModel, FieldPrediction, Frames

MODES: dict[str, dict[str, Any]] = {
    "paper": {"spacing": "powers", "place_in_value": False, "dropout": (), "calendar": False, "standardise": "none", "members": 1},
    "improved": {
        "spacing": None,
        "place_in_value": True,
        "dropout": (0.0, 0.25, 0.5, 0.75),
        "calendar": True,
        "standardise": "token",
        "members": 8,
    },
}
_ROWS = 1 << 15  # observations, tokens or queries that are worked on at a time without gradients; bounds the memory
_EPS = 1e-8
_TOLERANCE = 1e-4  # of a lead, in frames
_FLOOR = 1e-2  # of a measured standard deviation, as a share of the largest: what says nothing is not blown up
_LOG_VARIANCE = (-30.0, 20.0)


class AromaConfig(BaseModel):
    """Settings; `mode` fills in the switches that are not given. Defaults are those of Navier-Stokes 1e-3 in the released code."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["paper", "improved"] = "improved"
    width: int = Field(default=128, ge=1)
    tokens: int = Field(default=32, ge=1)
    channels: int = Field(default=8, ge=1)  # of a latent token
    heads: int = Field(default=4, ge=1)
    head_width: int = Field(default=32, ge=1)
    bands: int = Field(default=12, ge=1)  # frequencies of a place, and of each scale of a query
    highest: float = Field(default=4.0, gt=0)  # places: frequencies from 1 to 2^highest
    scales: tuple[float, ...] = Field(default=(2.0, 3.0), min_length=1)  # queries: 1 .. 2^s_1, 2^s_1 .. 2^s_2, ...
    feature_width: int = Field(default=16, ge=1)  # what a query reads at each scale
    encode_geometry: bool = True  # tokens read the places before the values
    decoder_repeats: int = Field(default=3, ge=1)
    shared_decoder: bool = True  # one block repeated; off: weights of their own
    field_width: int = Field(default=64, ge=1)  # of the MLP at the end
    field_depth: int = Field(default=3, ge=1)
    sample_latents: bool = True  # in training; off: the mean, a plain auto-encoder but for the KL term
    kl_weight: float = Field(default=1e-5, ge=0)
    reconstruction: Literal["mse", "relative_l2"] = "mse"
    stepper_width: int = Field(default=128, ge=1)
    stepper_depth: int = Field(default=4, ge=1)
    stepper_heads: int = Field(default=4, ge=1)
    ffn_factor: int = Field(default=4, ge=1)
    diffusion: bool = True  # off: one call gives the next latents
    refinements: int = Field(default=3, ge=1)  # K
    min_noise: float = Field(default=1e-3, gt=0, lt=1)  # variance of the lowest noise level
    difference: bool = False  # step to the change of the latents, not to the next ones
    difference_factor: float = Field(default=50.0, gt=0)  # changes are multiplied by it, where they are not standardised
    seed: int = 0  # of the noise of rollouts
    spacing: Literal["powers", "whole"] | None = None  # of frequencies: powers of 2, rounded if `whole`; None: whole on a torus
    place_in_value: bool
    dropout: tuple[float, ...]  # shares of observations hidden from the encoder in training, one drawn for each frame
    calendar: bool
    standardise: Literal["none", "channel", "token"]  # latents before the stepper, by statistics measured while it trains
    members: int = Field(ge=1)  # rollouts of a prediction

    @model_validator(mode="before")
    @classmethod
    def _mode(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        single = {} if given.get("diffusion", True) else {"members": 1}
        return {**MODES.get(given.get("mode", "improved"), {}), **single, **given}

    @model_validator(mode="after")
    def _consistent(self) -> AromaConfig:
        if self.stepper_width % self.stepper_heads:
            raise ValueError(f"stepper_width {self.stepper_width} is not a multiple of stepper_heads {self.stepper_heads}")
        edges = (0.0, *self.scales)
        if any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"scales must be positive and increasing, found {self.scales}")
        if any(not 0 <= share < 1 for share in self.dropout):
            raise ValueError(f"dropout must be shares in [0, 1), found {self.dropout}")
        if self.members > 1 and not self.diffusion:
            raise ValueError(f"without diffusion all rollouts are equal, but members is {self.members}: set it to 1")
        return self


class Aroma(FieldModel):
    """The field model; see models/contract.py for what it is given and gives. It answers at whole-frame leads from 0 on."""

    Config = AromaConfig
    tasks: ClassVar[frozenset[str]] = frozenset(TASKS)
    phases: ClassVar[tuple[str, ...]] = ("encode", "step")
    corrects: ClassVar[bool] = False

    def __init__(self, config: AromaConfig, info: DatasetInfo) -> None:
        super().__init__()
        self.config, self.info = config, info
        c = config
        self.plan = diffusion.schedule(c.min_noise, c.refinements)
        self.encoder, self.decoder = Encoder(c, info), Decoder(c, info)
        self.stepper = LatentStepper(
            c.tokens, c.channels, c.stepper_width, c.stepper_depth, c.stepper_heads, c.ffn_factor, self.plan.levels
        )
        each = (c.tokens, c.channels) if c.standardise == "token" else (c.channels,)
        self.state = Standard(each)
        self.change = Standard(each, 1 / c.difference_factor) if c.difference else None
        self.begin("encode")

    # ---- the contract

    def begin(self, phase: str) -> None:
        """Raises ValueError for a phase it does not have."""
        if phase not in self.phases:
            raise ValueError(f"unknown phase {phase!r}: expected one of {', '.join(self.phases)}")
        self.phase = phase
        for part in (self.encoder, self.decoder):
            part.requires_grad_(phase == "encode")
        self.stepper.requires_grad_(phase == "step")

    def loss(self, batch: FieldBatch) -> dict[str, Tensor]:
        """Phase encode: `loss` = reconstruction + kl_weight * `kl` of the last context frame, scored at the query frames of lead 0.
        Phase step: `loss` of the velocities (or of the next latents) over the pairs of consecutive context frames with observations.

        Raises ValueError where there is nothing to train on: no values or no lead 0 in the query, or a single context frame.
        """
        return self._reconstruction(batch) if self.phase == "encode" else self._velocities(batch.context)

    @torch.no_grad()
    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        """Encode once, roll out, decode at the points asked for. Members of the ensemble use the same noise for every window, so an
        answer does not depend on the batch. Raises ValueError for times before the last observed frame or between frames."""
        training = self.training
        self.eval()
        try:
            return self._roll_out(context, query)
        finally:
            self.train(training)

    # ---- phase encode

    def _reconstruction(self, batch: FieldBatch) -> dict[str, Tensor]:
        context, query = batch.context, batch.query
        if query.value is None:
            raise ValueError("the query has no values: there is nothing to train on")
        now = self._lead(query.time, context.time[:, -1:]).abs() < _TOLERANCE  # [B,S]
        columns = now.any(0).nonzero()[:, 0]
        if not len(columns):
            raise ValueError("phase encode learns from query frames at lead 0, the query has none: set max_lead to 0 or ask for all leads")
        last = _frame(context, torch.full(context.mask.shape[:1], -1, device=context.mask.device))
        if self.training and self.config.dropout:
            last = replace(last, mask=last.mask & self._kept(last.mask))
        mean, log_variance = self.encoder(last)
        latents = mean
        if self.training and self.config.sample_latents:
            latents = mean + (log_variance / 2).exp() * torch.randn_like(mean)
        kl = divergence(mean, log_variance)

        tokens = self.decoder.read(latents)
        answers = []
        for column in columns:
            covariate = None if query.covariate is None else query.covariate[:, column]
            answers.append(self.decoder(tokens, query.position[:, column], covariate))
        mask = (query.mask & now.unsqueeze(-1))[:, columns].unsqueeze(-1)
        truth = torch.where(mask, query.value[:, columns], 0)
        square = (torch.stack(answers, 1) - truth).square() * mask
        mse = square.sum() / (mask.sum() * truth.shape[-1]).clamp(min=1)
        # One sample of the relative error is one frame; those without any answer count for nothing.
        share = ((square.sum((2, 3)) + _EPS) / (truth.square().sum((2, 3)) + _EPS)).sqrt()
        asked = mask.any(2).squeeze(-1)
        relative = (share * asked).sum() / asked.sum().clamp(min=1)
        score = mse if self.config.reconstruction == "mse" else relative
        return {"loss": score + self.config.kl_weight * kl, "mse": mse.detach(), "relative_l2": relative.detach(), "kl": kl.detach()}

    def _kept(self, mask: Tensor) -> Tensor:
        """What is not dropped [B,1,N], at a share drawn for each frame."""
        shares = torch.tensor(self.config.dropout, device=mask.device)
        share = shares[torch.randint(len(shares), (len(mask), 1, 1), device=mask.device)]
        return torch.rand(mask.shape, device=mask.device) >= share

    # ---- phase step

    def _velocities(self, context: Frames) -> dict[str, Tensor]:
        t = context.mask.shape[1]
        if t < 2:
            raise ValueError(f"phase step learns from consecutive context frames, found {t}: set context_frames to 2 or more")
        latents = self.encode(context)  # [B,T,M,d]
        seen = context.mask.any(-1)
        apart = (self._lead(context.time[:, 1:], context.time[:, :-1]) - 1).abs() < _TOLERANCE
        pair = seen[:, :-1] & seen[:, 1:] & apart
        now, then = latents[:, :-1].flatten(0, 1), latents[:, 1:].flatten(0, 1)
        target = then if self.change is None else then - now
        if self.training and self.config.standardise != "none":
            self.state.measure(latents[seen])
            if self.change is not None:
                self.change.measure(target[pair.flatten()])
        state, target = self.state(now), (self.change or self.state)(target)

        # Outside training always the same draws: losses of one state of the network are equal.
        generator = None if self.training else torch.Generator(target.device).manual_seed(self.config.seed)
        if self.config.diffusion:
            level = torch.randint(self.plan.levels, (len(target),), generator=generator, device=target.device)
            noise = torch.randn(target.shape, generator=generator, device=target.device, dtype=target.dtype)
            share = self.plan.at(level, target)
            answer = self.stepper(state, diffusion.noised(target, noise, share), level)
            target = diffusion.velocity(target, noise, share)
        else:
            answer = self.stepper(state, torch.zeros_like(state), torch.zeros(1, device=state.device, dtype=torch.int64))
        each = (answer - target).square().mean((1, 2)) * pair.flatten()
        return {"loss": each.sum() / pair.sum().clamp(min=1)}

    # ---- rolling out

    def _roll_out(self, context: Frames, query: Frames) -> FieldPrediction:
        b, t, _ = context.mask.shape
        order = torch.arange(1, t + 1, device=context.mask.device) * context.mask.any(-1)
        order[:, -1] += order.sum(-1) == 0  # nothing observed at all: the last frame, empty
        start = order.argmax(-1)  # [B]
        steps = self._steps(query.time, context.time.gather(1, start.unsqueeze(1)))
        latents = self.encode(_frame(context, start))[:, 0]  # [B,M,d]

        members = [latents.unsqueeze(0).expand(self.config.members, *latents.shape)]
        noise = self._noise(latents)
        for _ in range(int(steps.max()) if steps.numel() else 0):
            members.append(self._next(members[-1], next(noise)))
        path = torch.stack(members, 2)  # [E,B,steps+1,M,d]
        frames = []
        for s, at in enumerate(steps.unbind(1)):
            differ = len(path) if at.any() else 1  # at lead 0 all members are one
            now = path[:differ, torch.arange(b, device=at.device), at]
            frames.append(self._decode(now, query, s).expand(len(path), -1, -1, -1))
        samples = torch.stack(frames, 2)
        return FieldPrediction(samples.mean(0), samples=samples if len(samples) > 1 else None)

    def _steps(self, time: Tensor, start: Tensor) -> Tensor:
        """Whole numbers of frames [B,S] from start [B,1] to time [B,S]."""
        lead = self._lead(time, start)
        whole = lead.round()
        wrong = (lead - whole).abs() > _TOLERANCE
        if wrong.any():
            raise ValueError(
                f"the query asks for a lead of {float(lead[wrong][0]):g} frames: AROMA steps by {self.info.step:g} {self.info.time_unit} "
                "at a time, ask for whole frames"
            )
        if (whole < 0).any():
            raise ValueError(f"the query asks for {-float(lead.min()):g} frames before the last observed frame: AROMA looks ahead only")
        return whole.long()

    def _lead(self, time: Tensor, start: Tensor) -> Tensor:
        """Frames from start to time, float64."""
        return (time - start).double() / self.info.step

    def _noise(self, like: Tensor) -> Iterator[Tensor]:
        """Noise [K+1,E,1,M,d] of one step after another. Each member has its own generator: more members change none of the others."""
        c = self.config
        generators = [torch.Generator().manual_seed(c.seed * 1_000_003 + member) for member in range(c.members)]
        shape = (self.plan.levels, 1, c.tokens, c.channels)
        while True:
            drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for generator in generators]
            yield torch.stack(drawn, 1).to(like)

    def _next(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Latents [E,B,M,d] one frame later; noise [K+1,E,1,M,d]."""
        state = self.state(latents).flatten(0, 1)
        drawn = noise.expand(-1, -1, latents.shape[1], -1, -1).flatten(1, 2)
        size = max(1, _ROWS // (2 * state.shape[1]))
        parts = []
        for now, around in zip(state.split(size), drawn.split(size, 1), strict=True):
            if self.config.diffusion:
                parts.append(diffusion.sample(lambda noisy, level, now=now: self.stepper(now, noisy, level), around.unbind(0), self.plan))  # type: ignore[misc]
            else:
                parts.append(self.stepper(now, torch.zeros_like(now), torch.zeros(1, device=now.device, dtype=torch.int64)))
        answer = torch.cat(parts).view_as(latents)
        return self.state.undo(answer) if self.change is None else latents + self.change.undo(answer)

    # ---- the auto-encoder without gradients

    @torch.no_grad()
    def encode(self, frames: Frames) -> Tensor:
        """Means of the latents [B,T,M,d] of every frame on its own."""
        b, t, n = frames.mask.shape
        size = max(1, _ROWS // max(1, n))
        rows = [self.encoder(_rows(frames, slice(i, i + size)))[0] for i in range(0, b * t, size)]
        return torch.cat(rows).unflatten(0, (b, t))

    def _decode(self, latents: Tensor, query: Frames, frame: int) -> Tensor:
        """The field [E,B,Q,C] of latents [E,B,M,d] at the points of one query frame."""
        members, windows, count = latents.shape[:3]
        points = query.mask.shape[2]
        tokens = torch.cat([self.decoder.read(part) for part in latents.flatten(0, 1).split(max(1, _ROWS // count))])

        def each(x: Tensor) -> Tensor:
            """x [B,Q,...] for every member [E*B,Q,...]."""
            return x.expand(members, *x.shape).flatten(0, 1)

        position = query.position[:, frame]
        covariate = None if query.covariate is None else query.covariate[:, frame]
        size = max(1, _ROWS // (len(tokens) * len(self.config.scales)))
        parts = []
        for start in range(0, max(points, 1), size):
            cut = slice(start, start + size)
            parts.append(self.decoder(tokens, each(position[:, cut]), None if covariate is None else each(covariate[:, cut])))
        return torch.cat(parts, 1).unflatten(0, (members, windows))


class Encoder(nn.Module):
    """Observations of single frames -> mean and log variance of the latents [R,M,d]."""

    frequency: Tensor

    def __init__(self, config: AromaConfig, info: DatasetInfo) -> None:
        super().__init__()
        c = config
        self.register_buffer("frequency", _frequencies((0.0, c.highest), c, info), persistent=False)
        place = 2 * c.bands * len(info.space)
        self.place = nn.Linear(place, c.width) if c.place_in_value else None
        place = c.width if c.place_in_value else place
        self.value = nn.Linear(len(info.variables) + len(info.context_covariates), c.width)
        self.tokens = nn.Parameter(torch.randn(c.tokens, c.width))
        self.read_places = Read(c, c.width, place, place, c.width) if c.encode_geometry else None
        self.ffn_places = FeedForward(c.width) if c.encode_geometry else None
        self.read_values, self.ffn_values = Read(c, c.width, place, c.width, c.width), FeedForward(c.width)
        self.mean, self.log_variance = nn.Linear(c.width, c.channels), nn.Linear(c.width, c.channels)

    def forward(self, frames: Frames) -> tuple[Tensor, Tensor]:
        """`frames` [B,1,N]; what is masked does not count."""
        assert frames.value is not None
        mask, valid = frames.mask[:, 0], frames.mask[:, 0].unsqueeze(-1)
        parts = [frames.value] if frames.covariate is None else [frames.value, frames.covariate]
        value = self.value(torch.where(valid, torch.cat(parts, -1)[:, 0], 0))
        key = code(torch.where(valid, frames.position[:, 0], 0), self.frequency).squeeze(-2)
        if self.place is not None:
            key = self.place(key).relu()
            value = value + key
        seen = None if bool(mask.all()) else mask
        x = self.tokens.unsqueeze(0)  # one row for all until the first observations are read
        if self.read_places is not None and self.ffn_places is not None:
            x = x + self.read_places(x, key, key, seen)
            x = x + self.ffn_places(x)
        x = x + self.read_values(x, key, value, seen)
        x = x + self.ffn_values(x)
        return self.mean(x), self.log_variance(x).clamp(*_LOG_VARIANCE)


class Decoder(nn.Module):
    """Latents [R,M,d] -> the field at any point."""

    frequency: Tensor

    def __init__(self, config: AromaConfig, info: DatasetInfo) -> None:
        super().__init__()
        c = config
        self.repeats = c.decoder_repeats
        self.register_buffer("frequency", _frequencies((0.0, *c.scales), c, info), persistent=False)
        asked = 2 * c.bands * len(info.space) + c.calendar * len(info.query_covariates)
        self.calendar = c.calendar
        self.lift = nn.Linear(c.channels, c.width)
        # A shared block is one module used again, so that every weight is stored once.
        blocks = 1 if c.shared_decoder else c.decoder_repeats
        self.mix = nn.ModuleList(Mix(c) for _ in range(blocks))
        self.ffn = nn.ModuleList(FeedForward(c.width) for _ in range(blocks))
        self.query = Read(c, asked, c.width, None, c.feature_width)
        widths = [c.feature_width * len(c.scales), *[c.field_width] * c.field_depth]
        self.field = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(c.field_width, len(info.variables))

    def read(self, latents: Tensor) -> Tensor:
        """Tokens [R,M,h], ready to be asked."""
        x = self.lift(latents)
        for number in range(self.repeats):
            x = x + self.mix[number % len(self.mix)](x)
            x = x + self.ffn[number % len(self.ffn)](x)
        return x

    def forward(self, tokens: Tensor, position: Tensor, covariate: Tensor | None) -> Tensor:
        """The field [R,Q,C] of tokens [R,M,h] at position [R,Q,D] with calendar covariates [R,Q,F]."""
        asked = code(_once(position), self.frequency)  # [R|1,Q,L,f]
        if covariate is not None and self.calendar:
            same = covariate.unsqueeze(2).expand(-1, -1, asked.shape[2], -1)
            asked = torch.cat([asked.expand(len(same), -1, -1, -1), same], -1)
        x = self.query(asked.flatten(1, 2), tokens).view(len(tokens), asked.shape[1], -1)
        for layer in self.field:
            x = layer(x).relu()
        return self.head(x)


class Read(nn.Module):
    """Attention of norm x [R,N,x] to norm keys [R,K,k] and norm values [R,K,v] -> [R,N,out]. Values None: the keys, with their norm."""

    def __init__(self, config: AromaConfig, x: int, key: int, value: int | None, out: int) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.head_width
        self.norm, self.norm_key = nn.LayerNorm(x), nn.LayerNorm(key)
        self.norm_value = None if value is None else nn.LayerNorm(value)
        self.query, self.key = nn.Linear(x, inner, bias=False), nn.Linear(key, inner, bias=False)
        self.value = nn.Linear(key if value is None else value, inner, bias=False)
        self.out = nn.Linear(inner, out)

    def forward(self, x: Tensor, key: Tensor, value: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x may be one row for all; mask [R,K] True where a key may be seen. A row that sees nothing gives the bias of the output."""
        key = self.norm_key(key)
        value = key if value is None or self.norm_value is None else self.norm_value(value)
        return self.out(_attend(self.query(self.norm(x)), self.key(key), self.value(value), self.heads, mask))


class Mix(nn.Module):
    """Self-attention of norm x [R,M,h]."""

    def __init__(self, config: AromaConfig) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.head_width
        self.norm, self.query_key_value = nn.LayerNorm(config.width), nn.Linear(config.width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query_key_value(self.norm(x)).chunk(3, -1)
        return self.out(_attend(query, key, value, self.heads))


class FeedForward(nn.Sequential):
    """Norm, then four times as wide with a GELU."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


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


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from the standard normal, a mean over rows, tokens and channels, as in the released code."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def code(position: Tensor, frequency: Tensor) -> Tensor:
    """position [R,N,D] and frequencies [L,K] -> sines, then cosines [R,N,L,2*D*K]."""
    angle = (position[..., None, :, None] * (torch.pi * frequency).unsqueeze(1)).flatten(-2)
    return torch.cat([angle.sin(), angle.cos()], -1)


def _frequencies(edges: tuple[float, ...], config: AromaConfig, info: DatasetInfo) -> Tensor:
    """[L,K]: for every pair of neighbouring edges K powers of 2, evenly spread in the exponent, ends included."""
    scales = [2.0 ** torch.linspace(a, b, config.bands, dtype=torch.float64) for a, b in pairwise(edges)]
    frequency = torch.stack(scales)
    # Only whole frequencies have the period 2 of a torus; the low ones come several times.
    whole = config.spacing == "whole" or (config.spacing is None and info.period is not None)
    return (frequency.round() if whole else frequency).to(torch.get_default_dtype())


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """query [R|1,N,i], key and value [R,K,i], mask [R,K] -> [R,N,i]."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query.expand(len(key), -1, -1, -1), key, value, None if mask is None else mask[:, None, None])
    return out.transpose(1, 2).flatten(-2)


def _frame(frames: Frames, which: Tensor) -> Frames:
    """One frame [B,1,N] of each window, at index [B]; what is not an observation is left out."""
    row = torch.arange(len(which), device=frames.mask.device)
    which = which.to(frames.mask.device)
    names = ("position", "mask", "value", "covariate")
    picked = {name: getattr(frames, name)[row, which].unsqueeze(1) for name in names if getattr(frames, name) is not None}
    return Frames(time=frames.time[row, which].unsqueeze(1), **picked)


def _rows(frames: Frames, part: slice) -> Frames:
    """Some of the B*T frames, each as a window [1,N] of its own."""
    names = ("position", "mask", "value", "covariate")
    picked = {name: getattr(frames, name).flatten(0, 1)[part].unsqueeze(1) for name in names if getattr(frames, name) is not None}
    return Frames(time=frames.time.flatten()[part].unsqueeze(1), **picked)


def _once(position: Tensor) -> Tensor:
    """position [1,Q,D] where [R,Q,D] was only expanded along its rows, so that what they share is computed once."""
    return position[:1] if position.stride(0) == 0 else position
