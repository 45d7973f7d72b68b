"""Simulations that others publish, as fields. A file is told by what is in it:

    The Well (github.com/PolymathicAI/the_well)   HDF5: groups dimensions, boundary_conditions, t0_fields, t1_fields, t2_fields
    PDEBench (doi 10.18419/darus-2986)            HDF5: arrays (sample, time, x, y?, z?) beside `x-coordinate`, ...; or one group a
                                                  sample with `data` (time, x, y?, variable) and `grid`
    FNO (arXiv 2010.08895)                        MATLAB 5 or 7.3: u (sample, x, y, time), maybe t; on a torus
    DINo (doi 10.6084/m9.figshare.21298179)       HDF5 of Dedalus, one trajectory a file: tasks/NAME (time, phi, theta) with their
                                                  coordinates as dimension scales; on a sphere, in degrees as longitude and latitude

All of them have x before y; here y comes first. `variables` maps names of the lexicon to names in the files; a vector, tensor or grouped
array needs the number of the component, as in `velocity:0`. `factors` multiply what is read: DINo and AROMA use 3000 height and 2
vorticity. Files are read some trajectories at a time, but for MATLAB 5, which is read whole. On a torus positions are shares of the
period. Nothing is said here of the licences: `license` states what the publisher does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import scipy.io
import xarray as xr
from pydantic import Field

from pipeline import fields, lexicon
from pipeline.params import Section
from pipeline.raw import MANIFEST, Drop

DROP = Drop(
    licence="LicenseRef-Publisher",
    attribution="The publishers of the simulations",
    page="https://github.com/PolymathicAI/the_well",
    mirror=("*.hdf5", "*.h5", "*.mat"),
    official=(),  # files of gigabytes to terabytes: whoever wants one puts it into the raw drop
)


class Part(Section):
    """Trajectories of some files, and what they are for."""

    role: Literal["train", "validation", "test"]
    file: str  # name below data/raw/simulations, * allowed
    trajectories: tuple[int | None, int | None] = (None, None)  # [first, last) of each file, counted from the end where negative


class Params(Section):
    source: Literal["simulations"]
    parts: tuple[Part, ...] = Field(min_length=1)
    variables: dict[str, str] = Field(min_length=1)  # name in the lexicon: name in the files
    frames: tuple[int | None, int | None] = (None, None)  # [first, last)
    every: int = Field(default=1, ge=1)  # frames
    every_point: int = Field(default=1, ge=1)  # grid points of each axis
    factors: dict[str, float] = Field(default_factory=dict)  # name in the lexicon: what its values are multiplied by, 1 where not given
    geometry: Literal["plane", "torus"] | None = None  # None: as the file says
    title: str
    license: str  # SPDX identifier


@dataclass(frozen=True)
class _Variable:
    """An array in a file, or one array a trajectory; `labels` name its axes, and an axis that is absent is constant."""

    parts: Sequence[Any]
    labels: tuple[str, ...]
    component: tuple[int, ...] = ()  # of axes after the labelled ones

    def read(self, first: int, last: int, frames: slice, sizes: Mapping[str, int]) -> np.ndarray:
        """Values of trajectories [first, last), their axes those of `sizes`, in its order."""
        if len(self.parts) == 1:
            values = self._read(self.parts[0], slice(first, last), frames, tuple(sizes))
        else:
            values = np.concatenate([self._read(part, slice(None), frames, tuple(sizes)) for part in self.parts[first:last]])
        return np.broadcast_to(values, tuple(sizes.values()))

    def _read(self, array: Any, trajectories: slice, frames: slice, order: tuple[str, ...]) -> np.ndarray:
        chosen = {"trajectory": trajectories, "time": frames}
        values = array[(*(chosen.get(label, slice(None)) for label in self.labels), *self.component)]
        values = values.transpose([self.labels.index(label) for label in order if label in self.labels])
        return np.expand_dims(values, [axis for axis, label in enumerate(order) if label not in self.labels])


@dataclass(frozen=True)
class _File:
    """What one file gives, still unread."""

    name: str
    trajectories: int
    time: np.ndarray
    axes: Mapping[str, np.ndarray]  # x, and maybe y and z
    geometry: str | None
    find: Callable[[str], _Variable]  # raises ValueError for a name it does not have


def field(params: Params, raw: Path, out: Path) -> dict[str, Any]:
    """Write `out`/field.zarr, trajectories in the order of `parts`, and return counts.

    Raises ValueError with every mismatch: absent files, unknown layouts and names, files whose grid or times differ.
    """
    for name in params.variables:
        lexicon.lookup(name)
    problems: list[str] = []
    with ExitStack() as stack:
        chosen = []
        for part in params.parts:
            paths = sorted(path for path in raw.glob(part.file) if path.is_file() and path.name != MANIFEST)
            if not paths:
                problems.append(f"no file {part.file} in {raw}: it holds {', '.join(sorted(p.name for p in raw.glob('*'))) or 'nothing'}")
            for path in paths:
                try:
                    file = _open(path, stack)
                    found = {name: file.find(theirs) for name, theirs in params.variables.items()}
                    chosen.append((part, file, found, range(file.trajectories)[slice(*part.trajectories)]))
                except (ValueError, OSError, KeyError) as error:
                    problems.append(f"{path.name}: {error}")
        problems += _unlike([file for _, file, _, _ in chosen])
        for part, file, _, numbers in chosen:
            if not numbers:
                problems.append(f"{file.name}: trajectories {list(part.trajectories)} are none, it has {file.trajectories}")
        if problems:
            raise ValueError("simulation files cannot be used:\n  " + "\n  ".join(problems))
        return _write(params, chosen, out / "field.zarr")


def _write(params: Params, chosen: list[tuple[Part, _File, dict[str, _Variable], range]], path: Path) -> dict[str, Any]:
    first = chosen[0][1]
    geometry = params.geometry or first.geometry
    if geometry is None:
        raise ValueError(f"{first.name} does not say whether its domain is periodic: give `geometry`, plane or torus")
    frames = slice(*params.frames, params.every)
    time = first.time[frames]
    axes = {name: _shares(axis) if geometry == "torus" else axis for name, axis in first.axes.items()}
    if not len(time):
        raise ValueError(f"frames {list(params.frames)} of {first.name} are none: it has {len(first.time)}")
    role = [part.role for part, _, _, numbers in chosen for _ in numbers]
    coordinates = xr.Dataset(
        coords={
            "trajectory": np.arange(len(role)),
            "time": time,
            **{name: axis[:: params.every_point] for name, axis in axes.items()},
            "role": ("trajectory", np.array(role, dtype=object)),
        },
        attrs={
            "title": params.title,
            "license": params.license,
            "source": f"published simulations: {', '.join(dict.fromkeys(file.name for _, file, _, _ in chosen))}",
            "history": f"every frame with step {params.every} in {list(params.frames)}; axes put in the order y, x",
            "geometry": geometry,
        },
    )
    fields.create(path, coordinates, {name: {} for name in params.variables})
    length, start = fields.block_length(coordinates.sizes), 0
    place = {name: len(first.axes[name]) for name in reversed(list(first.axes))}
    missing = dict.fromkeys(params.variables, 0)
    for _, _, found, numbers in chosen:
        for begin in range(numbers.start, numbers.stop, length):
            end = min(begin + length, numbers.stop)
            for name, variable in found.items():
                sizes = {"trajectory": end - begin, "time": len(time), **place}
                whole = variable.read(begin, end, frames, sizes)
                thinned = whole[(slice(None), slice(None), *(slice(None, None, params.every_point) for _ in place))]
                values = np.asarray(thinned * params.factors.get(name, 1), np.float32)
                missing[name] += int((~np.isfinite(values)).sum())
                fields.write_block(path, name, start, np.where(np.isfinite(values), values, np.nan))
            start += end - begin
    return {
        "files": [{"name": file.name, "role": part.role, "first": n.start, "trajectories": len(n)} for part, file, _, n in chosen],
        "variables": dict(params.variables),
        "trajectories": {name: role.count(name) for name in dict.fromkeys(role)},
        "frames": len(time),
        "missing": missing,
    }


def _unlike(files: Sequence[_File]) -> list[str]:
    """In what files differ from the first."""
    problems = []
    for file in files[1:]:
        first = files[0]
        for name, one, other in (("time", first.time, file.time), *((n, first.axes.get(n), file.axes.get(n)) for n in ("x", "y", "z"))):
            if (one is None) != (other is None) or (one is not None and other is not None and not _equal(one, other)):
                problems.append(f"{file.name} has another {name} than {first.name}: {_span(other)}, expected {_span(one)}")
        if file.geometry != first.geometry:
            problems.append(f"{file.name} has the geometry {file.geometry}, {first.name} has {first.geometry}")
    return problems


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and bool(np.allclose(one, other, rtol=1e-5, atol=1e-6 * float(np.ptp(one) or 1)))


def _span(axis: np.ndarray | None) -> str:
    return "none" if axis is None else f"{len(axis)} from {axis[0]:g} to {axis[-1]:g}"


def _shares(axis: np.ndarray) -> np.ndarray:
    """Positions on a regular periodic axis as shares of its period, the first point kept at its distance from the cell's edge or at 0."""
    step = (axis[-1] - axis[0]) / (len(axis) - 1)
    if not np.allclose(np.diff(axis), step, rtol=1e-3):
        raise ValueError(f"a torus needs a regular axis, found steps from {np.diff(axis).min():g} to {np.diff(axis).max():g}")
    offset = 0.5 if np.isclose(axis[0] % step, step / 2, rtol=1e-2) else 0.0
    return (np.arange(len(axis)) + offset) / len(axis)


