"""Every preset of `train` goes with the data of the same preset: its model can be built, its windows and cases fit into a trajectory."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from models import registry
from models.contract import DatasetInfo
from pipeline import fields, params, places, recipe, simulate, train
from pipeline.simulate import EQUATIONS
from tests.imports import ROOT

PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
PAIRS = {f"{dataset}.{model}": section for dataset, models in PARAMS["train"].items() for model, section in models.items()}
CHOICES = [(pair, word) for pair, section in PAIRS.items() for word in ("quick", *section.get("presets", {}))]


def load(word: str, dotted: str, model: type[Any], folder: Path) -> Any:
    """A section under a preset."""
    raw: Any = PARAMS
    for key in dotted.split("."):
        raw = raw[key]
    for key in reversed(dotted.split(".")):
        raw = {key: raw}
    (folder / "params.yaml").write_text(yaml.safe_dump({**raw, "preset": word}))
    return params.load(folder / "params.yaml", dotted, model)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("presets")


@cache
def data(word: str, key: str, folder: Path) -> tuple[recipe.Subsample, DatasetInfo, int | None, int | None]:
    """How a dataset is drawn, what it is, and the frames and points of a trajectory of a simulation."""
    drawn = load(word, f"subsample.{key}", recipe.Subsample, folder)
    here: dict[str, Any] = {"space": ("x", "y"), "centre": (0.0, 0.0), "half_extent": 1.0, "projection": None}
    frames = points = None
    simulated = drawn.source in PARAMS["simulate"]
    if simulated:
        section = load(word, f"simulate.{drawn.source}", simulate.Simulation, folder)
        field = import_module(EQUATIONS[section.equation]).coordinates(section)
        frames, points = field.sizes["time"], prod(field.sizes[dim] for dim in fields.space(field))
        if "point" not in field.dims:
            here = {"space": places.space(field), **places.scale(field)}
    covariates = drawn.network.covariates if drawn.network else ()
    info = recipe.dataset_info(
        drawn,
        key,
        simulated=simulated,
        ahead=covariates if drawn.network and drawn.network.known_ahead else (),
        mean=[0.0] * len(drawn.variables),
        std=[1.0] * len(drawn.variables),
        geometry=field.attrs["geometry"] if simulated else "plane",
        step=1.0,
        utc_offset=0.0,
        n_sensors=0 if simulated or drawn.blocks else 12,
        context_covariates=covariates,
        **here,
    )
    return drawn, info, frames, points


@pytest.mark.parametrize(("pair", "word"), CHOICES, ids=[f"{pair}-{word}" for pair, word in CHOICES])
def test_a_preset_of_training_fits_its_model_and_its_data(pair: str, word: str, folder: Path) -> None:
    key, name = pair.split(".")
    section = load(word, f"train.{pair}", train.params_model(key, name), folder)
    assert section.budget == (word, word)
    drawn, info, frames, points = data(word, key, folder)
    with torch.device("meta"):
        network = registry.load(name)(section.model, info)
    assert [phase for phase, _ in section.phases] == list(network.phases)
    assert section.background is None or network.corrects
    assert section.background is None or section.background in PARAMS["baselines"][key]["fit"]
    for _, phase in section.phases:
        windows = phase.windows
        assert windows.max_lead <= getattr(section.model, "horizon", windows.max_lead)
        if drawn.blocks is None:
            assert max(phase.validation.leads) <= drawn.cases.horizon
        if frames is not None:
            assert windows.context_frames + windows.max_lead <= frames
        if points is not None:
            assert (windows.query_points or 1) <= points
            assert windows.context_points is None or windows.context_points[1] <= points


def test_every_pair_has_a_budget_of_one_gpu() -> None:
    assert not [pair for pair, section in PAIRS.items() if "standard" not in section.get("presets", {})]


@pytest.mark.parametrize("pair", PAIRS)
def test_a_larger_budget_takes_more_steps(pair: str, folder: Path) -> None:
    key, name = pair.split(".")
    words = ("quick", *PAIRS[pair]["presets"])
    steps = [sum(phase.steps for _, phase in load(word, f"train.{pair}", train.params_model(key, name), folder).phases) for word in words]
    assert steps == sorted(steps)
