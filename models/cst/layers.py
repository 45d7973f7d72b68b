"""Layers of CST: places, norms and attention that can be differentiated as often as the loss needs.

In training, attention and layer norms are written out: the fused kernels have no derivatives of that order. Shapes as in
models/cst/model.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.cst.config import CstConfig
from models.layers import Fourier


class Place(nn.Module):
    """Coordinates [B,S,A] to [B,S,d]: a linear map of them, and of their Fourier features where wanted. A torus has no raw position."""

    def __init__(self, config: CstConfig, space: int, period: float | None) -> None:
        super().__init__()
        self.fourier = config.features == "fourier"
        if self.fourier:
            torus = period is not None
            self.time = Fourier(1, config.bands, config.highest)
            self.space = Fourier(space, config.bands, config.highest, "integers" if torus else "linear", raw=not torus)
        self.linear = nn.Linear(self.time.width + self.space.width if self.fourier else 1 + space, config.width)

    def forward(self, at: Tensor) -> Tensor:
        if self.fourier:
            centred = 2 * at - 1
            at = torch.cat([self.time(centred[..., :1]), self.space(centred[..., 1:])], -1)
        return self.linear(at)


class Norm(nn.Module):
    """Layer norm of (...,d), written out: the fused one takes its mean and scale as constants from the third derivative on, and the loss
    differentiates second derivatives once more."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + 1e-12).rsqrt() * self.weight + self.bias


class Layer(nn.Module):
    """Attention and feed-forward, each with its residual and its norm before or after."""

    def __init__(self, config: CstConfig) -> None:
        super().__init__()
        width = config.width
        self.heads, self.pre = config.heads, config.norm == "pre"
        self.query, self.key, self.val, self.mix = (nn.Linear(width, width) for _ in range(4))
        self.norm_attention, self.norm_ffn = Norm(width), Norm(width)
        self.ffn = nn.Sequential(nn.Linear(width, config.ffn), nn.GELU(), nn.Linear(config.ffn, width))
        self.drop_weights, self.drop = nn.Dropout(config.attention_dropout), nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, memory: tuple[Tensor, Tensor] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, Tensor], Tensor]:
        """x [B,S,d] sees itself as a whole, or `memory` (keys and values [B,h,R,d/h]) and each token itself; mask [B,1,R or S] says what of
        it. Returns the new x, its own keys and values, and the attention weights averaged over heads."""
        query, key, val = self._projected(x)
        query = query / query.shape[-1] ** 0.5
        seen = (key, val) if memory is None else memory
        logit = query @ seen[0].transpose(-1, -2)  # [B,h,S,K]
        if mask is not None:
            # Not -inf: where nothing at all can be seen the weights are even, not NaN.
            logit = logit.masked_fill(~mask.unsqueeze(1), torch.finfo(logit.dtype).min)
        if memory is not None:
            logit = torch.cat([logit, (query * key).sum(-1, keepdim=True)], -1)
        weights = self.drop_weights(logit.softmax(-1))
        read = weights @ val if memory is None else weights[..., :-1] @ seen[1] + weights[..., -1:] * val
        return self._mixed(x, read), (key, val), weights.mean(1)

    def read(self, x: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        """The new x of `forward` with a memory, for evaluation: fused, so it has no weights to show and no higher derivatives.

        All logits are taken relative to that of the token itself, as one more axis of queries and keys. One more key of zeros then stands
        for the token: its logit is 0, and its value marks the share that the token's own value gets.
        """
        query, key, val = self._projected(x)
        root = query.shape[-1] ** 0.5
        query = torch.cat([query / root, -(query * key).sum(-1, keepdim=True) / root], -1)
        keys, values = F.pad(F.pad(memory[0], (0, 1), value=1.0), (0, 0, 0, 1)), F.pad(memory[1], (0, 1, 0, 1))
        values[..., -1, -1] = 1
        read = F.scaled_dot_product_attention(query, keys, values, F.pad(mask, (0, 1), value=True).unsqueeze(1), scale=1.0)
        return self._mixed(x, read[..., :-1] + read[..., -1:] * val)

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Query, key and value of each token, [B,h,S,d/h]."""
        y = self.norm_attention(x) if self.pre else x
        return tuple(part(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (self.query, self.key, self.val))

    def _mixed(self, x: Tensor, read: Tensor) -> Tensor:
        """The new x from what the heads read [B,h,S,d/h]."""
        read = self.drop(self.mix(read.transpose(1, 2).flatten(2)))
        if self.pre:
            x = x + read
            x = x + self.drop(self.ffn(self.norm_ffn(x)))
        else:
            x = self.norm_attention(x + read)
            x = self.norm_ffn(x + self.drop(self.ffn(x)))
        return x
