"""The meshes of MeshGraphNets: tiny TFRecord files, written here byte by byte, read back as points without a grid."""

from __future__ import annotations

import json
import struct
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
import yaml

from models import registry
from pipeline import baselines, check_field, fetch, fields, ingest, params, raw, sources, subsample, train, validate
from pipeline import sensors as sensor_data
from pipeline.batches import TrainingBatches, Windows
from pipeline.cases import cases
from pipeline.sources import meshes
from tests.imports import ROOT

T = 5
SIZES = (30, 24, 27)
RNG = np.random.default_rng(0)
PLACES = [RNG.uniform(size=(1, size, 2)).astype("<f4") for size in SIZES]
SPEEDS = [RNG.normal(size=(T, size, 2)).astype("<f4") for size in SIZES]
PRESSURES = [RNG.normal(size=(T, size, 1)).astype("<f4") for size in SIZES]
META = {
    "trajectory_length": T,
    "features": {
        "cells": {"type": "static", "shape": [1, -1, 3], "dtype": "int32"},
        "mesh_pos": {"type": "static", "shape": [1, -1, 2], "dtype": "float32"},
        "velocity": {"type": "dynamic", "shape": [T, -1, 2], "dtype": "float32"},
        "pressure": {"type": "dynamic", "shape": [T, -1, 1], "dtype": "float32"},
    },
}


