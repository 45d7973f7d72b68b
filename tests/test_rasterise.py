"""Points onto a grid and back, against direct sums and functions that are known everywhere."""

from __future__ import annotations

import itertools

import pytest
import torch

from models.rasterise import Grid, interpolate, over_domain, set_convolution

F64 = torch.float64


def nodes(grid: Grid) -> torch.Tensor:
    """Positions [G**D,D] of the nodes of the first row."""
    return torch.cartesian_prod(*grid.axes[0]).reshape(-1, grid.start.shape[1])


def points(rows: int, count: int, space: int, seed: int = 0) -> torch.Tensor:
    return 2 * torch.rand(rows, count, space, generator=torch.Generator().manual_seed(seed), dtype=F64) - 1


@pytest.mark.parametrize(("period", "cells"), [(2.0, 12), (None, 7)])
@pytest.mark.parametrize("space", [1, 2, 3])
def test_set_convolution_is_the_direct_sum(space: int, period: float | None, cells: int) -> None:
    grid = over_domain(torch.zeros(1, dtype=F64), space, cells, period, margin=0.3)
    position, length = points(2, 5, space), torch.tensor(0.3, dtype=F64)
    value = torch.arange(20, dtype=F64).reshape(2, 5, 2).cos()
    mask = torch.ones(2, 5, dtype=torch.bool)
    mask[1, 3:] = False
    found = set_convolution(position, value, mask, grid, length).flatten(1, space)
    for r, (k, node) in itertools.product(range(2), enumerate(nodes(grid))):
        away = node - position[r, mask[r]]
        if period is not None:
            away = (away + 1) % period - 1
        weight = (-away.square().sum(-1) / (2 * length**2)).exp()
        mean = (weight[:, None] * value[r, mask[r]]).sum(0) / (weight.sum() + 1e-8)
        torch.testing.assert_close(found[r, k], torch.cat([weight.sum()[None], mean]))


def test_a_torus_has_its_nodes_where_a_simulation_has_them_and_a_plane_reaches_its_margin() -> None:
    torus = over_domain(torch.zeros(1), 2, 64, 2.0)
    torch.testing.assert_close(torus.axes[0, 0], torch.arange(64) / 32 - 1)
    plane = over_domain(torch.zeros(1), 2, 10, None, margin=0.25)
    torch.testing.assert_close(plane.axes[0, 1], torch.linspace(-1.4, 1.4, 15))


@pytest.mark.parametrize("period", [2.0, None])
def test_hidden_observations_leave_no_trace(period: float | None) -> None:
    grid = over_domain(torch.zeros(1), 2, 8, period)
    position, value = torch.full((2, 4, 2), torch.nan), torch.full((2, 4, 1), torch.nan)
    mask = torch.zeros(2, 4, dtype=torch.bool)
    position[0, 0], value[0, 0], mask[0, 0] = 0.1, 5.0, True
    length = torch.tensor(0.3, requires_grad=True)
    out = set_convolution(position, value, mask, grid, length)
    assert out.isfinite().all()
    assert not out[1].any()
    near = int(((nodes(grid) - 0.1).square().sum(-1)).argmin())
    torch.testing.assert_close(out[0].flatten(0, 1)[near, 1], torch.tensor(5.0))
    out.sum().backward()
    assert length.grad is not None
    assert length.grad.isfinite()


@pytest.mark.parametrize("space", [1, 2, 3])
def test_interpolation_is_exact_for_multilinear_functions(space: int) -> None:
    grid = over_domain(torch.zeros(1, dtype=F64), space, 6, None, margin=0.2)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([(1 + x).prod(-1), x.sum(-1) - 2], -1)

    field = function(nodes(grid)).view(1, *[grid.nodes] * space, 2).expand(3, *[-1] * (space + 1))
    asked = points(3, 9, space)
    torch.testing.assert_close(interpolate(field, asked, grid), function(asked))


def test_interpolation_wraps_around_a_torus_and_stops_at_the_border_of_a_plane() -> None:
    torus = over_domain(torch.zeros(1, dtype=F64), 2, 8, 2.0)
    field = torch.randn(1, 8, 8, 1, dtype=F64, generator=torch.Generator().manual_seed(0))
    asked = points(1, 20, 2)
    for shift in ([2.0, 0.0], [-2.0, 4.0]):
        torch.testing.assert_close(interpolate(field, asked + torch.tensor(shift, dtype=F64), torus), interpolate(field, asked, torus))
    between = torch.tensor([[[-1.0 - 0.125, -1.0]]], dtype=F64)  # half-way between the last node and the first
    torch.testing.assert_close(interpolate(field, between, torus)[0, 0], (field[0, -1, 0] + field[0, 0, 0]) / 2)
    plane = over_domain(torch.zeros(1, dtype=F64), 2, 7, None)
    outside = torch.tensor([[[9.0, -9.0]]], dtype=F64)
    torch.testing.assert_close(interpolate(field, outside, plane)[0, 0], field[0, -1, 0])


@pytest.mark.parametrize("period", [2.0, None])
def test_there_and_back_gives_a_smooth_field_again(period: float | None) -> None:
    grid = over_domain(torch.zeros(1, dtype=F64), 2, 32, period)
    position = points(1, 3000, 2)

    def wave(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(torch.pi * x).sum(-1, keepdim=True)

    drawn = set_convolution(position, wave(position), torch.ones(1, 3000, dtype=torch.bool), grid, torch.tensor(0.06, dtype=F64))
    asked = 0.9 * points(1, 200, 2, seed=1)
    error = interpolate(drawn, asked, grid)[..., 1:] - wave(asked)
    assert error.abs().max() < 0.12
    assert error.square().mean().sqrt() < 0.04


def test_gradients_reach_positions_values_and_length() -> None:
    grid = over_domain(torch.zeros(1, dtype=F64), 2, 5, 2.0)
    mask = torch.tensor([[True, True, False]])
    position, value, asked = points(1, 3, 2, seed=3), points(1, 3, 1), points(1, 2, 2, seed=1)

    def there_and_back(position: torch.Tensor, value: torch.Tensor, length: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
        return interpolate(set_convolution(position, value, mask, grid, length), asked, grid)

    inputs = [x.clone().requires_grad_() for x in (position, value, torch.tensor(0.4, dtype=F64), asked)]
    assert torch.autograd.gradcheck(there_and_back, inputs)


def test_each_row_may_have_its_own_grid() -> None:
    start = torch.tensor([[-1.0, -1.0], [4.0, 2.0]], dtype=F64)
    grid = Grid(start, 0.25, 9, None)
    position, value, mask = points(1, 6, 2), points(1, 6, 1), torch.ones(1, 6, dtype=torch.bool)
    both = torch.cat([position, position + start[1] - start[0]])
    drawn = set_convolution(both, value.repeat(2, 1, 1), mask.repeat(2, 1), grid, torch.tensor(0.3, dtype=F64))
    torch.testing.assert_close(drawn[0], drawn[1])
    read = interpolate(drawn.repeat_interleave(2, 0), both.repeat_interleave(2, 0), grid.repeated(2))
    torch.testing.assert_close(read[0], read[3])
