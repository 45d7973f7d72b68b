"""From observations to latents: tokens, context embedding network (CEN), time-targeted spatial encoder (TTSE), temporal warp
processor (TWP)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from models.contract import DatasetInfo, Frames
from models.layers import Fourier, Spacing
from models.scent.attention import Block, SparseBlocks
from models.scent.config import ScentConfig


class Coordinates(nn.Module):
    """Fourier features of places, and of times in frames."""

    def __init__(self, config: ScentConfig, info: DatasetInfo) -> None:
        super().__init__()
        spacing: Spacing = config.spacing or ("linear" if info.period is None else "integers")
        # A raw coordinate jumps where a torus closes, as do frequencies that are not whole.
        self.place = Fourier(len(info.space), config.bands, config.highest, spacing, raw=spacing != "integers")
        self.scale = float(config.time_scale or config.horizon)
        self.time = Fourier(1, config.time_bands, max(1.0, self.scale / 2))

    def clock(self, frames: Tensor) -> Tensor:
        """Time features (...,width) of times in frames (...)."""
        return self.time(frames.unsqueeze(-1) / self.scale)


@dataclass(frozen=True)
class Seen:
    """A context as tokens that do not know yet what is asked."""

    features: Tensor  # [B,T,N,f]
    token: Tensor  # [B,T*N,d]
    position: Tensor  # [B,T,N,D]
    mask: Tensor  # [B,T*N]
    start: Tensor  # [B,1] t_i on the model's clock, in frames


class Encoder(nn.Module):
    """`see` embeds a context once; calling the encoder summarises it for the leads asked for."""

    frozen: Tensor

    def __init__(self, config: ScentConfig, info: DatasetInfo, coordinates: Coordinates) -> None:
        super().__init__()
        c, channels = config, len(info.variables)
        self.config, self.info, self.coordinates = config, info, coordinates
        # Absolute hours since an epoch mean nothing to a network; calendar data bring their hour and season as covariates.
        self.absolute_clock = c.clock == "absolute" and not info.time_origin
        values, clock = channels, coordinates.time.width
        if c.projection == "frozen":
            self.register_buffer("frozen", torch.randn(channels, c.projection_width) / channels**0.5)
            values = c.projection_width
        elif c.projection == "trainable":
            self.projection = nn.Linear(channels, c.projection_width)
            values = c.projection_width
        self.features = values + clock + c.absolute_position * coordinates.place.width + len(info.context_covariates)
        self.token = nn.Linear(self.features, c.width)
        self.target = nn.Linear(clock, c.width, bias=False) if c.time_targeting else None

        def block(cross: bool = False, condition: int = 0) -> Block:
            return Block(c.width, c.heads, c.ffn_factor, cross, condition)

        self.cen = SparseBlocks([block() for _ in range(c.cen_layers)], c.group, c.permutation_seed)
        self.latents = nn.Parameter(torch.randn(c.latents, c.width))
        self.summary = block(cross=True)
        self.processor = nn.ModuleList(block(condition=c.adaptive_norm * clock) for _ in range(c.processor_layers))

    def see(self, context: Frames) -> Seen:
        """Tokens of the observations."""
        if self.config.order == "canonical":
            context = in_order_of_place(context)
        assert context.value is not None
        mask = context.mask.unsqueeze(-1)
        value, position = torch.where(mask, context.value, 0), torch.where(mask, context.position, 0)
        if self.config.projection == "frozen":
            value = value @ self.frozen
        elif self.config.projection == "trainable":
            value = self.projection(value)
        kind = self.latents.dtype
        now = context.time[:, -1:]
        own = (context.time if self.absolute_clock else context.time - now) / self.info.step
        parts = [value, self.coordinates.clock(own.to(kind)).unsqueeze(2).expand(*context.mask.shape, -1)]
        if self.config.absolute_position:
            parts.append(self.coordinates.place(position))
        if context.covariate is not None:
            parts.append(torch.where(mask, context.covariate, 0))
        features = torch.cat(parts, -1)
        start = (now / self.info.step if self.absolute_clock else torch.zeros_like(now)).to(kind)
        return Seen(features, self.token(features).flatten(1, 2), position, context.mask.flatten(1), start)

    def forward(self, seen: Seen, lead: Tensor) -> Tensor:
        """Latents [B,S,M,d] for leads [B,S] in frames. Without time targeting and adaptive norms they are the same for all: [B,1,M,d]."""
        lead = lead.to(self.latents.dtype)
        h = seen.token.unsqueeze(1)
        if self.target is not None:
            h = h + self.target(self.coordinates.clock(seen.start + lead)).unsqueeze(2)
        b, s = h.shape[:2]
        h, mask = h.flatten(0, 1), seen.mask.repeat_interleave(s, 0)
        h = self.cen(h, mask)
        latents = self.summary(self.latents.expand(b * s, -1, -1), h, None if bool(mask.all()) else mask.unsqueeze(1))
        condition = None
        if self.config.adaptive_norm and self.processor:
            if s < lead.shape[1]:
                latents, s = latents.repeat_interleave(lead.shape[1], 0), lead.shape[1]
            condition = self.coordinates.clock(lead).flatten(0, 1).unsqueeze(1)
        for block in self.processor:
            latents = block(latents, condition=condition)
        return latents.unflatten(0, (b, s))


def in_order_of_place(context: Frames) -> Frames:
    """Observations of each frame in the order of their place (then value), padding last: the order given does not matter."""
    assert context.value is not None
    order = torch.arange(context.mask.shape[-1], device=context.mask.device).expand(context.mask.shape)
    keys = [*context.value.unbind(-1)[::-1], *context.position.unbind(-1)[::-1], (~context.mask).to(torch.uint8)]
    for key in keys:  # the least significant first; each sort keeps the order of its equals
        order = order.gather(-1, key.gather(-1, order).argsort(dim=-1, stable=True))

    def take(x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        return x.gather(2, order if x.ndim == 3 else order.unsqueeze(-1).expand(*order.shape, x.shape[-1]))

    position, mask = take(context.position), take(context.mask)
    assert position is not None
    assert mask is not None
    return replace(
        context, position=position, mask=mask, value=take(context.value), covariate=take(context.covariate), sensor=take(context.sensor)
    )
