"""SCENT's own promises: groups, frozen projection, time targeting, calibration, unrolling, heads, modes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import scoringrules
import torch
from pydantic import ValidationError

from models.contract import DatasetInfo, FieldBatch, Frames
from models.layers import Fourier
from models.scent.attention import Block, in_groups
from models.scent.config import SIZES
from models.scent.decoder import halton
from models.scent.model import Scent
from models.scent.neighbours import Neighbours
from tests import worlds
from tests.test_model_contract import flat, with_background

TINY: dict[str, Any] = {
    "horizon": 4,
    "width": 16,
    "latents": 8,
    "heads": 2,
    "cen_layers": 2,
    "processor_layers": 2,
    "cn_layers": 2,
    "ffn_factor": 1,
    "group": 8,
    "bands": 4,
    "projection_width": 4,
}
SWITCHES: dict[str, dict[str, Any]] = {
    "improved": {},
    "paper": {"mode": "paper"},
    "no CEN": {"mode": "paper", "cen_layers": 0},
    "no CN": {"mode": "paper", "cn_layers": 0},
    "raw values": {"mode": "paper", "projection": "none"},
    "trainable projection": {"projection": "trainable"},
    "no time targeting": {"mode": "paper", "time_targeting": False},
    "dense": {"group": 64},
    "no query residual": {"query_residual": False},
    "no absolute position": {"absolute_position": False, "cn_layers": 0},
    "neighbours": {"neighbours": 3},
    "octaves": {"spacing": "octaves"},
    "gaussian": {"head": "gaussian"},
    "quantile": {"head": "quantile"},
    "crps": {"head": "gaussian", "loss": "crps"},
    "plain mse": {"loss": "mse"},
    "remaining": {"loss": "remaining"},
}


def built(info: DatasetInfo | None = None, zero_head: bool = False, seed: int = 0, **changes: Any) -> Scent:
    torch.manual_seed(seed)
    model = Scent(Scent.Config(**{**TINY, **changes}), info or worlds.torus_info()).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not zero_head and not parameter.any():
                parameter.normal_(std=0.3)
    return model


def a_batch(info: DatasetInfo | None = None, **sizes: int) -> FieldBatch:
    return worlds.batch(info or worlds.torus_info(), dtype=torch.float64, **sizes)


def ahead(batch: FieldBatch, *leads: float) -> Frames:
    """The query of one frame, asked at other leads (in frames of step 1)."""
    q = batch.query

    def again(x: torch.Tensor | None) -> torch.Tensor | None:
        return None if x is None else x[:, :1].expand(-1, len(leads), *x.shape[2:])

    time = batch.context.time[:, -1:] + torch.tensor(leads, dtype=torch.float64)
    return Frames(again(q.position), again(q.mask), time, again(q.value), again(q.covariate))  # type: ignore[arg-type]


# ---- 1: groups


def test_one_group_is_dense_attention() -> None:
    torch.manual_seed(0)
    layer, x = Block(16, 2, 1).double(), torch.randn(2, 12, 16, dtype=torch.float64)
    mask = torch.ones(2, 12, dtype=torch.bool)
    order = torch.stack([torch.randperm(12), torch.randperm(12)])
    torch.testing.assert_close(in_groups(layer, x, mask, order, 12), layer(x), atol=1e-10, rtol=0)
    torch.testing.assert_close(in_groups(layer, x, mask, None, 12), layer(x), atol=1e-10, rtol=0)


def test_a_token_depends_on_its_group_alone() -> None:
    torch.manual_seed(0)
    layer, x = Block(16, 2, 1).double(), torch.randn(1, 20, 16, dtype=torch.float64)
    mask, order = torch.ones(1, 20, dtype=torch.bool), torch.randperm(20)[None]
    jacobian = torch.autograd.functional.jacobian(lambda x: in_groups(layer, x, mask, order, 6).sum(-1), x)[0, :, 0]  # [out, in, d]
    seen = jacobian.abs().sum(-1) > 0
    groups = [set(part.tolist()) for part in order[0].split(6)]
    assert [len(g) for g in groups] == [6, 6, 6, 2]
    for group in groups:
        for token in group:
            assert set(seen[token].nonzero()[:, 0].tolist()) == group


def test_groups_are_drawn_anew_in_training_and_fixed_outside() -> None:
    model, mask = built(), torch.ones(2, 40, dtype=torch.bool)
    assert torch.equal(model.encoder.cen.order(mask, 0), model.encoder.cen.order(mask, 0))  # type: ignore[arg-type]
    assert not torch.equal(model.encoder.cen.order(mask, 0), model.encoder.cen.order(mask, 1))  # type: ignore[arg-type]
    assert not torch.equal(model.encoder.cen.order(mask, 0), built(permutation_seed=1).encoder.cen.order(mask, 0))  # type: ignore[arg-type]
    model.train()
    first = model.encoder.cen.order(mask, 0)
    assert first is not None
    assert not torch.equal(first, model.encoder.cen.order(mask, 0))  # type: ignore[arg-type]
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first.sort(-1).values, torch.arange(40).expand(2, 40))


def test_fixed_groups_spread_tokens_evenly() -> None:
    """With 4000 tokens in a fixed order, where a token lands is not correlated with where it was."""
    order = built().encoder.cen.order(torch.ones(1, 4000, dtype=torch.bool), 3)
    assert order is not None
    both = torch.stack([order[0].double(), torch.arange(4000, dtype=torch.float64)])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.05


# ---- 2 and 3: order and padding of sensors (improved mode: tests/test_model_contract.py)


def test_paper_mode_ignores_the_order_of_sensors_in_one_group_only() -> None:
    batch = a_batch(n=20)
    shuffled = batch.context.points(torch.randperm(20, generator=torch.Generator().manual_seed(1)))  # type: ignore[arg-type]

    def difference(**changes: Any) -> float:
        model = built(mode="paper", **changes)
        return float((flat(model.predict(shuffled, batch.query)) - flat(model.predict(batch.context, batch.query))).abs().max())

    assert difference(group=64) < 1e-5
    assert difference(group=8) > 1e-5
    assert difference(group=8, order="canonical") < 1e-10


@pytest.mark.parametrize("group", [4, 7, 64])
def test_padding_changes_nothing_in_paper_mode(group: int) -> None:
    batch = a_batch(n=17, t=2)
    model = built(mode="paper", group=group)
    c = batch.context
    assert c.value is not None
    more = Frames(
        torch.cat([c.position, torch.full((3, 2, 9, 2), 5.0, dtype=torch.float64)], 2),
        torch.cat([c.mask, torch.zeros(3, 2, 9, dtype=torch.bool)], 2),
        c.time,
        torch.cat([c.value, torch.full((3, 2, 9, 1), torch.nan, dtype=torch.float64)], 2),
    )
    torch.testing.assert_close(flat(model.predict(more, batch.query)), flat(model.predict(c, batch.query)), atol=1e-6, rtol=0)


# ---- 4: calibration and chunks


@pytest.mark.parametrize(
    ("changes", "independent"),
    [
        ({"cn_layers": 0, "mode": "paper"}, True),
        ({"calibration": "anchored", "mode": "paper"}, True),
        ({"mode": "paper"}, False),
        ({"neighbours": 3}, True),
    ],
)
def test_chunks_of_queries(changes: dict[str, Any], independent: bool) -> None:
    batch = a_batch(q=24)
    model = built(**changes)
    whole = flat(model.predict(batch.context, batch.query))
    parts = torch.cat([flat(model.predict(batch.context, batch.query.points(slice(i, i + 5)))) for i in range(0, 24, 5)], 2)
    assert (float((whole - parts).abs().max()) < 1e-6) is independent


def test_memory_chunks_give_the_same_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = a_batch(q=23, s=3)
    model = built(head="quantile")
    whole = flat(model.predict(batch.context, batch.query))
    monkeypatch.setattr("models.scent.model._ROWS", 10)
    torch.testing.assert_close(flat(model.predict(batch.context, batch.query)), whole, atol=1e-10, rtol=0)


# ---- 5: warp-unrolled forecasting


def evaluations(model: Scent, batch: FieldBatch, *leads: float) -> int:
    calls = 0
    original = model._direct

    def counted(context: Frames, query: Frames) -> Any:
        nonlocal calls
        calls += 1
        return original(context, query)

    model._direct = counted  # type: ignore[method-assign]
    model.predict(batch.context, ahead(batch, *leads))
    return calls


@pytest.mark.parametrize(
    ("lead", "expected"), [(0, 1), (1, 1), (3.5, 1), (4, 1), (4.5, 2), (5, 2), (8, 2), (9, 3), (4 * (0.3 / 0.1), 3), (12 * (1 + 1e-9), 3)]
)
def test_number_of_jumps(lead: float, expected: int) -> None:
    assert evaluations(built(), a_batch(), lead) == expected


def test_jumps_are_shared_by_the_leads_asked_for() -> None:
    assert evaluations(built(), a_batch(), 0, 2, 4, 5, 8, 9) == 5  # three answers, two jumps


def test_unrolling_by_hand() -> None:
    batch = a_batch()
    model = built()
    c = batch.context
    at_sensors = Frames(c.position, c.mask, c.time + 4)
    jumped = replace(c, time=c.time + 4, value=model.predict(c, at_sensors).mean)
    query = ahead(batch, 2, 7, 8)
    got = model.predict(c, query).mean
    within, beyond = slice(0, 1), slice(1, 3)
    direct = model.predict(c, ahead(batch, 2)).mean
    later = model.predict(jumped, replace(ahead(batch, 7, 8))).mean
    torch.testing.assert_close(got[:, within], direct)
    torch.testing.assert_close(got[:, beyond], later)


@pytest.mark.parametrize("horizon", [1, 4])
def test_unrolling_keeps_the_frames_already_seen(horizon: int) -> None:
    batch = a_batch(t=3)
    model = built(horizon=horizon)
    jumped = model._unrolling.jump(batch.context, batch.query)
    torch.testing.assert_close(jumped.time, batch.context.time + horizon)
    assert jumped.value is not None
    assert batch.context.value is not None
    if horizon == 1:
        torch.testing.assert_close(jumped.value[:, :2], batch.context.value[:, 1:])
    last = Frames(batch.context.position[:, -1:], batch.context.mask[:, -1:], batch.context.time[:, -1:] + horizon)
    torch.testing.assert_close(jumped.value[:, -1:], model.predict(batch.context, last).mean)


def test_windows_of_a_batch_may_ask_for_different_leads() -> None:
    batch = a_batch(b=2, s=2)
    model = built(head="gaussian")
    query = replace(ahead(batch, 3, 6), time=batch.context.time[:, -1:] + torch.tensor([[3.0, 6.0], [5.0, 1.0]], dtype=torch.float64))
    together = flat(model.predict(batch.context, query))
    for b in range(2):
        for s in range(2):
            lead = float(query.time[b, s] - batch.context.time[b, -1])
            alone = flat(model.predict(batch.context, ahead(batch, lead)))
            torch.testing.assert_close(together[b, s], alone[b, 0], atol=1e-10, rtol=0)


def test_unrolling_can_read_its_forecast_on_the_queries() -> None:
    batch = a_batch()
    far = ahead(batch, 7)
    sensors, queries = (built(warp=warp) for warp in ("sensors", "queries"))
    assert queries._unrolling.jump(batch.context, far).mask.shape == (3, 1, 15)
    assert not torch.allclose(queries.predict(batch.context, far).mean, sensors.predict(batch.context, far).mean)


def test_unrolling_takes_covariates_from_the_frames_asked_for() -> None:
    info = worlds.stations(hours=60).info
    batch = a_batch(info)
    model = built(info)
    assert evaluations(model, batch, 4, 6) == 3
    with pytest.raises(ValueError, match=r"no frame at the time of the jump.*hour_sin"):
        model.predict(batch.context, ahead(batch, 6))


def test_what_cannot_be_unrolled_is_refused() -> None:
    batch = with_background(a_batch())
    model = built()
    far = replace(batch.query, time=batch.query.time + 9)
    with pytest.raises(ValueError, match="beyond the horizon 4, and no background"):
        model.predict(batch.context, far)
    with pytest.raises(ValueError, match="2 frames before the last context time"):
        model.predict(batch.context, ahead(batch, -2))
    with pytest.raises(ValueError, match="training lead is 9 frames, horizon is 4"):
        model.loss(FieldBatch(batch.context, ahead(batch, 9)))


# ---- 6: the frozen projection


def test_the_frozen_projection_never_learns() -> None:
    model, batch = built(), a_batch()
    before = model.encoder.frozen.clone()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    model.loss(batch)["loss"].backward()
    optimizer.step()
    assert torch.equal(model.encoder.frozen, before)
    assert "encoder.frozen" in model.state_dict()
    assert "encoder.frozen" not in dict(model.named_parameters())


def test_the_frozen_projection_has_the_stated_spread() -> None:
    info = worlds.torus_info(
        variables=("a", "b", "c", "d"), units=("1",) * 4, mean=(0.0,) * 4, std=(1.0,) * 4, limits=((None, None),) * 4
    )  # fmt: skip
    frozen = Scent(Scent.Config(**{**TINY, "projection_width": 4000}), info).encoder.frozen
    assert frozen.var() == pytest.approx(1 / 4, rel=0.05)


# ---- 7: time targeting


@pytest.mark.parametrize("targeting", [True, False])
def test_latents_follow_the_time_asked_for(targeting: bool) -> None:
    model, batch = built(mode="paper", time_targeting=targeting), a_batch()
    seen = model.encoder.see(batch.context)
    now, later = (model.encoder(seen, torch.full((3, 1), lead, dtype=torch.float64)) for lead in (1.0, 2.0))
    assert torch.equal(now, later) is not targeting


def test_absolute_and_relative_clocks() -> None:
    batch = a_batch()
    shifted = FieldBatch(replace(batch.context, time=batch.context.time + 7), replace(batch.query, time=batch.query.time + 7))
    for clock, same in (("lead", True), ("absolute", False)):
        model = built(clock=clock)
        here, there = (flat(model.predict(b.context, b.query)) for b in (batch, shifted))
        assert torch.allclose(here, there) is same


def test_a_later_frame_of_the_context_is_told_from_an_earlier() -> None:
    batch = a_batch(t=2)
    model, c = built(), batch.context
    assert c.value is not None
    swapped = replace(c, value=c.value.flip(1), mask=c.mask.flip(1))
    assert not torch.allclose(flat(model.predict(swapped, batch.query)), flat(model.predict(c, batch.query)))


# ---- 8: every switch learns


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("world", ["torus", "stations"])
def test_every_parameter_learns(switch: str, world: str) -> None:
    info = worlds.torus_info() if world == "torus" else worlds.stations(hours=60).info
    model = built(info, **SWITCHES[switch]).train()
    model.loss(with_background(a_batch(info, t=2)))["loss"].backward()
    idle = [key for key, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not idle


def test_every_parameter_takes_part_without_a_background() -> None:
    """Distributed training needs a gradient everywhere, though the weights of an absent background have nothing to learn."""
    model = built().train()
    model.loss(a_batch())["loss"].backward()
    assert {key for key, p in model.named_parameters() if p.grad is None} == set()
    assert {key for key, p in model.named_parameters() if not p.grad.any()} == {"decoder.background.weight"}  # type: ignore[union-attr]


# ---- 9: cost


def test_attention_cost_grows_linearly_with_the_sensors() -> None:
    """Products in the score matrices of one CEN block, counted from their shapes."""

    def products(n: int, size: int) -> int:
        layer, count = Block(16, 2, 1), 0

        def hook(_module: torch.nn.Module, given: tuple[torch.Tensor, ...], _out: torch.Tensor) -> None:
            nonlocal count
            x, keys = given[:2]
            count += x.shape[0] * x.shape[1] * keys.shape[1]

        layer.attention.register_forward_hook(hook)
        in_groups(layer, torch.zeros(1, n, 16), torch.ones(1, n, dtype=torch.bool), torch.arange(n)[None] if n > size else None, size)
        return count

    assert [products(n, 8) for n in (64, 128, 256)] == [64 * 8, 128 * 8, 256 * 8]
    assert products(256, 256) == 256 * 256


# ---- 10: lead 0


def test_reconstruction_is_learned() -> None:
    """Trained on leads 0, 2 and 4 of eight moving waves, the error at the sensors falls far below that of the mean, which is 1."""
    torch.manual_seed(0)
    model = Scent(Scent.Config(**{**TINY, "width": 32, "heads": 4, "cn_layers": 0, "cen_layers": 1}), worlds.torus_info())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=200)
    position, phase = torch.rand(8, 1, 24, 2) * 2 - 1, torch.rand(8, 1, 1) * 2 * torch.pi
    mask, zero = torch.ones(8, 1, 24, dtype=torch.bool), torch.zeros(8, 1, dtype=torch.float64)

    def window(lead: float) -> FieldBatch:
        now, later = (torch.sin(torch.pi * position[..., 0] + phase - 0.6 * time)[..., None] for time in (0, lead))
        return FieldBatch(Frames(position, mask, zero, now), Frames(position, mask, zero + lead, later))

    for step in range(200):
        optimizer.zero_grad()
        model.loss(window(2 * (step % 3)))["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.eval()
    assert max(float(model.loss(window(lead))["relative_mse"]) for lead in (0, 2, 4)) < 0.2


# ---- heads


def test_an_untrained_model_with_a_gaussian_head_is_its_background() -> None:
    batch = with_background(a_batch())
    prediction = built(zero_head=True, head="gaussian").predict(batch.context, batch.query)
    torch.testing.assert_close(prediction.mean, batch.query.background)
    torch.testing.assert_close(prediction.scale, batch.query.background_scale)
    alone = built(zero_head=True, head="gaussian").predict(batch.context, replace(batch.query, background=None, background_scale=None))
    assert alone.scale is not None
    assert not alone.mean.any()
    assert (alone.scale == 1).all()


def test_an_untrained_model_with_a_quantile_head_has_the_quantiles_of_its_background() -> None:
    batch = with_background(a_batch())
    model = built(zero_head=True, head="quantile", levels=(0.05, 0.3, 0.5, 0.8))
    assert model.levels == (0.05, 0.3, 0.5, 0.8)
    prediction = model.predict(batch.context, batch.query)
    q = batch.query
    assert q.background is not None
    assert q.background_scale is not None
    assert prediction.quantiles is not None
    for k, level in enumerate(model.levels):
        expected = torch.distributions.Normal(q.background, q.background_scale).icdf(torch.tensor(level, dtype=torch.float64))
        torch.testing.assert_close(prediction.quantiles[..., k], expected, atol=1e-5, rtol=0)


def test_quantiles_never_cross_and_enclose_the_mean() -> None:
    batch = a_batch()
    model = built(head="quantile")
    with torch.no_grad():
        model.head.out.weight.normal_(std=5)
    prediction = model.predict(batch.context, batch.query)
    assert prediction.quantiles is not None
    assert (prediction.quantiles.diff(dim=-1) > 0).all()
    assert (prediction.mean > prediction.quantiles[..., 0]).all()
    assert (prediction.mean < prediction.quantiles[..., -1]).all()


def test_losses_by_hand() -> None:
    batch = with_background(a_batch())
    q = batch.query
    assert q.value is not None
    assert q.background is not None
    assert q.background_scale is not None
    error, known = q.value - q.background, q.mask[..., None]
    expected = {
        "mse": error[known].square().mean(),
        "relative_mse": ((error * known).square().sum((2, 3)) / ((q.value * known).square().sum((2, 3)) + 1e-6)).mean(),
        "nll": -torch.distributions.Normal(q.background, q.background_scale).log_prob(q.value)[known].mean() - 0.5 * math.log(2 * math.pi),
        "crps": torch.from_numpy(scoringrules.crps_normal(q.value.numpy(), q.background.numpy(), q.background_scale.numpy()))[known].mean(),
    }
    heads = {"nll": "gaussian", "crps": "gaussian"}
    for loss, value in expected.items():
        model = built(zero_head=True, head=heads.get(loss, "mean"), loss=loss)
        torch.testing.assert_close(model.loss(batch)["loss"], value)


def test_what_remains_of_the_error_of_the_background() -> None:
    batch = with_background(a_batch())
    q, model = batch.query, built(zero_head=True, loss="remaining")
    assert q.value is not None
    assert q.background is not None
    assert q.background_scale is not None
    assert model.loss(batch)["loss"].item() == pytest.approx(1.0)
    with torch.no_grad():
        model.head.out.bias.fill_(0.3)
    known, size = q.mask[..., None], (q.value * q.mask[..., None]).square().sum((2, 3)) + 1e-6
    after, before = (
        (((q.value - guess) * known).square().sum((2, 3)) / size).mean()
        for guess in (q.background + 0.3 * q.background_scale, q.background)
    )
    torch.testing.assert_close(model.loss(batch)["loss"], after / before)
    with pytest.raises(ValueError, match="loss remaining is a share of the background's error"):
        model.loss(a_batch())


def test_pinball_by_hand() -> None:
    batch = a_batch()
    model = built(head="quantile", levels=(0.1, 0.5, 0.8))
    quantiles = model.predict(batch.context, batch.query).quantiles
    assert quantiles is not None
    assert batch.query.value is not None
    expected = [
        (truth - guess) * level if truth >= guess else (guess - truth) * (1 - level)
        for level, guesses in zip(model.levels, quantiles[batch.query.mask].unbind(-1), strict=True)
        for truth, guess in zip(batch.query.value[batch.query.mask].flatten(), guesses.flatten(), strict=True)
    ]
    torch.testing.assert_close(model.loss(batch)["loss"].item(), float(torch.stack(expected).mean()))


# ---- covariates, background, neighbours


def test_covariates_are_seen() -> None:
    info = worlds.stations(hours=60).info
    batch = a_batch(info)
    model = built(info)
    expected = flat(model.predict(batch.context, batch.query))
    assert batch.context.covariate is not None
    assert batch.query.covariate is not None
    other = replace(batch.context, covariate=batch.context.covariate + 1)
    assert not torch.allclose(flat(model.predict(other, batch.query)), expected)
    later = replace(batch.query, covariate=batch.query.covariate + 1)
    assert not torch.allclose(flat(model.predict(batch.context, later)), expected)


def test_the_correction_sees_the_background_and_its_scale() -> None:
    batch = with_background(a_batch())
    model, q = built(), batch.query
    assert q.background is not None
    assert q.background_scale is not None
    correction = model.predict(batch.context, q).mean - q.background
    for other in (replace(q, background=q.background + 1), replace(q, background_scale=2 * q.background_scale)):
        assert not torch.allclose(model.predict(batch.context, other).mean - other.background, correction)


def test_the_correction_vanishes_where_the_background_is_sure() -> None:
    sure = with_background(a_batch(), scale=1e-6)
    prediction = built().predict(sure.context, sure.query)
    torch.testing.assert_close(prediction.mean, sure.query.background, atol=1e-4, rtol=0)


def test_without_absolute_position_a_shift_of_everything_changes_nothing() -> None:
    batch = a_batch()
    away = torch.tensor([0.3, -0.2], dtype=torch.float64)
    moved = FieldBatch(
        replace(batch.context, position=batch.context.position + away), replace(batch.query, position=batch.query.position + away)
    )
    for absolute, same in ((False, True), (True, False)):
        model = built(absolute_position=absolute, cn_layers=0, neighbours=4)
        here, there = (flat(model.predict(b.context, b.query)) for b in (batch, moved))
        assert torch.allclose(here, there) is same


def test_on_a_torus_nothing_jumps_where_it_closes() -> None:
    batch = a_batch()
    around = replace(batch.query, position=batch.query.position + 2), replace(batch.context, position=batch.context.position - 2)
    model = built(neighbours=4, calibration="plain")
    torch.testing.assert_close(flat(model.predict(around[1], around[0])), flat(model.predict(batch.context, batch.query)))


def test_neighbours_read_the_nearest_observations_of_each_frame_only() -> None:
    torch.manual_seed(0)
    model = built(neighbours=2, cn_layers=0)
    batch = a_batch(t=2, n=12, q=5)
    value = batch.context.value
    assert value is not None
    value.requires_grad_()
    seen = model.encoder.see(replace(batch.context, value=value))
    near = model.decoder.neighbours
    assert isinstance(near, Neighbours)
    asked = torch.randn(3, 2, 5, 16, dtype=torch.float64)
    out = near(asked, batch.query.position, seen)
    for b, q in ((0, 0), (1, 3), (2, 4)):
        (used,) = torch.autograd.grad(out[b, 1, q].sum(), value, retain_graph=True)
        away = batch.context.position[b] - batch.query.position[b, 1, q]
        away = (away - 2 * (away / 2).round()).square().sum(-1).masked_fill(~batch.context.mask[b], torch.inf)
        for t in range(2):
            expected = set(away[t].topk(2, largest=False).indices.tolist()) & set(batch.context.mask[b, t].nonzero()[:, 0].tolist())
            assert set(used[b, t].abs().sum(-1).nonzero()[:, 0].tolist()) == expected


def test_neighbours_of_a_shared_layout_equal_those_of_separate_ones() -> None:
    model = built(neighbours=3)
    batch = a_batch(t=2, s=3)
    same = batch.query.position[:, :1]
    shared = replace(batch.query, position=same.expand(-1, 3, -1, -1))
    copied = replace(batch.query, position=same.repeat(1, 3, 1, 1))
    torch.testing.assert_close(flat(model.predict(batch.context, shared)), flat(model.predict(batch.context, copied)))


# ---- settings


def test_modes_fill_in_what_is_not_given() -> None:
    paper, improved = Scent.Config(horizon=4, mode="paper"), Scent.Config(horizon=4)
    assert (paper.order, paper.calibration, paper.clock, paper.adaptive_norm) == ("given", "plain", "absolute", False)
    assert (improved.order, improved.calibration, improved.clock, improved.adaptive_norm) == ("canonical", "anchored", "lead", True)
    assert Scent.Config(horizon=4, mode="paper", calibration="anchored").calibration == "anchored"
    assert Scent.Config(horizon=4, head="gaussian").loss == "nll"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head": "gaussian", "loss": "mse"}, "loss mse does not fit head gaussian: expected nll"),
        ({"width": 30, "heads": 4}, "width 30 is not a multiple of heads 4"),
        ({"levels": (0.5, 0.1)}, "levels must be two or more, increasing"),
        ({"absolute_position": False}, "anchored CN tells its anchors apart"),
        ({"widht": 3}, "Extra inputs are not permitted"),
        ({"horizon": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Scent.Config(**{"horizon": 4, **wrong})


# One variable on a torus, one context frame, no covariates: the table of docs/models.md.
PARAMETERS = {"m1": 404_097, "m2": 1_532_545, "m3": 3_234_817, "m4": 7_211_521, "m5": 12_761_089, "m6": 33_357_313, "m7": 92_295_681}


def test_every_size_has_its_stated_number_of_parameters() -> None:
    assert [*PARAMETERS] == [*SIZES]
    for size, expected in PARAMETERS.items():
        with torch.device("meta"):  # shapes alone
            model = Scent(Scent.Config(horizon=10, mode="paper", size=size), worlds.torus_info())  # type: ignore[arg-type]
        assert sum(p.numel() for p in model.parameters()) == expected, size


def test_the_number_of_parameters_by_hand() -> None:
    """m5 without CEN and CN: eight blocks of width d = 256, their projections, feed-forwards of factor 4 and norms."""
    d, place, clock, values = 256, 2 * 2 * 32 + 2, 2 * 16 + 1, 32
    block = 4 * d * d + d + (8 * d * d + 8 * d) + (4 * d * d + d) + 2 * 2 * d
    encoder = (values + clock + place) * d + d + clock * d + 128 * d + (block + 2 * d) + 6 * block
    decoder = place * d + (clock * d + d) + 2 * d + (block + 2 * d) + (d + 1)
    model = Scent(Scent.Config(horizon=10, mode="paper", cen_layers=0, cn_layers=0), worlds.torus_info())
    assert sum(p.numel() for p in model.parameters()) == encoder + decoder


def test_a_size_fills_in_what_is_not_given() -> None:
    small = Scent.Config(horizon=4, size="m1")
    assert (small.width, small.heads, small.latents, small.processor_layers, small.ffn_factor) == (64, 4, 64, 3, 2)
    assert Scent.Config(horizon=4, size="m1", latents=32).model_dump() == {**small.model_dump(), "latents": 32}
    assert Scent.Config(horizon=4) == Scent.Config(horizon=4, size="m5")
    with pytest.raises(ValidationError, match="size"):
        Scent.Config(horizon=4, size="m8")  # type: ignore[arg-type]


def test_fourier_features_by_hand() -> None:
    x = torch.tensor([[0.25, -0.5]])
    features = Fourier(2, 2, 3.0)(x)
    pi = torch.pi
    angles = torch.tensor([0.25 * pi, 0.75 * pi, -0.5 * pi, -1.5 * pi])
    torch.testing.assert_close(features, torch.cat([angles.sin(), angles.cos(), x[0]])[None])
    assert Fourier(1, 3, 9.0, "octaves").frequency.tolist() == [1, 2, 4]
    assert Fourier(1, 3, 9.0, "integers").frequency.tolist() == [1, 2, 3]


def test_anchors_are_spread_evenly() -> None:
    points = halton(64, 2)
    quarters = (points[:, 0] > 0).long() * 2 + (points[:, 1] > 0).long()
    assert torch.bincount(quarters).tolist() == pytest.approx([16] * 4, abs=2)
    assert points.abs().max() < 1