def number(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out, value = out + bytes([value & 0x7F | 0x80]), value >> 7
    return out + bytes([value])


def part(index: int, content: bytes) -> bytes:
    """A field of a protobuf message that has a length."""
    return number(index << 3 | 2) + number(len(content)) + content


def record(features: dict[str, bytes]) -> bytes:
    entries = [part(1, part(1, name.encode()) + part(2, part(1, part(1, content)))) for name, content in features.items()]
    payload = part(1, b"".join(entries))

    def checksum(content: bytes) -> bytes:
        crc = google_crc32c.value(content)
        return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    length = struct.pack("<Q", len(payload))
    return length + checksum(length) + payload + checksum(payload)


def flow(place: np.ndarray, speed: np.ndarray, pressure: np.ndarray) -> bytes:
    return record({"cells": b"\0" * 12, "mesh_pos": place.tobytes(), "velocity": speed.tobytes(), "pressure": pressure.tobytes()})


def drop(folder: Path, **changes: Any) -> Path:
    folder.mkdir()
    (folder / "meta.json").write_text(json.dumps({**META, **changes}))
    records = [flow(*arrays) for arrays in zip(PLACES, SPEEDS, PRESSURES, strict=True)]
    (folder / "train.tfrecord").write_bytes(b"".join(records[:2]))
    (folder / "valid.tfrecord").write_bytes(records[2])
    return folder


def section(**changes: Any) -> Any:
    whole = {
        "source": "meshes",
        "parts": [
            {"role": "train", "file": "train.tfrecord"},
            {"role": "test", "file": "valid.tfrecord"},
        ],
        "variables": {"velocity_x": "velocity:0", "velocity_y": "velocity:1", "pressure": "pressure"},
        "step": 0.01, "title": "Test", "license": "CC-BY-4.0", **changes,
    }  # fmt: skip
    return params.validated(whole, ingest.params_model("mesh"), "ingest.mesh")


def ingested(folder: Path, **changes: Any) -> Path:
    place = drop(folder / "raw")
    entries = {
        path.name: raw.RawFile("https://example.org", raw.sha256(path), path.stat().st_size, "2026-01-01") for path in place.iterdir()
    }
    (place / raw.MANIFEST).write_text(raw.Manifest("meshes", "x", "x", sources.load("meshes").DROP.page, entries).text())
    ingest.run(section(**changes), "mesh", raw=place, out=folder / "out")
    return folder / "out"


def test_meshes_become_points_and_smaller_ones_have_fewer(tmp_path: Path) -> None:
    field = fields.open_field(ingested(tmp_path, every=2))
    assert field["pressure"].dims == ("trajectory", "time", "point")
    assert field["pressure"].shape == (3, 3, 30)
    np.testing.assert_allclose(field["time"], [0, 0.02, 0.04])
    assert field["role"].values.tolist() == ["train", "train", "test"]
    for index, size in enumerate(SIZES):
        one = field.isel(trajectory=index)
        np.testing.assert_array_equal(one["velocity_y"][:, :size], SPEEDS[index][::2, :, 1])
        np.testing.assert_array_equal(one["pressure"][:, :size], PRESSURES[index][::2, :, 0])
        np.testing.assert_array_equal(one["y"][:size], PLACES[index][0, :, 1])
        assert np.isnan(one["x"][size:]).all()
        assert np.isnan(one["pressure"][:, size:]).all()


def test_meshes_pass_the_line_as_tasks(tmp_path: Path) -> None:
    parts = [("train", "train.tfrecord", [0, 1]), ("validation", "train.tfrecord", [1, 2]), ("test", "valid.tfrecord", [0, 1])]
    out = ingested(tmp_path, parts=[{"role": role, "file": file, "trajectories": numbers} for role, file, numbers in parts])
    gate = check_field.FieldGate(kind="field", jump=3, rules={name: {"severity": "block"} for name in check_field.RULES})
    validate.run(gate, "mesh", ingested=out, out=tmp_path / "checked")
    recipe = subsample.Subsample(
        source="mesh", variables=("velocity_x", "velocity_y", "pressure"), tasks={"context": [5, 10]}, cases={"horizon": 2}
    )
    subsample.run(recipe, "mesh", ingested=out, checked=tmp_path / "checked", out=tmp_path / "sensors.zarr")
    dataset = sensor_data.read(tmp_path / "sensors.zarr")
    assert np.diff(dataset["frame/obs_start"]).tolist() == [30] * T + [24] * T + [27] * T
    batch = TrainingBatches(dataset, Windows(max_lead=2, batch=4, query_frames=2, context_points=(5, 10)), seed=0)[0]
    assert batch.context.mask.sum(-1).max() < 10
    assert batch.query.mask.any(-1).all()
    case = next(cases(dataset, "test", 1, (0, 2), 8))
    assert case.batch.query.mask[0, 1].sum() >= 17  # what is not seen in that frame, of 27


def test_the_sections_of_params_lead_from_a_mirror_to_training(tmp_path: Path) -> None:
    """Files as DeepMind lays them out, through fetch and every stage up to a step of each phase of each model."""
    frames, mirror, rng = 150, tmp_path / "mirror" / "meshes", np.random.default_rng(1)
    mirror.mkdir(parents=True)
    features = {
        name: {**one, "shape": [frames if one["type"] == "dynamic" else 1, *one["shape"][1:]]} for name, one in META["features"].items()
    }
    (mirror / "meta.json").write_text(json.dumps({"trajectory_length": frames, "features": features}))
    for name, sizes in {"train": (90, 70), "valid": (80,), "test": (60,)}.items():
        arrays = [((1, n, 2), (frames, n, 2), (frames, n, 1)) for n in sizes]
        (mirror / f"{name}.tfrecord").write_bytes(b"".join(flow(*(rng.normal(size=s).astype("<f4") for s in shapes)) for shapes in arrays))
    key, paths = "cylinder_mesh", {name: tmp_path / name for name in ("raw", "ingested", "checked", "sensors", "baselines")}
    whole = yaml.safe_load((ROOT / "params.yaml").read_text())

    def chosen(stage: Any, *keys: str) -> Any:
        raw = whole[stage.__name__.rpartition(".")[2]]
        for name in keys:
            raw = raw[name]
        return params.validated({k: v for k, v in raw.items() if k != "presets"}, stage.params_model(*keys), ".".join(keys))

    settings = params.validated(whole["fetch"], fetch.Params, "fetch")
    fetch.fetch("meshes", paths["raw"], settings, mirror=str(tmp_path / "mirror"), now=datetime(2026, 1, 1, tzinfo=UTC))
    ingest.run(chosen(ingest, key), key, raw=paths["raw"], out=paths["ingested"])
    validate.run(chosen(validate, key), key, ingested=paths["ingested"], out=paths["checked"])
    subsample.run(chosen(subsample, key), key, ingested=paths["ingested"], checked=paths["checked"], out=paths["sensors"])
    dataset = sensor_data.read(paths["sensors"])
    assert dataset.n_frames == 4 * 15
    roles = np.split(np.asarray(dataset["obs/role"]), np.asarray(dataset["frame/obs_start"])[1:-1])
    assert [int((role != sensor_data.ASKED).sum()) for role in roles[30:]] == [20] * 30  # sensors of validation and test
    fitted = chosen(baselines, key)
    baselines.run(fitted.model_copy(update={"steps": 2}), key, sensors=paths["sensors"], out=paths["baselines"])
    for model in whole["train"][key]:
        section = chosen(train, key, model)
        network = registry.load(model)(section.model, dataset.info)
        for name, phase in section.phases:
            network.begin(name)
            batch = TrainingBatches(dataset, phase.windows.model_copy(update={"batch": 2}), seed=0)[0]
            assert batch.context.mask.sum(-1).eq(20).all()
            loss = network.terms(batch)["loss"]
            loss.backward()
            assert torch.isfinite(loss)
        asked = next(cases(dataset, "test", 1, (0, 10), 8)).batch
        assert torch.isfinite(network.eval().predict(asked.context, asked.query).mean[asked.query.mask]).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"variables": {"pressure": "density"}}, "names no density; it has cells, mesh_pos, velocity, pressure"),
        ({"variables": {"pressure": "velocity"}}, "velocity: say which of the 2 components, such as velocity:0"),
        ({"parts": [{"role": "train", "file": "test.tfrecord"}]}, "no file test.tfrecord in .*: it holds "),
        ({"parts": [{"role": "train", "file": "train.tfrecord", "trajectories": [7, 9]}]}, "the parts hold no trajectory"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ingested(tmp_path, **change)


def test_a_broken_file_is_not_read(tmp_path: Path) -> None:
    path = drop(tmp_path / "raw") / "train.tfrecord"
    whole = path.read_bytes()
    assert [sorted(meshes.example(payload)) for payload in meshes.payloads(path)] == [["cells", "mesh_pos", "pressure", "velocity"]] * 2
    path.write_bytes(whole[:-3])
    with pytest.raises(ValueError, match="record 1 is cut off"):
        list(meshes.payloads(path))
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
    with pytest.raises(ValueError, match="record 0 does not have its checksum"):
        list(meshes.payloads(path))
