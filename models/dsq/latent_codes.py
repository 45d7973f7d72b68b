"""The latents of a frame as a few discrete codes, and back: a VQ-VAE over the M latents, seen as a square image in the order of tokens.

Shapes::

    R rows   M latents   c latent channels   G codes a frame   e numbers a code   h hidden channels

Each halving of the image's side quarters the number of places: G = M / 4^k with k halvings. The layers are those of the encoder and decoder
of van den Oord, Vinyals, Kavukcuoglu (NeurIPS 2017, arXiv 1711.00937).

Most of a latent is the same in every frame: it says which token this is. `centred` takes that mean away before the convolutions, which
treat all places alike and would spend codes on it, and adds it again after them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from models.dsq.quantizer import Quantizer


def halvings(latents: int, codes: int) -> int:
    """How often the side of an image of M latents is halved to leave G places. Raises ValueError where no whole number does it."""
    side = round(latents**0.5)
    times = next((k for k in range(1, 16) if codes * 4**k == latents), None)
    if side * side != latents or times is None:
        raise ValueError(
            f"{latents} latents do not halve into {codes} codes a frame: latents must be a square number and codes_per_frame 4, 16, 64, "
            "... times smaller"
        )
    return times


class LatentCodes(nn.Module):
    """Latents [R,M,c] <-> features [R,G,e], which the `quantizer` turns into codes."""

    mean: Tensor
    variance: Tensor
    seen: Tensor

    def __init__(
        self,
        latents: int,
        channels: int,
        codes_per_frame: int,
        hidden: int,
        residual_hidden: int,
        code_width: int,
        quantizer: Quantizer,
        centred: bool,
    ) -> None:
        super().__init__()
        times = halvings(latents, codes_per_frame)
        self.side, self.centred = round(latents**0.5), centred
        self.register_buffer("mean", torch.zeros(latents, channels))
        self.register_buffer("variance", torch.ones(()))  # around that mean, over everything
        self.register_buffer("seen", torch.zeros(()))  # batches observed
        widths = [channels, *[hidden // 2] * (times - 1), hidden]
        down: list[nn.Module] = []
        for before, after in pairwise(widths):
            down += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        self.down = nn.Sequential(*down, nn.Conv2d(hidden, hidden, 3, padding=1), *_residuals(hidden, residual_hidden))
        self.narrow = nn.Conv2d(hidden, code_width, 1)
        self.quantizer = quantizer
        up: list[nn.Module] = []
        for before, after in pairwise(widths[::-1]):
            up += [nn.ReLU()] * bool(up) + [nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)]
        self.up = nn.Sequential(nn.Conv2d(code_width, hidden, 3, padding=1), *_residuals(hidden, residual_hidden), *up)

    @torch.no_grad()
    def observe(self, latents: Tensor) -> None:
        """Take the statistics of latents [R,M,c] into account: an average over the first hundred batches, then a moving one."""
        if not self.centred or not len(latents):
            return
        self.seen += 1
        blend = (1 / self.seen).clamp(min=0.01)
        self.mean.lerp_(latents.mean(0), blend)
        self.variance.lerp_((latents - self.mean).square().mean(), blend)

    def unit(self, latents: Tensor) -> Tensor:
        """Latents without their mean, in units of what remains."""
        return (latents - self.mean) / self.variance.clamp(min=1e-12).sqrt()

    def whole(self, unit: Tensor) -> Tensor:
        """The opposite of `unit`."""
        return unit * self.variance.clamp(min=1e-12).sqrt() + self.mean

    def features(self, latents: Tensor) -> Tensor:
        """[R,M,c] -> [R,G,e], before quantisation."""
        image = self.unit(latents).transpose(1, 2).unflatten(-1, (self.side, self.side))
        return self.narrow(self.down(image)).flatten(2).transpose(1, 2)

    def latents(self, vector: Tensor) -> Tensor:
        """Code vectors [R,G,e] -> [R,M,c]."""
        side = round(vector.shape[1] ** 0.5)
        return self.whole(self.up(vector.transpose(1, 2).unflatten(-1, (side, side))).flatten(2).transpose(1, 2))

    def embed(self, index: Tensor) -> Tensor:
        """Indices [...] -> code vectors [...,e]."""
        return self.quantizer.code[index]


class Residual(nn.Module):
    """x + two convolutions of it."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.inner = nn.Conv2d(width, hidden, 3, padding=1, bias=False)
        self.outer = nn.Conv2d(hidden, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x.relu()).relu())


def _residuals(width: int, hidden: int) -> list[nn.Module]:
    return [Residual(width, hidden), Residual(width, hidden), nn.ReLU()]
