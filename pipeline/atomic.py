"""Results appear whole or not at all: write beside the destination, then rename. One writer per destination."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # of an OSError: the disk, a quota or the largest file is full


@contextmanager
def writing(destination: Path) -> Iterator[Path]:
    """Yield a temporary path beside `destination` (file or folder, the caller creates it); move it into place on success.

    The temporary name is fixed, so what a killed run left behind is removed by the next one. A lock in the parent folder
    makes a second writer of the same destination wait: a stage orphaned by a killed `dvc` cannot race its own rerun.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = destination.with_name(f".{destination.name}.tmp")
    lock = destination.with_name(f".{destination.name}.lock")
    with lock.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        remove(temporary)
        try:
            yield temporary
            if not temporary.exists():
                raise FileNotFoundError(f"nothing was written to {temporary}: {destination} stays as it was")
            _exchange(temporary, destination)
        finally:
            remove(temporary)


def _exchange(temporary: Path, destination: Path) -> None:
    if destination.is_dir() and not destination.is_symlink():  # rename cannot replace a non-empty folder
        old = destination.with_name(f".{destination.name}.old")
        remove(old)
        destination.rename(old)
        temporary.rename(destination)
        remove(old)
    else:
        os.replace(temporary, destination)


def remove(path: Path) -> None:
    """Remove a file, link or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_text(destination: Path, text: str) -> None:
    """Write a small text file atomically."""
    with writing(destination) as temporary:
        temporary.write_text(text, encoding="utf-8")
