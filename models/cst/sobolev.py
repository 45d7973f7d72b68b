"""The Sobolev loss of CST (arXiv 2301.13338): ||y - data||_p + mu * sum over q = 1..k of ||D^q y||_p.

D^q holds all derivatives of order q of every output, taken token by token with reverse-mode differentiation of the sum over tokens. That
sum is the derivative of each token alone where no output depends on another token's coordinates; where it does, other tokens mix in.

Shapes: B batch, S tokens, C channels, A coordinates.
"""

from __future__ import annotations

import torch
from torch import Tensor

_FLOOR = 1e-24  # below the p-th root, so that the norm of nothing has a gradient


def norm(x: Tensor, p: float, mask: Tensor | None = None) -> Tensor:
    """Mean over the batch of the p-norm of x [B,S,C] over tokens and channels; mask [B,S] is True where a token counts."""
    power = x.abs() ** p
    if mask is not None:
        power = torch.where(mask.unsqueeze(-1), power, 0.0)
    return ((power.flatten(1).sum(1) + _FLOOR) ** (1 / p)).mean()


def penalties(output: Tensor, at: Tensor, order: int, p: float) -> list[Tensor]:
    """||D^q output||_p for q = 1..order; output [B,S,C] was computed from at [B,S,A], which requires gradients."""
    terms = []
    derivative = output
    for _ in range(order):
        derivative = _derivative(derivative, at)
        terms.append(norm(derivative, p))
    return terms


def released(output: Tensor, value: Tensor, order: int, p: float, first: int) -> list[Tensor]:
    """The terms of the authors' code: each order is the gradient of the sum of all outputs [B,S,C], over tokens and channels, with respect
    to all values [B,S,C], and its norm is taken at the tokens from `first` on, the dummies.

    It keeps the graph of the first order only: the second then trains nothing, and all further ones are zero.
    """
    terms = []
    derivative = output
    for q in range(1, order + 1):
        if derivative.requires_grad:
            (derivative,) = torch.autograd.grad(derivative.sum(), value, retain_graph=True, create_graph=q == 1, materialize_grads=True)
        else:
            derivative = torch.zeros_like(value)
        terms.append(norm(derivative[:, first:], p))
    return terms


def _derivative(y: Tensor, at: Tensor) -> Tensor:
    """All first derivatives [B,S,C*A] of y [B,S,C] with respect to at [B,S,A]; zero where y does not depend on it."""
    if not y.requires_grad:
        return y.new_zeros(*y.shape[:2], y.shape[2] * at.shape[2])
    sums = y.sum((0, 1)).unbind()
    return torch.cat([torch.autograd.grad(each, at, retain_graph=True, create_graph=True, materialize_grads=True)[0] for each in sums], -1)
