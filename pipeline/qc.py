"""Quality control of time series with ioos-qc, as QARTOD flags beside the untouched values, for all sensors of a variable at once.

1 pass, 2 not evaluated, 3 suspect, 4 fail, 9 missing. A test never sees a value that an earlier test failed. The engines' blind
spots are covered here: a value beside a gap gets a second spike test, a flat line is flagged from its start, rates are per second,
and a rate over a gap is "not evaluated" instead of "pass".
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Annotated, Any

import numpy as np
import pandas as pd
from ioos_qc import qartod
from pydantic import BeforeValidator, ConfigDict, Field, PlainSerializer

from pipeline.lexicon import Variable
from pipeline.params import Section

PASS, NOT_EVALUATED, SUSPECT, FAIL, MISSING = 1, 2, 3, 4, 9
TESTS = ("gross_range", "spike", "rate_of_change", "flat_line", "gap", "neighbor", "multi_variate")
FLAGS = tuple(f"flag_{test}" for test in (*TESTS, "aggregate"))


def _timedelta(text: Any) -> pd.Timedelta:
    try:
        return pd.Timedelta(text)
    except (TypeError, ValueError) as error:
        raise ValueError("expected a duration such as 1h, 3s or 2d") from error


Duration = Annotated[pd.Timedelta, BeforeValidator(_timedelta), PlainSerializer(str)]


class FlatLine(Section):
    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    suspect: Duration
    fail: Duration
    tolerance: float = Field(gt=0)  # values closer than this count as equal; the engine never flags with 0
    above: float | None = None  # values at or below this (a detection limit) may stand still


class SeriesTests(Section):
    """Thresholds for one variable, in its stored unit. A test without thresholds is not evaluated."""

    model_config = ConfigDict(frozen=True, extra="forbid", arbitrary_types_allowed=True)

    fail: tuple[float | None, float | None] | None = None  # replaces the lexicon's physical range
    suspect: tuple[float | None, float | None] | None = None  # replaces the lexicon's usual range
    codes: tuple[float, ...] = ()  # saturation codes: no measurement, whatever the range says
    ceilings: tuple[float, ...] = ()  # where the instrument stops counting: suspect
    spike: tuple[float, float] | None = None  # suspect, fail: distance from both neighbours on the same side
    rate_of_change: tuple[float, float] | None = None  # suspect, fail, per hour
    flat_line: FlatLine | None = None
    beside_gap: Duration = pd.Timedelta(0)  # how far the second spike test may look for company
    gap: Duration | None = None  # the first value after a longer silence is suspect

    @property
    def margin(self) -> pd.Timedelta:
        """How much of the series before and after a value can matter for its flags."""
        spans = [self.beside_gap, self.gap or pd.Timedelta(0)]
        if self.flat_line:
            spans.append(2 * self.flat_line.fail)  # a stuck stretch may hold short gaps
        return max(spans)


def spans(variable: Variable, tests: SeriesTests) -> tuple[tuple[float, float], tuple[float, float]]:
    """The (fail, suspect) ranges in force, with infinities where there is no bound and the suspect range inside the fail range."""

    def closed(bounds: tuple[float | None, float | None]) -> tuple[float, float]:
        return (-np.inf if bounds[0] is None else bounds[0], np.inf if bounds[1] is None else bounds[1])

    fail = closed(tests.fail or variable.fail)
    usual = closed(tests.suspect or variable.suspect)
    return fail, (max(fail[0], usual[0]), min(fail[1], usual[1]))


def series_flags(
    value: np.ndarray, time: np.ndarray, series: np.ndarray, variable: Variable, tests: SeriesTests, step: pd.Timedelta
) -> dict[str, np.ndarray]:
    """Flags of one variable at all its sensors.

    Args:
        value: [n] float, NaN where missing.
        time: [n] datetime64, increasing inside a series.
        series: [n] int, number of the series (a station, a trip); each series is one contiguous stretch.
        step: nominal time between neighbours. More than 1.5 of it is a gap.

    Returns:
        One int8 array [n] per series test, keys such as `flag_spike`.
    """
    time = time.astype("datetime64[us]")
    missing = ~np.isfinite(value)
    gross = _gross_range(value, variable, tests)
    usable = np.where(gross == FAIL, np.nan, value)
    spike = _spike(usable, time, series, tests, step)
    steady = np.where(spike == FAIL, np.nan, usable)
    flags = {
        "flag_gross_range": gross,
        "flag_spike": spike,
        "flag_rate_of_change": _rate_of_change(steady, time, series, tests, step),
        "flag_flat_line": _flat_line(usable, time, series, tests, step),
        "flag_gap": _gap(time, series, tests, missing),
    }
    for name, flag in flags.items():
        flags[name] = np.where(missing, MISSING, flag).astype(np.int8)
    return flags


def _gross_range(value: np.ndarray, variable: Variable, tests: SeriesTests) -> np.ndarray:
    fail, suspect = spans(variable, tests)
    flag = np.asarray(qartod.gross_range_test(value, fail, suspect)).astype(np.int8)
    flag[np.isin(value, tests.ceilings) & (flag == PASS)] = SUSPECT
    flag[np.isin(value, tests.codes)] = FAIL
    return flag


def _spike(value: np.ndarray, time: np.ndarray, series: np.ndarray, tests: SeriesTests, step: pd.Timedelta) -> np.ndarray:
    flag = np.full(len(value), NOT_EVALUATED, np.int8)
    if tests.spike is None or not len(value):
        return flag
    suspect, fail = tests.spike
    finite = np.isfinite(value)
    here, laid, _ = _laid_out(value, time, series, step)
    # "differential": both neighbours lie on the same side, so the shoulders of a spike and a steep front pass.
    tested = np.asarray(_quiet(qartod.spike_test, laid, suspect, fail, method="differential"))[here]
    whole = np.isfinite(laid[np.maximum(here - 1, 0)]) & np.isfinite(laid[np.minimum(here + 1, len(laid) - 1)]) & finite
    whole &= (here > 0) & (here < len(laid) - 1)
    flag[whole] = tested[whole]
    alone = np.flatnonzero(finite & ~whole)
    distance = _distance_from_company(value, time, series, alone, tests.beside_gap)
    known = np.isfinite(distance)
    flag[alone[known]] = np.select([distance[known] > fail, distance[known] > suspect], [FAIL, SUSPECT], PASS)
    return flag


def _distance_from_company(value: np.ndarray, time: np.ndarray, series: np.ndarray, chosen: np.ndarray, reach: pd.Timedelta) -> np.ndarray:
    """Distance of each chosen value from the median of up to four values around it, two a side; NaN with fewer than two in reach."""
    present = np.flatnonzero(np.isfinite(value))
    at = np.searchsorted(present, chosen)
    company = np.full((len(chosen), 4), np.nan)
    for column, offset in enumerate((-2, -1, 1, 2)):
        other = at + offset
        inside = (other >= 0) & (other < len(present))
        index = present[np.where(inside, other, 0)] if len(present) else np.zeros(len(chosen), int)
        near = inside & (series[index] == series[chosen]) & (np.abs(time[index] - time[chosen]) <= reach.to_timedelta64())
        company[near, column] = value[index[near]]
    enough = np.isfinite(company).sum(axis=1) >= 2
    distance = np.full(len(chosen), np.nan)
    distance[enough] = np.abs(value[chosen[enough]] - np.nanmedian(company[enough], axis=1))
    return distance


def _rate_of_change(value: np.ndarray, time: np.ndarray, series: np.ndarray, tests: SeriesTests, step: pd.Timedelta) -> np.ndarray:
    flag = np.full(len(value), NOT_EVALUATED, np.int8)
    if tests.rate_of_change is None or not len(value):
        return flag
    suspect, fail = (limit / 3600.0 for limit in tests.rate_of_change)  # the engine counts per second
    here, laid, when = _laid_out(value, time, series, step)
    tested = np.asarray(_quiet(qartod.rate_of_change_test, laid, when, suspect, fail))[here]
    before = np.isfinite(laid[np.maximum(here - 1, 0)]) & (here > 0) & np.isfinite(value)
    before &= when[here] - when[np.maximum(here - 1, 0)] >= np.timedelta64(1, "s")  # the engine counts whole seconds
    flag[before] = tested[before]
    return flag


def _flat_line(value: np.ndarray, time: np.ndarray, series: np.ndarray, tests: SeriesTests, step: pd.Timedelta) -> np.ndarray:
    """The engine looks back over a number of values, so only stretches of near-equal neighbours that are long enough can be flagged:
    it judges those alone, and the verdict is carried back to the start of the window it looked at."""
    flag = np.full(len(value), NOT_EVALUATED, np.int8)
    if tests.flat_line is None or not len(value):
        return flag
    limits = tests.flat_line
    present = np.flatnonzero(np.isfinite(value))
    flag[present] = PASS
    kept = value[present]
    gap = np.diff(time[present]) > max(1.5 * step, tests.beside_gap).to_timedelta64()
    breaks = (np.abs(np.diff(kept)) >= limits.tolerance) | (np.diff(series[present]) != 0) | gap
    edges = np.concatenate([[0], np.flatnonzero(breaks) + 1, [len(present)]])
    shortest = max(int(limits.suspect / step), 1)
    for start, end in pairwise(edges):
        if end - start <= shortest or (limits.above is not None and kept[start] <= limits.above):
            continue
        axis = np.datetime64("1970-01-01", "us") + np.arange(end - start) * step.to_timedelta64()
        seconds = [int(limit.total_seconds()) for limit in (limits.suspect, limits.fail)]
        tested = np.asarray(qartod.flat_line_test(kept[start:end], axis, *seconds, tolerance=limits.tolerance))
        for verdict, limit in ((SUSPECT, limits.suspect), (FAIL, limits.fail)):
            back, ends = int(limit / step), np.flatnonzero(tested >= verdict)
            windows = np.zeros(end - start + 1, int)
            np.add.at(windows, ends - back, 1)
            np.add.at(windows, ends + 1, -1)
            flag[present[start:end][np.cumsum(windows[:-1]) > 0]] = verdict
    return flag


def _gap(time: np.ndarray, series: np.ndarray, tests: SeriesTests, missing: np.ndarray) -> np.ndarray:
    flag = np.full(len(time), NOT_EVALUATED, np.int8)
    if tests.gap is None or not len(time):
        return flag
    present = np.flatnonzero(~missing)
    late = np.diff(time[present]) > tests.gap.to_timedelta64()
    same = np.diff(series[present]) == 0
    flag[present[1:][same]] = np.where(late[same], SUSPECT, PASS)
    return flag


def _laid_out(value: np.ndarray, time: np.ndarray, series: np.ndarray, step: pd.Timedelta) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All series in one array with a NaN at every gap and border, as the engine knows gaps only as NaN.

    Returns: where each input value went [n], values [m], times [m]."""
    border = (np.diff(series) != 0) | (np.diff(time) > (1.5 * step).to_timedelta64())
    here = np.arange(len(value)) + np.concatenate([[0], np.cumsum(border)])
    laid = np.full(here[-1] + 1, np.nan)
    laid[here] = value
    when = np.empty(len(laid), "datetime64[us]")
    when[here] = time
    hole = np.ones(len(laid), bool)
    hole[here] = False
    when[hole] = time[:-1][border] + np.timedelta64(1, "s")
    return here, laid, when


