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
REPOSITORY, NAME = "kevinval04/OmniField", "OmniField's simplified SCENT"
PARTS = {"cen_layers": 0, "cn_layers": 0, "projection": "trainable", "adaptive_norm": False, "clock": "lead", "query_residual": False}
OURS: dict[str, tuple[str, dict[str, object]]] = {
    "ours, same parts": ("paper", PARTS),
    "ours, whole, paper": ("paper", {}),
    "ours, whole, improved": ("improved", {}),
}


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


def ours(batch: FieldBatch, mode: str, changes: dict[str, object]) -> Side:
    sizes = {"width": WIDTH, "latents": LATENTS, "processor_layers": DEPTH, "heads": HEADS, "bands": BANDS, "time_bands": BANDS}
    model = Scent(Scent.Config(**{"mode": mode, "horizon": 10, "loss": "mse", **sizes, **changes}), INFO)  # type: ignore[arg-type]
    return model, lambda: model.loss(batch)["loss"]


if __name__ == "__main__":
    folder = peers.checkout(REPOSITORY, "OMNIFIELD")
    if folder is None:
        raise SystemExit(0)
    torch.manual_seed(0)
    batch = worlds.batch(INFO, b=BATCH, n=SENSORS, s=1, q=QUERIES, padded=False)  # their code has no working mask
    sizes = f"batch {BATCH}, {SENSORS} sensors, {QUERIES} queries, width {WIDTH}, {LATENTS} latents, depth {DEPTH}, {HEADS} heads"
    works = {"train": peers.Work(lambda: {NAME: peer(folder, batch), **{name: ours(batch, *how) for name, how in OURS.items()}})}
    raise SystemExit(peers.compare(f"SCENT: {sizes}", works, ROUNDS, warm_up=2))
