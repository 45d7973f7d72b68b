"""The sensor dataset contract: trajectories of frames of observations, ragged, in one Zarr v3 group.

    obs/position (O,D)   obs/value (O,C)   obs/covariate (O,F)   obs/sensor (O,) index of a fixed sensor, -1 for a moving one
    frame/obs_start (M+1,)   frame/time (M,) in `info.time_unit`   frame/split (M,) 0 train 1 validation 2 test -1 gap
    trajectory/frame_start (R+1,)
    obs/role (O,) 0 seen 1 asked 2 both      [where single observations are held out for scoring]
    trajectory/parameter (R,K)               [what a simulation drew for each trajectory; names in `recipe`]
    sensor/position (K,D)   sensor/role (K,) 0 context 1 validation 2 test   [fixed sensors only]
    truth/value (M,P,C)   truth/position (P,D)   [dense truth on P points, where it exists; truth/shape gives the grid (y, x)]
    cases/frame (J,) last context frame of each frozen evaluation case   cases/split (J,) 1 | 2   cases/block (J,) bootstrap block
    cases/seen_start (J+1,)  cases/seen  cases/asked_start (J+1,)  cases/asked
                             [rows of obs that a case knows and is asked for, where no rule of roles says so; pipeline/protocol.py]

Rows are sorted by frame, so a window of consecutive frames is one slice. Observations are those a model may see as context plus those
held out for scoring: of fixed sensors of role 1 and 2, and of `obs/role` 1. Only valid observations are stored: absent means missing.
Values, positions are physical (`info` says how to scale them); a moving sensor's role is always context.
Group attributes: `info` (models.contract.DatasetInfo as JSON), `recipe` (params of subsample), `inputs` (hashes), `sensor_names`
(K names of the fixed sensors, where they have any).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import zarr
import zarr.codecs

from models.contract import DatasetInfo

TRAIN, VALIDATION, TEST, GAP = 0, 1, 2, -1
SPLITS = {"train": TRAIN, "validation": VALIDATION, "test": TEST}
CONTEXT, HELD_VALIDATION, HELD_TEST = 0, 1, 2
SEEN, ASKED, SEEN_AND_ASKED = 0, 1, 2

_REQUIRED = {
    "obs/position": "f4",
    "obs/value": "f4",
    "obs/covariate": "f4",
    "obs/sensor": "i4",
    "frame/obs_start": "i8",
    "frame/time": "f8",
    "frame/split": "i1",
    "trajectory/frame_start": "i8",
    "cases/frame": "i8",
    "cases/split": "i1",
    "cases/block": "i4",
}
_OPTIONAL = {
    "obs/role": "i1",
    "cases/seen_start": "i8",
    "cases/seen": "i8",
    "cases/asked_start": "i8",
    "cases/asked": "i8",
    "trajectory/parameter": "f8",
    "sensor/position": "f4",
    "sensor/role": "i1",
    "truth/value": "f4",
    "truth/position": "f4",
    "truth/shape": "i8",
}
_KINDS = {**_REQUIRED, **_OPTIONAL}
# Arrays that grow with the data stay lazy above this size; the rest always fits.
_GROWING = ("obs/position", "obs/value", "obs/covariate", "obs/sensor", "obs/role", "truth/value")
_IN_MEMORY_BYTES = 1 << 30
# Few files, and yet a frame of a lazy array is read without much else.
_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class SensorDataset:
    """An open sensor dataset. Small arrays are NumPy, `truth/value` above 1 GiB stays a lazy Zarr array with the same slicing."""

    info: DatasetInfo
    arrays: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    sensor_names: tuple[str, ...] = ()  # of the fixed sensors; () where they have none

    def __getitem__(self, name: str) -> Any:
        return self.arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    @property
    def n_frames(self) -> int:
        return len(self.arrays["frame/time"])

    @property
    def has_truth(self) -> bool:
        return "truth/value" in self.arrays

    def name_of(self, sensor: int) -> str:
        """What a page calls a fixed sensor: its name, or else its number counted from 1."""
        return self.sensor_names[sensor] if self.sensor_names else str(sensor + 1)

    def trajectory_of(self, frame: np.ndarray) -> np.ndarray:
        """Index of the trajectory each frame belongs to."""
        return np.searchsorted(self.arrays["trajectory/frame_start"], frame, side="right") - 1


class Writer:
    """Writes a dataset piece by piece, so that its size is not bound by memory; the same rows give the same bytes however they are cut.

    `path` should be a temporary path (pipeline/atomic.py).
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._root = zarr.create_group(path, zarr_format=3, overwrite=True)
        self._pending: dict[str, list[np.ndarray]] = {}
        self._sensor_names: list[str] = []

    def append(self, name: str, rows: np.ndarray) -> None:
        """Add rows along the first axis of an array of the contract."""
        rows = np.ascontiguousarray(rows, dtype=_KINDS[name])
        pending = self._pending.setdefault(name, [])
        pending.append(rows)
        if sum(piece.nbytes for piece in pending) >= _CHUNK_BYTES:
            self._flush(name, whole_chunks=True)

    def name_sensors(self, names: Iterable[str]) -> None:
        """Name the fixed sensors, in their order."""
        self._sensor_names = list(names)

    def finish(self, info: DatasetInfo, recipe: Mapping[str, Any], inputs: Mapping[str, str]) -> SensorDataset:
        """Write what is left and the attributes, then open and check the whole."""
        for name in sorted(self._pending):
            self._flush(name, whole_chunks=False)
        named = {"sensor_names": self._sensor_names} if self._sensor_names else {}
        self._root.attrs.update({"info": info.to_json(), "recipe": dict(recipe), "inputs": dict(inputs), **named})
        return read(self.path)

    def _flush(self, name: str, whole_chunks: bool) -> None:
        rows = np.concatenate(self._pending[name])
        rows_per_chunk = max(1, _CHUNK_BYTES // max(1, rows[:1].nbytes))
        ready = len(rows) // rows_per_chunk * rows_per_chunk if whole_chunks else len(rows)
        self._pending[name] = [rows[ready:]]
        if name in self._root:
            self._array(name).append(rows[:ready])
        elif ready or not whole_chunks:
            # A small array is one chunk of its own size; a large one has full chunks along the first axis.
            chunks = (rows_per_chunk if whole_chunks else max(1, len(rows)), *(max(1, size) for size in rows.shape[1:]))
            self._root.create_array(name, data=rows[:ready], chunks=chunks, compressors=zarr.codecs.ZstdCodec(level=3))

    def _array(self, name: str) -> zarr.Array[Any]:
        array = self._root[name]
        assert isinstance(array, zarr.Array)
        return array


def write(path: Path, dataset: SensorDataset) -> None:
    """Write a dataset that is in memory; a broken one is an error before anything is written."""
    problems = check(dataset)
    if problems:
        raise ValueError(f"{path} would break the sensor dataset contract:\n  " + "\n  ".join(problems))
    writer = Writer(path)
    for name in _KINDS:
        if name in dataset.arrays:
            writer.append(name, dataset.arrays[name])
    writer.name_sensors(dataset.sensor_names)
    writer.finish(dataset.info, dataset.recipe, dataset.inputs)


def read(path: Path) -> SensorDataset:
    """Open and check a dataset."""
    try:
        root = zarr.open_group(path, mode="r")
    except FileNotFoundError:
        raise ValueError(f"{path} is not a Zarr group: run the subsample stage first") from None
    missing = [name for name in _REQUIRED if name not in root]
    if missing or "info" not in root.attrs:
        raise ValueError(f"{path} is not a sensor dataset: missing {', '.join(missing) or 'the info attribute'}")
    arrays: dict[str, Any] = {}
    for name in _KINDS:
        array = root.get(name)
        if isinstance(array, zarr.Array):
            arrays[name] = array if name in _GROWING and array.nbytes > _IN_MEMORY_BYTES else array[...]
    attributes = json.loads(json.dumps(root.attrs.asdict()))
    dataset = SensorDataset(
        DatasetInfo.from_json(attributes["info"]),
        arrays,
        attributes["recipe"],
        attributes["inputs"],
        tuple(attributes.get("sensor_names", ())),
    )
    problems = check(dataset)
    if problems:
        raise ValueError(f"{path} breaks the sensor dataset contract:\n  " + "\n  ".join(problems))
    return dataset


def check(dataset: SensorDataset) -> list[str]:
    """Every way in which a dataset breaks the contract."""
    a, info = dataset.arrays, dataset.info
    problems = [f"{name} is missing" for name in _REQUIRED if name not in a]
    if problems:
        return problems
    n_obs, n_frames = a["obs/value"].shape[0], a["frame/time"].shape[0]
    expected = {
        "obs/position": (n_obs, len(info.space)),
        "obs/value": (n_obs, len(info.variables)),
        "obs/covariate": (n_obs, len(info.context_covariates)),
        "obs/sensor": (n_obs,),
        "frame/obs_start": (n_frames + 1,),
        "frame/split": (n_frames,),
    }
    if dataset.has_truth:
        expected["truth/value"] = (n_frames, len(a["truth/position"]), len(info.variables))
    if "obs/role" in a:
        expected["obs/role"] = (n_obs,)
    if "trajectory/parameter" in a:
        expected["trajectory/parameter"] = (len(a["trajectory/frame_start"]) - 1, a["trajectory/parameter"].shape[1])
    for name, shape in expected.items():
        if tuple(a[name].shape) != shape:
            problems.append(f"{name} has shape {tuple(a[name].shape)}, expected {shape}")
    for name, last in (("frame/obs_start", n_obs), ("trajectory/frame_start", n_frames)):
        start = np.asarray(a[name])
        if start[0] != 0 or start[-1] != last or (np.diff(start) < 0).any():
            problems.append(f"{name} must rise from 0 to {last}, found {start[0]}..{start[-1]}")
    if problems:
        return problems
    for name in ("obs/position", "obs/value", "obs/covariate"):
        bad = _not_finite(a[name])
        if len(bad):
            problems.append(f"{name}: {len(bad)} rows are not finite, first {bad[0]}; absent observations are left out")
    starts = np.asarray(a["trajectory/frame_start"])[1:-1]
    steps = np.diff(a["frame/time"])
    inside = np.ones(len(steps), bool)
    inside[starts[(starts > 0) & (starts <= len(steps))] - 1] = False
    if (steps[inside] <= 0).any():
        problems.append(f"frame/time does not increase inside a trajectory, first at frame {int(np.argmax((steps <= 0) & inside)) + 1}")
    if info.n_sensors and ("sensor/role" not in a or len(a["sensor/role"]) != info.n_sensors):
        problems.append(
            f"info.n_sensors is {info.n_sensors}, but sensor/role has {len(a['sensor/role']) if 'sensor/role' in a else 0} rows"
        )
    if dataset.sensor_names and len(dataset.sensor_names) != info.n_sensors:
        problems.append(f"info.n_sensors is {info.n_sensors}, but sensor_names has {len(dataset.sensor_names)}")
    lowest, highest = _range(a["obs/sensor"])
    if n_obs and (lowest < -1 or highest >= info.n_sensors):
        problems.append(f"obs/sensor must lie in -1..{info.n_sensors - 1}, found {lowest}..{highest}")
    elif info.n_sensors:
        sensor = np.asarray(a["obs/sensor"][...])
        fixed = np.flatnonzero(sensor >= 0)
        frame = np.searchsorted(np.asarray(a["frame/obs_start"]), fixed, side="right") - 1
        twice = len(fixed) - len(np.unique(frame * info.n_sensors + sensor[fixed]))
        if twice:
            problems.append(f"{twice} observations repeat a fixed sensor within a frame; average them")
    if "obs/role" in a and n_obs and ((ends := _range(a["obs/role"]))[0] < SEEN or ends[1] > SEEN_AND_ASKED):
        problems.append(f"obs/role must lie in {SEEN}..{SEEN_AND_ASKED}, found {ends[0]}..{ends[1]}")
    if not (np.asarray(a["frame/split"]) == TRAIN).any():
        problems.append("frame/split has no training frame")
    if len(a["cases/frame"]) and (a["cases/frame"].min() < 0 or a["cases/frame"].max() >= n_frames):
        problems.append(f"cases/frame must lie in 0..{n_frames - 1}")
    for name in ("cases/seen", "cases/asked") if "cases/asked" in a else ():
        start, row = np.asarray(a[f"{name}_start"]), np.asarray(a[name])
        if len(start) != len(a["cases/frame"]) + 1 or start[0] != 0 or start[-1] != len(row) or (np.diff(start) < 0).any():
            problems.append(f"{name}_start must rise from 0 to {len(row)} in {len(a['cases/frame']) + 1} steps")
        elif len(row) and (row.min() < 0 or row.max() >= n_obs):
            problems.append(f"{name} must lie in 0..{n_obs - 1}, found {row.min()}..{row.max()}")
    if min(info.std, default=1) <= 0:
        problems.append(f"info.std must be positive, found {info.std}: is the training split constant?")
    return problems


def _pieces(array: Any) -> Iterator[tuple[int, np.ndarray]]:
    """First row and rows of an array that may be lazy, piece by piece."""
    for start in range(0, array.shape[0], 1 << 22):
        yield start, np.asarray(array[start : start + (1 << 22)])


def _not_finite(array: Any) -> np.ndarray:
    """Rows with a value that is not finite."""
    return np.concatenate(
        [np.zeros(0, np.int64), *(start + np.flatnonzero(~np.isfinite(rows).all(axis=1)) for start, rows in _pieces(array))]
    )


def _range(array: Any) -> tuple[int, int]:
    ends = [(int(rows.min()), int(rows.max())) for _, rows in _pieces(array)]
    return min((low for low, _ in ends), default=0), max((high for _, high in ends), default=0)
