"""Stage train: fit one field model to one sensor dataset with Lightning.

An epoch is `validate_every` optimiser steps. Batch i is a pure function of (seed, i) and the random numbers of step i are drawn from a
generator seeded by (seed, i), so a run resumed from the checkpoint of its last epoch ends in the same weights as an uninterrupted one.
The weights with the lowest validation loss are kept.
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
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from pydantic import Field, create_model, model_validator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from models import background, registry
from models.contract import FieldBatch, Predictor
from pipeline import atomic, device, runs
from pipeline.batches import TrainingBatches, Windows, cases
from pipeline.params import Section
from pipeline.sensors import SensorDataset, read

log = logging.getLogger(__name__)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its hints do not belong in a stage's log


class Validation(Section):
    leads: tuple[int, ...] = Field(min_length=1)  # frames
    batch: int = Field(default=32, ge=1)
    max_cases: int = Field(default=256, ge=1)  # evenly spread over the frozen validation cases
    max_points: int = Field(default=1024, ge=1)  # of the query, evenly spread


class Params(Section):
    model: Any  # the model's own settings, `cls.Config`
    background: str | None = None  # a fitted baseline; None is the papers' own setting
    windows: Windows
    validation: Validation
    steps: int = Field(ge=1)
    validate_every: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    warm_up: float = Field(default=0.05, ge=0, lt=1)  # share of the steps
    final_rate: float = Field(default=0.0, ge=0, le=1)  # share of learning_rate at the end of the cosine
    weight_decay: float = Field(default=1e-2, ge=0)  # matrices only
    clip: float = Field(default=1.0, gt=0)
    average: float = Field(default=0.0, ge=0, lt=1)  # decay of the exponential moving average of the weights; 0 is off
    accumulate: int = Field(default=1, ge=1)
    precision: Literal["32-true", "bf16-mixed"] = "32-true"
    seed: int = 0

    @model_validator(mode="after")
    def _whole_epochs(self) -> Params:
        if self.steps % self.validate_every:
            raise ValueError(f"steps {self.steps} is not a multiple of validate_every {self.validate_every}")
        return self


def params_model(key: str, model: str) -> type[Params]:
    return create_model("Params", __base__=Params, model=(registry.load(model).Config, ...))


def run(params: Params, key: str, model: str, *, sensors: Path, baselines: Path, out: Path) -> None:
    """Train `model` and write its run folder. A killed run continues from its last epoch when started again with the same inputs."""
    dataset = read(sensors)
    prior_folder = baselines / params.background if params.background else None
    prior = runs.load(prior_folder, dataset.info).predictor if prior_folder else None
    torch.set_num_threads(max(1, _cores() - 1))  # the loader process has the other core
    torch.manual_seed(params.seed)
    network = registry.load(model)(params.model, dataset.info)
    resume = out.with_name(f".{out.name}.resume") / _fingerprint(params, sensors, prior_folder)
    training = Training(network, params)
    history = History()
    trainer = L.Trainer(
        accelerator=device.accelerator(),
        devices="auto",
        max_epochs=params.steps // params.validate_every,
        gradient_clip_val=params.clip,
        accumulate_grad_batches=params.accumulate,
        precision=params.precision,
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
        trainer.fit(training, datamodule=Data(dataset, prior, params), ckpt_path=str(last) if last.exists() else None, weights_only=False)
    if trainer.is_global_zero:
        network.load_state_dict(history.best)
        with atomic.writing(out) as folder:
            runs.save(
                folder,
                model,
                params.model.model_dump(mode="json"),
                dataset.info,
                network.state_dict(),
                params.windows.context_frames,
                prior_folder,
            )
            history.write(folder / "history.csv")
            summary = {"parameters": count(network), "best_step": history.best_step, "validation_loss": history.best_loss}
            (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        atomic.remove(resume.parent)


def count(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


class Training(L.LightningModule):
    """The loop around a field model: losses, optimiser, schedule, moving average."""

    def __init__(self, network: Any, params: Params) -> None:
        super().__init__()
        self.network, self.params = network, params
        averaged = params.average > 0
        self.averaged = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=_ema(params.average)) if averaged else None

    def training_step(self, batch: FieldBatch, index: int) -> Tensor:
        torch.manual_seed(hash((self.params.seed, self.global_step, self.global_rank)))
        terms = self.network.loss(batch)
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
            terms = self.kept.loss(batch)
        asked = int(batch.query.mask.sum())
        self.log("validation_loss", terms["loss"], prog_bar=True, batch_size=asked, sync_dist=True)

    @property
    def kept(self) -> Any:
        """The network whose weights are validated and kept."""
        return self.averaged.module if self.averaged is not None else self.network

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.network.parameters() if p.requires_grad and p.ndim > 1]
        others = [p for p in self.network.parameters() if p.requires_grad and p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": self.params.weight_decay}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.params.learning_rate, fused=False)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, self._rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _rate(self, step: int) -> float:
        """Linear warm-up, then a cosine to `final_rate`."""
        warm = max(1, round(self.params.warm_up * self.params.steps))
        if step < warm:
            return (step + 1) / warm
        progress = min(1.0, (step - warm) / max(1, self.params.steps - warm))
        return self.params.final_rate + (1 - self.params.final_rate) * 0.5 * (1 + math.cos(math.pi * progress))


class Data(L.LightningDataModule):
    """Batches by number, so that epoch k starts at its own offset whatever came before, each with its background.

    The background is solved for in a loader process while the network works on the batch before.
    """

    def __init__(self, dataset: SensorDataset, prior: Predictor | None, params: Params) -> None:
        super().__init__()
        self.dataset, self.prior, self.params = dataset, prior, params
        self._seen: list[FieldBatch] = []  # the validation batches: they never change

    def train_dataloader(self) -> DataLoader[FieldBatch]:
        assert self.trainer is not None
        length = self.params.validate_every * self.params.accumulate
        first = self.trainer.current_epoch * length * self.trainer.world_size
        numbers = range(first + self.trainer.global_rank, first + length * self.trainer.world_size, self.trainer.world_size)
        source = _ByNumber(TrainingBatches(self.dataset, self.params.windows, self.params.seed), numbers, self.prior)
        return DataLoader(source, batch_size=None, shuffle=False, num_workers=_loader_workers())

    def val_dataloader(self) -> DataLoader[FieldBatch]:
        self._seen = self._seen or [with_background(batch, self.prior) for batch in self._validation()]
        return DataLoader(_List(self._seen), batch_size=None, shuffle=False)

    def transfer_batch_to_device(self, batch: FieldBatch, device: torch.device, dataloader_idx: int) -> FieldBatch:
        return batch.to(device)

    def _validation(self) -> Iterator[FieldBatch]:
        v = self.params.validation
        for part in cases(self.dataset, "validation", self.params.windows.context_frames, v.leads, v.batch, limit=v.max_cases):
            points = part.batch.query.mask.shape[2]
            yield FieldBatch(part.batch.context, part.batch.query.points(slice(None, None, -(-points // v.max_points))))


def with_background(batch: FieldBatch, prior: Predictor | None) -> FieldBatch:
    """The batch with its query's background filled in, where there is one."""
    return batch if prior is None else FieldBatch(batch.context, background.attach(prior, batch.context, batch.query))


class _ByNumber(Dataset[FieldBatch]):
    def __init__(self, batches: TrainingBatches, numbers: range, prior: Predictor | None) -> None:
        self.batches, self.numbers, self.prior = batches, numbers, prior

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> FieldBatch:
        return with_background(self.batches[self.numbers[index]], self.prior)


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
                module.params.steps,
                metrics["loss"],
                metrics["validation_loss"],
                best,
            )

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "best": self.best, "best_loss": self.best_loss, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.__dict__.update(state_dict)

    def write(self, path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, fieldnames=list(self.rows[-1]) if self.rows else ["step"], lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: f"{value:.6g}" for name, value in row.items()} for row in self.rows)


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


def _fingerprint(params: Params, dataset: Path, prior: Path | None) -> str:
    """What a checkpoint may be resumed for: the same params, data and background."""
    digest = hashlib.sha256(params.model_dump_json().encode())
    for root in filter(None, (dataset, prior)):
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
