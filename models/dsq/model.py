"""DSQ: sparse sensors to the codes a dense field would have, and a transformer that continues the codes in time.

Paper: "Decoupled Spatiotemporal Forecasting from Extreme Sparse Observations via Quantized Latent Space", AAAI 2026. Written from a
description of it; of the body of the paper only the abstract was at hand, so sizes and recipes are those of the authors' released program
(`mode: released`), or ours.

    teacher   dense points of a frame -> latents -> the field anywhere             (models/perceiver.py)
    quantize  the teacher's latents -> a few codes of a codebook -> latents        (models/dsq/latent_codes.py)
    sense     sensors of the frame -> the latents, hence the codes, that the teacher finds in the dense points
    predict   codes of frame 0 -> codes of frames 1, 2, ...                        (models/dsq/frame_transformer.py)

Shapes::

    B batch   S query frames   Q queries   R rows   C channels   M latents   c latent channels   G codes a frame   V codes   E members

What each phase reads: `teacher` and `quantize` the query's points and values at lead 0; `sense` those and the context; `predict` query
frames at leads 0, 1, 2, ... in this order, and the context, or their codes alone, two lists of them for a frame: what the teacher finds
in its dense points, and what the sensors say (the latents, a thousand times as many numbers, are not kept for the phases before: there
each window is seen about once). Of the context the last frame is read, older ones are ignored. Weather at the
sensors joins the sparse encoder, calendar features of a query join the decoder, and the transformer knows hour and season of each frame.

What differs from the released program, whose transformer regresses continuous latents and never uses an index: `paper` and `improved`
predict indices, as the abstract has it; the target of `sense` is a teacher that does read the dense field, and from whose weights the
sparse encoder starts; the codes are in the path of every forecast; the projected target of `regress` is detached; times enter as Fourier
features. `improved` also: codes are moving averages, start again when unused and do not carry the mean of the latents, and
frequencies on a torus are whole numbers.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.contract import TASKS, DatasetInfo, EncodedFrames, FieldBatch, FieldModel, FieldPrediction, Frames
from models.dsq.config import DsqConfig
from models.dsq.frame_transformer import IndexTransformer, RegressTransformer
from models.dsq.latent_codes import LatentCodes
from models.dsq.quantizer import Quantized, Quantizer, perplexity, usage
from models.layers import Fourier
from models.perceiver import Decoder, Encoder

_ROWS = 1 << 16  # query rows that predict holds at a time; bounds its memory
_EPS = 1e-6
_CYCLES = (24.0, 8765.82)  # hours of a day and of a year


class Dsq(FieldModel):
    """The field model; see models/contract.py for what it is given and gives."""

    Config = DsqConfig
    tasks: ClassVar[frozenset[str]] = frozenset(TASKS)
    phases: ClassVar[tuple[str, ...]] = ("teacher", "quantize", "sense", "predict")
    follows: ClassVar[frozenset[str]] = frozenset({"predict"})
    corrects: ClassVar[bool] = False

    def __init__(self, config: DsqConfig, info: DatasetInfo) -> None:
        super().__init__()
        self.config, self.info = config, info
        c = config
        self.encoder, self.decoder = Encoder(c, info), Decoder(c, info)
        decay = c.decay if c.codebook == "average" else None
        quantizer = Quantizer(c.codes, c.code_width, c.commitment, decay, c.restart)
        self.coder = LatentCodes(c.latents, c.channels, c.codes_per_frame, c.hidden, c.residual_hidden, c.code_width, quantizer, c.centred)
        self.sparse = Encoder(c, info, len(info.context_covariates))
        self.time = Fourier(1, c.time_bands, max(1.0, c.horizon / 2))
        self.calendar = bool(info.time_origin) and info.time_unit == "h"
        clock = self.time.width + 2 * len(_CYCLES) * self.calendar
        self.forecaster: IndexTransformer | RegressTransformer
        if c.head == "regress":
            self.forecaster = RegressTransformer(c.latents, c.channels, c.projection, clock, c.width, c.depth, c.heads, c.dropout)
        else:
            whole = c.head == "frame"
            self.forecaster = IndexTransformer(c.codes, c.codes_per_frame, clock, c.width, c.depth, c.heads, c.dropout, whole)
        self.begin(self.phases[0])

    def begin(self, phase: str) -> None:
        """See models/contract.py; `sense` starts from the teacher's encoder."""
        if phase not in self.phases:
            raise ValueError(f"DSQ has no phase {phase!r}: expected one of {', '.join(self.phases)}")
        self.phase = phase
        if phase == "sense":
            weights = {**self.sparse.state_dict(), **self.encoder.state_dict()}
            self.sparse.load_state_dict(weights)
            if self.sparse.covariate is not None:  # the teacher has none
                nn.init.zeros_(self.sparse.covariate.weight)
        trained: dict[str, list[nn.Module]] = {
            "teacher": [self.encoder, self.decoder],
            "quantize": [self.coder],
            "sense": [self.sparse],
            "predict": [self.forecaster],
        }
        self.requires_grad_(False)
        for part in trained[phase]:
            part.requires_grad_(True)

    def loss(self, batch: FieldBatch) -> dict[str, Tensor]:
        """Scalar terms, errors as means of squares, those of latents in the coder's units: `loss` of the phase begun last, and beside it

        - quantize: `latent_mse`, `field_mse`, `perplexity` and `usage` of the codebook in this batch, `round_trip`, the share of codes that
          their own reconstruction has again;
        - sense: `latent_mse` of the sensors' latents against the teacher's, whose `latent_variance` is the bar, and `code_agreement`;
        - predict: `code_accuracy`, or `latent_mse` of `regress`.

        Raises ValueError for a query without values, or without the frames that the phase needs.
        """
        if batch.query.value is None:
            raise ValueError("the query has no values: there is nothing to train on")
        phases = {"teacher": self._teach, "quantize": self._quantize, "sense": self._sense, "predict": self._predict}
        return phases[self.phase](batch)

    @torch.no_grad()
    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        """Reconstruct at lead 0, forecast at whole-frame leads; the forecast is the same whatever leads are asked with it.

        With `members` above 1 the prediction has samples [E,B,S,Q,C], the sampled noise being common to all windows of a batch.
        Raises ValueError for negative and fractional leads.
        """
        lead = self._leads(context, query)
        training = self.training
        self.eval()
        try:
            return self._answer(context, query, lead)
        finally:
            self.train(training)

    # ---- phases

    def _teach(self, batch: FieldBatch) -> dict[str, Tensor]:
        frame = self._dense(batch, "teacher")
        return {"loss": self._field_mse(self.seen(self.encoder, frame), frame)}

    def _quantize(self, batch: FieldBatch) -> dict[str, Tensor]:
        frame, codes = self._dense(batch, "quantize"), self.config.codes
        known = frame.mask[:, 0].any(-1)
        with torch.no_grad():
            dense = self.seen(self.encoder, frame)
            if self.training:
                self.coder.observe(dense[known])
        coded, latents = self.coded(dense, known, learn=True)
        latent_mse = self._latent_mse(latents, dense, known)
        field_mse = self._field_mse(latents, frame)
        with torch.no_grad():
            again = self.coder.quantizer(self.coder.features(latents)).index
            used = coded.index[known]
        return {
            "loss": latent_mse + _mean(coded.distance.mean(1), known) + field_mse,
            "latent_mse": latent_mse.detach(),
            "field_mse": field_mse.detach(),
            "perplexity": perplexity(used, codes),
            "usage": usage(used, codes),
            "round_trip": _mean((again == coded.index).double().mean(1), known),
        }

    def _sense(self, batch: FieldBatch) -> dict[str, Tensor]:
        frame = self._dense(batch, "sense")
        known = frame.mask[:, 0].any(-1)
        with torch.no_grad():
            dense = self.seen(self.encoder, frame)
            aim, _ = self.coded(dense)
        sparse = self.seen(self.sparse, batch.context)
        coded, latents = self.coded(sparse)
        before, after = self._latent_mse(sparse, dense, known), self._latent_mse(latents, dense, known)
        mean = (dense * known[:, None, None]).sum(0) / known.sum().clamp(min=1)
        return {
            "loss": after + self.config.match_weight * before,
            "latent_mse": before.detach(),
            "latent_variance": self._latent_mse(mean, dense, known),
            "code_agreement": _mean((coded.index == aim.index).double().mean(1), known),
        }

    def _predict(self, batch: FieldBatch) -> dict[str, Tensor]:
        lead = self._leads(batch.context, batch.query)
        b, s = lead.shape
        if s < 2 or not torch.equal(lead, torch.arange(s, device=lead.device).expand(b, s)):
            raise ValueError(
                f"phase predict learns from query frames at leads 0, 1, 2, ..., found {lead[0].tolist()} in the first window: set "
                "query_frames to max_lead + 1, at least 2"
            )
        return self.follow(self.encode(batch))

    @torch.no_grad()
    def encode(self, batch: FieldBatch) -> EncodedFrames:
        """Codes [B,S,2,G] of the query's frames: what the teacher finds in their dense points, then what the sensors of the last context
        frame say, which is frame 0."""
        dense, _ = self.coded(self.seen(self.encoder, batch.query))
        sparse, _ = self.coded(self.seen(self.sparse, batch.context))
        index = dense.index.unflatten(0, batch.query.time.shape)
        return EncodedFrames(
            torch.stack([index, sparse.index.unsqueeze(1).expand_as(index)], 2), batch.query.mask.any(-1), batch.query.time
        )

    def follow(self, frames: EncodedFrames) -> dict[str, Tensor]:
        """Terms of phase predict from frames 0, 1, ..., K as codes; frame 0 is dense in a share `dense_start` of training windows."""
        b, s = frames.mask.shape
        index, time = frames.value[:, :, 0].clone(), frames.time  # [B,1+K,G]
        lead = torch.arange(s, device=time.device)
        known = (frames.mask & (((time - time[:, :1]).double() / self.info.step - lead).abs() < _EPS))[:, 1:]
        start = torch.rand(b, device=time.device) < self.config.dense_start if self.training else known.new_zeros(b)
        index[:, 0] = torch.where(start.unsqueeze(-1), index[:, 0], frames.value[:, 0, 1])
        clock = self._clock(time[:, 0], s)
        if isinstance(self.forecaster, RegressTransformer):
            with torch.no_grad():
                latents = self.coder.unit(self.coder.latents(self.coder.embed(index.flatten(0, 1)))).unflatten(0, (b, s))
            ahead, token, aim = self.forecaster(latents, clock)
            latent_mse = _mean((ahead - latents[:, 1:]).square().mean((2, 3)), known)
            token_mse = _mean((token - aim).square().mean(2), known)
            return {"loss": latent_mse + self.config.token_weight * token_mse, "latent_mse": latent_mse.detach()}
        logits = self.forecaster(index, clock)
        entropy = F.cross_entropy(logits.permute(0, 3, 1, 2), index[:, 1:], reduction="none")  # [B,K,G]
        right = logits.argmax(-1) == index[:, 1:]
        return {"loss": _mean(entropy.mean(-1), known), "code_accuracy": _mean(right.double().mean(-1), known)}

    # ---- answers

    def _answer(self, context: Frames, query: Frames, lead: Tensor) -> FieldPrediction:
        b, s, _ = query.mask.shape
        members = self.config.members
        frames = self._frames(context, int(lead.max()) if lead.numel() else 0)  # [E*B,1+K,...]
        row = torch.arange(members * b, device=lead.device)
        each = []
        for k in range(s):
            chosen = frames[row, lead[:, k].repeat(members)]
            latents = chosen if isinstance(self.forecaster, RegressTransformer) else self.coder.latents(chosen)
            each.append(self.decoded(latents, query, k))
        samples = torch.stack(each, 2)
        return FieldPrediction(samples.mean(0), samples=samples if members > 1 else None)

    def decoded(self, latents: Tensor, query: Frames, frame: int) -> Tensor:
        """The field [E,B,Q,C] of latents [E*B,M,c] at the points of one query frame."""
        b, _, q = query.mask.shape
        members, chunk = len(latents) // b, max(1, _ROWS // len(latents))
        points = [_points(query, frame, slice(i, i + chunk)) for i in range(0, max(q, 1), chunk)]
        parts = [self.decoder(latents, *[None if x is None else x.repeat(members, 1, 1) for x in part]) for part in points]
        return torch.cat(parts, 1).unflatten(0, (members, b))

    def _frames(self, context: Frames, ahead: int) -> Tensor:
        """Frames 0..K as code vectors [E*B,1+K,G,e], or with `regress` as latents [E*B,1+K,M,c]."""
        first, latents = self.coded(self.seen(self.sparse, context))
        clock = self._clock(context.time[:, -1], 1 + ahead)
        if isinstance(self.forecaster, RegressTransformer):
            return self.coder.whole(self.forecaster.continued(self.coder.unit(latents), clock))
        members = self.config.members
        start = first.index.repeat(members, 1)
        codes, likely = self.forecaster.continued(start, clock.repeat(members, 1, 1), self._chooser(members))
        vectors = self.coder.embed(codes)
        if self.config.soft_decode:
            vectors[:, 1:] = likely @ self.coder.quantizer.code
        return vectors

    def _chooser(self, members: int) -> Any:
        """Logits [E*B,n,V] -> codes [E*B,n]: the likeliest, or a draw. Noise has its own generator and is shared by the windows of a
        batch, so a forecast depends neither on them nor on torch's random state."""
        temperature = self.config.temperature
        if temperature == 0:
            return lambda logits: logits.argmax(-1)
        generator = torch.Generator().manual_seed(self.config.seed)

        def draw(logits: Tensor) -> Tensor:
            uniform = torch.rand(members, 1, *logits.shape[1:], generator=generator, dtype=torch.float64).clamp(min=1e-300)
            gumbel = -(-uniform.log()).log().to(logits)
            return (logits.unflatten(0, (members, -1)) / temperature + gumbel).argmax(-1).flatten(0, 1)

        return draw

    # ---- parts

    def coded(self, latents: Tensor, known: Tensor | None = None, learn: bool = False) -> tuple[Quantized, Tensor]:
        """Latents [R,M,c] through the codes: what was chosen, and the latents again."""
        coded = self.coder.quantizer(self.coder.features(latents), known, learn)
        return coded, self.coder.latents(coded.vector)

    def seen(self, encoder: Encoder, frames: Frames) -> Tensor:
        """Latents [R,M,c]: of every frame of a query, or of the last one of a context."""
        assert frames.value is not None
        if encoder is self.sparse:
            covariate = None if frames.covariate is None else frames.covariate[:, -1]
            return encoder(frames.position[:, -1], frames.value[:, -1], frames.mask[:, -1], covariate)
        return encoder(frames.position.flatten(0, 1), frames.value.flatten(0, 1), frames.mask.flatten(0, 1))

    def _latent_mse(self, latents: Tensor, aim: Tensor, known: Tensor) -> Tensor:
        """Latents [...,M,c] against others where known [...], in the units of the coder."""
        return _mean((self.coder.unit(latents) - self.coder.unit(aim)).square().mean((-2, -1)), known)

    def _field_mse(self, latents: Tensor, frame: Frames) -> Tensor:
        """Latents [B,M,c] decoded at the points of the one frame [B,1,Q] against its values."""
        assert frame.value is not None
        known = frame.mask[:, 0].unsqueeze(-1)
        field = self.decoder(latents, *_points(frame, 0, slice(None)))
        square = torch.where(known, field - torch.where(known, frame.value[:, 0], 0), 0).square()
        return square.sum() / (known.sum() * square.shape[-1]).clamp(min=1)

    def _dense(self, batch: FieldBatch, phase: str) -> Frames:
        """The query frame [B,1,Q] at lead 0 of every window."""
        now = self._leads(batch.context, batch.query) == 0
        if not now.any(1).all():
            raise ValueError(
                f"phase {phase} learns from the dense frame at lead 0, which {int((~now.any(1)).sum())} of {len(now)} windows do not ask "
                "for: set max_lead to 0, or query_frames to max_lead + 1"
            )
        query, row, frame = batch.query, torch.arange(len(now), device=now.device), now.long().argmax(1)
        names = ("position", "mask", "time", "value", "covariate")
        chosen = {name: getattr(query, name)[row, frame].unsqueeze(1) for name in names if getattr(query, name) is not None}
        return replace(Frames(chosen["position"], chosen["mask"], chosen["time"]), **chosen)

    def _leads(self, context: Frames, query: Frames) -> Tensor:
        """Leads [B,S] in frames, int64."""
        lead = (query.time - context.time[:, -1:]).double() / self.info.step
        whole = lead.round()
        bad = ((lead - whole).abs() > _EPS) | (whole < 0)
        if bad.any():
            found = sorted({round(x, 6) for x in lead[bad].tolist()})[:5]
            raise ValueError(f"DSQ steps from frame to frame: leads must be whole frames >= 0, found {', '.join(f'{x:g}' for x in found)}")
        return whole.long()

    def _clock(self, start: Tensor, frames: int) -> Tensor:
        """Features [B,frames,f] of the times of frames 0, 1, ... from `start` [B]: the lead, and of calendar data the hour and season."""
        lead = torch.arange(frames, device=start.device, dtype=torch.float64)
        share = (lead / self.config.horizon).to(self.sparse.latents.dtype)
        parts = [self.time(share.unsqueeze(-1)).expand(len(start), -1, -1)]
        if self.calendar:
            local = start.unsqueeze(-1) + lead * self.info.step + self.info.utc_offset
            angle = torch.stack([local * (2 * math.pi / cycle) for cycle in _CYCLES], -1)
            parts.append(torch.cat([angle.sin(), angle.cos()], -1).to(share.dtype))
        return torch.cat(parts, -1)


def _points(frames: Frames, k: int, part: slice) -> tuple[Tensor, Tensor | None]:
    """Positions and covariates of some points of query frame k."""
    return frames.position[:, k, part], None if frames.covariate is None else frames.covariate[:, k, part]


def _mean(each: Tensor, known: Tensor) -> Tensor:
    """Mean of what is known; `each` and `known` have the same shape."""
    return (each * known).sum() / known.sum().clamp(min=1)
