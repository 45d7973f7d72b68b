"""A training step of Senseiver against the program its authors released, at equal sizes, in one run.

    git clone https://github.com/OrchardLANL/Senseiver
    python -m benchmarks.senseiver Senseiver

The folder may also be named by the environment variable SENSEIVER; see benchmarks/parity_senseiver.py for what their file needs, and for a
check that both compute the same. Theirs reads position features computed beforehand; ours computes them from positions in every step. Both
sides get the same sensors, queries and values, sizes, optimiser and threads; one step is zero_grad, loss, backward and Adam. Rounds
alternate between the sides, and medians are compared.
"""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.parity_senseiver import INFO, SETTINGS, SIDE, peer, peer_modules
from models.contract import FieldBatch
from models.senseiver.model import Senseiver
from tests import worlds

BATCH, SENSORS, QUERIES = 8, 300, 1024
ROUNDS = 9


def theirs(folder: Path, batch: FieldBatch, config: Senseiver.Config) -> tuple[nn.Module, Callable[[], Tensor]]:  # type: ignore[valid-type]
    """Their encoder and decoder with our sizes, and their loss (over the number of points) on `batch`."""
    model, _ = peer_modules(folder)
    net = nn.ModuleList(peer(model, config))
    place = config.place(INFO)  # type: ignore[attr-defined]
    context, query = batch.context, batch.query
    assert context.value is not None
    assert query.value is not None
    seen = torch.cat([context.value[:, 0], place(context.position[:, 0])], -1)
    asked, truth = place(query.position[:, 0]), query.value[:, 0]
    return net, lambda: nn.functional.mse_loss(net[1](net[0](seen), asked), truth, reduction="sum") / truth.numel()


def a_batch() -> FieldBatch:
    """Every sensor and query valid, as their program has it."""
    batch = worlds.batch(INFO, b=BATCH, n=SENSORS, s=1, q=QUERIES)
    batch.context.mask.fill_(True)
    batch.query.mask.fill_(True)
    return batch


def main(folder: Path | None) -> int:
    console = Console()
    if folder is None:
        console.print("skipped: no peer; name a checkout of OrchardLANL/Senseiver as the argument or in SENSEIVER")
        return 0
    batch = a_batch()
    sides: dict[tuple[str, str], tuple[nn.Module, Callable[[], Tensor]]] = {}
    for setting, sizes in SETTINGS.items():
        torch.manual_seed(0)
        config = Senseiver.Config(mode="paper", highest=SIDE / 2, **sizes)
        ours = Senseiver(config, INFO)
        try:
            sides[setting, "theirs"] = theirs(folder, batch, config)
        except ModuleNotFoundError as error:
            console.print(f"skipped: the peer needs {error.name}, which is not installed (pip install {error.name})")
            return 0
        sides[setting, "ours"] = ours, lambda ours=ours: ours.loss(batch)["loss"]  # type: ignore[misc]
    optimizers = {name: torch.optim.Adam(net.parameters(), lr=1e-4) for name, (net, _) in sides.items()}
    seconds: dict[tuple[str, str], list[float]] = {name: [] for name in sides}
    for turn in range(ROUNDS + 1):
        for name, (_, loss) in sides.items():
            start = time.perf_counter()
            optimizers[name].zero_grad()
            loss().backward()
            optimizers[name].step()
            if turn:  # the first one warms up
                seconds[name].append(time.perf_counter() - start)
    sizes_of_all = f"batch {BATCH}, {SENSORS} sensors, {QUERIES} queries, {torch.get_num_threads()} thread(s), float32, {ROUNDS} rounds"
    table = Table(title=f"Training step: {sizes_of_all}")
    for column in ("setting", "side", "parameters", "median ms", "fastest ms", "time ratio"):
        table.add_column(column, justify="left" if column in ("setting", "side") else "right")
    for (setting, side), times in seconds.items():
        count = sum(p.numel() for p in sides[setting, side][0].parameters())
        median, floor = statistics.median(times), statistics.median(seconds[setting, "theirs"])
        table.add_row(setting, side, f"{count:,}", f"{1e3 * median:.0f}", f"{1e3 * min(times):.0f}", f"{median / floor:.2f}")
    console.print(table)
    return 0


if __name__ == "__main__":
    named = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("SENSEIVER", "")
    raise SystemExit(main(Path(named) if named else None))
