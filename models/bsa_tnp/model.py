"""BSA-TNP: a transformer neural process that knows places only by their distances.

Paper: Jenson et al., "Biased Scan Attention Transformer Neural Process", arXiv 2506.09163. Written from the description.

    tokens of context and query points
    -> blocks of kernel regression (KR): queries read the context, the context reads itself, with the same weights, biased by distance
    -> head: mean and standard deviation of every query point, or the probabilities of classes

Shapes::

    B batch   T context frames   N observations a frame   n = T*N context points   S query frames   Q queries   m = S*Q query points
    D space   C channels   X covariates   d width   H heads   E head width

The context never sees the queries: it is encoded once, and queries stream past it in chunks. All frames of the context are one set of
points with times; what its last block would make of it is read by nobody and not computed. Places and times enter as distances alone, so
moving everything changes nothing; `embed` also shows the tokens where they are, which gives that up.

What differs from the paper, `mode: paper` as well as `improved`:

- a token has one column for every covariate of either side, zero where its side lacks it: the weather is unknown at a query, the hour of
  the day is not given at the context;
- with a background (models/contract.py) a query token holds the background's mean where the paper has zeros, and the output is a
  correction in units of the background's standard deviation;
- on a torus distances are the shortest way round.

`improved` also: bases start at different length scales and learn their logarithms; every head has a slope beside them, which falls with
distance without end, so that a larger domain adds less weight far away; no floor under the softmax sum, and a query that sees
nothing gets the background, or mean 0 and deviation 1, exactly; the head starts at zero; deviations are at least 1e-3; tokens hold their
time relative to the last context frame. That last one is a difference, so the model stays invariant; without it the lead is invisible to a
context of one frame, as one time distance for all keys shifts all logits alike. Every one of these is a key of `Config` of its own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from models.bsa_tnp.biased_attention import Backend, DistanceBias, Form, Group, biased_attention, released_ghost
from models.contract import TASKS, DatasetInfo, FieldBatch, FieldModel, FieldPrediction, Frames

MODES: dict[str, dict[str, Any]] = {
    "paper": {
        "spread_bases": False,
        "slopes": False,
        "softmax_floor": True,
        "zero_head": False,
        "minimum_std": 0.0,
        "time_in_token": False,
    },
    "improved": {
        "spread_bases": True,
        "slopes": True,
        "softmax_floor": False,
        "zero_head": True,
        "minimum_std": 1e-3,
        "time_in_token": True,
    },
}
_POINTS = 1 << 13  # query points that predict holds at a time; bounds its memory
_TIME_REACH = (10.0, 1.0)  # of spread bases, in time units
_SLOPE_REACH = (4.0, 0.5)  # of heads with slopes, the distance over which a logit falls by 1: twice the domain to a quarter of it
_SCALE = 1e-6  # the least standard deviation of a background


class BsaTnpConfig(BaseModel):
    """Settings; `mode` fills in the switches that are not given. Defaults are the sheet's sizes, about 0.48 M parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["paper", "improved"] = "improved"
    width: int = Field(default=64, ge=1)
    heads: int = Field(default=4, ge=1)
    head_width: int = Field(default=32, ge=1)
    blocks: int = Field(default=6, ge=1)
    factor: int = Field(default=4, ge=2)  # hidden layers are this many times the width
    space: Form = "rbf"
    space_bases: int = Field(default=5, ge=1)
    metric: Literal["euclidean", "great_circle"] = "euclidean"  # great_circle: datasets whose space is longitude, latitude in degrees
    time: Form = "rbf"
    time_bases: int = Field(default=3, ge=0)  # 0: time has no bias
    time_scale: float = Field(default=1.0, gt=0)  # frames that count as 1
    causal: bool = False  # a point never sees a later one
    embed: bool = False  # tokens also hold their place and time: embed + bias, not invariant
    head: Literal["gaussian", "categorical"] = "gaussian"  # categorical: where the variables are classes
    serving: Literal["tiled", "flex"] = "tiled"  # back end of predict; flex pays off in contexts of thousands of points
    spread_bases: bool
    reach: tuple[float, float] = (1.0, 0.1)  # of spread bases in space, the longest and the shortest length, in model units
    slopes: bool  # space also has a bias that falls with distance without end
    softmax_floor: bool
    zero_head: bool
    minimum_std: float = Field(ge=0)  # in model units, or in those of the background's
    time_in_token: bool

    @model_validator(mode="before")
    @classmethod
    def _mode(cls, given: Any) -> Any:
        return {**MODES.get(given.get("mode", "improved"), {}), **given} if isinstance(given, dict) else given

    @model_validator(mode="after")
    def _consistent(self) -> BsaTnpConfig:
        if self.causal and not self.time_bases:
            raise ValueError("causal works by time distance: set time_bases to 1 or more")
        if not self.reach[0] >= self.reach[1] > 0:
            raise ValueError(f"reach is the longest and the shortest length of the bases, found {list(self.reach)}")
        if self.minimum_std >= 1:
            raise ValueError(f"minimum_std must be below 1, found {self.minimum_std}")
        return self


