"""The convolutional conditional neural process: its symmetry, its sizes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.contract import DatasetInfo, Frames
from models.convcnp.model import ConvCnp, ConvCnpConfig
from tests import worlds

F64 = torch.float64
PLANE = worlds.torus_info(geometry="plane")


def built(info: DatasetInfo, **settings: Any) -> ConvCnp:
    torch.manual_seed(0)
    given = {"horizon": 4, "points_per_unit": 6, "width": 6, "layers": 2, "kernel_size": 3, "head_width": 8, "head_layers": 1, **settings}
    model = ConvCnp(ConvCnpConfig(**given), info).double()
    return worlds.stirred(model)


def moved(frames: Frames, by: list[float]) -> Frames:
    return replace(frames, position=frames.position + torch.tensor(by, dtype=F64))


def test_in_the_paper_a_shift_of_everything_on_a_plane_changes_nothing() -> None:
    batch = worlds.batch(PLANE, dtype=F64)
    shifted = [moved(frames, [10.0, -0.123]) for frames in (batch.context, batch.query)]
    model = built(PLANE, mode="paper")
    here, there = model.predict(batch.context, batch.query), model.predict(*shifted)
    torch.testing.assert_close(there.mean, here.mean)
    torch.testing.assert_close(there.scale, here.scale)
    still = built(PLANE, mode="improved")
    assert not torch.allclose(still.predict(*shifted).mean, still.predict(batch.context, batch.query).mean, atol=1e-3)


@pytest.mark.parametrize("mode", ["paper", "improved"])
def test_on_a_torus_a_shift_by_whole_cells_shifts_the_answers(mode: str) -> None:
    info = worlds.torus_info()
    batch, model = worlds.batch(info, dtype=F64), built(info, mode=mode)
    shifted = [moved(frames, [5 / 6, -2 / 6]) for frames in (batch.context, batch.query)]
    torch.testing.assert_close(model.predict(*shifted).mean, model.predict(batch.context, batch.query).mean)


def test_far_from_all_data_it_knows_only_that_nothing_is_near() -> None:
    batch, model = worlds.batch(PLANE, b=1, n=1, s=1, q=4, dtype=F64), built(PLANE, points_per_unit=12, layers=1)
    context = replace(batch.context, position=torch.full_like(batch.context.position, -0.9))
    far = replace(batch.query, position=torch.tensor([[[[0.9, 0.9], [0.2, 0.5], [0.5, 0.3], [-0.9, 0.9]]]], dtype=F64))
    answer = model.predict(context, far)
    torch.testing.assert_close(answer.mean, answer.mean[:, :, :1].expand_as(answer.mean))
    nothing = model.predict(replace(context, mask=torch.zeros_like(context.mask)), far)
    torch.testing.assert_close(nothing.mean, answer.mean)
    near = model.predict(context, replace(far, position=far.position * 0 - 0.9))
    assert not torch.allclose(near.mean, answer.mean, atol=1e-3)


def test_sizes_of_the_baseline() -> None:
    """8 blocks of two 9 x 9 depthwise convolutions, two pointwise maps and two norms at width 128, and a head of three layers."""
    model = ConvCnp(ConvCnpConfig(horizon=1, mode="paper"), PLANE)
    assert sum(p.numel() for p in model.blocks.parameters()) == 8 * (2 * (128 * 81 + 128) + 2 * (128 * 128 + 128) + 2 * 256) == 436_224
    ends = 1 + (2 * 128 + 128) + 9 * 128 + (130 * 128 + 128) + 2 * (128 * 128 + 128) + (128 * 2 + 2)
    assert sum(p.numel() for p in model.parameters()) == 436_224 + ends


def test_the_grid_has_the_spacing_of_the_baseline() -> None:
    grid = ConvCnp(ConvCnpConfig(horizon=1), worlds.torus_info()).grid(worlds.batch(worlds.torus_info()).context)
    assert (grid.step, grid.nodes) == (1 / 32, 64)


def test_a_kernel_without_a_middle_is_an_error() -> None:
    with pytest.raises(ValueError, match="kernel_size 4 has no middle"):
        ConvCnpConfig(horizon=1, kernel_size=4)
