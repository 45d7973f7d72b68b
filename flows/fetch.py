"""Fetch task: bring each source's raw files here, by the clock and from the outside world, so it is no DVC stage. Retries live here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import get_run_logger, runtime, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, State

from flows import dvc
from pipeline import fetch, params

RAW = Path("data/raw")
PARAMS = Path("params.yaml")
RETRIES = 2


def fetch_sources(names: Sequence[str] | None) -> dict[str, str]:
    """Fetch sources (None: all of `fetch.sources`) and version what changed; the reason for each that could not be had."""
    settings = params.load(PARAMS, "fetch", fetch.Params)
    unavailable = {}
    for name in settings.sources if names is None else names:
        state = fetch_one(name, settings, return_state=True)
        if state.name == "Unavailable":
            unavailable[name] = str(state.message)
            get_run_logger().warning("left out: %s", state.message)
        elif not state.is_completed():
            unavailable[name] = f"{name}: {state.message}"
    return unavailable


@task(task_run_name="fetch@{source}", retries=RETRIES, retry_delay_seconds=20, cache_policy=NO_CACHE)
def fetch_one(source: str, settings: fetch.Params) -> State[Any]:
    """Fetch one source. One that cannot be had is no failure of the run: what was fetched before stays, or its stages are left out."""
    logger = get_run_logger()
    folder, mirror = RAW / source, os.environ.get("FIELDCAST_MIRROR") or None
    try:
        manifest = fetch.fetch(source, folder, settings, mirror=mirror, now=datetime.now(UTC))
    except fetch.SourceUnavailable as error:
        if (
            runtime.deployment.id is not None and runtime.task_run.run_count <= RETRIES
        ):  # a network may come back; a person at a terminal is not kept waiting
            raise
        return Completed(name="Unavailable", message=str(error))
    dvc.add(folder, logger.info)
    return Completed(message=f"{source}: {len(manifest.files)} files, {sum(f.bytes for f in manifest.files.values()) / 1e6:.1f} MB")
