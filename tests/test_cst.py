"""CST: the properties its paper claims, and how the three modes differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from models.baselines.interpolation import series
from models.contract import FieldBatch, Frames
from models.cst.config import CstConfig
from models.cst.layers import Layer
from models.cst.model import Cst, Tokens
from tests import worlds
from tests.tiny_cst import ONE_PLACE, answer, built, curves, gradient

# Tokens that do not see each other ----------------------------------------------------------------------------------------------------


def outputs(model: Cst, at: Tensor, batch: FieldBatch) -> Tensor:
    """What the network gives at coordinates at [B,S,A], their interpolated values included in the graph."""
    known = series(batch.context, 1.0, None)
    tokens = Tokens(model._interpolated(known, at, batch.context), at, torch.ones(at.shape[:2], dtype=torch.bool))
    return tokens.value + model._at(model._real(batch.context, batch.query), [tokens])[0]


def test_reverse_mode_is_the_derivative_of_each_token() -> None:
    batch = curves(b=1)
    at = torch.rand(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for mode, exact in (("improved", True), ("paper", False)):
        model = built(mode)
        leaf = at.clone().requires_grad_()
        reverse = torch.autograd.grad(outputs(model, leaf, batch)[..., 0].sum(), leaf)[0]
        jacobian = torch.autograd.functional.jacobian(lambda x, m=model: outputs(m, x, batch)[0, :, 0], at)[:, 0]
        own = torch.stack([jacobian[i, i] for i in range(5)])
        assert torch.allclose(reverse[0], own, atol=1e-10) == exact


def test_forward_mode_agrees_token_by_token() -> None:
    batch, model = curves(b=1), built()
    at = torch.rand(1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tangent = torch.tensor([1.0, 0, 0], dtype=torch.float64).expand(at.shape)
    _, forward = torch.func.jvp(lambda x: outputs(model, x, batch), (at,), (tangent,))
    leaf = at.clone().requires_grad_()
    for channel in range(2):
        reverse = torch.autograd.grad(outputs(model, leaf, batch)[..., channel].sum(), leaf)[0]
        torch.testing.assert_close(reverse[..., 0], forward[..., channel])


def test_dummies_leave_other_outputs_unchanged() -> None:
    batch, at = curves(b=1), torch.rand(1, 9, 3, dtype=torch.float64)
    model = built()
    torch.testing.assert_close(outputs(model, at, batch)[:, :4], outputs(model, at[:, :4], batch), atol=1e-9, rtol=0)


def test_permuting_tokens_permutes_outputs() -> None:
    batch, at = curves(b=1), torch.rand(1, 9, 3, dtype=torch.float64)
    order = torch.randperm(9)
    for mode in ("improved", "paper"):
        model = built(mode)
        torch.testing.assert_close(outputs(model, at[:, order], batch), outputs(model, at, batch)[:, order], atol=1e-9, rtol=0)


def test_chunks_are_exact_but_in_paper_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = curves()
    for mode in ("improved", "paper"):
        model = built(mode)
        whole = answer(model, batch)
        parts = torch.cat(
            [model.predict(batch.context, replace(batch.query, **_frames(batch.query, slice(i, i + 3)))).mean for i in (0, 3, 6, 9)], 1
        )
        assert torch.allclose(parts, whole, atol=1e-9) == (mode == "improved")
    wide = worlds.batch(worlds.torus_info(), q=40, dtype=torch.float64)
    model = built(info=worlds.torus_info(), horizon=2)
    whole = answer(model, wide)
    monkeypatch.setattr("models.cst.model._NUMBERS", 1)  # one point at a time
    torch.testing.assert_close(answer(model, wide), whole, atol=1e-9, rtol=0)


@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("loud", [1.0, 60.0])
def test_what_serves_reads_as_what_trains(norm: str, loud: float) -> None:
    """`loud` makes logits of some thousand, of either sign; of the rows one sees all, one a part, one nothing but the token itself."""
    torch.manual_seed(0)
    layer = Layer(CstConfig(horizon=1, width=32, heads=4, norm=norm)).double().eval()
    for part in (layer.query, layer.key):
        part.weight.data *= loud
    x, memory = torch.randn(3, 7, 32).double(), tuple(torch.randn(2, 3, 4, 11, 8).double())
    mask = torch.rand(3, 1, 11) > 0.5
    mask[0], mask[2] = True, False
    torch.testing.assert_close(layer.read(x, memory, mask), layer(x, memory, mask)[0], rtol=1e-9, atol=1e-9)


def _frames(frames: Frames, which: slice) -> dict[str, Tensor]:
    return {name: getattr(frames, name)[:, which] for name in ("position", "mask", "time", "value")}


def test_masked_tokens_count_for_nothing_in_any_mode() -> None:
    batch = curves()
    hidden = batch.context.value.masked_fill(~batch.context.mask.unsqueeze(-1), float("nan"))  # type: ignore[union-attr]
    poisoned = FieldBatch(replace(batch.context, value=hidden), batch.query)
    for mode in ("improved", "paper", "legacy"):
        model = built(mode)
        torch.testing.assert_close(answer(model, poisoned), answer(model, batch), atol=1e-9, rtol=0)
        assert model.loss(poisoned)["loss"] == model.loss(batch)["loss"]


# Interpolation and the anchored output ------------------------------------------------------------------------------------------------


def test_untrained_it_is_linear_interpolation() -> None:
    batch = curves(b=3)
    found = answer(built(head=0), batch)
    for b in range(3):
        shown = batch.context.mask[b, :, 0]
        knots, values = batch.context.time[b, shown], batch.context.value[b, shown, 0]  # type: ignore[index]
        for s, time in enumerate(batch.query.time[b]):
            right = int((knots < time).sum().clamp(1, len(knots) - 1))
            share = (time - knots[right - 1]) / (knots[right] - knots[right - 1])
            torch.testing.assert_close(found[b, s, 0], values[right - 1] + share * (values[right] - values[right - 1]), atol=1e-6, rtol=0)


def test_outside_the_data_the_nearest_value_is_held_and_flagged() -> None:
    batch = curves()
    batch.context.mask[:, :4] = batch.context.mask[:, -3:] = False
    model = built(head=0, horizon=5)
    time = batch.context.time[:, [0, 12, -1]] + torch.tensor([0.0, 0, 5])
    query = Frames(batch.query.position[:, :3], batch.query.mask[:, :3], time)
    found = model.predict(batch.context, query).mean[:, :, 0]
    assert model.held(batch.context, query)[..., 0].tolist() == [[True, False, True]] * 2
    for b in range(2):
        shown = batch.context.value[b, batch.context.mask[b, :, 0], 0]  # type: ignore[index]
        torch.testing.assert_close(found[b, 0], shown[0])
        torch.testing.assert_close(found[b, 2], shown[-1])


def test_nearest_places_are_averaged_and_meet_their_own_values() -> None:
    info = worlds.stations(hours=60).info
    batch = worlds.batch(info, t=4, n=9, dtype=torch.float64)
    known = series(batch.context, info.step, None)
    place = batch.context.position[:, 0]
    value, _, _ = known.at(torch.full(place.shape[:2], 3.0).double(), place)
    now = batch.context.mask[:, 3]
    torch.testing.assert_close(value[now], batch.context.value[:, 3][now], atol=1e-9, rtol=0)  # type: ignore[index]
    g = torch.Generator().manual_seed(1)
    line = torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None] * (torch.rand(1, 2, generator=g) * 2 - 1) * 1.4
    jumps = known.at(torch.full((3, 4001), 2.3).double(), line.expand(3, 4001, 2))[0].diff(dim=1).abs().amax()
    assert jumps < 0.02  # continuous where another place becomes one of the nearest


@pytest.mark.parametrize("repeated", [False, True])
def test_irregular_and_repeated_times_have_finite_derivatives(repeated: bool) -> None:
    batch = curves()
    time = batch.context.time.clone()
    if repeated:
        time[:, 1:] = time[:, 1:] - (time[:, 1:] - time[:, :1]) * 0.5
        time = time.round()
        batch.context.mask[:, 1:4] = True
    context = replace(batch.context, time=time)
    known = series(context, 1.0, None)
    at = known.time.clone().requires_grad_()
    value, _, _ = known.at(at, torch.zeros(*at.shape, 2).double())
    slope = torch.autograd.grad(value.sum(), at, create_graph=True)[0]
    assert value.isfinite().all()
    assert slope.isfinite().all()
    grads = gradient(built(), FieldBatch(context, replace(batch.query, time=time[:, :12] + 0.1)))
    assert grads.isfinite().all()


def test_halving_the_spacing_of_questions_halves_the_largest_jump() -> None:
    batch, model = curves(b=1), built(highest=2.0)

    def largest(points: int) -> float:
        time = batch.context.time[:, :1] + 29 * torch.linspace(0, 1, points).double()[None]
        query = Frames(torch.zeros(1, points, 1, 2).double(), torch.ones(1, points, 1, dtype=torch.bool), time)
        return float(model.predict(batch.context, query).mean[0, :, 0].diff(dim=0).norm(dim=-1).max())

    coarse, middle, fine = (largest(points) for points in (401, 801, 1601))
    assert 1.6 < coarse / middle < 2.4
    assert 1.6 < middle / fine < 2.4


# Training -----------------------------------------------------------------------------------------------------------------------------


def test_jitter_is_for_training_only() -> None:
    batch = curves()
    for mode in ("improved", "paper"):
        model = built(mode)
        assert torch.equal(answer(model, batch), answer(model, batch))
        assert model.loss(batch)["fit"] == model.loss(batch)["fit"]
        model.train()
        assert model.loss(batch)["fit"] != model.loss(batch)["fit"]
        still = built(mode, jitter=0.0).train()
        first, second = still.loss(batch), still.loss(batch)
        # Dummies are drawn anew; where tokens see them, all answers move with them.
        assert first["derivative_1"] != second["derivative_1"]
        assert (first["fit"] == second["fit"]) == (mode == "improved")


@pytest.mark.parametrize("mode", ["improved", "paper", "legacy"])
def test_every_parameter_gets_a_gradient_after_two_steps(mode: str) -> None:
    """The anchored head starts at zero, so that its inputs wait for the second step."""
    model = built(mode, head=0, dummies=7).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model.loss(curves())["loss"].backward()
        optimizer.step()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_parameters_of_the_released_setting() -> None:
    model = Cst(CstConfig(mode="paper"), ONE_PLACE)
    assert sum(p.numel() for p in model.parameters()) == 817_696
    assert sum(p.numel() for p in Cst(CstConfig(mode="legacy"), ONE_PLACE).parameters()) == 817_696


def test_modes_fill_in_what_is_not_given() -> None:
    legacy, improved = CstConfig(mode="legacy"), CstConfig()
    assert (legacy.width, legacy.layers, legacy.heads, legacy.ffn, legacy.attention_dropout) == (32, 4, 4, 3072, 0.8)
    assert (legacy.dummies, legacy.order, legacy.power, legacy.mu, legacy.jitter) == (500, 3, 3.0, 0.01, 0.1)
    assert (improved.width, improved.ffn, improved.order, improved.power, improved.mu) == (64, 256, 2, 2.0, 0.01)
    assert CstConfig(width=48).ffn == 192
    assert CstConfig(mode="paper", sees="real").sees == "real"
    with pytest.raises(ValueError, match="derivative is values, which needs targets real, found query"):
        CstConfig(derivative="values")
    with pytest.raises(ValueError, match="width 30 is not a multiple of heads 4"):
        CstConfig(width=30)


def test_legacy_squeezes_the_time() -> None:
    """At t in [0, 1] the released code divides by the number of real tokens less one."""
    batch = curves(seen=6)
    plain, squeezed = (built("paper", squeezed_time=on)._real(batch.context, batch.query).at for on in (False, True))
    torch.testing.assert_close(squeezed[..., 0], plain[..., 0] / 5)
    assert float(plain[..., 0].max()) == 1.0
    model, seen = built("legacy", dummies=7), []
    model.place.register_forward_pre_hook(lambda module, given: seen.append(float(given[0][..., 0].max())))
    model.loss(batch)
    assert max(seen) == pytest.approx(1 / 5)  # of real tokens and of dummies alike


# Attention and errors -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("mode", "keys"), [("improved", 30 + 1), ("paper", 30 + 12)])
def test_attention_maps_at_any_coordinate(mode: str, keys: int) -> None:
    batch = curves()
    maps = built(mode).attention(batch.context, batch.query)
    assert len(maps) == 2
    for each in maps:
        assert each.shape == (2, 12, 1, keys)
        torch.testing.assert_close(each.sum(-1), torch.ones(2, 12, 1).double())
        hidden = ~batch.context.mask.flatten(1)[:, None, None].expand(-1, 12, 1, -1)
        assert (each[..., :30][hidden] == 0).all()


def test_what_is_refused_says_why() -> None:
    batch = curves()
    late = replace(batch.query, time=batch.query.time + 40)
    with pytest.raises(ValueError, match=r"the window reaches from -29 to 3: take more context_frames, or set the model's horizon"):
        built(horizon=3).predict(batch.context, late)
    with pytest.raises(ValueError, match="nothing to train on"):
        built().loss(FieldBatch(batch.context, replace(batch.query, value=None)))
    background = replace(batch.query, background=batch.query.value, background_scale=torch.ones(2, 12, 1, 2).double())
    with pytest.raises(ValueError, match="set background to null"):
        built("paper").predict(batch.context, background)
