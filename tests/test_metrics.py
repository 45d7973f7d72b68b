"""Metrics against tables worked out by hand and against scoringrules; the bootstrap against a mean that is known."""

from __future__ import annotations

import numpy as np
import pytest
import scoringrules

from pipeline import bootstrap
from pipeline.bootstrap import Bootstrap
from pipeline.metrics import METRICS, POINT_STATISTICS, SAMPLE_STATISTICS, unit
from pipeline.outcome import Outcome

TRUTH = np.array([[1.0], [2.0], [4.0], [-2.0]])
MEAN = np.array([[2.0], [2.0], [1.0], [-1.0]])  # errors 1, 0, -3, 1


def sums(outcome: Outcome, samples: list[slice] | None = None) -> dict[str, np.ndarray]:
    """Statistics of an outcome whose points are cut into samples, for variable 0."""
    total: dict[str, float] = {}
    for part in samples or [slice(None)]:
        one = {"n": np.array(float(len(outcome.truth[part])))}
        for name, statistic in POINT_STATISTICS.items():
            values = statistic(outcome)
            one[name] = np.array(np.nan if values is None else values[part, 0].sum())
        one |= {name: statistic(one) for name, statistic in SAMPLE_STATISTICS.items()}
        total = {name: total.get(name, 0.0) + value for name, value in one.items()}
    return total


def value(metric: str, outcome: Outcome, samples: list[slice] | None = None) -> float:
    return float(METRICS[metric].value(sums(outcome, samples)))


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        ("mse", 11 / 4),
        ("rmse", np.sqrt(11 / 4)),
        ("mae", 5 / 4),
        ("bias", -1 / 4),
        ("rel_mse", 11 / 25),
        ("rel_l2", np.sqrt(11 / 25)),
        ("crps", 5 / 4),  # of a mean alone it is the absolute error
        ("truth_std", np.std(TRUTH)),
    ],
)
def test_metrics_agree_with_a_table_worked_out_by_hand(metric: str, expected: float) -> None:
    assert value(metric, Outcome(TRUTH, MEAN)) == pytest.approx(expected, rel=1e-12)


def test_relative_errors_are_means_over_samples_and_are_not_each_other() -> None:
    halves = [slice(0, 2), slice(2, 4)]  # sum e^2 / sum u^2 = 1/5 and 10/20
    outcome = Outcome(TRUTH, MEAN)
    assert value("rel_mse", outcome, halves) == pytest.approx((1 / 5 + 1 / 2) / 2)
    assert value("rel_l2", outcome, halves) == pytest.approx((np.sqrt(1 / 5) + np.sqrt(1 / 2)) / 2)
    assert value("rel_l2", outcome, halves) ** 2 != pytest.approx(value("rel_mse", outcome, halves), rel=1e-2)


def test_a_sample_without_signal_does_not_enter_relative_errors() -> None:
    outcome = Outcome(np.array([[0.0], [0.0], [4.0], [-2.0]]), MEAN)
    assert value("rel_mse", outcome, [slice(0, 2), slice(2, 4)]) == pytest.approx(1 / 2)


def test_a_mean_alone_has_no_coverage_and_says_what_it_is() -> None:
    outcome = Outcome(TRUTH, MEAN)
    assert outcome.distribution == "mean only"
    assert np.isnan(value("coverage_90", outcome))
    assert np.isnan(value("width_90", outcome))
    assert np.isnan(value("below_50", outcome))


def test_gaussian_scores_agree_with_scoringrules_and_the_normal_table() -> None:
    scale = np.array([[1.0], [0.5], [1.0], [2.0]])
    outcome = Outcome(TRUTH, MEAN, scale=scale)
    expected = scoringrules.crps_normal(TRUTH, MEAN, scale).mean()
    assert value("crps", outcome) == pytest.approx(expected)
    assert value("coverage_90", outcome) == 3 / 4  # an error of three sigma lies outside 1.645 sigma
    assert value("coverage_50", outcome) == 2 / 4  # errors of 0 and 0.5 sigma lie inside 0.674 sigma
    assert value("width_90", outcome) == pytest.approx(2 * 1.6448536 * scale.mean(), rel=1e-6)
    assert value("below_50", outcome) == 3 / 4


