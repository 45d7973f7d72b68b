"""The build flow: fetch what can be had, walk DVC's plan one task a stage, publish what is good.

The flow adds eyes and a clock, not logic: the stages, their order and whether they must run are DVC's. Stages that do not wait for each
other run side by side. A stage that failed stops what depends on it and nothing else; a source that cannot be had leaves its stages out.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from graphlib import TopologicalSorter
from typing import Any

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency
from prefect.futures import PrefectFuture, as_completed
from prefect.states import Completed, Failed, State

from flows import artifacts, dvc
from flows.fetch import fetch_sources
from flows.publish import publish_datasets


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def reproduce(stage: str) -> State[Any]:
    """Bring one DVC stage up to date."""
    logger = get_run_logger()
    ran = dvc.reproduce(stage, logger.info)
    return Completed(message=f"{stage} ran") if ran else Completed(name="Cached", message=f"{stage} was up to date")


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def up_to_date(stage: str) -> State[Any]:
    """Show a stage that nothing changed for; DVC need not be asked again."""
    return Completed(name="Cached", message=f"{stage} was up to date")


@task(task_run_name="{stage}", cache_policy=NO_CACHE)
def left_out(stage: str, reason: str) -> State[Any]:
    """Show a stage that cannot run here, with the reason."""
    return Completed(name="Skipped", message=reason)


@flow(name="build", validate_parameters=True)
def build(
    stages: list[str] | None = None,
    sources: list[str] | None = None,
    publish: bool = True,
    gpu: bool = False,
    skip_if_late: float | None = None,
) -> State[Any]:
    """Bring the pipeline up to date.

    Args:
        stages: kinds of stages to walk (`ingest`, `train`, ...); None walks all. A stage left out counts as up to date.
        sources: sources to fetch; None fetches all, [] none.
        publish: commit good forecasts and pages to data/published.
        gpu: hold the `gpu` concurrency limit while running.
        skip_if_late: minutes; a scheduled run that starts later than this is skipped, so that late runs do not pile up.
    """
    if late := _minutes_late(skip_if_late):
        return Completed(
            name="Skipped", message=f"started {late:.0f} minutes late, the limit is {skip_if_late:.0f}: the next run does the work"
        )
    unavailable = fetch_sources(sources)
    if gpu:
        with concurrency("gpu", occupy=1, strict=True):
            outcome = walk(stages, unavailable)
    else:
        outcome = walk(stages, unavailable)
    published = publish_datasets(outcome, unavailable) if publish else {}
    artifacts.show(outcome, unavailable, published)
    failed = [name for name, result in outcome.items() if result == "Failed"]
    failed += [f"publish@{key} ({text})" for key, text in published.items() if not text.startswith(("published", "unchanged"))]
    if failed:
        return Failed(message=f"failed: {', '.join(failed)}; see the logs of these tasks")
    counts = ", ".join(f"{list(outcome.values()).count(name)} {name.lower()}" for name in ("Ran", "Cached", "Skipped", "Blocked"))
    return Completed(message=counts)


def walk(kinds: Sequence[str] | None, unavailable: dict[str, str]) -> dict[str, str]:
    """Walk DVC's plan; the outcome of each stage: Ran, Cached, Skipped (no raw data), Failed, or Blocked (by a failure).

    Stages that do not wait for each other run side by side, FIELDCAST_JOBS of them, but never two trainings: each takes the whole device.
    """
    logger = get_run_logger()
    plan, stale, jobs = dvc.plan(), dvc.changed(), _jobs()
    if kinds is not None:
        plan = {stage: ancestors for stage, ancestors in plan.items() if stage.partition("@")[0] in kinds}
        plan = {stage: ancestors & plan.keys() for stage, ancestors in plan.items()}
    outcome: dict[str, str] = {}
    futures: dict[str, PrefectFuture[Any]] = {}
    sorter = TopologicalSorter(plan)
    sorter.prepare()
    ready: list[str] = []
    running: dict[PrefectFuture[Any], str] = {}
    while sorter.is_active():
        ready = sorted([*ready, *sorter.get_ready()], key=lambda stage: (not _is_training(stage), list(plan).index(stage)))
        settled = False
        for stage in [*ready]:
            waits = [futures[name] for name in sorted(plan[stage]) if name in futures]
            found = {outcome[name] for name in plan[stage]}
            absent = dvc.missing_raw(stale.get(stage, []))
            if found & {"Failed", "Blocked"}:
                outcome[stage] = "Blocked"
                culprits = ", ".join(name for name in sorted(plan[stage]) if outcome[name] in ("Failed", "Blocked"))
                logger.warning("%s is blocked: %s failed", stage, culprits)
            elif absent or "Skipped" in found:
                reason = f"no raw data: {', '.join(absent)}" if absent else "its source was left out"
                futures[stage] = left_out.submit(stage, reason, wait_for=waits, return_state=False)
                outcome[stage] = "Skipped"
            elif stage not in stale and "Ran" not in found:
                futures[stage] = up_to_date.submit(stage, wait_for=waits, return_state=False)
                outcome[stage] = "Cached"
            elif len(running) < jobs and not (_is_training(stage) and any(map(_is_training, running.values()))):
                futures[stage] = reproduce.submit(stage, wait_for=waits, return_state=False)
                running[futures[stage]] = stage
                ready.remove(stage)
                continue
            else:
                continue
            ready.remove(stage)
            sorter.done(stage)
            settled = True
        if not settled:  # nothing more can start before something ends
            future = next(as_completed([*running]))
            stage = running.pop(future)
            future.wait()  # only now is its state the final one
            state = future.state
            outcome[stage] = "Failed" if not state.is_completed() else "Cached" if state.name == "Cached" else "Ran"
            sorter.done(stage)
    return {stage: outcome[stage] for stage in plan}


def _is_training(stage: str) -> bool:
    return stage.partition("@")[0] == "train"


def _jobs() -> int:
    """Stages at a time. It changes no result, so it is no parameter."""
    return max(1, int(os.environ.get("FIELDCAST_JOBS") or min(4, os.cpu_count() or 1)))


def _minutes_late(limit: float | None) -> float | None:
    """How late a scheduled run started, if that is more than the limit."""
    scheduled = runtime.flow_run.scheduled_start_time
    if limit is None or scheduled is None:
        return None
    late = datetime.now(UTC) - scheduled
    return late / timedelta(minutes=1) if late > timedelta(minutes=limit) else None
