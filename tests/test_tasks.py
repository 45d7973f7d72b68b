"""Tasks of neural processes: draws against their kernels, the oracle against Gaussian algebra, an epidemic against its rules, and the way
from the simulation to a score table whose floor is the oracle."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import norm

from pipeline import (
    baselines,
    epidemic,
    evaluate,
    gaussian_process,
    oracle,
    params,
    scores,
    sensors,
    simulate,
    subsample,
    trajectories,
    validate,
)
from pipeline.batches import TrainingBatches, Windows
from pipeline.cases import CONTEXT_SENSOR, HELD_SENSOR, cases
from pipeline.gaussian_process import Process, great_circle, rotated
from tests import worlds

COUNTS = {"trajectories": 32, "validation_trajectories": 8, "test_trajectories": 48, "seed": 5}
PLANE = {"equation": "gaussian_process", "kernel": "rbf", "points": 48, "boxes": [[-2, 2]], "group": 4, **COUNTS}
RULES = ("unique", "no_empty_frame", "no_missing_cells", "in_range", "not_frozen", "no_jump", "steady_steps", "daily_cycle")
GATE = {"kind": "field", "jump": 3, "rules": {name: {"severity": "block" if name == "in_range" else "warn"} for name in RULES}}


def section(**changes: Any) -> Any:
    return params.validated({**PLANE, **changes}, simulate.params_model("gp"), "simulate.gp")


# Gaussian processes -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": "rbf", "boxes": [[-0.5, 0.5], [-1.5, 1.5]]},
        {"kernel": "sphere", "boxes": [[-10, 10]], "rotation": [60, 30, 20]},
        {"kernel": "gneiting", "boxes": [[-0.2, 0.2]], "frames": 3},
    ],
)
def test_draws_have_the_mean_and_covariance_of_their_kernel(changes: dict[str, Any]) -> None:
    """4000 draws that share points and kernel: their moments are the process's within what chance allows."""
    many = 4000
    p = section(points=8, group=many, trajectories=many, validation_trajectories=0, test_trajectories=0, **changes)
    found = gaussian_process.solve(p, trajectories.seeds(p))
    values = found["signal"].reshape(many, -1).astype("f8")
    assert (found["x"] == found["x"][0]).all()
    time = np.repeat(np.linspace(0, 1, p.frames) if p.frames > 1 else [0.0], 8)
    place = np.column_stack([np.tile(np.stack([found["x"][0], found["y"][0]], 1), (p.frames, 1)), time])
    process = Process(p.kernel, gaussian_process.draw(p, 5), p.jitter)
    expected = process.covariance(place, place) + process.nugget * np.eye(len(place))
    error = np.cov(values.T, bias=True) - expected
    spread = np.sqrt((expected**2 + np.outer(np.diag(expected), np.diag(expected))) / many)
    assert np.abs(error / spread).max() < 4.5
    assert np.abs((values.mean(axis=0) - process.mean(place)) / np.sqrt(np.diag(expected) / many)).max() < 4
    assert np.linalg.eigvalsh(expected).min() > 0


def test_a_task_does_not_depend_on_which_are_solved_with_it() -> None:
    p = section()
    seeds = trajectories.seeds(p)
    whole = gaussian_process.solve(p, seeds)
    for cut in (slice(3, 7), slice(30, 90)):
        apart = gaussian_process.solve(p, seeds[cut])
        assert all(np.array_equal(apart[name], whole[name][cut]) for name in whole)
    drawn = [gaussian_process.draw(p, int(seed))["length_scale"] for seed in seeds]
    assert [len(set(drawn[i : i + 4])) for i in range(0, len(drawn), 4)] == [1] * 20
    assert len(set(drawn)) == 20


def test_length_scales_follow_their_priors() -> None:
    """Beta(3, 7) has mean 0.3 and variance 0.021 / 1.1; InvGamma(3, 30) has mean 15 and median 30 / 2.674."""
    plane, sphere = ([gaussian_process.draw(section(kernel=k, group=1), s)["length_scale"] for s in range(4000)] for k in ("rbf", "sphere"))
    assert np.mean(plane) == pytest.approx(0.3, abs=4 * np.std(plane) / 4000**0.5)
    assert np.var(plane) == pytest.approx(0.21 / 11, rel=0.1)
    assert np.median(sphere) == pytest.approx(30 / 2.674, rel=0.05)


