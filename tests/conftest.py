"""Shared fixtures. Telemetry is off before any library that has it is imported."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.update(
    PREFECT_SERVER_ANALYTICS_ENABLED="false",
    DO_NOT_TRACK="1",
    DVC_NO_ANALYTICS="1",
    GX_ANALYTICS_ENABLED="false",
    MPLBACKEND="Agg",
    GOMP_SPINCOUNT="2000",  # as in a stage: workers side by side must not take each other's cores while they wait
)

import pytest


@pytest.fixture(scope="session")
def mirror() -> Path:
    """Real data laid out SOURCE/files: FIELDCAST_MIRROR, or a folder shared/data beside the repository."""
    beside = Path(__file__).parents[2] / "shared" / "data"
    named = os.environ.get("FIELDCAST_MIRROR") or (str(beside) if beside.is_dir() else "")
    if not named or not Path(named).is_dir():
        pytest.skip(f"no real data: FIELDCAST_MIRROR is {named or 'not set'}, and no folder shared/data lies beside the repository")
    return Path(named)
