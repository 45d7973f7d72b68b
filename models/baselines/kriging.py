"""Ordinary kriging of the last frame, persisted: a value stays where it was observed, kriged values stay elsewhere.

The covariance is isotropic, one per variable, fitted by GSTools to the pooled empirical variogram of training frames (Matheron's estimator,
Cressie's weights count / gamma^2). On a torus it acts on chordal distances, where it is valid (models/baselines/analysis.py).

With `exact` the nugget counts as variation too small to resolve, so the analysis meets every observation; without, as measurement error.
With `sigma: fitted` the own standard deviation, leads included, becomes

    log sigma = a + b log(own) + c log(1 + |value| / std) + d log(1 + lead)

by maximum likelihood over training questions away from observations, or persisted; |value| is the mean in physical units.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable
from typing import Literal

import gstools
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from scipy.optimize import minimize
from torch import Tensor

from models.baselines.analysis import Method, embed, separation
from models.baselines.fitted import FLOOR
from models.baselines.spatial import Residuals, Spatial
from models.contract import DatasetInfo, FieldBatch

SMOOTHNESS = {"exponential": 0.5, "matern32": 1.5, "matern52": 2.5}
HEAD = 16  # batches the variogram is taken from
_LEAST_NUGGET = 1e-9  # of the variance: keeps a dense layout solvable in float64


class Kriging(Spatial):
    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        covariance: Literal["exponential", "matern32", "matern52"] = "matern32"
        nugget: bool = True  # fit one; False: noise-free observations of a smooth field
        exact: bool = True
        sigma: Literal["own", "fitted"] = "own"
        ignore_moving: bool = False
        neighbours: int | None = Field(
            None, ge=2
        )  # solve each point from its nearest observations only, for thousands of sensors; None: all
        frames: int = Field(64, ge=1)  # for the variogram
        points: int = Field(400, ge=2)  # of a frame, for the variogram
        bins: int = Field(20, ge=3)
        reach: float = Field(0.5, gt=0, le=1)  # largest lag of the variogram, as a share of the largest distance

    parts = ("variance", "length", "nugget", "growth", "sigma")

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info, config.ignore_moving)
        self.config = config

    def keeps(self, age: Tensor, variance: Tensor) -> Tensor:
        """Without `exact` a reported value is a noisy one, and the analysis that smooths it is the answer."""
        return super().keeps(age, variance) if self.config.exact else torch.zeros_like(age, dtype=torch.bool)

    def fit(self, batches: Iterable[FieldBatch]) -> None:
        stream = iter(batches)
        head = list(itertools.islice(stream, HEAD))
        self.fit_covariance(head)
        residuals = self.residuals(itertools.chain(head, stream))
        self._state["growth"] = self.fit_growth(residuals, residuals.variance)
        self._state["sigma"] = self._fit_sigma(residuals)

    def fit_covariance(self, batches: list[FieldBatch]) -> None:
        """Fit variance, length and nugget [C] from the last context frames of a few batches."""
        found = [self._covariance(channel, batches) for channel in range(len(self.info.variables))]
        self._state = dict(zip(("variance", "length", "nugget"), torch.tensor(found, dtype=torch.float64).T.contiguous(), strict=True))

    def method(self) -> Method:
        parameters = [self.state()[name] for name in ("variance", "length", "nugget")]
        channels = list(zip(*(p.tolist() for p in parameters if isinstance(p, Tensor)), strict=True))

        def method(place: Tensor) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
            solvers = [self._solver(place, *channel) for channel in channels]

            def solve(distance: Tensor) -> tuple[Tensor, Tensor]:
                weights, variance = zip(*(solver(distance) for solver in solvers), strict=True)
                return torch.stack(weights), torch.stack(variance)

            return solve

        return method

    def _solver(self, place: Tensor, variance: float, length: float, nugget: float) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Factorise the system of a layout [N,D'] once; then distances [Q,N] -> weights [Q,N] that sum to one, variance [Q]."""
        if self.config.neighbours is not None and self.config.neighbours < len(place):
            return self._local_solver(place, variance, length, nugget, self.config.neighbours)
        matrix = correlation(separation(place, place).div_(length), self.config.covariance).mul_(variance)
        matrix.diagonal().add_(nugget)
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(matrix))
        row = inverse.sum(0)
        total = row.sum()

        def solve(distance: Tensor) -> tuple[Tensor, Tensor]:
            reach = correlation(distance / length, self.config.covariance).mul_(variance)
            if self.config.exact:
                reach.add_(distance == 0, alpha=nugget)
            simple = reach @ inverse
            short = 1 - simple.sum(1)  # what the simple weights lack to sum to one
            weights = simple + short[:, None] * (row / total)
            return weights, (variance + nugget - (simple * reach).sum(1) + short.square() / total).clamp(min=0)

        return solve

    def _local_solver(
        self, place: Tensor, variance: float, length: float, nugget: float, neighbours: int
    ) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """The same, with a small system for each point [Q,k,k]."""

        def solve(distance: Tensor) -> tuple[Tensor, Tensor]:
            apart, near = distance.topk(neighbours, dim=1, largest=False)
            matrix = correlation(separation(place[near], place[near]).div_(length), self.config.covariance).mul_(variance)
            matrix.diagonal(dim1=1, dim2=2).add_(nugget)
            reach = correlation(apart / length, self.config.covariance).mul_(variance)
            if self.config.exact:
                reach.add_(apart == 0, alpha=nugget)
            right = torch.stack([reach, torch.ones_like(reach)], dim=-1)
            simple, row = torch.cholesky_solve(right, torch.linalg.cholesky(matrix)).unbind(-1)
            short, total = 1 - simple.sum(1), row.sum(1)
            weights = torch.zeros_like(distance).scatter_(1, near, simple + (short / total)[:, None] * row)
            return weights, (variance + nugget - (simple * reach).sum(1) + short.square() / total).clamp(min=0)

        return solve

    def spread(self, mean: Tensor, variance: Tensor, lead: Tensor) -> Tensor:
        own = super().spread(mean, variance, lead).clamp(min=FLOOR)
        if self.config.sigma == "own":
            return own
        fitted = (self._terms(mean, own, lead) * self.tensor("sigma", own)).sum(-1).exp()
        return torch.where(own > FLOOR, fitted, own)  # at an observation itself nothing is left to guess

    def _terms(self, mean: Tensor, own: Tensor, lead: Tensor) -> Tensor:
        """The four terms (...,C,4) of log sigma."""
        zero = torch.tensor(self.info.mean, dtype=own.dtype, device=own.device) / torch.tensor(
            self.info.std, dtype=own.dtype, device=own.device
        )
        later = lead.clamp(min=0).to(own.dtype).log1p()[..., None].expand(own.shape)
        return torch.stack([torch.ones_like(own), own.log(), (mean + zero).abs().log1p(), later], dim=-1)

    def _fit_sigma(self, residuals: Residuals) -> Tensor:
        """[C,4] by maximum likelihood of Gaussian errors; the own sigma where there is nothing to fit from."""
        own = super().spread(residuals.mean, residuals.variance, residuals.lead)
        terms = self._terms(residuals.mean, own.clamp(min=FLOOR), residuals.lead)
        out = torch.tensor([[0.0, 1.0, 0.0, 0.0]] * own.shape[1], dtype=torch.float64)
        for c in range(own.shape[1]):
            use = own[:, c] > FLOOR
            if not use.any():
                continue
            design, square = terms[use, c].numpy(), residuals.error[use, c].square().clamp(min=FLOOR**2).numpy()

            def loss(p: np.ndarray, design: np.ndarray = design, square: np.ndarray = square) -> tuple[float, np.ndarray]:
                log = design @ p
                ratio = square * np.exp(-2 * log)
                # a whisper of a ridge around the own sigma: terms that never vary (one lead, say) stay where they are
                pull = p - [0, 1, 0, 0]
                return float((log + ratio / 2).mean() + 1e-4 * pull @ pull), ((1 - ratio) @ design) / len(design) + 2e-4 * pull

            found = minimize(loss, np.array([0.0, 1.0, 0.0, 0.0]), jac=True, method="BFGS")
            out[c] = torch.from_numpy(found.x)
        return out

    def _covariance(self, channel: int, batches: list[FieldBatch]) -> tuple[float, float, float]:
        """Variance, length and nugget of one variable."""
        frames = list(itertools.islice(self._frames(batches, channel), self.config.frames))
        if not frames:
            raise ValueError(f"{self.info.name}: no training frame has two places with an observation: kriging cannot be fitted")
        largest = max(np.ptp(place, axis=0).max() for place, _ in frames) * math.sqrt(frames[0][0].shape[1])
        edges = np.linspace(0, self.config.reach * largest, self.config.bins + 1)
        gamma, count = np.zeros(self.config.bins), np.zeros(self.config.bins)
        for place, value in frames:
            lag, found, pairs = gstools.vario_estimate(place.T, value, edges, return_counts=True)
            gamma, count = gamma + found * pairs, count + pairs
        filled = count > 0
        if not filled.any():
            raise ValueError(f"{self.info.name}: no two observations lie within {edges[-1]:.3g} of each other: raise kriging's `reach`")
        gamma, lag, count = gamma[filled] / count[filled], lag[filled], count[filled]
        if not (gamma > 0).any():  # a constant field: any covariance gives the constant
            return _LEAST_NUGGET, float(lag.mean()), _LEAST_NUGGET**2
        model = covariance_model(self.config.covariance, frames[0][0].shape[1], float(gamma.max()), float(lag.mean()), 0.0)
        top = 10 * float(gamma.max())
        model.set_arg_bounds(var=[1e-6 * top, top], len_scale=[0.1 * float(lag.min()), 10 * float(lag.max())], nugget=[0.0, top])
        model.fit_variogram(
            lag,
            gamma,
            init_guess={"var": float(gamma.max()), "len_scale": float(lag.mean()), "nugget": 0.0},
            weights=np.sqrt(count) / np.maximum(gamma, 1e-6 * gamma.max()),
            loss="linear",
            max_eval=100_000,  # a smooth field has a flat optimum, which the default of a few hundred may miss
            **({} if self.config.nugget else {"nugget": False}),
        )
        length = float(model.len_scale) / math.sqrt(SMOOTHNESS[self.config.covariance] if self.config.covariance != "exponential" else 1)
        return float(model.var), length, max(float(model.nugget), _LEAST_NUGGET * float(model.var))

    def _frames(self, batches: list[FieldBatch], channel: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Embedded places [N,D'] and values [N] of last context frames with at least two places, evenly thinned."""
        for batch in batches:
            context = self.seen(batch.context)
            assert context.value is not None
            for b in range(len(context.mask)):
                keep = context.mask[b, -1].nonzero()[:, 0]
                keep = keep[:: -(-len(keep) // self.config.points)] if len(keep) else keep
                place = embed(context.position[b, -1, keep], self.info.period).cpu().numpy()
                if len(place) > 1 and np.ptp(place, axis=0).max() > 0:
                    yield place, context.value[b, -1, keep, channel].double().cpu().numpy()


def correlation(scaled: Tensor, name: str) -> Tensor:
    """Correlation at distance / length, where length is what divides the distance inside the exponential."""
    decay = scaled.neg().exp_()
    if name == "exponential":
        return decay
    polynomial = scaled + 1
    if name == "matern52":
        polynomial.addcmul_(scaled, scaled, value=1 / 3)
    return decay.mul_(polynomial)


def covariance_model(name: str, dim: int, variance: float, length: float, nugget: float) -> gstools.CovModel:
    """The same covariance as a GSTools model, whose Matern length is sqrt(smoothness) times ours."""
    if name == "exponential":
        return gstools.Exponential(dim=dim, var=variance, len_scale=length, nugget=nugget)
    nu = SMOOTHNESS[name]
    return gstools.Matern(dim=dim, var=variance, len_scale=math.sqrt(nu) * length, nugget=nugget, nu=nu)
