"""A training step and an answer of BSA-TNP against the released program, at equal sizes, in one run.

    python -m benchmarks.bsa_tnp dl4bi peer/bin/python

The two arguments may also be named by the environment variables DL4BI and DL4BI_PYTHON; benchmarks/dl4bi_peer.py says how to get them,
and benchmarks/parity_bsa_tnp.py shows that `paper` computes the same. Sizes are the reference ones for the 2-D Gaussian process.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import sides

SIZES = {"batch": 8, "context": 300, "queries": 256, "answer_context": 500, "answer_queries": 4096}


def ours(mode: str) -> tuple[dict[str, Callable[[], object]], int]:
    import torch

    from models.bsa_tnp.model import BsaTnp
    from tests import worlds

    torch.set_num_threads(1)
    torch.manual_seed(0)
    info = worlds.torus_info(geometry="plane")
    model = BsaTnp(BsaTnp.Config.model_validate({"mode": mode, "time_bases": 0}), info).train()
    batch, asked = (full(worlds.batch(info, b=b, n=n, s=1, q=q)) for b, n, q in (plain("batch", "", SIZES), plain("", "answer_", SIZES)))
    train = sides.training(model, lambda: model.loss(batch)["loss"])
    return {"train": train, "answer": lambda: model.predict(asked.context, asked.query)}, sides.count(model)


def plain(batch: str, prefix: str, sizes: dict[str, int]) -> tuple[int, int, int]:
    """Tasks, context points and queries of a work."""
    return sizes[batch] if batch else 1, sizes[f"{prefix}context"], sizes[f"{prefix}queries"]


def full(batch):  # type: ignore[no-untyped-def]
    """Without padding."""
    batch.context.mask.fill_(True)
    batch.query.mask.fill_(True)
    return batch


def compare(model: str, sizes: dict[str, int], modes: tuple[str, ...], named: list[str]) -> int:
    """Ours in some modes against the peer of the same name."""
    folder, python = named or (os.environ.get("DL4BI", ""), os.environ.get("DL4BI_PYTHON", ""))
    if not folder or not python:
        print("skipped: no peer; name a checkout of MLGlobalHealth/dl4bi and its Python as arguments or in DL4BI and DL4BI_PYTHON")
        return 0
    peer = [python, "-m", "benchmarks.dl4bi_peer", model, str(Path(folder).resolve()), json.dumps(sizes)]
    commands = {"released": peer, **{f"ours, {mode}": sides.own(model, mode) for mode in modes}}
    trained = f"train {sizes['batch']} x {sizes['context']} to {sizes['queries']}"
    title = f"{model}: {trained}, answer {sizes['answer_context']} to {sizes['answer_queries']}"
    work = {"train": sizes["batch"] * sizes["queries"], "answer": sizes["answer_queries"]}
    return sides.report(title, "queries", work, commands)


if __name__ == "__main__":
    if sys.argv[1:2] == ["side"]:
        sides.serve(lambda: ours(sys.argv[2]))
        raise SystemExit(0)
    raise SystemExit(compare("bsa_tnp", SIZES, ("paper", "improved"), sys.argv[1:3]))