def test_a_rotation_of_the_sphere_keeps_all_distances() -> None:
    place = np.random.default_rng(0).uniform(-10, 10, (20, 2))
    turned = rotated(place, (60, 30, 20))
    np.testing.assert_allclose(great_circle(turned, turned), great_circle(place, place), atol=1e-8)
    assert np.linalg.norm(turned - place, axis=1).min() > 30
    assert great_circle(np.array([[0.0, 0.0]]), np.array([[90.0, 0.0], [0.0, 45.0], [180.0, 0.0]]))[0].tolist() == pytest.approx(
        [90, 45, 180]
    )


@pytest.mark.parametrize("kernel", ["rbf", "gneiting"])
def test_the_conditional_is_that_of_the_joint_normal(kernel: str) -> None:
    p = section(kernel=kernel)
    process = Process(kernel, gaussian_process.draw(p, 7), p.jitter)
    rng = np.random.default_rng(1)
    place, value, noise = np.column_stack([rng.uniform(-0.3, 0.3, (9, 2)), rng.uniform(0, 1, 9)]), rng.normal(size=6), 0.1
    joint = process.covariance(place, place) + process.nugget * np.eye(9)
    seen = joint[:6, :6] + noise**2 * np.eye(6)
    gain = joint[6:, :6] @ np.linalg.inv(seen)
    mean, std = process.given(place[:6], value, place[6:], noise)
    np.testing.assert_allclose(mean, process.mean(place[6:]) + gain @ (value - process.mean(place[:6])), rtol=1e-9)
    np.testing.assert_allclose(std**2, np.diag(joint[6:, 6:] - gain @ joint[:6, 6:]), rtol=1e-7)
    empty = process.given(place[:0], value[:0], place[6:])
    np.testing.assert_allclose(empty[0], process.mean(place[6:]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": 9, "boxes": [[0, 1], [0, 2]]}, "points must be a multiple of the 2 boxes"),
        ({"frames": 2}, "kernel rbf knows no time"),
        ({"rotation": [1, 0, 0]}, "rotation is for kernel sphere"),
        ({"trajectories": 33}, "trajectories must be multiples of group 4"),
    ],
)
def test_wrong_parameters_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(params.ParamsError, match=message):
        section(**change)


# The epidemic -------------------------------------------------------------------------------------------------------------------------


def test_an_epidemic_obeys_its_rules() -> None:
    """Cells only go from susceptible to infected to recovered, one step at a time; nobody falls ill out of reach of an infected cell."""
    p = params.validated({"equation": "epidemic", "grid": 32, "frames": 20, **COUNTS}, simulate.params_model("sir"), "simulate.sir")
    seeds = trajectories.seeds(p)[:20]
    found = epidemic.solve(p, seeds)
    stacked = np.stack([found[name] for name in epidemic.VARIABLES])
    assert (stacked.sum(axis=0) == 1).all()
    state = stacked.argmax(axis=0)
    step = np.diff(state, axis=1)
    assert set(np.unique(step)) == {0, 1}
    assert set((state[:, 0] == 1).sum(axis=(1, 2))) <= {1, 2, 3, 4}
    assert (state[:, -1] == 2).any()
    for one in state:
        for before, after in pairwise(one):
            ill = np.argwhere(before == 1)
            new = np.argwhere((before == 0) & (after == 1))
            reach = np.abs(new[:, None] - ill[None]).max(axis=-1).min(axis=1, initial=99)
            assert (reach <= 4).all()


