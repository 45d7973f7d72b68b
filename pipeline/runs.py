"""The run folder: everything a fitted model needs to predict, and nothing that needs a pickle.

run.json               name, config, context_frames, strings of the state, DatasetInfo, sha256 of the weights
weights.safetensors    tensors of the state
history.csv            the training curve (trained models)
calibration.json       what its answers are corrected by (models/calibrated.py), where that was asked for
background/            a copy of the fitted baseline's run folder, where the model has one
folds/K/               a baseline's run folders for pipeline/folds.py: fitted without fold K of the training data
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from models import registry
from models.background import WithBackground
from models.calibrated import Calibrated, Calibration
from models.contract import DatasetInfo, Predictor

_CALIBRATION = "calibration.json"


@dataclass(frozen=True)
class Run:
    """A loaded run. `predictor` speaks model units (models/contract.py) and attaches its background itself."""

    name: str
    predictor: Predictor
    config: Mapping[str, Any]
    info: DatasetInfo
    context_frames: int
    weights_sha256: str


def save(
    folder: Path,
    name: str,
    config: Mapping[str, Any],
    info: DatasetInfo,
    state: Mapping[str, Tensor | str],
    context_frames: int,
    background: Path | None = None,
    calibration: Calibration | None = None,
) -> None:
    """Write a run folder into `folder`, which the caller makes appear atomically (pipeline/atomic.py)."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: value.detach().contiguous().cpu() for key, value in sorted(state.items()) if isinstance(value, Tensor)}
    weights = folder / "weights.safetensors"
    save_file(tensors, weights)
    text = {
        "name": name,
        "config": dict(config),
        "context_frames": context_frames,
        "strings": {key: value for key, value in sorted(state.items()) if isinstance(value, str)},
        "info": info.to_json(),
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }
    (folder / "run.json").write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    if calibration is not None:
        (folder / _CALIBRATION).write_text(json.dumps(calibration.to_json(), indent=1) + "\n", encoding="utf-8")
    if background is not None:
        shutil.copytree(background, folder / "background", ignore=shutil.ignore_patterns("folds"))


def load(folder: Path, info: DatasetInfo, device: torch.device | str = "cpu") -> Run:
    """Load a run for a dataset; a run made for another dataset, or with damaged weights, is an error that lists every difference."""
    path, weights = folder / "run.json", folder / "weights.safetensors"
    if not path.exists() or not weights.exists():
        raise ValueError(f"{folder} is not a run folder: run.json or weights.safetensors is missing; train the model first")
    text = json.loads(path.read_text(encoding="utf-8"))
    trained_on = DatasetInfo.from_json(text["info"])
    differences = trained_on.differences(info)
    if differences:
        raise ValueError(
            f"{folder} was trained on another dataset than {info.name!r}; train it on this one:\n  " + "\n  ".join(differences)
        )
    found = hashlib.sha256(weights.read_bytes()).hexdigest()
    if found != text["weights_sha256"]:
        raise ValueError(f"{weights} has sha256 {found}, run.json expects {text['weights_sha256']}: the file is damaged, train again")
    predictor = _build(text["name"], text["config"], trained_on, {**load_file(weights), **text["strings"]}, device)
    corrections = calibration(folder)
    if corrections is not None:
        predictor = Calibrated(predictor, corrections)
    if (folder / "background").exists():
        predictor = WithBackground(load(folder / "background", info).predictor, predictor)
    return Run(text["name"], predictor, text["config"], trained_on, text["context_frames"], found)


def calibration(folder: Path) -> Calibration | None:
    """What the answers of a run are corrected by; None where they are not."""
    path = folder / _CALIBRATION
    return Calibration.from_json(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None


def folders(folder: Path) -> list[Path]:
    """The run folders below a folder: itself, or one of each baseline."""
    return [folder] if (folder / "run.json").exists() else sorted(path.parent for path in folder.glob("*/run.json"))


def fold_folders(folder: Path, count: int | None = None) -> list[Path]:
    """The run folders of a baseline fitted without each of `count` folds; None: those that are there."""
    count = len(list(folder.glob("folds/*/run.json"))) if count is None else count
    return [folder / "folds" / str(fold) for fold in range(count)]


def _build(name: str, config: Mapping[str, Any], info: DatasetInfo, state: dict[str, Any], device: torch.device | str) -> Any:
    model_class = registry.load(name)
    model = model_class(model_class.Config.model_validate(config), info)
    if isinstance(model, nn.Module):
        model.load_state_dict(state)
        return model.to(device).eval()
    model.load(state)
    return model
