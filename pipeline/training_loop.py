"""The loop around one phase of a training, with Lightning: losses, optimiser, schedule, moving average, checkpoints, the curve.

An epoch is `validate_every` optimiser steps. The random numbers of step i are drawn from a generator seeded by (seed, phase, i), so a phase
resumed from the checkpoint of its last epoch ends in the same weights as an uninterrupted one. The weights with the lowest validation loss
are kept.
"""

from __future__ import annotations

import logging
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from models.contract import EncodedFrames, FieldBatch, FieldModel
from pipeline import device
from pipeline.phase import Phase
from pipeline.training_data import TrainingData

log = logging.getLogger(__name__)
logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # its hints do not belong in a stage's log


def fit(training: Training, precision: Any, resume: Path) -> tuple[History, bool]:
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
        trainer.fit(training, ckpt_path=str(last) if last.exists() else None, weights_only=False)
    return history, trainer.is_global_zero


class Training(L.LightningModule):
    """The loop around one phase of a field model: losses, optimiser, schedule, moving average."""

    def __init__(self, network: FieldModel, phase: Phase, data: TrainingData, seed: tuple[int, ...]) -> None:
        super().__init__()
        self.network, self.phase, self.data, self.seed = network, phase, data, seed
        averaged = phase.average > 0
        self.averaged = torch.optim.swa_utils.AveragedModel(network, multi_avg_fn=_ema(phase.average)) if averaged else None

    def training_step(self, batch: FieldBatch | EncodedFrames, index: int) -> Tensor:
        torch.manual_seed(seed(*self.seed, self.global_step, self.global_rank))
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
            torch.manual_seed(seed(*self.seed, index))  # models that draw noise are compared with the same draws
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

    def train_dataloader(self) -> DataLoader[FieldBatch | EncodedFrames]:
        return self.data.epoch(self.trainer.current_epoch, self.trainer.global_rank, self.trainer.world_size)

    def val_dataloader(self) -> DataLoader[FieldBatch]:
        return self.data.validation()

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> FieldBatch | EncodedFrames:
        return batch.to(device)


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


def seed(*numbers: int) -> int:
    """One seed out of several numbers; a tuple of ints hashes the same in every process."""
    return hash(numbers)


def _ema(decay: float) -> Any:
    return torch.optim.swa_utils.get_ema_multi_avg_fn(decay)


def _last_epoch(folder: Path) -> L.Callback:
    """Keep a checkpoint of the last whole epoch. Saved any earlier, a resumed run would end that epoch a second time."""
    return L.pytorch.callbacks.ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
