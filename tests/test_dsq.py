"""DSQ's own promises: the published sizes, codes, phases, causality, decoding."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from models.contract import DatasetInfo, FieldBatch, Frames
from models.dsq.frame_transformer import IndexTransformer, RegressTransformer
from models.dsq.latent_codes import LatentCodes, halvings
from models.dsq.model import Dsq
from models.dsq.quantizer import Quantizer, perplexity, usage
from tests import worlds

SIZES = {"latents": 16, "channels": 8, "token_width": 8, "query_width": 8, "rounds": 2, "self_layers": 1, "bands": 4, "highest": 4.0}
CODES = {"codes": 12, "code_width": 6, "codes_per_frame": 4, "hidden": 8, "residual_hidden": 4}
TIME = {"width": 16, "depth": 2, "heads": 2, "projection": 20, "horizon": 4, "time_bands": 3}
SMALL: dict[str, Any] = {**SIZES, **CODES, **TIME}
PLANE = worlds.torus_info(geometry="plane")
HEADS = [{}, {"mode": "paper"}, {"head": "regress"}]


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def built(info: DatasetInfo = PLANE, seed: int = 0, **changes: Any) -> Dsq:
    """With codes drawn from the features of some windows, so that what is seen decides which are chosen."""
    torch.manual_seed(seed)
    model = Dsq(Dsq.Config(**{**SMALL, **changes}), info).double()
    some = a_batch(info, b=6, s=1)
    with torch.no_grad():
        latents = torch.cat([model.seen(model.encoder, some.query), model.seen(model.sparse, some.context)])
        model.coder.quantizer.code.copy_(model.coder.features(latents)[torch.arange(12), torch.arange(12) % 4])
    return model


def a_batch(info: DatasetInfo = PLANE, **sizes: int) -> FieldBatch:
    return worlds.batch(info, **{"s": 3, **sizes}, dtype=torch.float64)


def at_leads(batch: FieldBatch, *leads: float) -> Frames:
    """The first query frame, asked at other leads."""

    def again(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[:, :1].expand(-1, len(leads), *x.shape[2:])

    time = batch.context.time[:, -1:] + torch.tensor(leads, dtype=torch.float64)
    return Frames(again(batch.query.position), again(batch.query.mask), time, again(batch.query.value))  # type: ignore[arg-type]


def some_codes(model: Dsq, frames: int = 3) -> tuple[IndexTransformer, Tensor, Tensor]:
    model.eval()
    c, batch = model.config, a_batch()
    assert isinstance(model.forecaster, IndexTransformer)
    codes = torch.randint(0, c.codes, (3, frames, c.codes_per_frame), generator=torch.Generator().manual_seed(0))
    return model.forecaster, codes, model._clock(batch.context.time[:, -1], frames)


# ---- sizes


def test_parameters_of_the_default_and_the_released_setting() -> None:
    with torch.device("meta"):
        ours = Dsq(Dsq.Config(), PLANE)
        released = Dsq(Dsq.Config(mode="released"), PLANE)
        wide = Dsq(Dsq.Config(mode="released", hidden=4096), PLANE)
    assert (count(ours.encoder), count(ours.decoder)) == (133_152, 22_993)
    codebook = ours.coder.quantizer.code.numel()
    assert count(ours.coder) + codebook == 770_672
    assert 10.5e6 < count(ours.forecaster) < 11.5e6
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
    ({"head": "regress", "soft_decode": True}, "head regress has no probabilities"),
    ({"head": "regress", "temperature": 1.0}, "head regress has no probabilities"),
    ({"code": 3}, "code"),
]


@pytest.mark.parametrize(("wrong", "message"), WRONG)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Dsq.Config(**wrong)


# ---- quantiser


def test_the_output_is_the_nearest_code() -> None:
    torch.manual_seed(0)
    quantizer, z = Quantizer(12, 6, 0.25, None, 0.0).double(), 0.1 * torch.randn(5, 4, 6, dtype=torch.float64)
    coded = quantizer(z)
    distance = (z.unsqueeze(-2) - quantizer.code).square().sum(-1)
    assert torch.equal(coded.index, distance.argmin(-1))
    assert torch.equal(coded.vector, quantizer.code[coded.index])
    expected = 1.25 * (z - coded.vector).square().mean(-1)
    torch.testing.assert_close(coded.distance, expected)


def test_gradients_go_straight_through_and_as_in_the_loss() -> None:
    torch.manual_seed(0)
    quantizer, z = Quantizer(12, 6, 0.25, None, 0.0).double(), torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn_like(z)
    coded = quantizer(z)
    (coded.vector * weight).sum().backward(retain_graph=True)
    assert torch.equal(z.grad, weight)  # type: ignore[arg-type]
    assert quantizer.code.grad is None
    z.grad = None
    coded.distance.sum().backward()
    miss = (z - quantizer.code[coded.index]).detach() * 2 / 6
    torch.testing.assert_close(z.grad, 0.25 * miss)
    expected = torch.zeros_like(quantizer.code).index_add(0, coded.index.flatten(), -miss.flatten(0, 1))
    torch.testing.assert_close(quantizer.code.grad, expected)


def test_codes_are_moving_averages_of_what_chose_them() -> None:
    torch.manual_seed(0)
    quantizer = Quantizer(4, 3, 0.25, 0.9, 0.0).double()
    sums, uses = torch.zeros(4, 3, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    for _ in range(3):
        z = torch.randn(10, 2, 3, dtype=torch.float64)
        index = quantizer(z, learn=True).index
        for code in range(4):
            mine = z[index == code]
            sums[code] = 0.9 * sums[code] + 0.1 * mine.sum(0)
            uses[code] = 0.9 * uses[code] + 0.1 * len(mine)
        chosen = uses > 0
        torch.testing.assert_close(quantizer.code[chosen], (sums / uses.unsqueeze(-1))[chosen])
    before = quantizer.code.clone()
    quantizer(z)
    quantizer(z, known=torch.zeros(10, dtype=torch.bool), learn=True)
    quantizer.eval()(z, learn=True)
    assert torch.equal(quantizer.code, before)


def test_rows_that_are_not_known_do_not_move_the_codes() -> None:
    z = torch.randn(10, 2, 3, generator=torch.Generator().manual_seed(0))
    known = torch.arange(10) < 6
    after = []
    for part, mask in ((z, known), (z[:6], None)):
        torch.manual_seed(1)
        quantizer = Quantizer(4, 3, 0.25, 0.9, 0.1)
        quantizer(part, mask, learn=True)
        after.append(quantizer.code)
    torch.testing.assert_close(after[0], after[1])


@pytest.mark.parametrize("decay", [None, 0.9])
def test_unused_codes_start_again_at_vectors_of_the_batch(decay: float | None) -> None:
    def restarted(seed: int) -> Tensor:
        torch.manual_seed(0)
        quantizer = Quantizer(32, 3, 0.25, decay, 0.1)
        z = 5 + torch.randn(40, 2, 3)
        torch.manual_seed(seed)
        quantizer(z, learn=True)
        away = (quantizer.code.detach().unsqueeze(1) - z.flatten(0, 1)).abs().amax(-1).amin(-1)
        assert int((away == 0).sum()) >= 29  # all but those few that were nearest at the start
        assert usage(quantizer.eval()(z).index, 32) > 0.7
        return quantizer.code.detach()

    assert torch.equal(restarted(1), restarted(1))
    assert not torch.equal(restarted(1), restarted(2))


def test_perplexity_and_usage_in_closed_form() -> None:
    assert float(perplexity(torch.arange(8), 8)) == pytest.approx(8)
    assert float(perplexity(torch.zeros(5, dtype=torch.int64), 8)) == pytest.approx(1)
    assert float(perplexity(torch.tensor([0, 0, 0, 1]), 8)) == pytest.approx(math.exp(0.75 * math.log(4 / 3) + 0.25 * math.log(4)))
    assert float(usage(torch.tensor([0, 0, 3]), 8)) == 0.25


def test_the_codebook_stays_in_use() -> None:
    """1,000 steps on latents that lie around 40 points: perplexity above 0.3 V, and no code is unused for 500 steps."""
    torch.manual_seed(0)
    quantizer = Quantizer(32, 4, 0.25, 0.99, 0.1)
    coder = LatentCodes(4, 4, 1, 4, 2, 4, quantizer, centred=True)
    points = 3 * torch.randn(40, 4, 4)
    optimizer = torch.optim.SGD(coder.parameters(), lr=0.05)
    last = torch.zeros(32, dtype=torch.int64)
    longest, used = 0, []
    for step in range(1000):
        z = points[torch.randint(0, 40, (64,))] + 0.1 * torch.randn(64, 4, 4)
        coder.observe(z)
        coded = quantizer(coder.features(z), learn=True)
        loss = (coder.unit(coder.latents(coded.vector)) - coder.unit(z)).square().mean() + coded.distance.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        last[coded.index.flatten()] = step
        longest = max(longest, int((step - last).max()))
        used.append(coded.index)
    assert longest < 500
    assert perplexity(torch.stack(used[-50:]), 32) > 0.3 * 32


# ---- latents as codes


def test_latents_and_features_have_their_shapes_and_the_mean_is_not_coded() -> None:
    torch.manual_seed(0)
    coder = LatentCodes(64, 5, 4, 8, 4, 6, Quantizer(12, 6, 0.25, None, 0.0), centred=True)
    z = 7 + 2 * torch.randn(500, 64, 5)
    coder.observe(z)
    assert float(coder.unit(z).mean()) == pytest.approx(0, abs=1e-4)
    assert float(coder.unit(z).std()) == pytest.approx(1, abs=1e-2)
    features = coder.features(z[:3])
    assert features.shape == (3, 4, 6)
    assert coder.latents(features).shape == (3, 64, 5)
    shifted = LatentCodes(64, 5, 4, 8, 4, 6, Quantizer(12, 6, 0.25, None, 0.0), centred=True)
    shifted.load_state_dict(coder.state_dict())
    shifted.mean += torch.randn(64, 5)
    torch.testing.assert_close(shifted.features(z[:3] + shifted.mean - coder.mean), features, atol=1e-5, rtol=0)


# ---- transformer of indices


def test_logits_depend_on_earlier_codes_alone() -> None:
    forecaster, codes, clock = some_codes(built())
    before = forecaster(codes, clock)
    assert before.shape == (3, 2, 4, 12)
    for frame, place in ((0, 0), (0, 3), (1, 0), (1, 2), (2, 1)):
        other = codes.clone()
        other[:, frame, place] = (other[:, frame, place] + 1) % 12
        moved = (forecaster(other, clock) - before).abs().amax((0, 3)).flatten() > 1e-9  # [K*G]
        position = (frame - 1) * 4 + place
        assert not moved[: max(0, position + 1)].any()
        assert moved[max(0, position + 1) :].all()


def test_decoding_with_kept_keys_equals_the_whole_pass() -> None:
    forecaster, codes, clock = some_codes(built(), frames=6)
    out, likely = forecaster.continued(codes[:, 0], clock, lambda logits: logits.argmax(-1))
    assert torch.equal(out[:, 0], codes[:, 0])
    logits = forecaster(out, clock)
    torch.testing.assert_close(likely, logits.softmax(-1), atol=1e-10, rtol=0)
    assert torch.equal(out[:, 1:], logits.argmax(-1))


def test_frames_of_latents_continue_as_in_the_whole_pass() -> None:
    model = built(head="regress").eval()
    forecaster = model.forecaster
    assert isinstance(forecaster, RegressTransformer)
    clock, first = model._clock(a_batch().context.time[:, -1], 4), torch.randn(3, 16, 8, dtype=torch.float64)
    out = forecaster.continued(first, clock)
    token = forecaster.project(first.flatten(1)).unsqueeze(1)
    for _ in range(3):  # without a cache, from the start each time
        token = torch.cat([token, forecaster.trunk(token + forecaster.clock(clock[:, : token.shape[1]]))[:, -1:]], 1)
    torch.testing.assert_close(out[:, 1:].flatten(2), forecaster.unproject(token[:, 1:]), atol=1e-10, rtol=0)
    torch.testing.assert_close(forecaster(out, clock)[0][:, 0], out[:, 1], atol=1e-10, rtol=0)


def test_at_the_start_all_codes_are_alike_and_one_sequence_can_be_learnt() -> None:
    torch.manual_seed(0)
    forecaster = IndexTransformer(256, 4, 7, 32, 2, 2, 0.0)
    codes, clock = torch.randint(0, 256, (1, 5, 4)), torch.randn(1, 5, 7)

    def entropy() -> Tensor:
        return torch.nn.functional.cross_entropy(forecaster(codes, clock).flatten(0, 2), codes[:, 1:].flatten())

    assert entropy().item() == pytest.approx(math.log(256), abs=0.1)
    optimizer = torch.optim.Adam(forecaster.parameters(), lr=3e-3)
    for _ in range(120):
        optimizer.zero_grad()
        entropy().backward()
        optimizer.step()
    assert entropy() < 0.05


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
            model.loss(FieldBatch(batch.context, at_leads(batch, *leads)))
    model.begin("teacher")
    lead_0 = model.loss(FieldBatch(batch.context, at_leads(batch, 0)))["loss"]
    torch.testing.assert_close(model.loss(batch)["loss"], lead_0)
    with pytest.raises(ValueError, match="no values"):
        model.loss(FieldBatch(batch.context, replace(batch.query, value=None)))


# ---- answers


@pytest.mark.parametrize("head", HEADS)
def test_a_forecast_is_the_same_whatever_else_is_asked(head: dict[str, Any]) -> None:
    model, batch = built(**head), a_batch()
    whole = model.predict(batch.context, at_leads(batch, 0, 1, 2, 9)).mean  # the horizon is 4
    for k, lead in enumerate((0, 1, 2, 9)):
        alone = model.predict(batch.context, at_leads(batch, lead)).mean
        torch.testing.assert_close(alone[:, 0], whole[:, k], atol=1e-9, rtol=0)
    back = model.predict(batch.context, at_leads(batch, 2, 0)).mean
    torch.testing.assert_close(back, whole[:, [2, 0]], atol=1e-9, rtol=0)


def test_windows_may_ask_for_different_leads() -> None:
    model, batch = built(), a_batch(b=2)
    query = at_leads(batch, 0, 2)
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
        built().predict(batch.context, at_leads(batch, lead))


def test_draws_repeat_and_cold_ones_are_greedy() -> None:
    batch = a_batch(s=4)
    greedy = built().predict(batch.context, batch.query)
    assert greedy.samples is None
    cold = built(temperature=1e-6, members=2).predict(batch.context, batch.query)
    assert cold.samples is not None
    torch.testing.assert_close(cold.samples, greedy.mean.expand(2, -1, -1, -1, -1))
    warm = built(temperature=2.0, members=3).predict(batch.context, batch.query)
    assert torch.equal(built(temperature=2.0, members=3).predict(batch.context, batch.query).mean, warm.mean)
    assert not torch.equal(built(temperature=2.0, members=3, seed=1).predict(batch.context, batch.query).mean, warm.mean)
    assert warm.samples is not None
    assert warm.samples.shape == (3, 3, 4, 15, 1)
    torch.testing.assert_close(warm.samples.mean(0), warm.mean)
    torch.testing.assert_close(warm.samples[0, :, 0], warm.samples[1, :, 0])  # frame 0 is given
    assert (warm.samples[0, :, 1:] - warm.samples[1, :, 1:]).abs().max() > 1e-6
    one = built(temperature=2.0, members=3).predict(first(batch.context), first(batch.query))
    torch.testing.assert_close(one.mean, warm.mean[:1], atol=1e-9, rtol=0)


def test_soft_decoding_means_over_the_codes() -> None:
    batch = a_batch()
    hard, soft = built().predict(batch.context, batch.query).mean, built(soft_decode=True).predict(batch.context, batch.query).mean
    torch.testing.assert_close(soft[:, 0], hard[:, 0], atol=1e-9, rtol=0)
    assert (soft[:, 1:] - hard[:, 1:]).abs().max() > 1e-6
    sure = built(soft_decode=True)
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
