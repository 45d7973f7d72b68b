"""What it costs to find that nothing has to be done: a no-op `dvc repro` and a no-op flow against a bare `dvc status`, in one run.

    python -m benchmarks.overhead [--rounds 3]

The project is a copy of this repository with tiny parameters, built once before anything is timed (about a minute). The flow fetches and
publishes nothing; it is timed on a server that is already running, which is then stopped, and on the embedded one that it starts itself.
A command counts only if it says that nothing ran. Medians over the rounds are compared.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from tests import tiny_project

START_SECONDS = 120
FLOW = ("flows", "--sources", "--no-publish")
SERVED = "no-op flow, running server"
COMMANDS = {"dvc status": ("dvc", "status"), "no-op dvc repro": ("dvc", "repro"), "no-op flow, embedded server": FLOW}
NOTHING_RAN = {"dvc": "up to date", "flows": "Completed: 0 ran"}


class Cost(NamedTuple):
    seconds: float
    cpu: float


def cost(folder: Path, command: tuple[str, ...], **environment: str) -> Cost:
    """Wall and CPU seconds of a Python module run in the project, with its children. Raises SystemExit if it failed or did something."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", *command],
        cwd=folder,
        env=tiny_project.environment(folder, **environment),
        capture_output=True,
        text=True,
    )
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    expected = NOTHING_RAN[command[0]]
    if done.returncode or expected not in done.stdout:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode} and had to say {expected!r}, so that its time means nothing:\n"
            f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        )
    return Cost(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


@contextlib.contextmanager
def server(folder: Path) -> Iterator[str]:
    """A Prefect server on a free port of this machine; the address of its API. Raises TimeoutError if it does not answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}/api"
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, cwd=folder, env=tiny_project.environment(folder), stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_SECONDS
            while not answers(f"{address}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise TimeoutError(f"no answer from {address}/health; the server said:\n{(folder / 'server.log').read_text()[-2000:]}")
                time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait()


def answers(address: str) -> bool:
    try:
        with urllib.request.urlopen(address, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:
        return False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    os.environ.pop("PREFECT_API_URL", None)  # otherwise the embedded server would not be used
    measured: dict[str, list[Cost]] = {name: [] for name in (*COMMANDS, SERVED)}
    with tempfile.TemporaryDirectory() as temporary:
        folder = tiny_project.make(Path(temporary))
        tiny_project.run(folder, "dvc", "repro")
        with server(folder) as address:
            for _ in range(rounds):
                measured[SERVED].append(cost(folder, FLOW, PREFECT_API_URL=address))
        for _ in range(rounds):
            for name, command in COMMANDS.items():
                measured[name].append(cost(folder, command))
    medians = {name: Cost(*map(statistics.median, zip(*costs, strict=True))) for name, costs in measured.items()}
    floor = medians["dvc status"]
    title = f"Finding nothing to do, {rounds} round(s); {os.cpu_count()} cores, load average {os.getloadavg()[0]:.1f}"
    table = Table("", "seconds", "times dvc status", "CPU seconds", "times dvc status", title=title)
    for name, each in medians.items():
        ratios = [f"{mine / theirs:.2f}" for mine, theirs in zip(each, floor, strict=True)]
        table.add_row(name, f"{each.seconds:.1f}", ratios[0], f"{each.cpu:.1f}", ratios[1])
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
