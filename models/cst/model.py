"""CST: a transformer over (coordinate, value) tokens whose output is a smooth function of its coordinates.

Paper: Fonseca, Zappala, Ortega Caro, van Dijk, "Continuous Spatiotemporal Transformers", arXiv 2301.13338. Written from the description.

    real tokens: the observations of all context frames   |
    dummy tokens: random coordinates, interpolated values  } -> transformer -> a value at every token
    asked tokens: the query, interpolated values          |

    loss = ||y - data||_p + mu * sum over q = 1..k of ||D^q y||_p, the first at known tokens, the second at dummies (models/cst/sobolev.py)

A coordinate is (time in the window, position), each scaled to 0..1; the window runs from the first context frame to `horizon` frames after
the last one. The value that goes with a coordinate is linear in time and weighted by distance in space, and outside the data the nearest
one held (models/baselines/interpolation.py), so a forecast corrects persistence; `held` says where. Where the query has a background, that
is its value instead.

Shapes::

    B batch   T context frames   N observations a frame   R = T*N real tokens   S query frames   Q queries   J dummies
    D space   C channels   A = 1 + D coordinates   d width   L layers   K keys

Modes and settings: models/cst/config.py.

Not in the paper: covariates, the background, forecasts, and leaving the derivative terms out where gradients are off (validation).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.baselines.interpolation import Series, series
from models.contract import TASKS, DatasetInfo, FieldBatch, FieldModel, FieldPrediction, Frames
from models.cst import sobolev
from models.cst.config import CstConfig
from models.cst.layers import Layer, Norm, Place

_TOGETHER = 512  # asked tokens in one pass where they see each other
_NUMBERS = 1 << 24  # attention weights that predict holds at a time; bounds its memory
_EPS = 1e-6


@dataclass(frozen=True)
class Tokens:
    """Tokens of a batch. What is masked is zero."""

    value: Tensor  # [B,S,C] the value that goes with the coordinate
    at: Tensor  # [B,S,A]
    mask: Tensor  # [B,S]
    covariate: Tensor | None = None  # [B,S,d] embedded
    scale: Tensor | None = None  # [B,S,C] of the background
    truth: Tensor | None = None  # [B,S,C]

    def compact(self) -> Tokens:
        """Without what is masked in every sample; the order of the others stays."""
        order = (~self.mask).to(torch.uint8).argsort(dim=1, stable=True)[:, : max(1, int(self.mask.sum(1).max()))]

        def kept(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.gather(1, order.unsqueeze(-1).expand(*order.shape, x.shape[-1]))

        parts = {name: kept(getattr(self, name)) for name in ("value", "at", "covariate", "scale", "truth")}
        return Tokens(mask=self.mask.gather(1, order), **parts)  # type: ignore[arg-type]


class Cst(FieldModel):
    """The field model; see models/contract.py for what it is given and gives."""

    Config = CstConfig
    tasks: ClassVar[frozenset[str]] = frozenset(TASKS)

    def __init__(self, config: CstConfig, info: DatasetInfo) -> None:
        super().__init__()
        self.config, self.info = config, info
        c, channels, width = config, len(info.variables), config.width
        self.value = nn.Linear(channels, width, bias=False)
        self.place = Place(c, len(info.space), info.period)
        self.context_covariate = nn.Linear(len(info.context_covariates), width, bias=False) if info.context_covariates else None
        self.query_covariate = nn.Linear(len(info.query_covariates), width, bias=False) if info.query_covariates else None
        self.norm = Norm(width)
        self.drop = nn.Dropout(c.dropout)
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.layers))
        self.inner, self.norm_out = nn.Linear(width, width), Norm(width)
        self.out = nn.Linear(width, channels, bias=False)
        if c.anchored:
            nn.init.zeros_(self.out.weight)
        else:
            nn.init.xavier_normal_(self.out.weight, gain=nn.init.calculate_gain("tanh"))

    # ---- the contract

    def loss(self, batch: FieldBatch) -> dict[str, Tensor]:
        """Scalar terms: `loss`; `fit`, the data term; `derivative_q`, the norms of the derivatives before mu; `mse` of the data term's
        points. All in model units and coordinates. Where gradients are off, `loss` is `fit`.

        Dummies and jitter are random in training; otherwise the dummies are always the same and there is no jitter.
        Raises ValueError for a query without values and for a time outside the window.
        """
        c, context, query = self.config, batch.context, batch.query
        if query.value is None:
            raise ValueError("the query has no values: there is nothing to train on")
        known = series(context, self.info.step, self.info.period)
        real = self._real(context, query).compact()
        asked = self._asked(known, context, query).compact()
        smooth = torch.is_grad_enabled() and c.order > 0 and c.mu > 0
        leaf, rest = self._draw(known, context)
        leaf.requires_grad_(smooth and c.derivative == "coordinates")
        at = torch.cat([leaf, rest], -1)
        value = self._interpolated(known, at, context)
        if c.squeezed_time:
            at = self._squeezed(at, context.mask.flatten(1))
        if smooth and c.derivative == "values":
            leaf = torch.cat([real.value, value], 1).detach().requires_grad_()
            seen, value = leaf.split([real.value.shape[1], value.shape[1]], 1)
            real = replace(real, value=seen)
        dummy = Tokens(value, at, torch.ones_like(at[..., 0], dtype=torch.bool))

        if c.targets == "query":
            found = self._at(real, [asked, dummy] if smooth else [asked])
            truth, mask, got = asked.truth, asked.mask, self._anchor(found[0], asked)
            assert truth is not None
        else:
            found = self._at(real, [real, dummy])
            truth, mask, got = real.value.detach(), real.mask, found[0] + real.value if c.anchored else found[0]
        miss = torch.where(mask.unsqueeze(-1), got - torch.where(mask.unsqueeze(-1), truth, 0), 0)
        fit = sobolev.norm(miss, c.power)
        terms = {"fit": fit.detach(), "mse": miss.detach().square().sum() / (mask.sum() * miss.shape[-1]).clamp(min=1)}
        if not smooth:
            return {"loss": fit, **terms}
        output = found[1] + dummy.value if c.anchored else found[1]
        if c.derivative == "values":
            norms = sobolev.released(torch.cat([got, output], 1), leaf, c.order, c.power, first=got.shape[1])
        else:
            norms = sobolev.penalties(output, leaf, c.order, c.power)
        terms |= {f"derivative_{q}": each.detach() for q, each in enumerate(norms, 1)}
        return {"loss": fit + c.mu * sum(norms), **terms}

    @torch.no_grad()
    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        """Answer a query, points in chunks. Raises ValueError for a time outside the window, and for a background in a mode without one."""
        training = self.training
        self.eval()
        try:
            known = series(context, self.info.step, self.info.period)
            real = self._real(context, query).compact()
            memory = self._memory(real) if self.config.sees == "real" else None
            b, s, q = query.mask.shape
            rows = max(1, b * s * max(self.config.heads * context.mask[0].numel(), known.place.shape[1] * len(self.info.space)))
            chunk = max(1, (_NUMBERS // rows) if memory is not None else _TOGETHER // s)
            parts = []
            for start in range(0, max(q, 1), chunk):
                part = query.points(slice(start, start + chunk))
                asked = self._asked(known, context, part)
                found = self._served(asked, memory) if memory is not None else self._at(real, [asked])[0]
                parts.append(FieldPrediction(self._anchor(found, asked).unflatten(1, (s, -1))))
            return FieldPrediction.concatenate(parts)
        finally:
            self.train(training)

    # ---- beyond the contract

    @torch.no_grad()
    def attention(self, context: Frames, query: Frames) -> list[Tensor]:
        """Up-sampled attention maps: of each layer the softmax rows [B,S,Q,K] of the asked tokens, averaged over heads.

        Keys: the R = T*N real tokens, frame by frame (0 where masked); then the asked tokens, S*Q of them where all see each other, or the
        token itself.
        """
        training = self.training
        self.eval()
        try:
            known = series(context, self.info.step, self.info.period)
            asked, real = self._asked(known, context, query), self._real(context, query)
            if self.config.sees == "real":
                maps = self._read(asked, self._memory(real))[1]
            else:
                maps = [each[:, real.mask.shape[1] :] for each in self._joint(real, [asked])[1]]
            return [each.unflatten(1, query.mask.shape[1:]) for each in maps]
        finally:
            self.train(training)

    @torch.no_grad()
    def held(self, context: Frames, query: Frames) -> Tensor:
        """[B,S,Q] True where the nearest place was observed on one side of the time asked for only, and its nearest value is held."""
        known = series(context, self.info.step, self.info.period)
        return known.at(*self._time_place(self._coordinates(context, query), context))[2].view(query.mask.shape)

    # ---- tokens

    def _window(self, context: Frames) -> float:
        """Length of the window in frames."""
        return float(max(1, context.mask.shape[1] - 1 + self.config.horizon))

    def _scaled(self, time: Tensor, position: Tensor, context: Frames) -> Tensor:
        """Coordinates (...,A) of time (...) and model position (...,D); the first axis is the batch."""
        first = context.time[:, 0].view(-1, *[1] * (time.ndim - 1))
        frames = (time - first) / self.info.step
        return torch.cat([(frames / self._window(context)).to(position.dtype).unsqueeze(-1), (position + 1) / 2], -1)

    def _time_place(self, at: Tensor, context: Frames) -> tuple[Tensor, Tensor]:
        """Frames after the first one and model position of coordinates."""
        return at[..., 0] * self._window(context), 2 * at[..., 1:] - 1

    def _real(self, context: Frames, query: Frames) -> Tokens:
        assert context.value is not None
        if query.background is not None and not self.config.anchored:
            raise ValueError("without `anchored` the answer is no correction, and a background cannot be taken: set background to null")
        shown = context.mask.flatten(1)
        position = context.position.masked_fill(~context.mask.unsqueeze(-1), 0)
        at = self._scaled(context.time.unsqueeze(-1).expand(context.mask.shape), position, context).flatten(1, 2)
        if self.config.squeezed_time:
            at = self._squeezed(at, shown)
        covariate = None
        if self.context_covariate is not None and context.covariate is not None:
            covariate = self.context_covariate(context.covariate.masked_fill(~context.mask.unsqueeze(-1), 0)).flatten(1, 2)
        return Tokens(context.value.masked_fill(~context.mask.unsqueeze(-1), 0).flatten(1, 2), at, shown, covariate)

    def _coordinates(self, context: Frames, query: Frames) -> Tensor:
        """[B,S*Q,A]; raises ValueError outside the window."""
        at = self._scaled(query.time.unsqueeze(-1).expand(query.mask.shape), query.position, context).flatten(1, 2)
        frames = (query.time - context.time[:, :1]) / self.info.step
        last = context.mask.shape[1] - 1 + self.config.horizon
        if frames.numel() and (float(frames.min()) < -_EPS or float(frames.max()) > last + _EPS):
            back = 1 - context.mask.shape[1]
            raise ValueError(
                f"leads of {float(frames.min()) + back:g} to {float(frames.max()) + back:g} frames were asked for, but the window reaches "
                f"from {back} to {self.config.horizon}: take more context_frames, or set the model's horizon"
            )
        return at

    def _asked(self, known: Series, context: Frames, query: Frames) -> Tokens:
        at = self._coordinates(context, query)
        value = self._interpolated(known, at, context) if query.background is None else query.background.flatten(1, 2)
        if self.config.squeezed_time:
            at = self._squeezed(at, context.mask.flatten(1))
        covariate = None
        if self.query_covariate is not None and query.covariate is not None:
            covariate = self.query_covariate(query.covariate).flatten(1, 2)
        scale, truth = (None if x is None else x.flatten(1, 2) for x in (query.background_scale, query.value))
        return Tokens(value, at, query.mask.flatten(1), covariate, scale, truth)

    def _interpolated(self, known: Series, at: Tensor, context: Frames) -> Tensor:
        return known.at(*self._time_place(at, context))[0]

    @staticmethod
    def _squeezed(at: Tensor, shown: Tensor) -> Tensor:
        count = (shown.sum(1) - 1).clamp(min=1).to(at.dtype).view(-1, 1, 1)
        return torch.cat([at[..., :1] / count, at[..., 1:]], -1)

    def _draw(self, known: Series, context: Frames) -> tuple[Tensor, Tensor]:
        """Coordinates of the dummies, uniform in the window and the domain, in two parts [B,J,a], [B,J,A-a]: those to differentiate with
        respect to, and those that never vary. On a plane the domain is the box around what was observed; where that is one place for all,
        only time varies."""
        dtype, device, space = known.value.dtype, known.value.device, len(self.info.space)
        generator = None if self.training else torch.Generator(device).manual_seed(0)
        share = torch.rand(len(known.time), self.config.dummies, 1 + space, generator=generator, dtype=dtype, device=device)
        if self.info.period is not None:
            return share, share[..., :0]
        there = known.there.unsqueeze(-1)
        seen = there.any(1, keepdim=True)
        low = torch.where(seen, known.place.masked_fill(~there, torch.inf).amin(1, keepdim=True), 0.0)
        high = torch.where(seen, known.place.masked_fill(~there, -torch.inf).amax(1, keepdim=True), 0.0)
        place = (low + share[..., 1:] * (high - low) + 1) / 2
        if not (high > low).any():
            return share[..., :1], place
        return torch.cat([share[..., :1], place], -1), place[..., :0]

    # ---- the network

    def _anchor(self, found: Tensor, asked: Tokens) -> Tensor:
        """The answer [B,S*Q,C] from what the network gave."""
        if not self.config.anchored:
            return found
        return asked.value + (found if asked.scale is None else found * asked.scale)

    def _at(self, real: Tokens, parts: list[Tokens]) -> list[Tensor]:
        """What the network gives [B,S,C] at each part; the first part may be the real tokens themselves."""
        if self.config.sees == "all":
            first = parts[0] is real
            hidden = self._joint(real, parts[first:])[0]
            sizes = [real.mask.shape[1], *(part.mask.shape[1] for part in parts[first:])]
            found = list(self._decoded(hidden).split(sizes, 1))
            return found if first else found[1:]
        memory = self._memory(real)
        return [self._decoded(memory.hidden) if part is real else self._read(part, memory)[0] for part in parts]

    def _joint(self, real: Tokens, parts: list[Tokens]) -> tuple[Tensor, list[Tensor]]:
        """All tokens see each other: hidden [B,K,d] and the attention maps [B,K,K] of each layer."""
        x = torch.cat([self._embedded(tokens) for tokens in (real, *parts)], 1)
        mask = torch.cat([tokens.mask for tokens in (real, *parts)], 1).unsqueeze(1)
        maps = []
        for layer in self.layers:
            x, _, weights = layer(x, mask=mask)
            maps.append(weights)
        return x, maps

    def _memory(self, real: Tokens) -> Memory:
        """What the other tokens see: the real tokens in every layer."""
        x, pairs = self._embedded(real), []
        for layer in self.layers:
            x, pair, _ = layer(x, mask=real.mask.unsqueeze(1))
            pairs.append(pair)
        return Memory(pairs, real.mask.unsqueeze(1), x)

    def _read(self, tokens: Tokens, memory: Memory) -> tuple[Tensor, list[Tensor]]:
        """What the network gives [B,S,C] at tokens that see the real ones and themselves, and the attention maps [B,S,R+1]."""
        x, maps = self._embedded(tokens), []
        for layer, pair in zip(self.layers, memory.pairs, strict=True):
            x, _, weights = layer(x, memory=pair, mask=memory.mask)
            maps.append(weights)
        return self._decoded(x), maps

    def _served(self, tokens: Tokens, memory: Memory) -> Tensor:
        """What `_read` gives, for evaluation."""
        x = self._embedded(tokens)
        for layer, pair in zip(self.layers, memory.pairs, strict=True):
            assert isinstance(layer, Layer)
            x = layer.read(x, pair, memory.mask)
        return self._decoded(x)

    def _embedded(self, tokens: Tokens) -> Tensor:
        value = tokens.value
        if self.training and self.config.jitter:
            value = value + self.config.jitter * torch.randn_like(value)
        x = self.value(value) + self.place(tokens.at)
        if tokens.covariate is not None:
            x = x + tokens.covariate
        return self.drop(self.norm(x))

    def _decoded(self, hidden: Tensor) -> Tensor:
        return self.out(self.norm_out(F.gelu(self.inner(hidden))))


@dataclass(frozen=True)
class Memory:
    """The real tokens as the others see them."""

    pairs: list[tuple[Tensor, Tensor]]  # of each layer, keys and values [B,h,R,d/h]
    mask: Tensor  # [B,1,R]
    hidden: Tensor  # [B,R,d] after the last layer
