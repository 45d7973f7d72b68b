"""The biased attention: forms of bias, distances, masks, and that all back ends are one op."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from models.bsa_tnp import biased_attention as op
from models.bsa_tnp.biased_attention import START, DistanceBias, Form, Group, Metric, biased_attention, released_ghost, separation

ROWS, HEADS, FRAMES, QUERIES, KEYS, WIDTH = 2, 3, 2, 19, 29, 8


def group(
    form: Form = "rbf",
    metric: Metric = "euclidean",
    period: float | None = None,
    shared: bool = False,
    queries: int = QUERIES,
    keys: int = KEYS,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    frames: int = FRAMES,
) -> Group:
    """`frames` or `queries` of 1: all frames are at the same places, all points of a frame at the same time."""
    g = torch.Generator().manual_seed(seed)
    rows, axes = 1 if shared else ROWS, 1 if metric == "elapsed" else 2
    span = 40.0 if metric == "great_circle" else 1.0
    weights = tuple((torch.rand(HEADS, 1 if form == "scalar" else 3, generator=g, dtype=dtype) + 0.2).requires_grad_() for _ in START[form])
    query, key = (span * (2 * torch.rand(rows, *n, axes, generator=g, dtype=dtype) - 1) for n in ((frames, queries), (keys,)))
    return Group(query, key, weights, form, metric, period)


def vectors(queries: int = QUERIES, keys: int = KEYS, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    shapes = ((FRAMES, queries), (keys,), (keys,))
    q, k, v = (torch.randn(ROWS, HEADS, *n, WIDTH, generator=g, dtype=dtype).requires_grad_() for n in shapes)
    return q, k, v


def a_mask(keys: int = KEYS) -> Tensor:
    """A third hidden, and a row that sees nothing."""
    mask = torch.rand(ROWS, keys, generator=torch.Generator().manual_seed(2)) > 0.3
    mask[-1] = False
    return mask


SETS: dict[str, Callable[[], list[Group]]] = {
    "none": list,
    "rbf": lambda: [group("rbf")],
    "tisa": lambda: [group("tisa")],
    "scalar": lambda: [group("scalar")],
    "exponential on a sphere": lambda: [group("exponential", "great_circle")],
    "rbf on a sphere": lambda: [group("rbf", "great_circle")],
    "torus": lambda: [group("tisa", period=1.5)],
    "shared points": lambda: [group("tisa", shared=True), group("rbf", shared=True)],
    "space and time": lambda: [group("rbf"), group("rbf", "elapsed", seed=3)],
    "places and times": lambda: [group("tisa", frames=1), group("rbf", "elapsed", seed=3, queries=1)],
    "shared places and times": lambda: [group("rbf", shared=True, frames=1), group("exponential", shared=True, seed=3, queries=1)],
}


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("ghost", [None, -0.5])
@pytest.mark.parametrize("tile", [5, 16, 64])
def test_tiles_equal_the_whole_in_value_and_gradients(name: str, ghost: float | None, tile: int) -> None:
    groups, (q, k, v), mask = SETS[name](), vectors(), a_mask()
    inputs = [q, k, v, *[w for g in groups for w in g.weights]]
    weight = torch.linspace(-1, 2, WIDTH, dtype=torch.float64)
    dense, tiled = (biased_attention(q, k, v, mask, groups, ghost=ghost, backend=b, tile=tile) for b in ("dense", "tiled"))
    torch.testing.assert_close(tiled, dense, atol=1e-10, rtol=0)
    with torch.no_grad():
        torch.testing.assert_close(biased_attention(q, k, v, mask, groups, ghost=ghost, tile=tile), dense, atol=1e-10, rtol=0)
    expected = torch.autograd.grad((dense * weight).square().sum(), inputs)
    found = torch.autograd.grad((tiled * weight).square().sum(), inputs)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-8, rtol=1e-8)
    assert all(x.any() for x in expected[3:])


@pytest.mark.parametrize("name", ["rbf", "tisa", "scalar", "exponential on a sphere", "shared points", "places and times"])
def test_gradients_equal_finite_differences(name: str) -> None:
    small = {"queries": 5, "keys": 4}
    groups = []
    for g in SETS[name]():
        rows, frames, queries, _ = g.query.shape
        groups.append(group(g.form, g.metric, g.period, rows == 1, frames=frames, queries=min(queries, 5), keys=4))
    mask = torch.tensor([[True, True, False, True], [True, True, True, True]])

    def answer(q: Tensor, k: Tensor, v: Tensor, *weights: Tensor) -> Tensor:
        given = iter(weights)
        again = [Group(g.query, g.key, tuple(next(given) for _ in g.weights), g.form, g.metric, g.period) for g in groups]
        return biased_attention(q, k, v, mask, again, tile=3)

    assert torch.autograd.gradcheck(answer, (*vectors(**small), *[w for g in groups for w in g.weights]), fast_mode=True)


def test_it_is_softmax_attention_with_the_formula_of_the_bias() -> None:
    q, k, v = vectors()
    bias = group("rbf")
    a, b = bias.weights
    square = (bias.query.unsqueeze(3) - bias.key[:, None, None]).square().sum(-1)
    logits = torch.einsum("rhsne,rhme->rhsnm", q, k) / math.sqrt(WIDTH)
    logits = logits + torch.einsum("hf,rhfsnm->rhsnm", a, (-b[:, :, None, None, None] * square[:, None, None]).exp())
    torch.testing.assert_close(biased_attention(q, k, v, None, [bias]), logits.softmax(-1) @ v.unsqueeze(2))


def test_what_frames_or_points_share_may_be_stated_once() -> None:
    q, k, v = vectors()
    once = SETS["shared places and times"]()
    each = [replace(g, query=g.query.expand(ROWS, FRAMES, QUERIES, -1), key=g.key.expand(ROWS, -1, -1)) for g in once]
    weights = [w for g in once for w in g.weights]
    found = []
    for groups in (once, each):
        out = biased_attention(q, k, v, a_mask(), groups, tile=8)
        found.append((out, *torch.autograd.grad(out.square().sum(), [q, k, v, *weights])))
        with torch.no_grad():
            torch.testing.assert_close(biased_attention(q, k, v, a_mask(), groups), out, atol=1e-12, rtol=0)
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_exponentials_of_far_points_are_not_denormal() -> None:
    """Numbers below 1e-38 are ten times as slow, and nothing to a sum."""
    far = group("rbf", dtype=torch.float32)
    (part, *_) = op.bases(far, torch.full((1, 1, 1, 1, 1), 1e6))
    assert (part >= torch.finfo(torch.float32).tiny).all()
    assert (part * torch.finfo(torch.float32).eps ** 2 >= torch.finfo(torch.float32).tiny).all()  # nor what a small gradient makes of them
    assert (part < torch.finfo(torch.float32).eps ** 2).all()


def test_distances() -> None:
    def apart(metric: Metric, query: list[float], key: list[float], form: Form = "exponential", period: float | None = None) -> float:
        tensors = [[torch.tensor(x, dtype=torch.float64) for x in side] for side in (query, key)]
        none = torch.zeros(1, 1, 1, 1)
        return float(separation(Group(none, none, (), form, metric, period), *tensors))

    assert apart("euclidean", [0, 0], [3, 4]) == 5
    assert apart("euclidean", [0, 0], [3, 4], "rbf") == 25
    assert apart("euclidean", [-0.9, 0.2], [0.9, 0.2], period=2.0) == pytest.approx(0.2)
    assert apart("great_circle", [10, 0], [100, 0]) == pytest.approx(90)
    assert apart("great_circle", [0, 50], [180, 50]) == pytest.approx(80)  # across the pole
    assert apart("great_circle", [179, 0], [-179, 0]) == pytest.approx(2)
    assert apart("great_circle", [0, 0], [0, 1e-7]) == pytest.approx(1e-7)
    assert apart("elapsed", [5], [3]) == 2
    assert apart("elapsed", [3], [5]) == math.inf


@pytest.mark.parametrize("backend", ["dense", "tiled"])
def test_who_sees_nothing_reads_zero_and_has_finite_gradients(backend: Any) -> None:
    q, k, v = vectors()
    groups = [group("tisa"), group("rbf", "elapsed", seed=3)]
    out = biased_attention(q, k, v, a_mask(), groups, backend=backend, tile=16)
    assert not out[-1].any()
    out.sum().backward()
    tensors = [q, k, v, *[w for g in groups for w in g.weights]]
    assert all(x.grad is not None and x.grad.isfinite().all() for x in tensors)
    assert not q.grad[-1].any()  # type: ignore[index]
    assert not k.grad[~a_mask()[:, None].expand(-1, HEADS, -1)].any()  # type: ignore[index]


@pytest.mark.parametrize("backend", ["dense", "tiled"])
@pytest.mark.parametrize("place", [math.inf, math.nan])
def test_a_key_infinitely_far_away_is_as_if_masked(backend: Any, place: float) -> None:
    q, k, v = vectors()
    far, near = group("tisa"), group("tisa")
    mask = torch.ones(ROWS, KEYS, dtype=torch.bool)
    mask[:, 7:12] = False
    far.key[:, 7:12] = place
    outs = [biased_attention(q, k, v, *x, backend=backend, tile=8) for x in ((None, [far]), (mask, [near]))]
    torch.testing.assert_close(*outs)
    outs[0].sum().backward()
    assert all(w.grad is not None and w.grad.isfinite().all() for w in far.weights)


def test_keys_later_than_the_query_are_not_seen() -> None:
    q, k, v = vectors()
    time = group("rbf", "elapsed")
    expected = biased_attention(q, k, v, None, [time], tile=8)
    middle = time.query.flatten(1).max(1).values[:, None, None] / 2
    later = time.key > middle
    assert later.any()
    with torch.no_grad():
        changed = torch.where(later.unsqueeze(1), 100.0, v)
    out = biased_attention(q, k, changed, None, [time], tile=8)
    early = (time.query < middle[..., None]).squeeze(-1)
    assert torch.equal(out.movedim(1, 3)[early], expected.movedim(1, 3)[early])
    assert not torch.equal(out, expected)


def test_the_ghost_is_what_the_published_scan_computes() -> None:
    """Its running maximum starts at -1e-6, and each tile of 1024 keys adds 1e-10 to the sum."""
    g = torch.Generator().manual_seed(0)
    for shift in (0.0, -25.0, -40.0):
        keys = 2500
        q, k, v = (torch.randn(1, 1, *n, 4, generator=g, dtype=torch.float64) for n in ((1, 6), (keys,), (keys,)))
        zero = torch.zeros(1, 1, 1, dtype=torch.float64)
        at = Group(zero.expand(1, 1, 1, 1), zero.expand(1, keys, 1) + 1, (zero[0] + shift,), "scalar")  # every logit shifted alike
        top, total, read = -1e-6, 0.0, torch.zeros(4, dtype=torch.float64)
        logits = (q[0, 0, 0, 0] @ k[0, 0].T) / 2 + shift
        for start in range(0, keys, 1024):
            part = logits[start : start + 1024]
            higher = max(top, float(part.max()))
            share, fade = (part - higher).exp(), math.exp(top - higher)
            total, read = total * fade + float(share.sum()) + 1e-10, read * fade + share @ v[0, 0, start : start + 1024]
            top = higher
        out = biased_attention(q, k, v, None, [at], ghost=released_ghost(keys), tile=100)
        torch.testing.assert_close(out[0, 0, 0, 0], read / total, rtol=1e-7, atol=0)
        plain = biased_attention(q, k, v, None, [at], tile=100)
        assert torch.allclose(out, plain, rtol=1e-3) == (shift == 0)


def test_memory_grows_with_the_points_and_not_with_their_product() -> None:
    def saved(queries: int, keys: int) -> int:
        """Bytes kept for the backward pass, inputs included."""
        kept: dict[int, int] = {}

        def pack(x: Tensor) -> Tensor:
            kept[x.data_ptr()] = x.numel() * x.element_size()
            return x

        groups = [group("rbf", queries=queries, keys=keys), group("tisa", queries=queries, keys=keys)]
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            biased_attention(*vectors(queries, keys), None, groups, tile=16)
        return sum(kept.values())

    base, both = saved(40, 30), saved(400, 300)
    assert both < 10 * base
    # q and output of a query, k and v of a key, the logarithm of the sum; all in double precision.
    assert saved(41, 30) - base == 8 * ROWS * HEADS * FRAMES * (2 * WIDTH + 1)
    assert saved(40, 31) - base == 8 * ROWS * HEADS * 2 * WIDTH


def largest(act: Callable[[], Any]) -> int:
    """The most elements a tensor made inside `act` has."""
    sizes = [0]

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = function(*args, **(kwargs or {}))
            made = [x for x in (out if isinstance(out, tuple | list) else [out]) if isinstance(x, Tensor)]
            sizes.extend(x.untyped_storage().nbytes() // x.element_size() for x in made)
            return out

    with Watch():
        act()
    return max(sizes)


def test_no_tensor_is_larger_than_a_tile_or_an_input() -> None:
    queries, keys, tile = 300, 200, 16
    groups = [group("rbf", queries=queries, keys=keys), group("tisa", queries=queries, keys=keys)]
    q, k, v = vectors(queries, keys)

    def step(backend: Any) -> None:
        biased_attention(q, k, v, a_mask(keys), groups, backend=backend, tile=tile).sum().backward()

    assert largest(lambda: step("dense")) >= ROWS * HEADS * FRAMES * queries * keys
    assert largest(lambda: step("tiled")) == ROWS * HEADS * FRAMES * queries * WIDTH  # the queries; a tile is a fraction of that


@pytest.mark.parametrize("form", START)
def test_bases_start_equal_or_at_scales_of_their_own(form: Form) -> None:
    count = 1 if form == "scalar" else 4
    places = torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2)
    for weight, start in zip(DistanceBias(2, count, form)(*places).weights, START[form], strict=True):
        assert weight.shape == (2, count)
        assert (weight == start).all()
    spread = DistanceBias(2, count, form, reach=(2.0, 0.1))
    assert all(weight.ndim == 1 for weight in spread.weights)  # weight decay pulls matrices
    if form == "scalar":
        torch.testing.assert_close(spread(*places).weights[0], torch.tensor([[-0.5], [-10.0]]))
        return
    a, b = spread(*places).weights[:2]
    assert (a == START[form][0]).all()
    reach = 1 / b if form == "exponential" else b.rsqrt()
    torch.testing.assert_close(reach[:, [0, -1]], torch.tensor([[2.0, 0.1]]).repeat(2, 1))
    torch.testing.assert_close(reach[:, 1:].log().diff(dim=1), reach[:, :-1].log().diff(dim=1))


def test_equal_bases_are_computed_once_without_gradients() -> None:
    bias = DistanceBias(HEADS, 5).double()
    places = group("rbf")
    with torch.no_grad():
        bias.weights[0].copy_(torch.linspace(-1, 2, 5).repeat(HEADS))
        one = bias(places.query, places.key)
        assert one.weights[0].shape == (HEADS, 1)
        out = biased_attention(*vectors(), None, [one])
    torch.testing.assert_close(out, biased_attention(*vectors(), None, [bias(places.query, places.key)]))


def test_a_scalar_bias_has_one_basis() -> None:
    with pytest.raises(ValueError, match="one basis, found 3"):
        DistanceBias(2, 3, "scalar")


def test_half_precision_keeps_its_type_and_is_near() -> None:
    groups = [group("rbf", dtype=torch.float32)]
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in vectors())
    out = biased_attention(q, k, v, a_mask(), groups, tile=16)
    assert out.dtype == torch.bfloat16
    exact = biased_attention(q.double(), k.double(), v.double(), a_mask(), groups)
    torch.testing.assert_close(out.double(), exact, atol=0.03, rtol=0)
    out.sum().backward()
    assert q.grad is not None
    assert q.grad.dtype == torch.bfloat16
    assert groups[0].weights[1].grad is not None


@pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler to build the kernel with")
def test_the_compiled_kernel_is_the_same_op() -> None:
    """Compiled once for all lengths; points on a torus, keys hidden by the mask or by their place, a row that sees nothing."""
    op._flex_failure.cache_clear()
    for queries, keys, ghost in ((70, 300, None), (1100, 213, -0.5)):
        groups = [group("rbf", period=1.5, queries=queries, keys=keys, dtype=torch.float32)]
        groups[0].key[:, :9] = math.inf
        q, k, v = vectors(queries, keys, torch.float32)
        with torch.no_grad():
            assert op.flex_obstacle(q, k, v, groups) is None
            flex, tiled = (biased_attention(q, k, v, a_mask(keys), groups, ghost=ghost, backend=b) for b in ("flex", "tiled"))
        torch.testing.assert_close(flex, tiled, atol=1e-5, rtol=0)
        assert not flex[-1].any()
    assert op._flex_failure.cache_info().misses == 1


def test_where_the_compiled_kernel_cannot_serve_tiles_do(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    groups, (q, k, v) = [group("rbf")], vectors()
    assert op.flex_obstacle(q, k, v, groups) == "gradients are needed"
    biased_attention(q, k, v, None, groups, backend="flex").sum().backward()
    assert groups[0].weights[0].grad is not None
    with torch.no_grad():
        assert op.flex_obstacle(q, k, v, groups) == "double precision"

        def broken() -> Any:
            raise RuntimeError("no compiler\nlong story")

        monkeypatch.setattr(op, "_compiled", broken)
        op._flex_failure.cache_clear()
        single = [x.float() for x in (q, k, v)]
        out = biased_attention(*single, None, groups, backend="flex")
        op._flex_failure.cache_clear()
    torch.testing.assert_close(out.double(), biased_attention(q, k, v, None, groups).detach(), atol=1e-5, rtol=0)
    assert "tiled one answers: no compiler" in caplog.text
