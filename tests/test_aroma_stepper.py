"""AROMA's stepper: the diffusion of its latents, what a step learns, and forecasts of many steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from models.aroma import diffusion
from models.aroma.model import Aroma
from models.aroma.stepper import LatentStepper
from models.contract import FieldBatch, Frames
from tests import worlds
from tests.tiny_aroma import SMALL, built


@pytest.mark.parametrize(
    ("min_noise", "expected"),
    [(1e-2, [0.99, 0.94405, 0.74066, 0]), (1e-3, [0.999, 0.98901, 0.89011, 0]), (1e-6, [0.999999, 0.999899, 0.9899, 0])],
)
def test_the_schedule_is_that_of_the_table(min_noise: float, expected: list[float]) -> None:
    plan = diffusion.schedule(min_noise, 3)
    torch.testing.assert_close(plan.alpha_bar, torch.tensor(expected, dtype=torch.float64), atol=1e-5, rtol=0)
    assert plan.alpha_bar[-1] == 0
    assert plan.levels == 4


@pytest.mark.parametrize("min_noise", [1e-2, 1e-3, 1e-6])
def test_a_velocity_gives_the_clean_value_back(min_noise: float) -> None:
    g = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(2, 4, 5, 3, generator=g, dtype=torch.float64)
    plan = diffusion.schedule(min_noise, 3)
    share = plan.at(torch.arange(4), clean)
    noisy, velocity = diffusion.noised(clean, noise, share), diffusion.velocity(clean, noise, share)
    torch.testing.assert_close(diffusion.recovered(noisy, velocity, share), clean, atol=1e-6, rtol=0)
    last, deviation = diffusion.posterior(clean, noisy, 0, plan)
    torch.testing.assert_close(last, clean, atol=1e-6, rtol=0)
    assert deviation == 0


def test_a_posterior_has_the_shares_of_the_level_below() -> None:
    """Through the posterior a noisy value gets the shares of signal and noise of the level below."""
    plan = diffusion.schedule(1e-2, 3)
    for level in (1, 2, 3):
        below, here = float(plan.alpha_bar[level - 1]), float(plan.alpha_bar[level])
        of_clean, _ = diffusion.posterior(torch.ones(1), torch.zeros(1), level, plan)
        of_noisy, deviation = diffusion.posterior(torch.zeros(1), torch.ones(1), level, plan)
        signal = float(of_clean) + float(of_noisy) * here**0.5
        noise = float(of_noisy) ** 2 * (1 - here) + deviation**2
        assert signal == pytest.approx(below**0.5, abs=1e-6)
        assert noise == pytest.approx(1 - below, abs=1e-6)


class Oracle(nn.Module):
    """A stepper that knows the next latents: they are 0.9 of those now, rolled by one token."""

    def __init__(self, plan: diffusion.Schedule, change: float = 0.0) -> None:
        super().__init__()
        self.plan, self.change, self.calls = plan, change, 0

    def forward(self, state: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        self.calls += 1
        target = follows(state) if not self.change else (follows(state) - state) * self.change
        signal, noise = self.plan.at(level, state)
        return (signal * noisy - target) / noise


def follows(latents: Tensor) -> Tensor:
    return 0.9 * latents.roll(1, -2)


@pytest.mark.parametrize("difference", [False, True])
def test_a_perfect_stepper_follows_the_truth_in_four_calls_a_step(difference: bool) -> None:
    batch = worlds.batch(worlds.torus_info(), s=4, dtype=torch.float64)
    model = built(mode="paper", difference=difference)
    oracle = model.stepper = Oracle(model.plan, 50.0 if difference else 0.0)  # type: ignore[assignment]
    answer = model.predict(batch.context, batch.query)
    assert oracle.calls == 3 * 4
    latents = model.latents(batch.context)[:, 0]
    for step in range(4):
        expected = model._decode(latents.unsqueeze(0), batch.query, step)[0][0]
        torch.testing.assert_close(answer.mean[:, step], expected, atol=1e-5, rtol=0)
        latents = follows(latents)


def test_before_training_the_stepper_gives_zero_and_its_loss_is_the_size_of_the_velocity() -> None:
    torch.manual_seed(0)
    batch = worlds.batch(worlds.torus_info(), t=3, dtype=torch.float64)
    batch.context.mask[:, :, :5] = True
    model = Aroma(Aroma.Config(**SMALL, mode="paper"), worlds.torus_info()).double()
    state, noisy = torch.randn(2, 3, 6, 3, dtype=torch.float64)
    assert not model.stepper(state, noisy, torch.arange(3)).any()
    model.begin("step")
    torch.manual_seed(5)
    loss = model.loss(batch)["loss"]
    torch.manual_seed(5)
    level, noise = torch.randint(4, (6,)), torch.randn(6, 6, 3, dtype=torch.float64)
    target = model.latents(batch.context)[:, 1:].flatten(0, 1)
    torch.testing.assert_close(loss, diffusion.velocity(target, noise, model.plan.at(level, target)).square().mean())


def test_each_parameter_of_a_fresh_stepper_learns_within_four_steps() -> None:
    batch = worlds.batch(worlds.torus_info(), t=3)
    torch.manual_seed(0)
    model = Aroma(Aroma.Config(**SMALL), worlds.torus_info()).train()
    model.begin("step")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0)
    for _ in range(4):
        optimizer.zero_grad()
        model.loss(batch)["loss"].backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if name.startswith("stepper.")}


def test_levels_tell_the_stepper_apart() -> None:
    torch.manual_seed(0)
    stepper = LatentStepper(4, 2, 16, 1, 2, 2, 4).double()
    for parameter in stepper.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(1, 4, 2, dtype=torch.float64)
    out = stepper(x.expand(4, -1, -1), x.expand(4, -1, -1), torch.arange(4))
    assert (out.unsqueeze(0) - out.unsqueeze(1)).flatten(2).norm(dim=-1).add(torch.eye(4)).min() > 1e-3
    torch.testing.assert_close(out[2:3], stepper(x, x, torch.tensor([2])))


# ---- phase step


def test_only_pairs_of_consecutive_frames_with_observations_count() -> None:
    batch = worlds.batch(worlds.torus_info(), t=4, dtype=torch.float64)
    model = built()
    model.begin("step")
    changed = batch.context.value.clone()  # type: ignore[union-attr]
    batch.context.mask[:, 1] = False
    late = replace(batch.context, time=torch.where(torch.arange(4) == 3, batch.context.time + 0.5, batch.context.time))
    assert model.loss(FieldBatch(late, batch.query))["loss"] == 0  # 0-1 and 1-2 lack observations, 2-3 are not one step apart
    only = model.loss(batch)["loss"]
    changed[:, 0] += 1.0
    assert model.loss(FieldBatch(replace(batch.context, value=changed), batch.query))["loss"] == only
    changed[:, 2] += 1.0
    assert model.loss(FieldBatch(replace(batch.context, value=changed), batch.query))["loss"] != only
    with pytest.raises(ValueError, match="context_frames"):
        model.loss(worlds.batch(worlds.torus_info(), t=1, dtype=torch.float64))


@pytest.mark.parametrize("standardise", ["channel", "token"])
@pytest.mark.parametrize("difference", [False, True])
def test_latents_are_standardised_by_what_training_saw(difference: bool, standardise: str) -> None:
    batches = [worlds.batch(worlds.torus_info(), b=4, t=3, seed=seed, dtype=torch.float64) for seed in range(3)]
    model = built(difference=difference, standardise=standardise).train()
    model.begin("step")
    for batch in batches:
        model.loss(batch)
    latents = torch.cat([model.latents(batch.context) for batch in batches])
    over = (0, 1) if standardise == "token" else (0, 1, 2)

    def check(standard: nn.Module, x: Tensor) -> None:
        like = x.mean(over)
        torch.testing.assert_close(standard(x).mean(over), torch.zeros_like(like), atol=1e-9, rtol=0)
        torch.testing.assert_close(standard(x).std(over, correction=0), torch.ones_like(like))

    check(model.state, latents)
    torch.testing.assert_close(model.state.undo(model.state(latents)), latents)
    if model.change is not None:
        check(model.change, latents[:, 1:] - latents[:, :-1])


def test_in_paper_mode_latents_stay_as_they_are() -> None:
    batch = worlds.batch(worlds.torus_info(), t=3, dtype=torch.float64)
    model = built(mode="paper").train()
    model.begin("step")
    model.loss(batch)
    latents = model.latents(batch.context)
    assert torch.equal(model.state(latents), latents)


def test_the_deterministic_ablation_learns_the_next_latents_in_one_call() -> None:
    batch = worlds.batch(worlds.torus_info(), t=2, s=2, dtype=torch.float64)
    batch.context.mask[:, :, :5] = True
    model = built(diffusion=False, mode="paper")
    model.begin("step")
    now, then = model.latents(batch.context).unbind(1)
    answer = model.stepper(now, torch.zeros_like(now), torch.tensor([0]))
    torch.testing.assert_close(model.loss(batch)["loss"], (answer - then).square().mean())
    ahead = model.predict(batch.context, batch.query)
    assert ahead.samples is None
    expected = model._decode(model.stepper(then, torch.zeros_like(then), torch.tensor([0])).unsqueeze(0), batch.query, 1)[0][0]
    torch.testing.assert_close(ahead.mean[:, 1], expected)
    with pytest.raises(ValueError, match="members"):
        Aroma.Config(diffusion=False, members=2)


# ---- predicting


def test_the_encoder_is_called_once_for_a_rollout(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = worlds.batch(worlds.torus_info(), t=3, s=5, dtype=torch.float64)
    model = built()
    calls = []
    forward = model.encoder.forward

    def counted(frames: Frames) -> tuple[Tensor, Tensor]:
        calls.append(frames.mask.shape)
        return forward(frames)

    monkeypatch.setattr(model.encoder, "forward", counted)
    model.predict(batch.context, batch.query)
    assert calls == [(3, 1, 20)]


def test_the_ensemble_is_its_members_and_seeds_decide_it() -> None:
    batch = worlds.batch(worlds.torus_info(), s=3, dtype=torch.float64)
    plain = {"noise": False}
    answer = built(**plain).predict(batch.context, batch.query)
    assert answer.samples is not None
    assert answer.samples.shape == (8, *answer.mean.shape)
    torch.testing.assert_close(answer.mean, answer.samples.mean(0))
    spread = answer.samples.std(0).amax((0, 2, 3))
    assert spread[0] < 1e-12
    assert (spread[1:] > 1e-4).all()
    again, fewer, other = (built(**plain, **c).predict(batch.context, batch.query).samples for c in ({}, {"members": 3}, {"seed": 1}))
    assert again is not None
    assert fewer is not None
    assert other is not None
    assert torch.equal(again, answer.samples)
    torch.testing.assert_close(fewer, answer.samples[:3])
    assert not torch.allclose(other[:, :, 1:], answer.samples[:, :, 1:], atol=1e-4)
    assert built(mode="paper").predict(batch.context, batch.query).samples is None


def test_a_member_does_not_depend_on_the_batch_nor_on_the_leads_asked() -> None:
    batch = worlds.batch(worlds.torus_info(), s=4, dtype=torch.float64)
    model = built(noise=False)
    together = model.predict(batch.context, batch.query).samples
    assert together is not None
    for b in range(3):

        def one(frames: Frames, part: slice, b: int = b) -> Frames:
            return Frames(frames.position[b : b + 1, part], frames.mask[b : b + 1, part], frames.time[b : b + 1, part],
                          value=frames.value[b : b + 1, part])  # type: ignore[index]  # fmt: skip

        alone = model.predict(one(batch.context, slice(None)), one(batch.query, slice(3, None))).samples
        torch.testing.assert_close(alone, together[:, b : b + 1, 3:], atol=1e-9, rtol=0)


def test_a_forecast_starts_from_the_last_frame_that_was_observed() -> None:
    batch = worlds.batch(worlds.torus_info(), t=3, s=3, dtype=torch.float64)
    model = built()
    batch.context.mask[1, 2] = False  # window 1 ends one frame earlier
    answer = model.predict(batch.context, batch.query).mean
    earlier = Frames(batch.context.position[:, :2], batch.context.mask[:, :2], batch.context.time[:, :2], batch.context.value[:, :2])  # type: ignore[index]
    expected = model.predict(earlier, batch.query).mean
    torch.testing.assert_close(answer[1], expected[1], atol=1e-9, rtol=0)
    assert not torch.allclose(answer[0], expected[0], atol=1e-4)


def test_leads_between_frames_and_in_the_past_are_refused() -> None:
    batch = worlds.batch(worlds.torus_info(), dtype=torch.float64)
    for shift, message in ((0.5, "whole frames"), (-1.0, "looks ahead only")):
        with pytest.raises(ValueError, match=message):
            built().predict(batch.context, replace(batch.query, time=batch.query.time + shift))


def test_a_field_in_any_chunks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    about = worlds.stations(hours=60).info
    batch = worlds.batch(about, t=3, s=3, dtype=torch.float64)
    model = built(about)
    whole = model.predict(batch.context, batch.query)
    monkeypatch.setattr("models.aroma.model._ROWS", 50)
    parts = model.predict(batch.context, batch.query)
    torch.testing.assert_close((parts.mean, parts.scale), (whole.mean, whole.scale), atol=1e-9, rtol=0)


def test_covariates_are_used() -> None:
    about = worlds.stations(hours=60).info
    batch = worlds.batch(about, dtype=torch.float64)
    assert batch.context.covariate is not None
    assert batch.query.covariate is not None
    weather = replace(batch.context, covariate=batch.context.covariate + 1)
    hour = replace(batch.query, covariate=batch.query.covariate + 1)
    for mode, uses_hour in (("improved", True), ("paper", False)):
        model = built(about, mode=mode)
        mean = model.predict(batch.context, batch.query).mean
        assert not torch.allclose(model.predict(weather, batch.query).mean, mean, atol=1e-4)
        assert torch.allclose(model.predict(batch.context, hour).mean, mean, atol=1e-9) is not uses_hour


def test_settings_that_cannot_be_are_refused() -> None:
    for changes, message in (
        ({"scales": (3, 3)}, "increasing"),
        ({"dropout": (0.2, 1.0)}, "shares"),
        ({"stepper_heads": 3}, "multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            Aroma.Config(**changes)
    with pytest.raises(ValueError, match="expected one of encode, step"):
        built().begin("fit")


def test_the_stepper_learns_how_latents_move() -> None:
    """A wave that moves a tenth of the domain a step, through an auto-encoder that is not trained: the next latents are learnt."""
    model = built(dtype=torch.float32, dropout=(), noise=False, stepper_width=32, encode_geometry=False, highest=1.0)
    axis = torch.arange(5) / 2.5 - 1.0
    place = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1).flatten(0, 1)

    def window(batch: int, seed: int) -> Frames:
        phase = torch.rand(batch, 1, 1, generator=torch.Generator().manual_seed(seed)) * 2
        time = torch.arange(2).double().expand(batch, -1)
        value = torch.sin(torch.pi * (place[:, 0] - 0.2 * time.float().unsqueeze(-1) - phase)).unsqueeze(-1)
        return Frames(place.expand(*value.shape[:3], 2), torch.ones(value.shape[:3], dtype=torch.bool), time, value)

    model.begin("step")
    model.train()
    optimizer = torch.optim.AdamW(model.stepper.parameters(), lr=1e-2, weight_decay=0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=150)
    for step in range(150):
        frames = window(64, step)
        optimizer.zero_grad()
        model.loss(FieldBatch(frames, frames))["loss"].backward()
        optimizer.step()
        schedule.step()
    now, then = model.eval().latents(window(64, 10_000)).unbind(1)
    with torch.no_grad():
        ahead = model._next(now.expand(8, -1, -1, -1), next(model._noise(now))).mean(0)
    assert (ahead - then).square().mean() < 0.2 * (now - then).square().mean()
