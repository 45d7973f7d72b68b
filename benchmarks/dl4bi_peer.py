"""The released BSA-TNP and the ConvCNP baseline beside it, in JAX: the other side of benchmarks/bsa_tnp.py and benchmarks/convcnp.py.

    git clone https://github.com/MLGlobalHealth/dl4bi
    python -m venv peer && peer/bin/pip install "jax[cpu]" "flax<0.13" einops jraph==0.0.6.dev0 dl4bi-sps optax orbax-checkpoint \\
        hydra-core wandb matplotlib scikit-learn scoringrules tqdm

This runs in that Python, so nothing of ours is imported. A training step is the negative log likelihood, its gradient and AdamW,
compiled as one program; an answer is compiled too.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

from benchmarks.sides import Peer, Works


def peer(model: str, sizes: dict[str, int]) -> Peer:
    """The network of that name as the side to compare with."""
    needs = {"DL4BI": "a checkout of MLGlobalHealth/dl4bi", "DL4BI_PYTHON": "its Python"}
    return Peer("released", needs, partial(_built, model, sizes), python="DL4BI_PYTHON")


def _built(model: str, sizes: dict[str, int], folder: str, _: str) -> Works:
    sys.path.insert(0, folder)
    return {"bsa_tnp": bsa_tnp, "convcnp": convcnp}[model](sizes)


def bsa_tnp(sizes: dict[str, int]) -> Works:
    from dl4bi.core.attention import BiasedScanAttention, MultiHeadAttention
    from dl4bi.core.bias import Bias
    from dl4bi.core.mlp import MLP
    from dl4bi.core.transformer import KRBlock
    from dl4bi.meta_learning.bsa_tnp import BSATNP
    from flax import linen

    scan = BiasedScanAttention(bias={"s": Bias.build_rbf_network_bias(num_heads=4, num_basis=5)})
    attention = MultiHeadAttention(scan, 4, MLP([128]), MLP([128]), MLP([128]), MLP([64]))
    return works(BSATNP(embed_s=lambda x: None, blk=KRBlock(attention, ffn=MLP([256, 64], linen.gelu))), sizes)


def convcnp(sizes: dict[str, int]) -> Works:
    from dl4bi.core.conv import ConvCNPNet, ConvDeepSet
    from dl4bi.core.mlp import MLP
    from dl4bi.meta_learning.convcnp import ConvCNP

    width, per_unit, edge = sizes["width"], sizes["points_per_unit"], sizes["nodes"] / sizes["points_per_unit"] / 2
    trunk = ConvCNPNet(width, (sizes["kernel"],) * 2, sizes["layers"])
    head = MLP([width] * 3 + [2])
    return works(ConvCNP([-edge] * 2, [edge] * 2, per_unit, ConvDeepSet(width), trunk, ConvDeepSet(width), head), sizes)


def works(net: Any, sizes: dict[str, int]) -> Works:
    import jax
    import optax

    key = jax.random.key(0)

    def points(b: int, n: int) -> tuple[Any, Any]:
        place = jax.random.uniform(key, (b, n, 2), minval=-1, maxval=1)
        return place, jax.numpy.sin(2 * place.sum(-1, keepdims=True))

    (seen, value), (asked, truth) = points(sizes["batch"], sizes["context"]), points(sizes["batch"], sizes["queries"])
    (one, its), (many, _) = points(1, sizes["answer_context"]), points(1, sizes["answer_queries"])
    state = net.init(key, s_ctx=seen, f_ctx=value, s_test=asked)
    weights, rest = state["params"], {name: part for name, part in state.items() if name != "params"}
    optimizer = optax.adamw(1e-4)

    def loss(weights: Any) -> Any:
        out = net.apply({"params": weights, **rest}, s_ctx=seen, f_ctx=value, s_test=asked)
        return -jax.scipy.stats.norm.logpdf(truth, out.mu, out.std).mean()

    @jax.jit
    def step(weights: Any, moments: Any) -> Any:
        updates, moments = optimizer.update(jax.grad(loss)(weights), moments, weights)
        return optax.apply_updates(weights, updates), moments

    @jax.jit
    def answer(weights: Any) -> Any:
        out = net.apply({"params": weights, **rest}, s_ctx=one, f_ctx=its, s_test=many)
        return out.mu, out.std

    held = [weights, optimizer.init(weights)]

    def train() -> None:
        held[:] = jax.block_until_ready(step(*held))

    count = sum(x.size for x in jax.tree.leaves(weights))
    return {"train": train, "answer": lambda: jax.block_until_ready(answer(held[0]))}, count
