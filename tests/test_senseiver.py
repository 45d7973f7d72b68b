"""Senseiver's own promises: the published sizes, set encoding, independent queries, one time only."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from models.contract import DatasetInfo, FieldBatch, FieldPrediction
from models.perceiver import Decoder, Encoder, LatentSizes
from models.senseiver.model import Senseiver
from tests import worlds

SMALL: dict[str, Any] = {
    "latents": 9,
    "channels": 16,
    "token_width": 12,
    "query_width": 20,
    "rounds": 3,
    "self_layers": 1,
    "bands": 4,
    "highest": 4.0,
}
TORUS = worlds.torus_info()
PLANE = worlds.torus_info(geometry="plane")


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def built(info: DatasetInfo = TORUS, seed: int = 0, **changes: Any) -> Senseiver:
    torch.manual_seed(seed)
    model = Senseiver(Senseiver.Config(**{**SMALL, **changes}), info).double().eval()
    torch.nn.init.normal_(model.decoder.head.weight)
    return model


def one_time(**sizes: int) -> FieldBatch:
    return worlds.batch(TORUS, **{"s": 1, **sizes}, dtype=torch.float64)


# ---- sizes


def test_parameters_at_the_cylinder_setting() -> None:
    assert count(Encoder(LatentSizes(), PLANE)) == 133_152
    assert count(Decoder(LatentSizes(), PLANE)) == 22_993


def test_rounds_after_the_first_share_their_weights() -> None:
    assert count(Encoder(LatentSizes(rounds=2), PLANE)) == count(Encoder(LatentSizes(rounds=6), PLANE))
    once = Encoder(LatentSizes(rounds=1), PLANE)
    assert once.later is None
    assert count(Encoder(LatentSizes(), PLANE)) - count(once) == count(once.first)


def test_the_readmes_cylinder_and_pipe_settings_can_be_built() -> None:
    cylinder = Senseiver.Config(mode="paper", latents=256, channels=16, token_width=16, query_width=16, rounds=3)
    pipe = Senseiver.Config(mode="paper", latents=64, channels=32, token_width=32, query_width=32, rounds=3)
    assert count(Senseiver(cylinder, PLANE)) < count(Senseiver(pipe, PLANE))


def test_modes_set_the_frequencies() -> None:
    highest = {"bands": 4, "highest": 3.0}
    paper = Senseiver.Config(mode="paper", **highest).place(TORUS).frequency
    torch.testing.assert_close(paper, torch.linspace(1, 3, 4))
    assert torch.equal(Senseiver.Config(**highest).place(TORUS).frequency, torch.arange(1.0, 5.0))
    torch.testing.assert_close(Senseiver.Config(**highest).place(PLANE).frequency, torch.linspace(1, 3, 4))
    assert Senseiver.Config(mode="paper", spacing="octaves").spacing == "octaves"


WRONG = [({"channels": 15}, "channels 15"), ({"query_width": 15, "decoder_heads": 2}, "query_width 15"), ({"rouds": 2}, "rouds")]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Senseiver.Config(**wrong)


# ---- encoder


def test_the_encoder_sees_a_set() -> None:
    batch, encoder = one_time(), built().encoder
    context = batch.context
    assert context.value is not None
    position, value, mask = context.position[:, 0], context.value[:, 0], context.mask[:, 0]
    latents = encoder(position, value, mask)
    assert latents.shape == (3, 9, 16)
    order = torch.randperm(20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(encoder(position[:, order], value[:, order], mask[:, order]), latents, atol=1e-10, rtol=0)
    twice = [torch.cat([x, x], 1) for x in (position, value, mask)]
    torch.testing.assert_close(encoder(*twice), latents, atol=1e-10, rtol=0)
    few = mask.clone()
    few[:, 10:] = False
    torch.testing.assert_close(encoder(position[:, :10], value[:, :10], mask[:, :10]), encoder(position, value, few), atol=1e-10, rtol=0)
    moved = encoder(position + 0.1, value, mask)
    assert (moved - latents).abs().max() > 1e-3


def test_a_row_without_observations_gives_the_same_latents_whatever_is_hidden() -> None:
    batch, encoder = one_time(), built().encoder
    position, value = batch.context.position[:, 0], batch.context.value[:, 0]  # type: ignore[index]
    none = torch.zeros(3, 20, dtype=torch.bool)
    latents = encoder(position, torch.full_like(value, torch.nan), none)
    assert latents.isfinite().all()
    torch.testing.assert_close(latents[0], latents[1], atol=1e-12, rtol=0)


def test_older_frames_are_ignored() -> None:
    batch, model = one_time(t=3), built()
    last = replace(batch.context, **{name: getattr(batch.context, name)[:, 2:] for name in ("position", "mask", "time", "value")})
    assert torch.equal(model.predict(batch.context, batch.query).mean, model.predict(last, batch.query).mean)


# ---- decoder


def test_queries_are_answered_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = one_time(q=50), built()
    whole = model.predict(batch.context, batch.query).mean
    monkeypatch.setattr("models.senseiver.model._ROWS", 21)
    torch.testing.assert_close(model.predict(batch.context, batch.query).mean, whole, atol=1e-10, rtol=0)
    halves = FieldPrediction.concatenate([model.predict(batch.context, batch.query.points(slice(i, i + 25))) for i in (0, 25)])
    torch.testing.assert_close(halves.mean, whole, atol=1e-10, rtol=0)


def test_on_a_torus_the_field_closes_and_on_a_plane_it_need_not() -> None:
    batch = one_time()
    around = replace(batch.query, position=batch.query.position + 2)
    for info, closes in ((TORUS, True), (PLANE, False)):
        model = built(info, bands=3, highest=3.5)
        difference = (model.predict(batch.context, around).mean - model.predict(batch.context, batch.query).mean).abs().max()
        assert (difference < 1e-9) == closes


# ---- the contract's edges


@pytest.mark.parametrize("lead", [1.0, -1.0, 0.5])
def test_another_time_is_refused(lead: float) -> None:
    batch, model = one_time(), built()
    other = replace(batch.query, time=batch.query.time + lead)
    for ask in (lambda: model.predict(batch.context, other), lambda: model.loss(FieldBatch(batch.context, other))):
        with pytest.raises(ValueError, match=rf"lead of {lead:g} frames"):
            ask()


def test_the_correction_is_in_units_of_the_backgrounds_deviation() -> None:
    batch, model = one_time(), built()
    assert batch.query.value is not None
    scale = torch.full_like(batch.query.value, 0.5)
    alone = model.predict(batch.context, batch.query).mean
    beside = model.predict(batch.context, replace(batch.query, background=batch.query.value, background_scale=scale)).mean
    torch.testing.assert_close(beside, batch.query.value + 0.5 * alone)


def test_missing_values_and_covariates_are_named() -> None:
    batch, model = one_time(), built()
    with pytest.raises(ValueError, match="no values"):
        model.loss(FieldBatch(batch.context, replace(batch.query, value=None)))
    info = worlds.stations(hours=60).info
    full, model = worlds.batch(info, s=1, dtype=torch.float64), built(info)
    with pytest.raises(ValueError, match="observations have no covariates"):
        model.predict(replace(full.context, covariate=None), full.query)
    with pytest.raises(ValueError, match="query has no covariates"):
        model.predict(full.context, replace(full.query, covariate=None))


def test_it_learns_a_family_of_waves() -> None:
    """Waves of random phase at 24 sensors: after 120 steps unseen phases have less than a quarter of the variance as error."""
    torch.manual_seed(0)
    model = Senseiver(Senseiver.Config(**{**SMALL, "rounds": 2, "bands": 2}), TORUS)
    place = torch.rand(1, 1, 64, 2) * 2 - 1

    def waves(b: int) -> FieldBatch:
        phase = torch.rand(b, 1, 1, 1) * 2 * torch.pi
        value = torch.sin(torch.pi * (place[..., :1] + place[..., 1:]) + phase)
        batch = worlds.batch(TORUS, b=b, n=24, s=1, q=64)
        at = place.expand(b, -1, -1, -1)
        context = replace(batch.context, position=at[:, :, :24], value=value[:, :, :24], mask=torch.ones(b, 1, 24, dtype=torch.bool))
        return FieldBatch(context, replace(batch.query, position=at, value=value, mask=torch.ones(b, 1, 64, dtype=torch.bool)))

    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(120):
        optimizer.zero_grad()
        model.loss(waves(16))["loss"].backward()
        optimizer.step()
    unseen = waves(32)
    assert unseen.query.value is not None
    error = (model.predict(unseen.context, unseen.query).mean - unseen.query.value).square().mean()
    assert error < 0.25 * unseen.query.value.var()
