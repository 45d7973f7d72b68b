"""A training step of SCENT against the simplified SCENT that its authors' successor paper released, at equal sizes, in one run.

    git clone https://github.com/kevinval04/OmniField
    python -m benchmarks.scent OmniField

The folder may also be named by the environment variable OMNIFIELD; their file needs einops and tqdm. Without either the comparison is
skipped with a message. Theirs is a Perceiver with no context embedding network, no calibration network, no frozen projection and no time
of the input; `same parts` is ours cut down to that, `whole` has them all. Both sides get the same sensors, queries, values and lead, width,
latents, depth, heads, feed-forward factor, optimiser and threads; one step is zero_grad, loss, backward and AdamW. Rounds alternate between
the sides, and medians are compared.
"""

from __future__ import annotations

from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import peers
from benchmarks.peers import Side
from models.contract import FieldBatch
from models.scent.model import Scent
from tests import worlds

WIDTH, LATENTS, DEPTH, HEADS, BANDS = 64, 64, 4, 4, 16
BATCH, SENSORS, QUERIES = 16, 410, 512
ROUNDS = 15
INFO = worlds.torus_info()
REPOSITORY = "kevinval04/OmniField"
PARTS = {"cen_layers": 0, "cn_layers": 0, "projection": "trainable", "adaptive_norm": False, "clock": "lead", "query_residual": False}


def peer(folder: Path, batch: FieldBatch) -> Side:
    """Their network with our sizes, and its loss on `batch`; only the first of its three modalities has sensors and is asked for."""
    module = peers.load(folder / "baselines" / "scent.py", REPOSITORY)
    time_width, value_width = 16, 16
    net = module.SCENTBaseline(pos_dim=WIDTH - time_width, time_dim=time_width, val_dim=value_width)
    each = WIDTH // HEADS
    net.perceiver = module.PerceiverIO(
        depth=DEPTH, dim=WIDTH + value_width, queries_dim=WIDTH, num_latents=LATENTS, latent_dim=WIDTH, cross_heads=HEADS,
        latent_heads=HEADS, cross_dim_head=each, latent_dim_head=each,
    )  # fmt: skip
    context, query = batch.context, batch.query
    assert context.value is not None
    assert query.value is not None
    value, place, asked, truth = context.value[:, 0], context.position[:, 0], query.position[:, 0], query.value[:, 0, :, 0]
    nothing, nowhere = value[:, :0], place[:, :0]
    lead = ((query.time - context.time) / 10).float()

    def loss() -> Tensor:
        first, _, _ = net(value, nothing, nothing, place, nowhere, nowhere, asked, lead)
        return nn.functional.mse_loss(first, truth)

    return net, loss


def ours(batch: FieldBatch, mode: str, **changes: object) -> Side:
    sizes = {"width": WIDTH, "latents": LATENTS, "processor_layers": DEPTH, "heads": HEADS, "bands": BANDS, "time_bands": BANDS}
    model = Scent(Scent.Config(**{"mode": mode, "horizon": 10, "loss": "mse", **sizes, **changes}), INFO)  # type: ignore[arg-type]
    return model, lambda: model.loss(batch)["loss"]


def a_batch() -> FieldBatch:
    """Every sensor and query valid: their code has no working mask."""
    batch = worlds.batch(INFO, b=BATCH, n=SENSORS, s=1, q=QUERIES)
    batch.context.mask.fill_(True)
    batch.query.mask.fill_(True)
    return batch


def main(folder: Path) -> int:
    console = Console()
    torch.manual_seed(0)
    batch = a_batch()
    try:
        theirs = peer(folder, batch)
    except ModuleNotFoundError as error:
        console.print(peers.lacking(error))
        return 0
    sides = {
        "OmniField's simplified SCENT": theirs,
        "ours, same parts": ours(batch, "paper", **PARTS),
        "ours, whole, paper": ours(batch, "paper"),
        "ours, whole, improved": ours(batch, "improved"),
    }
    seconds = peers.seconds(sides, ROUNDS, warm_up=2)
    sizes = f"batch {BATCH}, {SENSORS} sensors, {QUERIES} queries, width {WIDTH}, {LATENTS} latents, depth {DEPTH}, {HEADS} heads"
    table = Table(title=f"Training step: {sizes}, {torch.get_num_threads()} thread(s), float32, {ROUNDS} rounds")
    for column in ("side", "parameters", "median ms", "fastest ms", "time ratio"):
        table.add_column(column, justify="left" if column == "side" else "right")
    for name, (net, _) in sides.items():
        table.add_row(name, *peers.row(net, seconds[name], seconds["OmniField's simplified SCENT"]))
    console.print(table)
    return 0


if __name__ == "__main__":
    named = peers.checkout(REPOSITORY, "OMNIFIELD")
    raise SystemExit(main(named) if named else 0)
