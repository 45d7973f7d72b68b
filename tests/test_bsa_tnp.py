"""BSA-TNP's own promises: invariance, one encoding for all queries, initialisation, heads, modes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy.spatial.transform import Rotation
from torch import Tensor, nn

from models.bsa_tnp import model as bsa_tnp
from models.bsa_tnp.biased_attention import biased_attention, released_ghost
from models.bsa_tnp.model import BsaTnp, KRBlock
from models.contract import DatasetInfo, FieldBatch, Frames
from tests import worlds
from tests.test_model_contract import flat, one, with_background

PLANE = worlds.torus_info(geometry="plane")
SPHERE = worlds.torus_info(geometry="plane", space=("longitude", "latitude"), centre=(20.0, 10.0), half_extent=15.0, position_unit="degree")
TINY: dict[str, Any] = {"width": 8, "heads": 2, "head_width": 4, "blocks": 3, "factor": 2, "space_bases": 3, "time_bases": 2}


def built(info: DatasetInfo = PLANE, fresh: bool = False, double: bool = True, seed: int = 0, **changes: Any) -> BsaTnp:
    """A small model; unless fresh, what starts at zero is drawn and biases are strong, so that answers depend on everything."""
    torch.manual_seed(seed)
    settings = {**TINY, **changes}
    settings.update({f"{axis}_bases": 1 for axis in ("space", "time") if settings.get(axis) == "scalar"})
    model = BsaTnp(BsaTnp.Config(**settings), info).eval()
    model = model.double() if double else model
    with torch.no_grad():
        for name, parameter in [] if fresh else model.named_parameters():
            if not parameter.any():
                parameter.normal_(std=0.3)
            elif ".weights.0" in name:
                parameter.mul_(10)
            elif parameter.ndim == 2 and parameter.shape[0] > 2:
                parameter.mul_(2)
    return model


def moved(batch: FieldBatch, by: float, later: float = 0.0) -> FieldBatch:
    def move(frames: Frames) -> Frames:
        return replace(frames, position=frames.position + by, time=frames.time + later)

    return FieldBatch(move(batch.context), move(batch.query))


def test_the_reference_has_as_many_parameters_as_published() -> None:
    model = BsaTnp(BsaTnp.Config(mode="paper", time_bases=0), PLANE)
    assert sum(p.numel() for p in model.parameters()) == 475_770
    assert [sum(p.numel() for p in block.parameters()) for block in model.blocks] == [66_600] * 6


def test_layers_are_the_published_ones() -> None:
    model = BsaTnp(BsaTnp.Config(mode="paper"), PLANE)
    assert {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    assert {m.approximate for m in model.modules() if isinstance(m, nn.GELU)} == {"tanh"}
    for layer in (m for m in model.modules() if isinstance(m, nn.Linear)):
        weight = layer.weight if layer.in_features >= layer.out_features else layer.weight.T
        torch.testing.assert_close(weight @ weight.T, torch.eye(len(weight)), atol=1e-5, rtol=0)
        assert not layer.bias.any()


@pytest.mark.parametrize("mode", ["paper", "improved"])
@pytest.mark.parametrize("form", ["rbf", "tisa", "scalar", "exponential"])
def test_moving_everything_changes_nothing(mode: str, form: str) -> None:
    batch = worlds.batch(PLANE, t=2, dtype=torch.float64)
    model = built(mode=mode, space=form, time=form)
    expected = flat(model.predict(batch.context, batch.query))
    away = moved(batch, 10.0, later=1000.0)
    torch.testing.assert_close(flat(model.predict(away.context, away.query)), expected, atol=1e-9, rtol=0)
    wider = replace(batch.query, position=batch.query.position * 1.1)
    assert not torch.allclose(flat(model.predict(batch.context, wider)), expected, atol=1e-2)


def test_single_precision_is_enough_for_that() -> None:
    batch = worlds.batch(PLANE)
    model = BsaTnp(BsaTnp.Config(mode="paper"), PLANE)
    away = moved(batch, 10.0)
    expected = flat(model.predict(batch.context, batch.query))
    torch.testing.assert_close(flat(model.predict(away.context, away.query)), expected, atol=1e-5, rtol=0)


def test_embed_gives_invariance_up() -> None:
    batch = worlds.batch(PLANE)
    model = built(embed=True, double=False)
    away = moved(batch, 10.0)
    assert not torch.allclose(model.predict(away.context, away.query).mean, model.predict(batch.context, batch.query).mean, atol=1e-2)


@pytest.mark.parametrize("embed", [False, True])
def test_a_torus_closes(embed: bool) -> None:
    info = worlds.torus_info()
    batch = worlds.batch(info, dtype=torch.float64)
    model = built(info, embed=embed)
    around = FieldBatch(batch.context, replace(batch.query, position=batch.query.position + 2))
    torch.testing.assert_close(flat(model.predict(around.context, around.query)), flat(model.predict(batch.context, batch.query)))


@pytest.mark.parametrize("form", ["rbf", "exponential"])
def test_turning_the_sphere_changes_nothing(form: str) -> None:
    batch = worlds.batch(SPHERE)
    model = built(SPHERE, metric="great_circle", space=form, double=False)

    def turned(frames: Frames) -> Frames:
        degrees = frames.position.double().numpy() * SPHERE.half_extent + np.array(SPHERE.centre)
        lon, lat = np.radians(degrees[..., 0]), np.radians(degrees[..., 1])
        points = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], -1)
        x, y, z = (
            Rotation.from_euler("zyx", [60, 30, 20], degrees=True).apply(points.reshape(-1, 3)).reshape(points.shape).transpose(3, 0, 1, 2)
        )
        degrees = np.degrees(np.stack([np.arctan2(y, x), np.arcsin(z)], -1))
        return replace(frames, position=torch.from_numpy((degrees - np.array(SPHERE.centre)) / SPHERE.half_extent).float())

    before, after = flat(model.predict(batch.context, batch.query)), flat(model.predict(turned(batch.context), turned(batch.query)))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    flat_earth = built(SPHERE, space=form, double=False)
    assert not torch.allclose(flat(flat_earth.predict(turned(batch.context), turned(batch.query))), before, atol=1e-2)


def both_streams(model: BsaTnp, batch: FieldBatch) -> Tensor:
    """The network as it is drawn: queries and context side by side through every block, the last update of the context included."""
    context, query = batch.context, batch.query
    (here, now), (there, then) = model._where(query, context), model._where(context, context)
    there, then = (x.expand(-1, *context.mask.shape[1:], -1).flatten(1, 2) for x in (there, then))
    q, k = model._tokens(query, context, observed=False), model._tokens(context, context, observed=True).flatten(1, 2).unsqueeze(1)
    mask = context.mask.flatten(1)

    def heads(x: Tensor, count: int) -> Tensor:
        return x.unflatten(-1, (count, -1)).movedim(-2, 1)

    for block in model.blocks:
        assert isinstance(block, KRBlock)
        norm = block.norm(k).squeeze(1)

        def stream(x: Tensor, place: Tensor, time: Tensor, block: KRBlock = block, norm: Tensor = norm) -> Tensor:
            q1, k1, v1 = (heads(y, block.heads) for y in (block.query(block.norm(x)), block.key(norm), block.value(norm)))
            ghost = released_ghost(k1.shape[2]) if model.config.softmax_floor else None
            groups = block.groups((place, there), (time, then))
            x = x + block.out(biased_attention(q1, k1, v1, mask, groups, ghost=ghost, backend="dense").movedim(1, -2).flatten(3))
            return x + block.ffn(block.norm_ffn(x))

        q, k = stream(q, here, now), stream(k, there[:, None], then[:, None])
    out: Tensor = model.head(model.norm_head(q))
    return out


@pytest.mark.parametrize("mode", ["paper", "improved"])
@pytest.mark.parametrize("together", [1, 7, 1000])
def test_encoded_once_and_in_chunks_is_the_whole_network(monkeypatch: pytest.MonkeyPatch, mode: str, together: int) -> None:
    info = worlds.stations(hours=60).info
    batch = worlds.batch(info, b=2, t=2, s=3, dtype=torch.float64)
    model = built(info, mode=mode)
    monkeypatch.setattr(bsa_tnp, "_POINTS", together * batch.query.mask[:, :, 0].numel())
    with torch.no_grad():
        mean, scale = model._gaussian(both_streams(model, batch), batch.query)
    found = model.predict(batch.context, batch.query)
    assert found.scale is not None
    torch.testing.assert_close(found.mean, mean, atol=1e-10, rtol=0)
    torch.testing.assert_close(found.scale, scale, atol=1e-10, rtol=0)


def test_training_and_serving_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = worlds.batch(PLANE, dtype=torch.float64)
    asked = []

    def watched(*inputs: Any, backend: Any, **rest: Any) -> Tensor:
        asked.append(backend)
        return biased_attention(*inputs, backend=backend, **rest)

    monkeypatch.setattr(bsa_tnp, "biased_attention", watched)
    model = built(serving="flex")
    mse = model.loss(batch)["mse"]
    assert set(asked) == {"tiled"}
    asked.clear()
    prediction = model.predict(batch.context, batch.query)
    assert set(asked) == {"flex"}
    assert batch.query.value is not None
    torch.testing.assert_close((prediction.mean - batch.query.value)[batch.query.mask].square().mean(), mse)


def test_a_batch_that_shares_its_points_equals_separate_ones() -> None:
    batch = worlds.batch(PLANE, b=3, dtype=torch.float64)
    model = built()
    same = FieldBatch(*(replace(f, position=f.position[:1].expand(3, -1, -1, -1)) for f in (batch.context, batch.query)))
    together = flat(model.predict(same.context, same.query))
    assert model._where(same.context, same.context)[0].shape[0] == 1
    for b in range(3):
        context, query = one(same.context, b), one(same.query, b)
        torch.testing.assert_close(flat(model.predict(context, query)), together[b : b + 1], atol=1e-10, rtol=0)


def test_leads_that_ask_the_same_places_equal_separate_ones() -> None:
    batch = worlds.batch(PLANE, t=2, s=3, dtype=torch.float64)
    query = replace(batch.query, position=batch.query.position[:, :1].expand(-1, 3, -1, -1))
    model = built()
    place, time = model._where(query, batch.context)
    assert (place.shape[1], time.shape[2]) == (1, 1)
    together = flat(model.predict(batch.context, query))
    for s in range(3):
        lead = replace(query, **{name: getattr(query, name)[:, s : s + 1] for name in ("position", "mask", "time", "value")})
        torch.testing.assert_close(flat(model.predict(batch.context, lead)), together[:, s : s + 1], atol=1e-10, rtol=0)


@pytest.mark.parametrize("causal", [False, True])
def test_a_causal_model_never_sees_what_comes_later(causal: bool) -> None:
    batch = worlds.batch(PLANE, t=3, s=1, dtype=torch.float64)
    model = built(causal=causal)
    assert batch.context.value is not None
    value = batch.context.value.clone()
    value[:, -1] += 3
    earlier = replace(batch.query, time=batch.context.time[:, 1:2])
    first, second = (model.predict(replace(batch.context, value=v), earlier).mean for v in (batch.context.value, value))
    assert torch.equal(first, second) == causal
    before = model.predict(batch.context, replace(batch.query, time=batch.context.time[:, :1] - 1))
    assert bool((before.mean == 0).all() and (before.scale == 1).all()) == causal  # type: ignore[union-attr]


def test_the_lead_counts_even_with_one_context_frame() -> None:
    batch = worlds.batch(PLANE, t=1, s=2, dtype=torch.float64)
    twice = replace(batch.query, position=batch.query.position[:, :1].expand(-1, 2, -1, -1))
    differs = {}
    for mode in ("paper", "improved"):
        mean = built(mode=mode).predict(batch.context, twice).mean
        differs[mode] = not torch.allclose(mean[:, 0], mean[:, 1], atol=1e-9)
    assert differs == {"paper": False, "improved": True}
    several = worlds.batch(PLANE, t=3, s=2, dtype=torch.float64)
    twice = replace(several.query, position=several.query.position[:, :1].expand(-1, 2, -1, -1))
    mean = built(mode="paper").predict(several.context, twice).mean
    assert not torch.allclose(mean[:, 0], mean[:, 1], atol=1e-9)


def test_equal_bases_stay_equal_and_spread_ones_do_not() -> None:
    batch = worlds.batch(PLANE, t=2)
    for mode in ("paper", "improved"):
        model = built(mode=mode, double=False, fresh=True).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(4):
            optimizer.zero_grad()
            model.loss(batch)["loss"].backward()
            optimizer.step()
        for block in model.blocks:
            assert isinstance(block, KRBlock)
            for weight in block.space(torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 2)).weights:
                assert torch.equal(weight, weight[:, :1].expand_as(weight)) == (mode == "paper")
            assert not torch.equal(block.space.weights[1], KRBlock(model.config, PLANE).space.weights[1])


@pytest.mark.parametrize("mode", ["paper", "improved"])
def test_hidden_observations_may_hold_anything_in_training_too(mode: str) -> None:
    batch = worlds.batch(PLANE, t=2, dtype=torch.float64)
    model = built(mode=mode)
    gradients = []
    for fill in (0.0, math.nan):
        hidden = ~batch.context.mask[..., None]
        context = replace(
            batch.context, value=batch.context.value.masked_fill(hidden, fill), position=batch.context.position.masked_fill(hidden, fill)  # type: ignore[union-attr]
        )  # fmt: skip
        model.zero_grad()
        model.loss(FieldBatch(context, batch.query))["loss"].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_observed_gives_the_prior_exactly() -> None:
    batch = with_background(worlds.batch(PLANE, dtype=torch.float64))
    batch.context.mask[0] = False
    model = built()
    prediction = model.predict(batch.context, batch.query)
    assert torch.equal(prediction.mean[0], batch.query.background[0])  # type: ignore[index]
    torch.testing.assert_close(prediction.scale[0], batch.query.background_scale[0].expand_as(prediction.scale[0]))  # type: ignore[index]
    assert not torch.equal(prediction.mean[1], batch.query.background[1])  # type: ignore[index]
    bare = replace(batch.query, background=None, background_scale=None)
    prediction = model.predict(batch.context, bare)
    assert not prediction.mean[0].any()
    torch.testing.assert_close(prediction.scale[0], torch.ones_like(prediction.scale[0]))  # type: ignore[index]


def test_the_loss_is_the_negative_log_likelihood() -> None:
    batch = with_background(worlds.batch(PLANE, dtype=torch.float64))
    for mode in ("paper", "improved"):
        model = built(mode=mode)
        prediction = model.predict(batch.context, batch.query)
        assert prediction.scale is not None
        assert (prediction.scale > 0).all()
        density = torch.distributions.Normal(prediction.mean, prediction.scale).log_prob(batch.query.value)
        torch.testing.assert_close(model.loss(batch)["loss"], -density[batch.query.mask].mean())


def test_the_deviation_has_its_floor_and_is_positive_without_one() -> None:
    query = worlds.batch(PLANE, dtype=torch.float64).query
    out = torch.full((*query.mask.shape, 2), -80.0, dtype=torch.float64)
    _, free = built(mode="paper")._gaussian(out, query)
    _, floored = built()._gaussian(out, query)
    assert (free > 0).all()
    torch.testing.assert_close(floored, torch.full_like(floored, 1e-3))


def test_the_token_has_a_column_for_every_covariate_of_either_side() -> None:
    info = replace(PLANE, context_covariates=("t2m", "sp"), query_covariates=("hour", "sp"))
    batch = worlds.batch(info, dtype=torch.float64)
    model = built(info)
    assert model.covariates == ("t2m", "sp", "hour")
    seen: list[Tensor] = []
    model.token.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model.predict(batch.context, batch.query)
    context, query = seen
    assert batch.context.covariate is not None
    assert batch.query.covariate is not None
    known = torch.where(batch.context.mask[..., None], batch.context.covariate, 0)
    torch.testing.assert_close(context[..., 4:7], torch.cat([known, torch.zeros_like(known[..., :1])], -1))
    asked = torch.where(batch.query.mask[..., None], batch.query.covariate, 0)
    torch.testing.assert_close(query[..., 4:7], torch.stack([torch.zeros_like(asked[..., 0]), asked[..., 1], asked[..., 0]], -1))
    with pytest.raises(ValueError, match="the query lacks the covariates hour, sp"):
        model.predict(batch.context, replace(batch.query, covariate=None))


def epidemic(b: int = 4, seed: int = 0) -> tuple[DatasetInfo, FieldBatch]:
    """Three classes in stripes; standardised as any variable is."""
    info = worlds.torus_info(geometry="plane", variables=("a", "b", "c"), mean=(0.2, 0.3, 0.5), std=(0.4, 0.5, 0.5), classes=True)
    batch = worlds.batch(info, b=b, n=30, s=1, seed=seed)

    def classes(frames: Frames) -> Frames:
        state = (frames.position[..., 0] * 1.5 + 1.5).floor().clamp(0, 2).long()
        member = torch.nn.functional.one_hot(state, 3).float()
        value = (member - torch.tensor(info.mean)) / torch.tensor(info.std)
        return replace(frames, value=torch.where(frames.mask[..., None], value, math.nan))

    return info, FieldBatch(classes(batch.context), classes(batch.query))


def test_the_categorical_head_learns_classes() -> None:
    info, batch = epidemic()
    model = built(info, head="categorical", double=False, width=16, zero_head=True)
    with torch.no_grad():
        last = model.head[-1]
        assert isinstance(last, nn.Linear)
        last.weight.zero_()
        last.bias.zero_()

    def chance() -> Tensor:
        prediction = model.predict(batch.context, batch.query)
        assert prediction.probabilities is not None
        assert prediction.scale is None
        torch.testing.assert_close(prediction.mean * torch.tensor(info.std) + torch.tensor(info.mean), prediction.probabilities)
        return prediction.probabilities

    start = model.loss(batch)
    torch.testing.assert_close(start["loss"], torch.tensor(math.log(3)))
    torch.testing.assert_close(chance(), torch.full((4, 1, 15, 3), 1 / 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(batch)["loss"].backward()
        optimizer.step()
    end = model.loss(batch)
    assert end["accuracy"] > 0.9 > start["accuracy"]
    torch.testing.assert_close(chance().sum(-1), torch.ones(4, 1, 15))
    assert batch.query.value is not None
    truth = batch.query.value.nan_to_num(0).argmax(-1, keepdim=True)
    likelihood = chance().gather(-1, truth)[..., 0][batch.query.mask]
    torch.testing.assert_close(-likelihood.log().mean(), end["loss"], atol=1e-5, rtol=0)


def test_classes_and_numbers_are_not_mixed_up() -> None:
    info, batch = epidemic()
    model = built(info, head="categorical", double=False)
    assert batch.query.value is not None
    with pytest.raises(ValueError, match="a, b, c must be classes, a single 1 among zeros; found"):
        model.loss(FieldBatch(batch.context, replace(batch.query, value=batch.query.value + 1)))
    with pytest.raises(ValueError, match="no background"):
        model.predict(batch.context, with_background(batch).query)
    with pytest.raises(ValueError, match="needs variables that are classes, waves has vorticity"):
        built(head="categorical")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"classes": 3}, "Extra inputs"),
        ({"causal": True, "time_bases": 0}, "set time_bases"),
        ({"minimum_std": 1.0}, "below 1"),
        ({"tiles": 4}, "Extra inputs"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        BsaTnp.Config(**settings)


def test_a_sphere_needs_degrees() -> None:
    with pytest.raises(ValueError, match="in degrees, waves has"):
        built(metric="great_circle")


def test_a_query_without_values_cannot_be_trained_on() -> None:
    batch = worlds.batch(PLANE)
    with pytest.raises(ValueError, match="no values"):
        built(double=False).loss(FieldBatch(batch.context, replace(batch.query, value=None)))
