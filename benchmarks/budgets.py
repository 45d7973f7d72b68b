"""What the presets of `train` cost: parameters, floating-point operations, and minutes on a GPU that nobody has to have.

    python -m benchmarks.budgets                             # `standard`, every pair whose dataset is in data/sensors
    python -m benchmarks.budgets paper DATA ns/scent beijing

One step of every phase runs on the CPU with a few windows; matrix products and convolutions are counted, and what grows with the batch is
scaled to the batch of the preset. Minutes are computed, not measured: each operation takes the longest of a launch, its arithmetic and its
bytes on a card with the numbers below, and each step a little more. Backgrounds, validation and encoding frames once are left out.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from models import registry
from models.bsa_tnp import biased_attention
from models.contract import EncodedFrames, FieldBatch
from pipeline import params, train
from pipeline.batches import TrainingBatches
from pipeline.phase import Phase
from pipeline.sensors import SensorDataset, read

ARITHMETIC = 12.5e12  # operations a second: a quarter of 50 TFLOP/s in float32
BANDWIDTH = 1.0e12  # bytes a second
LAUNCH = 1.0e-5  # seconds at least for an operation
STEP = 3.0e-3  # seconds of a step outside the network: optimiser, moving average, logging
WINDOWS = 2  # that the CPU is asked for


class Meter(TorchDispatchMode):
    """Counts what runs inside it as if it were `factor` times as large."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor, self.operations, self.seconds = factor, 0.0, 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            operations = self.factor * counted(func, args, kwargs or {}, out)
            moved = self.factor * sum(held(t) for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor))
            self.operations += operations
            self.seconds += max(LAUNCH, operations / ARITHMETIC, moved / BANDWIDTH)
        return out


def counted(func: Any, args: Any, kwargs: Any, out: Any) -> float:
    """Floating-point operations of matrix products and convolutions, 0 for all else."""
    if func is torch.ops.aten.convolution_backward.default:  # torch takes each group for a whole convolution
        given, _, weight = args[:3]
        return float(sum(args[10][:2]) * 2 * given.numel() * weight[0].numel())
    count = flop_registry.get(func.overloadpacket)
    return float(count(*args, **kwargs, out_val=out)) if count else 0.0


def held(tensor: Tensor) -> int:
    """Bytes, those of an expanded tensor once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return math.prod(sizes) * tensor.element_size()


def main(arguments: list[str]) -> int:
    word = arguments[0] if arguments else "standard"
    data, named = Path(arguments[1] if len(arguments) > 1 else "data") / "sensors", arguments[2:]
    table = Table("dataset", "model", "parameters", "steps", "PFLOP", "minutes", title=f"preset {word}, computed")
    sections, _ = params.read(Path("params.yaml"), "train")
    for key, models in sections.items():
        for model, raw in models.items():
            presets = {"quick": {}, **raw.pop("presets", {})}
            wanted = not named or key in named or f"{key}/{model}" in named
            if wanted and word in presets and (data / f"{key}.zarr").exists():
                section = params.validated(params.overlaid(raw, presets[word]), train.params_model(key, model), f"train.{key}.{model}")
                table.add_row(key, model, *row(read(data / f"{key}.zarr"), model, section))
    Console(width=120).print(table)
    return 0


def row(dataset: SensorDataset, model: str, section: train.Params) -> tuple[str, str, str, str]:
    """Parameters, steps, PFLOP and minutes of a training, phases joined by +."""
    torch.manual_seed(0)
    network = registry.load(model)(section.model, dataset.info).train()
    costs = []
    for name, phase in section.phases:
        network.begin(name)
        costs.append((phase.steps, *step(network, name, phase, dataset, bool(section.background))))
    return (
        f"{sum(p.numel() for p in network.parameters()):,}",
        " + ".join(f"{steps:,}" for steps, _, _ in costs),
        " + ".join(f"{steps * operations / 1e15:.2g}" for steps, operations, _ in costs),
        " + ".join(f"{steps * seconds / 60:.2g}" for steps, _, seconds in costs),
    )


def step(network: Any, name: str, phase: Phase, dataset: SensorDataset, background: bool) -> tuple[float, float]:
    """Operations and seconds of one optimiser step."""
    windows = phase.windows.model_copy(
        update={"batch": min(WINDOWS, phase.windows.batch), "trajectories": phase.windows.trajectories and 1}
    )
    batch: FieldBatch | EncodedFrames = TrainingBatches(dataset, windows, seed=0)[0]
    assert isinstance(batch, FieldBatch)
    if background:
        value = torch.zeros(*batch.query.mask.shape, len(dataset.info.variables))
        batch = FieldBatch(batch.context, replace(batch.query, background=value, background_scale=torch.ones_like(value)))
    if name in network.follows and phase.windows.undisturbed:
        with torch.no_grad():
            batch = network.encode(batch)
    share = windows.batch / phase.windows.batch
    with (
        Meter(1 / share) as meter,
        sdpa_kernel(SDPBackend.MATH),
        mock.patch.dict(biased_attention._TILE, cpu=int(biased_attention._LARGE * share)),
    ):
        network.terms(batch)["loss"].backward()
    network.zero_grad(set_to_none=True)
    return phase.accumulate * meter.operations, phase.accumulate * meter.seconds + STEP


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
