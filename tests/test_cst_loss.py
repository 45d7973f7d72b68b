"""CST's Sobolev loss: derivatives against closed forms, finite differences and forward mode."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.cst import sobolev
from tests import worlds
from tests.tiny_cst import ONE_PLACE, built, curves, gradient


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_penalties_are_norms_of_derivatives_with_respect_to_coordinates(p: float) -> None:
    t = torch.rand(3, 20, 1, dtype=torch.float64, requires_grad=True)
    first, second = sobolev.penalties(torch.sin(5 * t), t, 2, p)
    for found, expected in ((first, 5 * torch.cos(5 * t)), (second, 25 * torch.sin(5 * t))):
        norms = torch.stack([torch.linalg.vector_norm(row, p) for row in expected])
        torch.testing.assert_close(found, norms.mean(), atol=1e-5, rtol=0)


def test_mixed_derivatives_of_several_channels_and_coordinates() -> None:
    """x y and x^2 have the Hessians [[0, 1], [1, 0]] and [[2, 0], [0, 0]]: squares 1 + 1 + 4 a token."""
    at = torch.rand(2, 5, 2, dtype=torch.float64, requires_grad=True)
    x, y = at.unbind(-1)
    terms = sobolev.penalties(torch.stack([x * y, x**2], -1), at, 3, 2.0)
    assert terms[1].item() == pytest.approx((5 * 6) ** 0.5)
    assert terms[2].item() < 1e-9


@pytest.mark.parametrize("mode", ["improved", "paper"])
def test_every_order_trains(mode: str) -> None:
    grads = [gradient(built(mode, order=order), curves()) for order in (0, 1, 2, 3)]
    for lower, higher in pairwise(grads):
        assert (higher - lower).norm() > 1e-6


def test_legacy_orders_beyond_the_first_train_nothing() -> None:
    """As the released code: k = 3 trains as k = 1, its second term has a value and its third is zero."""
    grads = [gradient(built("legacy", order=order, dummies=7), curves()) for order in (0, 1, 2, 3)]
    assert (grads[1] - grads[0]).norm() > 1e-6
    assert torch.equal(grads[1], grads[2])
    assert torch.equal(grads[1], grads[3])
    terms = built("legacy", order=3, dummies=7).loss(curves())
    assert terms["derivative_2"] > 1e-6
    assert terms["derivative_3"] < 1e-7


def test_the_released_terms_sum_over_all_tokens_and_channels() -> None:
    """Three tokens of two channels, each the squared sum of all values: of the sum of all six every derivative is 12 times that sum (15)
    and every second one 72; neither it nor the third, which has no graph left, trains anything. Norms over the last two tokens."""
    value = torch.arange(6.0).double().view(1, 3, 2).requires_grad_()
    output = value.sum().square().expand(1, 3, 2)
    first, second, third = sobolev.released(output, value, 3, 2.0, first=1)
    for term, each in ((first, 180.0), (second, 72.0), (third, 0.0)):
        assert float(term.detach()) == pytest.approx(each * 4**0.5, abs=1e-9)


def test_legacy_penalises_values_and_paper_coordinates() -> None:
    """Alike but for what they differentiate with respect to, the two have different penalties."""
    same = {"order": 1, "power": 2.0, "squeezed_time": False, "dummies": 7}
    legacy, paper = (built(mode, **same).loss(curves()) for mode in ("legacy", "paper"))
    assert legacy["fit"] == paper["fit"]
    assert (legacy["derivative_1"] - paper["derivative_1"]).abs() > 1e-3


@pytest.mark.parametrize("mode", ["improved", "paper"])
@pytest.mark.parametrize("world", ["curves", "torus", "stations"])
def test_the_whole_loss_against_finite_differences(mode: str, world: str) -> None:
    info = {"curves": ONE_PLACE, "torus": worlds.torus_info(), "stations": worlds.stations(hours=60).info}[world]
    batch = curves() if world == "curves" else worlds.batch(info, b=2, t=2, n=6, s=2, q=4, dtype=torch.float64)
    model = built(mode, info, horizon=2, mu=0.1)
    grads = gradient(model, batch)
    g = torch.Generator().manual_seed(3)
    direction = [torch.randn(p.shape, generator=g, dtype=torch.float64) for p in model.parameters()]
    slope = (grads * torch.cat([d.flatten() for d in direction])).sum()

    def moved(by: float) -> float:
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p += by * d
        value = model.loss(batch)["loss"].item()
        with torch.no_grad():
            for p, d in zip(model.parameters(), direction, strict=True):
                p -= by * d
        return value

    assert float(slope) == pytest.approx((moved(1e-6) - moved(-1e-6)) / 2e-6, rel=1e-5)


def test_the_loss_uses_no_fused_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused kernels have no second derivative."""

    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("fused attention")

    monkeypatch.setattr(F, "scaled_dot_product_attention", refuse)
    for mode in ("improved", "paper", "legacy"):
        built(mode, order=2).loss(curves())["loss"].backward()


def test_without_gradients_the_loss_is_the_fit() -> None:
    model = built()
    with torch.inference_mode():
        terms = model.loss(curves())
    assert terms["loss"] == terms["fit"]
    assert terms["fit"] == model.loss(curves())["fit"]
