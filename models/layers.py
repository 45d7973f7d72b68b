"""Layers that several field models share: attention, gated feed-forward, Fourier features."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Spacing = Literal["linear", "octaves", "integers"]


class Attention(nn.Module):
    """Multi-head attention of x [R,N,d] to keys [R,K,key_width or d]; mask [R,1|N,K], True where a key may be seen.

    A row that may see nothing gives the bias of the output alone, never NaN.
    """

    def __init__(self, width: int, heads: int, key_width: int | None = None, bias: bool = False) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.query = nn.Linear(width, width, bias=bias)
        self.key_value = nn.Linear(key_width or width, 2 * width, bias=bias)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
        query = self.query(x).unflatten(-1, (self.heads, -1)).transpose(-2, -3)  # [R,h,N,d/h]
        key, value = self.key_value(keys).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, None if mask is None else mask.unsqueeze(1))
        return self.out(out.transpose(-2, -3).flatten(-2))


class FeedForward(nn.Module):
    """GEGLU: half of the hidden channels gate the other half."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, 2 * factor * width)
        self.outer = nn.Linear(factor * width, width)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.inner(x).chunk(2, dim=-1)
        return self.outer(value * F.gelu(gate))


class Fourier(nn.Module):
    """x (...,A) -> [sin(pi f_k x_a), cos(pi f_k x_a)] and, with `raw`, x itself (...,width).

    Frequencies f_k: `linear` from 1 to `highest`; `octaves` 1, 2, 4, ...; `integers` 1, 2, ..., the only ones besides octaves that have
    period 2 in x, as a torus needs.
    """

    frequency: Tensor

    def __init__(self, axes: int, bands: int, highest: float, spacing: Spacing = "linear", raw: bool = True) -> None:
        super().__init__()
        step = torch.arange(bands, dtype=torch.float64)
        frequency = {
            "linear": torch.linspace(1.0, highest, bands, dtype=torch.float64),
            "octaves": 2.0**step,
            "integers": 1.0 + step,
        }[spacing]
        self.register_buffer("frequency", frequency.to(torch.get_default_dtype()), persistent=False)
        self.raw, self.width = raw, axes * (2 * bands + raw)

    def forward(self, x: Tensor) -> Tensor:
        angle = (x.unsqueeze(-1) * (torch.pi * self.frequency)).flatten(-2)
        return torch.cat([angle.sin(), angle.cos(), x] if self.raw else [angle.sin(), angle.cos()], dim=-1)
