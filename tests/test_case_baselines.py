"""What is fitted anew to each case: series that are known, fields that are known, and other programs for the same thing."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, ConstantKernel, WhiteKernel

from models import registry
from models.baselines import case_nsgp, case_sage
from models.baselines.per_case import Case, PerCase, Points
from models.contract import DatasetInfo, FieldBatch, Frames
from tests import worlds


def info(**changes: Any) -> DatasetInfo:
    hours = {"geometry": "plane", "time_unit": "h", "time_origin": "1970-01-01T00:00:00Z", "centre": (0.0, 0.0), "half_extent": 2.0}
    return worlds.torus_info("case", **{**hours, **changes})


def baseline(name: str, about: DatasetInfo | None = None, **config: Any) -> Any:
    kind = registry.load(name)
    made = kind(kind.Config(**config), about or info())
    made.load({"error": torch.ones(1).double()})
    return made


def frames(time: np.ndarray, place: np.ndarray, value: np.ndarray) -> Frames:
    """time [T], place [P,2] in model units, value [T,P], absent where it is not a number."""
    t, p = value.shape
    return Frames(
        position=torch.from_numpy(place).float().expand(1, t, p, 2),
        mask=torch.from_numpy(~np.isnan(value))[None],
        time=torch.from_numpy(time.astype(float))[None],
        value=torch.from_numpy(value).float()[None, ..., None],
    )


def asked(made: PerCase, known: Frames, query: Frames) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean, scale and truth of what is asked."""
    with torch.inference_mode():
        answer = made.predict(known, query)
    assert query.value is not None
    return tuple(tensor[query.mask][:, 0].double().numpy() for tensor in (answer.mean, answer.scale, query.value))  # type: ignore[return-value, union-attr]


def rmse(error: np.ndarray) -> float:
    return float(np.sqrt(np.square(error).mean()))


# Which frame is which -----------------------------------------------------------------------------------------------------------------


