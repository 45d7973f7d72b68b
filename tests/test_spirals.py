"""The spirals: their equation, the frames that are observed of them, questions about earlier frames, and the floor under every model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from models.baselines.linear_time import LinearTime
from pipeline import evaluate, fields, params, sensors, simulate, spirals, subsample
from pipeline.batches import TrainingBatches, Windows
from pipeline.cases import cases
from pipeline.report import verdict
from pipeline.strategies import Layout

SECTION = {"equation": "spirals", "trajectories": 12, "validation_trajectories": 3, "test_trajectories": 4, "seed": 0, "samples": 200}
WINDOWS = {"context_frames": 100, "min_lead": -99, "max_lead": 0, "batch": 8, "query_frames": 100}


def section(**changes: Any) -> spirals.Params:
    found = params.validated(SECTION | changes, simulate.params_model("spirals"), "simulate.spirals")
    assert isinstance(found, spirals.Params)
    return found


@pytest.fixture(scope="module")
def ingested(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("spirals") / "spirals"
    simulate.run(section(), "spirals", out=out)
    frames = len(fields.open_field(out)["curve_x"]) * 100
    pd.DataFrame({"flag_aggregate": np.ones(frames, np.int8)}).to_parquet(out.parent / "frames.parquet")
    return out


def made(ingested: Path, **layout: Any) -> sensors.SensorDataset:
    raw = {
        "source": "spirals",
        "variables": ["curve_x", "curve_y"],
        "layout": {"strategy": "frames", "observed_frames": 10, "additive": 0.1, **layout},
        "cases": {"history": 99},
    }
    model = params.validated(raw, subsample.Subsample, "subsample.spirals")
    out = ingested.parent / f"{'-'.join(map(str, layout))}.zarr"
    subsample.run(model, "spirals", ingested=ingested, checked=ingested.parent, out=out)
    return sensors.read(out)


# The equation -------------------------------------------------------------------------------------------------------------------------


def test_quadrature_is_the_integral() -> None:
    """Of f = 1 the two integrals are known: STRENGTH sin(TURN t) / TURN and STRENGTH (1 - cos(TURN t)) / TURN."""
    share = (np.arange(4000) + 0.5) / 4000
    even, odd = spirals.quadrature(share, 50)
    t = np.linspace(0, 1, 50)
    np.testing.assert_allclose(even.sum(1), spirals.STRENGTH * np.sin(spirals.TURN * t) / spirals.TURN, atol=1e-6)
    np.testing.assert_allclose(odd.sum(1), spirals.STRENGTH * (1 - np.cos(spirals.TURN * t)) / spirals.TURN, atol=1e-6)


def test_a_curve_solves_its_equation() -> None:
    """With samples instead of an exact rule the residual of the converged curve, by the trapezoidal rule, is that of the sampling."""
    y = spirals.curve(3, 100, 40_000, 14)
    t = np.linspace(0, 1, 100)
    lag = spirals.TURN * (t[:, None] - t)
    weight = np.tril(np.full((100, 100), 1 / 99))
    weight[:, 0] /= 2
    weight[np.arange(100), np.arange(100)] /= 2
    weight[0] = 0
    even, odd = (spirals.STRENGTH * wave(lag) * weight for wave in (np.cos, np.sin))
    f = np.cosh(y)
    right = y[0] + np.stack([-odd @ f[:, 0] - even @ f[:, 1], odd @ f[:, 1] - even @ f[:, 0]], axis=1)
    assert np.abs(right - y).max() < 0.03
    assert np.abs(y - spirals.curve(3, 100, 40_000, 10)).max() < 1e-3  # ten iterations are enough
    assert np.abs(y - y[0]).max() > 0.3  # it does move


def test_curves_look_as_the_published_ones() -> None:
    """Those start in [0, 2] x [-2, 0], turn about one and a half times, stay within about 2.3, and spread 0.25 and 0.34 around the mean."""
    curves = np.stack([spirals.curve(seed, 100, 1000, 10) for seed in range(40)])
    assert ((curves[:, 0] >= [0, -2]) & (curves[:, 0] <= [2, 0])).all()
    assert 1.8 < np.abs(curves).max() < 2.5
    within = (curves - curves.mean(1, keepdims=True)).std((0, 1))
    assert ((within > 0.18) & (within < 0.36)).all()
    step = np.diff(curves, axis=1)
    angle = np.unwrap(np.arctan2(step[..., 1], step[..., 0]), axis=1)
    turns = np.abs(angle[:, -1] - angle[:, 0]) / (2 * np.pi)
    assert 1.1 < turns.mean() < 1.9
    assert np.abs(np.diff(curves, n=2, axis=1)).max() < 0.05  # smooth


def test_the_field_is_one_place_with_two_variables(ingested: Path) -> None:
    field = fields.open_field(ingested)
    assert dict(field.sizes) == {"trajectory": 16, "time": 100, "y": 1, "x": 1}
    assert field["role"].values.tolist() == ["train"] * 9 + ["validation"] * 3 + ["test"] * 4
    alone = spirals.solve(section(), np.array([int(field["seed"][14])]))
    for name in spirals.VARIABLES:
        assert np.array_equal(field[name][14], alone[name][0])


def test_too_few_samples_are_an_error() -> None:
    with pytest.raises(ValueError, match="blew up with 1 samples an integral: take more samples"):
        spirals.solve(section(samples=1), np.arange(200))


# What is observed ---------------------------------------------------------------------------------------------------------------------


def test_ten_frames_are_observed_with_noise_and_the_truth_is_clean(ingested: Path) -> None:
    regular, irregular = made(ingested), made(ingested, irregular=True)
    seen = np.diff(regular["frame/obs_start"]).reshape(16, 100) > 0
    assert (seen == np.isin(np.arange(100), np.arange(0, 100, 11))).all()
    other = np.diff(irregular["frame/obs_start"]).reshape(16, 100) > 0
    assert (other.sum(1) == 10).all()
    assert other[:, 0].all()
    assert len({tuple(row) for row in other}) == 16
    truth = np.stack([fields.open_field(ingested)[name].values.reshape(1600, 1) for name in spirals.VARIABLES], -1)
    for dataset, mask in ((regular, seen), (irregular, other)):
        assert np.array_equal(dataset["truth/value"], truth)
        noise = dataset["obs/value"] - truth[mask.ravel(), 0]
        assert abs(noise.std() - 0.1) < 0.012
        assert abs(noise.mean()) < 0.02
    assert np.isfinite(irregular.info.half_extent)


def test_a_case_ends_a_curve_and_needs_no_observation_in_its_last_frame(ingested: Path) -> None:
    dataset = made(ingested, irregular=True)
    assert (dataset["cases/frame"] % 100 == 99).all()
    assert len(dataset["cases/frame"]) == 7
    assert dataset["cases/block"].tolist() == list(range(7))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strategy": "all", "observed_frames": 3}, "belongs to strategy frames"),
        ({"strategy": "frames"}, "belongs to strategy frames"),
    ],
)
def test_layouts_that_cannot_be(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(**change)


def test_more_frames_than_there_are_cannot_be_observed() -> None:
    with pytest.raises(ValueError, match="observed_frames is 30, but a trajectory has only 20 frames"):
        Layout(strategy="frames", observed_frames=30).seen(20, 0, 0)


# Questions about earlier frames -------------------------------------------------------------------------------------------------------


def test_leads_before_the_last_frame(ingested: Path) -> None:
    dataset = made(ingested)
    batch = TrainingBatches(dataset, Windows(**WINDOWS, query_points=1), 0)[0]
    lead = ((batch.query.time - batch.context.time[:, -1:]) * 99).round().long()
    assert (lead == torch.arange(-99, 1)).all()
    part = next(cases(dataset, "test", 100, (-99, -5, 0), 4))
    assert torch.allclose(part.batch.query.time - part.batch.context.time[:, -1:], torch.tensor([[-99.0, -5, 0]]).double() / 99)
    value = part.batch.query.value[:, :, 0].numpy() * np.array(dataset.info.std) + np.array(dataset.info.mean)  # type: ignore[index]
    frame = dataset["cases/frame"][part.index][:, None] + np.array([-99, -5, 0])
    assert np.allclose(value, dataset["truth/value"][frame, 0], atol=1e-5)
    assert np.isinf(part.distance[:, 1]).all()  # nothing was observed then
    assert (part.distance[:, [0, 2]] == 0).all()


def test_what_is_reported_can_be_asked_for(ingested: Path) -> None:
    """Without the truth a model learns from the noisy values of dropped frames."""
    batch = TrainingBatches(made(ingested, irregular=True), Windows(**WINDOWS, drop=0.4), 0)[0]
    assert (batch.query.mask.sum((1, 2)) == 10).all()
    assert (batch.context.mask.sum((1, 2)) < 10).any()
    dropped = batch.query.mask & ~batch.context.mask
    assert dropped.any()


# The floor ----------------------------------------------------------------------------------------------------------------------------


def test_linear_interpolation_is_the_floor_and_is_scored_at_unobserved_frames(ingested: Path) -> None:
    dataset = made(ingested)
    floor = LinearTime(LinearTime.Config(), dataset.info)
    floor.fit([TrainingBatches(dataset, Windows(**WINDOWS, query_points=1), 0)[0]])
    leads = (-96, -50, -6, 0)
    what = {"role": "baseline", "kind": "interpolation", "tasks": sorted(floor.tasks), "context_frames": 100}
    table, examples, _ = evaluate.score(dataset, floor, 100, "interpolation", what, evaluate.Params(leads=leads, batch=3))
    assert set(table.rows.loc[table.rows["lead"] < -1e-9, "stratum"]) == {"between", "field"}
    assert set(table.rows.loc[table.rows["lead"] == 0, "stratum"]) == {"context", "field"}
    assert set(table.rows.loc[table.rows["stratum"] == "between", "task"]) == {"interpolation"}
    assert examples["lead"].min() == pytest.approx(-96 / 99)
    first = dataset["cases/frame"][dataset["cases/split"] == sensors.TEST] - 99
    errors = []
    for start in first:
        rows = slice(*dataset["frame/obs_start"][[start, start + 100]])
        known = np.arange(0, 100, 11)
        line = np.stack([np.interp(99 + np.array(leads[:3]), known, dataset["obs/value"][rows, c]) for c in (0, 1)], -1)
        errors.append((line - dataset["truth/value"][start + 99 + np.array(leads[:3]), 0]) ** 2)
    expected = np.mean(errors, axis=(0, 1))
    for name, value in zip(spirals.VARIABLES, expected, strict=True):
        found = table.select(metric="mse", variable=name, stratum="between")["value"]
        assert found.mean() == pytest.approx(value, rel=1e-4)
        assert f"MSE {found.mean():.4g} ({name}, between)" in evaluate.overall(table)
    assert [line.partition(":")[0] for line in verdict.headline(table)] == [
        f"Interpolation of {name} at grid points without a sensor" for name in spirals.VARIABLES
    ]  # no forecast was scored, and none is spoken of
    part = next(cases(dataset, "test", 100, leads, 4))
    prediction = floor.predict(part.batch.context, part.batch.query)
    assert prediction.scale is not None
    assert (prediction.scale > 0).all()