def test_a_certain_gaussian_is_a_point_mass() -> None:
    outcome = Outcome(TRUTH, MEAN, scale=np.zeros_like(MEAN))
    assert value("crps", outcome) == pytest.approx(5 / 4)
    assert value("coverage_90", outcome) == 1 / 4


def test_quantile_scores_agree_with_scoringrules_where_the_levels_are_even() -> None:
    levels = tuple((np.arange(10) + 0.5) / 10)
    quantiles = np.sort(np.random.default_rng(0).normal(size=(4, 1, 10)), axis=-1)
    outcome = Outcome(TRUTH, quantiles[..., 5], quantiles=quantiles, levels=levels)
    assert value("crps", outcome) == pytest.approx(scoringrules.crps_quantile(TRUTH, quantiles, np.array(levels)).mean())
    assert outcome.quantile(0.01) is None  # the given levels do not reach that far
    middle = outcome.quantile(0.10)
    assert middle is not None
    np.testing.assert_allclose(middle, quantiles[..., :2].mean(-1))


def test_crps_of_many_quantiles_nears_that_of_their_gaussian() -> None:
    from scipy.special import ndtri

    levels = np.array([0.01, 0.03, 0.07, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.93, 0.97, 0.99])  # uneven on purpose
    quantiles = MEAN[..., None] + ndtri(levels)
    exact = value("crps", Outcome(TRUTH, MEAN, scale=np.ones_like(MEAN)))
    assert value("crps", Outcome(TRUTH, MEAN, quantiles=quantiles, levels=tuple(levels))) == pytest.approx(exact, rel=0.02)


def test_ensemble_scores_agree_with_scoringrules() -> None:
    members = np.random.default_rng(1).normal(size=(25, 4, 1)) + MEAN
    outcome = Outcome(TRUTH, members.mean(0), samples=members)
    assert value("crps", outcome) == pytest.approx(scoringrules.crps_ensemble(TRUTH, members, m_axis=0).mean())
    low, high = np.quantile(members, 0.05, axis=0), np.quantile(members, 0.95, axis=0)
    assert value("coverage_90", outcome) == ((low <= TRUTH) & (high >= TRUTH)).mean()


def test_classes_are_scored_by_a_table_worked_out_by_hand() -> None:
    truth = np.array([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [1, 0, 0]])
    chance = np.array([[0.7, 0.2, 0.1], [0.1, 0.8, 0.1], [0.6, 0.4, 0.0], [0.2, 0.5, 0.3]])
    outcome = Outcome(truth, chance, probabilities=chance, std=np.array([2.0, 3.0, 4.0]))
    assert outcome.distribution == "classes"
    assert value("nll", outcome) == pytest.approx(-np.log([0.7, 0.8, 1e-6, 0.2]).mean())
    brier = np.array([0.09 + 0.04 + 0.01, 0.01 + 0.04 + 0.01, 0.36 + 0.16 + 1, 0.64 + 0.25 + 0.09]).mean()
    assert value("brier", outcome) == pytest.approx(brier)
    assert value("accuracy", outcome) == 2 / 4
    assert sum(float(outcome.crps()[:, c].mean()) for c in range(3)) == pytest.approx(brier)
    assert np.isnan(value("coverage_90", outcome))
    for name in ("brier", "accuracy"):
        assert np.isnan(value(name, Outcome(truth, chance, scale=np.ones_like(chance))))


