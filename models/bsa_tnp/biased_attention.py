"""Attention whose logits carry a bias that is a function of distance: one op, three ways to compute it.

    out = softmax( q k^T / sqrt(E) + sum of groups g: bias_g(distance_g(query, key)) ) v

Paper: Jenson et al., "Biased Scan Attention Transformer Neural Process", arXiv 2506.09163 (the op is its biased scan attention; the biases
its section on kernels). Written from the description; tiles follow Dao et al., "FlashAttention", arXiv 2205.14135.

Shapes::

    R rows (batch)   H heads   S frames   Q queries of a frame   M keys   E width of a head   V width of a value   D coordinates   F bases

A place that does not change from frame to frame, a time that all points of a frame share: a group states it once, and what follows from it,
the exponentials above all, is computed once and read for all.

Back ends, the same answer to rounding:

- `dense`: holds all S Q M logits, plain autograd. For tests.
- `tiled`: walks over tiles of queries and keys with a running softmax; saves its inputs, its output and the logarithm of the softmax sum,
  recomputes the tiles in the backward pass and has closed-form gradients. Memory grows with S Q + M, never with their product. Trains on
  CPU and GPU. Where no gradient is needed, torch's own fused attention is given the biases of some queries to all keys at a time.
- `flex`: PyTorch's compiled FlexAttention, for inference in long contexts. It compiles for half a minute at its first use. Where it
  cannot serve (`flex_obstacle` says why) `tiled` answers.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import flex_attention

Form = Literal["rbf", "tisa", "scalar", "exponential"]
Metric = Literal["euclidean", "great_circle", "elapsed"]
Backend = Literal["dense", "tiled", "flex"]

START: dict[Form, tuple[float, ...]] = {"rbf": (1, 1), "exponential": (1, 1), "tisa": (1, 1, 0), "scalar": (-1,)}  # a, b, c of every basis
_TILE = {"cpu": 1 << 17}  # logits in a tile: it stays in a core's cache
_LARGE = 1 << 25  # elsewhere, where launching an operation takes longer than a small tile
_FEWEST = 32  # queries of a tile that are read together, however many keys there are
_FLEX_BLOCK = 1024  # queries that `flex` answers at once; its keys come in multiples of that
_FAINT = -40.0  # an exponent whose exponential counts as nothing; its products with small gradients must not be denormal, ten times as slow
_NOWHERE = -1e30  # a logit far below any other
_GHOST = 2.0  # marks the ghost beside keys that are seen (1) or not (0)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Group:
    """One bias: where queries and keys lie, how far that is, and what follows from it. Coordinates get no gradient.

    form, with d the distance and a, b, c = weights:
        rbf          sum_f a_f exp(-b_f d^2)
        tisa         sum_f a_f exp(-b_f (d - c_f)^2)
        exponential  sum_f a_f exp(-b_f d)
        scalar       sum_f a_f d
    metric:
        euclidean     on a torus of length `period` along every axis the shortest way round
        great_circle  degrees, between coordinates that are longitude and latitude in degrees
        elapsed       query - key along one axis, infinite where the key is later than the query
    A key at a distance that is not finite is not seen.
    """

    query: Tensor  # [R|1,S|1,Q|1,D]; 1 along an axis on which it does not depend, which then costs nothing
    key: Tensor  # [R|1,M,D]
    weights: tuple[Tensor, ...]  # [H,F] each: a, b, c as far as the form has them
    form: Form = "rbf"
    metric: Metric = "euclidean"
    period: float | None = None


class DistanceBias(nn.Module):
    """The weights of a bias; makes the group for some queries and keys.

    `reach` None: every basis starts equal, as published, and nothing ever tells them apart. `reach` (far, near): their length scales, where
    the exponent is -1, start log-spaced between the two distances. The a start as published: together they must tower over the products of
    queries and keys, or attention begins nearly uniform and takes most of a short training to find out that near is what counts. What is
    learned are then the logarithms of the b: an optimiser's step is a share of a scale, be it long or short. A scalar bias has one basis,
    so it is the heads whose lengths are spread: each falls by 1 over its own.

    The weights are kept as vectors [H*F]: weight decay, which pulls matrices, leaves them alone.
    """

    def __init__(
        self,
        heads: int,
        bases: int,
        form: Form = "rbf",
        metric: Metric = "euclidean",
        period: float | None = None,
        reach: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        if form == "scalar" and bases != 1:
            raise ValueError(f"a scalar bias has one basis, found {bases}: set it to 1")
        self.form, self.metric, self.period = form, metric, period
        self.logarithmic = reach is not None and form != "scalar"
        self.shape = heads, bases
        start = [torch.full(self.shape, float(value)) for value in START[form]]
        if reach is not None:
            lengths = torch.linspace(math.log(reach[0]), math.log(reach[1]), bases if self.logarithmic else heads)
            if self.logarithmic:
                start[1] = lengths.mul(-1 if form == "exponential" else -2).repeat(heads, 1)
            else:
                start[0] = -lengths.neg().exp().unsqueeze(1)
        self.weights = nn.ParameterList(weight.flatten() for weight in start)

    def forward(self, query: Tensor, key: Tensor) -> Group:
        """query [R|1,S|1,Q|1,D], key [R|1,M,D]."""
        weights = tuple(weight.view(self.shape) for weight in self.weights)
        if self.logarithmic:
            weights = (weights[0], weights[1].exp(), *weights[2:])
        if not torch.is_grad_enabled() and all(torch.equal(w, w[:, :1].expand_as(w)) for w in weights[1:]):
            weights = (weights[0].sum(1, keepdim=True), *[w[:, :1] for w in weights[1:]])  # equal bases cost one
        return Group(query, key, weights, self.form, self.metric, self.period)


def biased_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    groups: Sequence[Group] = (),
    *,
    ghost: float | None = None,
    backend: Backend = "tiled",
    tile: int | None = None,
) -> Tensor:
    """q [R,H,S,Q,E], k [R,H,M,E], v [R,H,M,V] -> [R,H,S,Q,V]; mask [R,M], True where a key may be seen.

    A query that sees no key gives zero. Values and keys that are not seen must be finite all the same. `ghost` is the logit of one more key
    whose value is zero; `released_ghost` is what the published code amounts to. `tile` is the side of a tile (None: by memory).

    Differentiable once, in q, k, v and the groups' weights.
    """
    if backend == "dense":
        return _dense(q, k, v, mask, groups, ghost)
    if backend == "flex":
        obstacle = flex_obstacle(q, k, v, groups)
        if obstacle is None:
            return _flex(q, k, v, mask, groups, ghost)
        log.debug("tiled instead of flex: %s", obstacle)
    weights = [w for group in groups for w in group.weights]
    r, h, s, _, _ = q.shape
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *weights))
    room = _TILE.get(q.device.type, _LARGE)
    if not learns and q.dtype == _precise(q):
        return _fused(q, k, v, mask, groups, ghost, tile or max(_FEWEST, room // (r * h * (k.shape[2] + 1))))
    side = tile or max(32, math.isqrt(room // (r * h)))
    out: Tensor = _Tiled.apply(q, k, v, mask, tuple(groups), ghost, (max(1, side // s), side), *weights)
    return out


def released_ghost(keys: int) -> float:
    """The published scan starts its running maximum at -1e-6 and adds 1e-10 to the softmax sum for each tile of 1024 keys.

    Where all logits are far below zero that takes weight away, exactly as one more key of this logit and of value zero does; elsewhere it
    is below rounding. No key at all then needs no guard.
    """
    return math.log(1e-10 * max(1, math.ceil(keys / 1024))) - 1e-6


def separation(group: Group, query: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
    """The distance, or for rbf its square. `query` and `key` hold one tensor for each axis, any shapes that broadcast."""
    squared = group.form == "rbf"
    if group.metric == "euclidean":
        square = sum(_shortest(a - b, group.period).square() for a, b in zip(query, key, strict=True))
        assert isinstance(square, Tensor)
        return square if squared else square.sqrt()
    if group.metric == "great_circle":
        distance = _great_circle(query, key)
    else:
        (now,), (then,) = query, key
        distance = torch.where(then > now, torch.inf, now - then)
    return distance.square() if squared else distance


def _shortest(away: Tensor, period: float | None) -> Tensor:
    return away if period is None else away - period * (away / period).round()


def _great_circle(query: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
    """Haversine formula, exact to rounding for near points too; degrees in, degrees out."""
    (east, north), (east_k, north_k) = query, key
    half = torch.pi / 360
    square = ((north - north_k) * half).sin().square()
    square = square + (north * 2 * half).cos() * (north_k * 2 * half).cos() * ((east - east_k) * half).sin().square()
    return square.clamp(max=1).sqrt().asin() / half


def bases(group: Group, apart: Tensor) -> Iterator[Tensor]:
    """The F functions of `separation` [R|1,1,S|1,Q|1,M] that the weights a multiply, with heads each, one at a time."""
    rest = zip(*[_by_head(w) for w in group.weights[1:]], strict=True) if len(group.weights) > 1 else [()]
    return (_basis(group.form, apart, *each) for each in rest)


def _basis(form: Form, apart: Tensor, *rest: Tensor) -> Tensor:
    """One function of `separation` with its b and c, any shapes that broadcast."""
    if form == "scalar":
        return apart
    if form == "tisa":
        apart = (apart - rest[1]).square()
    return (apart * -rest[0]).clamp_(min=_FAINT).exp_()


def _by_head(weight: Tensor) -> Tensor:
    """[H,F] -> [F,H,1,1,1]."""
    return weight.t()[..., None, None, None]


# ---- dense


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, groups: Sequence[Group], ghost: float | None) -> Tensor:
    biases, _ = _biases(mask, groups, slice(None), slice(None), keep=False)
    scores = _scores(q, k, biases)
    k, v = (x.unsqueeze(2) for x in (k, v))
    if ghost is not None:
        scores = torch.cat([scores, scores.new_full((*scores.shape[:4], 1), ghost)], -1)
        v = torch.cat([v, v.new_zeros(*v.shape[:3], 1, v.shape[-1])], 3)
    blind = scores.isneginf().all(-1, keepdim=True)
    share = scores.masked_fill(blind, 0).softmax(-1).masked_fill(blind, 0)
    return share.to(v.dtype) @ v


def _scores(q: Tensor, k: Tensor, biases: Sequence[Tensor]) -> Tensor:
    """Logits [R,H,S,q,m] in single precision or better, -inf where a key is not seen; q [R,H,S,q,E], k [R,H,m,E]."""
    scores = (q.flatten(2, 3) @ k.transpose(2, 3)).to(_precise(q)).div_(math.sqrt(q.shape[-1])).unflatten(2, q.shape[2:4])
    for bias in biases:
        scores = scores.add_(bias)
    return scores


def _biases(
    mask: Tensor | None, groups: Sequence[Group], rows: slice, columns: slice, keep: bool
) -> tuple[list[Tensor], list[tuple[Tensor, list[Tensor]]]]:
    """What is added to the logits of some queries of each frame and some keys, [R|1,H|1,S|1,q|1,m] each, -inf where a key is not seen.
    `keep` also gives what made them, of every group the separation and the bases."""
    biases, made = [], []
    for group in groups:
        query = group.query if group.query.shape[2] == 1 else group.query[:, :, rows]
        query, key = query.detach()[:, None, :, :, None], group.key.detach()[:, None, None, None, columns]
        apart = separation(group, query.unbind(-1), key.unbind(-1))
        far = ~apart.isfinite()
        seen = not bool(far.any())
        if not seen:
            apart = apart.masked_fill(far, 0)  # an infinity that is masked only later still spoils gradients
        bias, kept = apart.new_zeros(apart.shape[0], len(group.weights[0]), *apart.shape[2:]), []
        for a, part in zip(_by_head(group.weights[0]), bases(group, apart), strict=True):
            bias.addcmul_(a, part)
            if keep:
                kept.append(part)
        biases.append(bias if seen else bias.masked_fill(far, -torch.inf))
        if keep:
            made.append((apart, kept))
    if mask is not None:
        biases.append(torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, -torch.inf)[:, None, None, None, columns])
    return biases, made


def _precise(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# ---- tiled


def _fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, groups: Sequence[Group], ghost: float | None, side: int) -> Tensor:
    """Without gradients: `side` queries of each frame at a time, frame after frame. The last key is the ghost, as in `_flex`."""
    r, h, frames, queries, _ = q.shape
    k, v = (F.pad(x, (0, 0, 0, 1)) for x in (k, v))
    out = v.new_empty(r, h, frames, queries, v.shape[-1])
    for rows in _tiles(queries, side):
        biases, _ = _biases(mask, groups, rows, slice(None), keep=False)
        bias = q.new_full((r, h, rows.stop - rows.start, k.shape[2]), _NOWHERE if ghost is None else ghost)
        still = sum((b[:, :, 0] for b in biases if b.shape[2] == 1), q.new_zeros(()))
        moving = [b for b in biases if b.shape[2] > 1]
        for frame in range(frames):
            if moving or not frame:
                bias[..., :-1] = sum((b[:, :, frame] for b in moving), still)
            out[:, :, frame, rows] = F.scaled_dot_product_attention(q[:, :, frame, rows], k, v, attn_mask=bias)
    return out


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, groups: Sequence[Group], ghost: float | None,
                sides: tuple[int, int], *weights: Tensor) -> Tensor:  # fmt: skip
        out = v.new_empty(*q.shape[:4], v.shape[-1])
        total = q.new_empty(*q.shape[:4], 1, dtype=_precise(q))  # logarithm of the softmax sum
        for rows in _tiles(q.shape[3], sides[0]):
            asked = q[:, :, :, rows]
            top = total.new_full((*asked.shape[:4], 1), -torch.inf if ghost is None else ghost)
            sums = torch.zeros_like(top) if ghost is None else torch.ones_like(top)
            read = total.new_zeros(*asked.shape[:4], v.shape[-1])
            for columns in _tiles(k.shape[2], sides[1]):
                biases, _ = _biases(mask, groups, rows, columns, keep=False)
                scores = _scores(asked, k[:, :, columns], biases)
                higher = torch.maximum(top, scores.amax(-1, keepdim=True))
                base = higher.masked_fill(higher.isneginf(), 0)  # nothing seen yet: avoid inf - inf
                fade = (top - base).exp_()
                share = scores.sub_(base).exp_()
                sums = sums * fade + share.sum(-1, keepdim=True)
                read = read * fade + (share.to(v.dtype).flatten(2, 3) @ v[:, :, columns]).to(read.dtype).view_as(read)
                top = higher
            blind = sums == 0
            out[:, :, :, rows] = (read / sums.masked_fill(blind, 1)).to(v.dtype)
            total[:, :, :, rows] = (top + sums.log()).masked_fill(blind, torch.inf)  # exp(score - inf) is zero in the backward pass
        ctx.save_for_backward(q, k, v, mask, out, total, *weights)
        ctx.groups, ctx.sides = tuple(replace(group, weights=()) for group in groups), sides
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, mask, out, total, *weights = ctx.saved_tensors
        given = iter(weights)
        groups = [replace(group, weights=tuple(next(given) for _ in START[group.form])) for group in ctx.groups]
        scale, precise = 1 / math.sqrt(q.shape[-1]), total.dtype
        grad_q, grad_k, grad_v = (torch.zeros_like(x, dtype=precise) for x in (q, k, v))
        grad_weights = [torch.zeros_like(w, dtype=precise) for w in weights]
        delta = (grad.to(precise) * out.to(precise)).sum(-1, keepdim=True)
        for rows in _tiles(q.shape[3], ctx.sides[0]):
            asked, given_back = q[:, :, :, rows], grad[:, :, :, rows].flatten(2, 3)
            for columns in _tiles(k.shape[2], ctx.sides[1]):
                biases, made = _biases(mask, groups, rows, columns, keep=True)
                share = _scores(asked, k[:, :, columns], biases).sub_(total[:, :, :, rows]).exp_().flatten(2, 3)
                grad_v[:, :, columns] += share.to(v.dtype).transpose(2, 3) @ given_back
                slope = (given_back @ v[:, :, columns].transpose(2, 3)).to(precise)
                slope.sub_(delta[:, :, :, rows].flatten(2, 3)).mul_(share)
                grad_q[:, :, :, rows] += (slope.to(k.dtype) @ k[:, :, columns]).mul_(scale).view_as(asked)
                grad_k[:, :, columns] += (slope.to(q.dtype).transpose(2, 3) @ asked.flatten(2, 3)).mul_(scale)
                if any(ctx.needs_input_grad[7:]):
                    slope = slope.unflatten(2, asked.shape[2:4])
                    parts = (
                        part for group, (apart, e) in zip(groups, made, strict=True) for part in _weight_gradients(group, apart, e, slope)
                    )
                    for total_of, part in zip(grad_weights, parts, strict=True):
                        total_of += part
        cast = [x.to(like.dtype) for x, like in zip((grad_q, grad_k, grad_v, *grad_weights), (q, k, v, *weights), strict=True)]
        return *cast[:3], None, None, None, None, *cast[3:]


def _weight_gradients(group: Group, apart: Tensor, parts: list[Tensor], slope: Tensor) -> list[Tensor]:
    """Gradients [H,F] of the weights a, b, c, from `slope` [R,H,S,q,m], the gradient of the logits.

    d/da_f = sum slope e_f;  d/db_f = -a_f sum slope e_f u,  u = d^2, d or (d - c_f)^2;  d/dc_f = 2 a_f b_f sum slope e_f (d - c_f)
    """
    shared = [axis for axis in (0, 2, 3) if apart.shape[axis] < slope.shape[axis]]
    if shared:
        slope = slope.sum(shared, keepdim=True)
    a = group.weights[0]
    if group.form == "scalar":
        return [_total(slope * apart).unsqueeze(1)]
    moments: list[tuple[Tensor, ...]] = []  # of slope e_f with 1, u and, for tisa, the root of u
    for number, part in enumerate(parts):
        product = slope * part
        first = _total(product)
        if group.form == "tisa":
            away = apart - _by_head(group.weights[2])[number]
            root = _total(product.mul_(away))
            moments.append((first, _total(product.mul_(away)), root))
        else:
            moments.append((first, _total(product.mul_(apart))))
    of_a, of_u, *of_root = (torch.stack(each, 1) for each in zip(*moments, strict=True))
    return [of_a, -a * of_u, *(2 * a * group.weights[1] * root for root in of_root)]


def _total(x: Tensor) -> Tensor:
    """Sum over all but the heads, [R,H,S,q,m] -> [H]."""
    return x.sum((0, 2, 3, 4))


def _tiles(length: int, side: int) -> Iterator[slice]:
    for start in range(0, length, side):
        yield slice(start, min(start + side, length))


# ---- flex


def flex_obstacle(q: Tensor, k: Tensor, v: Tensor, groups: Sequence[Group]) -> str | None:
    """Why FlexAttention cannot answer this call; None where it can.

    It must not need gradients (the CPU kernel has none, and those of bias weights are slow elsewhere) nor double precision, and must
    compile on this machine for these rows, heads, widths, groups and thousands of keys. That is tried once for each, with one query, and
    takes some ten seconds; a failure is logged.
    """
    inputs = [q, k, v, *[w for group in groups for w in group.weights]]
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return "gradients are needed"
    if q.dtype == torch.float64:
        return "double precision"
    kinds = tuple((g.form, g.metric, g.period, g.query.shape[-1], g.weights[0].shape[-1]) for g in groups)
    return _flex_failure(q.device, q.dtype, (*q.shape[:2], q.shape[-1], v.shape[-1]), k.shape[2] // _FLEX_BLOCK, kinds)


@cache
def _flex_failure(
    device: torch.device,
    dtype: torch.dtype,
    sizes: tuple[int, ...],
    blocks: int,
    kinds: tuple[tuple[Form, Metric, float | None, int, int], ...],
) -> str | None:
    rows, heads, width, value_width = sizes
    keys = blocks * _FLEX_BLOCK

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    groups = []
    for form, metric, period, space, count in kinds:
        weights = tuple(zeros(heads, count) for _ in START[form])
        groups.append(Group(zeros(1, 1, 1, space), zeros(1, keys, space), weights, form, metric, period))
    q, k, v = (zeros(rows, heads, *n, dtype=dtype) for n in ((1, 1, width), (keys, width), (keys, value_width)))
    try:
        _flex(q, k, v, None, groups, None)
    except Exception as error:  # whatever a compiler says, or that there is none
        log.warning("compiled attention is not available on %s, the slower tiled one answers: %s", device, str(error).split("\n")[0])
        return f"it does not compile on {device}"
    return None


@cache
def _compiled() -> Any:
    return torch.compile(_flex_rows, dynamic=False)  # with lengths as symbols some shapes become code that does not compile


def _flex(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, groups: Sequence[Group], ghost: float | None) -> Tensor:
    """Lengths are filled up to multiples of _FLEX_BLOCK, so that few are compiled. The last key is the ghost, of value zero; where there is
    none, its logit is far below any other and keeps sums from being empty."""
    r, _, m, _ = k.shape
    frames, points = q.shape[2:4]
    q = q.flatten(2, 3)
    more_queries, more_keys = -q.shape[2] % _FLEX_BLOCK, -(m + 1) % _FLEX_BLOCK + 1

    def filled(x: Tensor, more: int) -> Tensor:
        return F.pad(x.detach(), (0, 0, 0, more))  # detached: parameters are refused even where no gradient is kept

    q, k, v = filled(q, more_queries), filled(k, more_keys), filled(v, more_keys)
    seen = torch.zeros(r, k.shape[2], device=k.device)
    seen[:, :m] = 1 if mask is None else mask.to(seen.dtype)
    seen[:, -1] = _GHOST
    asked = [filled(g.query.expand(r, frames, points, -1).flatten(1, 2), more_queries) for g in groups]
    places = [filled(g.key, more_keys).expand(r, -1, -1).contiguous() for g in groups]
    weights = [tuple(w.detach() for w in g.weights) for g in groups]
    plain = tuple((g.form, g.metric, g.period) for g in groups)
    last = torch.tensor(_NOWHERE if ghost is None else ghost, dtype=torch.float32, device=k.device)
    parts = []
    for rows in _tiles(q.shape[2], _FLEX_BLOCK):
        with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):  # else it silently holds all logits
            at = [x[:, rows].contiguous() for x in asked]
            parts.append(_compiled()(q[:, :, rows].contiguous(), k, v, seen, at, places, weights, plain, last))
    return torch.cat(parts, 2)[:, :, : frames * points].unflatten(2, (frames, points))


def _flex_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    asked: list[Tensor],
    places: list[Tensor],
    weights: list[tuple[Tensor, ...]],
    plain: tuple[tuple[Form, Metric, float | None], ...],
    last: Tensor,
) -> Tensor:
    """What is compiled: groups taken apart into tensors and `plain` words."""

    def logit(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        visible = seen[row, key] == 1
        for at, of, weight, (form, metric, period) in zip(asked, places, weights, plain, strict=True):
            group = Group(at, of, weight, form, metric, period)
            axes = range(at.shape[-1])
            apart = separation(group, [at[row, query, d] for d in axes], [of[row, key, d] for d in axes])
            visible = visible & (apart.abs() < torch.inf)
            for f in range(weight[0].shape[1]):
                score = score + weight[0][head, f] * _basis(form, apart, *[w[head, f] for w in weight[1:]])
        return torch.where(seen[row, key] == _GHOST, last, torch.where(visible, score, -torch.inf))

    out = flex_attention(q, k, v, score_mod=logit)
    assert isinstance(out, Tensor)
    return out
