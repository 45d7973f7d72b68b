"""Simulations that others publish: tiny files in their layouts, read back and compared with what was written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import scipy.io
import xarray as xr

from pipeline import fields, ingest, params, raw, sources

B, T, X, Y = 5, 4, 6, 8
RNG = np.random.default_rng(0)
VALUES = RNG.normal(size=(B, T, X, Y)).astype("f4")  # in the order of The Well and PDEBench
TERMS = {"title": "Test", "license": "CC-BY-4.0"}


def well(path: Path, *, periodic: bool = True, trajectories: int = B, **changes: Any) -> None:
    """The Well's layout: a scalar, a constant scalar that varies along x alone, a vector, and tensors stored in both ways."""
    with h5py.File(path, "w") as file:
        file.attrs.update(
            {"dataset_name": "tiny", "grid_type": "cartesian", "n_spatial_dims": 2, "n_trajectories": trajectories, **changes}
        )
        file.attrs["simulation_parameters"] = ["nu"]
        dims = file.create_group("dimensions")
        dims.attrs["spatial_dims"] = ["x", "y"]
        for name, axis in {"time": np.arange(T) * 0.5, "x": np.arange(X) / 3, "y": np.arange(Y) / 4}.items():
            dims.create_dataset(name, data=axis.astype("f4")).attrs["sample_varying"] = False
        edges = file.create_group("boundary_conditions")
        for name in ("x", "y"):
            edge = edges.create_group(f"{name}_edge")
            edge.attrs.update({"bc_type": "PERIODIC" if periodic else "wall", "associated_dims": [name], "sample_varying": False})

        def put(
            group: str, name: str, data: np.ndarray, dim: tuple[bool, bool] = (True, True), sample: bool = True, time: bool = True
        ) -> None:
            array = file.require_group(group).create_dataset(name, data=data)
            array.attrs.update({"dim_varying": list(dim), "sample_varying": sample, "time_varying": np.bool_(time)})

        some = VALUES[:trajectories]
        put("t0_fields", "density", some)
        put("t0_fields", "profile", some[0, 0, :, 0], dim=(True, False), sample=False, time=False)
        put("t0_fields", "depth", some[:, 0], time=False)
        put("t1_fields", "velocity", np.stack([some, -some], axis=-1))
        put("t2_fields", "stress", np.stack([some, 2 * some, 3 * some, 4 * some], axis=-1).reshape(*some.shape, 2, 2))
        put("t2_fields", "strain", np.stack([some, 2 * some, 3 * some, 4 * some], axis=-1))


def single_arrays(path: Path, times: int = T, leading: bool = False) -> None:
    """PDEBench's compressible flow: one array a variable, and an extra time at the end."""
    with h5py.File(path, "w") as file:
        for name, data in {"density": VALUES, "Vx": 2 * VALUES}.items():
            file[name] = data[None] if leading else data
        file["x-coordinate"], file["y-coordinate"] = (np.arange(X) + 0.5) / X, (np.arange(Y) + 0.5) / Y
        file["t-coordinate"] = np.arange(times) * 0.1


def groups(path: Path, trajectories: int = B) -> None:
    """PDEBench's diffusion-reaction: one group a sample, variables last."""
    with h5py.File(path, "w") as file:
        for number in range(trajectories):
            group = file.create_group(f"{number:04d}")
            group["data"] = np.stack([VALUES[number], -VALUES[number]], axis=-1)
            group["grid/x"], group["grid/y"] = np.linspace(-1, 1, X), np.linspace(-1, 1, Y)
            group["grid/t"] = np.arange(T) * 1.0


def matlab5(path: Path) -> None:
    scipy.io.savemat(path, {"u": VALUES.transpose(0, 2, 3, 1).astype("f8"), "a": VALUES[:, 0], "t": np.arange(1.0, T + 1)})


def matlab73(path: Path) -> None:
    """HDF5 behind a block of 512 bytes that says MATLAB 7.3, all axes reversed."""
    with h5py.File(path, "w", userblock_size=512) as file:
        file["u"] = VALUES.transpose(0, 2, 3, 1).transpose()
        file["a"] = VALUES[:, 0].transpose()
        file["t"] = np.arange(1.0, T + 1)[:, None]
    content = path.read_bytes()
    path.write_bytes(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(512) + content[512:])


def dedalus(path: Path) -> None:
    """DINo's shallow water: one trajectory of Dedalus, with its coordinates as dimension scales, colatitude falling."""
    with h5py.File(path, "w") as file:
        axes = {"sim_time": np.arange(T) * 1.0, "phi": 2 * np.pi * np.arange(X) / X, "theta": np.linspace(3, 0.1, Y)}
        for name, axis in axes.items():
            file[f"scales/{name}"] = axis
            file[f"scales/{name}"].make_scale(name)
        for name, values in {"height": VALUES[0], "vorticity": -VALUES[0]}.items():
            file[f"tasks/{name}"] = values
            for number, axis in enumerate(axes):
                file[f"tasks/{name}"].dims[number].attach_scale(file[f"scales/{axis}"])


