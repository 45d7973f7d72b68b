"""An answer of SCENT at every point of a 64 x 64 grid against the simplified SCENT of benchmarks/scent.py, at equal sizes, in one run.

    python -m benchmarks.scent_answer OmniField

The folder may also be named by the environment variable OMNIFIELD. Sizes are those of benchmarks/scent.py; one window is asked at one lead.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import peers, scent, sides
from models.contract import FieldBatch
from tests import worlds

QUERIES = 4096
OURS: dict[str, tuple[str, dict[str, object]]] = {
    "same parts": ("paper", scent.PARTS),
    "whole, paper": ("paper", {}),
    "whole, improved": ("improved", {}),
}


def a_batch() -> FieldBatch:
    batch = worlds.batch(scent.INFO, b=1, n=scent.SENSORS, s=1, q=QUERIES)
    batch.context.mask.fill_(True)
    batch.query.mask.fill_(True)
    return batch


def side(name: str, folder: str) -> tuple[dict[str, Callable[[], object]], int]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    batch = a_batch()
    if name == "released":
        net, loss = scent.peer(Path(folder), batch)
        net.eval()

        @torch.no_grad()
        def answer() -> object:
            return loss()  # all answers, and the mean of their squared errors

        return {"answer": answer}, sides.count(net)
    mode, changes = OURS[name]
    model, _ = scent.ours(batch, mode, **changes)
    return {"answer": lambda: model.predict(batch.context, batch.query)}, sides.count(model)  # type: ignore[operator]


def main(folder: Path) -> int:
    commands = {"OmniField's simplified SCENT": sides.own("scent_answer", "released", str(folder.resolve()))}
    commands |= {f"ours, {name}": sides.own("scent_answer", name, "") for name in OURS}
    return sides.report(f"SCENT: {scent.SENSORS} sensors to {QUERIES} points", "queries", {"answer": QUERIES}, commands)


if __name__ == "__main__":
    if sys.argv[1:2] == ["side"]:
        sides.serve(lambda: side(*sys.argv[2:4]))
        raise SystemExit(0)
    named = peers.checkout(scent.REPOSITORY, "OMNIFIELD")
    raise SystemExit(main(named) if named else 0)
