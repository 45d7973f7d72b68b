"""Diffusion with a few steps, velocity prediction and the last noise level at infinity: pure functions of tensors.

The schedule of PDE-Refiner (Lippe et al., NeurIPS 2023) as AROMA uses it: variances beta_k grow geometrically from `min_noise` to 1 over
k = 0 .. K, so K + 1 network calls make one sample, and the last level K is noise alone. Velocities are those of Salimans & Ho (ICLR 2022).
With ab_k = prod_{j <= k} (1 - beta_j), clean value y and noise e::

    noised = sqrt(ab) y + sqrt(1 - ab) e
    velocity = sqrt(ab) e - sqrt(1 - ab) y
    clean = sqrt(ab) noised - sqrt(1 - ab) velocity
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Schedule:
    """Float64 on the CPU: 1 - ab of the first level is as small as 1e-6, which single precision would blur."""

    beta: Tensor  # [K+1]
    alpha_bar: Tensor  # [K+1], the last exactly 0

    @property
    def levels(self) -> int:
        """K + 1, the network calls of one sample."""
        return len(self.beta)

    def at(self, level: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Share of signal sqrt(ab) and of noise sqrt(1 - ab) [R,1,1] at levels [R], in the type of `like`."""
        signal, noise = self.alpha_bar.sqrt().to(level.device)[level], (1 - self.alpha_bar).sqrt().to(level.device)[level]
        return signal.to(like.dtype).view(-1, 1, 1), noise.to(like.dtype).view(-1, 1, 1)


def schedule(min_noise: float, refinements: int) -> Schedule:
    """beta_k = min_noise^((K - k) / K) for k = 0 .. K = `refinements`. `min_noise` is a variance, whatever its name in released code."""
    beta = min_noise ** (torch.arange(refinements, -1, -1, dtype=torch.float64) / refinements)
    return Schedule(beta, (1 - beta).cumprod(0))


def noised(clean: Tensor, noise: Tensor, share: tuple[Tensor, Tensor]) -> Tensor:
    return share[0] * clean + share[1] * noise


def velocity(clean: Tensor, noise: Tensor, share: tuple[Tensor, Tensor]) -> Tensor:
    return share[0] * noise - share[1] * clean


def recovered(noisy: Tensor, velocity: Tensor, share: tuple[Tensor, Tensor]) -> Tensor:
    """The clean value that a velocity at a noisy one stands for."""
    return share[0] * noisy - share[1] * velocity


def posterior(clean: Tensor, noisy: Tensor, level: int, plan: Schedule) -> tuple[Tensor, float]:
    """Mean and standard deviation of the value one level lower (Ho et al., 2020, eq. 7); at level 0 `clean` itself, without noise."""
    beta, bar = float(plan.beta[level]), float(plan.alpha_bar[level])
    before = float(plan.alpha_bar[level - 1]) if level else 1.0
    mean = before**0.5 * beta / (1 - bar) * clean + (1 - beta) ** 0.5 * (1 - before) / (1 - bar) * noisy
    return mean, (beta * (1 - before) / (1 - bar)) ** 0.5


def sample(network: Callable[[Tensor, Tensor], Tensor], noise: Sequence[Tensor], plan: Schedule) -> Tensor:
    """One sample [R,M,d]. `network(noisy, level [1])` gives velocities; noise[0] is where it starts, noise[i] is added after call i."""
    value = noise[0]
    for number, level in enumerate(reversed(range(plan.levels))):
        which = torch.full((1,), level, device=value.device)
        clean = recovered(value, network(value, which), plan.at(which, value))
        value, deviation = posterior(clean, value, level, plan)
        if level:
            value = value + deviation * noise[number + 1]
    return value