def ingested(folder: Path, files: dict[str, Callable[[Path], None]], **settings: Any) -> xr.Dataset:
    drop = folder / "raw"
    drop.mkdir()
    for name, write in files.items():
        write(drop / name)
    adapter = sources.load("simulations")
    entries = {
        name: raw.RawFile("https://example.org", raw.sha256(drop / name), (drop / name).stat().st_size, "2026-01-01") for name in files
    }
    (drop / raw.MANIFEST).write_text(raw.Manifest("simulations", "x", "x", adapter.DROP.page, entries).text())
    whole = {"source": "simulations", "parts": [{"role": "train", "file": next(iter(files))}], **TERMS, **settings}
    section = params.validated(whole, ingest.params_model("sim"), "ingest.sim")
    ingest.run(section, "sim", raw=drop, out=folder / "out")
    return fields.open_field(folder / "out")


Y_FIRST = VALUES.transpose(0, 1, 3, 2)


@pytest.mark.parametrize(
    ("write", "theirs", "more", "expected"),
    [
        (well, "density", {}, Y_FIRST),
        (well, "velocity:1", {}, -Y_FIRST),
        (well, "stress:2", {}, 3 * Y_FIRST),
        (well, "strain:2", {}, 3 * Y_FIRST),
        (well, "depth", {}, np.broadcast_to(Y_FIRST[:, :1], Y_FIRST.shape)),
        (well, "profile", {}, np.broadcast_to(VALUES[0, 0, :, 0], Y_FIRST.shape)),
        (single_arrays, "Vx", {"geometry": "torus"}, 2 * Y_FIRST),
        (groups, "data:1", {"geometry": "plane"}, -Y_FIRST),
        (matlab5, "u", {}, Y_FIRST),
        (matlab73, "u", {}, Y_FIRST),
    ],
)
def test_every_layout_is_read(
    tmp_path: Path, write: Callable[[Path], None], theirs: str, more: dict[str, Any], expected: np.ndarray
) -> None:
    field = ingested(tmp_path, {"file": write}, variables={"vorticity": theirs}, **more)
    np.testing.assert_array_equal(field["vorticity"], expected)
    assert field["vorticity"].dims == ("trajectory", "time", "y", "x")
    assert field.attrs["geometry"] == ("plane" if write is groups else "torus")
    assert field.attrs["license"] == "CC-BY-4.0"
    centred = 0.5 if write is single_arrays else 0
    if write is not groups:
        np.testing.assert_allclose(field["x"], (np.arange(X) + centred) / X)
        np.testing.assert_allclose(field["y"], (np.arange(Y) + centred) / Y)
    times = {well: np.arange(T) * 0.5, single_arrays: np.arange(T) * 0.1, groups: np.arange(T)}.get(write, np.arange(1, T + 1))
    np.testing.assert_allclose(field["time"], times)


