"""A moment of the clock as receipts, manifests and the server write it."""

from __future__ import annotations

from datetime import UTC, datetime


def text(now: datetime) -> str:
    """ISO 8601 to the second in UTC, `2026-11-22T15:00:00Z`. Raises ValueError without a time zone, which would be taken for local time."""
    if now.tzinfo is None:
        raise ValueError(f"`now` needs a time zone, found {now}: pass datetime.now(UTC)")
    return now.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
