"""The background mechanism: what is attached, and that a model sees it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.background import WithBackground, attach
from models.baselines.climatology import Climatology
from models.contract import FieldPrediction, Frames
from pipeline.batches import TrainingBatches, Windows
from tests import worlds


def _fitted() -> tuple[Climatology, Frames, Frames]:
    dataset = worlds.stations(hours=200)
    training = TrainingBatches(dataset, Windows(max_lead=3, batch=4, query_frames=2), seed=0)
    baseline = Climatology(Climatology.Config(), dataset.info)
    baseline.fit(training[step] for step in range(5))
    batch = training[9]
    return baseline, batch.context, batch.query


class _Correction:
    """A model that adds a tenth of the background's own spread."""

    tasks = frozenset({"forecast"})
    levels = (0.5,)

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        assert query.background is not None
        assert query.background_scale is not None
        return FieldPrediction(query.background + 0.1 * query.background_scale)


def test_attach_fills_mean_and_scale_and_nothing_else() -> None:
    baseline, context, query = _fitted()
    query.position.requires_grad_()
    found, expected = attach(baseline, context, query), baseline.predict(context, query)
    assert found.background is not None
    assert found.background_scale is not None
    assert torch.equal(found.background, expected.mean)
    assert torch.equal(found.background_scale, expected.scale)
    assert not found.background.requires_grad
    assert replace(found, background=None, background_scale=None) == query
    assert query.background is None


def test_with_background_asks_the_model_on_top_of_the_baseline() -> None:
    baseline, context, query = _fitted()
    both, prior = WithBackground(baseline, _Correction()), baseline.predict(context, query)
    assert torch.equal(both.predict(context, query).mean, prior.mean + 0.1 * prior.scale)
    assert both.tasks == {"forecast"}
    assert both.levels == (0.5,)


class _Broken:
    tasks = frozenset({"forecast"})
    levels = ()

    def __init__(self, prediction: FieldPrediction) -> None:
        self.prediction = prediction

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        return self.prediction


def test_a_background_that_is_none_is_an_error() -> None:
    _, context, query = _fitted()
    mean = torch.zeros(*query.mask.shape, 1)
    with pytest.raises(ValueError, match="no standard deviation"):
        attach(_Broken(FieldPrediction(mean)), context, query)
    first = tuple(index[0] for index in query.mask.nonzero(as_tuple=True))
    mean[first] = torch.nan
    with pytest.raises(ValueError, match=r"1 of .* asked points are not finite"):
        attach(_Broken(FieldPrediction(mean, torch.ones_like(mean))), context, query)
