"""Sides of a comparison, each in a process of its own: rounds alternate between them, and each has a peak memory of its own.

A comparison is a list of sides, each a function that builds a network and gives what it can do, its works by name ("train", "answer"),
and what a call of each work deals with. The peer's side may run in another Python, so nothing but the standard library is needed here at
import. Threads: one each. What a work takes is given in CPU seconds, which suffer less from other programs than seconds do; both ratios are
printed. Memory is what one call needs above what is held before it, that is without weights, moments of the optimiser and inputs.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 3
_TAG = "@side"  # what peers print themselves is not for us
_ONE_THREAD = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
}
_QUIET = {"PYTHONWARNINGS": "ignore", "TF_CPP_MIN_LOG_LEVEL": "3", "WANDB_MODE": "disabled"}
Works = tuple[dict[str, Callable[[], object]], int]  # by name, and the number of trained parameters


class Missing(Exception):
    """A side needs a module that its Python does not have."""


@dataclass(frozen=True)
class Peer:
    """The side that the others are compared with, and what it needs to be there."""

    name: str  # in the table
    needs: Mapping[str, str]  # environment variable -> what it names; arguments in the same order may name it instead
    build: Callable[..., Works]  # from what was named, as strings
    python: str | None = None  # the one of `needs` that names the Python of this side


@dataclass
class Measured:
    """Of one side."""

    parameters: int
    cpu: dict[str, list[float]] = field(default_factory=dict)  # seconds a call of each work
    wall: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, float] = field(default_factory=dict)  # MiB


# ---- in the process of a side


def _serve(build: Callable[[], Works]) -> None:
    """Build the works, then do what the other end asks for."""
    try:
        works, parameters = build()
    except ModuleNotFoundError as error:
        _tell("missing", error.name)
        return
    _tell("ready", parameters)
    for line in sys.stdin:
        order, work = line.strip().split(maxsplit=1)
        if order == "peak":
            works[work]()
            works[work]()  # the second call finds everything compiled and every moment made
            _tell(peak(works[work]))
        else:
            wall, cpu = time.perf_counter(), time.process_time()
            works[work]()
            _tell(time.perf_counter() - wall, time.process_time() - cpu)


def training(network: Any, loss: Callable[[], Any], lr: float = 1e-4) -> Callable[[], None]:
    """One step of a torch network: loss, backward, AdamW, and the gradients dropped."""
    import torch

    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=lr)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def count(network: Any) -> int:
    """Real numbers that are trained."""
    return sum(p.numel() * (2 if p.is_complex() else 1) for p in network.parameters() if p.requires_grad)


def _tell(*words: object) -> None:
    print(_TAG, *words, flush=True)


def peak(call: Callable[[], object]) -> float:
    """MiB that a call needs above what is held before; Linux."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before does not count as held
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
    call()
    return _resident("VmHWM") - before


def _resident(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024


# ---- at the other end


def compare(module: str, title: str, unit: str, points: Mapping[str, int], peer: Peer, ours: Mapping[str, Callable[[], Works]]) -> int:
    """The whole of `python -m benchmarks.MODULE`: a table of the works that `points` has, with the points that a call of each deals with.

    `python -m benchmarks.MODULE side NAME ...` is what it starts for each side.
    """
    if sys.argv[1:2] == ["side"]:
        name, *given = sys.argv[2:]
        _serve(ours[name] if name in ours else lambda: peer.build(*given))
        return 0
    found = named(peer.needs)
    if found is None:
        return 0

    def command(name: str, python: str = sys.executable) -> list[str]:
        return [python, "-m", f"benchmarks.{module}", "side", name, *found.values()]

    theirs = command(peer.name, found[peer.python]) if peer.python else command(peer.name)
    return _report(title, unit, points, {peer.name: theirs, **{name: command(name) for name in ours}})


def named(needs: Mapping[str, str]) -> dict[str, str] | None:
    """What the arguments or the environment name, paths absolute; None, with a message, where something is not named."""
    given = sys.argv[1 : 1 + len(needs)] if len(sys.argv) > len(needs) else [os.environ.get(variable, "") for variable in needs]
    if not all(given):
        where = "as the argument" if len(needs) == 1 else "as arguments"
        print(f"skipped: no peer; name {' and '.join(needs.values())} {where} or in {' and '.join(needs)}")
        return None
    return {variable: str(Path(one).absolute()) if Path(one).exists() else one for variable, one in zip(needs, given, strict=True)}


def _measured(commands: Mapping[str, list[str]], works: list[str]) -> dict[str, Measured]:
    """What every side needs for every work. Raises Missing, and RuntimeError where a side ends early."""
    with contextlib.ExitStack() as stack:
        sides = {name: stack.enter_context(_started(name, command)) for name, command in commands.items()}
        found = {name: Measured(side.parameters) for name, side in sides.items()}
        for work in works:
            for name, side in sides.items():
                found[name].peak[work] = float(side.ask("peak", work)[0])
            for _ in range(ROUNDS):
                for name, side in sides.items():
                    wall, cpu = side.ask("time", work)
                    found[name].wall.setdefault(work, []).append(float(wall))
                    found[name].cpu.setdefault(work, []).append(float(cpu))
    return found


def _report(title: str, unit: str, points: Mapping[str, int], commands: Mapping[str, list[str]]) -> int:
    """Measure and print a table; the first side is what the others are compared with."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=150)
    try:
        found = _measured(commands, list(points))
    except Missing as error:
        console.print(f"{title}: skipped, {error}")
        return 0
    table = Table(title=f"{title}; one thread, float32, {ROUNDS} rounds, load average {os.getloadavg()[0]:.1f}")
    for column in ("work", "side", "parameters", "CPU ms", f"{unit}/s", "peak MiB", "CPU ratio", "time ratio"):
        table.add_column(column, justify="left" if column in ("work", "side") else "right")
    for work, count_of in points.items():
        first = next(iter(found.values()))
        for name, side in found.items():
            cpu, wall = statistics.median(side.cpu[work]), statistics.median(side.wall[work])
            ratios = cpu / statistics.median(first.cpu[work]), wall / statistics.median(first.wall[work])
            numbers = f"{1e3 * cpu:.0f}", f"{count_of / cpu:,.0f}", f"{side.peak[work]:.0f}", *(f"{each:.2f}" for each in ratios)
            table.add_row(work, name, f"{side.parameters:,}", *numbers)
    console.print(table)
    return 0


@dataclass(frozen=True)
class _Side:
    process: subprocess.Popen[str]
    name: str
    parameters: int

    def ask(self, *words: str) -> list[str]:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)
        return _told(self.process, self.name)


@contextlib.contextmanager
def _started(name: str, command: list[str]) -> Iterator[_Side]:
    environment = {**os.environ, **_ONE_THREAD, **_QUIET, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        word, number = _told(process, name)
        if word == "missing":
            raise Missing(f"{name} needs {number}, which is not installed in {command[0]}")
        yield _Side(process, name, int(number))
    finally:
        process.kill()
        process.wait()


def _told(process: subprocess.Popen[str], name: str) -> list[str]:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(_TAG):
            return line.split()[1:]
    code = process.wait()
    raise RuntimeError(f"the side {name!r} ended with {code} and without an answer (-9: killed, perhaps for memory); its words are above")
