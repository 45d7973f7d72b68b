"""The auto-encoder of AROMA: observations of a frame to the mean and variance of its latents, and latents to the field at any point.

Shapes::

    R rows   N observations   Q queries   D space   C channels   F covariates   h width   M tokens   d latent channels   L bands (scales)
    f features a band
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.aroma.config import AromaConfig
from models.contract import DatasetInfo, Frames

_LOG_VARIANCE = (-30.0, 20.0)
_LOG_NOISE = 7.0  # the decoder's noise stays within exp(-7) .. exp(7) of the data's standard deviation


class Encoder(nn.Module):
    """Observations of single frames -> mean and log variance of the latents [R,M,d]."""

    frequency: Tensor

    def __init__(self, config: AromaConfig, info: DatasetInfo) -> None:
        super().__init__()
        c = config
        self.register_buffer("frequency", _frequencies((0.0, c.highest), c, info), persistent=False)
        place = 2 * c.bands * len(info.space)
        self.place = nn.Linear(place, c.width) if c.place_in_value else None
        place = c.width if c.place_in_value else place
        self.value = nn.Linear(len(info.variables) + len(info.context_covariates), c.width)
        self.tokens = nn.Parameter(torch.randn(c.tokens, c.width))
        self.read_places = Read(c, c.width, place, place, c.width) if c.encode_geometry else None
        self.ffn_places = FeedForward(c.width) if c.encode_geometry else None
        self.read_values, self.ffn_values = Read(c, c.width, place, c.width, c.width), FeedForward(c.width)
        self.mean, self.log_variance = nn.Linear(c.width, c.channels), nn.Linear(c.width, c.channels)

    def forward(self, frames: Frames) -> tuple[Tensor, Tensor]:
        """`frames` [B,1,N]; what is masked does not count."""
        assert frames.value is not None
        mask, valid = frames.mask[:, 0], frames.mask[:, 0].unsqueeze(-1)
        parts = [frames.value] if frames.covariate is None else [frames.value, frames.covariate]
        value = self.value(torch.where(valid, torch.cat(parts, -1)[:, 0], 0))
        key = code(torch.where(valid, frames.position[:, 0], 0), self.frequency).squeeze(-2)
        if self.place is not None:
            key = self.place(key).relu()
            value = value + key
        seen = None if bool(mask.all()) else mask
        x = self.tokens.unsqueeze(0)  # one row for all until the first observations are read
        if self.read_places is not None and self.ffn_places is not None:
            x = x + self.read_places(x, key, key, seen)
            x = x + self.ffn_places(x)
        x = x + self.read_values(x, key, value, seen)
        x = x + self.ffn_values(x)
        return self.mean(x), self.log_variance(x).clamp(*_LOG_VARIANCE)


class Decoder(nn.Module):
    """Latents [R,M,d] -> the field at any point."""

    frequency: Tensor

    def __init__(self, config: AromaConfig, info: DatasetInfo) -> None:
        super().__init__()
        c = config
        self.repeats = c.decoder_repeats
        self.register_buffer("frequency", _frequencies((0.0, *c.scales), c, info), persistent=False)
        asked = 2 * c.bands * len(info.space) + c.calendar * len(info.query_covariates)
        self.calendar = c.calendar
        self.lift = nn.Linear(c.channels, c.width)
        # A shared block is one module used again, so that every weight is stored once.
        blocks = 1 if c.shared_decoder else c.decoder_repeats
        self.mix = nn.ModuleList(Mix(c) for _ in range(blocks))
        self.ffn = nn.ModuleList(FeedForward(c.width) for _ in range(blocks))
        self.query = Read(c, asked, c.width, None, c.feature_width)
        widths = [c.feature_width * len(c.scales), *[c.field_width] * c.field_depth]
        self.field = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))
        self.head = nn.Linear(c.field_width, len(info.variables))
        self.noise = nn.Linear(c.field_width, len(info.variables)) if c.noise else None
        if self.noise is not None:
            nn.init.zeros_(self.noise.weight)
            nn.init.zeros_(self.noise.bias)

    def read(self, latents: Tensor) -> Tensor:
        """Tokens [R,M,h], ready to be asked."""
        x = self.lift(latents)
        for number in range(self.repeats):
            x = x + self.mix[number % len(self.mix)](x)
            x = x + self.ffn[number % len(self.ffn)](x)
        return x

    def forward(self, tokens: Tensor, position: Tensor, covariate: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The field [R,Q,C] of tokens [R,M,h] at position [R,Q,D] with calendar covariates [R,Q,F], and the log standard deviation [R,Q,C]
        of what it leaves unexplained. The second is learnt beside the first and changes nothing in it: no gradient goes further."""
        asked = code(_once(position), self.frequency)  # [R|1,Q,L,f]
        if covariate is not None and self.calendar:
            same = covariate.unsqueeze(2).expand(-1, -1, asked.shape[2], -1)
            asked = torch.cat([asked.expand(len(same), -1, -1, -1), same], -1)
        x = self.query(asked.flatten(1, 2), tokens).view(len(tokens), asked.shape[1], -1)
        for layer in self.field:
            x = layer(x).relu()
        noise = None if self.noise is None else _LOG_NOISE * (self.noise(x.detach()) / _LOG_NOISE).tanh()
        return self.head(x), noise


