"""The rules that hold for every baseline, and the stage that fits them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from models import registry
from models.contract import FieldBatch, Frames
from pipeline import baselines, params, runs, sensors
from tests import worlds
from tests.tiny_baselines import SERVED, SLOW, SMALL, STATIONS, TASKS_OF, asked, batches, fitted, world


@pytest.mark.parametrize(("name", "on"), SERVED)
def test_prediction_is_whole_and_sure_of_something(name: str, on: str) -> None:
    baseline, batch = fitted(name, on), asked(on, name).batch
    prediction = baseline.predict(batch.context, batch.query)
    assert prediction.mean.shape == prediction.scale.shape == batch.query.value.shape
    assert prediction.mean.dtype == prediction.scale.dtype == torch.float32
    assert prediction.mean.isfinite().all()
    assert (prediction.scale > 0).all()
    assert prediction.scale.isfinite().all()
    assert baseline.tasks == TASKS_OF.get(name, {"reconstruction", "interpolation", "forecast"})
    assert baseline.levels == ()


@pytest.mark.parametrize(("name", "on"), SERVED)
def test_what_is_masked_does_not_matter(name: str, on: str) -> None:
    baseline, batch = fitted(name, on), asked(on, name).batch
    context = batch.context
    mask = context.mask.clone()
    mask[:, :, ::3] = False
    clean = replace(context, mask=mask, value=context.value * mask[..., None], covariate=_masked(context.covariate, mask))
    noise = torch.where(mask[..., None], context.value, torch.tensor(float("nan")))
    dirty = replace(clean, value=noise, position=torch.where(mask[..., None], context.position, torch.tensor(7.0)))
    wide = replace(clean, **{field: _padded(getattr(clean, field)) for field in ("position", "value", "mask", "sensor", "covariate")})
    expected = baseline.predict(clean, batch.query)
    for other in (dirty, wide):
        _same(baseline.predict(other, batch.query), expected)


@pytest.mark.parametrize(("name", "on"), SERVED)
def test_order_of_observations_does_not_matter(name: str, on: str) -> None:
    baseline, batch = fitted(name, on), asked(on, name).batch
    order = torch.randperm(batch.context.mask.shape[2], generator=torch.Generator().manual_seed(1))
    shuffled = replace(
        batch.context,
        **{
            field: getattr(batch.context, field)[:, :, order]
            for field in ("position", "value", "mask", "sensor", "covariate")
            if getattr(batch.context, field) is not None
        },
    )
    _same(baseline.predict(shuffled, batch.query), baseline.predict(batch.context, batch.query))


@pytest.mark.parametrize(("name", "on"), SERVED)
def test_answer_does_not_depend_on_what_is_asked_with_it(name: str, on: str) -> None:
    baseline, batch = fitted(name, on), asked(on, name).batch
    whole = baseline.predict(batch.context, batch.query)
    part = baseline.predict(batch.context, batch.query.points(slice(2, 5)))
    assert torch.allclose(part.mean, whole.mean[:, :, 2:5], atol=1e-5)
    assert torch.allclose(part.scale, whole.scale[:, :, 2:5], atol=1e-5)
    alone = FieldBatch(_sample(batch.context, 1), _sample(batch.query, 1))
    _same(baseline.predict(alone.context, alone.query), replace(whole, mean=whole.mean[1:2], scale=whole.scale[1:2]))


@pytest.mark.parametrize(("name", "on"), SERVED)
def test_no_observation_gives_the_climate_and_one_gives_a_number(name: str, on: str) -> None:
    baseline, batch = fitted(name, on), asked(on, name).batch
    empty = replace(batch.context, mask=torch.zeros_like(batch.context.mask))
    prediction = baseline.predict(empty, batch.query)
    assert prediction.mean.isfinite().all()
    if name not in ("climatology", "ridge"):  # these two know more of the climate than its mean
        assert (prediction.mean == 0).all()
        assert (prediction.scale >= 0.99).all()
    one = torch.zeros_like(batch.context.mask)
    one[:, -1, 0] = True
    prediction = baseline.predict(replace(batch.context, mask=one), batch.query)
    assert prediction.mean.isfinite().all()
    assert (prediction.scale > 0).all()


@pytest.mark.parametrize(("name", "on"), SERVED)
def test_state_round_trip_through_a_run_folder(name: str, on: str, tmp_path: Path) -> None:
    baseline, batch = fitted(name, on), asked(on, name).batch
    runs.save(tmp_path / "run", name, baseline.config.model_dump(mode="json"), world(on).info, baseline.state(), 12)
    again = runs.load(tmp_path / "run", world(on).info).predictor
    expected, found = baseline.predict(batch.context, batch.query), again.predict(batch.context, batch.query)
    assert torch.equal(found.mean, expected.mean)
    assert torch.equal(found.scale, expected.scale)


@pytest.mark.parametrize(("name", "on"), SERVED)
def test_fitting_twice_gives_the_same_bytes(name: str, on: str) -> None:
    kind = registry.load(name)
    again = kind(kind.Config(**SMALL.get(name, {})), world(on).info)
    again.fit(iter(batches(on, name in SLOW)))
    first, second = fitted(name, on).state(), again.state()
    assert first.keys() == second.keys() == set(kind.parts)
    for part, value in first.items():
        assert value == second[part] if isinstance(value, str) else torch.equal(value, second[part]), part


@pytest.mark.parametrize("name", registry.BASELINES)
def test_misuse_is_an_error(name: str) -> None:
    kind = registry.load(name)
    with pytest.raises(ValidationError):
        kind.Config(unheard_of=1)
    baseline = kind(kind.Config(), worlds.stations(hours=60).info)
    with pytest.raises(ValueError, match="not fitted"):
        baseline.state()
    with pytest.raises(ValueError, match="missing"):
        baseline.load({"unheard_of": torch.zeros(1)})


# The stage ----------------------------------------------------------------------------------------------------------------------------


def _section(**fit: Any) -> Any:
    raw = {"windows": STATIONS.model_dump(), "steps": 6, "fit": fit}
    return params.validated(raw, baselines.params_model("stations"), "baselines.stations")


def test_stage_writes_a_run_folder_each(tmp_path: Path) -> None:
    sensors.write(tmp_path / "s.zarr", world("stations"))
    section = _section(
        climatology={}, kriging_fitted={"kind": "kriging", "config": {"sigma": "fitted"}}, boosting={"config": SMALL["boosting"]}
    )
    for out in ("a", "b"):
        baselines.run(section, "stations", sensors=tmp_path / "s.zarr", out=tmp_path / out)
    folders = runs.folders(tmp_path / "a")
    assert [folder.name for folder in folders] == ["boosting", "climatology", "kriging_fitted"]
    batch = asked("stations").batch
    for folder in folders:
        run = runs.load(folder, world("stations").info)
        assert run.context_frames == 12
        assert run.predictor.predict(batch.context, batch.query).mean.isfinite().all()
        for path in folder.iterdir():
            assert path.read_bytes() == (tmp_path / "b" / folder.name / path.name).read_bytes(), path
    assert runs.load(folders[2], world("stations").info).predictor.config.sigma == "fitted"


def test_stage_names_the_baseline_that_cannot_serve(tmp_path: Path) -> None:
    sensors.write(tmp_path / "s.zarr", world("stations"))
    with pytest.raises(ValueError, match=r"baseline 'ridge' cannot be fitted to stations: .*query_points"):
        baselines.run(_section(ridge={}), "stations", sensors=tmp_path / "s.zarr", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_stage_params_name_the_offender() -> None:
    with pytest.raises(params.ParamsError, match=r"kriging\.config\.sigmma"):
        _section(kriging={"config": {"sigmma": "own"}})
    with pytest.raises(params.ParamsError, match="expected tags: 'persistence'"):
        _section(krigging={})


# Helpers ------------------------------------------------------------------------------------------------------------------------------


def _masked(x: torch.Tensor | None, mask: torch.Tensor) -> torch.Tensor | None:
    return None if x is None else x * mask[..., None]


def _padded(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else torch.cat([x, torch.zeros_like(x[:, :, :3])], dim=2)


def _sample(x: Frames, number: int) -> Frames:
    return replace(x, **{name: value[number : number + 1] for name, value in vars(x).items() if value is not None})


def _same(found: Any, expected: Any) -> None:
    assert torch.allclose(found.mean, expected.mean, atol=1e-5)
    assert torch.allclose(found.scale, expected.scale, atol=1e-5)