@pytest.mark.parametrize("name", METRICS)
def test_every_metric_is_a_function_of_sums_that_add(name: str) -> None:
    rng = np.random.default_rng(2)
    truth, mean = rng.normal(size=(2, 40, 1))
    form = {"scale": rng.uniform(0.5, 2, (40, 1))}
    if name in ("brier", "accuracy"):
        truth = (truth > 0).astype(float)
        form = {"probabilities": rng.uniform(0, 1, (40, 1))}
    outcome = Outcome(truth, mean, **form)  # type: ignore[arg-type]
    cuts = [slice(0, 10), slice(10, 25), slice(25, 40)]
    parts = [sums(Outcome(truth[c], mean[c], **{key: array[c] for key, array in form.items()})) for c in cuts]  # type: ignore[arg-type]
    merged = {key: sum(part[key] for part in parts) for key in parts[0]}
    assert float(METRICS[name].value(merged)) == pytest.approx(value(name, outcome, cuts), rel=1e-12)
    assert METRICS[name].title


def test_units_follow_the_metric() -> None:
    assert [unit(name, "ug m-3") for name in ("rmse", "mse", "rel_mse", "coverage_90")] == ["ug m-3", "(ug m-3)2", "1", "1"]
    assert unit("mse", "1") == "1"


def test_the_block_bootstrap_covers_a_known_mean() -> None:
    """Blocks share an offset, as hours of one day do: the mean of 30 blocks of 20 alike points is covered about 95 times in 100."""
    rng, covered, naive = np.random.default_rng(3), 0, 0
    drawn = bootstrap.counts(30, Bootstrap(draws=400))
    for _ in range(200):
        points = 7.0 + rng.normal(size=(30, 1)) + 0.3 * rng.normal(size=(30, 20))
        each = bootstrap.resample({"error": points.sum(1), "n": np.full(30, 20.0)}, drawn)
        low, high = bootstrap.interval(METRICS["bias"].value(each), 30)
        covered += bool(low <= 7.0 <= high)
        naive += abs(points.mean() - 7.0) < 1.96 * points.std() / np.sqrt(points.size)
    assert 0.89 <= covered / 200 <= 0.985
    assert naive / 200 < 0.6  # what single points would have pretended


def test_draws_are_seeded_and_longer_runs_widen_the_interval_of_a_slow_series() -> None:
    assert np.array_equal(bootstrap.counts(12, Bootstrap(seed=4)), bootstrap.counts(12, Bootstrap(seed=4)))
    assert not np.array_equal(bootstrap.counts(12, Bootstrap(seed=4)), bootstrap.counts(12, Bootstrap(seed=5)))
    slow = {"error": np.sin(np.arange(60) / 60 * 2 * np.pi), "n": np.ones(60)}
    width = []
    for run in (1, 10):
        drawn = bootstrap.counts(60, Bootstrap(run=run))
        assert (drawn.sum(axis=1) == 60).all()
        low, high = bootstrap.interval(METRICS["bias"].value(bootstrap.resample(slow, drawn)), 60)
        width.append(float(high - low))
    assert width[1] > 1.5 * width[0]


def test_few_blocks_give_no_interval() -> None:
    drawn = bootstrap.counts(4, Bootstrap())
    low, high = bootstrap.interval(METRICS["bias"].value(bootstrap.resample({"error": np.arange(4.0), "n": np.ones(4)}, drawn)), 4)
    assert np.isnan(low)
    assert np.isnan(high)


def test_nll_of_a_gaussian_is_in_model_units() -> None:
    """By hand: in units of std 2 the errors are 0.5, 0, -1.5, 0.5 and the scale 0.5."""
    outcome = Outcome(TRUTH, MEAN, scale=np.full((4, 1), 1.0), std=np.array([2.0]))
    expected = np.mean([0.5 * np.log(2 * np.pi) + np.log(0.5) + 0.5 * e**2 for e in (1, 0, -3, 1)])
    assert value("nll", outcome) == pytest.approx(expected)
    assert value("nll", outcome, [slice(0, 1), slice(1, 4)]) == pytest.approx(expected)
    exact = Outcome(TRUTH, TRUTH, scale=np.zeros((4, 1)))
    assert value("nll", exact) == pytest.approx(0.5 * np.log(2 * np.pi) + np.log(1e-3))
    assert np.isnan(value("nll", Outcome(TRUTH, MEAN)))
