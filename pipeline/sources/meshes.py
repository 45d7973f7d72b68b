"""MeshGraphNets (arXiv 2010.03409): flows on meshes, one trajectory a record of a TFRecord file, read without TensorFlow.

    meta.json        trajectory_length, features: name -> {type: static | dynamic, shape, dtype}
    PART.tfrecord    records: length (u64), masked CRC-32C of it (u32), payload, masked CRC-32C of that (u32); all little endian
    payload          a protobuf message Example: features (1) -> entries (1) of key (1), value (2) -> bytes_list (1) -> value (1)

Meshes differ from trajectory to trajectory. A field has one number of points, so the last points of a smaller mesh have neither place nor
value. Such a field needs `tasks` in `subsample`: which nodes are seen is drawn anew in each frame. Edges of the meshes are left out.

DeepMind says nothing of a licence of the data: `license` states what the user knows.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import google_crc32c
import numpy as np
import xarray as xr
from pydantic import Field

from pipeline import fields, lexicon
from pipeline.params import Section
from pipeline.raw import Drop

DROP = Drop(
    licence="LicenseRef-Publisher",
    attribution="Pfaff, Fortunato, Sanchez-Gonzalez, Battaglia 2021",
    page="https://github.com/google-deepmind/deepmind-research/tree/master/meshgraphnets",
    mirror=("meta.json", "*.tfrecord"),
    official=(),  # files of 10 GB: whoever wants one puts it into the raw drop
)
POSITION = "mesh_pos"


class Part(Section):
    """Trajectories of a file, and what they are for."""

    role: Literal["train", "validation", "test"]
    file: str
    trajectories: tuple[int, int | None] = (0, None)  # [first, last)


class Params(Section):
    source: Literal["meshes"]
    parts: tuple[Part, ...] = Field(min_length=1)
    variables: dict[str, str] = Field(min_length=1)  # name in the lexicon: name in the files, with the component, as in velocity:0
    every: int = Field(default=1, ge=1)  # frames
    step: float = Field(gt=0)  # between two frames of the file
    title: str
    license: str  # SPDX identifier


def field(params: Params, raw: Path, out: Path) -> dict[str, Any]:
    """Write `out`/field.zarr, trajectories in the order of `parts`, and return counts. Files are read twice, one trajectory at a time:
    first for the sizes of the meshes. Raises ValueError for what cannot be read."""
    for name in params.variables:
        lexicon.lookup(name)
    features = _features(raw / "meta.json", [POSITION, *(theirs.partition(":")[0] for theirs in params.variables.values())])
    sizes = [(part.role, len(_array(record, POSITION, features)[0])) for part, record in _records(params, raw)]
    if not sizes:
        listed = ", ".join(f"{part.file} {list(part.trajectories)}" for part in params.parts)
        raise ValueError(f"the parts hold no trajectory: {listed}; name [first, last) trajectories that their files have")
    largest = max(size for _, size in sizes)
    path = out / "field.zarr"
    for number, (_, record) in enumerate(_records(params, raw)):
        place = _array(record, POSITION, features)[0]
        values = {name: _values(record, theirs, features)[:: params.every] for name, theirs in params.variables.items()}
        frames = len(next(iter(values.values())))
        if not number:
            coordinates = _coordinates(params, [role for role, _ in sizes], frames, largest)
            fields.create(path, coordinates, {name: {} for name in values}, ("x", "y"))
        for axis, name in enumerate(("x", "y")):
            fields.write_block(path, name, number, _filled(place[:, axis], largest)[None])
        for name, array in values.items():
            fields.write_block(path, name, number, _filled(array, largest)[None])
    roles = [role for role, _ in sizes]
    return {
        "variables": dict(params.variables),
        "trajectories": {role: roles.count(role) for role in dict.fromkeys(roles)},
        "frames": frames,
        "points": {"least": min(size for _, size in sizes), "most": largest},
    }


def _coordinates(params: Params, role: list[str], frames: int, points: int) -> xr.Dataset:
    return xr.Dataset(
        coords={
            "trajectory": np.arange(len(role)),
            "time": params.step * params.every * np.arange(frames),
            "point": np.arange(points),
            "role": ("trajectory", np.array(role, dtype=object)),
        },
        attrs={
            "title": params.title,
            "license": params.license,
            "source": f"published simulations: {', '.join(dict.fromkeys(part.file for part in params.parts))}",
            "history": f"every frame with step {params.every}; edges of the meshes left out",
            "geometry": "plane",
        },
    )


def _filled(values: np.ndarray, points: int) -> np.ndarray:
    """With NaN for the points a mesh does not have."""
    out = np.full((*values.shape[:-1], points), np.nan, np.float32)
    out[..., : values.shape[-1]] = values
    return out


def _features(path: Path, needed: list[str]) -> dict[str, dict[str, Any]]:
    if not path.exists():
        raise ValueError(f"{path} does not exist: the drop of MeshGraphNets needs its meta.json")
    features = json.loads(path.read_text(encoding="utf-8"))["features"]
    absent = [name for name in dict.fromkeys(needed) if name not in features]
    if absent:
        raise ValueError(f"{path} names no {', '.join(absent)}; it has {', '.join(features)}")
    unread = [name for name in needed if features[name]["type"] not in ("static", "dynamic")]
    if unread:
        raise ValueError(f"{path}: {', '.join(unread)} is neither static nor dynamic, which is not read")
    return features


def _values(record: dict[str, bytes], wanted: str, features: dict[str, dict[str, Any]]) -> np.ndarray:
    """One component over all frames [T,P]."""
    name, _, component = wanted.partition(":")
    array = _array(record, name, features)
    if not (component or "0").isdigit() or int(component or 0) >= array.shape[-1] or (not component and array.shape[-1] > 1):
        raise ValueError(f"{wanted}: say which of the {array.shape[-1]} components, such as {name}:0")
    return array[..., int(component or 0)]


def _array(record: dict[str, bytes], name: str, features: dict[str, dict[str, Any]]) -> np.ndarray:
    """[T or 1,P,C]."""
    if name not in record:
        raise ValueError(f"a record has no {name}; it has {', '.join(record)}")
    dtype = np.dtype(features[name]["dtype"]).newbyteorder("<")
    return np.frombuffer(record[name], dtype).reshape(features[name]["shape"])


def _records(params: Params, raw: Path) -> Iterator[tuple[Part, dict[str, bytes]]]:
    """The chosen trajectories, part by part."""
    for part in params.parts:
        path = raw / part.file
        if not path.is_file():
            raise ValueError(f"no file {part.file} in {raw}: it holds {', '.join(sorted(p.name for p in raw.glob('*'))) or 'nothing'}")
        first, last = part.trajectories
        for number, payload in enumerate(payloads(path)):
            if last is not None and number >= last:
                break
            if number >= first:
                yield part, example(payload)


def payloads(path: Path) -> Iterator[bytes]:
    """The records of a TFRecord file. Raises ValueError where one is cut off or does not have its checksum."""
    with path.open("rb") as file:
        number = 0
        while head := file.read(12):
            length = struct.unpack("<Q", head[:8])[0] if len(head) == 12 else 0
            payload, tail = file.read(length), file.read(4)
            if len(head) < 12 or len(payload) < length or len(tail) < 4:
                raise ValueError(f"{path.name}: record {number} is cut off: is the file whole?")
            if struct.unpack("<I", head[8:])[0] != _masked(head[:8]) or struct.unpack("<I", tail)[0] != _masked(payload):
                raise ValueError(f"{path.name}: record {number} does not have its checksum: is it a TFRecord file, and whole?")
            yield payload
            number += 1


def _masked(content: bytes) -> int:
    """TFRecord's form of CRC-32C."""
    crc = google_crc32c.value(content)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def example(payload: bytes) -> dict[str, bytes]:
    """The byte strings of a protobuf Example by name; of a list of several, all in a row."""
    out = {}
    for number, features in _message(payload):
        for _, entry in _message(features) if number == 1 else ():
            parts = dict(_message(entry))
            values = [value for kind, content in _message(parts[2]) if kind == 1 for index, value in _message(content) if index == 1]
            out[parts[1].decode()] = b"".join(values)
    return out


def _message(content: bytes) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of the fields of a protobuf message that have a length."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        if key & 7 != 2:
            raise ValueError(f"a protobuf field has wire type {key & 7}, expected 2: is it an Example with bytes?")
        length, at = _varint(content, at)
        if at + length > len(content):
            raise ValueError("a protobuf field is longer than its message")
        yield key >> 3, content[at : at + length]
        at += length


def _varint(content: bytes, at: int) -> tuple[int, int]:
    """A number in base 128, lowest digits first, and where it ends."""
    value = shift = 0
    while True:
        if at >= len(content):
            raise ValueError("a protobuf message ends inside a number")
        value |= (content[at] & 0x7F) << shift
        at += 1
        if content[at - 1] < 0x80:
            return value, at
        shift += 7
