"""The build flow: fetch what can be had, walk DVC's plan one task a stage, publish what is good.

The flow adds eyes and a clock, not logic: the stages, their order and whether they must run are DVC's. Stages of one clone run one at a
time. A stage that failed stops what depends on it and nothing else; a source that cannot be had leaves its stages out.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from prefect import flow, get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.concurrency.sync import concurrency
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
    """Walk DVC's plan; the outcome of each stage: Ran, Cached, Skipped (no raw data), Failed, or Blocked (by a failure)."""
    logger = get_run_logger()
    plan, stale = dvc.plan(), dvc.changed()
    outcome: dict[str, str] = {}
    states: dict[str, State[Any]] = {}
    for stage, ancestors in plan.items():
        if kinds is not None and stage.partition("@")[0] not in kinds:
            continue
        waits = [states[name] for name in sorted(ancestors) if name in states]
        found = {outcome.get(name) for name in ancestors}
        absent = [path for path in dvc.missing_raw(stale.get(stage, [])) if path]
        if found & {"Failed", "Blocked"}:
            outcome[stage] = "Blocked"
            logger.warning(
                "%s is blocked: %s failed", stage, ", ".join(n for n in sorted(ancestors) if outcome.get(n) in ("Failed", "Blocked"))
            )
            continue
        if absent or "Skipped" in found:
            reason = f"no raw data: {', '.join(absent)}" if absent else "its source was left out"
            states[stage] = left_out(stage, reason, wait_for=waits, return_state=True)
            outcome[stage] = "Skipped"
        elif stage not in stale and "Ran" not in found:
            states[stage] = up_to_date(stage, wait_for=waits, return_state=True)
            outcome[stage] = "Cached"
        else:
            states[stage] = reproduce(stage, wait_for=waits, return_state=True)
            outcome[stage] = "Failed" if not states[stage].is_completed() else "Cached" if states[stage].name == "Cached" else "Ran"
    return outcome


def _minutes_late(limit: float | None) -> float | None:
    """How late a scheduled run started, if that is more than the limit."""
    scheduled = runtime.flow_run.scheduled_start_time
    if limit is None or scheduled is None:
        return None
    late = datetime.now(UTC) - scheduled
    return late / timedelta(minutes=1) if late > timedelta(minutes=limit) else None
