"""Quality control of series: the engines' blind spots, each with a case that the bare engine gets wrong."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from pipeline import lexicon, params, qc

PM = lexicon.lookup("pm2p5")
HOUR = pd.Timedelta("1h")
TESTS = {
    "spike": [50, 200],
    "rate_of_change": [100, 400],
    "flat_line": {"suspect": "6h", "fail": "12h", "tolerance": 0.01},
    "beside_gap": "3h",
    "gap": "24h",
    "codes": [1985],
    "ceilings": [999],
}


def flags(value, time=None, series=None, step=HOUR, **changes):
    value = np.asarray(value, float)
    tests = params.validated({**TESTS, **changes}, qc.SeriesTests, "series.pm2p5")
    time = np.datetime64("2020-01-01", "us") + np.arange(len(value)) * np.timedelta64(1, "h") if time is None else time
    series = np.zeros(len(value), int) if series is None else np.asarray(series)
    return qc.series_flags(value, time, series, PM, tests, step)


def smooth(n=48, seed=0):
    rng = np.random.default_rng(seed)
    return 60 + 20 * np.sin(np.arange(n) / 5) + rng.normal(0, 2, n)


def test_sound_series_pass_every_test():
    found = flags(smooth())
    for name, flag in found.items():
        assert set(flag[1:-1]) == {qc.PASS}, name


def test_missing_values_are_nine_in_every_test():
    value = smooth()
    value[[5, 20]] = np.nan
    for name, flag in flags(value).items():
        assert (flag[[5, 20]] == qc.MISSING).all(), name
        assert qc.MISSING not in np.delete(flag, [5, 20]), name


def test_gross_range_keeps_small_negatives_and_fails_codes():
    flag = flags([60, -3, -8, -50, 950, 1600, 1985, 999])["flag_gross_range"]
    assert flag.tolist() == [1, 1, 3, 4, 3, 4, 4, 3]


def test_saturation_code_inside_the_range_fails():
    assert flags([60, 1985, 60], fail=[-20, 5000], suspect=[-5, 5000])["flag_gross_range"].tolist() == [1, 4, 1]


def test_spike_is_found_and_its_shoulders_pass():
    value = smooth()
    value[20] += 300
    assert flags(value)["flag_spike"][18:23].tolist() == [1, 1, 4, 1, 1]


@pytest.mark.parametrize("hole", [19, 21])
def test_spike_beside_a_gap_is_found(hole):
    value = smooth()
    value[20], value[hole] = 600, np.nan
    found = flags(value)["flag_spike"]
    assert found[20] == qc.FAIL
    assert (found[[17, 18, 22, 23]] == qc.PASS).all()


def test_spike_beside_absent_rows_is_found():
    """A gap is a row that is not there, not a NaN."""
    value, time = smooth(), np.datetime64("2020-01-01", "us") + np.arange(48) * np.timedelta64(1, "h")
    value[20] = 600
    keep = np.delete(np.arange(48), [21, 22])
    assert flags(value[keep], time[keep])["flag_spike"][20] == qc.FAIL


def test_value_alone_is_not_evaluated_rather_than_good():
    value = np.full(20, np.nan)
    value[10] = 800
    assert flags(value)["flag_spike"][10] == qc.NOT_EVALUATED


def test_value_that_failed_does_not_judge_its_neighbours():
    value = smooth()
    value[20] = 1985
    found = flags(value)
    assert found["flag_rate_of_change"][21] == qc.NOT_EVALUATED
    assert (found["flag_spike"][[19, 21]] == qc.PASS).all()


def test_rate_of_change_is_per_hour():
    value = np.concatenate([np.full(10, 60.0), np.full(10, 190.0)]) + np.arange(20) % 2
    found = flags(value)["flag_rate_of_change"]
    assert found[10] == qc.SUSPECT
    assert (np.delete(found, [0, 10]) == qc.PASS).all()
    minutes = np.datetime64("2020-01-01", "us") + np.arange(20) * np.timedelta64(1, "m")
    assert flags(value, minutes, step=pd.Timedelta("1min"))["flag_rate_of_change"][10] == qc.FAIL


def test_rate_after_a_gap_is_not_evaluated():
    value = smooth()
    value[20] = np.nan
    found = flags(value)["flag_rate_of_change"]
    assert found[21] == qc.NOT_EVALUATED
    assert found[0] == qc.NOT_EVALUATED


def test_flat_line_is_flagged_from_its_start():
    value = smooth()
    value[10:30] = 59.0
    found = flags(value)["flag_flat_line"]
    assert (found[10:30] == qc.FAIL).all()
    assert (found[:10] == qc.PASS).all()
    assert (found[30:] == qc.PASS).all()


def test_short_flat_line_is_suspect_and_shorter_passes():
    value = smooth()
    value[10:18] = 59.0
    value[30:35] = 71.0
    found = flags(value)["flag_flat_line"]
    assert (found[10:18] == qc.SUSPECT).all()
    assert (found[30:35] == qc.PASS).all()


def test_flat_line_goes_on_over_a_short_gap_and_a_lone_value_is_no_flat_line():
    value = smooth()
    value[10:30] = 59.0
    value[17] = np.nan
    found = flags(value)["flag_flat_line"]
    assert (np.delete(found[10:30], 7) == qc.FAIL).all()
    lone = np.full(48, np.nan)
    lone[[3, 40]] = [50, 60]
    assert (flags(lone)["flag_flat_line"][[3, 40]] == qc.PASS).all()


def test_constant_sensor_fails_everywhere_unless_it_sits_at_its_detection_limit():
    assert (flags(np.full(48, 12.0))["flag_flat_line"] == qc.FAIL).all()
    limit = {**TESTS["flat_line"], "above": 12.0}
    assert (flags(np.full(48, 12.0), flat_line=limit)["flag_flat_line"] == qc.PASS).all()


def test_first_value_after_a_long_silence_is_suspect():
    value = smooth(60)
    value[10:40] = np.nan
    found = flags(value)["flag_gap"]
    assert found[40] == qc.SUSPECT
    assert found[0] == qc.NOT_EVALUATED
    assert (found[41:] == qc.PASS).all()


def test_series_do_not_see_each_other():
    a, b = smooth(), smooth(seed=1) + 500
    time = np.datetime64("2020-01-01", "us") + np.arange(48) * np.timedelta64(1, "h")
    together = flags(np.concatenate([a, b]), np.concatenate([time, time]), np.repeat([0, 1], 48))
    for name, flag in flags(a).items():
        assert together[name][:48].tolist() == flag.tolist(), name
    for name, flag in flags(b).items():
        assert together[name][48:].tolist() == flag.tolist(), name


def test_untested_is_not_evaluated():
    value = smooth()
    tests = qc.SeriesTests()
    time = np.datetime64("2020-01-01", "us") + np.arange(48) * np.timedelta64(1, "h")
    found = qc.series_flags(value, time, np.zeros(48, int), PM, tests, HOUR)
    assert set(found["flag_spike"]) == set(found["flag_flat_line"]) == {qc.NOT_EVALUATED}


def test_order_of_particle_classes():
    rows = pd.DataFrame(
        {
            "time": pd.to_datetime(["2020-01-01"] * 6 + ["2020-01-02"], utc=True),
            "platform_id": ["a", "a", "a", "b", "b", "c", "a"],
            "variable": ["pm1", "pm2p5", "pm10", "pm2p5", "pm10", "pm2p5", "pm2p5"],
            "value": [10.0, 20, 30, 100, 40, 50, 60],
        }
    )
    flag = qc.ordering_flags(rows, ("pm1", "pm2p5", "pm10"), 1.2, 5, np.ones(7, bool))
    assert flag.tolist() == [1, 1, 1, 3, 3, 2, 2]
    usable = np.array([1, 1, 1, 1, 0, 1, 1], bool)
    assert qc.ordering_flags(rows, ("pm1", "pm2p5", "pm10"), 1.2, 5, usable)[3] == qc.NOT_EVALUATED


def test_aggregate_is_the_worst_vote():
    votes = {"a": np.array([1, 1, 2, 9, 2]), "b": np.array([2, 3, 2, 9, 2]), "c": np.array([1, 4, 2, 9, 1])}
    assert qc.aggregate(votes).tolist() == [1, 4, 2, 9, 1]


@pytest.mark.parametrize("wrong", [{"flat_line": {"suspect": "6h", "fail": "12h", "tolerance": 0}}, {"gap": "soon"}, {"spikes": [1, 2]}])
def test_wrong_thresholds_are_named(wrong):
    with pytest.raises(params.ParamsError, match=rf"series.pm2p5.{next(iter(wrong))}"):
        params.validated({**TESTS, **wrong}, qc.SeriesTests, "series.pm2p5")
