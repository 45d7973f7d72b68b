"""An answer of SCENT at every point of a 64 x 64 grid against the simplified SCENT of benchmarks/scent.py, at equal sizes, in one run.

    python -m benchmarks.scent_answer OmniField

The folder may also be named by the environment variable OMNIFIELD. Sizes are those of benchmarks/scent.py; one window is asked at one lead.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from benchmarks import scent, sides
from models.contract import FieldBatch
from tests import worlds

QUERIES = 4096


def a_batch() -> FieldBatch:
    torch.manual_seed(0)
    return worlds.batch(scent.INFO, b=1, n=scent.SENSORS, s=1, q=QUERIES, padded=False)


def released(folder: str) -> sides.Works:
    net, loss = scent.peer(Path(folder), a_batch())
    net.eval()

    @torch.no_grad()
    def answer() -> object:
        return loss()  # all answers, and the mean of their squared errors

    return {"answer": answer}, sides.count(net)


def ours(name: str) -> sides.Works:
    batch = a_batch()
    model, _ = scent.ours(batch, *scent.OURS[name])
    return {"answer": lambda: model.predict(batch.context, batch.query)}, sides.count(model)  # type: ignore[operator]


if __name__ == "__main__":
    title = f"SCENT: {scent.SENSORS} sensors to {QUERIES} points"
    peer = sides.Peer(scent.NAME, {"OMNIFIELD": f"a checkout of {scent.REPOSITORY}"}, released)
    raise SystemExit(
        sides.compare("scent_answer", title, "queries", {"answer": QUERIES}, peer, {name: partial(ours, name) for name in scent.OURS})
    )