# Layouts ------------------------------------------------------------------------------------------------------------------------------


def _open(path: Path, stack: ExitStack) -> _File:
    with path.open("rb") as handle:
        magic = handle.read(10)
    if magic == b"MATLAB 5.0":
        content = scipy.io.loadmat(path)
        return _matlab(path.name, {name: array for name, array in content.items() if not name.startswith("__")}, reverse=False)
    if magic != b"MATLAB 7.3" and magic[:4] != b"\x89HDF":
        raise ValueError(f"it starts with {magic!r}, which is neither HDF5 nor MATLAB 5 or 7.3")
    file = stack.enter_context(h5py.File(path, "r"))
    if magic == b"MATLAB 7.3":
        return _matlab(path.name, {name: array for name, array in file.items() if isinstance(array, h5py.Dataset)}, reverse=True)
    if "tasks" in file:
        return _sphere(path.name, file)
    if "dimensions" in file and any(group in file for group in _WELL):
        return _well(path.name, file)
    if any(name in file for name in _COORDINATES.values()):
        return _single_arrays(path.name, file)
    if len(file) and all(isinstance(group, h5py.Group) and "data" in group and "grid" in group for group in file.values()):
        return _grouped(path.name, file)
    raise ValueError(f"its layout is none of The Well, PDEBench, FNO, DINo: it holds {', '.join(list(file)[:8])}")


