"""A training step and an answer of AROMA against the released code, at equal sizes, in one run.

    git clone https://github.com/LouisSerrano/aroma
    python -m benchmarks.aroma aroma

The folder may also be named by the environment variable AROMA; the auto-encoder there needs einops, the stepper timm. What is missing is
skipped with a message. Sizes are those of Navier-Stokes 1e-3 in the released code. Both sides get the same sensors, points and values
without padding; one training step is zero_grad, loss, backward and AdamW; an answer is encoding and decoding without gradients. Both
steppers train on latents that were encoded once and kept; beside it is the step of ours that encodes the two frames of each pair anew, as
it does where observations are hidden at random. Rounds alternate between the sides, and medians are compared.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import aroma_peer, peers
from benchmarks.peers import Side
from models.aroma import diffusion
from models.aroma.model import Aroma
from models.contract import FieldBatch
from tests import worlds

BATCH, SENSORS, QUERIES = 16, 1024, 1024
ROUNDS, WARM_UP = 9, 2
INFO = worlds.torus_info()


def autoencoders(folder: Path, batch: FieldBatch) -> dict[str, Side]:
    """Released first; the loss is MSE + 1e-5 KL with sampled latents."""
    query, now = batch.query, batch.context
    models = {mode: Aroma(Aroma.Config.model_validate({"mode": mode}), INFO).train() for mode in ("paper", "improved")}
    theirs = aroma_peer.autoencoder(folder, models["paper"].config, INFO).train()
    assert now.value is not None
    assert query.value is not None
    value, place, asked, truth = now.value[:, -1], now.position[:, -1], query.position[:, 0], query.value[:, 0]

    def released() -> Tensor:
        answer, kl = theirs(value, place, target_coords=asked)
        return (answer - truth).square().mean() + 1e-5 * kl

    return {"released": (theirs, released), **{f"ours, {mode}": (m, lambda m=m: m.loss(batch)["loss"]) for mode, m in models.items()}}  # type: ignore[misc]


def steppers(folder: Path, batch: FieldBatch) -> dict[str, Side]:
    """Released first; the loss is that of velocities."""
    model = Aroma(Aroma.Config(mode="paper"), INFO).train()
    model.begin("step")
    theirs = aroma_peer.stepper(folder, model.config).train()
    kept = model.encode(batch)
    now, then = kept.value.unbind(1)

    def released() -> Tensor:
        level, noise = torch.randint(model.plan.levels, (BATCH,)), torch.randn_like(then)
        share = model.plan.at(level, then)
        answer = theirs(torch.cat([now, diffusion.noised(then, noise, share)], 1), level * 1000 / 3)
        return (answer - diffusion.velocity(then, noise, share)).square().mean()

    return {
        "released": (theirs, released),
        "ours": (model.stepper, lambda: model.follow(kept)["loss"]),
        "ours, encoding its frames": (model.stepper, lambda: model.loss(batch)["loss"]),
    }


def answers(folder: Path, batch: FieldBatch) -> dict[str, Side]:
    """Encoding and decoding without gradients, released first."""
    context, query = batch.context, batch.query
    models = {mode: Aroma(Aroma.Config.model_validate({"mode": mode}), INFO).eval() for mode in ("paper", "improved")}
    theirs: Any = aroma_peer.autoencoder(folder, models["paper"].config, INFO).eval()
    assert context.value is not None
    value, place, asked = context.value[:, -1], context.position[:, -1], query.position[:, 0]
    return {
        "released": (theirs, lambda: theirs.decode(theirs.encode(value, place)[0], asked)),
        **{f"ours, {mode}": (model, lambda model=model: model.predict(context, query).mean) for mode, model in models.items()},  # type: ignore[misc]
    }


def a_batch() -> FieldBatch:
    """Two context frames without padding; the points asked for are the same in the whole batch, as pipeline/batches.py makes them."""
    batch = worlds.batch(INFO, b=BATCH, t=2, n=SENSORS, s=1, q=QUERIES, padded=False)
    shared = batch.query.position[:1].expand_as(batch.query.position)
    return FieldBatch(batch.context, replace(batch.query, position=shared))


if __name__ == "__main__":
    folder = peers.checkout(aroma_peer.REPOSITORY, "AROMA")
    if folder is None:
        raise SystemExit(0)
    torch.manual_seed(0)
    batch = a_batch()
    works = {
        "train the auto-encoder": peers.Work(partial(autoencoders, folder, batch)),
        "train the stepper": peers.Work(partial(steppers, folder, batch)),
        "encode and decode": peers.Work(partial(answers, folder, batch), train=False),
    }
    raise SystemExit(peers.compare(f"AROMA: batch {BATCH}, {SENSORS} sensors, {QUERIES} queries", works, ROUNDS, WARM_UP))
