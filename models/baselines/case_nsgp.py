"""A Gaussian process whose length scales differ from place to place and from time to time, fitted to each case.

The covariance is a product over the inputs of Gibbs' kernels (Gibbs 1997, chapter 3), whose length scales are functions of their input, and
of a periodic one for the day. The logarithm of a length scale is itself a Gaussian process, given by its values at inducing inputs, which
are fitted with their prior (Plagemann, Kersting and Burgard 2008). Patel et al. (AAAI 2022), the reference of the AirDelhi benchmark, use
that for air quality, with batches of observations for the marginal likelihood; the answers then come from all of them.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from models.baselines.fitted import FLOOR
from models.baselines.per_case import Case, PerCase
from models.contract import DatasetInfo

_JITTER = 1e-6  # beside a variance of about 1


class CaseNsgp(PerCase):
    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        steps: int = Field(60, ge=1)
        batch: int = Field(300, ge=2)  # observations in the marginal likelihood of a step
        learning_rate: float = Field(0.1, gt=0)
        inducing: int = Field(20, ge=1)  # inputs of each axis at which a length scale is fitted
        stationary: bool = False  # one length scale an axis
        daily: bool = True  # where there is a calendar, what recurs every day counts as near
        seed: int = 0

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config

    def answers(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        known, asked = case.known.inputs, case.asked.inputs
        centre, spread = known.mean(0), known.std(0)
        spread[spread == 0] = 1
        period = 1440 / spread[0] if self.config.daily and self.info.time_origin else None
        # Not within the inference mode of an evaluation: this trains.
        with torch.inference_mode(False), torch.enable_grad():
            at, to = (torch.from_numpy((inputs - centre) / spread) for inputs in (known, asked))
            columns = [self._of_variable(at, torch.from_numpy(value.copy()), to, period) for value in case.value.T]
        mean, scale = (np.stack(parts, axis=-1) for parts in zip(*columns, strict=True))
        return mean, scale

    def _of_variable(self, known: Tensor, value: Tensor, asked: Tensor, period: float | None) -> tuple[np.ndarray, np.ndarray]:
        centre, spread = value.mean(), value.std(correction=0).clamp(min=FLOOR)
        process = fitted(known, (value - centre) / spread, period, self.config)
        with torch.no_grad():
            mean, variance = process.posterior(known, (value - centre) / spread, asked)
        return (centre + spread * mean).numpy(), (spread * variance.sqrt()).numpy()


class Process(nn.Module):
    """A zero-mean process over inputs [N,A]; all parameters but the whitened ones are logarithms."""

    def __init__(self, known: Tensor, period: float | None, inducing: int, stationary: bool = False) -> None:
        super().__init__()
        self.period, self.stationary = period, stationary
        axes = known.shape[1]
        share = torch.linspace(0, 1, inducing, dtype=known.dtype)
        self.inducing = [known[:, axis].unique().quantile(share).unique() for axis in range(axes)]

        def numbers(value: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.full(shape, math.log(value), dtype=known.dtype))

        self.signal, self.noise, self.wave = numbers(1.0), numbers(0.3), numbers(1.0)
        self.length = numbers(0.5, axes)  # the mean of the length scales
        self.bend = numbers(1.0, axes)  # over which a length scale changes
        self.change = numbers(0.3, axes)  # how much it changes
        self.white = nn.ParameterList([nn.Parameter(torch.zeros(len(at), dtype=known.dtype)) for at in self.inducing])

    def lengths(self, x: Tensor, axis: int) -> Tensor:
        """Length scales [N] at inputs [N] of an axis."""
        constant = self.length[axis].exp().expand(len(x))
        if self.stationary:
            return constant
        at, bend = self.inducing[axis], self.bend[axis].exp()
        among = rbf(at, at, bend) + 1e-4 * torch.eye(len(at), dtype=x.dtype)
        weight = torch.linalg.solve_triangular(torch.linalg.cholesky(among).T, self.white[axis][:, None], upper=True)[:, 0]
        return constant * (self.change[axis].exp() * (rbf(x, at, bend) @ weight)).exp()

    def covariance(self, left: Tensor, right: Tensor) -> Tensor:
        """[N,M] between inputs [N,A] and [M,A], without noise."""
        out = (2 * self.signal).exp()
        for axis in range(left.shape[1]):
            out = out * gibbs(left[:, axis], right[:, axis], self.lengths(left[:, axis], axis), self.lengths(right[:, axis], axis))
        if self.period is not None:
            wave = torch.sin(math.pi * (left[:, None, 0] - right[None, :, 0]) / self.period)
            out = out * (-2 * (wave / self.wave.exp()).square()).exp()
        return out

    def loss(self, known: Tensor, value: Tensor, count: int) -> Tensor:
        """Negative log marginal likelihood of a batch per observation, and of what the prior says of the length scales, of which there
        is one for all `count` observations."""
        factor = self._factor(known)
        alpha = torch.linalg.solve_triangular(factor, value[:, None], upper=False)
        fit = 0.5 * alpha.square().sum() + factor.diagonal().log().sum()
        return fit / len(known) + 0.5 * torch.cat(list(self.white)).square().sum() / count

    def posterior(self, known: Tensor, value: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance [Q] of an observation, its noise included."""
        factor = self._factor(known)
        across = torch.linalg.solve_triangular(factor, self.covariance(known, asked), upper=False)
        mean = across.T @ torch.linalg.solve_triangular(factor, value[:, None], upper=False)[:, 0]
        noise = (2 * self.noise).exp()
        return mean, ((2 * self.signal).exp() - across.square().sum(0)).clamp(min=0) + noise

    def _factor(self, known: Tensor) -> Tensor:
        noise = ((2 * self.noise).exp() + _JITTER) * torch.eye(len(known), dtype=known.dtype)
        return torch.linalg.cholesky(self.covariance(known, known) + noise)


def fitted(known: Tensor, value: Tensor, period: float | None, config: CaseNsgp.Config) -> Process:
    """The process after some steps of Adam on the marginal likelihood of random batches."""
    process = Process(known, period, config.inducing, config.stationary)
    optimizer = torch.optim.Adam(process.parameters(), config.learning_rate)
    generator = torch.Generator().manual_seed(config.seed)
    for _ in range(config.steps):
        rows = torch.randperm(len(known), generator=generator)[: config.batch]
        optimizer.zero_grad()
        process.loss(known[rows], value[rows], len(known)).backward()
        optimizer.step()
    return process


def rbf(left: Tensor, right: Tensor, length: Tensor) -> Tensor:
    return (-0.5 * ((left[:, None] - right) / length).square()).exp()


def gibbs(left: Tensor, right: Tensor, left_length: Tensor, right_length: Tensor) -> Tensor:
    """Correlation [N,M] of inputs [N] and [M] with their length scales; Gaussian where the scales are one."""
    square = left_length[:, None].square() + right_length.square()
    return (2 * left_length[:, None] * right_length / square).sqrt() * (-(left[:, None] - right).square() / square).exp()
