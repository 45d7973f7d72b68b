"""Our AROMA with the weights of the released one: do both give the same?

    git clone https://github.com/LouisSerrano/aroma
    python -m benchmarks.parity_aroma aroma

The folder may also be named by the environment variable AROMA. Compared are the frequencies; then, in double precision and with equal
frequencies, the mean and log variance of the latents (with a geometry step and without, in one to three dimensions, with padded nodes),
the decoded field and the gradient of every weight; and the stepper. Their auto-encoder needs einops, their stepper timm; without them a
case is skipped with a message. Exit status 1 where anything differs by more than 1e-9 of its size (frequencies and the velocities of the
stepper: 1e-6 and 1e-5, since theirs makes its frequencies and sinusoids in single precision).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import aroma_peer, peers
from models.aroma.autoencoder import divergence
from models.aroma.model import Aroma
from models.contract import DatasetInfo, Frames
from tests import worlds

CASES = {
    "Navier-Stokes 1e-3": (2, 1, {"scales": (2, 3)}),
    "Burgers": (1, 1, {"scales": (3, 4, 5), "decoder_repeats": 2, "field_width": 128, "encode_geometry": False}),
    "shallow water": (3, 2, {"scales": (2, 3), "highest": 5, "field_depth": 1}),
    "airfoil": (2, 4, {"scales": (3, 4, 5), "highest": 5, "tokens": 64}),
}
BATCH, NODES, QUERIES = 3, 60, 50
WITHIN = {"frequencies": 1e-6, "velocity": 1e-5}
OTHERWISE = 1e-9


def about(space: int, channels: int) -> DatasetInfo:
    return worlds.torus_info(
        variables=tuple("abcd"[:channels]), units=("1",) * channels, mean=(0.0,) * channels, std=(1.0,) * channels,
        limits=((None, None),) * channels, space=("x", "y", "z")[:space], centre=(0.5,) * space,
    )  # fmt: skip


def compare(folder: Path, name: str) -> dict[str, float]:
    """Largest difference of every output, relative to its largest value."""
    space, channels, settings = CASES[name]
    info = about(space, channels)
    torch.manual_seed(0)
    ours = Aroma(Aroma.Config.model_validate({"mode": "paper", **settings}), info).double()
    theirs: Any = aroma_peer.autoencoder(folder, ours.config, info).double()
    for module in theirs.modules():
        if isinstance(module, nn.LayerNorm):  # at their start norms would hide a swap
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.2)
    aroma_peer.with_their_weights(ours, theirs)

    places, scales = theirs.encoder.pos_encoding.bands, theirs.encoder.pos_query.bands
    frequency = torch.pi * torch.cat([ours.encoder.frequency, ours.decoder.frequency])
    there = torch.stack([places, *scales.values()])
    result = {"frequencies": float(((frequency - there) / there).abs().max())}
    places.data = frequency[0]
    for key, row in zip(scales, frequency[1:], strict=True):
        scales[key].data = row

    value, place = torch.randn(BATCH, NODES, channels).double(), torch.rand(BATCH, NODES, space).double() * 2 - 1
    asked = torch.rand(BATCH, QUERIES, space).double() * 2 - 1
    mask = torch.arange(NODES) < torch.tensor([[NODES], [NODES - 7], [NODES // 2]])
    value = torch.where(mask.unsqueeze(-1), value, -100.0)

    mean, log_variance = ours.encoder(Frames(place.unsqueeze(1), mask.unsqueeze(1), torch.zeros(BATCH, 1), value.unsqueeze(1)))
    (field, _), kl = ours.decoder(ours.decoder.read(mean), asked, None), divergence(mean, log_variance)
    (field.square().mean() + kl).backward()
    answer, their_kl, their_mean, their_log_variance = theirs(value, place, mask, asked, return_stats=True, sample_posterior=False)
    (answer.square().mean() + their_kl).backward()
    result["mean"], result["log variance"] = apart(mean, their_mean), apart(log_variance, their_log_variance)
    result["KL"], result["field"] = apart(kl, their_kl), apart(field, theirs.decode(their_mean, asked))

    for parameter in theirs.parameters():  # their gradients, under our names
        if parameter.grad is not None:
            parameter.data = parameter.grad
    learnt = {key: p.grad for key, p in ours.named_parameters() if p.grad is not None}
    aroma_peer.with_their_weights(ours, theirs)
    expected = dict(ours.named_parameters())
    result["gradients"] = apart(torch.cat([g.flatten() for g in learnt.values()]), torch.cat([expected[key].flatten() for key in learnt]))
    return result


def compare_stepper(folder: Path) -> dict[str, float]:
    """The same for the stepper, at all four levels."""
    torch.manual_seed(0)
    ours = Aroma(Aroma.Config(mode="paper"), about(2, 1))
    theirs = aroma_peer.stepper(folder, ours.config)
    for parameter in theirs.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    aroma_peer.with_their_stepper(ours, theirs)
    state, noisy = torch.randn(2, 4, ours.config.tokens, ours.config.channels)
    level = torch.arange(4)
    return {"velocity": apart(ours.stepper(state, noisy, level), theirs(torch.cat([state, noisy], 1), level * 1000 / 3))}


def apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max() / b.detach().abs().max())


def main(folder: Path) -> int:
    console = Console()
    table = Table(title=f"Largest relative difference: batch {BATCH}, up to {NODES} nodes, {QUERIES} queries")
    for column in ("case", "output", "difference", "allowed"):
        table.add_column(column)
    failed = False
    for name in (*CASES, "stepper"):
        try:
            found = compare_stepper(folder) if name == "stepper" else compare(folder, name)
        except ModuleNotFoundError as error:
            console.print(f"{name} {peers.lacking(error)}")
            continue
        for output, difference in found.items():
            allowed = WITHIN.get(output, OTHERWISE)
            failed |= not difference <= allowed
            table.add_row(name, output, f"{difference:.1e}", f"{allowed:.0e}")
    console.print(table)
    return int(failed)


if __name__ == "__main__":
    named = peers.checkout(aroma_peer.REPOSITORY, "AROMA")
    raise SystemExit(main(named) if named else 0)
