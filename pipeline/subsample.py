"""Stage `subsample`: checked observations, or a field and a sensor layout, become one sensor dataset (pipeline/sensors.py).

pipeline/recipe.py                  the section of params.yaml
pipeline/frames_of_observations.py  binned observations of fixed and moving sensors
pipeline/frames_of_blocks.py        the days and folds of a benchmark
pipeline/frames_of_fields.py        sensors and points of a field
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np

from pipeline import atomic, fields, frames_of_blocks, frames_of_fields, frames_of_observations, sensors
from pipeline.raw import sha256
from pipeline.recipe import Subsample

log = logging.getLogger(__name__)


def params_model(*keys: str) -> type[Subsample]:
    return Subsample


def run(params: Subsample, key: str, *, ingested: Path, checked: Path, out: Path) -> None:
    """Write the sensor dataset `key` to `out` (Zarr)."""
    recipe = {"key": key, **params.model_dump(mode="json")}
    with atomic.writing(out) as temporary:
        writer = sensors.Writer(temporary)
        if params.network is not None or params.blocks is not None:
            if fields.is_field(ingested):
                raise ValueError(f"{ingested} holds a field: subsample.{key} needs `layout` or `tasks` in place of `network` or `blocks`")
            made_by = frames_of_observations if params.network is not None else frames_of_blocks
            info = made_by.write(params, key, checked, writer)
            inputs = {"observations": tree_sha256(checked / "observations")}
        else:
            if not fields.is_field(ingested):
                hint = f"run its stage first or, for observations, give subsample.{key} `network`"
                raise ValueError(f"{ingested} holds no field.zarr: {hint}")
            field = fields.open_field(ingested)
            if params.tasks is not None:
                recipe |= frames_of_fields.drawn(field)
            info = frames_of_fields.write(params, key, field, checked, writer)
            inputs = {"field.zarr": tree_sha256(ingested / "field.zarr"), "frames.parquet": sha256(checked / "frames.parquet")}
        dataset = writer.finish(info, recipe, inputs)
    split = np.asarray(dataset["frame/split"])
    log.info(
        "%s: %d observations in %d frames of %d trajectories, %d fixed sensors; frames by split %s; %d cases",
        key,
        dataset["obs/value"].shape[0],
        dataset.n_frames,
        len(dataset["trajectory/frame_start"]) - 1,
        info.n_sensors,
        {name: int((split == code).sum()) for name, code in sensors.SPLITS.items()},
        len(dataset["cases/frame"]),
    )


def tree_sha256(folder: Path) -> str:
    """One hash of all files below a folder, their names included."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return hashlib.sha256("".join(f"{path.relative_to(folder).as_posix()} {sha256(path)}\n" for path in files).encode()).hexdigest()