def test_recovery_and_infection_have_their_stated_chance() -> None:
    """Counted over many epidemics: recoveries against gamma, and infections against beta times the sum of d^-2, written out by hand."""
    p = params.validated({"equation": "epidemic", "grid": 16, "frames": 12, **COUNTS}, simulate.params_model("sir"), "simulate.sir")
    offsets = [(i, j) for i in range(-4, 5) for j in range(-4, 5) if i or j]
    count, expected, variance = np.zeros(2), np.zeros(2), np.zeros(2)
    for seed in range(60):
        beta, gamma = epidemic.rates_of(seed)
        one = epidemic.solve(p, np.array([seed]))
        s, i, r = (one[name][0].astype(bool) for name in epidemic.VARIABLES)
        for t in range(11):
            padded = np.pad(i[t], 4)
            pressure = sum(padded[4 + a : 20 + a, 4 + b : 20 + b] / (a * a + b * b) for a, b in offsets)
            for k, (free, gone, chance) in enumerate(
                [(s[t], i[t + 1], np.minimum(beta * pressure, 1)), (i[t], r[t + 1], np.full((16, 16), min(gamma, 1)))]
            ):
                count[k] += (free & gone).sum()
                expected[k] += chance[free].sum()
                variance[k] += (chance * (1 - chance))[free].sum()
    assert np.abs((count - expected) / np.sqrt(variance)).max() < 4


# From the simulation to scores --------------------------------------------------------------------------------------------------------


def made(folder: Path, simulation: dict[str, Any], **changes: Any) -> sensors.SensorDataset:
    """The sensor dataset of a simulation, through the stages."""
    if not (folder / "field").exists():
        simulate.run(params.validated(simulation, simulate.params_model("gp"), "simulate.gp"), "gp", out=folder / "field")
        validate.run(
            params.validated(GATE, validate.params_model("gp"), "validate.gp"), "gp", ingested=folder / "field", out=folder / "checked"
        )
    settings = {
        "source": "gp",
        "variables": ["signal"],
        "cases": {},
        "scale": {"mean": [0], "std": [1], "centre": [0, 0], "half_extent": 1},
    }
    tasks = {"context": [8, 24], "query": 16, "noise": 0.1}
    model = params.validated({**settings, "tasks": tasks, **changes}, subsample.Subsample, "subsample.gp")
    subsample.run(model, "gp", ingested=folder / "field", checked=folder / "checked", out=folder / "gp.zarr")
    return sensors.read(folder / "gp.zarr")


@pytest.fixture(scope="module")
def plane(tmp_path_factory: pytest.TempPathFactory) -> sensors.SensorDataset:
    return made(tmp_path_factory.mktemp("gp"), PLANE)


def test_training_frames_keep_all_points_and_the_others_a_frozen_draw(plane: sensors.SensorDataset) -> None:
    start, split = plane["frame/obs_start"], plane["frame/split"]
    truth = gaussian_process.solve(section(), trajectories.seeds(section()))
    role, noise = plane["obs/role"], []
    for frame in range(plane.n_frames):
        rows = slice(start[frame], start[frame + 1])
        place = {tuple(p): v for p, v in zip(np.stack([truth["x"][frame], truth["y"][frame]], 1), truth["signal"][frame, 0], strict=True)}
        exact = np.array([place[tuple(p)] for p in plane["obs/position"][rows]])
        error, seen = plane["obs/value"][rows, 0] - exact, role[rows] == sensors.SEEN
        assert (error[~seen] == 0).all()
        if split[frame] == sensors.TRAIN:
            assert seen.all()
            assert len(seen) == 48
            assert (error == 0).all()
        else:
            assert 8 <= seen.sum() < 24
            assert (~seen).sum() == 16
            noise.append(error[seen])
    assert np.std(np.concatenate(noise)) == pytest.approx(0.1, rel=0.1)
    assert plane["trajectory/parameter"][:, 0].tolist() == [
        gaussian_process.draw(section(), int(s))["length_scale"] for s in trajectories.seeds(section())
    ]
    assert (plane.info.mean, plane.info.std, plane.info.half_extent) == ((0,), (1,), 1)


def test_cases_ask_what_is_held_out_and_show_the_rest(plane: sensors.SensorDataset) -> None:
    seen = 0
    for part in cases(plane, "test", 1, [0], 7):
        context, query = part.batch.context, part.batch.query
        assert (query.mask.sum(-1) == 16).all()
        assert (part.kind[query.mask.numpy()] == HELD_SENSOR).all()
        frame = plane["cases/frame"][part.index]
        count = [(plane["obs/role"][plane["frame/obs_start"][f] : plane["frame/obs_start"][f + 1]] == sensors.SEEN).sum() for f in frame]
        assert context.mask[:, 0].sum(-1).tolist() == count
        near = np.linalg.norm(query.position[0, 0, :, None].numpy() - context.position[0, 0, : count[0]].numpy(), axis=-1).min(axis=1)
        np.testing.assert_allclose(part.distance[0, 0], near, rtol=1e-5)
        seen += len(part.index)
    assert seen == 48


