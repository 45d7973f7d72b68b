"""AROMA: a field of any points as a few latent tokens, stepped in time by a small diffusion transformer, decoded at any point.

Paper: Serrano, Wang, Le Naour, Vittaut, Gallinari, "AROMA: Preserving Spatial Structure for Latent PDE Modeling with Local Neural
Fields", NeurIPS 2024, arXiv 2406.02176. Written from the description; checked against the authors' code (benchmarks/parity_aroma.py).

    observations of one frame -> learned tokens read their places, then their values -> mean and variance of the latents (a VAE)
    -> latents step in time, K + 1 network calls a step (models/aroma/stepper.py, models/aroma/diffusion.py)
    -> self-attention of tokens -> a query reads them once per frequency band -> MLP (a local neural field)

Two phases: "encode" trains the auto-encoder on single frames; "step" freezes it and trains the stepper on pairs of consecutive frames,
given as the means of their latents.

Shapes::

    B batch   T context frames   N observations a frame   S query frames   Q queries   R rows   E members
    C channels   M tokens   d latent channels

What differs from the paper, `mode: paper` as well as `improved`:

- a forecast starts from the last context frame that has observations; frames before it serve training alone;
- weather covariates join the values;
- the deterministic ablation keeps the adaptive norms, which then see a constant;
- all pairs of a window make one optimiser step, not one each.

`improved` also: frequencies on a torus are whole numbers; values know where they are, by a learned embedding of the place; in training
observations are dropped at random; calendar covariates join the code of a query; latents have zero mean and unit variance before the
stepper, as its noise has - per token and channel, since most of what a channel varies is between tokens and does not move; eight rollouts
make an ensemble; the decoder says how large its own error is at a point, and the answer is a Gaussian with that variance and the one
between members. Every one of these is a key of `Config` of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from models.aroma import diffusion
from models.aroma.autoencoder import Decoder, Encoder, divergence
from models.aroma.config import AromaConfig
from models.aroma.standard import Standard
from models.aroma.stepper import LatentStepper
from models.contract import TASKS, DatasetInfo, EncodedFrames, FieldBatch, FieldModel, FieldPrediction, Frames

_ROWS = 1 << 15  # observations, tokens or queries that are worked on at a time without gradients; bounds the memory
_EPS = 1e-8
_TOLERANCE = 1e-4  # of a lead, in frames


class Aroma(FieldModel):
    """The field model; see models/contract.py for what it is given and gives. It answers at whole-frame leads from 0 on."""

    Config = AromaConfig
    tasks: ClassVar[frozenset[str]] = frozenset(TASKS)
    phases: ClassVar[tuple[str, ...]] = ("encode", "step")
    follows: ClassVar[frozenset[str]] = frozenset({"step"})
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
        """Phase encode: `loss` = reconstruction + kl_weight * `kl` (+ `noise`, a likelihood) of the last context frame, scored at the query
        frames of lead 0. Phase step: see `follow`.

        Raises ValueError where there is nothing to train on: no values or no lead 0 in the query, or a single context frame.
        """
        return self._reconstruction(batch) if self.phase == "encode" else self.follow(self.encode(batch))

    def encode(self, batch: FieldBatch) -> EncodedFrames:
        """Means of the latents [B,T,M,d] of the context frames."""
        context = batch.context
        return EncodedFrames(self.latents(context), context.mask.any(-1), context.time)

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
        answers = [self.decoder(tokens, *_asked(query, int(column), slice(None))) for column in columns]
        mask = (query.mask & now.unsqueeze(-1))[:, columns].unsqueeze(-1)
        truth = torch.where(mask, query.value[:, columns], 0)
        square = (torch.stack([mean for mean, _ in answers], 1) - truth).square() * mask
        count = (mask.sum() * truth.shape[-1]).clamp(min=1)
        mse = square.sum() / count
        # One sample of the relative error is one frame; those without any answer count for nothing.
        share = ((square.sum((2, 3)) + _EPS) / (truth.square().sum((2, 3)) + _EPS)).sqrt()
        asked = mask.any(2).squeeze(-1)
        relative = (share * asked).sum() / asked.sum().clamp(min=1)
        loss = (mse if self.config.reconstruction == "mse" else relative) + self.config.kl_weight * kl
        terms = {"mse": mse.detach(), "relative_l2": relative.detach(), "kl": kl.detach()}
        log_noise = [noise for _, noise in answers if noise is not None]
        if log_noise:  # negative log likelihood of what is left, a Gaussian
            deviation = torch.stack(log_noise, 1)
            noise = ((deviation + 0.5 * square.detach() * (-2 * deviation).exp()) * mask).sum() / count
            loss, terms["noise"] = loss + noise, noise.detach()
        return {"loss": loss, **terms}

    def _kept(self, mask: Tensor) -> Tensor:
        """What is not dropped [B,1,N], at a share drawn for each frame."""
        shares = torch.tensor(self.config.dropout, device=mask.device)
        share = shares[torch.randint(len(shares), (len(mask), 1, 1), device=mask.device)]
        return torch.rand(mask.shape, device=mask.device) >= share

    # ---- phase step

    def follow(self, frames: EncodedFrames) -> dict[str, Tensor]:
        """`loss` of the velocities (or of the next latents) over the pairs of consecutive frames with observations."""
        latents, seen = frames.value, frames.mask  # [B,T,M,d], [B,T]
        if seen.shape[1] < 2:
            raise ValueError(f"phase step learns from consecutive context frames, found {seen.shape[1]}: set context_frames to 2 or more")
        apart = (self._lead(frames.time[:, 1:], frames.time[:, :-1]) - 1).abs() < _TOLERANCE
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
        latents = self.latents(_frame(context, start))[:, 0]  # [B,M,d]

        members = [latents.unsqueeze(0).expand(self.config.members, *latents.shape)]
        noise = self._noise(latents)
        for _ in range(int(steps.max()) if steps.numel() else 0):
            members.append(self._next(members[-1], next(noise)))
        path = torch.stack(members, 2)  # [E,B,steps+1,M,d]
        frames = []
        for s, at in enumerate(steps.unbind(1)):
            differ = len(path) if at.any() else 1  # at lead 0 all members are one
            now = path[:differ, torch.arange(b, device=at.device), at]
            frames.append(self._answer(*self._decode(now, query, s)))
        return FieldPrediction(*[None if parts[0] is None else torch.cat(parts, -3) for parts in zip(*frames, strict=True)])  # type: ignore[arg-type]

    def _answer(self, field: Tensor, log_noise: Tensor | None) -> tuple[Tensor, Tensor | None, None, Tensor | None]:
        """One frame of a prediction from the members' fields [E,B,Q,C], of which only one is given where all are equal."""
        mean, count = field.mean(0).unsqueeze(1), self.config.members
        if log_noise is not None:
            between = field.var(0) if len(field) > 1 else 0
            return mean, ((2 * log_noise).exp().mean(0) + between).sqrt().unsqueeze(1), None, None
        return mean, None, None, field.expand(count, -1, -1, -1).unsqueeze(2) if count > 1 else None

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
    def latents(self, frames: Frames) -> Tensor:
        """Means of the latents [B,T,M,d] of every frame on its own."""
        b, t, n = frames.mask.shape
        size = max(1, _ROWS // max(1, n))
        rows = [self.encoder(_rows(frames, slice(i, i + size)))[0] for i in range(0, b * t, size)]
        return torch.cat(rows).unflatten(0, (b, t))

    def _decode(self, latents: Tensor, query: Frames, frame: int) -> tuple[Tensor, Tensor | None]:
        """The field [E,B,Q,C] of latents [E,B,M,d] at the points of one query frame, and the log of its noise."""
        members, windows, count = latents.shape[:3]
        tokens = torch.cat([self.decoder.read(part) for part in latents.flatten(0, 1).split(max(1, _ROWS // count))])
        size = max(1, _ROWS // (len(tokens) * len(self.config.scales)))
        parts = []
        for start in range(0, max(query.mask.shape[2], 1), size):
            asked = _asked(query, frame, slice(start, start + size))  # of every window, and now of every member
            parts.append(self.decoder(tokens, *[None if x is None else x.expand(members, *x.shape).flatten(0, 1) for x in asked]))
        field, noise = zip(*parts, strict=True)
        shape = (members, windows)
        return torch.cat(field, 1).unflatten(0, shape), None if noise[0] is None else torch.cat(noise, 1).unflatten(0, shape)


def _asked(query: Frames, frame: int, part: slice) -> tuple[Tensor, Tensor | None]:
    """Positions [B,Q,D] and covariates of some points of one query frame."""
    return query.position[:, frame, part], None if query.covariate is None else query.covariate[:, frame, part]


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
