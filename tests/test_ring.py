"""Equations on a ring: Kuramoto-Sivashinsky and Burgers against what is known of them, and the way of a 1-D field to batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import burgers, fields, forecast, kuramoto_sivashinsky, params, sensors, simulate, subsample, trajectories, validate
from pipeline.batches import TrainingBatches, Windows
from pipeline.cases import cases
from tests import worlds
from tests.test_tasks import GATE

COUNTS = {"trajectories": 5, "validation_trajectories": 1, "test_trajectories": 2, "seed": 3}
KS = {"equation": "kuramoto_sivashinsky", "length": 64.0, "grid": 64, "frames": 5, "interval": 1.0, "burn_in": 0.0, "dt": 0.25, **COUNTS}
BURGERS = {"equation": "burgers", "grid": 60, "frames": 9, "end": 2.0, "mean": 5, "every": 2, **COUNTS}


def section(raw: dict[str, Any], **changes: Any) -> Any:
    return params.validated({**raw, **changes}, simulate.params_model("ring"), "simulate.ring")


# Kuramoto-Sivashinsky -----------------------------------------------------------------------------------------------------------------


def test_small_waves_grow_and_decay_as_in_linear_theory() -> None:
    """sin(k x) of tiny amplitude changes by exp((k^2 - k^4) t): wave 5 on a ring of 64 grows, wave 14 decays."""
    x = np.arange(128) / 128
    for wave in (5, 10, 14):
        k = 2 * np.pi * wave / 64
        start = 1e-8 * np.sin(2 * np.pi * wave * x)[None]
        end = kuramoto_sivashinsky.frames(start, 64.0, 0.25, 0, 16, 2)[0, 1]
        np.testing.assert_allclose(end, start[0] * np.exp((k**2 - k**4) * 4), atol=1e-14)


def test_the_mean_is_conserved_and_a_uniform_wind_only_carries_the_pattern() -> None:
    """Galilean invariance: u(x - c t, t) + c solves the equation if u does."""
    start = kuramoto_sivashinsky.waves(0, 128)[None]
    rest = kuramoto_sivashinsky.frames(start, 64.0, 0.05, 0, 400, 2)
    assert abs(rest.mean(axis=-1)).max() < 1e-12
    c = 64 / 20  # once around the ring in these 20 units of time
    np.testing.assert_allclose(kuramoto_sivashinsky.frames(start + c, 64.0, 0.05, 0, 400, 2)[0, 1], rest[0, 1] + c, atol=2e-3)


def test_the_order_of_time_stepping_is_four() -> None:
    """On a grid so coarse that no wave is stiff; stiff ones converge more slowly, which is known of the method."""
    start = kuramoto_sivashinsky.frames(kuramoto_sivashinsky.waves(1, 32)[None], 32.0, 0.05, 600, 1, 1)[:, 0]
    ends = {steps: kuramoto_sivashinsky.frames(start, 32.0, 4 / steps, 0, steps, 2)[0, 1] for steps in (80, 160, 1280)}
    error = {steps: np.abs(ends[steps] - ends[1280]).max() for steps in (80, 160)}
    assert 13 < error[80] / error[160] < 19


def test_chaos_has_its_known_statistics_and_balance() -> None:
    """On a long ring energy density is about 1.7 (u_rms 1.3); what u_x^2 feeds, u_xx^2 drains: their means agree over time."""
    p = section(KS, length=100.0, grid=128, burn_in=100.0, frames=100, interval=2.0)
    u = kuramoto_sivashinsky.solve(p, np.arange(6))["velocity"].astype("f8")
    k = 2 * np.pi / 100 * np.arange(65)
    spectrum = np.abs(np.fft.rfft(u)) ** 2
    assert 1.2 < u.std() < 1.4
    assert (spectrum * k**2).sum() == pytest.approx((spectrum * k**4).sum(), rel=0.02)


# Burgers ------------------------------------------------------------------------------------------------------------------------------


def test_smooth_waves_follow_their_characteristics_at_high_order() -> None:
    """Before the shock u(x, t) = u0(x - u t); the error falls at least as the fourth power of the cell."""
    errors = []
    for n in (40, 80, 160):
        edge = np.linspace(0, 16, n + 1)

        def mean(time: float, edge: np.ndarray = edge) -> np.ndarray:
            node, weight = np.polynomial.legendre.leggauss(6)
            x = (edge[:-1, None] + edge[1:, None]) / 2 + node * (edge[1] - edge[0]) / 2
            u = np.sin(2 * np.pi * x / 16)
            for _ in range(200):
                u = np.sin(2 * np.pi * (x - u * time) / 16)
            return (u * weight).sum(axis=1) / 2

        found = burgers.frames(mean(0.0)[None], np.linspace(0, 1.0, 161))[0, -1]
        errors.append(np.abs(found - mean(1.0)).mean())
    assert errors[0] / errors[1] > 14
    assert errors[1] / errors[2] > 14


def test_a_shock_moves_at_the_mean_of_its_sides_and_a_fan_opens() -> None:
    """u is 1.5 on half of the ring and 0.5 on the other: a shock at speed 1, a fan between speeds 0.5 and 1.5, nothing new outside."""
    x = (np.arange(320) + 0.5) * 16 / 320
    start = np.where((x > 4) & (x < 12), 1.5, 0.5)
    end = burgers.frames(start[None], np.array([0.0, 3.0]))[0, 1]
    expected = np.select([x < 5.5, x < 8.5, x < 15], [0.5, np.maximum(0.5, (x - 4) / 3), 1.5], 0.5)
    assert np.abs(end - expected).mean() < 0.01
    assert np.argmax(np.abs(np.diff(end))) + 1 == pytest.approx(300, abs=1)
    assert end.min() > 0.499
    assert end.max() < 1.501
    assert end.sum() == pytest.approx(start.sum(), rel=1e-12)
    backwards = burgers.frames(-start[None, ::-1], np.array([0.0, 3.0]))[0, 1]
    np.testing.assert_allclose(backwards, -end[::-1], atol=1e-12)


def test_the_force_alone_keeps_the_mean_and_viscosity_drains_energy() -> None:
    p = section(BURGERS, mean=1, every=1)
    u = burgers.solve(p, trajectories.seeds(p))["velocity"]
    assert np.abs(u.mean(axis=-1)).max() < 1e-6  # the sums of F and of u(0) are zero
    start = np.sin(2 * np.pi * (np.arange(64) + 0.5) / 64)[None]
    thin, thick = (burgers.frames(start, np.linspace(0, 8, 5), nu)[0] for nu in (0.0, 0.5))
    assert (np.diff((thick**2).sum(axis=-1)) < 0).all()
    assert (thick[-1] ** 2).sum() < 0.7 * (thin[-1] ** 2).sum()
    k = 2 * np.pi / 16
    faint = burgers.frames(1e-6 * start, np.array([0.0, 2.0]), 0.5)[0, 1]
    np.testing.assert_allclose(faint, 1e-6 * start[0] * np.exp(-0.5 * k**2 * 2), rtol=2e-3)


def test_coarse_values_are_means_of_cells() -> None:
    fine, coarse = (burgers.solve(section(BURGERS, mean=m, every=e), np.array([9]))["velocity"][0, -1] for m, e in ((1, 1), (5, 2)))
    np.testing.assert_allclose(coarse, [fine[np.arange(i - 2, i + 3) % 60].mean() for i in range(0, 60, 2)], atol=1e-6)


# Both ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [KS, BURGERS])
def test_a_trajectory_depends_on_its_own_seed_only(raw: dict[str, Any]) -> None:
    p = section(raw)
    module = {"burgers": burgers, "kuramoto_sivashinsky": kuramoto_sivashinsky}[p.equation]
    seeds = trajectories.seeds(p)
    whole = module.solve(p, seeds)["velocity"]
    assert whole.shape == (7, p.frames, 64 if raw is KS else 30)
    for number, seed in enumerate(seeds):
        np.testing.assert_array_equal(module.solve(p, np.array([seed]))["velocity"][0], whole[number])


@pytest.mark.parametrize("raw", [KS, BURGERS])
@pytest.mark.parametrize("strategy", ["random", "missing_region", "random_walk"])
def test_a_ring_becomes_a_sensor_dataset(tmp_path: Path, raw: dict[str, Any], strategy: str) -> None:
    simulate.run(section(raw), "ring", out=tmp_path / "field")
    assert fields.open_field(tmp_path / "field")["velocity"].dims == ("trajectory", "time", "x")
    gate = params.validated(GATE, validate.params_model("ring"), "validate.ring")
    validate.run(gate, "ring", ingested=tmp_path / "field", out=tmp_path / "checked")
    layout = {"strategy": strategy, "rate": 0.5}
    raw_section = {"source": "ring", "variables": ["velocity"], "layout": layout, "cases": {"horizon": 2}}
    model = params.validated(raw_section, subsample.Subsample, "subsample.ring")
    subsample.run(model, "ring", ingested=tmp_path / "field", checked=tmp_path / "checked", out=tmp_path / "ring.zarr")
    dataset = sensors.read(tmp_path / "ring.zarr")
    assert dataset.info.space == ("x",)
    assert (dataset.info.centre, dataset.info.half_extent, dataset.info.period) == ((0.5,), 0.5, 2.0)
    batch = TrainingBatches(dataset, Windows(max_lead=2, batch=4, query_points=10), 0)[0]
    assert batch.context.position.shape[-1] == 1
    part = next(cases(dataset, "test", 1, [0, 2], 4))
    assert part.batch.query.mask.all()
    truth = fields.open_field(tmp_path / "field")["velocity"].values.reshape(7 * section(raw).frames, -1)
    mean, std = dataset.info.mean[0], dataset.info.std[0]
    frame = dataset["cases/frame"][part.index[0]]
    np.testing.assert_allclose(part.batch.query.value[0, 1, :, 0].numpy() * std + mean, truth[frame + 2], atol=1e-5)  # type: ignore[index]
    seen = part.batch.context
    place = np.round((seen.position[0, 0, :, 0].numpy() / 2 + 0.5) * truth.shape[1] - (0.0 if raw is KS else 0.25)).astype(int)
    np.testing.assert_allclose(seen.value[0, 0, :, 0].numpy() * std + mean, truth[frame, place], atol=1e-5)  # type: ignore[index]


@pytest.mark.parametrize(
    ("raw", "change", "message"),
    [
        (KS, {"interval": 0.3}, "interval must be a whole number of steps"),
        (BURGERS, {"mean": 4}, "mean be odd"),
        (BURGERS, {"every": 7}, "grid must be a multiple of every"),
    ],
)
def test_wrong_parameters_are_named(raw: dict[str, Any], change: dict[str, Any], message: str) -> None:
    with pytest.raises(params.ParamsError, match=message):
        section(raw, **change)


def test_a_forecast_map_needs_two_axes() -> None:
    dataset = worlds.waves()
    ring = replace(dataset, info=replace(dataset.info, space=("x",), centre=(0.5,)))
    with pytest.raises(ValueError, match="a forecast is a map of x and y: waves has the axes x"):
        forecast.output_grid(ring, forecast.Params(init="case", max_lead=1))