class Recorder(PerCase):
    """Answers 0 and remembers the case; a place further right is as much less sure."""

    def answers(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        self.case = case
        return np.zeros((len(case.asked.minute), 1)), 1 + case.asked.place[:, :1]


def test_nights_and_days_without_frames_are_not_counted() -> None:
    slots = np.arange(6.0, 12.0, 0.5)  # of a day
    time = np.concatenate([slots, slots + 24, slots + 24 * 9])
    made = Recorder(info(step=0.5))
    made.load({"error": torch.ones(1).double()})
    known = frames(time[:24], np.zeros((1, 2)), np.ones((24, 1)))
    made.predict(known, frames(time[[24, 27, 35]], np.zeros((1, 2)), np.ones((3, 1))))
    assert made.case.known.frame.tolist() == list(range(24))
    assert made.case.asked.frame.tolist() == [24, 27, 35]
    assert made.case.asked.minute.tolist() == [2880 + 360, 2880 + 450, 2880 + 690]
    made.predict(frames(slots, np.zeros((1, 2)), np.ones((12, 1))), frames(np.array([12.0, 14.0]), np.zeros((1, 2)), np.ones((2, 1))))
    assert made.case.asked.frame.tolist() == [12, 16], "less than a day says nothing of nights"


def test_stated_scales_keep_their_ratio_and_have_the_size_of_the_errors() -> None:
    made, place = Recorder(info()), np.array([[0.0, 0.0], [1.0, 0.0]])
    batch = FieldBatch(frames(np.arange(2.0), place, np.zeros((2, 2))), frames(np.array([2.0]), place, np.array([[2.0, 4.0]])))
    made.fit([batch])
    scale = made.predict(batch.context, batch.query).scale
    assert scale is not None
    assert float(scale[..., 1, 0] / scale[..., 0, 0]) == pytest.approx(3)
    assert float(scale.square().mean()) == pytest.approx((2**2 + 4**2) / 2)


# Series: ARIMA and N-BEATS ------------------------------------------------------------------------------------------------------------


def wandering(seed: int, places: int = 4, length: int = 80, missing: float = 0.3) -> tuple[Frames, Frames]:
    """ARIMA(1,1,0) with a coefficient of 0.8, a part of the past missing; the last eight frames are asked."""
    rng = np.random.default_rng(seed)
    step = np.zeros((length, places))
    for t in range(1, length):
        step[t] = 0.8 * step[t - 1] + rng.normal(0, 0.1, places)
    value = step.cumsum(0)
    past = np.where(rng.random(value.shape) < missing, np.nan, value)[:-8]
    place, time = rng.uniform(-1, 1, (places, 2)), np.arange(length)
    return frames(time[:-8], place, past), frames(time[-8:], place, value[-8:])


def test_arima_continues_what_wanders_and_says_how_surely() -> None:
    error, inside, flat = [], [], []
    for seed in range(3):
        known, query = wandering(seed)
        mean, scale, truth = asked(baseline("case_arima"), known, query)
        error.append(mean - truth)
        inside.append(np.abs(error[-1]) < 1.645 * scale)
        flat.append(asked(baseline("case_mean"), known, query)[0] - truth)
    assert rmse(np.array(error)) < rmse(np.array(flat)) / 3
    assert 0.75 < np.mean(inside) <= 1


def test_zeros_for_absent_values_are_zeros_of_the_unit() -> None:
    about = info(mean=(3.0,), std=(2.0,))
    known, query = wandering(0, places=2, missing=0.2)
    assert known.value is not None
    filled = frames(known.time[0].numpy(), known.position[0, 0].numpy(), np.where(known.mask[0], known.value[0, ..., 0], -1.5))
    (zero, *_), (by_hand, *_), (exact, *_) = (
        asked(baseline("case_arima", about, missing=how), given, query)
        for how, given in (("zero", known), ("state_space", filled), ("state_space", known))
    )
    np.testing.assert_allclose(zero, by_hand)
    assert np.abs(zero - exact).max() > 0.1
    with pytest.raises(ValueError, match="of one variable, and case has 2"):
        baseline("case_arima", info(variables=("a", "b"), mean=(0.0, 0.0), std=(1.0, 1.0)), missing="zero")


def test_nbeats_continues_a_daily_wave_for_longer_than_it_was_trained_to() -> None:
    rng = np.random.default_rng(0)
    time, phase = np.arange(96 + 24), rng.uniform(0, 0.5, 12)
    value = np.sin(2 * np.pi * time[:, None] / 24 + phase) + rng.normal(0, 0.02, (len(time), 12))
    past = np.where(rng.random(value.shape) < 0.2, np.nan, value)[:96]
    place = rng.uniform(-1, 1, (12, 2))
    known, query = frames(time[:96], place, past), frames(time[96:], place, value[96:])
    mean, _, truth = asked(baseline("case_nbeats", back=24, ahead=12, blocks=2, steps=150), known, query)
    assert rmse(mean - truth) < 0.3 * rmse(asked(baseline("case_mean"), known, query)[0] - truth)
    with pytest.raises(ValueError, match="windows of back \\+ ahead = 100 frames, and the context has 96"):
        asked(baseline("case_nbeats", back=60, ahead=40), known, query)


@pytest.mark.parametrize(("name", "config"), [("case_arima", {"iterations": 1}), ("case_nbeats", {"steps": 1})])
def test_a_place_without_a_series_gets_the_mean_and_the_past_is_not_asked(name: str, config: dict[str, int]) -> None:
    known, query = wandering(0)
    far = frames(query.time[0].numpy(), np.full((1, 2), 5.0), np.zeros((8, 1)))
    assert known.value is not None
    mean, scale, _ = asked(baseline(name, **config), known, far)
    np.testing.assert_allclose(mean, known.value[known.mask].mean(), rtol=1e-5)
    np.testing.assert_allclose(scale, known.value[known.mask].std(correction=0), rtol=1e-5)
    with pytest.raises(ValueError, match="continues series beyond the context, and is asked 1 frames before its end"):
        baseline(name).predict(known, frames(np.array([71.0]), np.zeros((1, 2)), np.zeros((1, 1))))


# Fields: NSGP and GraphSAGE -----------------------------------------------------------------------------------------------------------


def field(seed: int, noise: float, hours: int = 24, places: int = 25, held: float = 0.2) -> tuple[Frames, Frames]:
    """A smooth field over 4 km that moves; single observations of its own frames are asked."""
    rng = np.random.default_rng(seed)
    place, time = rng.uniform(-1, 1, (places, 2)), np.arange(hours)
    value = np.sin(2 * place[:, 0] + time[:, None] / 4) + np.cos(1.5 * place[:, 1]) + rng.normal(0, noise, (hours, places))
    hidden = rng.random(value.shape) < held
    return frames(time, place, np.where(hidden, np.nan, value)), frames(time, place, np.where(hidden, value, np.nan))


def test_nsgp_recovers_a_smooth_field_and_its_intervals_hold_what_they_say() -> None:
    error, inside, flat = [], [], []
    for seed in range(2):
        known, query = field(seed, noise=0.2)
        mean, scale, truth = asked(baseline("case_nsgp", batch=150, steps=50, daily=False), known, query)
        error.extend(mean - truth)
        inside.extend(np.abs(mean - truth) < 1.645 * scale)
        flat.extend(asked(baseline("case_mean"), known, query)[0] - truth)
    assert rmse(np.array(error)) < 0.23, "hardly more than the noise of what is asked"
    assert rmse(np.array(flat)) > 0.7
    assert 0.84 < np.mean(inside) < 0.96


def test_with_constant_length_scales_it_is_the_stationary_process_of_another_library() -> None:
    rng = np.random.default_rng(0)
    known, value, query = rng.normal(size=(40, 3)), rng.normal(size=40), rng.normal(size=(9, 3))
    for stationary in (True, False):
        process = case_nsgp.Process(torch.from_numpy(known), None, inducing=5, stationary=stationary)
        with torch.no_grad():
            process.length.copy_(torch.tensor([0.6, 1.1, 2.0]).log())
            process.signal.copy_(torch.tensor(0.3))
            mean, variance = process.posterior(*(torch.from_numpy(array) for array in (known, value, query)))
        signal, noise = np.exp(2 * 0.3), 0.3**2
        kernel = ConstantKernel(signal, "fixed") * RBF([0.6, 1.1, 2.0], "fixed") + WhiteKernel(noise, "fixed")
        other = GaussianProcessRegressor(kernel, optimizer=None).fit(known, value)
        expected, spread = other.predict(query, return_std=True)
        np.testing.assert_allclose(mean, expected, atol=1e-4)
        np.testing.assert_allclose(variance, spread**2, atol=1e-4)
        loss = process.loss(torch.from_numpy(known), torch.from_numpy(value), len(known)).item()
        log_two_pi = 0.5 * len(known) * np.log(2 * np.pi)
        assert loss * len(known) + log_two_pi == pytest.approx(-other.log_marginal_likelihood_value_, rel=1e-4)


def test_a_length_scale_is_short_where_the_field_is_rough() -> None:
    x = torch.linspace(-2, 2, 160, dtype=torch.float64)[:, None]
    value = torch.where(x < 0, torch.sin(8 * x), torch.sin(x))[:, 0]
    process = case_nsgp.fitted(x, value, None, case_nsgp.CaseNsgp.Config(steps=100, batch=100, inducing=12))
    with torch.no_grad():
        rough, smooth = process.lengths(torch.tensor([-1.0, 1.0], dtype=torch.float64), 0)
    assert rough < smooth / 2
    left, right = (torch.rand(30, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    matrix = case_nsgp.gibbs(left, left, 0.05 + right, 0.05 + right)
    assert torch.linalg.eigvalsh(matrix).min() > -1e-9, "a covariance, whatever the length scales"
    torch.testing.assert_close(matrix.diagonal(), torch.ones(30, dtype=torch.float64))


def test_sage_beats_the_mean_and_answers_what_is_alone_with_it() -> None:
    known, query = field(0, noise=0.05, hours=12)
    mean, _, truth = asked(baseline("case_sage"), known, query)
    flat = asked(baseline("case_mean"), known, query)[0]
    assert rmse(mean - truth) < 0.6 * rmse(flat - truth)
    late = frames(np.array([14.0]), np.zeros((1, 2)), np.zeros((1, 1)))
    assert asked(baseline("case_sage", steps=1), known, late)[0] == pytest.approx(flat[:1])
    assert asked(baseline("case_sage", steps=1, hours=4), known, late)[0] != pytest.approx(flat[:1])


def points(seed: int, count: int) -> Points:
    rng = np.random.default_rng(seed)
    minute = 60.0 * rng.integers(0, 12, count)
    return Points(minute, rng.uniform(-2, 2, (count, 2)), (minute // 60).astype(int))


def test_edges_join_what_lies_within_the_hours_and_no_node_to_itself() -> None:
    known, told = points(0, 40), points(1, 15)
    for other in (told, known):
        source, target, weight = (tensor.numpy() for tensor in case_sage.edges(known, other, 120.0))
        near = np.abs(known.minute[:, None] - other.minute) <= 120
        if other is known:
            near &= ~np.eye(40, dtype=bool)
        assert set(zip(source, target, strict=True)) == set(zip(*near.nonzero(), strict=True))
        assert len(source) == near.sum()
        apart = np.linalg.norm(known.place[source] - other.place[target], axis=-1)
        np.testing.assert_allclose(weight, 1 / (1 + apart), rtol=1e-6)


def test_sage_does_not_depend_on_how_nodes_are_numbered_nor_on_what_is_hidden() -> None:
    known, told = points(0, 40), points(1, 15)
    rng = np.random.default_rng(2)
    value, order = torch.from_numpy(rng.normal(size=(40, 1))).float(), rng.permutation(40)
    shown = torch.from_numpy(rng.random(40) < 0.6)
    torch.manual_seed(0)
    network = case_sage.Sage(1)

    def answers(value: torch.Tensor, at: Points, shown: torch.Tensor) -> torch.Tensor:
        among, to = case_sage.edges(at, at, 120.0), case_sage.edges(at, told, 120.0)
        kept = case_sage.kept(among, shown, shown), case_sage.kept(to, shown, torch.ones(15, dtype=torch.bool))
        return network(value, shown, *kept, 15)

    expected = answers(value, known, shown)
    mixed = Points(known.minute[order], known.place[order], known.frame[order])
    torch.testing.assert_close(answers(value[order], mixed, shown[order]), expected)
    torch.testing.assert_close(answers(torch.where(shown[:, None], value, 9.0), known, shown), expected)
    assert (answers(value + shown[:, None], known, shown) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "config"), [("case_nsgp", {"steps": 3}), ("case_sage", {"steps": 3})])
def test_the_seed_decides(name: str, config: dict[str, Any]) -> None:
    known, query = field(0, noise=0.1, hours=8)
    first, again, other = (asked(baseline(name, seed=seed, batch=50, **config), known, query)[0] for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