class BsaTnp(FieldModel):
    """The field model; see models/contract.py for what it is given and gives."""

    Config = BsaTnpConfig
    tasks: ClassVar[frozenset[str]] = frozenset(TASKS)

    def __init__(self, config: BsaTnpConfig, info: DatasetInfo) -> None:
        super().__init__()
        self.config, self.info = config, info
        c, channels = config, len(info.variables)
        if c.metric == "great_circle" and info.space != ("longitude", "latitude"):
            raise ValueError(f"great_circle needs the space ('longitude', 'latitude') in degrees, {info.name} has {info.space}")
        if c.head == "categorical" and not info.classes:
            raise ValueError(f"the categorical head needs variables that are classes, {info.name} has {', '.join(info.variables)}")
        self.covariates = tuple(dict.fromkeys(info.context_covariates + info.query_covariates))
        place = len(info.space) * (1 if info.period is None else 2)
        columns = 4 + len(self.covariates) + channels + c.time_in_token + c.embed * (place + (not c.time_in_token))
        self.observed = nn.Embedding(2, 4)
        self.token = _mlp(columns, c.factor * c.width, c.factor * c.width // 2, c.width)
        self.norm_token, self.norm_head = _norm(c.width), _norm(c.width)
        self.blocks = nn.ModuleList(KRBlock(c, info) for _ in range(c.blocks))
        self.head = _mlp(c.width, c.factor * c.width, c.width, channels if c.head == "categorical" else 2 * channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.orthogonal_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.observed.weight, std=self.observed.embedding_dim**-0.5)
        last = self.head[-1]
        assert isinstance(last, nn.Linear)
        if c.zero_head:
            nn.init.zeros_(last.weight)

    # ---- the contract

    def loss(self, batch: FieldBatch) -> dict[str, Tensor]:
        """`loss` is the mean over what is asked of the negative logarithm of the likelihood, in model units, or of the cross-entropy of
        classes; for reading also `mse` of the mean, or `accuracy`.

        Raises ValueError where the query has no values, or where what should be classes is none.
        """
        query = batch.query
        if query.value is None:
            raise ValueError("the query has no values: there is nothing to train on")
        out = self._answer(self._encode(batch.context), batch.context, query)
        known = query.mask.unsqueeze(-1)
        truth = torch.where(known, query.value, 0)
        if self.config.head == "categorical":
            classes = self._classes(truth, query.mask)
            each = F.cross_entropy(out.flatten(0, 2), classes.flatten(), reduction="none").view_as(classes) * query.mask
            right = (out.argmax(-1) == classes) & query.mask
            count = query.mask.sum().clamp(min=1)
            return {"loss": each.sum() / count, "accuracy": right.sum() / count}
        count = (known.sum() * truth.shape[-1]).clamp(min=1)
        mean, scale = self._gaussian(out, query)
        miss = mean - truth
        each = 0.5 * (miss / scale).square() + scale.log() + 0.5 * math.log(2 * math.pi)
        return {"loss": (each * known).sum() / count, "mse": ((miss * known).square().sum() / count).detach()}

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        """Mean and standard deviation of every point, or the probabilities of classes, streamed past the encoded context in chunks."""
        out = self._stream(context, query)
        if self.config.head == "categorical":
            chance = out.softmax(-1)
            mean, std = (torch.tensor(x, dtype=out.dtype, device=out.device) for x in (self.info.mean, self.info.std))
            return FieldPrediction((chance - mean) / std, probabilities=chance)
        return FieldPrediction(*self._gaussian(out, query))

    # ---- the network

    @torch.no_grad()
    def _stream(self, context: Frames, query: Frames) -> Tensor:
        """Head outputs [B,S,Q,*]. Nothing here depends on training mode."""
        seen = self._encode(context, self.config.serving)
        b, s, q = query.mask.shape
        chunk = max(1, _POINTS // (b * max(1, s)))
        parts = [self._answer(seen, context, query.points(slice(i, i + chunk)), self.config.serving) for i in range(0, max(q, 1), chunk)]
        return torch.cat(parts, 2)

    def _encode(self, context: Frames, backend: Backend = "tiled") -> _Context:
        """Keys and values of the context for every block; what is masked in all samples is left out."""
        mask, points = context.mask.flatten(1), context.mask[0].numel()
        place, time = (x.expand(-1, *context.mask.shape[1:], -1).flatten(1, 2) for x in self._where(context, context))
        k = self._tokens(context, context, observed=True).flatten(1, 2)
        most = max(1, int(mask.sum(1).max()))
        if most < points:
            seen = (~mask).int().sort(dim=1, stable=True).indices[:, :most]
            mask, place, time, k = (
                x.expand(len(mask), *x.shape[1:]).gather(1, seen.view(*seen.shape, *[1] * (x.ndim - 2)).expand(-1, -1, *x.shape[2:]))
                for x in (mask, place, time, k)
            )
        groups_of, k = ((_once(place[:, None]), place), (_once(time[:, None]), time)), k.unsqueeze(1)
        read = []
        for number, block in enumerate(self.blocks):
            assert isinstance(block, KRBlock)
            norm = block.norm(k).squeeze(1)
            key, value = block.key(norm), block.value(norm)
            read.append((key, value))
            if number + 1 < len(self.blocks):
                k = block(k, key, value, mask, block.groups(*groups_of), backend)
        return _Context(mask, place, time, read)

    def _answer(self, seen: _Context, context: Frames, query: Frames, backend: Backend = "tiled") -> Tensor:
        """Head outputs [B,S,Q,*] for the points of `query`."""
        place, time = self._where(query, context)
        q = self._tokens(query, context, observed=False)
        for block, (key, value) in zip(self.blocks, seen.read, strict=True):
            assert isinstance(block, KRBlock)
            q = block(q, key, value, seen.mask, block.groups((place, seen.place), (time, seen.time)), backend)
        out: Tensor = self.head(self.norm_head(q))
        if not self.config.softmax_floor:
            first = seen.time[..., 0].expand_as(seen.mask).masked_fill(~seen.mask, torch.inf).amin(1)[:, None, None]
            blind = first > time[..., 0] if self.config.causal else first.isinf()
            out = torch.where(blind.unsqueeze(-1), 0, out)
        return out

    def _where(self, frames: Frames, context: Frames) -> tuple[Tensor, Tensor]:
        """Places [B|1,T|1,N|1,D] and times [B|1,T|1,1,1] since the last context frame, in units of `time_scale`; 1 along an axis on which
        they are all the same."""
        position = frames.position.nan_to_num(0.0, 0.0, 0.0).to(self._dtype)  # padding may hold anything
        if self.config.metric == "great_circle":
            position = position * self.info.half_extent + position.new_tensor(self.info.centre)
        return _once(position), _once(self._time(frames, context)[:, :, None, None])

    def _time(self, frames: Frames, context: Frames) -> Tensor:
        """[B,T]"""
        return ((frames.time - context.time[:, -1:]) / (self.info.step * self.config.time_scale)).to(self._dtype)

    def _tokens(self, frames: Frames, context: Frames, observed: bool) -> Tensor:
        """[B,T,N,d]"""
        c, shape, mask = self.config, frames.mask.shape, frames.mask.unsqueeze(-1)
        parts = [self.observed.weight[int(observed)].expand(*shape, -1)]
        if self.covariates:
            names = self.info.context_covariates if observed else self.info.query_covariates
            if names and frames.covariate is None:
                raise ValueError(f"the {'context' if observed else 'query'} lacks the covariates {', '.join(names)}")
            known = {} if frames.covariate is None else dict(zip(names, torch.where(mask, frames.covariate, 0).unbind(-1), strict=True))
            absent = mask.new_zeros(shape, dtype=self._dtype)
            parts.append(torch.stack([known.get(name, absent).to(self._dtype) for name in self.covariates], -1))
        if c.embed:
            place = torch.where(mask, frames.position, 0)
            if self.info.period is not None:  # a raw coordinate jumps where a torus closes
                angle = place * (2 * torch.pi / self.info.period)
                place = torch.cat([angle.sin(), angle.cos()], -1)
            parts.append(place)
        if c.embed or c.time_in_token:
            parts.append(self._time(frames, context)[:, :, None, None].expand(*shape, 1))
        parts.append(self._features(frames, observed))
        return self.norm_token(self.token(torch.cat([part.to(self._dtype) for part in parts], -1)))

    def _features(self, frames: Frames, observed: bool) -> Tensor:
        """What is known of the variables [B,T,N,C]: values of the context, at a query its background or zeros."""
        mask, categorical = frames.mask.unsqueeze(-1), self.config.head == "categorical"
        if categorical and frames.background is not None:
            raise ValueError("a categorical model takes no background")
        if observed:
            assert frames.value is not None
            value = torch.where(mask, frames.value, 0)
            return F.one_hot(self._classes(value, frames.mask), value.shape[-1]) * mask if categorical else value
        if frames.background is not None:
            return torch.where(mask, frames.background, 0)
        return mask.new_zeros(1, dtype=self._dtype).expand(*frames.mask.shape, len(self.info.variables))

    def _classes(self, value: Tensor, mask: Tensor) -> Tensor:
        """Number of the class [B,T,N] from standardised values [B,T,N,C]; 0 where masked."""
        member = value * value.new_tensor(self.info.std) + value.new_tensor(self.info.mean)
        number = member.argmax(-1)
        wrong = ((member - F.one_hot(number, value.shape[-1])).abs().amax(-1) > 1e-3) & mask
        if wrong.any():
            found = [round(x, 3) for x in member[wrong][0].tolist()]
            raise ValueError(f"{', '.join(self.info.variables)} must be classes, a single 1 among zeros; found {found} in {self.info.name}")
        return number.masked_fill(~mask, 0)

    def _gaussian(self, out: Tensor, query: Frames) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation [B,S,Q,C] around the background. With `zero_head`, outputs of zero are the background itself."""
        mean, spread = out.chunk(2, dim=-1)
        least = self.config.minimum_std
        one = math.log(math.expm1(1 - least)) if self.config.zero_head else 0.0  # softplus of it is 1 - least
        scale = least + F.softplus(spread + one)
        if query.background is None:
            return mean, scale
        unit = 1.0 if query.background_scale is None else query.background_scale.to(out.dtype).clamp(min=_SCALE)
        return query.background.to(out.dtype) + unit * mean, unit * scale

    @property
    def _dtype(self) -> torch.dtype:
        return self.observed.weight.dtype


@dataclass(frozen=True)
class _Context:
    """A context as every block reads it."""

    mask: Tensor  # [B,n]
    place: Tensor  # [B|1,n,D]
    time: Tensor  # [B|1,n,1]
    read: list[tuple[Tensor, Tensor]]  # keys and values [B,n,H*E] of each block


class KRBlock(nn.Module):
    """x + attention(norm x; keys and values of the context), then x + feed-forward(norm x); x [B,S,Q,d] are queries, or [B,1,n,d] the
    context itself."""

    def __init__(self, config: BsaTnpConfig, info: DatasetInfo) -> None:
        super().__init__()
        c = config
        self.heads, self.floor = c.heads, c.softmax_floor
        inner = c.heads * c.head_width
        self.norm, self.norm_ffn = _norm(c.width), _norm(c.width)
        self.query, self.out = nn.Linear(c.width, inner), nn.Linear(inner, c.width)
        self.key, self.value = nn.Linear(c.width, inner), nn.Linear(c.width, inner)
        self.ffn = _mlp(c.width, c.factor * c.width, c.width)
        unit = info.half_extent if c.metric == "great_circle" else 1.0
        far, near = c.reach
        self.space = DistanceBias(
            c.heads, c.space_bases, c.space, c.metric, info.period, (far * unit, near * unit) if c.spread_bases else None
        )
        gentle, steep = _SLOPE_REACH
        self.slope = DistanceBias(c.heads, 1, "scalar", c.metric, info.period, (gentle * unit, steep * unit)) if c.slopes else None
        elapsed: Literal["elapsed", "euclidean"] = "elapsed" if c.causal else "euclidean"
        reach = _TIME_REACH if c.spread_bases else None
        self.time = DistanceBias(c.heads, c.time_bases, c.time, elapsed, reach=reach) if c.time_bases else None

    def groups(self, place: tuple[Tensor, Tensor], time: tuple[Tensor, Tensor]) -> list[Group]:
        """Biases between queries and the context, from (query, context) places and times."""
        of_space = [self.space(*place)] + ([self.slope(*place)] if self.slope is not None else [])
        return of_space + ([self.time(*time)] if self.time is not None else [])

    def forward(self, x: Tensor, key: Tensor, value: Tensor, mask: Tensor, groups: list[Group], backend: Backend) -> Tensor:
        q, k, v = (y.unflatten(-1, (self.heads, -1)).movedim(-2, 1) for y in (self.query(self.norm(x)), key, value))
        ghost = released_ghost(k.shape[2]) if self.floor else None
        read = biased_attention(q, k, v, mask, groups, ghost=ghost, backend=backend)
        x = x + self.out(read.movedim(1, -2).flatten(3))
        return x + self.ffn(self.norm_ffn(x))


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Linear(before, after), nn.GELU(approximate="tanh")]
    return nn.Sequential(*layers[:-1])


def _norm(width: int) -> nn.LayerNorm:
    return nn.LayerNorm(width, eps=1e-6)


def _once(x: Tensor) -> Tensor:
    """x [B,T,N,D] with one entry along those of its first three axes on which all are the same."""
    for axis in range(3):
        first = x.narrow(axis, 0, 1)
        if x.shape[axis] > 1 and bool((x == first).all()):
            x = first
    return x
