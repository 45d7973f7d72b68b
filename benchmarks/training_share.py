"""Where the time of a training goes: the network, taking batches, validation, checkpoints, and the rest.

    python -m benchmarks.training_share                            # data/, SCENT on ns and beijing
    python -m benchmarks.training_share DATA ns/scent era5_uk/cst

DATA is the data folder of a default run: DATA/sensors/KEY.zarr and DATA/runs/KEY/baselines are read. Each named training runs its own
stage with the sections of params.yaml, cut to two epochs of 10 steps a phase; the shares are those of epochs of `validate_every` steps.
Given are CPU seconds of the training process, which other programs disturb less than seconds. Another process prepares the batches at the
same time: `loader` is its CPU time beside that of the network. Below 1 the network need not wait for it where two cores are free.

    network      loss, backward, optimiser step, moving average
    batches      taking the next batch from the loader
    validation   its passes
    checkpoint   writing the last epoch's
    rest         of the loop: starting loader processes, logging, callbacks, between epochs
    before       reading the dataset, the validation batches and their backgrounds, the estimate; paid once, not in the shares
"""

from __future__ import annotations

import os
import resource
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.table import Table

from pipeline import params, train

EPOCHS, STEPS = 2, 10
PARTS = ("network", "batches", "validation", "checkpoint", "rest")


class Clock(L.Callback):
    """Adds up the CPU seconds between the hooks of Lightning's loop."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.steps = 0
        self._mark = 0.0
        self._started = 0.0
        self.loader = 0.0

    def _to(self, part: str) -> None:
        now = time.process_time()
        self.seconds[part] += now - self._mark
        self._mark = now

    def on_train_start(self, *_: Any) -> None:
        self.loader -= children()
        self._mark = self._started = time.process_time()

    def on_train_epoch_start(self, *_: Any) -> None:
        self._to("rest")

    def on_train_batch_start(self, *_: Any) -> None:
        self._to("batches" if self.steps % STEPS else "rest")  # the first batch of an epoch waits for its loader to start

    def on_train_batch_end(self, *_: Any) -> None:
        self._to("network")
        self.steps += 1

    def on_validation_start(self, *_: Any) -> None:
        self._to("rest")

    def on_validation_end(self, *_: Any) -> None:
        self._to("validation")

    def on_train_epoch_end(self, *_: Any) -> None:
        self._to("rest")

    def on_save_checkpoint(self, *_: Any) -> None:
        self._to("rest")

    def on_train_end(self, *_: Any) -> None:
        self._to("rest")
        self.seconds["whole"] = self._mark - self._started
        self.loader += children()


def children() -> float:
    """CPU seconds of the processes that have ended so far."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def measured(data: Path, key: str, model: str) -> dict[str, Clock]:
    """One clock for each phase of the stage `train` for KEY and MODEL."""
    dotted, kind = f"train.{key}.{model}", train.params_model(key, model)
    raw, _ = params.read(Path("params.yaml"), dotted)
    cut = {"phases": {name: {"steps": EPOCHS * STEPS, "validate_every": STEPS} for name in raw["phases"]}}
    chosen = params.validated(params.overlaid(raw, cut), kind, dotted)
    clocks: list[Clock] = []
    made, written = L.Trainer, L.Trainer.save_checkpoint

    def trainer(**given: Any) -> L.Trainer:
        clocks.append(Clock())
        return made(**{**given, "callbacks": [clocks[-1], *given["callbacks"]]})

    def saved(self: L.Trainer, *given: Any, **named: Any) -> None:
        clocks[-1]._to("rest")
        written(self, *given, **named)
        clocks[-1]._to("checkpoint")

    L.Trainer, made.save_checkpoint = trainer, saved  # type: ignore[misc, assignment, method-assign]
    try:
        with tempfile.TemporaryDirectory() as scratch:
            paths = {"sensors": data / "sensors" / f"{key}.zarr", "baselines": data / "runs" / key / "baselines"}
            began = time.process_time()
            train.run(chosen, key, model, **paths, out=Path(scratch) / "run")
            total = time.process_time() - began
    finally:
        L.Trainer, made.save_checkpoint = made, written  # type: ignore[misc, method-assign]
    found = dict(zip(raw["phases"], clocks, strict=True))
    clocks[0].seconds["before"] = total - sum(clock.seconds["whole"] for clock in clocks)
    return found


def main(data: Path, named: list[str]) -> int:
    console = Console(width=150)
    load = os.getloadavg()[0]
    table = Table(
        title=f"Share of a training's time, {EPOCHS} epochs of {STEPS} steps a phase, {os.cpu_count()} cores, load average {load:.1f}"
    )
    for column in ("training", "phase", "validate every", "CPU s an epoch", *PARTS, "loader", "before, s"):
        table.add_column(column, justify="left" if column in ("training", "phase") else "right")
    for name in named:
        key, _, model = name.partition("/")
        if not (data / "sensors" / f"{key}.zarr").exists():
            console.print(f"{name} skipped: {data / 'sensors' / f'{key}.zarr'} is not there; `make run` makes it")
            continue
        every = params.read(Path("params.yaml"), f"train.{key}.{model}")[0]["phases"]
        for phase, clock in measured(data, key, model).items():
            seconds = dict(clock.seconds)
            # As the section has it: an epoch of `validate_every` steps, with one validation and checkpoint.
            longer = every[phase]["validate_every"] / STEPS
            real = {part: seconds.get(part, 0.0) * (longer if part in ("network", "batches") else 1.0) for part in PARTS}
            real = {part: each / EPOCHS for part, each in real.items()}
            whole = sum(real.values())
            shares = (f"{100 * real[part] / whole:.0f} %" for part in PARTS)
            before = f"{seconds['before']:.1f}" if "before" in seconds else ""
            loader = f"{clock.loader / seconds['network']:.2f}"
            table.add_row(name, phase, str(every[phase]["validate_every"]), f"{whole:.1f}", *shares, loader, before)
    if table.row_count:
        console.print(table)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(Path(sys.argv[1] if len(sys.argv) > 1 else "data"), sys.argv[2:] or ["ns/scent", "beijing/scent"]))
