"""A moment as text."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, timezone

import pytest

from pipeline import utc


def test_a_moment_is_written_in_utc_to_the_second() -> None:
    assert utc.text(datetime(2026, 11, 22, 15, 4, 5, 999_999, UTC)) == "2026-11-22T15:04:05Z"
    assert utc.text(datetime(2026, 11, 22, 1, 0, tzinfo=timezone(timedelta(hours=5, minutes=30)))) == "2026-11-21T19:30:00Z"


def test_local_time_is_not_guessed() -> None:
    with pytest.raises(ValueError, match="needs a time zone, found 2026-11-22"):
        utc.text(datetime(2026, 11, 22))
