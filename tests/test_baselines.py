"""Baselines against closed forms and a library."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gstools
import numpy as np
import pytest
import torch

from models.baselines.analysis import analyse, embed, last_reported
from models.baselines.boosting import Boosting
from models.baselines.climatology import local_hour
from models.baselines.inverse_distance import InverseDistance
from models.baselines.inverse_distance import weights as inverse_weights
from models.baselines.kriging import SMOOTHNESS, Kriging, correlation, covariance_model
from models.baselines.persistence import Persistence
from models.baselines.ridge import RidgePropagator
from models.contract import DatasetInfo, FieldBatch, Frames
from pipeline.cases import cases
from tests import worlds
from tests.tiny_baselines import asked, batches, fitted, world


def info(**changes: Any) -> DatasetInfo:
    return worlds.torus_info("plane", geometry="plane", std=(1.0,), **changes)


def frames(position: Any, value: Any, time: float = 0.0, sensor: Any = None) -> Frames:
    """One sample, one frame: position [N,D], value [N]."""
    place = torch.tensor(position, dtype=torch.float32)[None, None]
    return Frames(
        position=place,
        mask=torch.ones(place.shape[:3], dtype=torch.bool),
        time=torch.tensor([[time]], dtype=torch.float64),
        value=torch.tensor(value, dtype=torch.float32)[None, None, :, None],
        sensor=torch.tensor(sensor)[None, None] if sensor is not None else torch.full(place.shape[:3], -1),
    )


def spreadless(baseline: Any) -> Any:
    """A spatial baseline with a state that a test of its mean does not depend on."""
    baseline.load({"distance": torch.zeros(1).double(), "variance": torch.ones(1, 1).double(), "growth": torch.zeros(1, 1).double()})
    return baseline


def krige(geometry: DatasetInfo, variance: float, length: float, nugget: float, **config: Any) -> Kriging:
    baseline = Kriging(Kriging.Config(**config), geometry)
    values = {"variance": [variance], "length": [length], "nugget": [nugget], "growth": [[0.0]], "sigma": [[0.0, 1.0, 0.0, 0.0]]}
    baseline.load({name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})
    return baseline


def score(baseline: Any, on: str, kind: int | None = None) -> torch.Tensor:
    """Mean squared error [S] over all test cases at leads 0, 1, 2, 4; `kind` of query as in CaseBatch."""
    total, count = torch.zeros(4), torch.zeros(4)
    for part in cases(world(on), "test", 12 if on == "stations" else 1, (0, 1, 2, 4), batch=16):
        mask = part.batch.query.mask & (torch.tensor(part.kind) == kind) if kind is not None else part.batch.query.mask
        error = (baseline.predict(part.batch.context, part.batch.query).mean - part.batch.query.value).square()[..., 0]
        total, count = total + (error * mask).sum((0, 2)), count + mask.sum((0, 2))
    return total / count


# Persistence --------------------------------------------------------------------------------------------------------------------------


def test_persistence_is_exact_on_a_constant_field() -> None:
    place = np.random.default_rng(0).uniform(-1, 1, (9, 2))
    context, query = frames(place, np.full(9, 2.5)), frames(place[::-1] * 0.9, np.zeros(9), time=3.0)
    prediction = spreadless(Persistence(Persistence.Config(), info())).predict(context, query)
    assert torch.equal(prediction.mean, torch.full((1, 1, 9, 1), 2.5))


def _gappy() -> Frames:
    """Sensor 0 last reports in frame 1, sensor 1 in frame 0, a moving one always."""
    return Frames(
        position=torch.tensor([[0.0, 0], [0.5, 0], [0.9, 0]]).expand(1, 3, 3, 2),
        mask=torch.tensor([[[True, True, True], [True, False, True], [False, False, True]]]),
        time=torch.tensor([[0.0, 1, 2]], dtype=torch.float64),
        value=torch.arange(9.0).view(1, 3, 3, 1),
        sensor=torch.tensor([0, 1, -1]).expand(1, 3, 3),
    )


def test_persistence_looks_back_for_the_sensor_itself() -> None:
    query = frames([[0.0, 0.0], [0.5, 0.0], [0.5, 0.0], [0.9, 0.0]], np.zeros(4), time=5.0, sensor=[0, 1, -1, 2])
    baseline = spreadless(Persistence(Persistence.Config(), info(n_sensors=3)))
    assert baseline.predict(_gappy(), query).mean.flatten().tolist() == [3.0, 1.0, 8.0, 8.0]
    _, age = last_reported(_gappy(), query, 3)
    assert age.flatten().tolist() == [1.0, 2.0, np.inf, np.inf]


def test_an_old_value_of_its_own_is_used_while_it_is_surer_than_its_neighbours() -> None:
    baseline = InverseDistance(InverseDistance.Config(), info(n_sensors=2))
    growth = torch.tensor([[0.0], [0.2], [0.9], [1.0]], dtype=torch.float64)
    baseline.load({"distance": torch.zeros(1).double(), "variance": torch.full((1, 1), 0.5).double(), "growth": growth})
    prediction = baseline.predict(_gappy(), frames([[0.0, 0.0], [0.5, 0.0]], np.zeros(2), time=3.0, sensor=[0, 1]))
    assert prediction.mean.flatten().tolist() == [3.0, 8.0]  # one frame old is kept (0.2 < 0.5), two frames old is not (0.9)
    expected = [0.9**0.5, (0.5 + 0.2) ** 0.5]  # one lead and one frame of age; the analysis one lead on
    assert prediction.scale.flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_sensors_that_share_a_place_keep_their_own_values() -> None:
    context = frames([[0.0, 0.0], [0.0, 0.0]], [1.0, 3.0], sensor=[0, 1])
    query = frames([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]], np.zeros(3), sensor=[0, 1, -1])
    baseline = krige(info(n_sensors=2), 1.0, 0.5, 0.1)
    assert baseline.predict(context, query).mean.flatten().tolist() == pytest.approx([1.0, 3.0, 2.0], abs=1e-5)


def test_spread_grows_with_lead_and_covers() -> None:
    scale = fitted("persistence", "stations").predict(asked("stations").batch.context, asked("stations").batch.query).scale
    own = torch.tensor(asked("stations").kind == 0)
    level = [scale[:, s][own[:, s]].median().item() for s in range(4)]
    assert level == sorted(level)
    for name in ("persistence", "inverse_distance", "kriging"):
        hit, count = 0.0, 0.0
        for part in cases(world("stations"), "test", 12, (1, 2, 4), batch=16):
            p = fitted(name, "stations").predict(part.batch.context, part.batch.query)
            mask = part.batch.query.mask
            hit += (((p.mean - part.batch.query.value).abs() < 1.645 * p.scale)[..., 0] & mask).sum().item()
            count += mask.sum().item()
        assert 0.8 < hit / count < 0.99, name


def test_noise_of_observations_is_not_taken_for_certainty() -> None:
    rng = np.random.default_rng(0)

    def one() -> FieldBatch:
        place = rng.uniform(-1, 1, (40, 2))
        clean = np.sin(place.sum(1))
        return FieldBatch(frames(place[:30], clean[:30] + rng.normal(0, 0.5, 30)), frames(place, clean))

    baseline = InverseDistance(InverseDistance.Config(), info())
    baseline.fit([one() for _ in range(30)])
    batch = one()
    scale = baseline.predict(batch.context, batch.query).scale.flatten()
    assert scale[:30].mean().item() == pytest.approx(0.5, rel=0.1)


# Climatology --------------------------------------------------------------------------------------------------------------------------


def test_climatology_recovers_the_daily_cycle_of_each_station() -> None:
    dataset = world("stations")
    prediction = fitted("climatology", "stations").predict(asked("stations").batch.context, asked("stations").batch.query)
    query = asked("stations").batch.query
    cycle = 50 + 20 * np.sin(2 * np.pi * query.time.numpy() / 24)[..., None] + dataset["sensor/position"][query.sensor.numpy(), 0]
    own = asked("stations").kind == 0
    found = prediction.mean[..., 0].numpy() * dataset.info.std[0] + dataset.info.mean[0]
    assert np.abs(found - cycle)[own].max() < 2.5  # noise of 2 in about 30 values
    assert np.abs(prediction.scale[..., 0].numpy() * dataset.info.std[0] - 2)[own].max() < 1.5


def test_local_hour_counts_from_the_origin() -> None:
    there = replace(worlds.stations(hours=60).info, time_origin="2020-01-01T06:30:00Z", utc_offset=5.5)
    assert local_hour(there, torch.tensor([0.0, 13.0])).tolist() == [12.0, 1.0]


def test_climatology_of_a_simulation_is_a_constant() -> None:
    prediction = fitted("climatology", "waves").predict(asked("waves").batch.context, asked("waves").batch.query)
    assert len(prediction.mean.unique()) == 1
    assert abs(prediction.mean.unique().item()) < 0.1


# Inverse distance ---------------------------------------------------------------------------------------------------------------------


def test_inverse_distance_by_hand_on_three_points() -> None:
    context = frames([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], [1.0, 2.0, 4.0])
    query = frames([[0.5, 0.0], [1.0, 0.0], [0.0, 0.25]], np.zeros(3))
    found = spreadless(InverseDistance(InverseDistance.Config(exponent=2), info())).predict(context, query).mean.flatten()
    first = (1 / 0.25 + 2 / 0.25 + 4 / 1.25) / (1 / 0.25 + 1 / 0.25 + 1 / 1.25)
    third = (1 / 0.0625 + 2 / 1.0625 + 4 / 0.5625) / (1 / 0.0625 + 1 / 1.0625 + 1 / 0.5625)
    assert found.tolist() == pytest.approx([first, 2.0, third], rel=1e-6)


def test_inverse_distance_of_the_nearest_only() -> None:
    distance = torch.tensor([[0.1, 0.2, 0.4], [0.0, 1.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(inverse_weights(distance, 1.0, 2), torch.tensor([[2 / 3, 1 / 3, 0], [1, 0, 0]]).double())


# Kriging ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMOOTHNESS)
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("geometry", ["plane", "torus"])
def test_kriging_equals_gstools(name: str, exact: bool, geometry: str) -> None:
    where = replace(info(), geometry=geometry)
    rng = np.random.default_rng(3)
    place, points = rng.uniform(-1, 1, (30, 2)).astype(np.float32), rng.uniform(-1, 1, (20, 2)).astype(np.float32)
    points[0] = place[0]
    value = np.sin(np.pi * place.sum(1)).astype(np.float32)
    ours = krige(where, 1.3, 0.3, 0.05, covariance=name, exact=exact)
    analysis = ours.analyse(frames(place, value), frames(points, np.zeros(20)))
    flat = [embed(torch.tensor(x), where.period).numpy() for x in (place, points)]
    model = covariance_model(name, flat[0].shape[1], 1.3, 0.3, 0.05)
    mean, variance = gstools.krige.Ordinary(model, flat[0].T, value.astype(float), exact=exact)(flat[1].T)
    assert np.abs(analysis.mean[0, 0, :, 0].numpy() - mean).max() < 1e-6
    assert np.abs(analysis.variance[0, 0, :, 0].numpy() - variance).max() < 1e-6


def test_kriging_is_exact_at_sensors_and_keeps_a_constant() -> None:
    rng = np.random.default_rng(0)
    place = rng.uniform(-1, 1, (25, 2))
    value = rng.normal(size=25)
    at_sensors = krige(info(), 1.0, 0.4, 0.0, covariance="matern52").predict(frames(place, value), frames(place, np.zeros(25), time=2.0))
    assert torch.allclose(at_sensors.mean.flatten(), torch.tensor(value).float(), atol=1e-5)
    assert at_sensors.scale.max() < 1e-2
    # Weights sum to one: adding a constant to the data adds it to the answer everywhere.
    baseline, query = krige(info(), 1.0, 0.4, 0.1), frames(rng.uniform(-2, 2, (40, 2)), np.zeros(40))
    lifted = baseline.predict(frames(place, value + 5), query).mean - baseline.predict(frames(place, value), query).mean
    assert torch.allclose(lifted, torch.full_like(lifted, 5.0), atol=1e-5)


def test_kriging_from_neighbours_alone() -> None:
    rng = np.random.default_rng(0)
    place = rng.uniform(-1, 1, (200, 2))
    context, query = frames(place, np.sin(3 * place.sum(1))), frames(np.concatenate([place[:5], rng.uniform(-1, 1, (50, 2))]), np.zeros(55))
    whole = krige(info(), 1.0, 0.2, 1e-4).predict(context, query)
    near = krige(info(), 1.0, 0.2, 1e-4, neighbours=40).predict(context, query)
    all_of_them = krige(info(), 1.0, 0.2, 1e-4, neighbours=199).predict(context, query)
    assert (near.mean - whole.mean).abs().max() < 0.02
    assert (all_of_them.mean - whole.mean).abs().max() < 1e-3  # the farthest one is missing
    assert torch.allclose(all_of_them.scale, whole.scale, atol=1e-3)
    assert torch.allclose(near.mean[:, :, :5], whole.mean[:, :, :5], atol=1e-5)  # exact at observations


def test_torus_has_no_edge() -> None:
    place = np.random.default_rng(1).uniform(-1, 1, (20, 2))
    value = np.sin(np.pi * place[:, 0])
    baseline = krige(replace(info(), geometry="torus"), 1.0, 0.5, 1e-6)
    left, right = (baseline.predict(frames(place, value), frames([[x, 0.3]], [0.0])).mean.item() for x in (-1.0, 1.0))
    assert left == pytest.approx(right, abs=1e-5)


def test_observations_at_one_place_count_as_their_mean() -> None:
    context = frames([[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]], [1.0, 3.0, 5.0])
    prediction = krige(info(), 1.0, 0.5, 0.0).predict(context, frames([[0.0, 0.0]], [0.0]))
    assert prediction.mean.item() == pytest.approx(2.0, abs=1e-5)


def test_kriging_fit_finds_a_known_covariance() -> None:
    rng = np.random.default_rng(0)
    batches_ = []
    for _ in range(16):
        place = rng.uniform(-1, 1, (60, 2))
        apart = torch.cdist(torch.tensor(place), torch.tensor(place))
        factor = torch.linalg.cholesky(correlation(apart / 0.15, "matern32") + 1e-9 * torch.eye(60))
        value = (factor @ torch.tensor(rng.normal(size=60))).numpy()
        seen, held = frames(place[:50], value[:50]), frames(place[50:], value[50:])
        batches_.append(FieldBatch(seen, held))
    baseline = Kriging(Kriging.Config(covariance="matern32", sigma="fitted"), info())
    baseline.fit(batches_)
    state = baseline.state()
    assert state["length"].item() == pytest.approx(0.15, rel=0.3)
    assert state["variance"].item() == pytest.approx(1.0, rel=0.4)
    assert state["nugget"].item() < 0.1
    assert state["sigma"][0, 1].item() == pytest.approx(1.0, abs=0.35)  # the own sigma is right here: nothing to correct


def test_fitted_sigma_learns_that_errors_grow_with_the_level() -> None:
    rng = np.random.default_rng(0)

    def one(level: float) -> FieldBatch:
        place, value = rng.uniform(-1, 1, (30, 2)), level * (1 + 0.2 * rng.normal(size=30))
        return FieldBatch(frames(place[:20], value[:20]), frames(place[20:], value[20:]))

    training, test = [[one(level) for level in rng.choice([1.0, 10.0], 40)] for _ in range(2)]
    unlikely = {}
    for sigma in ("own", "fitted"):
        baseline = Kriging(Kriging.Config(sigma=sigma), info())
        baseline.fit(training)
        found = [baseline.predict(batch.context, batch.query) for batch in test]
        terms = [-torch.distributions.Normal(p.mean, p.scale).log_prob(batch.query.value) for p, batch in zip(found, test, strict=True)]
        unlikely[sigma] = torch.stack(terms).mean().item()
    assert unlikely["fitted"] < unlikely["own"] - 0.3
    calm, wild = one(1.0), one(10.0)
    ratio = baseline.predict(wild.context, wild.query).scale.mean() / baseline.predict(calm.context, calm.query).scale.mean()
    assert 6 < ratio.item() < 15


def test_moving_sensors_are_left_out_on_demand() -> None:
    fixed = info(n_sensors=2)
    context = frames([[0.0, 0.0], [1.0, 0.0], [0.5, 0.0]], [1.0, 1.0, 100.0], sensor=[0, 1, -1])
    prediction = krige(fixed, 1.0, 0.5, 0.0, ignore_moving=True).predict(context, frames([[0.5, 0.1]], [0.0]))
    assert prediction.mean.item() == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(ValueError, match="ignore_moving"):
        Kriging(Kriging.Config(ignore_moving=True), info())


def test_shared_layouts_are_solved_once() -> None:
    calls = []

    def method(place: torch.Tensor) -> Any:
        calls.append(len(place))
        return lambda distance: (torch.full((1, *distance.shape), 1 / len(place)).double(), torch.zeros(1, len(distance)).double())

    context, query = asked("waves").batch.context, asked("waves").batch.query
    analysis = analyse(context, query, 2.0, method)
    layouts = {position.numpy().tobytes() for position in context.position[:, 0]}
    assert len(calls) == len(layouts) < len(context.mask)
    assert torch.allclose(analysis.mean[:, 0, 0, 0], context.value[:, 0, :, 0].double().mean(1))


# Ridge propagator ---------------------------------------------------------------------------------------------------------------------


def test_ridge_recovers_the_travelling_wave_at_every_lead() -> None:
    ridge, still = score(fitted("ridge", "waves"), "waves"), score(fitted("kriging", "waves"), "waves")
    assert (ridge < 1e-3).all()
    assert (ridge[1:] < still[1:] / 100).all()


def test_ridge_says_what_it_cannot_do() -> None:
    batch = asked("waves").batch
    with pytest.raises(ValueError, match="fitted up to lead 4"):
        fitted("ridge", "waves").predict(batch.context, replace(batch.query, time=batch.query.time + 3))
    with pytest.raises(ValueError, match="answered questions a frame"):
        RidgePropagator(RidgePropagator.Config(), world("stations").info).fit(batches("stations"))


def test_ridge_moves_a_field_on_a_plane() -> None:
    """A standing wave that changes sign each frame is one map; persistence is as wrong as can be."""
    rng = np.random.default_rng(0)
    place, points = rng.uniform(-1, 1, (60, 2)), rng.uniform(-1, 1, (200, 2))

    def one(size: float) -> FieldBatch:
        def mode(x: np.ndarray) -> np.ndarray:
            return size * np.cos(np.pi * (x[:, 0] + 1) / 2) * np.cos(np.pi * (x[:, 1] + 1) / 2)

        return FieldBatch(frames(place, mode(place)), frames(points, -mode(points), time=1.0))

    baseline = RidgePropagator(RidgePropagator.Config(waves=2, penalty=1e-6), info())
    baseline.fit([one(size) for size in rng.normal(size=40)])
    batch = one(1.5)
    assert (baseline.predict(batch.context, batch.query).mean - batch.query.value).abs().max() < 0.1


# Boosting -----------------------------------------------------------------------------------------------------------------------------


def test_boosting_beats_persistence_at_every_lead() -> None:
    boosting, still = (
        score(fitted("boosting", "stations"), "stations", kind=0),
        score(fitted("persistence", "stations"), "stations", kind=0),
    )
    assert (boosting[1:] < still[1:]).all()
    assert boosting[3] < still[3] / 2
    assert boosting[0] == 0  # a value that was observed now is known


def test_boosting_needs_fixed_sensors() -> None:
    with pytest.raises(ValueError, match="fixed sensors"):
        Boosting(Boosting.Config(), worlds.torus_info())