_WELL = {"t0_fields": 0, "t1_fields": 1, "t2_fields": 2}


def _well(name: str, file: h5py.File) -> _File:
    if _text(file.attrs["grid_type"]) != "cartesian":
        raise ValueError(f"its grid is {_text(file.attrs['grid_type'])}, only cartesian ones are read")
    dimensions = file["dimensions"]
    dims = [_text(dim) for dim in np.atleast_1d(dimensions.attrs["spatial_dims"])]
    strange = sorted(set(dims) - {"x", "y", "z"})
    if strange:
        raise ValueError(f"its axes are {', '.join(dims)}, expected some of x, y, z")
    types = [_text(group.attrs["bc_type"]).lower() for group in file.get("boundary_conditions", {}).values()]
    periodic = bool(types) and all(kind == "periodic" for kind in types)

    def fixed(label: str) -> np.ndarray:
        values = dimensions[label][...]
        if values.ndim > 1:
            values = values.reshape(-1, values.shape[-1])
            if (values != values[0]).any():
                raise ValueError(f"{label} differs between trajectories, which a field cannot say")
            values = values[0]
        return np.asarray(values, np.float64)

    def find(wanted: str) -> _Variable:
        base, _, component = wanted.partition(":")
        for group, rank in _WELL.items():
            if group not in file or base not in file[group]:
                continue
            array = file[group][base]
            varying = [dim for dim, varies in zip(dims, np.atleast_1d(array.attrs["dim_varying"]), strict=True) if varies]
            shared = (("trajectory", "sample_varying"), ("time", "time_varying"))
            labels = (*(label for label, attribute in shared if bool(array.attrs[attribute])), *varying)
            return _Variable([array], labels, _component(wanted, component, array.shape[len(labels) :], rank))
        held = [f"{n}" for group in _WELL if group in file for n in file[group]]
        raise ValueError(f"it has no field {base}; it has {', '.join(held) or 'none'}")

    axes = {str(label): fixed(label) for label in ("x", "y", "z") if label in dims}
    return _File(name, int(file.attrs["n_trajectories"]), fixed("time"), axes, "torus" if periodic else "plane", find)


