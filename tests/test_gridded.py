"""What the models on a grid share: frames, leads, covariates, background, streaming (models/gridded.py)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from models import gridded
from models.contract import DatasetInfo, FieldBatch
from models.convcnp.model import ConvCnp
from models.fno.model import Fno
from tests import worlds

SMALL: dict[Any, dict[str, Any]] = {
    Fno: {"horizon": 4, "frames": 3, "cells": 16, "width": 6, "modes": 3, "layers": 2, "head_width": 8},
    ConvCnp: {
        "horizon": 4,
        "frames": 3,
        "points_per_unit": 6,
        "width": 6,
        "layers": 2,
        "kernel_size": 3,
        "head_width": 8,
        "head_layers": 1,
    },
}
pytestmark = pytest.mark.parametrize("kind", [Fno, ConvCnp])
STATIONS = worlds.stations(hours=60).info


def built(kind: Any, info: DatasetInfo, **changes: Any) -> Any:
    """A float64 model whose answers depend on everything."""
    torch.manual_seed(0)
    model = kind(kind.Config(**{**SMALL[kind], **changes}), info).double()
    return worlds.stirred(model)


def asked(info: DatasetInfo, **shape: int) -> FieldBatch:
    return worlds.batch(info, dtype=torch.float64, **shape)


def test_a_short_context_is_one_whose_early_frames_are_empty(kind: Any) -> None:
    batch, model = asked(STATIONS, t=3), built(kind, STATIONS)
    batch.context.mask[:, 0] = False
    short = gridded._frames(batch.context, slice(1, None))
    short = replace(short, value=batch.context.value[:, 1:])  # type: ignore[index]
    torch.testing.assert_close(model.predict(short, batch.query).mean, model.predict(batch.context, batch.query).mean)


def test_a_longer_context_than_the_network_reads_is_an_error(kind: Any) -> None:
    batch = asked(STATIONS, t=4)
    with pytest.raises(ValueError, match="4 frames, the network reads 3: set `frames` to 4"):
        built(kind, STATIONS).predict(batch.context, batch.query)


@pytest.mark.parametrize("mode", ["paper", "improved"])
def test_leads_may_be_fractions_and_answers_move_smoothly_with_them(kind: Any, mode: str) -> None:
    batch, model = asked(worlds.torus_info(), s=1), built(kind, worlds.torus_info(), mode=mode)

    def at(lead: float) -> torch.Tensor:
        return model.predict(batch.context, replace(batch.query, time=batch.context.time[:, -1:] + lead)).mean

    assert (at(2.5) - at(2.0)).abs().max() > 1e-3
    assert (at(2.5 + 1e-5) - at(2.5)).abs().max() < 1e-3
    assert at(0.0).isfinite().all()


@pytest.mark.parametrize("lead", [-1.0, 5.0])
def test_leads_it_is_not_made_for_are_an_error(kind: Any, lead: float) -> None:
    batch, model = asked(worlds.torus_info(), s=1), built(kind, worlds.torus_info())
    query = replace(batch.query, time=batch.context.time[:, -1:] + lead)
    with pytest.raises(ValueError, match="answers 0 to horizon 4"):
        model.predict(batch.context, query)
    with pytest.raises(ValueError, match="answers 0 to horizon 4"):
        model.loss(FieldBatch(batch.context, query))


def test_training_and_prediction_give_the_same_and_streaming_changes_nothing(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, model = asked(STATIONS, t=2, s=4), built(kind, STATIONS)
    whole = model.predict(batch.context, batch.query).mean
    error = (whole - batch.query.value) * batch.query.mask[..., None]
    assert torch.isclose(model.loss(batch)["mse"], error.square().sum() / batch.query.mask.sum())
    monkeypatch.setattr(gridded, "_NODES", 1)
    monkeypatch.setattr(gridded, "_POINTS", 7)
    torch.testing.assert_close(model.predict(batch.context, batch.query).mean, whole)


@pytest.mark.parametrize("which", ["context", "query"])
def test_covariates_are_seen(kind: Any, which: str) -> None:
    batch, model = asked(STATIONS), built(kind, STATIONS)
    before = model.predict(batch.context, batch.query).mean
    changed = {part: getattr(batch, part) for part in ("context", "query")}
    changed[which] = replace(changed[which], covariate=changed[which].covariate + 1)
    assert not torch.allclose(model.predict(changed["context"], changed["query"]).mean, before, atol=1e-3)


def test_a_gaussian_starts_as_its_background_and_its_loss_is_the_likelihood(kind: Any) -> None:
    info = worlds.torus_info()
    batch = asked(info)
    assert batch.query.value is not None
    query = replace(batch.query, background=batch.query.value + 0.2, background_scale=torch.full_like(batch.query.value, 0.4))
    model = kind(kind.Config(**SMALL[kind], head="gaussian"), info).double()
    prediction = model.predict(batch.context, query)
    assert prediction.scale is not None
    torch.testing.assert_close(prediction.scale, query.background_scale)
    expected = 0.5 * 0.25 + math.log(0.4) + 0.5 * math.log(2 * math.pi)
    assert model.loss(FieldBatch(batch.context, query))["loss"].item() == pytest.approx(expected)
    crps = kind(kind.Config(**SMALL[kind], head="gaussian", loss="crps"), info).double()
    expected = 0.4 * (0.5 * math.erf(0.5 / 2**0.5) + 2 * math.exp(-0.125) / (2 * math.pi) ** 0.5 - math.pi**-0.5)
    assert crps.loss(FieldBatch(batch.context, query))["loss"].item() == pytest.approx(expected)


def test_losses_fit_their_head(kind: Any) -> None:
    assert kind.Config(horizon=1, head="mean").loss == "mse"
    assert kind.Config(horizon=1, head="gaussian").loss == "nll"
    with pytest.raises(ValueError, match="loss nll does not fit head mean"):
        kind.Config(horizon=1, head="mean", loss="nll")


def test_it_trains_under_mixed_precision(kind: Any) -> None:
    batch = worlds.batch(worlds.torus_info())
    model = kind(kind.Config(**SMALL[kind]), worlds.torus_info())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model.loss(batch)["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_it_works_along_a_line_and_in_a_volume(kind: Any) -> None:
    for space in (("x",), ("x", "y", "z")):
        info = worlds.torus_info(space=space, centre=(0.5,) * len(space))
        batch, model = asked(info), built(kind, info)
        model.loss(batch)["loss"].backward()
        assert all(p.grad is not None and p.grad.any() for p in model.parameters())
        assert model.predict(batch.context, batch.query).mean.shape == (*batch.query.mask.shape, 1)