def test_windows_part_a_frame_at_random(plane: sensors.SensorDataset) -> None:
    """Context and questions are disjoint, all from one frame, of the sizes asked for; noise is on the context alone."""
    w = Windows(max_lead=0, batch=16, context_points=(8, 24), query_points=20, context_noise=0.1)
    batches = TrainingBatches(plane, w, 0)
    sizes: list[int] = []
    errors = []
    for step in range(12):
        batch = batches[step]
        sizes += batch.context.mask[:, 0].sum(-1).tolist()
        assert (batch.query.mask.sum(-1) == 20).all()
        for b in range(16):
            place = [p.position[b, 0][p.mask[b, 0]].numpy() for p in (batch.context, batch.query)]
            value = [p.value[b, 0][p.mask[b, 0]].numpy() for p in (batch.context, batch.query)]  # type: ignore[index]
            assert not {map(tuple, place[0])} & {map(tuple, place[1])}
            assert len({tuple(p) for p in np.concatenate(place)}) == len(place[0]) + 20
            owner = next(f for f in range(24) if (plane["obs/position"][f * 48 : f * 48 + 48] == place[1][0]).all(axis=1).any() and
                         (np.abs(plane["obs/value"][f * 48 : f * 48 + 48] - value[1][0]) < 1e-6).any())  # fmt: skip
            exact = {
                tuple(p): v
                for p, v in zip(
                    plane["obs/position"][owner * 48 : owner * 48 + 48], plane["obs/value"][owner * 48 : owner * 48 + 48, 0], strict=True
                )
            }
            assert [exact[tuple(p)] for p in place[1]] == value[1][:, 0].tolist()
            errors.append(value[0][:, 0] - [exact[tuple(p)] for p in place[0]])
        assert (batch.context.value[~batch.context.mask] == 0).all()  # type: ignore[index]
    assert set(sizes) <= set(range(8, 24))
    assert len(set(sizes)) > 12
    assert np.std(np.concatenate(errors)) == pytest.approx(0.1, rel=0.1)
    one, other = batches[3], TrainingBatches(plane, w, 0)[3]
    assert (one.context.value == other.context.value).all()  # type: ignore[union-attr]
    assert TrainingBatches(plane, w.model_copy(update={"query_points": None}), 0)[0].query.mask.sum(-1).max() > 24


def test_the_oracle_is_the_floor_of_the_score_table(plane: sensors.SensorDataset, tmp_path: Path) -> None:
    sensors.write(tmp_path / "gp.zarr", plane)
    windows = {"max_lead": 0, "batch": 16, "context_points": [8, 24], "query_points": 16, "context_noise": 0.1}
    smooth = {"covariance": "matern52", "exact": False}
    fit = {"steps": 10, "windows": windows, "fit": {"climatology": {}, "kriging": {"config": smooth}}}
    fitted = params.validated(fit, baselines.params_model("gp"), "baselines.gp")
    baselines.run(fitted, "gp", sensors=tmp_path / "gp.zarr", out=tmp_path / "runs")
    how = evaluate.Params(leads=(0,), batch=8, bootstrap={"draws": 100, "run": 1, "seed": 0})
    evaluate.run(how, "gp", "baselines", sensors=tmp_path / "gp.zarr", run=tmp_path / "runs", out=tmp_path / "scores")
    table = scores.read(tmp_path / "scores")
    nll = table.select(metric="nll", stratum="held_out").set_index("model")["value"]
    assert nll["oracle"] < nll["kriging"] < nll["climatology"]
    # The oracle's own numbers, from the tasks themselves.
    part = next(cases(plane, "test", 1, [0], 48))
    total = []
    for b, i in enumerate(part.index):
        seen, asked = part.batch.context.mask[b, 0], part.batch.query.mask[b, 0]
        place = [
            np.pad(f.position[b, 0][m].double().numpy(), ((0, 0), (0, 1)))
            for f, m in ((part.batch.context, seen), (part.batch.query, asked))
        ]
        process = Process("rbf", {"length_scale": plane["trajectory/parameter"][plane["cases/frame"][i], 0]}, 1e-5)
        mean, std = process.given(place[0], part.batch.context.value[b, 0, seen, 0].double().numpy(), place[1], 0.1)  # type: ignore[index]
        total.append(-norm.logpdf(part.batch.query.value[b, 0, asked, 0].double().numpy(), mean, std))  # type: ignore[index]
    assert nll["oracle"] == pytest.approx(np.mean(total), abs=1e-4)
    coverage = table.select(metric="coverage_90", stratum="held_out", model="oracle")["value"].item()
    assert 0.85 < coverage < 0.95