def _sphere(name: str, file: h5py.File) -> _File:
    tasks = {key: array for key, array in file["tasks"].items() if isinstance(array, h5py.Dataset) and array.ndim == 3}
    if not tasks:
        raise ValueError(f"tasks has no array (time, phi, theta): it holds {', '.join(file['tasks']) or 'none'}")
    array = next(iter(tasks.values()))

    def scale(axis: int) -> np.ndarray:
        if not len(array.dims[axis]):
            raise ValueError(f"{array.name} has no dimension scale for axis {axis}: the file must be as Dedalus writes it")
        return np.asarray(array.dims[axis][0][...], np.float64).ravel()

    longitude, latitude = np.degrees(scale(1)), 90 - np.degrees(scale(2))
    turned = latitude[0] > latitude[-1]

    def find(wanted: str) -> _Variable:
        if wanted not in tasks:
            raise ValueError(f"it has no task {wanted}; it has {', '.join(tasks)}")
        return _Variable([_Turned(tasks[wanted]) if turned else tasks[wanted]], ("time", "x", "y"))

    return _File(name, 1, scale(0), {"x": longitude, "y": latitude[::-1] if turned else latitude}, "sphere", find)


@dataclass(frozen=True)
class _Turned:
    """An array whose last axis, colatitude, is read backwards."""

    array: h5py.Dataset

    def __getitem__(self, key: tuple[Any, ...]) -> np.ndarray:
        return self.array[key][..., ::-1]


