"""From latents to features of the points asked for: time-conditioned decoder and calibration network (CN)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.contract import DatasetInfo, Frames
from models.scent.attention import Block, SparseBlocks
from models.scent.config import ScentConfig
from models.scent.encoder import Coordinates, Encoder, Seen
from models.scent.head import prior_scale
from models.scent.neighbours import Neighbours


class Decoder(nn.Module):
    """Features [R,Q,d] of every point of a query, R = B*S; `coupled` where they depend on what else is asked."""

    anchor: Tensor

    def __init__(self, config: ScentConfig, info: DatasetInfo, coordinates: Coordinates, encoder: Encoder) -> None:
        super().__init__()
        c, channels, clock = config, len(info.variables), coordinates.time.width
        self.config, self.info, self.coordinates = config, info, coordinates
        asked = c.absolute_position * coordinates.place.width + len(info.query_covariates)
        self.place = nn.Linear(asked, c.width, bias=False) if asked else None
        self.time = nn.Linear(clock, c.width)
        self.background = nn.Linear(2 * channels, c.width, bias=False)
        near = (c.width, c.heads, c.neighbours, encoder.features, len(info.space), info.period)
        self.neighbours = Neighbours(*near) if c.neighbours else None
        self.read = Block(c.width, c.heads, c.ffn_factor, cross=True)
        blocks = [Block(c.width, c.heads, c.ffn_factor) for _ in range(c.cn_layers)]
        self.cn = SparseBlocks(blocks, c.group, c.permutation_seed, first=c.cen_layers)
        self.coupled = bool(blocks) and c.calibration == "plain"
        self.register_buffer("anchor", halton(c.anchors, len(info.space)).to(self.time.weight.dtype), persistent=False)

    def forward(self, seen: Seen, latents: Tensor, query: Frames, lead: Tensor) -> Tensor:
        """Points of `query` at leads [B,S] in frames; latents [B,S or 1,M,d]."""
        b, s = query.mask.shape[:2]
        lead = lead.to(self.anchor.dtype)
        latents = latents.expand(b, s, -1, -1).flatten(0, 1)
        v = self._decode(seen, latents, query.position, query.covariate, self._prior(query), lead)
        if self.coupled:
            return self.cn(v, query.mask.flatten(0, 1))
        if not self.cn:
            return v
        place = self.anchor.expand(b, s, -1, -1)
        unknown = place.new_zeros(1, 1, 1, len(self.info.query_covariates)) if query.covariate is not None else None
        fixed = self._decode(seen, latents, place, unknown, place.new_zeros(1, 1, 1, 2 * len(self.info.variables)), lead)
        for number, block in enumerate(self.cn):
            v = block(v, fixed)
            if number + 1 < len(self.cn):
                fixed = block(fixed)
        return v

    def _decode(self, seen: Seen, latents: Tensor, position: Tensor, covariate: Tensor | None, prior: Tensor, lead: Tensor) -> Tensor:
        """Points [B,S,Q,D] read the latents [R,M,d]."""
        asked = self.time(self.coordinates.clock(seen.start + lead)).unsqueeze(2) + self.background(prior)
        parts = [self.coordinates.place(_unexpanded(position))] if self.config.absolute_position else []
        if covariate is not None:
            parts.append(covariate)
        if self.place is not None:
            # Linear in its parts: a layout shared by the whole batch is embedded once.
            weights = self.place.weight.split([part.shape[-1] for part in parts], dim=1)
            asked = asked + sum(F.linear(_unexpanded(part), weight) for part, weight in zip(parts, weights, strict=True))
        b, s, q, _ = position.shape
        asked = asked.expand(b, s, q, -1)
        near = None if self.neighbours is None else self.neighbours(asked, position, seen).flatten(0, 1)
        return self.read(asked.flatten(0, 1), latents, residual=self.config.query_residual, beside=near)

    def _prior(self, query: Frames) -> Tensor:
        """Background and the logarithm of its scale [B,S,Q,2C]; zero, the training mean and scale 1, where there is none."""
        if query.background is None:
            return self.anchor.new_zeros(1, 1, 1, 2 * len(self.info.variables))
        mean = query.background.to(self.anchor.dtype)
        return torch.cat([mean, prior_scale(query, self.anchor).log().expand_as(mean)], -1)


def _unexpanded(x: Tensor) -> Tensor:
    """x with size 1 along the leading axes that were only expanded, so that what is shared is computed once."""
    return x[tuple(slice(0, 1) if stride == 0 else slice(None) for stride in x.stride()[:-1])]


def halton(count: int, axes: int) -> Tensor:
    """Evenly spread points [count,axes] in (-1, 1), the same on every machine (J. Halton, 1960)."""
    primes = (2, 3, 5, 7, 11)
    if axes > len(primes):
        raise ValueError(f"space has {axes} axes, at most {len(primes)} are supported")
    points = torch.zeros(count, axes, dtype=torch.float64)
    for axis, base in enumerate(primes[:axes]):
        number, weight = torch.arange(1, count + 1), 1.0
        for _ in range(count.bit_length()):  # digits of the largest number, in the smallest base
            weight /= base
            points[:, axis] += weight * (number % base)
            number = number // base
    return 2 * points - 1
