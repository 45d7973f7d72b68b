"""Vector quantisation: each vector becomes the nearest of V learned codes.

Van den Oord, Vinyals, Kavukcuoglu, "Neural Discrete Representation Learning", NeurIPS 2017, arXiv 1711.00937: the straight-through
gradient, the loss L_VQ, and (appendix A.1) codes as moving averages of the vectors that chose them. Codes that hardly any vector chooses
start again at vectors of the batch, as in Dhariwal et al., "Jukebox", 2020, arXiv 2005.00341; the first step of training is the same
case, so codes start inside the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Quantized:
    """Vectors [...,e] as codes."""

    vector: Tensor  # [...,e] the code vectors, with the gradient of the input
    index: Tensor  # [...] int64
    distance: Tensor  # [...] mean over e of ||sg[z] - code||^2 + commitment ||z - sg[code]||^2, L_VQ before its mean


class Quantizer(nn.Module):
    """V codes of e numbers.

    `decay` None: codes are parameters, which the first term of L_VQ trains. Else they are buffers, moving averages with that decay, and
    that term has no gradient. `restart`: a code starts again when its moving average of uses falls below this share of an even use; 0 is
    never. Codes and counts change in training mode alone, and only where `learn` says so.
    """

    code: Tensor
    uses: Tensor
    total: Tensor

    def __init__(self, codes: int, width: int, commitment: float, decay: float | None, restart: float) -> None:
        super().__init__()
        self.commitment, self.restart = commitment, restart
        self.averaged, self.decay = decay is not None, 0.99 if decay is None else decay
        start = (2 * torch.rand(codes, width) - 1) / codes
        if self.averaged:
            self.register_buffer("code", start)
            self.register_buffer("total", torch.zeros(codes, width))  # moving average of the sum of a code's vectors, a step
        else:
            self.code = nn.Parameter(start)
        self.register_buffer("uses", torch.zeros(codes))  # moving average of a code's uses, a step

    def forward(self, z: Tensor, known: Tensor | None = None, learn: bool = False) -> Quantized:
        """z [R,...,e]; known [R] is False for rows that must not move the codes."""
        index = (self.code.detach().square().sum(-1) - 2 * z.detach() @ self.code.detach().mT).argmin(-1)
        code = self.code[index]
        distance = (z.detach() - code).square() + self.commitment * (z - code.detach()).square()
        # With a gradient the sum is the code up to rounding; elsewhere it is the code itself.
        vector = z + (code - z).detach() if z.requires_grad else code
        if learn and self.training:
            part = slice(None) if known is None else known
            self._learn(z.detach()[part].flatten(0, -2), index[part].flatten())
        return Quantized(vector, index, distance.mean(-1))

    @torch.no_grad()
    def _learn(self, z: Tensor, index: Tensor) -> None:
        """z [n,e] chose codes index [n]: move the averages, start unused codes again."""
        blend = 1 - self.decay
        if not len(index):
            return
        self.uses.lerp_(torch.bincount(index, minlength=len(self.uses)).to(self.uses.dtype), blend)
        if self.averaged:
            self.total.lerp_(torch.zeros_like(self.total).index_add_(0, index, z.to(self.total.dtype)), blend)
            used = self.uses > torch.finfo(self.uses.dtype).tiny
            self.code[used] = self.total[used] / self.uses[used].unsqueeze(-1)
        if self.restart:
            even = self.uses.mean()
            idle = (self.uses < self.restart * even).nonzero()[:, 0]
            idle = idle[torch.randperm(len(idle), device=z.device)[: len(z)]]  # no more than there are vectors
            chosen = z[torch.randperm(len(z), device=z.device)[: len(idle)]].to(self.code.dtype)
            self.code[idle], self.uses[idle] = chosen, even
            if self.averaged:
                self.total[idle] = chosen * even


def perplexity(index: Tensor, codes: int) -> Tensor:
    """exp of the entropy of how often each code occurs in index [...]: 1 if one code does all, V if all are used alike."""
    share = torch.bincount(index.flatten(), minlength=codes).double() / max(1, index.numel())
    return torch.special.entr(share).sum().exp()


def usage(index: Tensor, codes: int) -> Tensor:
    """Share of the codes that occur in index [...]."""
    return (torch.bincount(index.flatten(), minlength=codes) > 0).double().mean()
