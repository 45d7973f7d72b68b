"""Stage train: fit one field model to one sensor dataset with Lightning, phase after phase.

An epoch is `validate_every` optimiser steps. Batch i is a pure function of (seed, i) and the random numbers of step i are drawn from a
generator seeded by (seed, phase, i), so a run resumed from the checkpoint of its last epoch ends in the same weights as an uninterrupted
one. The weights with the lowest validation loss are kept, and the next phase begins with them. A phase that only learns how frames follow
each other gets them encoded, each once (pipeline/encoded.py), where its windows hide nothing at random.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import numpy as np
import torch
from pydantic import Field, create_model, model_validator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from models import background, registry
from models.baselines.fitted import Fitted
from models.contract import EncodedFrames, FieldBatch, FieldModel, Predictor
from pipeline import atomic, device, folds, runs
from pipeline.batches import TrainingBatches, Windows
from pipeline.calibration import calibrate
from pipeline.cases import cases
from pipeline.encoded import EncodedBatches
from pipeline.estimate import cost
from pipeline.params import Section
from pipeline.sensors import SensorDataset, read

log = logging.getLogger(__name__)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its hints do not belong in a stage's log


class Validation(Section):
    leads: tuple[int, ...] = Field(min_length=1)  # frames
    batch: int = Field(default=32, ge=1)
    max_cases: int = Field(default=256, ge=1)  # evenly spread over the frozen validation cases
    max_points: int = Field(default=1024, ge=1)  # of the query, evenly spread


class Phase(Section):
    """What one phase of a model's training sees, and how it is optimised."""

    windows: Windows
    validation: Validation
    steps: int = Field(ge=1)
    validate_every: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    warm_up: float = Field(default=0.05, ge=0, lt=1)  # share of the steps
    final_rate: float = Field(default=0.0, ge=0, le=1)  # share of learning_rate at the end of the cosine
    epsilon: float = Field(default=1e-8, gt=0)  # of Adam: gradients below it are not followed, and on a good background they are small
    weight_decay: float = Field(default=1e-2, ge=0)
    decayed: Literal["matrices", "all"] = "matrices"  # which parameters weight_decay pulls to zero
    clip: float | None = Field(default=1.0, gt=0)  # norm of the gradient; None: none, as some papers have it
    average: float = Field(default=0.0, ge=0, lt=1)  # decay of the exponential moving average of the weights; 0 is off
    accumulate: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _whole_epochs(self) -> Phase:
        if self.steps % self.validate_every:
            raise ValueError(f"steps {self.steps} is not a multiple of validate_every {self.validate_every}")
        return self


class Params(Section):
    model: Any  # the model's own settings, `cls.Config`
    background: str | None = None  # a fitted baseline; None is the papers' own setting
    beside: str | None = None  # a poorer one for every other batch until the last fifth of the steps: there is more to learn from
    context_frames: int | None = Field(default=None, ge=1)  # that an answer is given from; None: those of the last phase
    phases: Any  # a Phase for each of the model's phases
    calibration: Validation | None = None  # cases that say how the answers are corrected (pipeline/calibration.py); None: they are not
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    seed: int = 0


def params_model(key: str, model: str) -> type[Params]:
    cls = registry.load(model)
    phases = create_model("Phases", __base__=Section, **dict.fromkeys(cls.phases, (Phase, ...)))  # type: ignore[call-overload]
    return create_model("Params", __base__=Params, model=(cls.Config, ...), phases=(phases, ...))


