"""The same function over many partitions, in processes: FIELDCAST_WORKERS of them, one where the work is small."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import dask

R = TypeVar("R")


def count() -> int:
    return max(1, int(os.environ.get("FIELDCAST_WORKERS") or os.cpu_count() or 1))


def over(function: Callable[..., R], arguments: Sequence[tuple[Any, ...]], workers: int) -> list[R]:
    """`[function(*a) for a in arguments]`, in the same order. The processes are copies of one that has imported the function's module."""
    workers = min(workers, len(arguments))
    if workers <= 1:
        return [function(*each) for each in arguments]
    multiprocessing.get_context("forkserver").set_forkserver_preload([function.__module__])
    tasks = [dask.delayed(function, pure=False)(*each) for each in arguments]
    with dask.config.set({"multiprocessing.context": "forkserver"}):
        return list(dask.compute(*tasks, scheduler="processes", num_workers=workers, initializer=end_with_parent))


def end_with_parent() -> None:
    """End this process as soon as the one that asked for it is gone, so that no orphan of a killed run goes on writing."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
