"""SCENT's attention in groups: what a token sees, how groups are drawn, order and padding of sensors, cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from models.contract import Frames
from models.scent.attention import Block, in_groups
from tests.test_model_contract import flat
from tests.tiny_scent import a_batch, built


def test_one_group_is_dense_attention() -> None:
    torch.manual_seed(0)
    layer, x = Block(16, 2, 1).double(), torch.randn(2, 12, 16, dtype=torch.float64)
    mask = torch.ones(2, 12, dtype=torch.bool)
    order = torch.stack([torch.randperm(12), torch.randperm(12)])
    torch.testing.assert_close(in_groups(layer, x, mask, order, 12), layer(x), atol=1e-10, rtol=0)
    torch.testing.assert_close(in_groups(layer, x, mask, None, 12), layer(x), atol=1e-10, rtol=0)


def test_a_token_depends_on_its_group_alone() -> None:
    torch.manual_seed(0)
    layer, x = Block(16, 2, 1).double(), torch.randn(1, 20, 16, dtype=torch.float64)
    mask, order = torch.ones(1, 20, dtype=torch.bool), torch.randperm(20)[None]
    jacobian = torch.autograd.functional.jacobian(lambda x: in_groups(layer, x, mask, order, 6).sum(-1), x)[0, :, 0]  # [out, in, d]
    seen = jacobian.abs().sum(-1) > 0
    groups = [set(part.tolist()) for part in order[0].split(6)]
    assert [len(g) for g in groups] == [6, 6, 6, 2]
    for group in groups:
        for token in group:
            assert set(seen[token].nonzero()[:, 0].tolist()) == group


def test_groups_are_drawn_anew_in_training_and_fixed_outside() -> None:
    model, mask = built(), torch.ones(2, 40, dtype=torch.bool)
    assert torch.equal(model.encoder.cen.order(mask, 0), model.encoder.cen.order(mask, 0))  # type: ignore[arg-type]
    assert not torch.equal(model.encoder.cen.order(mask, 0), model.encoder.cen.order(mask, 1))  # type: ignore[arg-type]
    assert not torch.equal(model.encoder.cen.order(mask, 0), built(permutation_seed=1).encoder.cen.order(mask, 0))  # type: ignore[arg-type]
    model.train()
    first = model.encoder.cen.order(mask, 0)
    assert first is not None
    assert not torch.equal(first, model.encoder.cen.order(mask, 0))  # type: ignore[arg-type]
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first.sort(-1).values, torch.arange(40).expand(2, 40))


def test_fixed_groups_spread_tokens_evenly() -> None:
    """With 4000 tokens in a fixed order, where a token lands is not correlated with where it was."""
    order = built().encoder.cen.order(torch.ones(1, 4000, dtype=torch.bool), 3)
    assert order is not None
    both = torch.stack([order[0].double(), torch.arange(4000, dtype=torch.float64)])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.05


def test_paper_mode_ignores_the_order_of_sensors_in_one_group_only() -> None:
    batch = a_batch(n=20)
    shuffled = batch.context.points(torch.randperm(20, generator=torch.Generator().manual_seed(1)))  # type: ignore[arg-type]

    def difference(**changes: Any) -> float:
        model = built(mode="paper", **changes)
        return float((flat(model.predict(shuffled, batch.query)) - flat(model.predict(batch.context, batch.query))).abs().max())

    assert difference(group=64) < 1e-5
    assert difference(group=8) > 1e-5
    assert difference(group=8, order="canonical") < 1e-10


@pytest.mark.parametrize("group", [4, 7, 64])
def test_padding_changes_nothing_in_paper_mode(group: int) -> None:
    batch = a_batch(n=17, t=2)
    model = built(mode="paper", group=group)
    c = batch.context
    assert c.value is not None
    more = Frames(
        torch.cat([c.position, torch.full((3, 2, 9, 2), 5.0, dtype=torch.float64)], 2),
        torch.cat([c.mask, torch.zeros(3, 2, 9, dtype=torch.bool)], 2),
        c.time,
        torch.cat([c.value, torch.full((3, 2, 9, 1), torch.nan, dtype=torch.float64)], 2),
    )
    torch.testing.assert_close(flat(model.predict(more, batch.query)), flat(model.predict(c, batch.query)), atol=1e-6, rtol=0)


def test_attention_cost_grows_linearly_with_the_sensors() -> None:
    """Products in the score matrices of one CEN block, counted from their shapes."""

    def products(n: int, size: int) -> int:
        layer, count = Block(16, 2, 1), 0

        def hook(_module: torch.nn.Module, given: tuple[torch.Tensor, ...], _out: torch.Tensor) -> None:
            nonlocal count
            x, keys = given[:2]
            count += x.shape[0] * x.shape[1] * keys.shape[1]

        layer.attention.register_forward_hook(hook)
        in_groups(layer, torch.zeros(1, n, 16), torch.ones(1, n, dtype=torch.bool), torch.arange(n)[None] if n > size else None, size)
        return count

    assert [products(n, 8) for n in (64, 128, 256)] == [64 * 8, 128 * 8, 256 * 8]
    assert products(256, 256) == 256 * 256
