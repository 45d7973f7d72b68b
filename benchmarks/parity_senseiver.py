"""Senseiver against the program its authors released: their weights in our modules give their numbers.

    git clone https://github.com/OrchardLANL/Senseiver
    python -m benchmarks.parity_senseiver Senseiver

The folder may also be named by the environment variable SENSEIVER; their file needs einops. It imports fairscale for a wrapper that is off
by default, so an empty stand-in takes its place. Both sides get the same sensors and points of a 64 x 64 image; encoder, decoder, field,
loss and gradients are compared in float64, at the sizes of the paper's cylinder example and of its use by the authors of DSQ.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import peers
from models.senseiver.model import Senseiver
from tests import worlds

REPOSITORY = "OrchardLANL/Senseiver"
SIDE, SENSORS, QUERIES, FRAMES = 64, 20, 512, 3
INFO = worlds.torus_info(geometry="plane")
SETTINGS: dict[str, dict[str, int]] = {
    "cylinder example": {"latents": 256, "channels": 16, "token_width": 16, "query_width": 16, "rounds": 3},
    "as in DSQ": {},
}
TOLERANCE = 1e-10


def peer_modules(folder: Path) -> tuple[ModuleType, ModuleType]:
    """Their files model.py and positional.py. Raises FileNotFoundError without them, ModuleNotFoundError without what they need."""
    peers.stand_in_for_fairscale()
    return peers.load(folder / "model.py", REPOSITORY), peers.load(folder / "positional.py", REPOSITORY)


def peer(module: ModuleType, config: Any) -> tuple[nn.Module, nn.Module]:
    """Their encoder and decoder with our sizes."""
    place = 4 * config.bands
    heads = (config.cross_heads, config.self_heads)
    encoder = module.Encoder(1 + place, config.token_width, config.latents, config.channels, config.rounds, *heads, config.self_layers)
    return encoder, module.Decoder(place, config.query_width, config.channels, 1, 1, config.decoder_heads)


def copied(theirs: tuple[nn.Module, nn.Module], ours: Senseiver) -> None:
    """Their weights into our modules; every one of ours must be among them."""
    weights: dict[str, Tensor] = {}
    encoder, decoder = (dict(module.state_dict()) for module in theirs)

    def layer(source: dict[str, Tensor], theirs: str, ours: str, norms: dict[str, str]) -> None:
        for kind in ("weight", "bias"):
            for mine, name in norms.items():
                weights[f"{ours}.{mine}.{kind}"] = source[f"{theirs}.0.module.{name}.{kind}"]
            weights[f"{ours}.attention.out.{kind}"] = source[f"{theirs}.0.module.attention.attention.out_proj.{kind}"]
            for mlp in (0, 1, 3):
                weights[f"{ours}.mlp.{mlp}.{kind}"] = source[f"{theirs}.1.module.{mlp}.{kind}"]
        attention = f"{theirs}.0.module.attention.attention"
        if f"{attention}.in_proj_weight" in source:
            query, key, value = source[f"{attention}.in_proj_weight"].chunk(3)
        else:  # where keys have another width
            query, key, value = (source[f"{attention}.{part}_proj_weight"] for part in "qkv")
        bias = source[f"{attention}.in_proj_bias"].chunk(3)
        weights[f"{ours}.attention.query.weight"], weights[f"{ours}.attention.query.bias"] = query, bias[0]
        weights[f"{ours}.attention.key_value.weight"] = torch.cat([key, value])
        weights[f"{ours}.attention.key_value.bias"] = torch.cat(bias[1:])

    cross = {"norm": "q_norm", "norm_keys": "kv_norm"}
    for mine, name in (("first", "layer_1"), ("later", "layer_n")):
        layer(encoder, f"{name}.0", f"encoder.{mine}.cross", cross)
        for k in range(ours.config.self_layers):
            layer(encoder, f"{name}.1.{k}", f"encoder.{mine}.layers.{k}", {"norm": "norm"})
    layer(decoder, "cross_attention", "decoder.read", cross)
    weights["encoder.latents"], weights["decoder.asked"] = encoder["latent"], decoder["output"]
    linear = {"encoder.token": (encoder, "preproc"), "decoder.query": (decoder, "preproc"), "decoder.head": (decoder, "postproc")}
    for mine, (source, name) in linear.items():
        for kind in ("weight", "bias"):
            weights[f"{mine}.{kind}"] = source[f"{name}.{kind}"]
    ours.load_state_dict(weights)


def differences(model: ModuleType, positional: ModuleType, sizes: dict[str, int]) -> dict[str, float]:
    """Largest absolute difference of each quantity."""
    torch.manual_seed(0)
    config = Senseiver.Config(mode="paper", highest=SIDE / 2, **sizes)
    ours = Senseiver(config, INFO)
    encoder, decoder = theirs = peer(model, config)
    copied(theirs, ours)

    features = positional.PositionalEncoder((SIDE, SIDE, 1), config.bands)
    axis = torch.linspace(-1, 1, SIDE)
    place = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    sensors, asked = torch.randperm(SIDE**2)[:SENSORS], torch.randperm(SIDE**2)[:QUERIES]
    value, truth = torch.randn(FRAMES, SENSORS, 1), torch.randn(FRAMES, QUERIES, 1)
    at = [place[part].expand(FRAMES, -1, -1) for part in (sensors, asked)]

    latents = encoder(torch.cat([value, features[sensors].expand(FRAMES, -1, -1)], -1))
    field = decoder(latents, features[asked].expand(FRAMES, -1, -1))
    loss = nn.functional.mse_loss(field, truth, reduction="sum") / truth.numel()
    loss.backward()
    mine = ours.encoder(at[0], value, torch.ones(FRAMES, SENSORS, dtype=torch.bool))
    answer = ours.decoder(mine, at[1])
    batch = worlds.batch(INFO, b=FRAMES, s=1, n=SENSORS, q=QUERIES, dtype=torch.float64)
    for frames, position, values in ((batch.context, at[0], value), (batch.query, at[1], truth)):
        frames.position[:], frames.mask[:] = position.unsqueeze(1), True
        assert frames.value is not None
        frames.value[:] = values.unsqueeze(1)
    total = ours.loss(batch)["loss"]
    total.backward()
    pairs = {
        "position features": (features, ours.encoder.place(place)),
        "latents": (latents, mine),
        "field": (field, answer),
        "loss": (loss, total),
        "gradient of the latents": (encoder.latent.grad, ours.encoder.latents.grad),
        "gradient of the tokens": (encoder.preproc.weight.grad, ours.encoder.token.weight.grad),
        "gradient of the queries": (decoder.preproc.weight.grad, ours.decoder.query.weight.grad),
    }
    return {name: float((a - b).detach().abs().max()) for name, (a, b) in pairs.items()}


def main(folder: Path) -> int:
    console = Console()
    try:
        model, positional = peer_modules(folder)
    except ModuleNotFoundError as error:
        console.print(peers.lacking(error))
        return 0
    torch.set_default_dtype(torch.float64)
    found = {name: differences(model, positional, sizes) for name, sizes in SETTINGS.items()}
    table = Table(title=f"Largest differences in float64: {SENSORS} sensors, {QUERIES} points, {FRAMES} frames")
    for column in ("quantity", *found):
        table.add_column(column, justify="left" if column == "quantity" else "right")
    for quantity in next(iter(found.values())):
        table.add_row(quantity, *[f"{each[quantity]:.1e}" for each in found.values()])
    console.print(table)
    return int(max(value for each in found.values() for value in each.values()) > TOLERANCE)


if __name__ == "__main__":
    named = peers.checkout(REPOSITORY, "SENSEIVER")
    raise SystemExit(main(named) if named else 0)
