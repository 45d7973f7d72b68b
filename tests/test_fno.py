"""The Fourier neural operator: its layer against transforms written out, its sizes, its symmetries."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from models.contract import DatasetInfo
from models.fno.model import Fno, FnoConfig, SpectralConvolution
from tests import worlds

F64 = torch.float64


def built(info: DatasetInfo, **settings: Any) -> Fno:
    torch.manual_seed(0)
    given = {"horizon": 4, "cells": 16, "width": 6, "modes": 3, "layers": 2, "head_width": 8, **settings}
    model = Fno(FnoConfig(**given), info).double()
    return worlds.stirred(model)


def test_the_spectral_convolution_is_a_matrix_for_each_kept_wave() -> None:
    layer = SpectralConvolution(2, 2, 2).double()
    axis = torch.arange(8, dtype=F64) / 8 * 2 * torch.pi
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    wave = torch.polar(torch.ones_like(x), -2 * y + 1 * x)  # wave number -2 of the first axis, 1 of the last
    start = torch.tensor([0.7 - 0.2j, -0.4 + 1.0j], dtype=torch.complex128)
    matrix = torch.view_as_complex(layer.weight.detach())[-2, 1]
    found = layer((wave[..., None] * start).real[None])[0]
    torch.testing.assert_close(found, (wave[..., None] * (start @ matrix)).real)
    beyond = torch.cos(3 * y + x)[None, ..., None].expand(1, 8, 8, 2)
    torch.testing.assert_close(layer(beyond), torch.zeros_like(beyond))


@pytest.mark.parametrize("space", [1, 2, 3])
def test_the_spectral_convolution_is_the_same_operator_on_any_grid(space: int) -> None:
    layer = SpectralConvolution(3, 2, space).double()

    def on(nodes: int) -> torch.Tensor:
        axes = torch.meshgrid(*[torch.arange(nodes, dtype=F64) / nodes * 2 * torch.pi] * space, indexing="ij")
        x = torch.stack([torch.cos(2 * axes[0] + axes[-1]), torch.sin(axes[-1]), torch.ones_like(axes[0])], -1)
        return layer(x[None])

    coarse = (slice(None), *[slice(None, None, 2)] * space)
    torch.testing.assert_close(on(12)[coarse], on(6))


@pytest.mark.parametrize("mode", ["paper", "improved"])
def test_sizes_of_the_reference(mode: str) -> None:
    model = Fno(FnoConfig(horizon=10, mode=mode), worlds.torus_info())
    count = sum(p.numel() for p in model.parameters())
    spectral = 25 * 13 * 20 * 20 * 2
    ends = 1 + 9 * 20 + (22 * 128 + 128) + 129  # kernel length, lead, hidden layer of the head, head
    if mode == "paper":
        assert count == 4 * (spectral + 420) + (4 * 20 + 20) + ends  # density, value and two coordinates in
    else:
        block = spectral + 420 + (20 * 10 + 10 + 10 * 20 + 20) + 20 + (9 * 40 + 40)
        assert count == 4 * block + (2 * 20 + 20) + ends


def test_a_shift_around_the_torus_shifts_the_answers_unless_coordinates_are_seen() -> None:
    info = worlds.torus_info()
    batch = worlds.batch(info, dtype=F64)
    shift = torch.tensor([3 * 2 / 16, -5 * 2 / 16], dtype=F64)
    moved = [replace(frames, position=(frames.position + shift + 1) % 2 - 1) for frames in (batch.context, batch.query)]
    model = built(info)
    torch.testing.assert_close(model.predict(*moved).mean, model.predict(batch.context, batch.query).mean)
    paper = built(info, mode="paper")
    assert not torch.allclose(paper.predict(*moved).mean, paper.predict(batch.context, batch.query).mean, atol=1e-3)


def test_on_a_plane_one_side_hardly_sees_the_other() -> None:
    info = worlds.torus_info(geometry="plane")
    batch = worlds.batch(info, b=1, n=1, s=1, q=1, dtype=F64)
    left = replace(batch.context, position=torch.tensor([[[[-1.0, 0.0]]]], dtype=F64))
    right = replace(batch.query, position=torch.tensor([[[[1.0, 0.0]]]], dtype=F64))

    def seen(margin: float) -> float:
        """How much the answer on the right depends on the reading on the left, with layers that see near places only."""
        model = built(info, layers=1, modes=7, margin=margin, kernel=0.5)
        number = torch.cat([torch.arange(8), torch.arange(-7, 0)])
        near = (-0.05 * (number[:, None].square() + number[:8].square())).exp()
        with torch.no_grad():
            model.blocks[0].spectral.weight.copy_(torch.stack([near, 0 * near], -1)[..., None, None, :] * torch.eye(6)[..., None])
        value = left.value.clone().requires_grad_()  # type: ignore[union-attr]
        grid, lead = model.grid(left), torch.ones(1, 1, dtype=F64)
        features = model._features(model._rasterised(replace(left, value=value), grid), lead)
        return float(torch.autograd.grad(model._answer(features, grid, right).mean.sum(), value)[0].abs())

    assert seen(0.5) < 0.01 * seen(0.0)


def test_waves_that_the_grid_cannot_hold_are_an_error() -> None:
    with pytest.raises(ValueError, match="modes 8 cannot be told apart on 16 cells: expected at most 7"):
        FnoConfig(horizon=1, cells=16, modes=8)
