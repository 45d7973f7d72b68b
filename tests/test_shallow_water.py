"""Shallow water on a sphere: the transforms against identities, the solver against steady and linear solutions, the data against bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline import fields, params, places, recipe, shallow_water, simulate
from pipeline.shallow_water import DEPTH, GRAVITY, OMEGA, RADIUS, Sphere

SECTION = {
    "equation": "shallow_water", "grid": 32, "diffusion": 1e5, "frames": 3, "interval": 1, "burn_in": 2, "dt": 0.5,
    "trajectories": 3, "validation_trajectories": 1, "test_trajectories": 1, "seed": 0,
}  # fmt: skip


def section(**changes: object) -> shallow_water.Params:
    found = params.validated(SECTION | changes, simulate.params_model("sw"), "simulate.sw")
    assert isinstance(found, shallow_water.Params)
    return found


def mean(values: np.ndarray) -> np.ndarray:
    """Over the sphere, of [...,J,I]."""
    _, weight = shallow_water._nodes(values.shape[-2])
    return values.mean(-1) @ weight / 2


def test_a_spectrum_survives_the_grid_and_the_laplacian_is_that_of_a_harmonic() -> None:
    sphere = Sphere(24)
    rng = np.random.default_rng(0)
    shape = (sphere.degrees + 1, sphere.degrees + 1)
    spectrum = np.triu(rng.normal(size=shape) + 1j * rng.normal(size=shape))
    spectrum[0] = spectrum[0].real
    np.testing.assert_allclose(sphere.spectrum(sphere.values(spectrum)), spectrum, atol=1e-12)
    sine, _ = shallow_water._nodes(24)
    longitude = 2 * np.pi * np.arange(48) / 48
    harmonic = np.outer((1 - sine**2) * sine, np.cos(2 * longitude))  # of degree 3
    np.testing.assert_allclose(sphere.values(sphere.laplacian() * sphere.spectrum(harmonic)), -12 / RADIUS**2 * harmonic, atol=1e-25)


def test_solid_rotation_stays_as_it_is() -> None:
    """Williamson et al. 1992 (doi 10.1016/S0021-9991(05)80016-6), case 2, five days: depth and wind are known, and steady."""
    sphere = Sphere(16)
    sine, _ = shallow_water._nodes(16)
    cosine, speed = np.sqrt(1 - sine**2), 2 * np.pi * RADIUS / (12 * 86400)
    state = sphere.zonal(speed * cosine)
    depth = DEPTH - (RADIUS * OMEGA * speed + speed**2 / 2) / GRAVITY * (sine**2 - 1 / 3)
    eastward, northward = sphere.wind(state)
    np.testing.assert_allclose(eastward, np.broadcast_to((speed * cosine**2)[:, None], eastward.shape), atol=1e-10)
    assert abs(northward).max() < 1e-10
    first, last = sphere.frames(state, 1800, 0, 240, 2, 0.0)
    np.testing.assert_allclose(first[1], np.broadcast_to(depth[:, None], first[1].shape), rtol=1e-12)
    np.testing.assert_allclose(last[1], first[1], atol=1e-9 * DEPTH)
    np.testing.assert_allclose(last[0], first[0], atol=1e-9 * abs(first[0]).max())


def test_a_faint_gravity_wave_swings_at_the_speed_of_theory() -> None:
    """Without rotation a harmonic of degree n swings with the frequency sqrt(g H n (n + 1)) / a."""
    sphere = Sphere(16, omega=0.0)
    state = np.zeros((3, sphere.degrees + 1, sphere.degrees + 1), complex)
    state[2, 0, 0], state[2, 3, 5] = np.sqrt(2) * DEPTH, 1e-3
    found = sphere.frames(state, 300, 0, 24, 6, 0.0)[:, 1]
    swing = [sphere.spectrum(one)[3, 5].real / 1e-3 for one in found]
    frequency = np.sqrt(GRAVITY * DEPTH * 30) / RADIUS
    np.testing.assert_allclose(swing, np.cos(frequency * 7200 * np.arange(6)), atol=1e-4)


def test_mass_is_kept_and_the_mean_vorticity_is_zero_while_the_jets_break() -> None:
    sphere = Sphere(32)
    first, last = sphere.frames(sphere.jets(80.0, 1.0), 1800, 0, 240, 2, 4e5)
    assert mean(last[1]) == pytest.approx(mean(first[1]), rel=1e-14)
    assert abs(mean(last[0])) < 1e-16 * abs(last[0]).max() * 1e3
    wave = last[0] - last[0].mean(-1, keepdims=True)
    assert np.sqrt((wave**2).mean()) > 0.1 * np.sqrt((last[0] ** 2).mean())  # the jets are no longer zonal


def test_energy_is_kept_without_damping() -> None:
    sphere = Sphere(32)

    def energy(state: np.ndarray) -> float:
        sine, _ = shallow_water._nodes(32)
        u, v = sphere.wind(state)
        depth = sphere.values(state[2])
        return float(mean(depth * (u**2 + v**2) / (2 * (1 - sine[:, None] ** 2)) + GRAVITY * (depth - DEPTH) ** 2 / 2))

    state = sphere.jets(70.0, 0.0)
    before = energy(state)
    frames = []
    step = 1200.0
    for _ in range(20):
        k1 = sphere._tendency(state)
        k2 = sphere._tendency(state + step / 2 * k1)
        k3 = sphere._tendency(state + step / 2 * k2)
        state = state + step / 6 * (k1 + 2 * k2 + 2 * k3 + sphere._tendency(state + step * k3))
        frames.append(energy(state))
    assert frames[-1] == pytest.approx(before, rel=1e-5)


def test_too_long_a_step_is_an_error() -> None:
    with np.errstate(all="ignore"), pytest.raises(ValueError, match="blew up: dt = 36000 s is too long"):
        Sphere(16).frames(Sphere(16).jets(70.0, 0.0), 36000, 0, 60, 2, 0.0)


def test_a_trajectory_depends_on_its_own_seed_only() -> None:
    p = section(grid=16)
    together = shallow_water.solve(p, np.array([4, 5, 6]))
    for number, seed in enumerate((4, 5, 6)):
        alone = shallow_water.solve(p, np.array([seed]))
        assert all(np.array_equal(alone[name][0], together[name][number]) for name in shallow_water.VARIABLES)
    assert not np.array_equal(together["height"][0], together["height"][1])


def test_a_grid_on_a_sphere_gives_unit_vectors(tmp_path: Path) -> None:
    simulate.run(section(grid=16, every=2), "sw", out=tmp_path / "sw")
    field = fields.open_field(tmp_path / "sw")
    assert field["height"].shape == (4, 3, 8, 16)
    assert abs(field["height"]).max() < 1
    place = places.positions(field, 0)
    np.testing.assert_allclose(np.linalg.norm(place, axis=1), 1)
    row, column = 3, 5
    longitude, latitude = np.radians([float(field["x"][column]), float(field["y"][row])])
    expected = [np.cos(latitude) * np.cos(longitude), np.cos(latitude) * np.sin(longitude), np.sin(latitude)]
    np.testing.assert_allclose(place[row * 16 + column], expected)
    info = recipe.dataset_info(
        recipe.Subsample(source="sw", variables=("height",), layout={"strategy": "all"}, cases={}), "sw",
        simulated=True, mean=[0], std=[1], geometry="sphere", step=1.0, utc_offset=0.0, n_sensors=0, context_covariates=(),
        space=places.space(field), **places.scale(field),
    )  # fmt: skip
    assert info.space == ("x", "y", "z")
    assert info.position_unit == "1"
    assert info.period is None
