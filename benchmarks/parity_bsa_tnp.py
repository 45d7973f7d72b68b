"""BSA-TNP against the program its authors released: our weights in their network give our numbers, and a training step of both is timed.

    git clone https://github.com/MLGlobalHealth/dl4bi
    python -m venv peer && peer/bin/pip install "jax[cpu]" "flax<0.13" einops jraph==0.0.6.dev0 dl4bi-sps optax orbax-checkpoint \\
        hydra-core wandb matplotlib scikit-learn scoringrules tqdm
    python -m benchmarks.parity_bsa_tnp dl4bi peer/bin/python

Theirs is JAX and runs in a process of its own, with the second argument as its Python. Both sides get the same weights, drawn away from
their start so that everything counts, and the same observations: those of the 2-D GP (two coordinates, reference sizes, `paper` mode),
with a random share of the context masked. Means, deviations, the loss and the gradients of all weights are compared in float32; then one
step (loss and gradients, compiled on their side) is timed on each side with one thread, one process after the other.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CASES = {"small": (8, 300, 256), "more than one tile": (1, 1300, 500)}  # tasks, context points, queries
ROUNDS = 5
TOLERANCE = 1e-4  # of the largest entry; float32, six blocks


def theirs(folder: str, given: str, answer: str) -> None:
    """In their Python: weights and observations from one file, what comes of them into another."""
    sys.path.insert(0, folder)
    import jax
    from dl4bi.core.attention import BiasedScanAttention, MultiHeadAttention
    from dl4bi.core.bias import Bias
    from dl4bi.core.mlp import MLP
    from dl4bi.core.transformer import KRBlock
    from dl4bi.meta_learning.bsa_tnp import BSATNP
    from flax import linen, traverse_util

    scan = BiasedScanAttention(bias={"s": Bias.build_rbf_network_bias(num_heads=4, num_basis=5)})
    attention = MultiHeadAttention(scan, 4, MLP([128]), MLP([128]), MLP([128]), MLP([64]))
    net = BSATNP(embed_s=lambda x: None, blk=KRBlock(attention, ffn=MLP([256, 64], linen.gelu)))
    arrays = dict(np.load(given))
    data = {key: arrays.pop(key) for key in ("s_ctx", "f_ctx", "mask_ctx", "s_test", "f_test")}
    truth = data.pop("f_test")
    weights = {"params": traverse_util.unflatten_dict(arrays, sep="/")}

    def loss(weights: Any) -> tuple[Any, Any]:
        out = net.apply(weights, **data)
        return -jax.scipy.stats.norm.logpdf(truth, out.mu, out.std).mean(), (out.mu, out.std)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (value, (mean, std)), slopes = jax.block_until_ready(step(weights))
    taken = timed(lambda: jax.block_until_ready(step(weights)))
    flat = traverse_util.flatten_dict(slopes["params"], sep="/")
    np.savez(answer, mean=mean, std=std, loss=value, seconds=taken, **{f"d {key}": np.asarray(x) for key, x in flat.items()})


def timed(step: Callable[[], object]) -> float:
    taken = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        step()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def name_of(ours: str) -> tuple[str, bool]:
    """Their name of one of our weights, and whether it is transposed there."""
    part, _, kind = ours.rpartition(".")
    kernel = {"weight": "kernel", "bias": "bias"}.get(kind, kind)
    words = part.split(".")
    if words[0] == "blocks":
        block, rest = f"KRBlock_{words[1]}", words[2:]
        if rest[0] == "space":
            return f"{block}/attn/attn/s_bias_{'ab'[int(kind)]}", False
        if rest[0].startswith("norm"):
            return f"{block}/{'norm' if rest[0] == 'norm' else 'LayerNorm_0'}/{'scale' if kind == 'weight' else 'bias'}", False
        if rest[0] == "ffn":
            return f"{block}/ffn/Dense_{int(rest[1]) // 2}/{kernel}", kind == "weight"
        projection = {"query": "proj_qs", "key": "proj_ks", "value": "proj_vs", "out": "proj_out"}[rest[0]]
        return f"{block}/attn/{projection}/Dense_0/{kernel}", kind == "weight"
    if words[0] == "observed":
        return "embed_obs/embedding", False
    if words[0].startswith("norm"):
        return f"{'LayerNorm_0' if words[0] == 'norm_token' else 'LayerNorm_1'}/{'scale' if kind == 'weight' else 'bias'}", False
    return f"{'embed_all' if words[0] == 'token' else 'head'}/Dense_{int(words[1]) // 2}/{kernel}", kind == "weight"


def main(folder: Path | None, python: Path | None) -> int:
    import torch
    from rich.console import Console
    from rich.table import Table

    from models.bsa_tnp.model import BsaTnp
    from models.contract import FieldBatch, Frames
    from tests import worlds

    console = Console()
    if folder is None or python is None:
        console.print("skipped: no peer; name a checkout of MLGlobalHealth/dl4bi and a Python that has what it needs")
        return 0
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = BsaTnp(BsaTnp.Config(mode="paper", time_bases=0), worlds.torus_info(geometry="plane"))
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight) * (weight.square().mean().sqrt() + 0.5)
    table = Table(title="Ours against the authors': largest difference by the largest entry, and a training step")
    for column in ("case", "mean", "std", "loss", "gradients", "theirs", "ours", "ratio"):
        table.add_column(column, justify="left" if column == "case" else "right")
    worst = 0.0
    for case, (tasks, points, queries) in CASES.items():
        place, asked = torch.rand(tasks, points, 2) * 4 - 2, torch.rand(tasks, queries, 2) * 4 - 2
        value, truth = (torch.sin(2 * x.sum(-1, keepdim=True)) for x in (place, asked))
        mask = torch.rand(tasks, points) > 0.3
        when = torch.zeros(tasks, 1, dtype=torch.float64)
        context = Frames(place[:, None], mask[:, None], when, value[:, None])
        query = Frames(asked[:, None], torch.ones(tasks, 1, queries, dtype=torch.bool), when, truth[:, None])

        def laid_out(weight: torch.Tensor, turned: bool, there: str) -> torch.Tensor:
            """As they keep it: biases are matrices, a row for each head."""
            return weight.view(model.config.heads, -1) if "_bias_" in there else weight.T if turned else weight

        def step(batch: FieldBatch) -> torch.Tensor:
            model.zero_grad()
            loss = model.loss(batch)["loss"]
            loss.backward()
            return loss.detach()

        batch = FieldBatch(context, query)
        loss, prediction = step(batch), model.predict(context, query)
        assert prediction.scale is not None
        with tempfile.TemporaryDirectory() as scratch:
            given, answer = Path(scratch) / "given.npz", Path(scratch) / "answer.npz"
            arrays = {"s_ctx": place, "f_ctx": value, "mask_ctx": mask, "s_test": asked, "f_test": truth}
            for name, weight in model.named_parameters():
                there, turned = name_of(name)
                arrays[there] = laid_out(weight.detach(), turned, there)
            np.savez(given, **{key: x.numpy() for key, x in arrays.items()})
            flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
            environment = {**os.environ, "XLA_FLAGS": flags, "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "PYTHONPATH": ""}
            run = [str(python), str(Path(__file__)), "theirs", str(folder.resolve()), str(given), str(answer)]
            subprocess.run(run, env=environment, check=True)
            found = dict(np.load(answer))

        def apart(ours: torch.Tensor, there: np.ndarray) -> float:
            return float(np.abs(ours.detach().numpy() - there).max() / np.abs(there).max())

        slopes = []
        for name, weight in model.named_parameters():
            there, turned = name_of(name)
            if name.endswith("key.bias"):  # it moves all logits of a query alike: only rounding is left of its gradient
                continue
            assert weight.grad is not None
            slopes.append(apart(laid_out(weight.grad, turned, there), found[f"d {there}"]))
        differences = [apart(prediction.mean[:, 0], found["mean"]), apart(prediction.scale[:, 0], found["std"])]
        differences += [apart(loss, found["loss"]), max(slopes)]
        worst = max(worst, *differences)
        ours, peer = timed(lambda batch=batch: step(batch)), float(found["seconds"])  # type: ignore[misc]
        sizes = f"{case}, {tasks} x {points} to {queries}"
        table.add_row(sizes, *[f"{x:.1e}" for x in differences], f"{1e3 * peer:.0f} ms", f"{1e3 * ours:.0f} ms", f"{ours / peer:.2f}")
    console.print(table)
    console.print(f"weights: {sum(p.numel() for p in model.parameters()):,}, all found on both sides")
    if worst > TOLERANCE:
        console.print(f"differs by {worst:.1e}, more than {TOLERANCE:.0e}")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    if sys.argv[1:2] == ["theirs"]:
        theirs(*sys.argv[2:5])
        raise SystemExit(0)
    named = [Path(x) for x in sys.argv[1:3]]
    raise SystemExit(main(*(named if len(named) == 2 else (None, None))))
