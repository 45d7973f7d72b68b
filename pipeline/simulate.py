"""Generate a simulated field: `simulate.KEY` of params.yaml -> FOLDER/field.zarr and FOLDER/ingest.json.

Batches of trajectories stream to disk, so memory does not grow with their number. A killed run goes on where it stopped (what it has
finished waits in `.KEY.resume` beside the result) and ends with the bytes of an uninterrupted one.
An equation is a line in EQUATIONS and a module with

    Params                  the section `simulate.KEY` of params.yaml, a trajectories.Trajectories; its field `equation` is the name below
    VARIABLES               names in the lexicon
    POSITIONS               (may be absent) coordinates of points that each trajectory has for itself
    coordinates(params)     the field without values: all that fields.create asks for
    solve(params, seeds)    float32 arrays by name, VARIABLES (B, T, ...) and POSITIONS (B, P), of the trajectories with these seeds [B]
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from pipeline import atomic, fields, trajectories, workers
from pipeline.params import ParamsError, Section

EQUATIONS = {
    "burgers": "pipeline.burgers",
    "cylinder_flow": "pipeline.cylinder_flow",
    "epidemic": "pipeline.epidemic",
    "gaussian_process": "pipeline.gaussian_process",
    "kuramoto_sivashinsky": "pipeline.kuramoto_sivashinsky",
    "navier_stokes": "pipeline.navier_stokes",
    "plume": "pipeline.plume",
    "shallow_water": "pipeline.shallow_water",
    "spirals": "pipeline.spirals",
}


class Simulation(Section):
    """A section of `simulate`: its `equation` says which further parameters it has."""

    equation: str

    @classmethod
    def chosen(cls, raw: Any) -> type[Section]:
        name = raw.get("equation") if isinstance(raw, dict) else None
        if name not in EQUATIONS:
            raise ParamsError(f"unknown equation {name!r}: pipeline/simulate.py knows {', '.join(EQUATIONS)}")
        return import_module(EQUATIONS[name]).Params


def params_model(key: str) -> type[Section]:
    return Simulation


def run(params: Any, key: str, *, out: Path) -> None:
    """Simulate the trajectories of one data set into the folder `out`. FIELDCAST_WORKERS sets the number of threads."""
    equation = import_module(EQUATIONS[params.equation])
    coordinates, seeds = equation.coordinates(params), trajectories.seeds(params)
    recipe = {
        "source": "simulation",
        "key": key,
        "params": params.model_dump(mode="json"),
        "trajectories": dict(Counter(coordinates["role"].values.tolist())),
        "frames": coordinates.sizes["time"],
    }
    partial = out.with_name(f".{out.name}.resume")
    field = partial / "field.zarr"
    positions = getattr(equation, "POSITIONS", ())
    _prepare(partial, recipe, lambda: fields.create(field, coordinates, {name: {} for name in equation.VARIABLES}, positions))

    length = fields.block_length(coordinates.sizes)
    names = (*positions, *equation.VARIABLES)
    starts = [start for start in range(0, len(seeds), length) if not _written(field, names, start // length)]

    def simulate(start: int) -> None:
        solved = equation.solve(params, seeds[start : start + length])
        for name in names:
            fields.write_block(field, name, start, solved[name])

    with ThreadPoolExecutor(workers.count()) as pool:  # FFTs release the interpreter lock
        for _ in _shown(pool.map(simulate, starts), f"simulate {key}", len(starts)):
            pass
    with atomic.writing(out) as temporary:
        partial.rename(temporary)


def _prepare(partial: Path, recipe: dict[str, Any], create: Callable[[], None]) -> None:
    """Keep the batches of a killed run of the same recipe, or start an empty field. With a recipe, which comes last, the field is whole."""
    written = partial / "ingest.json"
    text = json.dumps(recipe, indent=1, sort_keys=True) + "\n"
    if written.exists() and written.read_text(encoding="utf-8") == text:
        for broken in partial.rglob("*.partial"):  # a chunk that was being written
            broken.unlink()
        return
    atomic.remove(partial)
    partial.mkdir(parents=True)
    create()
    written.write_text(text, encoding="utf-8")


def _written(field: Path, names: Sequence[str], chunk: int) -> bool:
    """Is this chunk of trajectories there, in every array? Zarr moves a chunk into place when it is whole."""
    return all(any(path.is_file() for path in (field / name / "c" / str(chunk)).rglob("0")) for name in names)


def _shown(steps: Iterable[None], title: str, total: int) -> Iterable[None]:
    """The steps, with a progress bar on a terminal and silent elsewhere."""
    console = Console(stderr=True)
    return track(steps, description=title, total=total, console=console, disable=not console.is_terminal)
