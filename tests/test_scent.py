"""SCENT's own promises: frozen projection, time targeting, calibration, background; every switch learns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.contract import FieldBatch, Frames
from models.layers import Fourier
from models.scent.decoder import halton
from models.scent.model import Scent
from models.scent.neighbours import Neighbours
from tests import worlds
from tests.test_model_contract import flat, with_background
from tests.tiny_scent import TINY, a_batch, built

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


# ---- calibration and chunks


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


# ---- the frozen projection


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


# ---- time targeting


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


# ---- every switch learns


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


# ---- lead 0


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


# ---- features and anchors


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
