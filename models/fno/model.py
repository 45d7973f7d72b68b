"""FNO: a Fourier neural operator on rasterised sensors, the grid model that the others are compared with.

Paper: Li, Kovachki, Azizzadenesheli, Liu, Bhattacharya, Stuart, Anandkumar, "Fourier Neural Operator for Parametric Partial Differential
Equations", ICLR 2021, arXiv 2010.08895. `mode: paper` is its two-dimensional network with pointwise skips and coordinates as input
channels; `improved` adds, as the library neuraloperator does today, a channel MLP with a gated skip to every layer, lets the lead scale
and shift the features, and leaves the coordinates out.

What differs from the paper in both: the input is rasterised from sensors and the output read off at any point (models/gridded.py); one
evaluation gives any lead, where the paper steps from frame to frame or treats time as an axis; an axis keeps the wave numbers
-modes..modes. On a plane the grid goes on beyond the domain, so that one side does not see the other.

Shapes::

    R rows   G nodes of an axis   D space   d width   K kept wave numbers of an axis
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


class FnoConfig(GriddedConfig):
    """Settings; the defaults are the paper's sizes for Navier-Stokes in two dimensions."""

    switches: ClassVar[dict[str, dict[str, Any]]] = {
        "paper": {"channel_mlp": False, "lead_scaling": False, "coordinates": True},
        "improved": {"channel_mlp": True, "lead_scaling": True, "coordinates": False},
    }

    cells: int = Field(default=64, ge=4)  # of the grid across the domain
    width: int = Field(default=20, ge=1)
    layers: int = Field(default=4, ge=1)
    modes: int = Field(default=12, ge=1)  # largest wave number of an axis
    channel_mlp: bool
    coordinates: bool  # as input channels; on a torus they jump where it closes
    head: Literal["mean", "gaussian"] = "mean"
    head_layers: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _resolved(self) -> FnoConfig:
        if 2 * self.modes >= self.cells:
            raise ValueError(f"modes {self.modes} cannot be told apart on {self.cells} cells: expected at most {(self.cells - 1) // 2}")
        return self


class Fno(Gridded):
    Config = FnoConfig
    config: FnoConfig

    def __init__(self, config: FnoConfig, info: DatasetInfo) -> None:
        space = len(info.space)
        super().__init__(config, info, 2.0 / config.cells, extra=config.coordinates * space)
        self.blocks = nn.ModuleList(Block(config, space, self.lead.width, last=k == config.layers - 1) for k in range(config.layers))

    def grid(self, context: Frames) -> Grid:
        return over_domain(self.log_length, len(self.info.space), self.config.cells, self.info.period, self.config.margin)

    def extra(self, grid: Grid) -> Tensor | None:
        if not self.config.coordinates:
            return None
        return torch.stack(torch.meshgrid(*grid.axes[0], indexing="ij"), -1).unsqueeze(0)


class Block(nn.Module):
    """gelu(K x + W x), K a spectral convolution; with `channel_mlp` then gelu(MLP(that) + g * x). The last block ends without a gelu."""

    def __init__(self, config: FnoConfig, space: int, known: int, last: bool) -> None:
        super().__init__()
        width, self.last = config.width, last
        self.modulation = Modulation(known, width) if config.lead_scaling else None
        self.spectral = SpectralConvolution(width, config.modes, space)
        self.skip = nn.Linear(width, width)
        self.mlp = (
            nn.Sequential(nn.Linear(width, -(-width // 2)), nn.GELU(), nn.Linear(-(-width // 2), width)) if config.channel_mlp else None
        )
        self.gate = nn.Parameter(torch.ones(width)) if config.channel_mlp else None

    def forward(self, x: Tensor, known: Tensor) -> Tensor:
        if self.modulation is not None:
            x = self.modulation(x, known)
        h = self.spectral(x) + self.skip(x)
        h = h if self.last else F.gelu(h)
        if self.mlp is None or self.gate is None:
            return h
        h = self.mlp(h) + self.gate * x
        return h if self.last else F.gelu(h)


class SpectralConvolution(nn.Module):
    """A circular convolution given by a free complex matrix for each wave number -modes..modes of every axis; others are dropped.

    The weights do not depend on the grid: a band-limited x gives the same function on any grid that resolves `modes`.
    """

    def __init__(self, width: int, modes: int, space: int) -> None:
        super().__init__()
        self.modes, self.space = modes, space
        kept = [2 * modes + 1] * (space - 1) + [modes + 1]  # of a real field, half of the last axis says all
        # Real and imaginary part apart, so that the weights follow the model to any precision.
        self.weight = nn.Parameter(torch.randn(*kept, width, width, 2) * (2 * width) ** -0.5)

    def forward(self, x: Tensor) -> Tensor:
        """x [R,G,...,G,d] -> the same shape; at least in float32, which the transform needs."""
        size, last, m = x.shape[1:-1], self.space, self.modes
        wave = torch.fft.rfft(x if x.dtype == torch.float64 else x.float(), dim=last).narrow(last, 0, m + 1)
        for axis in range(1, last):
            wave = torch.fft.fft(wave, dim=axis)
            wave = torch.cat([wave.narrow(axis, 0, m + 1), wave.narrow(axis, size[axis - 1] - m, m)], axis)
        wave = torch.einsum("r...i,...io->r...o", wave, torch.view_as_complex(self.weight.to(wave.real.dtype)))
        for axis in range(1, last):
            gap = wave.new_zeros(*wave.shape[:axis], size[axis - 1] - 2 * m - 1, *wave.shape[axis + 1 :])
            wave = torch.fft.ifft(torch.cat([wave.narrow(axis, 0, m + 1), gap, wave.narrow(axis, m + 1, m)], axis), dim=axis)
        return torch.fft.irfft(wave, n=size[-1], dim=last)
