"""ConvCNP: a convolutional conditional neural process, the translation-equivariant peer with an uncertainty.

Paper: Gordon, Bruinsma, Foong, Requeima, Dubois, Turner, "Convolutional Conditional Neural Processes", ICLR 2020, arXiv 1910.13556. Sizes
are those of the baseline in Jenson et al., arXiv 2506.09163: width 128, 8 depthwise-separable residual blocks of 9 x 9, a head of three
layers. That baseline has 16 points per unit of a domain [-2, 2], here 32 per model unit.

    set convolution of the context onto a grid -> residual blocks of depthwise-separable convolutions -> points -> MLP -> Gaussian

`mode: paper`: the grid follows the data, so that a shift of everything on a plane shifts the answers, exactly; a lead is one more constant
channel. `improved`: the grid lies still, so that a fixed sensor always has the same nodes around it, and the lead scales and shifts the
features. On a torus the grid is the torus in both, and a shift by whole cells shifts the answers.

What differs from the paper in both: layer norms of the channels where the baseline has batch norms, so that an answer does not depend on
the batch; points read the grid by interpolation instead of a second set convolution; one kernel length for all channels; frames are
channels, and background, covariates and leads are known (models/gridded.py).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from models.contract import DatasetInfo, Frames
from models.gridded import Gridded, GriddedConfig, Modulation
from models.rasterise import Grid, over_domain


class ConvCnpConfig(GriddedConfig):
    """Settings; the defaults are the baseline's sizes."""

    switches: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"follow": True, "lead_scaling": False},
        "improved": {"follow": False, "lead_scaling": True},
    }

    points_per_unit: int = Field(default=32, ge=2)  # of model length
    follow: bool  # on a plane: the middle of the grid is the middle of the context's bounding box; off: of the domain
    width: int = Field(default=128, ge=1)
    layers: int = Field(default=8, ge=1)
    kernel_size: int = Field(default=9, ge=1)
    head: Literal["mean", "gaussian"] = "gaussian"
    head_layers: int = Field(default=3, ge=1)

    @model_validator(mode="after")
    def _odd(self) -> ConvCnpConfig:
        if self.kernel_size % 2 == 0:
            raise ValueError(f"kernel_size {self.kernel_size} has no middle: expected an odd number")
        if self.kernel_size // 2 > 2 * self.points_per_unit:
            raise ValueError(f"kernel_size {self.kernel_size} is wider than a torus of {2 * self.points_per_unit} nodes")
        return self


class ConvCnp(Gridded):
    Config = ConvCnpConfig
    config: ConvCnpConfig

    def __init__(self, config: ConvCnpConfig, info: DatasetInfo) -> None:
        super().__init__(config, info, 1.0 / config.points_per_unit)
        space, circular = len(info.space), info.period is not None
        self.blocks = nn.ModuleList(Block(config, space, self.lead.width, circular) for _ in range(config.layers))

    def grid(self, context: Frames) -> Grid:
        grid = over_domain(self.log_length, len(self.info.space), 2 * self.config.points_per_unit, self.info.period, self.config.margin)
        if not self.config.follow or grid.period is not None:
            return grid
        return Grid(grid.start + _middle(context).to(grid.start.dtype), grid.step, grid.nodes, grid.period)


class Block(nn.Module):
    """x + depthwise(relu(norm(separable(relu(norm x))))), then a pointwise map. x [R,G,...,G,d]; zeros lie beyond a plane."""

    def __init__(self, config: ConvCnpConfig, space: int, known: int, circular: bool) -> None:
        super().__init__()
        width = config.width
        self.modulation = Modulation(known, width) if config.lead_scaling else None
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.depthwise = nn.ModuleList(Depthwise(width, config.kernel_size, space, circular) for _ in range(2))
        self.pointwise = nn.ModuleList(nn.Linear(width, width) for _ in range(2))

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        if self.modulation is not None:
            x = self.modulation(x, known)
        h = self.pointwise[0](self.depthwise[0](F.relu(self.norms[0](x))))
        h = self.depthwise[1](F.relu(self.norms[1](h)))
        return self.pointwise[1](x + h)


class Depthwise(nn.Module):
    """A convolution of each channel by itself, of features [R,G,...,G,d]."""

    def __init__(self, width: int, size: int, space: int, circular: bool) -> None:
        super().__init__()
        if space > 3:
            raise ValueError(f"space has {space} axes, convolutions know at most 3")
        kind: Any = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[space - 1]
        self.convolution = kind(width, width, size, padding=0 if circular else size // 2, groups=width)
        self.wrap = size // 2 if circular else 0

    def forward(self, x: Tensor) -> Tensor:
        # Wrapped by hand while the channels are last in memory: the gradient of a depthwise convolution takes a third of the time there.
        for axis in range(1, x.ndim - 1) if self.wrap else ():
            x = torch.cat([x.narrow(axis, x.shape[axis] - self.wrap, self.wrap), x, x.narrow(axis, 0, self.wrap)], axis)
        return self.convolution(x.movedim(-1, 1)).movedim(1, -1)


def _middle(context: Frames) -> Tensor:
    """Middle [B,D] of the bounding box of each window's observations, 0 without any."""
    hidden = ~context.mask.unsqueeze(-1)
    high = context.position.masked_fill(hidden, -torch.inf).amax((1, 2))
    low = context.position.masked_fill(hidden, torch.inf).amin((1, 2))
    return torch.where(context.mask.any((1, 2)).unsqueeze(-1), (low + high) / 2, 0)