def _component(wanted: str, component: str, shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    """Index into the last axes of an array; a tensor of D x D components may be stored as one axis of D^2."""
    count = int(np.prod(shape))
    if len(shape) not in ((rank,) if rank < 2 else (1, 2)):
        raise ValueError(f"{wanted} has {len(shape)} axes beyond those that vary, expected {rank} for a field of rank {rank}")
    if not shape:
        if component:
            raise ValueError(f"{wanted}: a scalar has no component {component}")
        return ()
    if not component.isdigit() or int(component) >= count:
        raise ValueError(f"{wanted}: say which of the {count} components, such as {wanted.partition(':')[0]}:0")
    return tuple(int(i) for i in np.unravel_index(int(component), shape))


_COORDINATES = {"x": "x-coordinate", "y": "y-coordinate", "z": "z-coordinate"}


def _single_arrays(name: str, file: h5py.File) -> _File:
    axes = {label: np.asarray(file[theirs][...], np.float64) for label, theirs in _COORDINATES.items() if theirs in file}
    arrays = {key: array for key, array in file.items() if isinstance(array, h5py.Dataset) and array.ndim > 1}
    labels = ("trajectory", "time", *axes)
    place = tuple(len(axis) for axis in axes.values())
    whole = {key: array for key, array in arrays.items() if array.ndim == len(labels) and array.shape[2:] == place}
    if not whole:
        shapes = ", ".join(f"{key} {array.shape}" for key, array in arrays.items())
        raise ValueError(f"no array is (sample, time, {', '.join(axes)}) with {place} points: it holds {shapes or 'none'}")
    shape = next(iter(whole.values())).shape
    time = np.asarray(file["t-coordinate"][...], np.float64) if "t-coordinate" in file else np.zeros(1)

    def find(wanted: str) -> _Variable:
        if wanted in whole:
            return _Variable([whole[wanted]], labels)
        if wanted in arrays and arrays[wanted].shape == (shape[0], *place):  # a coefficient, such as nu of Darcy flow
            return _Variable([arrays[wanted]], ("trajectory", *axes))
        raise ValueError(f"it has no array {wanted} over all axes; it has {', '.join(whole)}")

    return _File(name, shape[0], _fitted(time, shape[1]), axes, None, find)


def _grouped(name: str, file: h5py.File) -> _File:
    groups = [file[key] for key in sorted(file)]
    grid = groups[0]["grid"]
    axes = {label: np.asarray(grid[label][...], np.float64) for label in ("x", "y", "z") if label in grid}
    labels = ("time", *axes)
    shape = groups[0]["data"].shape
    place = tuple(len(axis) for axis in axes.values())
    if len(shape) != len(labels) + 1 or shape[1:-1] != place:
        raise ValueError(f"{groups[0].name}/data has shape {shape}, expected (time, {', '.join(axes)}, variable) with {place} points")
    other = [group.name for group in groups if group["data"].shape != shape]
    if other:
        raise ValueError(f"{', '.join(other[:5])}: data has another shape than {groups[0].name}, {shape}")

    def find(wanted: str) -> _Variable:
        base, _, component = wanted.partition(":")
        if base != "data":
            raise ValueError(f"it has no array {base}; it has data:0 to data:{shape[-1] - 1}")
        return _Variable([group["data"] for group in groups], labels, _component(wanted, component, shape[-1:], 1))

    return _File(name, len(groups), _fitted(np.asarray(grid["t"][...], np.float64), shape[0]), axes, None, find)


def _fitted(time: np.ndarray, frames: int) -> np.ndarray:
    """PDEBench states one time more than there are frames in some files: the end of the last step."""
    if len(time) not in (frames, frames + 1):
        raise ValueError(f"there are {len(time)} times for {frames} frames")
    return time[:frames]


def _matlab(name: str, arrays: Mapping[str, Any], reverse: bool) -> _File:
    """MATLAB 7.3 files hold the axes in reverse."""
    labels = ("trajectory", "x", "y", "time")
    whole = {key: array for key, array in arrays.items() if array.ndim == 4}
    if not whole:
        shapes = ", ".join(f"{key} {array.shape}" for key, array in arrays.items())
        raise ValueError(f"no array is (sample, x, y, time): it holds {shapes or 'none'}")
    shape = next(iter(whole.values())).shape[:: -1 if reverse else 1]
    time = np.asarray(arrays["t"][...], np.float64).ravel() if "t" in arrays else np.arange(shape[3], dtype=np.float64)
    if len(time) != shape[3]:
        raise ValueError(f"there are {len(time)} times for {shape[3]} frames")

    def find(wanted: str) -> _Variable:
        if wanted not in whole:
            raise ValueError(f"it has no array {wanted} of four axes; it has {', '.join(whole)}")
        return _Variable([whole[wanted]], labels[:: -1 if reverse else 1])

    axes = {label: np.arange(size) / size for label, size in zip(("x", "y"), shape[1:3], strict=True)}
    return _File(name, shape[0], time, axes, "torus", find)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
