"""A training step and an answer of BSA-TNP against the released program, at equal sizes, in one run.

    python -m benchmarks.bsa_tnp dl4bi peer/bin/python

The two arguments may also be named by the environment variables DL4BI and DL4BI_PYTHON; benchmarks/dl4bi_peer.py says how to get them,
and benchmarks/parity_bsa_tnp.py shows that `paper` computes the same. Sizes are the reference ones for the 2-D Gaussian process.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks import dl4bi_peer, sides

SIZES = {"batch": 8, "context": 300, "queries": 256, "answer_context": 500, "answer_queries": 4096}


def ours(mode: str) -> sides.Works:
    import torch

    from models.bsa_tnp.model import BsaTnp
    from tests import worlds

    torch.manual_seed(0)
    info = worlds.torus_info(geometry="plane")
    return works(BsaTnp(BsaTnp.Config.model_validate({"mode": mode, "time_bases": 0}), info), SIZES)


def works(model: Any, sizes: dict[str, int]) -> sides.Works:
    """A training step and an answer of one of our models."""
    from tests import worlds

    batch = worlds.batch(model.info, b=sizes["batch"], n=sizes["context"], s=1, q=sizes["queries"], padded=False)
    asked = worlds.batch(model.info, b=1, n=sizes["answer_context"], s=1, q=sizes["answer_queries"], padded=False)
    train = sides.training(model.train(), lambda: model.loss(batch)["loss"])
    return {"train": train, "answer": lambda: model.predict(asked.context, asked.query)}, sides.count(model)


def compare(model: str, sizes: dict[str, int], ours: dict[str, Callable[[], sides.Works]]) -> int:
    """Ours in some modes against the peer of the same name."""
    trained = f"train {sizes['batch']} x {sizes['context']} to {sizes['queries']}"
    title = f"{model}: {trained}, answer {sizes['answer_context']} to {sizes['answer_queries']}"
    points = {"train": sizes["batch"] * sizes["queries"], "answer": sizes["answer_queries"]}
    return sides.compare(model, title, "queries", points, dl4bi_peer.peer(model, sizes), ours)


if __name__ == "__main__":
    raise SystemExit(compare("bsa_tnp", SIZES, {f"ours, {mode}": partial(ours, mode) for mode in ("paper", "improved")}))
