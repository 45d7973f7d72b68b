"""How many values a source of observations should hold, and whether partitions and sensors hold enough of them."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from pipeline import cross_partition, expectations
from pipeline.expectations import Outcome
from pipeline.observation_gate import Gated, ObservationGate, period_of

Campaign = tuple[pd.Timestamp, pd.Timestamp]  # first and last label between which values are expected


def campaigns_of(gated: list[Gated], gate: ObservationGate) -> tuple[Campaign, ...]:
    """When values are expected: as the parameters say, or the whole span of the data."""
    if gate.campaigns:
        return tuple((pd.Timestamp(first).tz_convert("UTC"), pd.Timestamp(last).tz_convert("UTC")) for first, last in gate.campaigns)
    times = [(each.first_time, each.last_time) for each in gated if each.first_time is not None and each.last_time is not None]
    return ((min(first for first, _ in times), max(last for _, last in times)),) if times else ()


def expected_steps(gated: list[Gated], gate: ObservationGate, campaigns: tuple[Campaign, ...]) -> dict[str, int]:
    """Steps of the time axis in each partition: what one sensor that never fails would have delivered."""
    known = [each for each in gated if each.first_time is not None]
    periods = {each.name: period_of(each.name, gate) or (each.first_time, each.last_time) for each in known}
    at_end = any(each.last_time == periods[each.name][1] for each in known)  # labels at the end of their interval
    step = gate.step

    def labels(period: tuple[pd.Timestamp, pd.Timestamp], named: bool) -> int:
        count = 0
        for first, last in campaigns:
            start, end = max(first, period[0]), min(last, period[1])
            if start > end:
                continue
            inside = int((end - start) / step) + 1
            if named and at_end and start == period[0]:
                inside -= 1
            if named and not at_end and end == period[1]:
                inside -= 1
            count += inside
        return count

    return {each.name: labels(periods[each.name], period_of(each.name, gate) is not None) for each in known}  # type: ignore[arg-type]


def _presence(gated: list[Gated], gate: ObservationGate) -> pd.DataFrame:
    """present rows per partition and sensor that has an expected number; sensors known anywhere are known everywhere."""
    counts = pd.concat([each.counts.assign(partition=each.name) for each in gated if len(each.counts)])
    fixed = ~counts["moving"].astype(bool) & counts["platform_id"].astype(str).str.fullmatch(gate.fixed)
    return counts[fixed].groupby(["partition", "platform_id", "variable"], observed=True)["n"].sum().reset_index()


def judge(gated: list[Gated], repeats: pd.DataFrame, expected: Mapping[str, int], gate: ObservationGate) -> tuple[list[Outcome], set[str]]:
    rules = gate.rules
    present = _presence(gated, gate) if any(len(each.counts) for each in gated) else pd.DataFrame()
    names = ["completeness_partition", "completeness_sensor"]
    if not len(present):
        return [Outcome.of(name, cross_partition.WHERE, rules, 0, 0, "no sensor reports at every step") for name in names], set()
    if len(repeats):
        again = repeats.groupby(["partition", "platform_id", "variable"]).size()
        key = pd.MultiIndex.from_frame(present[["partition", "platform_id", "variable"]])
        present["n"] -= again.reindex(key, fill_value=0).to_numpy()
    sensors = present[["platform_id", "variable"]].drop_duplicates()
    by_sensor = present.groupby(["platform_id", "variable"])["n"].sum().rename("present").reset_index()
    by_sensor["expected"] = sum(expected.values())
    steps = pd.Series(dict(expected), name="steps")
    by_partition = (steps[steps > 0] * len(sensors)).rename("expected").to_frame()
    by_partition["present"] = present.groupby("partition")["n"].sum().reindex(by_partition.index, fill_value=0)
    by_partition = by_partition.rename_axis("partition").reset_index()
    outcomes, thin = [], set()
    for name, table, least in (
        (names[0], by_partition, gate.completeness["partition"]),
        (names[1], by_sensor, gate.completeness["sensor"]),
    ):
        judged = expectations.completeness(table, cross_partition.WHERE, {"completeness": rules[name]}, least)
        bad = table.loc[judged.rows].assign(share=lambda t: t["present"] / t["expected"]).sort_values("share", kind="stable")
        label = bad["partition"] if name == names[0] else bad["platform_id"] + " " + bad["variable"]
        detail = (
            f"below {least:.0%}: " + ", ".join(f"{a} {b:.1%}" for a, b in zip(label[:5], bad["share"][:5], strict=True)) if len(bad) else ""
        )
        outcomes.append(Outcome.of(name, cross_partition.WHERE, rules, judged.evaluated, judged.offenders, detail))
        if name == names[0] and rules[name].severity == "quarantine" and not judged.passed:
            thin = set(bad["partition"])
    return outcomes, thin
