"""CST with the weights of the released one: do both give the same?

    git clone https://github.com/vandijklab/CST
    python -m benchmarks.parity_cst CST

The folder may also be named by the environment variable CST; benchmarks/cst_peer.py says what it needs. `legacy` is compared, dropout and
jitter aside, in double precision: the answers at unobserved times, the loss with its data term and derivatives at the same dummies, and the
gradient of every weight. Their program makes times in single precision, so times are binary fractions here. Exit status 1 where anything
differs by more than 1e-9 of its size. `paper` differs from the release on purpose (what is differentiated, and the scale of time), so its
difference is printed too, and must be there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import cst_peer, peers
from models.contract import FieldBatch, Frames
from models.cst.model import Cst
from tests import worlds

CURVES, POINTS, DUMMIES, ASKED = 3, 9, 40, 30  # 8 divides by a power of two
INFO = worlds.torus_info(
    geometry="plane", variables=("a", "b"), units=("1", "1"), mean=(0.0, 0.0), std=(1.0, 1.0), limits=((None, None),) * 2
)
WITHIN = 1e-9
PLAIN = {"attention_dropout": 0.0, "dropout": 0.0, "jitter": 0.0, "dummies": DUMMIES}
RELEASED = {**PLAIN, "order": 3, "power": 3.0}


def frames(time: Tensor, value: Tensor | None = None) -> Frames:
    """Times [S] of all curves at the one place that theirs calls zero."""
    shape = (CURVES, len(time), 1)
    position = torch.full((*shape, 2), -1.0, dtype=torch.float64)
    shown = None if value is None else value.unsqueeze(2)
    return Frames(position, torch.ones(shape, dtype=torch.bool), (time * (POINTS - 1)).expand(CURVES, -1), shown)


def linear(at: Tensor, value: Tensor, time: Tensor) -> Tensor:
    """Values [B,S,2] interpolated linearly at other times."""
    columns = [[np.interp(time, at, value[b, :, c]) for c in range(value.shape[-1])] for b in range(len(value))]
    return torch.from_numpy(np.array(columns)).transpose(1, 2)


def compare(folder: Path, mode: str) -> dict[str, float]:
    """Largest difference of every output, relative to its largest value."""
    torch.manual_seed(0)
    ours = Cst(Cst.Config.model_validate({"mode": mode, **RELEASED}), INFO).double()
    theirs = cst_peer.released(folder, ours.config, POINTS).double()
    cst_peer.with_their_weights(ours, theirs)
    at = torch.cat([torch.zeros(1), torch.randperm(63)[: POINTS - 2].sort().values + 1, torch.full((1,), 64.0)]).double() / 64
    dummies, asked = ((2 * torch.randperm(512)[:count] + 1).double() / 1024 for count in (DUMMIES, ASKED))
    value, truth = torch.randn(CURVES, POINTS, 2).double(), torch.randn(CURVES, ASKED, 2).double()
    batch = FieldBatch(frames(at, value), frames(asked, truth))

    answer = ours.predict(batch.context, frames(asked)).mean.squeeze(2)
    there = cst_peer.answered(theirs.eval(), torch.cat([value, linear(at, value, asked)], 1), torch.cat([at, asked]).float())
    result = {"answers": apart(answer, there[:, POINTS:])}

    leaf, still = dummies.view(1, -1, 1).repeat(CURVES, 1, 1), torch.zeros(CURVES, DUMMIES, 2).double()
    ours._draw = lambda known, context: (leaf, still)  # type: ignore[method-assign]
    terms = ours.loss(batch)
    terms["loss"].backward()
    tokens = torch.cat([value, linear(at, value, dummies)], 1).requires_grad_()
    y = cst_peer.answered(theirs, tokens, torch.cat([at, dummies]).float())
    judge = theirs.sobolev_loss_
    loss, derivatives = judge.evaluate__loss(
        y, value, tokens, y_0=y[:, :POINTS], indexes=np.arange(POINTS, y.shape[1]), get_derivatives=True
    )
    loss.backward()
    result["loss"] = apart(terms["loss"], loss)
    for q, derivative in enumerate(derivatives, 1):
        result[f"derivative {q}"] = apart(ours.config.mu * terms[f"derivative_{q}"], derivative)
    for weight in theirs.parameters():  # their gradients, under our names
        weight.data = torch.zeros_like(weight) if weight.grad is None else weight.grad
    learnt = torch.cat([weight.grad.flatten() for weight in ours.parameters() if weight.grad is not None])
    cst_peer.with_their_weights(ours, theirs)
    result["gradients"] = apart(learnt, torch.cat([weight.flatten() for weight in ours.parameters()]))
    return result


def apart(a: Tensor, b: Tensor) -> float:
    size = float(b.detach().abs().max())
    return float((a - b).detach().abs().max()) / size if size else float(a.detach().abs().max())


def main(folder: Path) -> int:
    console = Console()
    try:
        found = {mode: compare(folder, mode) for mode in ("legacy", "paper")}
    except ModuleNotFoundError as error:
        console.print(peers.lacking(error))
        return 0
    table = Table(title=f"Largest relative difference: {CURVES} curves, {POINTS} points, {DUMMIES} dummies, {ASKED} asked, float64")
    for column in ("output", *found):
        table.add_column(column, justify="left" if column == "output" else "right")
    for output in found["legacy"]:
        table.add_row(output, *[f"{each[output]:.1e}" for each in found.values()])
    console.print(table)
    return int(not max(found["legacy"].values()) <= WITHIN or found["paper"]["loss"] <= WITHIN)


if __name__ == "__main__":
    named = peers.checkout("vandijklab/CST", "CST")
    raise SystemExit(main(named) if named else 0)
