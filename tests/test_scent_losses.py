"""SCENT's heads before training and their losses, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import scoringrules
import torch

from tests.test_model_contract import with_background
from tests.tiny_scent import a_batch, built


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