def test_a_run_is_scored_on_another_dataset_of_its_kind_by_name_and_baselines_on_their_own(
    plane: sensors.SensorDataset, tmp_path: Path
) -> None:
    shifted = replace(plane, info=replace(plane.info, name="gp_shifted"))
    windows = {"max_lead": 0, "batch": 16, "context_points": [8, 24], "query_points": 16}
    for dataset in (plane, shifted):
        name = dataset.info.name
        sensors.write(tmp_path / f"{name}.zarr", dataset)
        fitted = params.validated(
            {"steps": 4, "windows": windows, "fit": {"climatology": {}}}, baselines.params_model(name), f"baselines.{name}"
        )
        baselines.run(fitted, name, sensors=tmp_path / f"{name}.zarr", out=tmp_path / name)
    how = evaluate.Params(leads=(0,), batch=8, bootstrap={"draws": 100, "run": 1, "seed": 0})
    agreed = how.model_copy(update={"trained_on": plane.info.name})
    place = tmp_path / "gp_shifted.zarr"
    run = tmp_path / plane.info.name / "climatology"
    with pytest.raises(ValueError, match=f"name: checkpoint has '{plane.info.name}', data has 'gp_shifted'"):
        evaluate.run(how, "gp_shifted", "some_model", sensors=place, run=run, out=tmp_path / "scores")
    evaluate.run(agreed, "gp_shifted", "some_model", sensors=place, run=run, out=tmp_path / "scores")
    assert scores.read(tmp_path / "scores").about["dataset"] == "gp_shifted"
    evaluate.run(agreed, "gp_shifted", "baselines", sensors=place, run=tmp_path / "gp_shifted", out=tmp_path / "floors")
    assert set(scores.read(tmp_path / "floors").about["models"]) == {"climatology", "oracle"}


SPACE_AND_TIME = {**PLANE, "kernel": "gneiting", "boxes": [[-1, 1]], "frames": 6, "points": 24}


def test_the_oracle_knows_as_many_frames_as_any_baseline(tmp_path: Path) -> None:
    dataset = made(tmp_path, SPACE_AND_TIME, tasks={"context": [4, 9]}, cases={"horizon": 1}, scale={})
    (tmp_path / "runs").mkdir()
    for name, frames in (("long", 4), ("short", 1)):  # the one with less context is scored last
        windows = {"context_frames": frames, "max_lead": 1, "batch": 8, "context_points": [4, 9]}
        fit = {"steps": 1, "windows": windows, "fit": {"climatology": {}}}
        fitted = params.validated(fit, baselines.params_model("gp"), "baselines.gp")
        baselines.run(fitted, "gp", sensors=tmp_path / "gp.zarr", out=tmp_path / name)
        (tmp_path / name / "climatology").rename(tmp_path / "runs" / name)
    how = evaluate.Params(leads=(1,), batch=8, cases=8, bootstrap={"draws": 100, "run": 1, "seed": 0})
    evaluate.run(how, "gp", "baselines", sensors=tmp_path / "gp.zarr", run=tmp_path / "runs", out=tmp_path / "scores")
    table = scores.read(tmp_path / "scores")
    assert table.about["models"]["oracle"]["context_frames"] == 4
    found = table.select(metric="nll", stratum="held_out", model="oracle")["value"].item()
    truth = oracle.of_dataset(dataset)
    assert truth is not None
    by_frames = {n: evaluate.score(dataset, truth, n, "oracle", {"role": "baseline"}, how)[0] for n in (1, 4)}
    nll = {n: one.select(metric="nll", stratum="held_out")["value"].item() for n, one in by_frames.items()}
    assert found == nll[4] < nll[1]


