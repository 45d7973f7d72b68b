"""The Navier-Stokes data: the solver against known solutions, the data set against the published statistics, the stage against kill -9."""

from __future__ import annotations

import filecmp
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline import fields, navier_stokes, params, simulate, trajectories

SECTION = {
    "equation": "navier_stokes", "viscosity": 1e-3, "grid": 32, "frames": 4, "interval": 0.5, "burn_in": 0.0, "dt": 1e-2,
    "trajectories": 5, "validation_trajectories": 1, "test_trajectories": 2, "seed": 3,
}  # fmt: skip


def section(**changes: object) -> navier_stokes.Params:
    found = params.validated(SECTION | changes, simulate.params_model("ns"), "simulate.ns")
    assert isinstance(found, navier_stokes.Params)
    return found


def relative(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Relative L2 difference of fields (..., y, x)."""
    return np.sqrt(((a - b) ** 2).sum((-1, -2)) / (b**2).sum((-1, -2)))


def grid(n: int) -> tuple[np.ndarray, np.ndarray]:
    axis = np.arange(n) / n
    x, y = np.meshgrid(axis, axis)
    return x, y


def same(a: Path, b: Path) -> bool:
    """Do two folders hold the same files with the same bytes?"""
    names = [sorted(p.relative_to(root) for root in [r] for p in r.rglob("*") if p.is_file()) for r in (a, b)]
    return names[0] == names[1] and not any(filecmp.cmpfiles(a, b, map(str, names[0]), shallow=False)[1:])


# The solver ---------------------------------------------------------------------------------------------------------------------------


def test_taylor_green_vortex_decays_as_in_theory() -> None:
    """Without a force, cos(2 pi x) cos(2 pi y) keeps its shape and decays as exp(-8 pi^2 nu t)."""
    x, y = grid(32)
    start = np.cos(2 * np.pi * x) * np.cos(2 * np.pi * y)
    frames = navier_stokes.frames(start[None], 1e-2, 1e-3, 0, 1000, 3, force=0)[0]
    for t, frame in enumerate(frames):
        np.testing.assert_allclose(frame, start * np.exp(-8 * np.pi**2 * 1e-2 * t), atol=1e-6)


def test_a_vortex_is_carried_by_a_uniform_shear_in_the_right_direction() -> None:
    """w = cos(2 pi y) has u = -sin(2 pi y) / 2 pi and v = 0: a faint ripple sin(2 pi x) on it is carried with u, to first order in time."""
    x, y = grid(64)
    shear, ripple, dt = np.cos(2 * np.pi * y), 1e-6 * np.sin(2 * np.pi * x), 1e-3
    moved = navier_stokes.frames((shear + ripple)[None], 1e-12, dt, 0, 1, 2, force=0)[0, 1] - shear - ripple
    u = -np.sin(2 * np.pi * y) / (2 * np.pi)
    v_of_ripple = -1e-6 * np.cos(2 * np.pi * x) / (2 * np.pi)  # psi = ripple / (4 pi^2), v = -psi_x
    expected = -dt * (u * 2 * np.pi * 1e-6 * np.cos(2 * np.pi * x) + v_of_ripple * -2 * np.pi * np.sin(2 * np.pi * y))
    np.testing.assert_allclose(moved, expected, atol=1e-13)


def test_the_force_alone_is_the_stated_one() -> None:
    x, y = grid(16)
    pushed = navier_stokes.frames(np.zeros((1, 16, 16)), 1e-9, 1e-2, 0, 1, 2)[0, 1]
    np.testing.assert_allclose(pushed, 1e-2 * 0.1 * (np.sin(2 * np.pi * (x + y)) + np.cos(2 * np.pi * (x + y))), atol=1e-9)


def test_mean_vorticity_is_conserved() -> None:
    start = navier_stokes.random_field(0, 32)[None]
    frames = navier_stokes.frames(start, 1e-3, 1e-2, 0, 100, 6)
    assert abs(frames.mean((-1, -2))).max() < 1e-15


def test_without_diffusion_and_force_energy_and_enstrophy_are_conserved() -> None:
    start = 5 * navier_stokes.random_field(0, 32)[None]
    start = np.fft.irfft2(
        np.where(np.hypot(*np.meshgrid(np.fft.rfftfreq(32, 1 / 32), np.fft.fftfreq(32, 1 / 32))) < 6, np.fft.rfft2(start), 0)
    )
    first, last = navier_stokes.frames(start, 1e-12, 1e-4, 0, 2000, 2, force=0)[0]
    assert relative(last, first) > 0.05  # it has moved
    assert (last**2).sum() == pytest.approx((first**2).sum(), rel=2e-4)


def test_error_falls_in_proportion_to_the_time_step() -> None:
    start = 3 * navier_stokes.random_field(1, 32)[None]
    ends = {steps: navier_stokes.frames(start, 1e-3, 1 / steps, 0, steps, 2)[0, 1] for steps in (50, 100, 3200)}
    ratio = relative(ends[50], ends[3200]) / relative(ends[100], ends[3200])
    assert 1.9 < ratio < 2.15


def test_a_seed_is_the_same_flow_at_every_resolution() -> None:
    coarse, fine = (navier_stokes.frames(navier_stokes.random_field(7, n)[None], 1e-3, 1e-2, 0, 500, 2)[0, 1] for n in (32, 64))
    assert relative(coarse, fine[::2, ::2]) < 1e-3


def test_a_flow_that_blows_up_is_an_error() -> None:
    start = 1e6 * navier_stokes.random_field(0, 16)[None]
    with np.errstate(all="ignore"), pytest.raises(ValueError, match=r"blew up: dt = 0\.5 is too long"):
        navier_stokes.frames(start, 1e-3, 0.5, 0, 200, 2)


def test_a_trajectory_depends_on_its_own_seed_only() -> None:
    seeds = np.array([11, 12, 13, 14, 15, 16, 17])
    together = navier_stokes.solve(section(), seeds)["vorticity"]
    for size in (1, 2, 3, 5):
        apart = [navier_stokes.solve(section(), seeds[i : i + size])["vorticity"] for i in range(0, len(seeds), size)]
        assert np.array_equal(np.concatenate(apart), together)
    assert np.array_equal(navier_stokes.solve(section(frames=2), seeds)["vorticity"], together[:, :2])


def test_single_precision_is_enough() -> None:
    start = np.stack([navier_stokes.random_field(seed, 32) for seed in range(3)])
    double = navier_stokes.frames(start, 1e-3, 1e-2, 0, 1000, 2)[:, 1]
    single = navier_stokes.frames(start.astype("f4"), 1e-3, 1e-2, 0, 1000, 2)[:, 1]
    step = navier_stokes.frames(start, 1e-3, 1e-3, 0, 10000, 2)[:, 1]
    assert relative(single, double).max() < 0.05 * relative(double, step).min()


# The data set -------------------------------------------------------------------------------------------------------------------------


def test_statistics_of_the_published_recipe() -> None:
    """Acceptance ranges measured for the DINo recipe at t = 28.5: spread 0.97-1.10, extremes within 2.2, change a frame about 0.17.

    A 32 x 32 grid resolves this flow and is four times as fast; a small sample widens the ranges of the mean a little.
    """
    p = section(grid=32, burn_in=28.5, frames=6, interval=1.0)
    frames = navier_stokes.solve(p, np.arange(8))["vorticity"].astype("f8")
    assert 0.94 < frames[:, 0].std() < 1.13
    assert abs(frames).max() < 2.4
    assert abs(frames.mean((-1, -2))).max() < 1e-7
    assert 0.13 < relative(frames[:, 1], frames[:, 0]).mean() < 0.21


def test_spread_of_the_random_field() -> None:
    """Parseval: the variance is half the sum of the squared amplitudes."""
    fields_ = np.stack([navier_stokes.random_field(seed, 16) for seed in range(400)])
    ky, kx = np.meshgrid(np.arange(-7, 8), np.arange(-7, 8))
    amplitude = np.sqrt(2) * 7**1.5 * (4 * np.pi**2 * (kx**2 + ky**2) + 49) ** -1.25
    amplitude[7, 7] = 0
    assert fields_.var() == pytest.approx((amplitude**2).sum() / 2, rel=0.05)
    assert abs(fields_.mean((1, 2))).max() < 1e-15


def test_seeds_and_roles() -> None:
    p = section()
    assert trajectories.seeds(p).tolist() == [3, 4, 5, 6, 7, 2147483647 - 3, 2147483647 - 4]
    assert navier_stokes.coordinates(p)["role"].values.tolist() == ["train"] * 4 + ["validation"] + ["test"] * 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"interval": 0.505}, "interval must be a whole number of steps"),
        ({"validation_trajectories": 5}, "leaves none for training"),
        ({"nu": 1e-3}, r"simulate\.ns\.nu: unknown key; known in simulate\.ns: .*equation, viscosity"),
        ({"equation": "heat"}, "unknown equation 'heat'"),
        ({"dt": 0}, r"simulate\.ns\.dt: "),
    ],
)
def test_wrong_parameters_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(params.ParamsError, match=message):
        section(**change)


# The stage ----------------------------------------------------------------------------------------------------------------------------


def test_the_stage_writes_a_field_that_does_not_depend_on_threads_or_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = section()
    monkeypatch.setattr(fields, "CHUNK_BYTES", 2 * 4 * 32 * 32 * 4)  # two trajectories a chunk
    for name, workers in (("one", "1"), ("two", "3")):
        monkeypatch.setenv("FIELDCAST_WORKERS", workers)
        simulate.run(p, "ns", out=tmp_path / name)
    assert same(tmp_path / "one", tmp_path / "two")
    monkeypatch.setattr(fields, "CHUNK_BYTES", 1 << 20)
    simulate.run(p, "ns", out=tmp_path / "three")
    small, large = fields.open_field(tmp_path / "one"), fields.open_field(tmp_path / "three")
    assert small["vorticity"].data.numblocks[0] == 4
    assert large["vorticity"].data.numblocks[0] == 1
    assert small.identical(large.compute())
    assert small["vorticity"].notnull().all()
    assert small["vorticity"].dims == ("trajectory", "time", "y", "x")
    assert small.attrs["geometry"] == "torus"
    np.testing.assert_array_equal(small["vorticity"][6], navier_stokes.solve(p, np.array([2147483647 - 4]))["vorticity"][0])


def test_killed_and_run_again_gives_the_same_bytes(tmp_path: Path) -> None:
    section_ = SECTION | {"grid": 64, "frames": 12, "trajectories": 40, "dt": 5e-3}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"simulate": {"ns": section_}}))
    command = [sys.executable, "-m", "pipeline", "simulate", "ns", "--params", str(tmp_path / "params.yaml"), "--out"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FIELDCAST_WORKERS": "1"}
    killed = subprocess.Popen([*command, str(tmp_path / "a/ns")], env=environment)
    done = tmp_path / "a/.ns.resume/field.zarr/vorticity/c/0/0/0/0"
    deadline = time.monotonic() + 60
    while not done.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / "a/ns").exists()
    first = done.stat().st_mtime_ns
    broken = done.parent / "0.0123456789abcdef.partial"
    broken.write_bytes(b"half a chunk")
    subprocess.run([*command, str(tmp_path / "a/ns")], env=environment, check=True)
    subprocess.run([*command, str(tmp_path / "b/ns")], env=environment, check=True)
    assert (tmp_path / "a/ns/field.zarr/vorticity/c/0/0/0/0").stat().st_mtime_ns == first  # kept, not made again
    assert same(tmp_path / "a/ns", tmp_path / "b/ns")
    assert not list((tmp_path / "a").glob(".*.resume"))


def test_what_other_parameters_left_behind_is_not_used(tmp_path: Path) -> None:
    p = section(trajectories=2, test_trajectories=0)
    simulate.run(section(viscosity=1e-2), "ns", out=tmp_path / "old")
    (tmp_path / "old").rename(tmp_path / ".ns.resume")
    simulate.run(p, "ns", out=tmp_path / "ns")
    np.testing.assert_array_equal(
        fields.open_field(tmp_path / "ns")["vorticity"], navier_stokes.solve(p, trajectories.seeds(p))["vorticity"]
    )