def test_one_dimension_and_three(tmp_path: Path) -> None:
    cube = RNG.normal(size=(2, 3, 4, 5, 6)).astype("f4")

    def three(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file["pressure"] = cube
            for name, size in zip("xyz", (4, 5, 6), strict=True):
                file[f"{name}-coordinate"] = np.arange(size) * 1.0
            file["t-coordinate"] = np.arange(3.0)

    def one(path: Path) -> None:
        with h5py.File(path, "w") as file:
            file["tensor"], file["x-coordinate"], file["t-coordinate"] = cube[:, :, :, 0, 0], np.arange(4.0), np.arange(4.0)

    field = ingested(tmp_path, {"a": three}, variables={"signal": "pressure"}, geometry="plane")
    assert field["signal"].dims == ("trajectory", "time", "z", "y", "x")
    np.testing.assert_array_equal(field["signal"], cube.transpose(0, 1, 4, 3, 2))
    (tmp_path / "b").mkdir()
    line = ingested(tmp_path / "b", {"a": one}, variables={"signal": "tensor"}, geometry="plane")
    assert line["signal"].dims == ("trajectory", "time", "x")
    np.testing.assert_array_equal(line["signal"], cube[:, :, :, 0, 0])


def test_parts_choose_trajectories_and_frames_and_files_are_joined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size of a block, which here holds two trajectories."""
    parts = [
        {"role": "train", "file": "*.mat", "trajectories": [0, 3]},
        {"role": "test", "file": "a.mat", "trajectories": [-2, None]},
    ]
    monkeypatch.setattr(fields, "CHUNK_BYTES", 2 * 2 * X * Y * 4)
    files = {"a.mat": matlab73, "b.mat": matlab5}
    field = ingested(tmp_path, files, variables={"vorticity": "u"}, parts=parts, frames=[1, None], every=2)
    np.testing.assert_array_equal(field["vorticity"], np.concatenate([Y_FIRST[:3], Y_FIRST[:3], Y_FIRST[-2:]])[:, 1::2])
    assert field["role"].values.tolist() == ["train"] * 6 + ["test"] * 2
    assert field["time"].values.tolist() == [2, 4]


def test_only_the_trajectories_wanted_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No read of the file asks for more than one block of trajectories."""
    read, asked = h5py.Dataset.__getitem__, []

    def watched(self: h5py.Dataset, key: Any, **more: Any) -> Any:
        found = read(self, key, **more)
        if self.name == "/t0_fields/density":
            asked.append(found.shape)
        return found

    monkeypatch.setattr(h5py.Dataset, "__getitem__", watched)
    monkeypatch.setattr(fields, "CHUNK_BYTES", 2 * T * X * Y * 4)
    ingested(tmp_path, {"file": well}, variables={"vorticity": "density"})
    assert asked == [(2, T, X, Y), (2, T, X, Y), (1, T, X, Y)]


def test_a_sphere_of_dino_is_read_as_longitude_and_latitude(tmp_path: Path) -> None:
    field = ingested(
        tmp_path, {"a.h5": dedalus, "b.h5": dedalus}, variables={"height": "height", "vorticity": "vorticity"}, every_point=2,
        factors={"height": 3000, "vorticity": 2}, parts=[{"role": "train", "file": "*.h5"}],
    )  # fmt: skip
    assert field.attrs["geometry"] == "sphere"
    np.testing.assert_allclose(field["x"], [0, 120, 240])
    np.testing.assert_allclose(field["y"], (90 - np.degrees(np.linspace(3, 0.1, Y)))[::2])
    for trajectory in (0, 1):
        np.testing.assert_allclose(field["height"][trajectory], 3000 * VALUES[0].transpose(0, 2, 1)[:, ::2, ::2], rtol=1e-6)
        np.testing.assert_allclose(field["vorticity"][trajectory], -2 * VALUES[0].transpose(0, 2, 1)[:, ::2, ::2], rtol=1e-6)


def test_walls_make_a_plane_and_keep_its_coordinates(tmp_path: Path) -> None:
    field = ingested(tmp_path, {"file": lambda path: well(path, periodic=False)}, variables={"vorticity": "density"})
    assert field.attrs["geometry"] == "plane"
    np.testing.assert_allclose(field["x"], np.arange(X) / 3, rtol=1e-6)


def test_what_is_not_a_number_is_missing(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        groups(path, 2)
        with h5py.File(path, "r+") as file:
            file["0001/data"][1, 2, 3, 0] = np.inf

    field = ingested(tmp_path, {"file": broken}, variables={"vorticity": "data:0"}, geometry="plane")
    assert np.argwhere(field["vorticity"].isnull().values).tolist() == [[1, 1, 3, 2]]


@pytest.mark.parametrize(
    ("write", "settings", "message"),
    [
        (well, {"variables": {"vorticity": "heat"}}, "it has no field heat; it has density, depth, profile"),
        (well, {"variables": {"vorticity": "velocity"}}, "velocity: say which of the 2 components, such as velocity:0"),
        (well, {"variables": {"vorticity": "density:1"}}, "a scalar has no component 1"),
        (lambda path: well(path, grid_type="spherical"), {}, "its grid is spherical, only cartesian ones are read"),
        (single_arrays, {}, "does not say whether its domain is periodic"),
        (lambda path: single_arrays(path, times=T + 2), {"geometry": "plane"}, "there are 6 times for 4 frames"),
        (lambda path: single_arrays(path, leading=True), {"geometry": "plane"}, r"no array is \(sample, time, x, y\)"),
        (groups, {"variables": {"vorticity": "data:2"}, "geometry": "plane"}, "say which of the 2 components"),
        (matlab5, {"variables": {"vorticity": "a"}}, "it has no array a of four axes; it has u"),
        (lambda path: path.write_bytes(b"PK\x03\x04 and more"), {}, "neither HDF5 nor MATLAB"),
        (lambda path: path.write_bytes(b"\x89HDF\r\n\x1a\n and no more"), {}, "file: "),
        (well, {"parts": [{"role": "test", "file": "*.mat"}]}, r"no file \*\.mat in .*: it holds file, manifest\.json"),
        (well, {"parts": [{"role": "test", "file": "file", "trajectories": [7, 9]}]}, r"trajectories \[7, 9\] are none, it has 5"),
        (well, {"frames": [4, 9]}, r"frames \[4, 9\] of file are none: it has 4"),
        (well, {"variables": {"heat": "density"}}, "unknown variable 'heat'"),
    ],
)
def test_what_cannot_be_read_says_why(tmp_path: Path, write: Callable[[Path], None], settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ingested(tmp_path, {"file": write}, **{"variables": {"vorticity": "density"}, **settings})


def test_files_that_do_not_fit_together_are_refused(tmp_path: Path) -> None:
    def shifted(path: Path) -> None:
        single_arrays(path)
        with h5py.File(path, "r+") as file:
            file["x-coordinate"][...] += 1

    with pytest.raises(ValueError, match=r"b has another x than a: 6 from 1\.08333 to 1\.91667, expected 6 from 0\.08"):
        ingested(
            tmp_path, {"a": single_arrays, "b": shifted}, variables={"vorticity": "density"}, geometry="plane",
            parts=[{"role": "train", "file": "*"}],
        )  # fmt: skip
