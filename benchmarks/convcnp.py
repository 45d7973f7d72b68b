"""A training step and an answer of ConvCNP against the baseline of the BSA-TNP paper, at equal sizes, in one run.

    python -m benchmarks.convcnp dl4bi peer/bin/python

Arguments as of benchmarks/bsa_tnp.py. Both have a grid of 41 x 41 nodes, four depthwise-separable blocks of 9 x 9 with 32 channels and a
head of three layers. Theirs reads the grid at points by a second set convolution over all its nodes, ours by interpolation; at the
sizes of the paper theirs needs gigabytes for that.
"""

from __future__ import annotations

from functools import partial

from benchmarks import sides
from benchmarks.bsa_tnp import compare, works

SIZES = {
    "batch": 2, "context": 100, "queries": 64, "answer_context": 100, "answer_queries": 256, "width": 32, "layers": 4, "kernel": 9,
    "points_per_unit": 16, "nodes": 41,
}  # fmt: skip


def ours(mode: str) -> sides.Works:
    import torch

    from models.convcnp.model import ConvCnp
    from tests import worlds

    torch.manual_seed(0)
    same = {"width": SIZES["width"], "layers": SIZES["layers"], "kernel_size": SIZES["kernel"], "head_width": SIZES["width"]}
    given = {"mode": mode, "horizon": 1, "points_per_unit": SIZES["points_per_unit"], "margin": 0.25, **same}
    return works(ConvCnp(ConvCnp.Config.model_validate(given), worlds.torus_info(geometry="plane")), SIZES)


if __name__ == "__main__":
    raise SystemExit(compare("convcnp", SIZES, {f"ours, {mode}": partial(ours, mode) for mode in ("paper", "improved")}))
