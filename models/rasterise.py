"""Between scattered points and regular grids: a set convolution onto the nodes, multilinear interpolation back to any point.

Shapes::

    R rows   N observations   Q points   D space   G nodes of an axis   C channels

The set convolution with a density channel is that of Gordon et al., "Convolutional Conditional Neural Processes", ICLR 2020,
arXiv 1910.13556, section 4. On a torus distances and cells wrap around. Both directions have gradients in everything they are given.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_EPS = 1e-8  # a density below this counts as no observation


@dataclass(frozen=True)
class Grid:
    """The same number of nodes along each axis, in model units: node k of axis d of row r lies at start[r, d] + k * step."""

    start: Tensor  # [R,D], or [1,D] where all rows share it
    step: float
    nodes: int  # G
    period: float | None  # nodes * step on a torus, None on a plane

    @property
    def axes(self) -> Tensor:
        """Coordinates [R,D,G] of the nodes."""
        return self.start.unsqueeze(-1) + self.step * torch.arange(self.nodes, dtype=self.start.dtype, device=self.start.device)

    def repeated(self, times: int) -> Grid:
        """Each row `times` times in a row."""
        return self if len(self.start) == 1 else Grid(self.start.repeat_interleave(times, 0), self.step, self.nodes, self.period)


def over_domain(like: Tensor, space: int, cells: int, period: float | None, margin: float = 0.0) -> Grid:
    """A grid over the whole domain with `cells` cells across [-1, 1]; on a plane at least `margin` beyond it on every side.

    dtype and device are those of `like`. On a torus there is no margin, and the last node is one step before the first.
    """
    step = 2.0 / cells
    beyond = 0 if period is not None else -int(-margin / step // 1)
    start = torch.full((1, space), -1.0 - beyond * step, dtype=like.dtype, device=like.device)
    return Grid(start, step, cells if period is not None else cells + 1 + 2 * beyond, period)


def set_convolution(position: Tensor, value: Tensor, mask: Tensor, grid: Grid, length: Tensor) -> Tensor:
    """Density and kernel-weighted mean [R,G,...,G,1+C] of observations at the nodes.

    density = sum_n k(node - position_n), mean = sum_n k(...) value_n / density, k(d) = exp(-|d|^2 / (2 length^2)); without any observation
    near, both are 0. position [R,N,D]; value [R,N,C]; mask [R,N], what it hides may hold anything; length scalar, in model units.
    """
    hidden = ~mask.unsqueeze(-1)
    position, value = position.masked_fill(hidden, 0), value.masked_fill(hidden, 0)
    away = grid.axes.unsqueeze(1) - position.unsqueeze(-1)  # [R,N,D,G]
    if grid.period is not None:
        away = away - grid.period * (away / grid.period).round()
    # Denormal numbers take ten times as long as others: no product over the axes becomes one.
    faint = math.log(torch.finfo(away.dtype).tiny) / position.shape[-1]
    kernel = (-0.5 * (away / length).square()).clamp(min=faint).exp()
    total = torch.cat([mask.unsqueeze(-1).to(value.dtype), value], -1)  # [R,N,1+C]
    # The kernel is a product over the axes: the last axes are spread out first, then all observations are summed along the first one.
    for axis in range(position.shape[-1] - 1, 0, -1):
        total = kernel[:, :, axis].reshape(*mask.shape, grid.nodes, *[1] * (total.ndim - 2)) * total.unsqueeze(2)
    total = (kernel[:, :, 0].transpose(1, 2) @ total.flatten(2)).unflatten(-1, total.shape[2:])
    density, weighted = total[..., :1], total[..., 1:]
    return torch.cat([density, weighted / (density + _EPS)], -1)


def interpolate(field: Tensor, position: Tensor, grid: Grid) -> Tensor:
    """Multilinear interpolation of a field [R,G,...,G,C] on the grid at position [R,Q,D] -> [R,Q,C].

    On a plane a point outside the grid reads the nearest point on its border.
    """
    rows, space = field.shape[0], position.shape[-1]
    cell = (position - grid.start.unsqueeze(1)) / grid.step
    cell = cell % grid.nodes if grid.period is not None else cell.clamp(0, grid.nodes - 1)
    low = cell.detach().floor().clamp(max=grid.nodes - 1)
    share = cell - low
    # All corners of a cell in one sum: each axis adds a pair of nodes, with their weights, to those of the axes before it.
    node = torch.arange(rows, device=low.device).view(rows, 1, 1)  # [R,Q,corners], of the flattened field
    weight = torch.ones_like(cell[..., :1])
    for axis in range(space):
        pair = low[..., axis : axis + 1].long() + torch.arange(2, device=low.device)
        pair = pair % grid.nodes if grid.period is not None else pair.clamp(max=grid.nodes - 1)
        node = (node.unsqueeze(-1) * grid.nodes + pair.unsqueeze(-2)).flatten(2)
        part = torch.stack([1 - share[..., axis], share[..., axis]], -1)
        weight = (weight.unsqueeze(-1) * part.unsqueeze(-2)).flatten(2)
    flat = field.flatten(0, -2).to(torch.promote_types(field.dtype, weight.dtype))
    read = F.embedding_bag(node.flatten(0, 1), flat, mode="sum", per_sample_weights=weight.flatten(0, 1).to(flat.dtype))
    return read.unflatten(0, position.shape[:2])