def run(params: Params, key: str, model: str, *, sensors: Path, baselines: Path, out: Path) -> None:
    """Train `model` and write its run folder. A killed run continues from its last epoch when started again with the same inputs."""
    dataset = read(sensors)
    cls = registry.load(model)
    if params.background and not cls.corrects:
        raise ValueError(f"train.{key}.{model}.background is {params.background!r}, but {model} takes no background: set it to null")
    prior_folder = baselines / params.background if params.background else None
    prior = runs.load(prior_folder, dataset.info).predictor if prior_folder else None
    unseen = [runs.load(folder, dataset.info).predictor for folder in runs.fold_folders(prior_folder)] if prior_folder else []
    if isinstance(prior, Fitted) and prior.crossfit and not unseen:
        raise ValueError(
            f"train.{key}.{model}.background: {params.background} is closer to the windows it was fitted to than to new ones, so a model"
            f" would learn little on top of it: set `folds` in baselines.{key}.fit.{params.background}, 5 for instance"
        )
    if params.budget.used != params.budget.asked:
        log.warning("train.%s.%s is trained with the budget %s", key, model, params.budget)
    other_folder = baselines / params.beside if params.beside else None
    other = runs.load(other_folder, dataset.info).predictor if other_folder else None
    if other and (not prior or (isinstance(other, Fitted) and other.crossfit)):
        raise ValueError(
            f"train.{key}.{model}.beside is {params.beside!r}: it goes with a `background`, and must need no cross-fitting itself"
        )
    torch.set_num_threads(max(1, _cores() - 1))  # the loader process has the other core
    torch.manual_seed(params.seed)
    network = cls(params.model, dataset.info)
    resume = out.with_name(f".{out.name}.resume") / _fingerprint(params, sensors, prior_folder, other_folder)
    rows: list[dict[str, Any]] = []
    kept: dict[str, Any] = {}
    main = True
    *_, (_, last) = params.phases
    frames = params.context_frames or last.windows.context_frames
    if params.calibration:  # what cannot be answered must not be found out after the training
        batch, _ = next(_calibrating(params, dataset, frames, prior))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            network.eval().predict(batch.context, batch.query)
        network.train()
    for number, (name, phase) in enumerate(params.phases):
        torch.manual_seed(_seed(params.seed, number))
        network.begin(name)
        encoder = network if name in cls.follows and phase.windows.undisturbed else None
        data = Data(dataset, prior, phase, params.seed, unseen, encoder, other)
        if not (resume / name / "last.ckpt").exists():
            expected = cost(network, lambda data=data: data.batch(0), device.name(), phase.accumulate)  # type: ignore[misc]
            minutes, held = expected.minutes(phase.steps, _loader_workers()), expected.bytes / 2**30
            log.info("phase %s: %d steps, expect about %.1f minutes and %.2f GiB for the network", name, phase.steps, minutes, held)
        history, main = _fit(Training(network, phase, (params.seed, number)), data, params.precision, resume / name)
        network.load_state_dict(history.best)
        rows += [{"phase": name, **row} for row in history.rows]
        kept[name] = {"trained": count(network), "best_step": history.best_step, "validation_loss": history.best_loss}
    if not main:  # another process of the same run writes
        return
    calibration = None
    if params.calibration:
        calibration = calibrate(network.to(device.name()).eval(), _calibrating(params, dataset, frames, prior), dataset.info, device.name())
    with atomic.writing(out) as folder:
        runs.save(
            folder, model, params.model.model_dump(mode="json"), dataset.info, network.state_dict(), frames, prior_folder, calibration
        )
        _write_history(rows, folder / "history.csv")
        summary = {"budget": str(params.budget), "parameters": sum(p.numel() for p in network.parameters()), "phases": kept}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    atomic.remove(resume.parent)


def _calibrating(params: Params, dataset: SensorDataset, frames: int, prior: Predictor | None) -> Iterator[tuple[FieldBatch, np.ndarray]]:
    """The cases that a calibration is found from, with their background and blocks."""
    assert params.calibration
    return ((with_background(batch, prior), block) for batch, block in _validation(dataset, frames, params.calibration))


