"""A Perceiver between sensors and a field, as Senseiver has it (models/senseiver) and DSQ takes it over (models/dsq).

    token_j = Linear[value_j ; Fourier(position_j)]
    latents = learned; each round: cross-attention to the tokens, then self-attention layers; rounds 2, 3, ... share their weights
    field(y) = Linear of the cross-attention of Linear[Fourier(y) ; learned vector] to the latents

Shapes::

    R rows (a frame of a window)   N observations   Q queries   D space   C channels   F covariates   M latents   c latent channels
"""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from models.contract import DatasetInfo
from models.layers import Attention, Fourier, Spacing


class LatentSizes(BaseModel):
    """Sizes of encoder and decoder; the defaults have 133,152 and 22,993 parameters for one variable in two dimensions."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    latents: int = Field(default=256, ge=1)
    channels: int = Field(default=48, ge=1)  # of a latent
    token_width: int = Field(default=48, ge=1)  # of a sensor token
    query_width: int = Field(default=48, ge=1)
    rounds: int = Field(default=6, ge=1)
    self_layers: int = Field(default=3, ge=0)  # of self-attention in a round
    cross_heads: int = Field(default=2, ge=1)
    self_heads: int = Field(default=2, ge=1)
    decoder_heads: int = Field(default=1, ge=1)
    bands: int = Field(default=32, ge=1)
    highest: float = Field(default=32.0, gt=0)  # highest linear frequency: half the resolution across the domain
    spacing: Spacing | None = None  # of the frequencies; None: integers on a torus, else linear

    @model_validator(mode="after")
    def _whole_heads(self) -> LatentSizes:
        for width, heads in (("channels", "cross_heads"), ("channels", "self_heads"), ("query_width", "decoder_heads")):
            if getattr(self, width) % getattr(self, heads):
                raise ValueError(f"{width} {getattr(self, width)} is not a multiple of {heads} {getattr(self, heads)}")
        return self

    def place(self, info: DatasetInfo) -> Fourier:
        """The features of a position."""
        spacing: Spacing = self.spacing or ("linear" if info.period is None else "integers")
        return Fourier(len(info.space), self.bands, self.highest, spacing, raw=False)


class Encoder(nn.Module):
    """Observations to latents."""

    def __init__(self, sizes: LatentSizes, info: DatasetInfo, covariates: int = 0) -> None:
        super().__init__()
        self.place = sizes.place(info)
        self.token = nn.Linear(len(info.variables) + self.place.width, sizes.token_width)
        self.covariate = nn.Linear(covariates, sizes.token_width, bias=False) if covariates else None
        self.latents = nn.Parameter(learned(sizes.latents, sizes.channels))
        self.rounds = sizes.rounds
        self.first = Round(sizes)
        self.later = Round(sizes) if sizes.rounds > 1 else None

    def forward(self, position: Tensor, value: Tensor, mask: Tensor, covariate: Tensor | None = None) -> Tensor:
        """position [R,N,D], value [R,N,C], mask [R,N], covariate [R,N,F] -> [R,M,c]. Order and number of observations are free; a row
        without any gives latents that say so, never NaN."""
        known = mask.unsqueeze(-1)
        token = self.token(torch.cat([torch.where(known, value, 0), self.place(torch.where(known, position, 0))], -1))
        if self.covariate is not None:
            if covariate is None:
                raise ValueError(f"the observations have no covariates, the model was made for {self.covariate.in_features}")
            token = token + self.covariate(torch.where(known, covariate, 0).to(token.dtype))
        seen = None if bool(mask.all()) else mask.unsqueeze(1)
        latents = self.first(self.latents.expand(len(mask), -1, -1), token, seen)
        for _ in range(self.rounds - 1):
            assert self.later is not None
            latents = self.later(latents, token, seen)
        return latents


class Decoder(nn.Module):
    """Latents read at points; each point is answered on its own."""

    def __init__(self, sizes: LatentSizes, info: DatasetInfo) -> None:
        super().__init__()
        self.place = sizes.place(info)
        self.covariates = len(info.query_covariates)
        self.asked = nn.Parameter(learned(1, sizes.channels))
        self.query = nn.Linear(self.place.width + self.covariates + sizes.channels, sizes.query_width)
        self.read = Layer(sizes.query_width, sizes.decoder_heads, sizes.channels)
        self.head = nn.Linear(sizes.query_width, len(info.variables))

    def forward(self, latents: Tensor, position: Tensor, covariate: Tensor | None = None) -> Tensor:
        """latents [R,M,c], position [R,Q,D], covariate [R,Q,F] -> [R,Q,C]."""
        place = self.place(position)
        if covariate is None and self.covariates:
            raise ValueError(f"the query has no covariates, the model was made for {self.covariates}")
        beside = [] if covariate is None else [covariate.to(place.dtype)]
        query = self.query(torch.cat([place, *beside, self.asked.expand(*place.shape[:-1], -1)], -1))
        return self.head(self.read(query, latents))


class Round(nn.Module):
    """Cross-attention of latents [R,M,c] to tokens [R,N,d], then self-attention layers."""

    def __init__(self, sizes: LatentSizes) -> None:
        super().__init__()
        self.cross = Layer(sizes.channels, sizes.cross_heads, sizes.token_width)
        self.layers = nn.ModuleList(Layer(sizes.channels, sizes.self_heads) for _ in range(sizes.self_layers))

    def forward(self, latents: Tensor, token: Tensor, mask: Tensor | None) -> Tensor:
        latents = self.cross(latents, token, mask)
        for layer in self.layers:
            latents = layer(latents)
        return latents


class Layer(nn.Module):
    """x + attention(norm x; norm keys), then x + MLP(norm x) without a wider hidden layer; without keys x attends to itself."""

    def __init__(self, width: int, heads: int, key_width: int | None = None) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.norm_keys = nn.LayerNorm(key_width) if key_width else None
        self.attention = Attention(width, heads, key_width, bias=True)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x: Tensor, keys: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
        query = self.norm(x)
        keys = query if keys is None or self.norm_keys is None else self.norm_keys(keys)
        x = x + self.attention(query, keys, mask)
        return x + self.mlp(x)


def learned(count: int, width: int) -> Tensor:
    """Where learned vectors start: normal of deviation 0.02, within 2."""
    return (torch.randn(count, width) * 0.02).clamp(-2, 2)
