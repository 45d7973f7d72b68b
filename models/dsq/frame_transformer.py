"""Decoder-only transformers that continue a sequence of frames: code by code (`IndexTransformer`), or latents by latents
(`RegressTransformer`). At inference keys and values of what came before are kept, so a step costs one token.

Shapes::

    R rows   K frames after frame 0   G codes a frame   V codes   M latents   c latent channels   d width   f clock features of a frame

Frame 0 is always given. Frames carry features of their time instead of a number, so a forecast may be longer than those seen in training.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Cache:
    """Keys and values of the tokens so far, for every layer; room for `length` tokens."""

    def __init__(self, layers: int, rows: int, heads: int, length: int, width: int, like: Tensor) -> None:
        self.key, self.value = like.new_empty(2, layers, rows, heads, length, width)
        self.filled = 0


class CausalBlock(nn.Module):
    """Pre-norm self-attention to this token and those before it, then a feed-forward of four times the width."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: Cache | None, layer: int) -> Tensor:
        """x [R,n,d]: all tokens, or with a cache those that follow the ones in it."""
        query, key, value = self.query_key_value(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        before, n = 0, x.shape[1]
        if cache is not None:
            before = cache.filled
            cache.key[layer, :, :, before : before + n], cache.value[layer, :, :, before : before + n] = key, value
            key, value = cache.key[layer, :, :, : before + n], cache.value[layer, :, :, : before + n]
        mask = torch.ones(n, before + n, dtype=torch.bool, device=x.device).tril(before) if before and n > 1 else None
        read = F.scaled_dot_product_attention(query, key, value, mask, is_causal=before == 0)
        x = x + self.dropout(self.out(read.transpose(1, 2).flatten(-2)))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


class CausalTransformer(nn.Module):
    """x [R,n,d] -> [R,n,d]; what comes out at a token depends on it and those before it."""

    def __init__(self, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.width, self.heads = width, heads
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(CausalBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer)
        if cache is not None:
            cache.filled += x.shape[1]
        return self.norm(x)

    def cache(self, length: int, like: Tensor) -> Cache:
        """An empty cache for rows like `like` [R,...]."""
        return Cache(len(self.blocks), len(like), self.heads, length, self.width // self.heads, like)


class IndexTransformer(nn.Module):
    """The next code, given all codes before it."""

    def __init__(self, codes: int, per_frame: int, clock: int, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.per_frame = per_frame
        self.code, self.slot = nn.Embedding(codes, width), nn.Embedding(per_frame, width)
        self.clock = nn.Linear(clock, width)
        self.trunk = CausalTransformer(width, depth, heads, dropout)
        self.head = nn.Linear(width, codes)
        for table in (self.code, self.slot, self.head):  # small, so that at the start every code is as likely as any other
            nn.init.normal_(table.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, codes: Tensor, clock: Tensor) -> Tensor:
        """codes [R,1+K,G] and clock [R,1+K,f] -> logits [R,K,G,V] of frames 1..K, each from the codes before it."""
        token = self._token(codes, clock).flatten(1, 2)[:, :-1]
        return self.head(self.trunk(token)[:, self.per_frame - 1 :]).unflatten(1, (-1, self.per_frame))

    @torch.no_grad()
    def continued(self, first: Tensor, clock: Tensor, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """first [R,G] codes of frame 0, clock [R,1+K,f] -> codes [R,1+K,G] and the probabilities [R,K,G,V] they were chosen from.

        `choose` takes logits [R,V] to codes [R]; it is asked frame by frame, place by place.
        """
        frames, probabilities = [first], []
        ahead = clock.shape[1] - 1
        cache = self.trunk.cache((1 + ahead) * self.per_frame, self.head.weight.new_empty(len(first)))
        logits = self.head(self.trunk(self._token(first.unsqueeze(1), clock[:, :1]).squeeze(1), cache)[:, -1])
        for k in range(1, ahead + 1):
            chosen, likely = [], []
            for place in range(self.per_frame):
                chosen.append(choose(logits))
                likely.append(logits.softmax(-1))
                if k < ahead or place + 1 < self.per_frame:
                    token = self.code(chosen[-1]) + self.slot.weight[place] + self.clock(clock[:, k])
                    logits = self.head(self.trunk(token.unsqueeze(1), cache)[:, -1])
            frames.append(torch.stack(chosen, 1))
            probabilities.append(torch.stack(likely, 1))
        none = logits.new_zeros(len(first), 0, self.per_frame, logits.shape[-1])
        return torch.stack(frames, 1), torch.stack(probabilities, 1) if probabilities else none

    def _token(self, codes: Tensor, clock: Tensor) -> Tensor:
        return self.code(codes) + self.slot.weight + self.clock(clock).unsqueeze(-2)


class RegressTransformer(nn.Module):
    """The next frame as one vector, given those before it."""

    def __init__(self, latents: int, channels: int, hidden: int, clock: int, width: int, depth: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.shape, size = (latents, channels), latents * channels
        self.project = nn.Sequential(nn.Linear(size, hidden), nn.ReLU(), nn.Linear(hidden, width))
        self.clock = nn.Linear(clock, width)
        self.trunk = CausalTransformer(width, depth, heads, dropout)
        self.unproject = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, size))

    def forward(self, latents: Tensor, clock: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """latents [R,1+K,M,c] and clock [R,1+K,f] -> latents [R,K,M,c] of frames 1..K, their vectors [R,K,d], and those aimed at."""
        token = self.project(latents.flatten(2))
        out = self.trunk(token[:, :-1] + self.clock(clock[:, :-1]))
        return self.unproject(out).unflatten(-1, self.shape), out, token[:, 1:].detach()

    @torch.no_grad()
    def continued(self, first: Tensor, clock: Tensor) -> Tensor:
        """first [R,M,c] latents of frame 0, clock [R,1+K,f] -> latents [R,1+K,M,c]; what comes out is the next token as it is."""
        frames, ahead = [first], clock.shape[1] - 1
        cache = self.trunk.cache(1 + ahead, first)
        token = self.project(first.flatten(1))
        for k in range(ahead):
            token = self.trunk((token + self.clock(clock[:, k])).unsqueeze(1), cache)[:, 0]
            frames.append(self.unproject(token).unflatten(-1, self.shape))
        return torch.stack(frames, 1)
