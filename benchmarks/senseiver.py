"""A training step of Senseiver against the program its authors released, at equal sizes, in one run.

    git clone https://github.com/OrchardLANL/Senseiver
    python -m benchmarks.senseiver Senseiver

The folder may also be named by the environment variable SENSEIVER; see benchmarks/parity_senseiver.py for what their file needs, and for a
check that both compute the same. Theirs reads position features computed beforehand; ours computes them from positions in every step. Both
sides get the same sensors, queries and values, sizes, optimiser and threads; one step is zero_grad, loss, backward and Adam. Rounds
alternate between the sides, and medians are compared.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
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


def both(folder: Path, batch: FieldBatch, sizes: dict[str, int]) -> dict[str, Side]:
    torch.manual_seed(0)
    config = Senseiver.Config(mode="paper", highest=SIDE / 2, **sizes)
    model = Senseiver(config, INFO)
    return {"theirs": theirs(folder, batch, config), "ours": (model, lambda: model.loss(batch)["loss"])}


if __name__ == "__main__":
    folder = peers.checkout(REPOSITORY, "SENSEIVER")
    if folder is None:
        raise SystemExit(0)
    batch = worlds.batch(INFO, b=BATCH, n=SENSORS, s=1, q=QUERIES, padded=False)  # as their program has it
    works = {name: peers.Work(partial(both, folder, batch, sizes), optimizer=torch.optim.Adam) for name, sizes in SETTINGS.items()}
    title = f"Training step of Senseiver: batch {BATCH}, {SENSORS} sensors, {QUERIES} queries"
    raise SystemExit(peers.compare(title, works, ROUNDS, warm_up=1))
