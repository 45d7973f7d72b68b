"""A training step and an answer of CST against the released program, at equal sizes, in one run.

    git clone https://github.com/vandijklab/CST
    python -m benchmarks.cst CST

The folder may also be named by the environment variable CST; benchmarks/cst_peer.py says what it needs, and benchmarks/parity_cst.py shows
that `legacy` computes the same. Sizes are those of the release's spirals: batches of 10 curves of 10 points, width 32, four layers,
feed-forward 3072; but 100 dummies, not 500. A training step is their `training_step` (dummies drawn, values interpolated, the loss with
three orders, R squared) or our `loss`, then backward and AdamW. An answer is 90 further points a curve. `paper` and `improved` are ours at
their own sizes: 64 dummies, two orders that do train, and in `improved` a feed-forward of 256 and a width of 64.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import torch

from benchmarks import cst_peer, sides
from models.contract import FieldBatch, Frames
from models.cst.model import Cst
from tests import worlds

CURVES, POINTS, ASKED, DUMMIES = 10, 10, 90, 100
INFO = worlds.torus_info(
    geometry="plane", variables=("a", "b"), units=("1", "1"), mean=(0.0, 0.0), std=(1.0, 1.0), limits=((None, None),) * 2
)
MODES = ("legacy", "paper", "improved")


def curves() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Times [10] of the points in 0..1, values [10,10,2], and times [90] asked."""
    torch.manual_seed(0)
    return torch.linspace(0, 1, POINTS), torch.randn(CURVES, POINTS, 2), torch.rand(ASKED)


def ours(mode: str) -> sides.Works:
    at, value, asked = curves()

    def frames(time: torch.Tensor, shown: torch.Tensor | None) -> Frames:
        shape = (CURVES, len(time), 1)
        there = torch.ones(shape, dtype=torch.bool)
        return Frames(torch.zeros(*shape, 2), there, ((POINTS - 1) * time.double()).expand(CURVES, -1), shown)

    model = Cst(Cst.Config.model_validate({"mode": mode} | ({"dummies": DUMMIES} if mode == "legacy" else {})), INFO).train()
    context = frames(at, value.unsqueeze(2))
    batch, query = FieldBatch(context, context), frames(asked, None)
    train = sides.training(model, lambda: model.loss(batch)["loss"])
    return {"train": train, "answer": lambda: model.predict(context, query)}, sides.count(model)


def released(folder: str) -> sides.Works:
    at, value, asked = curves()
    theirs = cst_peer.released(Path(folder), Cst.Config.model_validate({"mode": "legacy", "dummies": DUMMIES}), POINTS)
    tokens = torch.cat([value, torch.zeros(CURVES, ASKED, 2)], 1)
    batch = (value.unsqueeze(-1), at.expand(CURVES, -1))

    def answer() -> object:
        tokens[:, POINTS:] = torch.from_numpy(np.stack([[np.interp(asked, at, row) for row in curve.T] for curve in value.numpy()])).mT
        with torch.no_grad():
            return cst_peer.answered(theirs, tokens, torch.cat([at, asked]))

    return {"train": sides.training(theirs, lambda: theirs.training_step(batch, 0)["loss"]), "answer": answer}, sides.count(theirs)


if __name__ == "__main__":
    title = f"CST: {CURVES} curves of {POINTS} points, {DUMMIES} dummies"
    points = {"train": CURVES * POINTS, "answer": CURVES * ASKED}
    peer = sides.Peer("released", {"CST": "a checkout of vandijklab/CST"}, released)
    raise SystemExit(sides.compare("cst", title, "points", points, peer, {f"ours, {mode}": partial(ours, mode) for mode in MODES}))