def _fit(training: Training, data: Data, precision: Any, resume: Path) -> tuple[History, bool]:
    """Train one phase, or what is left of it; a phase that had ended is only read back. Also whether this is the main process."""
    phase = training.phase
    history = History()
    trainer = L.Trainer(
        accelerator=device.accelerator(),
        devices="auto",
        max_epochs=phase.steps // phase.validate_every,
        gradient_clip_val=phase.clip,
        accumulate_grad_batches=phase.accumulate,
        precision=precision,
        reload_dataloaders_every_n_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[history, _last_epoch(resume)],
        enable_progress_bar=sys.stderr.isatty(),
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    last = resume / "last.ckpt"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(num_workers|LeafSpec|exists and is not empty).*")
        trainer.fit(training, datamodule=data, ckpt_path=str(last) if last.exists() else None, weights_only=False)
    return history, trainer.is_global_zero


def count(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


class Training(L.LightningModule):
    """The loop around one phase of a field model: losses, optimiser, schedule, moving average."""

    def __init__(self, network: FieldModel, phase: Phase, seed: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.phase, self.seed = network, phase, seed
        averaged = phase.average > 0
        self.averaged = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=_ema(phase.average)) if averaged else None

    def training_step(self, batch: FieldBatch | EncodedFrames, index: int) -> Tensor:
        torch.manual_seed(_seed(*self.seed, self.global_step, self.global_rank))
        terms = self.network.terms(batch)
        if not torch.isfinite(terms["loss"]):
            raise ValueError(f"the loss is {terms['loss'].item()} at step {self.global_step}: lower learning_rate or look at the data")
        for name, value in terms.items():
            self.log(name, value.detach(), prog_bar=name == "loss", on_step=False, on_epoch=True, batch_size=1)
        return terms["loss"]

    def on_train_batch_end(self, *_: Any) -> None:
        if self.averaged is not None:
            self.averaged.update_parameters(self.network)

    def validation_step(self, batch: FieldBatch, index: int) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_seed(*self.seed, index))  # models that draw noise are compared with the same draws
            terms = self.kept.loss(batch)
        asked = int(batch.query.mask.sum())
        self.log("validation_loss", terms["loss"], prog_bar=True, batch_size=asked, sync_dist=True)

    @property
    def kept(self) -> Any:
        """The network whose weights are validated and kept."""
        return self.averaged.module if self.averaged is not None else self.network

    def configure_optimizers(self) -> Any:
        phase = self.phase
        trained = [p for p in self.network.parameters() if p.requires_grad]
        decayed = [p for p in trained if p.ndim > 1 or phase.decayed == "all"]
        others = [p for p in trained if p.ndim <= 1 and phase.decayed != "all"]
        groups = [{"params": decayed, "weight_decay": phase.weight_decay}, {"params": others, "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        optimizer = torch.optim.AdamW(groups, lr=phase.learning_rate, eps=phase.epsilon, fused=False)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to `final_rate`."""
        warm = max(1, round(self.phase.warm_up * self.phase.steps))
        if step < warm:
            return (step + 1) / warm
        progress = min(1.0, (step - warm) / max(1, self.phase.steps - warm))
        return self.phase.final_rate + (1 - self.phase.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))


class Data(L.LightningDataModule):
    """Batches by number, so that epoch k starts at its own offset whatever came before, each with its background.

    The background is solved for in a loader process while the network works on the batch before. Where `unseen` holds copies of it that
    were fitted without a fold of the training data each, batches are drawn from the folds by turns, and the copy that has not seen the
    fold answers. With an `encoder`, batches hold frames as it encodes them now. Every other round of the folds is answered by
    `beside`, where there is one, until the last fifth of the steps.
    """

    def __init__(
        self,
        dataset: SensorDataset,
        prior: Predictor | None,
        phase: Phase,
        seed: int,
        unseen: Sequence[Predictor] = (),
        encoder: FieldModel | None = None,
        beside: Predictor | None = None,
    ) -> None:
        super().__init__()
        self.dataset, self.prior, self.phase, self.seed = dataset, prior, phase, seed
        self._batches: list[TrainingBatches] | list[EncodedBatches]
        if encoder is None:
            parts = [folds.within(dataset, len(unseen), fold) for fold in range(len(unseen))] or [dataset]
            self._batches = [TrainingBatches(part, phase.windows, seed) for part in parts]
        else:
            self._batches = [EncodedBatches(dataset, phase.windows, seed, encoder, device.name())]
        self._priors: list[Predictor | None] = list(unseen) or [prior]
        self._beside = beside
        self._seen: list[FieldBatch] = []  # the validation batches: they never change

    def train_dataloader(self) -> DataLoader[FieldBatch | EncodedFrames]:
        assert self.trainer is not None
        length = self.phase.validate_every * self.phase.accumulate
        first = self.trainer.current_epoch * length * self.trainer.world_size
        numbers = range(first + self.trainer.global_rank, first + length * self.trainer.world_size, self.trainer.world_size)
        return DataLoader(_ByNumber(self, numbers), batch_size=None, shuffle=False, num_workers=_loader_workers())

    def batch(self, number: int) -> FieldBatch | EncodedFrames:
        """Training batch `number`, with its background or of encoded frames."""
        turn = number % len(self._batches)
        batch = self._batches[turn][number]
        if isinstance(batch, EncodedFrames):
            return batch
        poorer = self._beside is not None and number // len(self._batches) % 2 == 0 and number < 0.8 * self._length()
        return with_background(batch, self._beside if poorer else self._priors[turn])

    def _length(self) -> int:
        """Batches of the whole phase."""
        return self.phase.steps * self.phase.accumulate * (self.trainer.world_size if self.trainer else 1)

    def val_dataloader(self) -> DataLoader[FieldBatch]:
        self._seen = self._seen or [
            with_background(batch, self.prior)
            for batch, _ in _validation(self.dataset, self.phase.windows.context_frames, self.phase.validation)
        ]
        return DataLoader(_List(self._seen), batch_size=None, shuffle=False)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> FieldBatch | EncodedFrames:
        return batch.to(device)


def _validation(dataset: SensorDataset, context_frames: int, v: Validation) -> Iterator[tuple[FieldBatch, np.ndarray]]:
    """Some of the frozen validation cases, and some of their points; with the block of each case."""
    for part in cases(dataset, "validation", context_frames, v.leads, v.batch, limit=v.max_cases):
        points = part.batch.query.mask.shape[2]
        yield FieldBatch(part.batch.context, part.batch.query.points(slice(None, None, -(-points // v.max_points)))), part.block


def with_background(batch: FieldBatch, prior: Predictor | None) -> FieldBatch:
    """The batch with its query's background filled in, where there is one."""
    return batch if prior is None else FieldBatch(batch.context, background.attach(prior, batch.context, batch.query))


class _ByNumber(Dataset[FieldBatch | EncodedFrames]):
    def __init__(self, data: Data, numbers: range) -> None:
        self.data, self.numbers = data, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> FieldBatch | EncodedFrames:
        return self.data.batch(self.numbers[index])


class _List(Dataset[FieldBatch]):
    def __init__(self, items: list[FieldBatch]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> FieldBatch:
        return self.items[index]


class History(L.Callback):
    """The training curve and the best weights so far; both travel in the checkpoint, so a resumed run has the whole of them."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.best: dict[str, Tensor] = {}
        self.best_loss, self.best_step = math.inf, 0

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Training)
        loss = float(trainer.callback_metrics["validation_loss"])
        if loss < self.best_loss or not self.best:
            self.best_loss, self.best_step = loss, trainer.global_step
            self.best = {name: value.detach().cpu().clone() for name, value in module.kept.state_dict().items()}

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        assert isinstance(module, Training)
        metrics = {name: float(value) for name, value in sorted(trainer.callback_metrics.items())}
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.rows.append({"step": trainer.global_step, "learning_rate": rate, **metrics})
        if not sys.stderr.isatty():  # a terminal has the progress bar
            best = " (best)" if self.best_step == trainer.global_step else ""
            log.info(
                "step %d of %d: loss %.4g, validation %.4g%s",
                trainer.global_step,
                module.phase.steps,
                metrics["loss"],
                metrics["validation_loss"],
                best,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "best": self.best, "best_loss": self.best_loss, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.__dict__.update(state_dict)


def _write_history(rows: list[dict[str, Any]], path: Path) -> None:
    """One row an epoch; a phase leaves the columns of the others empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: value if isinstance(value, str) else f"{value:.6g}" for name, value in row.items()} for row in rows)


def _seed(*numbers: int) -> int:
    """One seed out of several numbers; a tuple of ints hashes the same in every process."""
    return hash(numbers)


def _ema(decay: float) -> Any:
    return torch.optim.swa_utils.get_ema_multi_avg_fn(decay)


def _last_epoch(folder: Path) -> L.Callback:
    """Keep a checkpoint of the last whole epoch. Saved any earlier, a resumed run would end that epoch a second time."""
    return L.pytorch.callbacks.ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)


def _loader_workers() -> int:
    """Processes that prepare batches: one of the cores on a CPU, four beside a GPU."""
    return 4 if torch.cuda.is_available() else min(1, _cores() - 1)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _fingerprint(params: Params, *inputs: Path | None) -> str:
    """What a checkpoint may be resumed for: the same params, data and backgrounds."""
    digest = hashlib.sha256(params.model_dump_json().encode())
    for root in filter(None, inputs):
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
