"""What AROMA promises beyond the contract: the testable properties of its paper and of the authors' code."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from models.aroma.autoencoder import divergence
from models.aroma.model import Aroma
from models.contract import DatasetInfo, FieldBatch
from tests import worlds
from tests.tiny_aroma import SMALL, built

# Table of the released configurations: settings, space axes, channels, parameters of the auto-encoder and of the stepper.
COMMON: dict[str, Any] = {"mode": "paper", "width": 128, "tokens": 32, "channels": 8, "decoder_repeats": 3, "field_width": 64}
TABLE = {
    "burgers": (
        {**COMMON, "decoder_repeats": 2, "scales": (3, 4, 5), "field_width": 128, "encode_geometry": False, "kl_weight": 0.0},
        1, 1, 467_969, 1_280_136,
    ),
    "ns 1e-3": ({**COMMON, "scales": (2, 3)}, 2, 1, 622_881, 1_280_136),
    "ns 1e-4": (
        {**COMMON, "tokens": 256, "channels": 16, "decoder_repeats": 2, "scales": (3, 4, 5), "field_width": 128, "encode_geometry": False},
        2, 1, 505_969, 1_339_536,
    ),
    "ns 1e-5": (
        {**COMMON, "width": 256, "tokens": 256, "channels": 16, "decoder_repeats": 2, "scales": (3, 4, 5), "field_width": 256,
         "encode_geometry": False},
        2, 1, 1_587_185, 1_339_536,
    ),
    "shallow water": ({**COMMON, "scales": (2, 3), "highest": 5, "field_depth": 1}, 3, 2, 627_234, 1_280_136),
    "cylinder": ({**COMMON, "scales": (3, 4, 5)}, 2, 3, 624_291, 1_280_136),
    "airfoil": ({**COMMON, "tokens": 64, "scales": (3, 4, 5), "highest": 5}, 2, 4, 628_580, 1_288_328),
}  # fmt: skip


def info(space: int = 2, channels: int = 1, **changes: Any) -> DatasetInfo:
    names = tuple("abcd"[:channels])
    each: dict[str, Any] = {"variables": names, "units": ("1",) * channels, "mean": (0.0,) * channels, "std": (1.0,) * channels}
    place = {"space": ("x", "y", "z")[:space], "centre": (0.5,) * space, "limits": ((None, None),) * channels}
    return worlds.torus_info(**{**each, **place, **changes})


def count(*modules: nn.Module) -> int:
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize("name", TABLE)
def test_the_released_configurations_have_the_parameters_of_the_table(name: str) -> None:
    settings, space, channels, autoencoder, stepper = TABLE[name]
    model = Aroma(Aroma.Config(**settings), info(space, channels))
    assert count(model.encoder, model.decoder) == autoencoder
    assert count(model.stepper) == stepper


@pytest.mark.parametrize(("channels", "total"), [(3, 1_949_891), (4, 1_950_148)])
def test_the_paper_s_mesh_settings_have_the_parameters_an_independent_run_reports(channels: int, total: int) -> None:
    settings = {**COMMON, "tokens": 64, "channels": 16, "scales": (3, 4, 5), "field_width": 128}
    assert count(Aroma(Aroma.Config(**settings), info(2, channels))) == total


def test_the_defaults_are_navier_stokes_1e_3() -> None:
    model = Aroma(Aroma.Config(mode="paper"), worlds.torus_info())
    assert (count(model.encoder, model.decoder), count(model.stepper)) == (622_881, 1_280_136)


# ---- decoder


def test_the_repetitions_of_the_decoder_share_one_block() -> None:
    shared, apart = built(decoder_repeats=3), built(decoder_repeats=3, shared_decoder=False, seed=1)
    state = shared.decoder.state_dict()
    for key, value in list(state.items()):
        for part in ("mix", "ffn"):
            if key.startswith(f"{part}.0."):
                state |= {key.replace(f"{part}.0.", f"{part}.{number}."): value for number in (1, 2)}
    apart.decoder.load_state_dict(state)
    latents = torch.randn(2, 6, 3, dtype=torch.float64)
    torch.testing.assert_close(shared.decoder.read(latents), apart.decoder.read(latents))
    with torch.no_grad():  # an edit of the one block is an edit of all three
        for block in (shared.decoder.mix[0], *apart.decoder.mix):
            block.out.weight.mul_(2)  # type: ignore[union-attr,operator]
    torch.testing.assert_close(shared.decoder.read(latents), apart.decoder.read(latents))
    assert not torch.allclose(shared.decoder.read(latents), built(decoder_repeats=3).decoder.read(latents))


def test_on_a_torus_a_place_and_its_copy_one_period_away_are_the_same() -> None:
    batch = worlds.batch(worlds.torus_info(), dtype=torch.float64)
    moved = FieldBatch(
        replace(batch.context, position=batch.context.position + torch.tensor([2.0, -4.0])),
        replace(batch.query, position=batch.query.position - torch.tensor([0.0, 2.0])),
    )
    for mode, same in (("improved", True), ("paper", False)):
        model = built(mode=mode)
        here, there = (model.predict(each.context, each.query).mean for each in (batch, moved))
        assert torch.allclose(here, there, atol=1e-9) is same


# ---- encoder


def test_values_at_masked_nodes_change_nothing() -> None:
    batch = worlds.batch(worlds.torus_info(), dtype=torch.float64)
    model = built()
    frames = batch.context
    assert frames.value is not None
    padded = replace(frames, value=torch.where(frames.mask[..., None], frames.value, -100.0))
    padded = replace(padded, position=torch.where(frames.mask[..., None], frames.position, -100.0))
    torch.testing.assert_close(model.latents(padded), model.latents(frames), atol=1e-6, rtol=0)


def test_the_order_of_points_does_not_change_the_latents() -> None:
    frames = worlds.batch(worlds.torus_info(), dtype=torch.float64).context
    order = torch.randperm(frames.mask.shape[2], generator=torch.Generator().manual_seed(2))
    model = built()
    torch.testing.assert_close(model.latents(frames.points(order)), model.latents(frames), atol=1e-5, rtol=0)  # type: ignore[arg-type]


def test_divergence_is_a_mean_and_zero_for_the_standard_normal() -> None:
    zero = torch.zeros(2, 5, 3)
    assert divergence(zero, zero) == 0
    one, more = torch.ones(1, 1, 1), torch.ones(4, 7, 9)
    assert float(divergence(one, 0 * one)) == pytest.approx(0.5)
    assert float(divergence(more, 0 * more)) == pytest.approx(0.5)
    assert float(divergence(0 * more, more)) == pytest.approx(0.5 * (torch.e - 2))


def test_the_loss_of_encoding_is_reconstruction_plus_weighted_divergence() -> None:
    batch = worlds.batch(worlds.torus_info(), s=1, dtype=torch.float64)
    truth, known = batch.query.value, batch.query.mask.unsqueeze(-1)
    assert truth is not None
    for name in ("mse", "relative_l2"):
        model = built(reconstruction=name, kl_weight=0.5, noise=False)
        terms = model.loss(batch)
        miss = (model.predict(batch.context, batch.query).mean - truth) * known
        mse = miss.square().sum() / known.sum()
        relative = (miss.flatten(1).norm(dim=1) / (truth * known).flatten(1).norm(dim=1)).mean()
        torch.testing.assert_close(terms["mse"], mse)
        torch.testing.assert_close(terms["relative_l2"], relative, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(terms["loss"], terms[name] + 0.5 * terms["kl"])


def test_without_sampling_and_divergence_the_variance_learns_nothing_and_all_else_does() -> None:
    batch = worlds.batch(worlds.torus_info(), dtype=torch.float64)
    model = built(sample_latents=False, kl_weight=0.0).train()
    model.loss(batch)["loss"].backward()
    idle = {name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())}
    assert idle == {"encoder.log_variance.weight", "encoder.log_variance.bias"}


def test_observations_are_dropped_in_training_alone_at_the_shares_given() -> None:
    model = built(dropout=(0.5,))
    torch.manual_seed(0)
    mask = torch.ones(400, 1, 100, dtype=torch.bool)
    assert model._kept(mask).double().mean() == pytest.approx(0.5, abs=0.01)
    mixed = built(dropout=(0.0, 0.75))._kept(mask).double().mean(-1)
    assert set((mixed > 0.6).flatten().tolist()) == {True, False}
    assert mixed.mean() == pytest.approx(0.625, abs=0.05)
    batch = worlds.batch(worlds.torus_info(), dtype=torch.float64)
    assert model.loss(batch)["loss"] == built(dropout=()).loss(batch)["loss"]
    plain = {"sample_latents": False}
    assert built(dropout=(0.5,), **plain).train().loss(batch)["loss"] != built(dropout=(), **plain).train().loss(batch)["loss"]


def test_the_decoder_learns_its_own_error_and_nothing_else_changes_by_it() -> None:
    """Values are noise of deviation 0.5 that no latent explains."""
    torch.manual_seed(0)
    silent, model = (Aroma(Aroma.Config(**SMALL, dropout=(), noise=noise), worlds.torus_info()).train() for noise in (False, True))
    silent.load_state_dict({name: value for name, value in model.state_dict().items() if "decoder.noise" not in name})

    def window(seed: int) -> FieldBatch:
        batch = worlds.batch(worlds.torus_info(), b=16, s=1, q=30, seed=seed)
        value = 0.5 * torch.randn(*batch.query.mask.shape, 1, generator=torch.Generator().manual_seed(seed))
        return FieldBatch(batch.context, replace(batch.query, value=value))

    for network in (silent, model):
        torch.manual_seed(1)
        network.loss(window(0))["loss"].backward()
    with_noise = dict(model.named_parameters())
    assert all(torch.equal(p.grad, with_noise[name].grad) for name, p in silent.named_parameters() if p.requires_grad)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(60):
        optimizer.zero_grad()
        model.loss(window(step))["loss"].backward()
        optimizer.step()
    answer = model.predict(window(0).context, window(0).query)
    assert answer.samples is None
    assert answer.scale is not None
    assert 0.4 < float(answer.scale.median()) < 0.6


def test_the_variance_is_that_between_members_and_that_of_the_decoder() -> None:
    batch = worlds.batch(worlds.torus_info(), s=3, dtype=torch.float64)
    model, plain = built(members=4), built(members=4, noise=False)
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if "decoder.noise" not in name})
    with torch.no_grad():
        model.decoder.noise.weight.zero_()  # type: ignore[union-attr]
        model.decoder.noise.bias.fill_(-1.0)  # type: ignore[union-attr]
    answer, samples = model.predict(batch.context, batch.query), plain.predict(batch.context, batch.query).samples
    assert answer.scale is not None
    assert samples is not None
    alone = answer.scale[:, 0]  # at lead 0 the members are one
    torch.testing.assert_close(alone, alone.flatten()[0].expand_as(alone), atol=1e-9, rtol=0)
    torch.testing.assert_close(answer.scale.square(), alone.flatten()[0].square() + samples.var(0), atol=1e-9, rtol=0)


def test_encoding_needs_values_at_lead_0() -> None:
    batch = worlds.batch(worlds.torus_info(), dtype=torch.float64)
    later = FieldBatch(batch.context, replace(batch.query, time=batch.query.time + 1))
    with pytest.raises(ValueError, match="lead 0"):
        built().loss(later)
    with pytest.raises(ValueError, match="no values"):
        built().loss(FieldBatch(batch.context, replace(batch.query, value=None)))
