"""Publish task: commit a dataset's forecast and swap its pages, or say why it was refused. It looks at the clock, so it is no DVC stage."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from pipeline import params, publish, receipt

ROOT = Path("data")
PARAMS = Path("params.yaml")


def publish_datasets(outcome: Mapping[str, str], unavailable: Mapping[str, str]) -> dict[str, str]:
    """Publish every dataset that has a forecast and whose forecast stage is good; what became of each, in one line."""
    settings = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))
    result = {}
    for key, section in settings["publish"].items():
        checked = params.validated(section, publish.Params, f"publish.{key}", PARAMS)
        stage = f"forecast@{key}-{checked.model}"
        if outcome.get(stage, "Cached") in ("Ran", "Cached") and forecast_folder(key, checked.model).exists():
            state = publish_one(key, checked, dict(unavailable), return_state=True)
            result[key] = str(state.message)
    if not result:
        get_run_logger().warning("nothing to publish: no dataset has a forecast")
    return result


def _not_refused(task: Any, run: Any, state: State[Any]) -> bool:
    """A refusal stands; anything else that failed is tried again."""
    return not str(state.message).startswith("refused")


@task(task_run_name="publish@{key}", retries=2, retry_delay_seconds=10, retry_condition_fn=_not_refused, cache_policy=NO_CACHE)
def publish_one(key: str, section: publish.Params, unavailable: dict[str, str]) -> State[Any]:
    """Publish one dataset; a refusal is a failed task, and the last good forecast stays."""
    now = datetime.now(UTC)
    forecast = forecast_folder(key, section.model)
    source = yaml.safe_load(PARAMS.read_text(encoding="utf-8"))["source_of"][key]
    note = receipt.build(
        forecast,
        output=str(forecast),
        lock=Path("dvc.lock"),
        repository=Path() if Path(".git").exists() else None,
        settings=section.model_dump(mode="json"),
        inputs={"source": source, "missing": unavailable},
        now=now,
    )
    report = ROOT / "reports" / key
    pages = {
        "report.html": report / "report.html",
        "summary.json": report / "summary.json",
        "quality.html": ROOT / "checked" / source / "page.html",
    }
    done = publish.publish(forecast, ROOT / "published", key, section, note, now, pages)
    if done.status == "refused":
        return Failed(message=f"refused: {'; '.join(done.reasons)}")
    return Completed(name="Cached" if done.status == "unchanged" else None, message=f"{done.status} as {done.tag}")


def forecast_folder(key: str, model: str) -> Path:
    return ROOT / "forecasts" / key / model
