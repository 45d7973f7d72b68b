"""Decoder-only transformers that continue a sequence of frames: in codes, one by one or a frame at a time (`IndexTransformer`), or in
latents (`RegressTransformer`). At inference keys and values of what came before are kept, so a step costs the tokens it adds.

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
    """Pre-norm self-attention to what a token may see, then a feed-forward of four times the width."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, nn.Dropout(dropout)
        self.norm, self.norm_ffn = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.ffn = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(dropout), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, seen: Tensor | None, causal: bool, cache: Cache | None, layer: int) -> Tensor:
        """x [R,n,d]: all tokens, or with a cache those that follow the ones in it. `seen` [n,tokens] and `causal` as in
        scaled_dot_product_attention."""
        query, key, value = self.query_key_value(self.norm(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if cache is not None:
            now = slice(cache.filled, cache.filled + x.shape[1])
            cache.key[layer, :, :, now], cache.value[layer, :, :, now] = key, value
            key, value = cache.key[layer, :, :, : now.stop], cache.value[layer, :, :, : now.stop]
        read = F.scaled_dot_product_attention(query, key, value, seen, is_causal=causal)
        x = x + self.dropout(self.out(read.transpose(1, 2).flatten(-2)))
        return x + self.dropout(self.ffn(self.norm_ffn(x)))


class CausalTransformer(nn.Module):
    """x [R,n,d] -> [R,n,d]. Tokens come in groups of `group`; what comes out at one depends on all of its group and those before it."""

    def __init__(self, width: int, depth: int, heads: int, dropout: float, group: int = 1) -> None:
        super().__init__()
        self.width, self.heads, self.group = width, heads, group
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(CausalBlock(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, cache: Cache | None = None) -> Tensor:
        """With a cache, x follows whole groups."""
        n, before = x.shape[1], 0 if cache is None else cache.filled
        several = n > self.group  # one group alone sees all that is there
        causal = several and self.group == 1 and before == 0
        seen = self._seen(n, before, x.device) if several and not causal else None
        x = self.dropout(x)
        for layer, block in enumerate(self.blocks):
            x = block(x, seen, causal, cache, layer)
        if cache is not None:
            cache.filled += n
        return self.norm(x)

    def _seen(self, n: int, before: int, device: torch.device) -> Tensor:
        """[n,before+n]: the tokens that each of the last n sees, the same in all layers."""
        group = torch.arange(before + n, device=device) // self.group
        return group <= group[before:].unsqueeze(-1)

    def cache(self, length: int, like: Tensor) -> Cache:
        """An empty cache for rows like `like` [R,...]."""
        return Cache(len(self.blocks), len(like), self.heads, length, self.width // self.heads, like)


class IndexTransformer(nn.Module):
    """The next code, given all before it; with `whole` all codes of the next frame in one step, each from the same place of the frame
    before, so that given the past they are independent of each other."""

    def __init__(self, codes: int, per_frame: int, clock: int, width: int, depth: int, heads: int, dropout: float, whole: bool) -> None:
        super().__init__()
        self.per_frame, self.step = per_frame, per_frame if whole else 1
        self.code, self.slot = nn.Embedding(codes, width), nn.Embedding(per_frame, width)
        self.clock = nn.Linear(clock, width)
        self.trunk = CausalTransformer(width, depth, heads, dropout, self.step)
        self.head = nn.Linear(width, codes)
        for table in (self.code, self.slot, self.head):  # small, so that at the start every code is as likely as any other
            nn.init.normal_(table.weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    def forward(self, codes: Tensor, clock: Tensor) -> Tensor:
        """codes [R,1+K,G] and clock [R,1+K,f] -> logits [R,K,G,V] of frames 1..K, each from the codes before it."""
        token = self.code(codes.flatten(1)) + self._place(clock)
        out = self.trunk(token[:, : -self.step])[:, self.per_frame - self.step :]
        return self.head(out).unflatten(1, (-1, self.per_frame))

    @torch.no_grad()
    def continued(self, first: Tensor, clock: Tensor, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """first [R,G] codes of frame 0, clock [R,1+K,f] -> codes [R,1+K,G] and the probabilities [R,K,G,V] they were chosen from.

        `choose` takes logits [R,n,V] to codes [R,n]; it is asked step by step, n being 1 or G.
        """
        place, given = self._place(clock), self.per_frame
        codes = first.new_empty(place.shape[:2])
        likely = place.new_empty(len(first), place.shape[1] - given, self.head.out_features)
        codes[:, :given] = first
        cache, token = self.trunk.cache(place.shape[1], place), self.code(first) + place[:, :given]
        for start in range(given, place.shape[1], self.step):
            now = slice(start, start + self.step)
            logits = self.head(self.trunk(token, cache)[:, -self.step :])
            likely[:, start - given : now.stop - given] = logits.softmax(-1)
            codes[:, now] = choose(logits)
            token = self.code(codes[:, now]) + place[:, now]
        return codes.unflatten(1, (-1, given)), likely.unflatten(1, (-1, given))

    def _place(self, clock: Tensor) -> Tensor:
        """[R,(1+K)G,d] of clock [R,1+K,f]: what a token is told of its place in the frame, and of the frame's time."""
        return (self.slot.weight + self.clock(clock).unsqueeze(-2)).flatten(1, 2)


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
