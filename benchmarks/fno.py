"""A training step and an answer of FNO against the library neuraloperator, at equal sizes, in one run.

    python -m venv peer && peer/bin/pip install neuraloperator
    python -m benchmarks.fno peer/bin/python

The Python may also be named by the environment variable NEURALOP_PYTHON. Both have a torus of 64 x 64 nodes, width 32, four layers, wave
numbers to 12, a channel MLP with a gated skip, and no coordinates. Theirs goes from grid to grid. `whole` of ours starts from sensors at
10 % of the nodes, which it rasterises, and answers at all 4096 points one by one; `blocks` is what both have: the layers alone.
"""

from __future__ import annotations

from typing import Any

from benchmarks import sides

BATCH, SIDE, SENSORS, WIDTH, LAYERS, MODES = 4, 64, 410, 32, 4, 12


def ours() -> sides.Works:
    import torch

    from models.fno.model import Fno
    from tests import worlds

    torch.manual_seed(0)
    info = worlds.torus_info()
    given = {"mode": "improved", "lead_scaling": False, "horizon": 1, "width": WIDTH, "layers": LAYERS, "modes": MODES, "cells": SIDE}
    model = Fno(Fno.Config.model_validate({**given, "head_width": 2 * WIDTH}), info).train()
    batch = worlds.batch(info, b=BATCH, n=SENSORS, s=1, q=SIDE**2, padded=False)
    x, lead = torch.randn(BATCH, SIDE, SIDE, WIDTH), torch.zeros(BATCH, model.lead.width)
    return {
        "train, blocks": sides.training(model.blocks, lambda: model.process(x, lead).square().mean()),
        "train, whole": sides.training(model, lambda: model.loss(batch)["loss"]),
        "answer, whole": lambda: model.predict(batch.context, batch.query),
    }, sides.count(model)


def peer(_: str) -> sides.Works:
    import torch
    from neuralop.models import FNO

    torch.manual_seed(0)
    net: Any = FNO((2 * MODES, 2 * MODES), 2, 1, WIDTH, LAYERS, positional_embedding=None)
    x, grid, truth = torch.randn(BATCH, WIDTH, SIDE, SIDE), torch.randn(BATCH, 2, SIDE, SIDE), torch.randn(BATCH, 1, SIDE, SIDE)

    def blocks() -> torch.Tensor:
        h = x
        for layer in range(LAYERS):
            h = net.fno_blocks(h, layer)
        return h.square().mean()

    @torch.no_grad()
    def answer() -> object:
        return net(grid)

    return {
        "train, blocks": sides.training(net.fno_blocks, blocks),
        "train, whole": sides.training(net, lambda: (net(grid) - truth).square().mean()),
        "answer, whole": answer,
    }, sides.count(net)


if __name__ == "__main__":
    title = f"FNO: {BATCH} x {SIDE} x {SIDE}, width {WIDTH}, {LAYERS} layers"
    points = dict.fromkeys(("train, blocks", "train, whole", "answer, whole"), BATCH * SIDE**2)
    library = sides.Peer("neuraloperator", {"NEURALOP_PYTHON": "a Python that has neuraloperator"}, peer, python="NEURALOP_PYTHON")
    raise SystemExit(sides.compare("fno", title, "points", points, library, {"ours": ours}))