class Read(nn.Module):
    """Attention of norm x [R,N,x] to norm keys [R,K,k] and norm values [R,K,v] -> [R,N,out]. Values None: the keys, with their norm."""

    def __init__(self, config: AromaConfig, x: int, key: int, value: int | None, out: int) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.head_width
        self.norm, self.norm_key = nn.LayerNorm(x), nn.LayerNorm(key)
        self.norm_value = None if value is None else nn.LayerNorm(value)
        self.query, self.key = nn.Linear(x, inner, bias=False), nn.Linear(key, inner, bias=False)
        self.value = nn.Linear(key if value is None else value, inner, bias=False)
        self.out = nn.Linear(inner, out)

    def forward(self, x: Tensor, key: Tensor, value: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        """x may be one row for all; mask [R,K] True where a key may be seen. A row that sees nothing gives the bias of the output."""
        key = self.norm_key(key)
        value = key if value is None or self.norm_value is None else self.norm_value(value)
        return self.out(_attend(self.query(self.norm(x)), self.key(key), self.value(value), self.heads, mask))


class Mix(nn.Module):
    """Self-attention of norm x [R,M,h]."""

    def __init__(self, config: AromaConfig) -> None:
        super().__init__()
        self.heads = config.heads
        inner = config.heads * config.head_width
        self.norm, self.query_key_value = nn.LayerNorm(config.width), nn.Linear(config.width, 3 * inner, bias=False)
        self.out = nn.Linear(inner, config.width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.query_key_value(self.norm(x)).chunk(3, -1)
        return self.out(_attend(query, key, value, self.heads))


class FeedForward(nn.Sequential):
    """Norm, then four times as wide with a GELU."""

    def __init__(self, width: int) -> None:
        super().__init__(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def divergence(mean: Tensor, log_variance: Tensor) -> Tensor:
    """KL divergence from the standard normal, a mean over rows, tokens and channels, as in the released code."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def code(position: Tensor, frequency: Tensor) -> Tensor:
    """position [R,N,D] and frequencies [L,K] -> sines, then cosines [R,N,L,2*D*K]."""
    angle = (position[..., None, :, None] * (torch.pi * frequency).unsqueeze(1)).flatten(-2)
    return torch.cat([angle.sin(), angle.cos()], -1)


def _frequencies(edges: tuple[float, ...], config: AromaConfig, info: DatasetInfo) -> Tensor:
    """[L,K]: for every pair of neighbouring edges K powers of 2, evenly spread in the exponent, ends included."""
    scales = [2.0 ** torch.linspace(a, b, config.bands, dtype=torch.float64) for a, b in pairwise(edges)]
    frequency = torch.stack(scales)
    # Only whole frequencies have the period 2 of a torus; the low ones come several times.
    whole = config.spacing == "whole" or (config.spacing is None and info.period is not None)
    return (frequency.round() if whole else frequency).to(torch.get_default_dtype())


def _attend(query: Tensor, key: Tensor, value: Tensor, heads: int, mask: Tensor | None = None) -> Tensor:
    """query [R|1,N,i], key and value [R,K,i], mask [R,K] -> [R,N,i]."""
    query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    out = F.scaled_dot_product_attention(query.expand(len(key), -1, -1, -1), key, value, None if mask is None else mask[:, None, None])
    return out.transpose(1, 2).flatten(-2)


def _once(position: Tensor) -> Tensor:
    """position [1,Q,D] where [R,Q,D] was only expanded along its rows, so that what they share is computed once."""
    return position[:1] if position.stride(0) == 0 else position
