"""What comparisons with released programs share: finding a checkout, loading a file of it, timing the training steps of all sides."""

from __future__ import annotations

import importlib.util
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

Side = tuple[nn.Module, Callable[[], Tensor]]  # a network, and a function that gives its loss


def checkout(repository: str, variable: str) -> Path | None:
    """The folder named as the first argument or in the environment; None, with a message, where none is named."""
    named = sys.argv[1] if len(sys.argv) > 1 else os.environ.get(variable, "")
    if not named:
        print(f"skipped: no peer; name a checkout of {repository} as the argument or in {variable}")
    return Path(named) if named else None


def load(path: Path, repository: str) -> ModuleType:
    """A file of a checkout as a module. Raises FileNotFoundError without it, ModuleNotFoundError without what it needs."""
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    if not path.exists() or spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path} is not there: name a checkout of {repository}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lacking(error: ModuleNotFoundError) -> str:
    """Why a comparison is skipped whose peer cannot be imported."""
    return f"skipped: the peer needs {error.name}, which is not installed (pip install {error.name})"


def seconds(
    sides: Mapping[str, Side],
    rounds: int,
    warm_up: int,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    train: bool = True,
) -> dict[str, list[float]]:
    """Seconds of every round after the first ones; the sides take turns. A round is a whole training step, or only `loss`."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    optimizers = {name: optimizer([p for p in net.parameters() if p.requires_grad], lr=1e-4) for name, (net, _) in sides.items()}
    for turn in range(rounds + warm_up):
        for name, (_, loss) in sides.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(train):
                optimizers[name].zero_grad()
                result = loss()
                if train:
                    result.backward()
                    optimizers[name].step()
            if turn >= warm_up:
                taken[name].append(time.perf_counter() - start)
    return taken


def row(net: nn.Module, taken: list[float], floor: list[float]) -> tuple[str, str, str, str]:
    """Trained parameters, median and fastest milliseconds, and the ratio of the medians to those of `floor`."""
    count, median = sum(p.numel() for p in net.parameters() if p.requires_grad), statistics.median(taken)
    return f"{count:,}", f"{1e3 * median:.0f}", f"{1e3 * min(taken):.0f}", f"{median / statistics.median(floor):.2f}"
