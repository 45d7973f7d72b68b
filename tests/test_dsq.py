"""DSQ's own promises: the published sizes, codes, phases, causality, decoding."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from models.contract import FieldBatch, Frames
from models.dsq.frame_transformer import RegressTransformer
from models.dsq.latent_codes import halvings
from models.dsq.model import Dsq
from tests import worlds
from tests.tiny_dsq import PLANE, a_batch, built, count

HEADS = [{"head": "index"}, {"mode": "paper"}, {"head": "frame"}, {"head": "regress"}]
CODES_AHEAD = pytest.mark.parametrize("head", ["index", "frame"])  # the heads that foresee codes


# ---- sizes


def test_parameters_of_the_default_and_the_released_setting() -> None:
    with torch.device("meta"):
        ours, code_by_code = Dsq(Dsq.Config(), PLANE), Dsq(Dsq.Config(head="index"), PLANE)
        released = Dsq(Dsq.Config(mode="released"), PLANE)
        wide = Dsq(Dsq.Config(mode="released", hidden=4096), PLANE)
    assert (count(ours.encoder), count(ours.decoder)) == (133_152, 22_993)
    codebook = ours.coder.quantizer.code.numel()
    assert count(ours.coder) + codebook == 770_672
    assert 10.5e6 < count(ours.forecaster) == count(code_by_code.forecaster) < 11.5e6
    assert count(released.coder) == 119_677_488
    assert count(wide.coder) == 448_938_544
    forecaster = released.forecaster
    assert isinstance(forecaster, RegressTransformer)
    assert (count(forecaster.project), count(forecaster.unproject)) == (117_450_752, 117_460_992)
    assert round(count(forecaster.trunk) / 1e6, 1) == 604.3


def test_halvings() -> None:
    assert (halvings(256, 16), halvings(256, 64), halvings(16, 4)) == (2, 1, 1)
    for latents, codes in ((256, 15), (32, 8), (256, 256)):
        with pytest.raises(ValueError, match=f"{latents} latents do not halve into {codes}"):
            halvings(latents, codes)


def test_modes_fill_in_what_is_not_given() -> None:
    paper, improved, released = (Dsq.Config(mode=mode) for mode in ("paper", "improved", "released"))
    assert (paper.head, paper.codebook, paper.restart, paper.spacing, paper.centred) == ("index", "learned", 0.0, "linear", False)
    assert (improved.head, improved.codebook, improved.centred) == ("index", "average", True)
    assert (released.head, released.hidden, released.width, released.match_weight) == ("regress", 2048, 2048, 0.01)
    assert Dsq.Config(mode="released", width=64).width == 64


WRONG = [
    ({"codes_per_frame": 8}, "do not halve"),
    ({"width": 385}, "width 385"),
    ({"members": 4}, "members is 4"),
    ({"head": "regress", "soft_decode": True}, "heads index and frame: head regress has no probabilities"),
    ({"head": "regress", "temperature": 1.0}, "head regress has no probabilities"),
    ({"code": 3}, "code"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Dsq.Config(**wrong)


# ---- phases


@pytest.mark.parametrize("head", HEADS)
def test_each_phase_trains_its_part(head: dict[str, Any]) -> None:
    model, batch = built(**head), a_batch()
    parts = {"teacher": {"encoder", "decoder"}, "quantize": {"coder"}, "sense": {"sparse"}, "predict": {"forecaster"}}
    for phase in model.phases:
        model.begin(phase)
        assert {name.split(".")[0] for name, p in model.named_parameters() if p.requires_grad} == parts[phase]
        codes = model.coder.quantizer.code.clone()
        model.train().loss(batch)["loss"].backward()
        idle = [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]
        assert not idle
        moved = not torch.equal(codes, model.coder.quantizer.code)
        assert moved == (phase == "quantize" and model.config.codebook == "average")
        model.zero_grad()
    with pytest.raises(ValueError, match="no phase 'fit'"):
        model.begin("fit")


def test_the_sparse_encoder_starts_as_the_teachers() -> None:
    info = worlds.stations(hours=60).info
    model, batch = built(info).eval(), a_batch(info)
    assert not torch.equal(model.sparse.latents, model.encoder.latents)
    model.begin("sense")
    last = Frames(*(getattr(batch.context, name)[:, -1:] for name in ("position", "mask", "time", "value")))
    torch.testing.assert_close(model.seen(model.sparse, batch.context), model.seen(model.encoder, last), atol=1e-12, rtol=0)


def test_sensing_closes_the_gap_to_the_teacher() -> None:
    """On windows it has not seen, the sensors' latents come nearer to the teacher's than their mean does."""
    model = built().train()

    def waves(b: int, seed: int) -> FieldBatch:
        generator = torch.Generator().manual_seed(seed)
        batch, phase = a_batch(b=b, n=6, s=1, q=24), 2 * torch.pi * torch.rand(b, 1, 1, 1, generator=generator, dtype=torch.float64)
        place = a_batch(b=1, s=1, q=24).query.position.expand(b, -1, -1, -1)
        value = torch.sin(torch.pi * place[..., :1] + phase)
        context = replace(batch.context, position=place[:, :, :6], value=value[:, :, :6], mask=torch.ones(b, 1, 6, dtype=torch.bool))
        return FieldBatch(context, replace(batch.query, position=place, value=value, mask=torch.ones(b, 1, 24, dtype=torch.bool)))

    for phase, steps in (("teacher", 60), ("quantize", 60), ("sense", 100)):
        model.begin(phase)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=5e-3)
        for step in range(steps):
            optimizer.zero_grad()
            model.loss(waves(16, step))["loss"].backward()
            optimizer.step()
    terms = model.eval().loss(waves(32, 10_000))
    assert terms["latent_mse"] < 0.8 * terms["latent_variance"]
    assert set(terms) == {"loss", "latent_mse", "latent_variance", "code_agreement"}


def test_what_is_logged_of_the_codebook() -> None:
    model, batch = built(), a_batch()
    model.begin("quantize")
    terms = model.train().loss(batch)
    assert set(terms) == {"loss", "latent_mse", "field_mse", "perplexity", "usage", "round_trip"}
    assert 1 <= float(terms["perplexity"]) <= 12
    assert 0 < float(terms["usage"]) <= 1
    assert 0 <= float(terms["round_trip"]) <= 1


def test_frame_0_is_given_dense_or_sparse() -> None:
    """With dense frames 0 always, the context does not matter; with sparse ones, the values at lead 0 do not."""
    batch = a_batch(b=8)
    assert batch.context.value is not None
    assert batch.query.value is not None
    blind = FieldBatch(replace(batch.context, value=-3 * batch.context.value), batch.query)
    value = batch.query.value.clone()
    value[:, 0] *= -3
    other = FieldBatch(batch.context, replace(batch.query, value=value))
    for share, same in ((1.0, blind), (0.0, other)):
        model = built(dense_start=share, dropout=0.0).train()
        model.begin("predict")
        for changed in (blind, other):
            equal = torch.equal(model.loss(changed)["loss"], model.loss(batch)["loss"])
            assert equal == (changed is same)


def test_frames_without_a_value_do_not_count() -> None:
    model, batch = built(dropout=0.0, dense_start=0.0).train(), a_batch(b=2)
    for phase in model.phases[1:]:
        model.begin(phase)
        batch.query.mask[1] = False
        alone = FieldBatch(first(batch.context), first(batch.query))
        torch.manual_seed(0)
        both = built(dropout=0.0, dense_start=0.0).train()
        both.begin(phase)
        torch.manual_seed(0)
        together = both.loss(batch)["loss"]
        one = built(dropout=0.0, dense_start=0.0).train()
        one.begin(phase)
        torch.manual_seed(0)
        torch.testing.assert_close(one.loss(alone)["loss"], together)


def first(frames: Frames) -> Frames:
    names = ("position", "mask", "time", "value")
    return replace(frames, **{name: getattr(frames, name)[:1] for name in names})


def test_frames_that_a_phase_needs_are_asked_for() -> None:
    model, batch = built(), a_batch()
    for phase, leads, message in (
        ("teacher", (1, 2), "phase teacher learns from the dense frame at lead 0"),
        ("quantize", (3,), "phase quantize learns from the dense frame at lead 0"),
        ("predict", (0,), "phase predict learns from query frames at leads 0, 1, 2"),
        ("predict", (1, 2), "phase predict learns from query frames at leads 0, 1, 2"),
        ("predict", (0, 2), "phase predict learns from query frames at leads 0, 1, 2"),
    ):
        model.begin(phase)
        with pytest.raises(ValueError, match=message):
            model.loss(FieldBatch(batch.context, worlds.ahead(batch, *leads)))
    model.begin("teacher")
    lead_0 = model.loss(FieldBatch(batch.context, worlds.ahead(batch, 0)))["loss"]
    torch.testing.assert_close(model.loss(batch)["loss"], lead_0)
    with pytest.raises(ValueError, match="no values"):
        model.loss(FieldBatch(batch.context, replace(batch.query, value=None)))


# ---- answers


@pytest.mark.parametrize("head", HEADS)
def test_a_forecast_is_the_same_whatever_else_is_asked(head: dict[str, Any]) -> None:
    model, batch = built(**head), a_batch()
    whole = model.predict(batch.context, worlds.ahead(batch, 0, 1, 2, 9)).mean  # the horizon is 4
    for k, lead in enumerate((0, 1, 2, 9)):
        alone = model.predict(batch.context, worlds.ahead(batch, lead)).mean
        torch.testing.assert_close(alone[:, 0], whole[:, k], atol=1e-9, rtol=0)
    back = model.predict(batch.context, worlds.ahead(batch, 2, 0)).mean
    torch.testing.assert_close(back, whole[:, [2, 0]], atol=1e-9, rtol=0)


def test_windows_may_ask_for_different_leads() -> None:
    model, batch = built(), a_batch(b=2)
    query = worlds.ahead(batch, 0, 2)
    mixed = replace(query, time=torch.stack([query.time[0], query.time[1].flip(0)]))
    plain, answer = model.predict(batch.context, query).mean, model.predict(batch.context, mixed).mean
    torch.testing.assert_close(answer, torch.stack([plain[0], plain[1].flip(0)]), atol=1e-9, rtol=0)


def test_frame_0_is_what_the_sensors_say() -> None:
    model, batch = built().eval(), a_batch()
    coded, latents = model.coded(model.seen(model.sparse, batch.context))
    asked = batch.query
    expected = model.decoder(latents, asked.position[:, 0])
    torch.testing.assert_close(model.predict(batch.context, asked).mean[:, 0], expected, atol=1e-9, rtol=0)
    assert torch.equal(coded.vector, model.coder.embed(coded.index))


@pytest.mark.parametrize("lead", [0.5, -1.0])
def test_fractional_and_past_leads_are_refused(lead: float) -> None:
    batch = a_batch()
    with pytest.raises(ValueError, match=rf"whole frames >= 0, found {lead:g}"):
        built().predict(batch.context, worlds.ahead(batch, lead))


@CODES_AHEAD
def test_draws_repeat_and_cold_ones_are_greedy(head: str) -> None:
    batch = a_batch(s=4)
    greedy = built(head=head).predict(batch.context, batch.query)
    assert greedy.samples is None
    cold = built(head=head, temperature=1e-6, members=2).predict(batch.context, batch.query)
    assert cold.samples is not None
    torch.testing.assert_close(cold.samples, greedy.mean.expand(2, -1, -1, -1, -1))
    warm = built(head=head, temperature=2.0, members=3).predict(batch.context, batch.query)
    assert torch.equal(built(head=head, temperature=2.0, members=3).predict(batch.context, batch.query).mean, warm.mean)
    assert not torch.equal(built(head=head, temperature=2.0, members=3, seed=1).predict(batch.context, batch.query).mean, warm.mean)
    assert warm.samples is not None
    assert warm.samples.shape == (3, 3, 4, 15, 1)
    torch.testing.assert_close(warm.samples.mean(0), warm.mean)
    torch.testing.assert_close(warm.samples[0, :, 0], warm.samples[1, :, 0])  # frame 0 is given
    assert (warm.samples[0, :, 1:] - warm.samples[1, :, 1:]).abs().max() > 1e-6
    one = built(head=head, temperature=2.0, members=3).predict(first(batch.context), first(batch.query))
    torch.testing.assert_close(one.mean, warm.mean[:1], atol=1e-9, rtol=0)


@CODES_AHEAD
def test_soft_decoding_means_over_the_codes(head: str) -> None:
    batch = a_batch()
    hard, soft = (built(head=head, soft_decode=soft).predict(batch.context, batch.query).mean for soft in (False, True))
    torch.testing.assert_close(soft[:, 0], hard[:, 0], atol=1e-9, rtol=0)
    assert (soft[:, 1:] - hard[:, 1:]).abs().max() > 1e-6
    sure = built(head=head, soft_decode=True)
    with torch.no_grad():  # certain of one code: soft is hard
        sure.forecaster.head.weight.zero_()  # type: ignore[union-attr]
        sure.forecaster.head.bias[3] = 1e3  # type: ignore[union-attr]
    frames = sure.eval()._frames(batch.context, 2)
    torch.testing.assert_close(frames[:, 1:], sure.coder.quantizer.code[3].expand(3, 2, 4, -1))


def test_calendar_data_know_their_hour() -> None:
    info = worlds.stations(hours=60).info
    model, batch = built(info), a_batch(info)
    start = batch.context.time[:, -1]
    clock, later, noon = (model._clock(start + hours, 5) for hours in (0, 24 * 365.2425, 12))
    assert clock.shape[-1] == model.time.width + 4
    day = [model.time.width, model.time.width + 2]  # sine and cosine of the day
    torch.testing.assert_close(noon[..., day], -clock[..., day], atol=1e-9, rtol=0)
    torch.testing.assert_close(later[..., model.time.width + 1], clock[..., model.time.width + 1], atol=1e-3, rtol=0)
    assert built()._clock(start, 5).shape[-1] == model.time.width


@pytest.mark.parametrize("part", ["sparse", "coder", "decoder", "forecaster", "encoder"])
def test_a_checkpoint_without_a_part_is_refused(part: str) -> None:
    model = built()
    weights = {name: value for name, value in model.state_dict().items() if not name.startswith(part + ".")}
    assert len(weights) < len(model.state_dict())
    with pytest.raises(RuntimeError, match=f"Missing key.*{part}"):
        built().load_state_dict(weights)
    other = built(hidden=12)
    with pytest.raises(RuntimeError, match="size mismatch"):
        other.load_state_dict(model.state_dict())
