"""The released AROMA beside ours: how to load it, and which of its weights is which of ours.

    git clone https://github.com/LouisSerrano/aroma

Their auto-encoder needs einops; their stepper needs timm as well.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from models.aroma.config import AromaConfig
from models.aroma.model import Aroma
from models.contract import DatasetInfo

REPOSITORY = "LouisSerrano/aroma"


def module(folder: Path, name: str) -> ModuleType:
    """Their module aroma.NAME. Raises FileNotFoundError without it, ModuleNotFoundError without what it needs."""
    path = folder / "aroma" / f"{name}.py"
    if not path.exists():
        raise FileNotFoundError(f"{path} is not there: name a checkout of {REPOSITORY}")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    return importlib.import_module(f"aroma.{name}")


def autoencoder(folder: Path, config: AromaConfig, info: DatasetInfo) -> nn.Module:
    """Theirs with the sizes of `config`."""
    c = config
    return module(folder, "encoder_decoder").AROMAEncoderDecoderKL(
        input_dim=len(info.space), num_channels=len(info.variables), hidden_dim=c.width, dim=c.field_width,
        num_self_attentions=c.decoder_repeats, num_latents=c.tokens, latent_dim=c.channels, latent_heads=c.heads,
        latent_dim_head=c.head_width, cross_heads=c.heads, cross_dim_head=c.head_width, scales=[round(s) for s in c.scales],
        mlp_feature_dim=c.feature_width, depth_inr=c.field_depth, max_pos_encoding_freq=c.highest, num_freq=c.bands,
        encode_geo=c.encode_geometry,
    )  # fmt: skip


def stepper(folder: Path, config: AromaConfig) -> nn.Module:
    """Theirs with the sizes of `config`."""
    c = config
    return module(folder, "DIT").DiT(
        input_size=c.channels, num_tokens=c.tokens, hidden_size=c.stepper_width, depth=c.stepper_depth, num_heads=c.stepper_heads,
        mlp_ratio=c.ffn_factor,
    )  # fmt: skip


def with_their_weights(model: Aroma, theirs: nn.Module) -> None:
    """Give the auto-encoder of `model` the weights of theirs. Raises RuntimeError where one is left over or has another shape."""
    space, bands = len(model.info.space), model.config.bands
    # The code of a place is sorted by frequency, then axis there, and by axis, then frequency here, in each of its two halves.
    half = torch.arange(space * bands).view(bands, space).t().flatten()
    order = torch.cat([half, half + space * bands])
    found: dict[str, Tensor] = {}

    def read(there: str, here: str, place: tuple[str, ...]) -> None:
        names = {"norm": "norm", "norm_k": "norm_key", "norm_v": "norm_value"}
        names |= {"fn.to_q": "query", "fn.to_k": "key", "fn.to_v": "value", "fn.to_out": "out"}
        for old, new in names.items():
            for kind in ("weight", "bias"):
                if f"{there}.{old}.{kind}" in state:
                    value = state.pop(f"{there}.{old}.{kind}")
                    found[f"{here}.{new}.{kind}"] = value[..., order] if new in place else value

    def same(there: str, here: str) -> None:
        for kind in ("weight", "bias"):
            found[f"{here}.{kind}"] = state.pop(f"{there}.{kind}")

    def feed_forward(there: str, here: str) -> None:
        for old, new in (("norm", "0"), ("fn.net.0", "1"), ("fn.net.2", "3")):
            same(f"{there}.{old}", f"{here}.{new}")

    state = {name: value for name, value in theirs.state_dict().items() if ".bands" not in name}  # frequencies do not learn
    found["encoder.tokens"] = state.pop("encoder.latents")
    for old, new in (("lift_values", "encoder.value"), ("mean_fc", "encoder.mean"), ("logvar_fc", "encoder.log_variance")):
        same(f"encoder.{old}", new)
    read("encoder.cross_attend_blocks.0", "encoder.read_values", ("norm_key", "key"))
    feed_forward("encoder.cross_attend_blocks.1", "encoder.ffn_values")
    if model.config.encode_geometry:
        read("encoder.cross_attend_geo.0", "encoder.read_places", ("norm_key", "norm_value", "key", "value"))
        feed_forward("encoder.cross_attend_geo.1", "encoder.ffn_places")

    same("encoder.lift_z", "decoder.lift")
    for number in range(model.config.decoder_repeats):  # the same tensors under every number
        block, ffn = f"encoder.layers.{number}.0", f"encoder.layers.{number}.1"
        same(f"{block}.norm", "decoder.mix.0.norm")
        same(f"{block}.fn.to_out", "decoder.mix.0.out")
        joined = torch.cat([state.pop(f"{block}.fn.to_q.weight"), state.pop(f"{block}.fn.to_kv.weight")])
        found["decoder.mix.0.query_key_value.weight"] = joined
        feed_forward(ffn, "decoder.ffn.0")
    asks = "encoder.decoder_cross_attn"
    for old, new in (("norm", "norm"), ("norm_context", "norm_key"), ("fn.to_out", "out")):
        same(f"{asks}.{old}", f"decoder.query.{new}")
    found["decoder.query.query.weight"] = state.pop(f"{asks}.fn.to_q.weight")
    found["decoder.query.key.weight"], found["decoder.query.value.weight"] = state.pop(f"{asks}.fn.to_kv.weight").chunk(2)
    for number in range(model.config.field_depth):
        same(f"decoder.mlp.{2 * number}", f"decoder.field.{number}")
    same(f"decoder.mlp.{2 * model.config.field_depth}", "decoder.head")
    if state:
        raise RuntimeError(f"weights of theirs that ours has no place for: {', '.join(sorted(state))}")
    load(model, found, ("encoder.", "decoder."))


def with_their_stepper(model: Aroma, theirs: nn.Module) -> None:
    """The same for the stepper."""
    names = {
        "final_layer.linear": "head", "final_layer.adaLN_modulation.1": "last", "adaLN_modulation.1": "modulation", "x_embedder": "lift",
        "pos_embed": "place", "t_embedder.mlp": "level", "attn.qkv": "query_key_value", "attn.proj": "out", "mlp.fc1": "inner",
        "mlp.fc2": "outer",
    }  # fmt: skip
    found = {}
    for there, value in theirs.state_dict().items():
        here = there
        for old, new in names.items():
            here = here.replace(old, new)
        found[f"stepper.{here}"] = value.squeeze(0) if here == "place" else value
    load(model, found, ("stepper.",))


def load(model: Aroma, found: dict[str, Tensor], parts: tuple[str, ...]) -> None:
    """Load weights that must be all those of some parts of the model."""
    own = {name for name, _ in model.named_parameters() if name.startswith(parts)}
    if own != set(found):
        raise RuntimeError(f"weights that do not match: {', '.join(sorted(own ^ set(found)))}")
    model.load_state_dict(found, strict=False)
