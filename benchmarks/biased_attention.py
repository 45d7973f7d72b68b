"""Attention with distance biases: dense against tiled against compiled, and BSA-TNP's memory as more points are asked for.

    python -m benchmarks.biased_attention              # small
    python -m benchmarks.biased_attention cpu          # a context of 10,000 points, up to 100,000 queries
    python -m benchmarks.biased_attention gpu          # a context of 100,000 points, up to 1,000,000 queries; refused without a GPU

First table: one call with five bases in space and three in time, at equal sizes and threads; rounds alternate between the sides and
medians are compared. Second table: the reference model answers more and more queries from one context. Peak memory is taken in a process
for each row, above what the process held before the call (resident on a CPU, allocated on a GPU). What is compiled is compiled before
anything is measured.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import sides
from models.bsa_tnp.biased_attention import Backend, DistanceBias, biased_attention
from models.bsa_tnp.model import BsaTnp
from models.contract import Frames
from tests import worlds

HEADS, WIDTH, ROUNDS = 4, 32, 5
SIDES: tuple[tuple[Backend, bool], ...] = (("dense", True), ("tiled", True), ("dense", False), ("tiled", False), ("flex", False))
SIZES: dict[str, dict[str, tuple[int, ...]]] = {  # points of the attention; points of the context, then queries
    "small": {"attention": (1024,), "serving": (500, 4000, 16_000, 32_000)},
    "cpu": {"attention": (2048, 4096), "serving": (10_000, 1000, 10_000, 100_000)},
    "gpu": {"attention": (2048, 16_384), "serving": (100_000, 10_000, 100_000, 1_000_000)},
}


def attention(backend: Backend, training: bool, points: int, device: str) -> Callable[[], object]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, HEADS, *n, WIDTH, device=device, requires_grad=training) for n in ((1, points), (points,), (points,)))
    biases = [DistanceBias(HEADS, 5, reach=(1.0, 0.1)).to(device), DistanceBias(HEADS, 3, reach=(10.0, 1.0)).to(device)]
    places = [torch.rand(1, points, axes, device=device) for axes in (2, 1)]
    mask = torch.rand(1, points, device=device) > 0.1

    def call(some: slice = slice(None)) -> None:
        with torch.set_grad_enabled(training):
            groups = [bias(place[:, None, some], place) for bias, place in zip(biases, places, strict=True)]
            out = biased_attention(q[:, :, :, some], k, v, mask, groups, backend=backend)
            if training:
                out.square().sum().backward()

    call(slice(0, 8))
    return call


def serving(backend: str, context: int, queries: int, device: str) -> Callable[[], object]:
    torch.manual_seed(0)
    model = BsaTnp(BsaTnp.Config(serving=backend), worlds.torus_info(geometry="plane")).to(device)  # type: ignore[arg-type]

    def frames(points: int) -> Frames:
        position = 2 * torch.rand(1, 1, points, 2) - 1
        return Frames(position, torch.ones(1, 1, points, dtype=torch.bool), torch.zeros(1, 1).double(), position[..., :1]).to(device)

    seen, asked = frames(context), frames(queries)
    if backend == "flex":
        model.predict(seen, asked.points(slice(0, 8)))
    return partial(model.predict, seen, asked)


def seconds(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak(call: Callable[[], object]) -> float:
    """MiB that a call needs above what is held before."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    return sides.peak(call)


def alone(kind: str, *what: object) -> tuple[float, float]:
    """Seconds and peak MiB of one row in a process of its own."""
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.biased_attention", "row", kind, *map(str, what)], capture_output=True, text=True
    )
    if run.returncode:
        raise SystemExit(run.stderr)
    first, second = run.stdout.split()[-2:]
    return float(first), float(second)


def row(kind: str, backend: Backend, first: str, second: str, device: str) -> None:
    call = (
        attention(backend, first == "True", int(second), device)
        if kind == "attention"
        else serving(backend, int(first), int(second), device)
    )
    taken: list[float] = []
    memory = peak(lambda: taken.append(seconds(call)))
    print(taken[0], memory)


def main(name: str) -> int:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if name not in SIZES:
        raise SystemExit(f"unknown size {name!r}: expected one of {', '.join(SIZES)}")
    if name == "gpu" and device == "cpu":
        context, *_, most = SIZES[name]["serving"]
        raise SystemExit(f"gpu asks {most:,} points of a context of {context:,}, 2e13 exponentials, and there is no GPU: take cpu or small")
    console, sizes = Console(), SIZES[name]
    threads = f"{torch.get_num_threads()} thread(s)" if device == "cpu" else torch.cuda.get_device_name()
    for points in sizes["attention"]:
        calls = {side: attention(*side, points, device) for side in SIDES}
        taken: dict[tuple[Backend, bool], list[float]] = {side: [] for side in SIDES}
        for turn in range(ROUNDS + 1):
            for side, call in calls.items():
                if (second := seconds(call)) and turn:  # the first warms up
                    taken[side].append(second)
        table = Table(
            title=f"Attention of {points} points to {points}, {HEADS} heads of {WIDTH}, 8 bases, float32, {threads}, {ROUNDS} rounds"
        )
        for column in ("back end", "", "median ms", "to dense", "peak MiB"):
            table.add_column(column, justify="right" if column in ("median ms", "to dense", "peak MiB") else "left")
        for backend, training in SIDES:
            median, floor = (statistics.median(taken[side]) for side in ((backend, training), ("dense", training)))
            _, memory = alone("attention", backend, training, points, device)
            what = "forward and backward" if training else "forward"
            table.add_row(backend, what, f"{1e3 * median:.0f}", f"{median / floor:.2f}", f"{memory:.0f}")
        console.print(table)
    context, *queries = sizes["serving"]
    table = Table(title=f"BSA-TNP, reference sizes, a context of {context:,} points, float32, {threads}")
    for column in ("back end", "queries", "seconds", "queries/s", "peak MiB"):
        table.add_column(column, justify="left" if column == "back end" else "right")
    for backend in ("tiled", "flex"):
        for count in queries:
            taken_s, memory = alone("serving", backend, context, count, device)
            table.add_row(backend, f"{count:,}", f"{taken_s:.1f}", f"{count / taken_s:,.0f}", f"{memory:.0f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["row"]:
        row(*sys.argv[2:])  # type: ignore[arg-type]
        raise SystemExit(0)
    raise SystemExit(main(sys.argv[1] if len(sys.argv) > 1 else "small"))
