"""Batch sampling: what a model may see, exact resume, padding, and the frozen cases."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.contract import FieldBatch, FieldPrediction
from pipeline import sensors
from pipeline.batches import TrainingBatches, Windows, anchors, at_points
from pipeline.cases import cases
from pipeline.predict import physical
from pipeline.query_covariates import calendar
from tests import worlds

WAVES, STATIONS = worlds.waves(), worlds.stations()


def same(a: FieldBatch, b: FieldBatch) -> bool:
    def equal(x: object, y: object) -> bool:
        return (x is None and y is None) or torch.equal(x, y)  # type: ignore[arg-type]

    return all(equal(getattr(p, f.name), getattr(q, f.name)) for p, q in ((a.context, b.context), (a.query, b.query)) for f in fields(p))


def changed(dataset: sensors.SensorDataset, **arrays: np.ndarray) -> sensors.SensorDataset:
    return replace(dataset, arrays={**dataset.arrays, **{name.replace("__", "/"): value for name, value in arrays.items()}})


windows = st.builds(
    Windows,
    context_frames=st.integers(1, 5),
    max_lead=st.integers(0, 6),
    batch=st.just(4),
    query_frames=st.integers(1, 3),
    drop=st.sampled_from([0.0, 0.3]),
    hide=st.integers(0, 3),
)


@settings(max_examples=60, deadline=None)
@given(windows, st.integers(0, 2**32), st.integers(0, 10_000))
def test_training_never_depends_on_held_out_sensors_or_other_splits(w: Windows, seed: int, step: int) -> None:
    """Poison every value a model must not learn from: no training batch changes, and none shows the poison."""
    a = STATIONS.arrays
    frame = np.repeat(np.arange(STATIONS.n_frames), np.diff(a["frame/obs_start"]))
    forbidden = (a["frame/split"][frame] != sensors.TRAIN) | (a["sensor/role"][a["obs/sensor"]] != sensors.CONTEXT)
    poisoned = changed(
        STATIONS,
        obs__value=np.where(forbidden[:, None], 1e9, a["obs/value"]),
        obs__covariate=np.where(forbidden[:, None], 1e9, a["obs/covariate"]),
        obs__position=np.where(forbidden[:, None], 1e9, a["obs/position"]),
    )
    assert same(TrainingBatches(STATIONS, w, seed)[step], TrainingBatches(poisoned, w, seed)[step])


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(0, 4), st.sampled_from([None, 2]), st.integers(0, 1000))
def test_windows_of_a_simulation_stay_in_their_trajectory_and_split(context: int, lead: int, groups: int | None, step: int) -> None:
    w = Windows(context_frames=context, max_lead=lead, batch=4, query_points=7, query_frames=2, trajectories=groups)
    test = np.repeat(WAVES["frame/split"] != sensors.TRAIN, np.diff(WAVES["frame/obs_start"]))
    poisoned = changed(
        WAVES,
        obs__value=np.where(test[:, None], 1e9, WAVES["obs/value"]),
        truth__value=np.where((WAVES["frame/split"] != sensors.TRAIN)[:, None, None], 1e9, WAVES["truth/value"]),
    )
    batch = TrainingBatches(poisoned, w, 0)[step]
    assert same(batch, TrainingBatches(WAVES, w, 0)[step])
    assert (batch.query.time <= 9).all()
    assert (batch.query.time >= batch.context.time[:, -1:]).all()
    # All frames of a context and its answers come from one wave: the phase fitted to each sample explains all of it.
    for b in range(4):
        x = torch.cat([batch.context.position[b].flatten(0, 1), batch.query.position[b].flatten(0, 1)]).numpy() * 0.5 + 0.5
        n_context, n_query = batch.context.mask.shape[2], batch.query.mask.shape[2]
        t = np.concatenate([np.repeat(batch.context.time[b].numpy(), n_context), np.repeat(batch.query.time[b].numpy(), n_query)])
        y = torch.cat([batch.context.value[b].flatten(), batch.query.value[b].flatten()]).numpy() * 0.8  # type: ignore[union-attr]
        rest = y - 0.5 * np.cos(2 * np.pi * (x[:, 1] + x[:, 0]))
        angle = 2 * np.pi * (x[:, 0] - 0.1 * t)
        design = np.stack([np.sin(angle), np.cos(angle)], axis=1)
        assert np.abs(design @ np.linalg.lstsq(design, rest, rcond=None)[0] - rest).max() < 1e-4


def test_a_window_crosses_no_border() -> None:
    for dataset, split, t, lead in (
        (WAVES, "train", 3, 4),
        (WAVES, "test", 2, 0),
        (STATIONS, "validation", 5, 24),
        (STATIONS, "train", 1, 0),
    ):
        found = anchors(dataset, split, t, lead)
        code, owner = sensors.SPLITS[split], dataset.trajectory_of(np.arange(dataset.n_frames))
        expected = [
            f
            for f in range(t - 1, dataset.n_frames - lead)
            if len(set(owner[f - t + 1 : f + lead + 1])) == 1 and (dataset["frame/split"][f - t + 1 : f + lead + 1] == code).all()
        ]
        assert found.tolist() == expected
        assert len(found)


def test_a_gap_frame_ends_a_window() -> None:
    split = STATIONS["frame/split"].copy()
    split[50] = sensors.GAP
    found = anchors(changed(STATIONS, frame__split=split), "train", 4, 3)
    assert not set(found.tolist()) & set(range(47, 54))
    assert {46, 54} <= set(found.tolist())


def test_a_step_depends_on_seed_and_number_alone() -> None:
    w = Windows(context_frames=3, max_lead=5, batch=6, drop=0.2, hide=2)
    one, other = TrainingBatches(STATIONS, w, 7), TrainingBatches(STATIONS, w, 7)
    for step in (0, 3, 1, 900):
        one[step]
    assert same(one[41], other[41])
    assert not same(one[41], one[42])
    assert not same(one[41], TrainingBatches(STATIONS, w, 8)[41])


def test_padding_and_hidden_entries_are_zero() -> None:
    batch = TrainingBatches(STATIONS, Windows(context_frames=4, max_lead=3, batch=16, drop=0.4, hide=3), 0)[0]
    for part in (batch.context, batch.query):
        assert part.value is not None
        assert (part.value[~part.mask] == 0).all()
    c = batch.context
    assert (~c.mask).any()
    assert (c.position[~c.mask] == 0).all()
    assert (c.covariate[~c.mask] == 0).all()  # type: ignore[index]
    assert (c.sensor[~c.mask] == -1).all()  # type: ignore[index]
    assert c.time.dtype == torch.float64


def test_dropped_is_asked_and_missing_is_not() -> None:
    """Hiding changes what is seen, never what is known: answers at lead 0 are exactly the sensors that reported."""
    plain = Windows(max_lead=0, batch=32)
    seen = TrainingBatches(STATIONS, plain, 1)[3]
    reported = {(b, int(k)) for b, _, n in seen.context.mask.nonzero().tolist() for k in [seen.context.sensor[b, 0, n]]}  # type: ignore[index]
    assert {(b, int(seen.query.sensor[b, 0, q])) for b, _, q in seen.query.mask.nonzero().tolist()} == reported  # type: ignore[index]
    assert 0 < len(reported) < 32 * 6  # some are missing
    hiding = TrainingBatches(STATIONS, Windows(max_lead=0, batch=400, drop=0.5, hide=5), 1)[3]
    kept = hiding.context.mask.sum() / hiding.query.mask.sum()
    assert 0.2 < kept < 0.4  # 0.5 of the 7/12 that are not hidden on average
    assert (hiding.query.mask.sum(dim=-1) > hiding.context.mask.sum(dim=-1)).any()
    assert (hiding.context.mask.sum(dim=-1) == 0).any()  # a frame where everything is hidden is legal


def test_hidden_sensors_are_hidden_in_all_frames() -> None:
    batch = TrainingBatches(STATIONS, Windows(context_frames=30, max_lead=0, batch=64, hide=4), 0)[0]
    counts = [len(set(batch.context.sensor[b][batch.context.mask[b]].tolist())) for b in range(64)]  # type: ignore[index]
    assert set(counts) == {2, 3, 4, 5, 6}  # of 6 context sensors 0..4 are hidden; in 30 frames every other one reports


@pytest.mark.parametrize("left", [0, 1])
def test_frames_with_no_or_one_sensor(left: int) -> None:
    """Thin out all frames: the batch is whole, masks say what is there."""
    a = STATIONS.arrays
    first = a["frame/obs_start"][:-1]
    keep = np.concatenate([first[f : f + 1][: left if f % 3 else 0] for f in range(STATIONS.n_frames)]).astype(int)
    frame = np.repeat(np.arange(STATIONS.n_frames), np.diff(a["frame/obs_start"]))[keep]
    rows = {name.replace("/", "__"): a[name][keep] for name in ("obs/position", "obs/value", "obs/covariate", "obs/sensor")}
    thin = changed(STATIONS, **rows, frame__obs_start=np.searchsorted(frame, np.arange(STATIONS.n_frames + 1)))
    batch = TrainingBatches(thin, Windows(context_frames=2, max_lead=2, batch=8), 0)[0]
    assert batch.context.mask.shape[:2] == (8, 2)
    assert batch.context.mask.sum(dim=-1).max() <= left
    evaluated = next(cases(thin, "test", 2, [0, 1], 16))
    assert np.isinf(evaluated.distance[~evaluated.batch.context.mask[:, -1].any(dim=-1).numpy()]).all()


def test_training_targets_match_the_dataset() -> None:
    w = Windows(max_lead=6, batch=12, query_frames=2, query_points=20, trajectories=3)
    batch = TrainingBatches(WAVES, w, 0)[2]
    q = batch.query
    assert q.mask.all()
    assert torch.equal(q.position[0], q.position[11])  # one set of questions a batch
    layouts = {tuple(c.flatten().tolist()) for c in batch.context.position}
    assert len(layouts) <= 3
    at = STATIONS.arrays
    batch = TrainingBatches(STATIONS, Windows(max_lead=6, batch=12, query_frames=2), 0)[2]
    assert set(batch.query.sensor.flatten().tolist()) == set(range(6))  # type: ignore[union-attr]
    for b, s, n in batch.query.mask.nonzero()[:40].tolist():
        f = int(np.flatnonzero(at["frame/time"] == batch.query.time[b, s].item())[0])
        rows = slice(at["frame/obs_start"][f], at["frame/obs_start"][f + 1])
        value = at["obs/value"][rows][at["obs/sensor"][rows] == batch.query.sensor[b, s, n].item(), 0]  # type: ignore[index]
        expected = (value - STATIONS.info.mean[0]) / STATIONS.info.std[0]
        assert abs(float(batch.query.value[b, s, n, 0]) - expected.item()) < 1e-5  # type: ignore[index]


def test_leads_are_drawn_evenly_and_without_repeats() -> None:
    batch = TrainingBatches(STATIONS, Windows(max_lead=3, batch=2000, query_frames=2), 0)[0]
    lead = (batch.query.time - batch.context.time[:, -1:]).numpy()
    assert (lead[:, 0] < lead[:, 1]).all()
    share = np.bincount(lead.astype(int).ravel(), minlength=4) / lead.size
    assert np.abs(share - 0.25).max() < 0.03


def test_negative_leads_ask_about_the_frames_of_the_context() -> None:
    w = Windows(context_frames=6, min_lead=-4, max_lead=1, batch=2000, query_frames=2)
    batch = TrainingBatches(STATIONS, w, 0)[0]
    lead = (batch.query.time - batch.context.time[:, -1:]).numpy().astype(int)
    assert (lead[:, 0] < lead[:, 1]).all()
    assert np.abs(np.bincount(lead.ravel() + 4, minlength=6) / lead.size - 1 / 6).max() < 0.03
    for b, s in np.argwhere(lead < 0)[:50]:
        now = batch.context.sensor[b, 5 + lead[b, s]].tolist()  # type: ignore[index]
        for q in batch.query.mask[b, s].nonzero()[:, 0]:
            n = now.index(int(batch.query.sensor[b, s, q]))  # type: ignore[index]
            assert batch.query.value[b, s, q] == batch.context.value[b, 5 + lead[b, s], n]  # type: ignore[index]
    with pytest.raises(ValueError, match="min_lead is -6, but a window of 6 frames begins at -5"):
        Windows(context_frames=6, min_lead=-6, max_lead=0, batch=1)


def test_cases_measure_negative_leads_against_the_frame_asked_for() -> None:
    start = STATIONS["frame/obs_start"]
    part = next(cases(STATIONS, "test", 4, [-3, -1, 0, 2], 8))
    frame = STATIONS["cases/frame"][part.index]
    assert torch.equal(part.batch.query.time - part.batch.context.time[:, -1:], torch.tensor([[-3.0, -1, 0, 2]]).double().expand(8, 4))
    for b in range(8):
        for s, lead in enumerate((-3, -1, 0, 0)):  # from now on it is the newest frame that counts
            rows = slice(*start[[frame[b] + lead, frame[b] + lead + 1]])
            seen = [k for k in STATIONS["obs/sensor"][rows] if STATIONS["sensor/role"][k] == sensors.CONTEXT]
            place = STATIONS["sensor/position"]
            asked = part.batch.query.sensor[b, s].tolist()  # type: ignore[index]
            expected = [np.linalg.norm(place[k] - place[seen], axis=1).min() for k in asked]
            assert np.allclose(part.distance[b, s], expected, atol=1e-4)
    with pytest.raises(ValueError, match="leads must lie after -4, where the context begins"):
        next(cases(STATIONS, "test", 4, [-4], 8))


def test_moving_sensors_are_asked_what_they_reported() -> None:
    moving = replace(
        changed(STATIONS, obs__sensor=np.full(len(STATIONS["obs/value"]), -1)),
        info=replace(STATIONS.info, n_sensors=0),
    )
    batch = TrainingBatches(moving, Windows(max_lead=0, batch=4, drop=0.5), 0)[0]
    assert (batch.query.mask.sum() > batch.context.mask.sum()).all()
    seen = batch.context.mask
    assert torch.equal(batch.context.value[seen], batch.query.value[seen])  # type: ignore[index]


@pytest.mark.parametrize(
    ("dataset", "settings_", "message"),
    [
        (STATIONS, {"query_points": 5}, "no dense truth"),
        (WAVES, {"query_points": 5000}, "only 144 points"),
        (STATIONS, {"hide": 6}, "6 fixed context sensors"),
        (WAVES, {"max_lead": 10}, "11 consecutive frames"),
    ],
)
def test_windows_that_cannot_be(dataset: sensors.SensorDataset, settings_: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingBatches(dataset, Windows(**{"max_lead": 1, "batch": 2, **settings_}), 0)


def test_questions_may_start_after_the_context() -> None:
    batch = TrainingBatches(STATIONS, Windows(context_frames=4, min_lead=2, max_lead=5, batch=3, query_frames=4), 0)[0]
    assert ((batch.query.time - batch.context.time[:, -1:]).numpy() == [2, 3, 4, 5]).all()
    with pytest.raises(ValueError, match="min_lead 3 is above max_lead 2"):
        Windows(min_lead=3, max_lead=2, batch=1)


def test_a_batch_must_hold_whole_groups() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        Windows(max_lead=1, batch=5, trajectories=2)


def test_cases_are_frozen_and_the_same_for_every_context_and_batch_size() -> None:
    leads = [0, 6, 24]
    short = list(cases(STATIONS, "test", 1, leads, 7))
    long = list(cases(STATIONS, "test", 48, leads, 64))

    def joined(parts: list, name: str) -> torch.Tensor:
        return torch.cat([getattr(p.batch.query, name) for p in parts])

    for name in ("position", "mask", "time", "value", "covariate", "sensor"):
        assert torch.equal(joined(short, name), joined(long, name))
    index = np.concatenate([p.index for p in short])
    assert index.tolist() == np.flatnonzero(STATIONS["cases/split"] == sensors.TEST).tolist()
    assert np.concatenate([p.block for p in long]).tolist() == STATIONS["cases/block"][index].tolist()


def test_cases_ask_context_sensors_and_those_held_out_for_the_split() -> None:
    for split, held in (("validation", 6), ("test", 7)):
        part = next(cases(STATIONS, split, 3, [0], 8))
        assert part.batch.query.sensor[0, 0].tolist() == [0, 1, 2, 3, 4, 5, held]  # type: ignore[index]
        assert part.kind[0, 0].tolist() == [0] * 6 + [1]
        assert not {6, 7} & set(part.batch.context.sensor.flatten().tolist())  # type: ignore[union-attr]
        assert (part.distance[:, :, 6] > 0).all()


def test_distance_is_measured_across_the_border_of_a_torus() -> None:
    part = next(cases(WAVES, "test", 2, [0], 1))
    seen = part.batch.context.position[0, -1].numpy() / 2 + 0.5
    asked = part.batch.query.position[0, 0].numpy() / 2 + 0.5
    gap = np.abs(asked[:, None] - seen[None])
    expected = np.linalg.norm(np.minimum(gap, 1 - gap), axis=-1).min(axis=1)
    assert np.abs(part.distance[0] - expected).max() < 1e-6
    assert (part.kind == 2).all()


def test_answers_leave_neither_split_nor_trajectory() -> None:
    for part in cases(WAVES, "test", 1, [0, 5, 9], 8):
        frame = WAVES["cases/frame"][part.index]
        inside = (frame % 10)[:, None] + np.array([0, 5, 9]) < 10
        assert (part.batch.query.mask.numpy() == inside[..., None]).all()
        assert torch.equal(part.batch.query.time, torch.tensor((frame % 10)[:, None] + np.array([0.0, 5, 9])))
    last = list(cases(STATIONS, "validation", 1, [23], 500))[-1]
    known = last.batch.query.mask[:, 0].any(dim=-1).numpy()
    assert (known == (STATIONS["frame/split"][STATIONS["cases/frame"][last.index] + 23] == sensors.VALIDATION)).all()


def test_context_may_reach_back_into_an_earlier_split_but_not_before_the_trajectory() -> None:
    first = next(cases(STATIONS, "test", 5, [0], 1))
    assert first.batch.context.mask.any(dim=-1).all()  # the four frames before belong to validation
    start = next(cases(WAVES, "test", 3, [0], 1))
    assert start.batch.context.mask[0].any(dim=-1).tolist() == [False, False, True]
    assert start.batch.context.time[0].tolist() == [-2.0, -1.0, 0.0]


def test_at_points_carries_time_beyond_the_data() -> None:
    position = np.array([[0.0, 0.0], [20.0, -20.0], [5.0, 5.0]])
    batch = at_points(STATIONS, STATIONS.n_frames - 1, 3, position, [0, 6, 12])
    assert batch.query.value is None
    assert batch.query.position[0, 2].tolist() == [[0, 0], [1, -1], [0.25, 0.25]]
    assert (batch.query.time[0] - batch.context.time[0, -1]).tolist() == [0, 6, 12]
    same_time = next(cases(STATIONS, "test", 3, [0], 1)).batch.query
    assert batch.query.covariate.shape == (1, 3, 3, same_time.covariate.shape[-1])  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"outside 0\.\.399"):
        at_points(STATIONS, 400, 1, position, [0])


def test_calendar_is_the_local_one() -> None:
    info = replace(STATIONS.info, query_covariates=("hour_sin", "hour_cos", "doy_sin", "doy_cos"), utc_offset=5.5)
    hours = (np.datetime64("2020-07-01T18:30") - np.datetime64("1970-01-01")) / np.timedelta64(1, "h")  # midnight of 2 July in India
    found = calendar(info, np.array([hours]))[0]
    assert np.allclose(found[:2], [0, 1], atol=1e-6)
    angle = 2 * np.pi * 183 / 365.2425
    assert np.allclose(found[2:], [np.sin(angle), np.cos(angle)], atol=1e-9)


def test_lazy_truth_and_rows_give_the_same_batches(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    sensors.write(tmp_path / "waves.zarr", WAVES)
    eager = sensors.read(tmp_path / "waves.zarr")
    monkeypatch.setattr(sensors, "_IN_MEMORY_BYTES", 1000)
    lazy = sensors.read(tmp_path / "waves.zarr")
    assert not isinstance(lazy["truth/value"], np.ndarray)
    assert not isinstance(lazy["obs/value"], np.ndarray)
    w = Windows(context_frames=2, max_lead=3, batch=4, query_points=9)
    assert same(TrainingBatches(eager, w, 0)[1], TrainingBatches(lazy, w, 0)[1])
    assert same(next(cases(eager, "test", 2, [0, 3], 4)).batch, next(cases(lazy, "test", 2, [0, 3], 4)).batch)


def test_physical_undoes_the_scaling() -> None:
    info = replace(STATIONS.info, variables=("pm2p5", "pm10"), mean=(10.0, 20.0), std=(2.0, 4.0))
    z = torch.randn(2, 3, 5, 2)
    levels = torch.stack([z - 1, z, z + 1], dim=-1)
    found = physical(FieldPrediction(z, scale=z.abs(), quantiles=levels, samples=z[None]), info)
    expected = z * torch.tensor([2.0, 4.0]) + torch.tensor([10.0, 20.0])
    assert torch.allclose(found.mean, expected)
    assert torch.allclose(found.quantiles[..., 1], expected)  # type: ignore[index]
    assert torch.allclose(found.samples[0], expected)  # type: ignore[index]
    assert torch.allclose(found.scale, z.abs() * torch.tensor([2.0, 4.0]))  # type: ignore[arg-type]
    assert torch.allclose(found.quantiles[..., 2] - found.quantiles[..., 0], 2 * torch.tensor([2.0, 4.0]))  # type: ignore[index]
