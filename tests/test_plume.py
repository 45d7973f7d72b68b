"""The plume: no divergence, a closed budget of heat, mirror images, sensors in the middle, pages that say they are for maps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline import fields, params, plume, simulate
from pipeline.plume import Room, Source
from pipeline.strategies import Layout

SECTION = {
    "equation": "plume", "grid": 8, "viscosity": 5e-3, "frames": 3, "interval": 0.2, "burn_in": 0.4, "dt": 0.02,
    "trajectories": 3, "validation_trajectories": 1, "test_trajectories": 1, "seed": 0,
}  # fmt: skip


def section(**changes: object) -> plume.Params:
    found = params.validated(SECTION | changes, simulate.params_model("plume"), "simulate.plume")
    assert isinstance(found, plume.Params)
    return found


def stepped(room: Room, steps: int, dt: float = 0.02) -> tuple[list[np.ndarray], np.ndarray]:
    velocity, heat = room.start()
    shares = np.stack([source.share(room.shape) for source in room.sources])
    for number in range(steps):
        velocity, heat = room.step(velocity, heat, shares, number * dt, dt)
    return velocity, heat


def test_what_flows_into_a_cell_flows_out_and_no_wall_lets_air_through() -> None:
    room = Room((12, 8, 8), 5e-3, (plume.drawn(1), plume.drawn(2)))
    for velocity in (room.start()[0], stepped(room, 60)[0]):
        assert max(abs(u).max() for u in velocity) > 0.05
        assert abs(room.divergence(velocity)).max() < 1e-12
        assert not any(np.take(u, [0, -1], axis=plume.AXES[axis]).any() for axis, u in enumerate(velocity))


def test_the_heat_in_the_room_is_what_the_source_gave() -> None:
    source = plume.drawn(3)
    room = Room((12, 8, 8), 5e-3, (source,))
    _, heat = stepped(room, 50)
    time = np.linspace(0, 1, 10001)
    given = np.trapezoid([source.at(t) for t in time], time)
    assert heat.sum() * room.cell**3 == pytest.approx(given, rel=1e-4)  # Shu and Osher's method on a smooth power
    steady = Room((12, 8, 8), 5e-3, (Source(0.4, 0.6, 0.03),))
    assert stepped(steady, 50)[1].sum() * room.cell**3 == pytest.approx(0.03 * 1, rel=1e-12)
    assert heat.min() > -1e-12


def test_a_source_in_the_middle_of_still_air_gives_mirror_images_and_rises() -> None:
    velocity, heat = stepped(Room((12, 8, 8), 5e-3, (Source(0.5, 0.5, 0.03),)), 80)
    for mirror in (heat[..., ::-1], heat[..., ::-1, :], heat.swapaxes(-1, -2)):
        np.testing.assert_allclose(heat, mirror, atol=1e-12)
    np.testing.assert_allclose(velocity[0], -velocity[0][..., ::-1], atol=1e-12)
    assert velocity[2][0, 6, 4, 4] > 0.02
    assert velocity[2][0, 6, 0, 0] < 0


def test_a_shear_wave_decays_as_in_theory() -> None:
    """u = cos(pi y) slips along its walls, does not carry itself, and decays as exp(-nu pi^2 t)."""
    room = Room((8, 16, 16), 0.05, (Source(0.5, 0.5, 0.0),))
    wave = np.cos(np.pi * (np.arange(16) + 0.5) / 16)[:, None]
    velocity = [np.zeros((1, 8, 16, 17)), np.zeros((1, 8, 17, 16)), np.zeros((1, 9, 16, 16))]
    force = room._forces([np.broadcast_to(wave, (1, 8, 16, 17)), *velocity[1:]], np.zeros((1, 8, 16, 16)))
    rate = -0.05 * (2 - 2 * np.cos(np.pi / 16)) * 16**2  # of the discrete wave
    np.testing.assert_allclose(force[0][..., 1:-1], np.broadcast_to(rate * wave, (1, 8, 16, 15)), atol=1e-12)
    assert rate == pytest.approx(-0.05 * np.pi**2, rel=0.01)


def test_a_trajectory_depends_on_its_own_seed_only() -> None:
    together = plume.solve(section(), np.array([4, 5, 6]))
    for number, seed in enumerate((4, 5, 6)):
        alone = plume.solve(section(), np.array([seed]))
        assert all(np.array_equal(alone[name][0], together[name][number]) for name in plume.VARIABLES)


def test_the_field_has_three_axes(tmp_path: Path) -> None:
    simulate.run(section(), "plume", out=tmp_path / "plume")
    field = fields.open_field(tmp_path / "plume")
    assert field["temperature_excess"].dims == ("trajectory", "time", "z", "y", "x")
    assert field["temperature_excess"].shape == (4, 3, 12, 8, 8)


@pytest.mark.parametrize(
    ("change", "message"), [({"height": 1.55}, "whole number of cells"), ({"interval": 0.03}, "interval must be a whole number of steps")]
)
def test_wrong_parameters_are_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(params.ParamsError, match=message):
        section(**change)


def test_sensors_in_the_middle_of_every_axis() -> None:
    shape = (12, 8, 8)
    layout = Layout(strategy="random", rate=0.5, central=0.5)
    at = np.stack(np.unravel_index(layout.sensors(np.ones(shape, bool), 2, False, 0, 0)[0], shape), axis=1)
    assert len(at) == round(0.5 * 6 * 4 * 4)
    assert (at.min(0) >= [3, 2, 2]).all()
    assert (at.max(0) <= [8, 5, 5]).all()
    with pytest.raises(ValueError, match="central belongs to strategy random"):
        Layout(strategy="all", central=0.5)
