"""The latent stepper of AROMA: a diffusion transformer (DiT; Peebles & Xie, ICCV 2023) over the tokens of a field now and next.

Shapes: R rows, M tokens, d latent channels, w width.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_SINUSOIDS, _LONGEST = 256, 1e4  # features of the refinement level and their longest period


class LatentStepper(nn.Module):
    """Clean tokens [R,M,d] of a frame and noisy tokens [R,M,d] of the next one -> [R,M,d]; zero before training.

    Adaptive layer norms see the refinement level alone; the physical step has one length.
    """

    def __init__(self, tokens: int, channels: int, width: int, depth: int, heads: int, factor: int, levels: int) -> None:
        super().__init__()
        self.scale = 1000.0 / (levels - 1)  # levels 0 .. K are the times 0 .. 1000 of the embedding
        self.lift = nn.Linear(channels, width)
        self.place = nn.Parameter(torch.zeros(2 * tokens, width))
        self.level = nn.Sequential(nn.Linear(_SINUSOIDS, width), nn.SiLU(), nn.Linear(width, width))
        self.blocks = nn.ModuleList(Block(width, heads, factor) for _ in range(depth))
        self.last = nn.Linear(width, 2 * width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.head = nn.Linear(width, channels)
        for name, parameter in self.named_parameters():
            if name.startswith(("last.", "head.")) or "modulation" in name or name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif name.startswith("level."):
                nn.init.normal_(parameter, std=0.02)
            elif name != "place":
                nn.init.xavier_uniform_(parameter)

    def forward(self, state: Tensor, noisy: Tensor, level: Tensor) -> Tensor:
        """`level` [R], or [1] for all rows: how noisy, from 0."""
        condition = F.silu(self.level(sinusoids(self.scale * level.to(state.dtype)))).unsqueeze(1)  # [R|1,1,w]
        x = self.lift(torch.cat([state, noisy], 1)) + self.place
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.last(condition).chunk(2, -1)
        return self.head(self.norm(x[:, state.shape[1] :]) * (1 + scale) + shift)


class Block(nn.Module):
    """Self-attention and feed-forward, each shifted, scaled and gated by the condition; with all of it zero, the identity."""

    def __init__(self, width: int, heads: int, factor: int) -> None:
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.norm = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)  # without weights of its own, so both halves share it
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.inner, self.outer = nn.Linear(width, factor * width), nn.Linear(factor * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [R,2M,w], condition [R|1,1,w]."""
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = self.modulation(condition).chunk(6, -1)
        query, key, value = (
            self.query_key_value(self.norm(x) * (1 + scale) + shift).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        )
        read = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)
        x = x + gate * self.out(read)
        inner = self.inner(self.norm(x) * (1 + scale_ffn) + shift_ffn)
        return x + gate_ffn * self.outer(F.gelu(inner, approximate="tanh"))


def sinusoids(time: Tensor) -> Tensor:
    """time [R] -> [R,256]: cosines, then sines, with periods from 2 pi to 2 pi 1e4 (Vaswani et al., 2017)."""
    half = _SINUSOIDS // 2
    angle = time.unsqueeze(-1) * torch.exp(-math.log(_LONGEST) * torch.arange(half, device=time.device, dtype=time.dtype) / half)
    return torch.cat([angle.cos(), angle.sin()], -1)