def test_space_and_time_tasks_ask_the_next_frame(tmp_path: Path) -> None:
    dataset = made(tmp_path, SPACE_AND_TIME, tasks={"context": [4, 9]}, cases={"horizon": 1}, scale={})
    assert dataset.n_frames == 80 * 6
    assert dataset["trajectory/parameter"].shape == (80, 9)
    part = next(cases(dataset, "test", 4, [1], 8))
    assert ((part.batch.query.mask.sum(-1) <= 20) & (part.batch.query.mask.sum(-1) >= 16)).all()
    assert part.batch.context.mask.shape[1] == 4
    assert (part.batch.query.time > part.batch.context.time[:, -1:]).all()
    batch = TrainingBatches(dataset, Windows(context_frames=4, max_lead=1, batch=8, context_points=(4, 9), query_frames=2), 0)[0]
    assert batch.context.mask.sum(-1).min() >= 4
    assert batch.context.mask.sum(-1).max() < 9
    assert (batch.query.mask[:, 1].sum(-1) == 24).all()
    assert (batch.query.mask[:, 0].sum(-1) + batch.context.mask[:, 3].sum(-1) == 24).all()


def test_an_epidemic_asks_context_cells_too(tmp_path: Path) -> None:
    simulation = {"equation": "epidemic", "grid": 12, "frames": 5, **COUNTS}
    tasks = {"context": [20, 40], "query": 60, "ask_context": True}
    dataset = made(tmp_path, simulation, variables=list(epidemic.VARIABLES), tasks=tasks, scale={"mean": [0] * 3, "std": [1] * 3})
    part = next(cases(dataset, "test", 1, [0], 8))
    assert (part.batch.query.mask.sum(-1) == 60).all()
    own = (part.kind == CONTEXT_SENSOR) & part.batch.query.mask.numpy()
    assert own.sum(-1).tolist() == part.batch.context.mask.sum(-1).tolist()
    assert (part.distance[own] == 0).all()
    assert np.isin(part.batch.query.value.numpy(), [0, 1]).all()  # type: ignore[union-attr]


def test_held_out_readings_of_moving_sensors_are_never_seen() -> None:
    """Any dataset may hold single observations back: here a third of what moving sensors read in the test frames."""
    waves = worlds.waves()
    frame = np.repeat(np.arange(waves.n_frames), np.diff(waves["frame/obs_start"]))
    held = (waves["frame/split"][frame] == sensors.TEST) & (np.random.default_rng(0).random(len(frame)) < 1 / 3)
    arrays = {name: array for name, array in waves.arrays.items() if not name.startswith("truth")}
    arrays |= {"obs/role": np.where(held, sensors.ASKED, sensors.SEEN)}
    dataset = replace(waves, arrays=arrays)
    assert sensors.check(dataset) == []
    poisoned = replace(dataset, arrays={**arrays, "obs/value": np.where(held[:, None], 1e9, arrays["obs/value"])})
    for clean, bad in zip(cases(dataset, "test", 2, [0, 1], 5), cases(poisoned, "test", 2, [0, 1], 5), strict=True):
        assert (clean.batch.context.value == bad.batch.context.value).all()  # type: ignore[union-attr]
        assert (bad.batch.query.value[bad.batch.query.mask] > 1e6).all()  # type: ignore[index]
        target = dataset["cases/frame"][clean.index][:, None] + [0, 1]
        assert clean.batch.query.mask.sum(-1).tolist() == np.bincount(frame[held], minlength=80)[target].tolist()
        assert not np.array_equal(clean.distance[:, 0], clean.distance[:, 1])
    broken = replace(dataset, arrays={**arrays, "obs/role": np.full(len(frame), 3)})
    assert any("obs/role must lie in 0..2, found 3..3" in problem for problem in sensors.check(broken))
