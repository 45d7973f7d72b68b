"""What every registered field model promises (models/contract.py), whatever is inside it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from safetensors.torch import load, save

from models import registry
from models.contract import TASKS, DatasetInfo, FieldBatch, FieldPrediction, Frames
from tests import tiny_aroma, worlds

LATENTS = {"latents": 16, "channels": 16, "token_width": 16, "query_width": 16, "rounds": 2, "self_layers": 1, "bands": 4, "highest": 4.0}
SMALL: dict[str, dict[str, Any]] = {
    "aroma": {**tiny_aroma.SMALL, "stepper_depth": 1, "ffn_factor": 1, "members": 2},
    "bsa_tnp": {"width": 8, "heads": 2, "head_width": 4, "blocks": 2, "factor": 2, "space_bases": 3, "time_bases": 2},
    "convcnp": {
        "horizon": 4,
        "frames": 3,
        "points_per_unit": 8,
        "width": 8,
        "layers": 2,
        "kernel_size": 3,
        "head_width": 16,
        "head_layers": 1,
    },
    "fno": {"horizon": 4, "frames": 3, "cells": 16, "width": 8, "modes": 3, "layers": 2, "head_width": 16},
    "cst": {"horizon": 4, "width": 16, "heads": 2, "layers": 2, "dummies": 6, "bands": 4, "dropout": 0.0, "jitter": 0.0, "mu": 1e-6},
    "dsq": {
        **LATENTS,
        "codes": 16,
        "code_width": 8,
        "codes_per_frame": 4,
        "hidden": 16,
        "residual_hidden": 8,
        "width": 16,
        "depth": 2,
        "heads": 2,
        "dropout": 0.0,
    },
    "scent": {
        "horizon": 4,
        "width": 16,
        "latents": 8,
        "heads": 2,
        "cen_layers": 1,
        "processor_layers": 1,
        "cn_layers": 1,
        "ffn_factor": 1,
        "group": 4,
        "bands": 4,
    },
    "senseiver": LATENTS,
}
LARGER: dict[str, dict[str, Any]] = {
    "bsa_tnp": {"width": 16, "embed": True, "minimum_std": 0.3},  # by heart is by place; a smaller deviation makes the likelihood steep
    "aroma": {"width": 32, "channels": 8, "head_width": 16, "field_width": 32, "dropout": (0.0,)},
    "convcnp": {"width": 32, "kernel_size": 5, "head_width": 64},
    "fno": {"width": 24, "modes": 6, "head_width": 32},
    "dsq": {"channels": 32, "query_width": 32, "codes": 32, "hidden": 32},
    "senseiver": {"channels": 32, "query_width": 32},
    "cst": {"width": 32, "attention_dropout": 0.0, "order": 0},
    "scent": {"width": 32, "latents": 16, "ffn_factor": 2, "processor_layers": 2, "bands": 8},
}

pytestmark = pytest.mark.parametrize("name", registry.FIELD_MODELS)


@pytest.fixture(params=["torus", "stations"])
def info(request: pytest.FixtureRequest) -> DatasetInfo:
    return worlds.torus_info() if request.param == "torus" else worlds.stations(hours=60).info


def built(name: str, info: DatasetInfo, seed: int = 0, head: float = 0.3, **changes: Any) -> Any:
    """A small float64 model whose last layers are not at their start of zero, so that its answers depend on everything."""
    torch.manual_seed(seed)
    cls = registry.load(name)
    model = cls(cls.Config(**{**SMALL[name], **changes}), info).double().eval()
    return worlds.stirred(model, head) if head else model


def flat(prediction: FieldPrediction) -> torch.Tensor:
    samples = None if prediction.samples is None else prediction.samples.movedim(0, -1)
    parts = [prediction.mean, prediction.scale, prediction.quantiles, samples]
    return torch.cat([p.flatten(3) for p in parts if p is not None], -1)


def wider(frames: Frames, by: int, fill: float) -> Frames:
    """`by` more observations in every frame, all masked and holding `fill`."""

    def pad(x: torch.Tensor, value: float) -> torch.Tensor:
        return torch.cat([x, x.new_full((*x.shape[:2], by, *x.shape[3:]), value)], 2)

    assert frames.value is not None
    covariate = None if frames.covariate is None else pad(frames.covariate, fill)
    return replace(
        frames, position=pad(frames.position, fill), mask=pad(frames.mask, False), value=pad(frames.value, fill), covariate=covariate
    )


@pytest.mark.parametrize("t", [1, 3])
@pytest.mark.parametrize("fill", [0.0, 7.0, float("nan")])
def test_padding_changes_nothing(name: str, info: DatasetInfo, t: int, fill: float) -> None:
    batch = worlds.batch(info, t=t, s=leads(name), dtype=torch.float64)
    model = built(name, info)
    expected = flat(model.predict(batch.context, batch.query))
    torch.testing.assert_close(flat(model.predict(wider(batch.context, 3, fill), batch.query)), expected, atol=1e-6, rtol=0)
    garbage = torch.where(batch.context.mask[..., None], batch.context.value, fill)
    masked = replace(batch.context, value=garbage)
    torch.testing.assert_close(flat(model.predict(masked, batch.query)), expected, atol=1e-6, rtol=0)


def test_the_order_of_observations_does_not_matter(name: str, info: DatasetInfo) -> None:
    batch = worlds.batch(info, t=2, s=leads(name), dtype=torch.float64)
    model = built(name, info)
    order = torch.randperm(batch.context.mask.shape[2], generator=torch.Generator().manual_seed(1))
    shuffled = batch.context.points(order)  # type: ignore[arg-type]
    expected = flat(model.predict(batch.context, batch.query))
    torch.testing.assert_close(flat(model.predict(shuffled, batch.query)), expected, atol=1e-6, rtol=0)


def test_mixed_sizes_in_a_batch_equal_separate_passes(name: str, info: DatasetInfo) -> None:
    batch = worlds.batch(info, s=leads(name), dtype=torch.float64)
    model = built(name, info)
    for b, few in enumerate((20, 3, 9)):
        batch.context.mask[b, :, few:] = False
    together = flat(model.predict(batch.context, batch.query))
    for b, few in enumerate((20, 3, 9)):
        alone = FieldBatch(one(batch.context, b).points(slice(few)), one(batch.query, b))
        torch.testing.assert_close(flat(model.predict(alone.context, alone.query)), together[b : b + 1], atol=1e-6, rtol=0)


def one(frames: Frames, b: int) -> Frames:
    names = ("position", "mask", "time", "value", "covariate", "sensor", "background", "background_scale")
    return replace(frames, **{name: getattr(frames, name)[b : b + 1] for name in names if getattr(frames, name) is not None})


def test_an_answer_does_not_depend_on_what_else_is_asked(name: str, info: DatasetInfo) -> None:
    batch = worlds.batch(info, s=leads(name), dtype=torch.float64)
    model = built(name, info)
    whole = model.predict(batch.context, batch.query)
    parts = [model.predict(batch.context, batch.query.points(slice(i, i + 4))) for i in range(0, 15, 4)]
    torch.testing.assert_close(flat(FieldPrediction.concatenate(parts)), flat(whole), atol=1e-6, rtol=0)


def test_no_observation_at_all_gives_a_finite_answer(name: str, info: DatasetInfo) -> None:
    batch = worlds.batch(info, s=leads(name), dtype=torch.float64)
    batch.context.mask[0] = False
    model = built(name, info).train()
    prediction = model.predict(batch.context, batch.query)
    assert flat(prediction).isfinite().all()
    model.loss(batch)["loss"].backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_every_parameter_learns_in_some_phase_and_only_what_a_phase_trains_changes(name: str, info: DatasetInfo) -> None:
    batch = worlds.batch(info, t=2, s=leads(name), dtype=torch.float64)
    model = built(name, info).train()
    batch = with_background(batch) if model.corrects else batch
    learnt: set[str] = set()
    for number, phase in enumerate(model.phases):
        torch.manual_seed(number)
        model.begin(phase)
        trained = {key for key, p in model.named_parameters() if p.requires_grad}
        assert trained, f"phase {phase} trains nothing"
        model.zero_grad()
        model.loss(batch)["loss"].backward()
        moved = {key for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert moved == trained, f"phase {phase}: idle {sorted(trained - moved)}, frozen but with a gradient {sorted(moved - trained)}"
        learnt |= moved
    assert learnt == {key for key, _ in model.named_parameters()}


def leads(name: str) -> int:
    """So many leads 0, 1, ... a batch may ask of this model."""
    return 3 if "forecast" in registry.load(name).tasks else 1


def with_background(batch: FieldBatch, scale: float = 0.4) -> FieldBatch:
    assert batch.query.value is not None
    background = 0.8 * batch.query.value + 0.1
    scales = scale * (1.5 + torch.sin(3 * background))
    return FieldBatch(batch.context, replace(batch.query, background=background, background_scale=scales))


def test_untrained_it_is_its_background(name: str, info: DatasetInfo) -> None:
    if not registry.load(name).corrects:
        pytest.skip(f"{name} takes no background")
    batch = with_background(worlds.batch(info, s=leads(name), dtype=torch.float64))
    prediction = built(name, info, head=0).predict(batch.context, batch.query)
    assert batch.query.background is not None
    torch.testing.assert_close(prediction.mean, batch.query.background)


def test_it_can_learn_one_window_by_heart(name: str) -> None:
    info = worlds.torus_info()
    # What follows a window is not in it: where the last of several phases learns to step, the others are asked for the frame they see.
    phases = registry.load(name).phases
    batch = worlds.batch(info, b=1, n=20, s=1 if len(phases) > 1 else leads(name), q=20)
    model = built(name, info, head=0, **LARGER[name]).float().train()
    for phase in phases[:-1] or phases:
        model.begin(phase)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=4e-3, weight_decay=0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=300)
        for _ in range(300):
            optimizer.zero_grad()
            model.loss(batch)["loss"].backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
    prediction = model.predict(batch.context, batch.query)
    assert batch.query.value is not None
    known = batch.query.mask[..., None]
    error = ((prediction.mean - batch.query.value) * known).square().sum() / (batch.query.value * known).square().sum()
    assert error < 1e-3


def test_saved_and_loaded_it_answers_the_same(name: str, info: DatasetInfo) -> None:
    batch = worlds.batch(info, s=leads(name), dtype=torch.float64)
    model, other = built(name, info), built(name, info, seed=1)
    other.load_state_dict(load(save(model.state_dict())))
    assert torch.equal(flat(other.predict(batch.context, batch.query)), flat(model.predict(batch.context, batch.query)))
    again = type(model.config).model_validate(model.config.model_dump(mode="json"))
    assert again == model.config


def test_seeds_decide_everything(name: str, info: DatasetInfo) -> None:
    batch = worlds.batch(info, s=leads(name))

    def trained(seed: int) -> torch.Tensor:
        model = built(name, info, seed, head=0).float().train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            torch.manual_seed(step)
            optimizer.zero_grad()
            model.loss(batch)["loss"].backward()
            optimizer.step()
        return flat(model.predict(batch.context, batch.query))

    assert torch.equal(trained(0), trained(0))
    assert not torch.equal(trained(0), trained(1))


def test_predicting_leaves_the_model_and_the_random_state_alone(name: str, info: DatasetInfo) -> None:
    batch = worlds.batch(info, s=leads(name), dtype=torch.float64)
    model = built(name, info).train()
    before = torch.get_rng_state()
    first = flat(model.predict(batch.context, batch.query))
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(flat(model.predict(batch.context, batch.query)), first)


def test_what_is_not_asked_does_not_count(name: str, info: DatasetInfo) -> None:
    batch = worlds.batch(info, s=leads(name), dtype=torch.float64)
    model = built(name, info)
    assert batch.query.value is not None
    other = replace(batch.query, value=torch.where(batch.query.mask[..., None], batch.query.value, 99.0))
    assert model.loss(FieldBatch(batch.context, other))["loss"] == model.loss(batch)["loss"]


def test_tasks_are_known(name: str, info: DatasetInfo) -> None:
    assert built(name, info).tasks <= set(TASKS)
