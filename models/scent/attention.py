"""SCENT's transformer block, and sparse self-attention: a block inside random groups of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Attention, FeedForward


class Block(nn.Module):
    """x + attention(norm x; norm keys), then x + feed-forward(norm x). x [R,N,d], keys [R,K,d]; keys default to x."""

    def __init__(self, width: int, heads: int, factor: int, cross: bool = False, condition: int = 0) -> None:
        super().__init__()
        self.norm, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.norm_keys = nn.LayerNorm(width) if cross else None
        self.attention, self.ffn = Attention(width, heads), FeedForward(width, factor)
        self.modulation = nn.Linear(condition, 4 * width) if condition else None
        if self.modulation is not None:
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        x: Tensor,
        keys: Tensor | None = None,
        mask: Tensor | None = None,
        condition: Tensor | None = None,
        residual: bool = True,
        beside: Tensor | None = None,
    ) -> Tensor:
        """`condition` [R,1,c] scales and shifts both norms; `beside` [R,N,d] is added to what attention read."""
        query, shift, scale = self.norm(x), None, None
        if self.modulation is not None:
            by, to, scale, shift = self.modulation(condition).chunk(4, dim=-1)
            query = query * (1 + by) + to
        keys = query if keys is None else (self.norm_keys or self.norm)(keys)
        read = self.attention(query, keys, mask)
        if beside is not None:
            read = read + beside
        x = x + read if residual else read
        inner = self.norm_ffn(x)
        if scale is not None and shift is not None:
            inner = inner * (1 + scale) + shift
        return x + self.ffn(inner)


class SparseBlocks(nn.ModuleList):
    """Blocks that cut the tokens into new random groups of `size` each. In training the groups come from the global generator, else from
    `seed`, the number of the block (counted from `first`) and a token's rank among the valid ones, so that padding changes nothing."""

    def __init__(self, blocks: list[Block], size: int, seed: int, first: int = 0) -> None:
        super().__init__(blocks)
        self.size, self.seed, self.first = size, seed, first

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x [R,N,d]; mask [R,N] is True where a token is valid."""
        for number, block in enumerate(self):
            x = in_groups(block, x, mask, self.order(mask, number), self.size)
        return x

    def order(self, mask: Tensor, number: int) -> Tensor | None:
        """A random order [R,N] of what is valid, padding last; None where one group holds all."""
        if mask.shape[1] <= self.size:
            return None
        if self.training:
            key = torch.rand(mask.shape, device=mask.device).masked_fill(~mask, 2.0)
        else:
            key = _hash(mask.cumsum(-1), self.seed * 7919 + self.first + number).masked_fill(~mask, torch.iinfo(torch.int64).max)
        return key.argsort(dim=-1, stable=True)


def in_groups(block: nn.Module, x: Tensor, mask: Tensor, order: Tensor | None, size: int) -> Tensor:
    """A self-attention block inside groups of `size` cut from `order` [R,N], valid tokens first; order None: all N are one group.

    Cost O(N size d). x [R,N,d]; mask [R,N] is True where a token is valid.
    """
    rows, n, width = x.shape
    if order is None:
        return block(x, mask=None if bool(mask.all()) else mask.unsqueeze(1))
    pad = -n % size
    flat = (order + n * torch.arange(rows, device=x.device).unsqueeze(1)).flatten()
    back = torch.empty_like(flat).scatter_(0, flat, torch.arange(len(flat), device=x.device))
    cut = F.pad(x.flatten(0, 1).index_select(0, flat).view(rows, n, width), (0, 0, 0, pad)).view(-1, size, width)
    keys = F.pad(mask.gather(1, order), (0, pad)).view(-1, 1, size)
    out = block(cut, mask=None if bool(keys.all()) else keys).view(rows, n + pad, width)[:, :n]
    return out.flatten(0, 1).index_select(0, back).view(rows, n, width)


def _hash(x: Tensor, salt: int) -> Tensor:
    """Well mixed int64 of int64 x, the same on every device (the finaliser of MurmurHash3 with wrapping products)."""
    x = (x + 1 + salt * 1_000_003) * -7046029254386353131
    x = (x ^ (x >> 33)) * -49064778989728563
    x = (x ^ (x >> 33)) * -4265267296055464877
    return x ^ (x >> 33)
