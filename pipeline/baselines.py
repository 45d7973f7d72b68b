"""Stage baselines: fit every baseline listed in the section to training batches of a sensor dataset, and write one run folder each.

fit:
  persistence: {}                                        # the name of the folder is the baseline's
  kriging_fitted: {kind: kriging, config: {sigma: fitted}}  # or `kind` says which it is
  boosting: {folds: 5}                                   # also fitted without each fifth of the training data (pipeline/folds.py)
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from pydantic import Field, create_model, field_validator
from rich.console import Console
from rich.progress import track

from models import registry
from models.contract import FieldBatch
from pipeline import atomic, folds, runs
from pipeline.batches import TrainingBatches, Windows
from pipeline.params import Section
from pipeline.sensors import read

log = logging.getLogger(__name__)


class Params(Section):
    windows: Windows
    steps: int = Field(ge=1)  # training batches, the same for every baseline
    seed: int = 0
    fit: dict[str, Any] = Field(min_length=1)

    @field_validator("fit", mode="before")
    @classmethod
    def _named(cls, raw: Any) -> Any:
        """`kind` is the name where it is not given."""
        return {name: {"kind": name, **(choice or {})} for name, choice in raw.items()} if isinstance(raw, dict) else raw


def params_model(key: str) -> type[Params]:
    """A choice is checked against the Config of the baseline that its `kind` names."""
    choices: list[Any] = []
    for name in registry.BASELINES:
        config, kind = registry.load(name).Config, cast(Any, Literal[name])
        count: Any = (int | None, Field(default=None, ge=2))
        choices.append(create_model(name, __base__=Section, kind=(kind, name), config=(config, config()), folds=count))
    choice: Any = Annotated[reduce(or_, choices), Field(discriminator="kind")]
    return create_model("Params", __base__=Params, fit=(dict[str, choice], Field(min_length=1)))


def run(params: Params, key: str, *, sensors: Path, out: Path) -> None:
    """Fit all baselines of `baselines.key` and write out/NAME for each; nothing is written unless every one could be fitted."""
    dataset = read(sensors)
    with atomic.writing(out) as folder, _one_thread():
        for name, choice in params.fit.items():
            count = choice.folds or 0
            parts = [folds.without(dataset, count, fold) for fold in range(count)]
            places = [folder / name, *runs.fold_folders(folder / name, count)]
            for place, part in zip(places, [dataset, *parts], strict=True):
                try:
                    baseline = registry.load(choice.kind)(choice.config, dataset.info)
                    baseline.fit(_Batches(TrainingBatches(part, params.windows, params.seed), params.steps, f"{key}: {name}"))
                except ValueError as error:
                    raise ValueError(f"baseline {name!r} cannot be fitted to {dataset.info.name}: {error}") from error
                config = choice.config.model_dump(mode="json")
                runs.save(place, choice.kind, config, dataset.info, baseline.state(), params.windows.context_frames)
            log.info("%s: fitted %s", key, name)


@contextmanager
def _one_thread() -> Iterator[None]:
    """The last bits of a sum depend on the number of threads, and matrices as small as a sensor layout's gain nothing from a second."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class _Batches:
    """The first `steps` training batches, with a progress bar on a terminal."""

    def __init__(self, batches: TrainingBatches, steps: int, title: str) -> None:
        self.batches, self.steps, self.title = batches, steps, title

    def __iter__(self) -> Iterator[FieldBatch]:
        console = Console(stderr=True)
        for step in track(range(self.steps), description=self.title, console=console, disable=not console.is_terminal, transient=True):
            yield self.batches[step]
