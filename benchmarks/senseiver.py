"""A training step of Senseiver against the program its authors released, at equal sizes, in one run.

    git clone https://github.com/OrchardLANL/Senseiver
    python -m benchmarks.senseiver Senseiver

The folder may also be named by the environment variable SENSEIVER; see benchmarks/parity_senseiver.py for what their file needs, and for a
check that both compute the same. Theirs reads position features computed beforehand; ours computes them from positions in every step. Both
sides get the same sensors, queries and values, sizes, optimiser and threads; one step is zero_grad, loss, backward and Adam. Rounds
alternate between the sides, and medians are compared.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks import peers
from benchmarks.parity_senseiver import INFO, REPOSITORY, SETTINGS, SIDE, peer, peer_modules
from benchmarks.peers import Side
from models.contract import FieldBatch
from models.senseiver.model import Senseiver
from tests import worlds

BATCH, SENSORS, QUERIES = 8, 300, 1024
ROUNDS = 9


def theirs(folder: Path, batch: FieldBatch, config: Senseiver.Config) -> Side:  # type: ignore[valid-type]
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


def main(folder: Path) -> int:
    console = Console()
    batch = a_batch()
    sides: dict[str, Side] = {}
    for setting, sizes in SETTINGS.items():
        torch.manual_seed(0)
        config = Senseiver.Config(mode="paper", highest=SIDE / 2, **sizes)
        ours = Senseiver(config, INFO)
        try:
            sides[f"{setting}, theirs"] = theirs(folder, batch, config)
        except ModuleNotFoundError as error:
            console.print(peers.lacking(error))
            return 0
        sides[f"{setting}, ours"] = ours, lambda ours=ours: ours.loss(batch)["loss"]  # type: ignore[misc]
    seconds = peers.seconds(sides, ROUNDS, warm_up=1, optimizer=torch.optim.Adam)
    sizes_of_all = f"batch {BATCH}, {SENSORS} sensors, {QUERIES} queries, {torch.get_num_threads()} thread(s), float32, {ROUNDS} rounds"
    table = Table(title=f"Training step: {sizes_of_all}")
    for column in ("side", "parameters", "median ms", "fastest ms", "time ratio"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for name, (net, _) in sides.items():
        table.add_row(name, *peers.row(net, seconds[name], seconds[name.replace("ours", "theirs")]))
    console.print(table)
    return 0


if __name__ == "__main__":
    named = peers.checkout(REPOSITORY, "SENSEIVER")
    raise SystemExit(main(named) if named else 0)
