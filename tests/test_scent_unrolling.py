"""SCENT warp-unrolled: jumps of a horizon, what they read, and what cannot be unrolled."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.contract import FieldBatch, Frames
from models.scent.model import Scent
from tests import worlds
from tests.test_model_contract import flat, with_background
from tests.tiny_scent import a_batch, built


def evaluations(model: Scent, batch: FieldBatch, *leads: float) -> int:
    calls = 0
    original = model._direct

    def counted(context: Frames, query: Frames) -> Any:
        nonlocal calls
        calls += 1
        return original(context, query)

    model._direct = counted  # type: ignore[method-assign]
    model.predict(batch.context, worlds.ahead(batch, *leads))
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
    query = worlds.ahead(batch, 2, 7, 8)
    got = model.predict(c, query).mean
    within, beyond = slice(0, 1), slice(1, 3)
    direct = model.predict(c, worlds.ahead(batch, 2)).mean
    later = model.predict(jumped, replace(worlds.ahead(batch, 7, 8))).mean
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
    query = replace(
        worlds.ahead(batch, 3, 6), time=batch.context.time[:, -1:] + torch.tensor([[3.0, 6.0], [5.0, 1.0]], dtype=torch.float64)
    )
    together = flat(model.predict(batch.context, query))
    for b in range(2):
        for s in range(2):
            lead = float(query.time[b, s] - batch.context.time[b, -1])
            alone = flat(model.predict(batch.context, worlds.ahead(batch, lead)))
            torch.testing.assert_close(together[b, s], alone[b, 0], atol=1e-10, rtol=0)


def test_unrolling_can_read_its_forecast_on_the_queries() -> None:
    batch = a_batch()
    far = worlds.ahead(batch, 7)
    sensors, queries = (built(warp=warp) for warp in ("sensors", "queries"))
    assert queries._unrolling.jump(batch.context, far).mask.shape == (3, 1, 15)
    assert not torch.allclose(queries.predict(batch.context, far).mean, sensors.predict(batch.context, far).mean)


def test_unrolling_takes_covariates_from_the_frames_asked_for() -> None:
    info = worlds.stations(hours=60).info
    batch = a_batch(info)
    model = built(info)
    assert evaluations(model, batch, 4, 6) == 3
    with pytest.raises(ValueError, match=r"no frame at the time of the jump.*hour_sin"):
        model.predict(batch.context, worlds.ahead(batch, 6))


def test_what_cannot_be_unrolled_is_refused() -> None:
    batch = with_background(a_batch())
    model = built()
    far = replace(batch.query, time=batch.query.time + 9)
    with pytest.raises(ValueError, match="beyond the horizon 4, and no background"):
        model.predict(batch.context, far)
    with pytest.raises(ValueError, match="2 frames before the last context time"):
        model.predict(batch.context, worlds.ahead(batch, -2))
    with pytest.raises(ValueError, match="training lead is 9 frames, horizon is 4"):
        model.loss(FieldBatch(batch.context, worlds.ahead(batch, 9)))