def _quiet(test: Any, *arguments: Any, **options: Any) -> Any:
    with warnings.catch_warnings():  # the engine divides by the times between series, whose results are not used
        warnings.simplefilter("ignore", RuntimeWarning)
        return test(*arguments, **options)


def ordering_flags(rows: pd.DataFrame, order: Sequence[str], ratio: float, offset: float, usable: np.ndarray) -> np.ndarray:
    """Flag values of one place and time that contradict their order (PM1 <= PM2.5 <= PM10).

    Both values of a pair are suspect when the smaller class exceeds `ratio * larger + offset`. Values that failed before (`usable`
    False) neither judge nor are judged.
    """
    flag = np.full(len(rows), NOT_EVALUATED, np.int8)
    place = pd.MultiIndex.from_frame(rows[["time", "platform_id"]])
    where = {name: np.flatnonzero((rows["variable"] == name).to_numpy() & usable) for name in order}
    value = rows["value"].to_numpy()
    for number, fine in enumerate(order):
        for coarse in order[number + 1 :]:
            found = place[where[coarse]].get_indexer(place[where[fine]])
            small, large = where[fine][found >= 0], where[coarse][found[found >= 0]]
            verdict = np.where(value[small] > ratio * value[large] + offset, SUSPECT, PASS).astype(np.int8)
            for rows_of in (small, large):
                flag[rows_of] = np.where(flag[rows_of] == SUSPECT, SUSPECT, verdict)
    return flag


def aggregate(flags: Mapping[str, np.ndarray]) -> np.ndarray:
    """The one verdict per value: missing, else the worst of fail, suspect and pass, else not evaluated."""
    votes = np.stack(list(flags.values()))
    verdict = np.full(votes.shape[1], NOT_EVALUATED, np.int8)
    for flag in (PASS, SUSPECT, FAIL, MISSING):
        verdict[(votes == flag).any(axis=0)] = flag
    return verdict
