"""The gate on tables: rules with a severity, judged by Great Expectations one table (one partition) at a time.

A rule that fails takes its severity: `block` stops the run, `quarantine` holds back the offending rows (or the whole partition, where
the rule is about the partition), `warn` only reports. This is the only file that knows Great Expectations.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np
import pandas as pd
from pydantic import Field

from pipeline.params import Section

os.environ.setdefault("GX_ANALYTICS_ENABLED", "false")
import great_expectations as gx
from great_expectations import expectations as gxe
from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults

logging.getLogger("great_expectations").setLevel(logging.WARNING)

Severity = Literal["block", "quarantine", "warn"]


class Rule(Section):
    severity: Severity
    mostly: float = Field(1.0, ge=0, le=1)  # share of the evaluated that must hold


def complete(rules: dict[str, Rule], names: tuple[str, ...]) -> dict[str, Rule]:
    """The rules of a gate; ValueError where one of `names` is missing or another is there."""
    missing, unknown = [name for name in names if name not in rules], [name for name in rules if name not in names]
    if missing or unknown:
        raise ValueError(f"missing rules: {missing or 'none'}, unknown rules: {unknown or 'none'}")
    return rules


@dataclass(frozen=True)
class Outcome:
    """What one rule found in one table."""

    rule: str
    where: str  # partition, or "all partitions"
    severity: Severity
    passed: bool
    evaluated: int  # the denominator: rows, sensors, frames or columns
    offenders: int
    detail: str = ""  # the first offenders, or what was found against what was expected
    rows: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), compare=False)  # numbers of the offending rows

    @staticmethod
    def of(
        rule: str, where: str, rules: Mapping[str, Rule], evaluated: int, offenders: int, detail: str = "", rows: Iterable[int] = ()
    ) -> Outcome:
        """Judge counts against the share that `rules[rule].mostly` asks for."""
        passed = evaluated - offenders >= rules[rule].mostly * evaluated
        return Outcome(rule, where, rules[rule].severity, passed, evaluated, offenders, detail, np.fromiter(rows, np.int64))


TYPES = {"time": "Timestamp", "knowledge_time": "Timestamp", "longitude": "float64", "latitude": "float64", "value": "float64"}
REQUIRED = ("time", "knowledge_time", "longitude", "latitude", "platform_id", "variable", "value")


def columns(table: pd.DataFrame, where: str, rules: Mapping[str, Rule]) -> Outcome:
    """Are all columns of the observations contract there, with their types? Without them no other rule can be judged."""
    needed = [*REQUIRED, "trip_id"]
    suite: list[Any] = [gxe.ExpectColumnToExist(column=name) for name in needed]
    suite += [gxe.ExpectColumnValuesToBeOfType(column=name, type_=kind) for name, kind in TYPES.items() if name in table and len(table)]
    bad = []
    for result in _validate(table, suite):
        if not result["success"]:
            kwargs = result["expectation_config"]["kwargs"]
            found = result["result"].get("observed_value")
            bad.append(f"{kwargs['column']}: {'no such column' if found is None else f'is {found}, expected ' + kwargs['type_']}")
    return Outcome.of("schema", where, rules, len(suite), len(bad), "; ".join(bad))


def observations(
    table: pd.DataFrame,
    where: str,
    rules: Mapping[str, Rule],
    variables: Iterable[str],
    area: tuple[float, float, float, float] | None,
    period: tuple[pd.Timestamp, pd.Timestamp] | None,
    limits: Mapping[str, tuple[float | None, float | None]],
    tolerance: pd.Timedelta,
) -> list[Outcome]:
    """Judge the rows of one partition.

    Args:
        table: rows with the columns of the observations contract; the index numbers them.
        variables: names that may occur.
        area: west, south, east, north in degrees, or None.
        period: first and last time that belong into this partition, or None where its name is not a period.
        limits: physically possible range per variable, None where there is no bound.
        tolerance: how much earlier than its own time an observation may be known (clocks differ a little).
    """
    low = table["variable"].map({name: bounds[0] for name, bounds in limits.items()}).astype("f8")
    high = table["variable"].map({name: bounds[1] for name, bounds in limits.items()}).astype("f8")
    judged = table.assign(lowest=low, highest=high, known_at=table["knowledge_time"] + tolerance)
    pair: dict[str, Any] = {"or_equal": True, "ignore_row_if": "either_value_is_missing"}
    suite: dict[str, list[Any]] = {
        "not_null": [gxe.ExpectColumnValuesToNotBeNull(column=name) for name in REQUIRED],
        "known_variable": [gxe.ExpectColumnValuesToBeInSet(column="variable", value_set=list(variables))],
        "unique": [gxe.ExpectCompoundColumnsToBeUnique(column_list=["time", "platform_id", "variable"], ignore_row_if="never")],
        "in_range": [
            gxe.ExpectColumnPairValuesAToBeGreaterThanB(column_A="value", column_B="lowest", **pair),
            gxe.ExpectColumnPairValuesAToBeGreaterThanB(column_A="highest", column_B="value", **pair),
        ],
        "known_after": [gxe.ExpectColumnPairValuesAToBeGreaterThanB(column_A="known_at", column_B="time", **pair)],
    }
    if area is not None:
        west, south, east, north = area
        suite["inside_area"] = [
            gxe.ExpectColumnValuesToBeBetween(column="longitude", min_value=west, max_value=east),
            gxe.ExpectColumnValuesToBeBetween(column="latitude", min_value=south, max_value=north),
        ]
    if period is not None:
        suite["inside_partition"] = [gxe.ExpectColumnValuesToBeBetween(column="time", min_value=period[0], max_value=period[1])]
    return _outcomes(judged, suite, where, rules)


def completeness(table: pd.DataFrame, where: str, rules: Mapping[str, Rule], least: float) -> Outcome:
    """Judge one row per sensor and variable with `present` and `expected` counts: the share present must reach `least`."""
    judged = table.assign(share=table["present"] / table["expected"])
    suite = {"completeness": [gxe.ExpectColumnValuesToBeBetween(column="share", min_value=least)]}
    return _outcomes(judged, suite, where, rules)[0]


def frames(table: pd.DataFrame, rules: Mapping[str, Rule], variables: Iterable[str]) -> list[Outcome]:
    """Judge one row per frame of a field: counts of cells (`VARIABLE_missing`, ...) against what a sound frame has."""
    suite: dict[str, list[Any]] = {
        "unique": [gxe.ExpectCompoundColumnsToBeUnique(column_list=["trajectory", "time"])],
        "no_empty_frame": [gxe.ExpectColumnValuesToBeBetween(column=f"{name}_missing", max_value=1, strict_max=True) for name in variables],
        "no_missing_cells": [
            gxe.ExpectColumnPairValuesToBeEqual(column_A=f"{name}_missing", column_B=f"{name}_mask") for name in variables
        ],
        "in_range": [gxe.ExpectColumnValuesToBeInSet(column=f"{name}_outside", value_set=[0]) for name in variables],
        "not_frozen": [gxe.ExpectColumnValuesToBeInSet(column="flag_flat_line", value_set=[1, 2])],
        "no_jump": [gxe.ExpectColumnValuesToBeInSet(column="flag_rate_of_change", value_set=[1, 2])],
        "steady_steps": [gxe.ExpectColumnValuesToBeInSet(column="flag_gap", value_set=[1, 2])],
    }
    return _outcomes(table, suite, "all frames", rules)


def _outcomes(table: pd.DataFrame, suite: Mapping[str, list[Any]], where: str, rules: Mapping[str, Rule]) -> list[Outcome]:
    """One outcome a rule; a rule of several expectations is broken by a row that breaks any of them."""
    if not len(table):
        return [Outcome.of(name, where, rules, 0, 0) for name in suite]
    owner = [name for name, parts in suite.items() for _ in parts]
    results = _validate(table, [part for parts in suite.values() for part in parts])
    rows: dict[str, set[int]] = {name: set() for name in suite}
    examples: dict[str, list[str]] = {name: [] for name in suite}
    for name, result in zip(owner, results, strict=True):
        offending = result["result"]["unexpected_index_list"] or []
        rows[name].update(offending)
        if offending:
            kwargs = result["expectation_config"]["kwargs"]
            what = kwargs.get("column") or kwargs.get("column_list") or f"{kwargs.get('column_A')}, {kwargs.get('column_B')}"
            examples[name].append(f"{what}: {_shown(result['result']['unexpected_list'][0])} at row {offending[0]}")
    return [Outcome.of(name, where, rules, len(table), len(rows[name]), "; ".join(examples[name]), sorted(rows[name])) for name in suite]


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(_shown(part) for part in value.values())
    if isinstance(value, list | tuple):
        return ", ".join(_shown(part) for part in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _validate(table: pd.DataFrame, suite: list[Any]) -> list[dict[str, Any]]:
    """Results in the order of the suite. An expectation that could not be evaluated at all is an error, not a failure."""
    for number, expectation in enumerate(suite):
        expectation.meta = {"number": number}
    batch = _batch_definition().get_batch({"dataframe": table})
    result = batch.validate(gx.ExpectationSuite("gate", expectations=suite), result_format={"result_format": "COMPLETE"})
    ordered: list[Any] = [None] * len(suite)
    for item in result.results:
        ordered[item.expectation_config.meta["number"]] = {
            "success": item.success,
            "result": item.result,
            "expectation_config": {"type": item.expectation_config.type, "kwargs": item.expectation_config.kwargs},
        }
        if not item.result and not item.success and item.expectation_config.type != "expect_column_to_exist":
            raise ValueError(f"Great Expectations could not evaluate {item.expectation_config.to_json_dict()}: {item.exception_info}")
    return ordered


@cache
def _batch_definition() -> Any:
    in_memory = InMemoryStoreBackendDefaults(init_temp_docs_sites=False)  # its own pages would be left behind in a temporary folder
    context = gx.get_context(mode="ephemeral", project_config=DataContextConfig(store_backend_defaults=in_memory))
    context.variables.progress_bars = {"globally": False}  # type: ignore[assignment]
    return context.data_sources.add_pandas("memory").add_dataframe_asset("table").add_batch_definition_whole_dataframe("whole")
