"""Stage train: fit one field model to one sensor dataset, phase after phase (pipeline/training_loop.py).

Batch i is a pure function of (seed, i), so a killed run goes on from its last epoch to the weights of an uninterrupted one. Each phase
begins with the best weights of the one before. A phase that only learns how frames follow each other gets them encoded, each once
(pipeline/encoded.py), where its windows hide nothing at random.
"""

from __future__ import annotations

import csv
import hashlib
import json
import logging
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, create_model
from torch import nn

from models import registry
from models.baselines.fitted import Fitted
from models.contract import DatasetInfo, Predictor
from pipeline import atomic, device, runs, training_data, training_loop
from pipeline.calibration import calibrate
from pipeline.estimate import cost
from pipeline.params import Section
from pipeline.phase import Phase, Validation
from pipeline.sensors import read
from pipeline.training_data import Backgrounds, TrainingData

log = logging.getLogger(__name__)


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
    backgrounds = _backgrounds(params, f"train.{key}.{model}", model, baselines, dataset.info)
    prior_folder, beside_folder = (baselines / name if name else None for name in (params.background, params.beside))
    if params.budget.used != params.budget.asked:
        log.warning("train.%s.%s is trained with the budget %s", key, model, params.budget)
    torch.set_num_threads(max(1, training_data.cores() - 1))  # the loader process has the other core
    torch.manual_seed(params.seed)
    network = cls(params.model, dataset.info)
    resume = out.with_name(f".{out.name}.resume") / _fingerprint(params, sensors, prior_folder, beside_folder)
    rows: list[dict[str, Any]] = []
    kept: dict[str, Any] = {}
    main = True
    *_, (_, last) = params.phases
    frames = params.context_frames or last.windows.context_frames
    if params.calibration:  # what cannot be answered must not be found out after the training
        batch, _ = next(training_data.validation_cases(dataset, frames, params.calibration, backgrounds.prior))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            network.eval().predict(batch.context, batch.query)
        network.train()
    for number, (name, phase) in enumerate(params.phases):
        torch.manual_seed(training_loop.seed(params.seed, number))
        network.begin(name)
        encoder = network if name in cls.follows and phase.windows.undisturbed else None
        data = TrainingData(dataset, backgrounds, phase, params.seed, encoder)
        if not (resume / name / "last.ckpt").exists():
            expected = cost(network, lambda data=data: data.batch(0), device.name(), phase.accumulate)  # type: ignore[misc]
            minutes, held = expected.minutes(phase.steps, training_data.loaders()), expected.bytes / 2**30
            log.info("phase %s: %d steps, expect about %.1f minutes and %.2f GiB for the network", name, phase.steps, minutes, held)
        training = training_loop.Training(network, phase, data, (params.seed, number))
        history, main = training_loop.fit(training, params.precision, resume / name)
        network.load_state_dict(history.best)
        rows += [{"phase": name, **row} for row in history.rows]
        kept[name] = {"trained": count(network), "best_step": history.best_step, "validation_loss": history.best_loss}
    if not main:  # another process of the same run writes
        return
    calibration = None
    if params.calibration:
        asked = training_data.validation_cases(dataset, frames, params.calibration, backgrounds.prior)
        calibration = calibrate(network.to(device.name()).eval(), asked, dataset.info, device.name())
    with atomic.writing(out) as folder:
        runs.save(
            folder, model, params.model.model_dump(mode="json"), dataset.info, network.state_dict(), frames, prior_folder, calibration
        )
        _write_history(rows, folder / "history.csv")
        summary = {"budget": str(params.budget), "parameters": sum(p.numel() for p in network.parameters()), "phases": kept}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    atomic.remove(resume.parent)


def _backgrounds(params: Params, section: str, model: str, baselines: Path, info: DatasetInfo) -> Backgrounds:
    """The fitted baselines that the section names. Raises ValueError where the model, or its training, cannot do with one."""
    if params.background and not registry.load(model).corrects:
        raise ValueError(f"{section}.background is {params.background!r}, but {model} takes no background: set it to null")

    def fitted(folder: Path) -> Predictor:
        return runs.load(folder, info).predictor

    prior = fitted(baselines / params.background) if params.background else None
    unseen = [fitted(folder) for folder in runs.fold_folders(baselines / params.background)] if params.background else []
    beside = fitted(baselines / params.beside) if params.beside else None
    if _crossfit(prior) and not unseen:
        raise ValueError(
            f"{section}.background: {params.background} is closer to the windows it was fitted to than to new ones, so a model"
            f" would learn little on top of it: set `folds` in baselines.{info.name}.fit.{params.background}, 5 for instance"
        )
    if beside and (not prior or _crossfit(beside)):
        raise ValueError(f"{section}.beside is {params.beside!r}: it goes with a `background`, and must need no cross-fitting itself")
    return Backgrounds(prior, unseen, beside)


def _crossfit(baseline: Predictor | None) -> bool:
    return isinstance(baseline, Fitted) and baseline.crossfit


def count(network: nn.Module) -> int:
    """Number of trainable parameters."""
    return sum(parameter.numel() for parameter in network.parameters() if parameter.requires_grad)


def _write_history(rows: list[dict[str, Any]], path: Path) -> None:
    """One row an epoch; a phase leaves the columns of the others empty."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.DictWriter(handle, fieldnames=names, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: value if isinstance(value, str) else f"{value:.6g}" for name, value in row.items()} for row in rows)


def _fingerprint(params: Params, *inputs: Path | None) -> str:
    """What a checkpoint may be resumed for: the same params, data and backgrounds."""
    digest = hashlib.sha256(params.model_dump_json().encode())
    for root in filter(None, inputs):
        for path in sorted(p for p in root.rglob("*") if p.is_file()):
            digest.update(path.relative_to(root).as_posix().encode())
            digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]
