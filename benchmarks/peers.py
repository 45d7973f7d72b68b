"""What comparisons with released programs share: a checkout and its files, and a table of what all sides take in one process."""

from __future__ import annotations

import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks import sides

Side = tuple[nn.Module, Callable[[], Tensor]]  # a network, and a function that gives its loss, or its answer


def checkout(repository: str, variable: str) -> Path | None:
    """The folder named as the first argument or in the environment; None, with a message, where none is named."""
    found = sides.named({variable: f"a checkout of {repository}"})
    return None if found is None else Path(found[variable])


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


def stand_in_for_fairscale() -> None:
    """An empty module in the place of fairscale, for programs that import it for a wrapper that is off by default."""
    module = ModuleType("fairscale.nn")
    module.checkpoint_wrapper = lambda layer: layer  # type: ignore[attr-defined]
    sys.modules.setdefault("fairscale", ModuleType("fairscale"))
    sys.modules.setdefault("fairscale.nn", module)


@dataclass(frozen=True)
class Work:
    """What several sides do, the first of which the others are compared with."""

    sides: Callable[[], Mapping[str, Side]]
    train: bool = True  # a whole training step; False: what the side computes, without gradients
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW


def compare(title: str, works: Mapping[str, Work], rounds: int, warm_up: int) -> int:
    """Print a table of all works; one whose peer needs a module that is not there is skipped with a message."""
    console = Console(width=150)
    table = Table(title=f"{title}, {torch.get_num_threads()} thread(s), float32, {rounds} rounds")
    for column in ("work", "side", "parameters", "median ms", "fastest ms", "time ratio"):
        table.add_column(column, justify="left" if column in ("work", "side") else "right")
    for what, work in works.items():
        try:
            together = work.sides()
        except ModuleNotFoundError as error:
            console.print(f"{what} {lacking(error)}")
            continue
        taken = _seconds(together, work, rounds, warm_up)
        floor = statistics.median(next(iter(taken.values())))
        for name, (net, _) in together.items():
            median = statistics.median(taken[name])
            numbers = f"{1e3 * median:.0f}", f"{1e3 * min(taken[name]):.0f}", f"{median / floor:.2f}"
            table.add_row(what, name, f"{sum(p.numel() for p in net.parameters() if p.requires_grad):,}", *numbers)
    if table.row_count:
        console.print(table)
    return 0


def _seconds(sides: Mapping[str, Side], work: Work, rounds: int, warm_up: int) -> dict[str, list[float]]:
    """Seconds of every round after the first ones; the sides take turns."""
    taken: dict[str, list[float]] = {name: [] for name in sides}
    optimizers = {name: work.optimizer([p for p in net.parameters() if p.requires_grad], lr=1e-4) for name, (net, _) in sides.items()}
    for turn in range(rounds + warm_up):
        for name, (_, loss) in sides.items():
            start = time.perf_counter()
            with torch.set_grad_enabled(work.train):
                optimizers[name].zero_grad()
                result = loss()
                if work.train:
                    result.backward()
                    optimizers[name].step()
            if turn >= warm_up:
                taken[name].append(time.perf_counter() - start)
    return taken
