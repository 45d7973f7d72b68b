"""What every baseline shares: a fitted state of plain tensors and strings, and tables over leads and distances read by interpolation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from models.contract import TASKS, DatasetInfo, Frames

FLOOR = 1e-3  # smallest standard deviation ever stated, in model units: a score of a distribution needs one above zero


class Fitted:
    """Base of the baselines: `parts` names the entries of the state that `fit` or `load` must bring."""

    tasks: frozenset[str] = frozenset(TASKS)
    levels: tuple[float, ...] = ()
    crossfit: ClassVar[bool] = False
    parts: ClassVar[tuple[str, ...]]

    def __init__(self, info: DatasetInfo) -> None:
        self.info = info
        self._state: dict[str, Tensor | str] = {}

    def state(self) -> dict[str, Tensor | str]:
        """A copy of what was fitted; raises ValueError before `fit` or `load`."""
        if not self._state:
            raise ValueError(f"{type(self).__name__} is not fitted: call fit or load first")
        return dict(self._state)

    def load(self, state: Mapping[str, Tensor | str]) -> None:
        missing, unknown = set(self.parts) - set(state), set(state) - set(self.parts)
        if missing or unknown:
            raise ValueError(f"state of {type(self).__name__}: missing {sorted(missing)}, unknown {sorted(unknown)}")
        self._state = dict(state)

    def tensor(self, name: str, like: Tensor) -> Tensor:
        """A fitted tensor, on the device of `like`."""
        value = self.state()[name]
        assert isinstance(value, Tensor)
        return value.to(like.device)

    def lead(self, context: Frames, query: Frames) -> Tensor:
        """Leads [B,S] in frames of the dataset's nominal step, from the last context frame."""
        return (query.time - context.time[:, -1:]) / self.info.step


def by_lead(value: Tensor, lead: Tensor) -> Tensor:
    """Mean of value [M,C] at whole leads 0..max(lead [M]) -> [L,C]; leads without a row are interpolated from their neighbours."""
    whole = lead.round().clamp(min=0).long()
    length = int(whole.max()) + 1
    count = torch.bincount(whole, minlength=length)
    total = torch.zeros(length, value.shape[1], dtype=value.dtype).index_add_(0, whole, value)
    known = count > 0
    table = total[known] / count[known, None]
    return along(known.nonzero()[:, 0].double(), table, torch.arange(length, dtype=torch.float64))


def along(knot: Tensor, value: Tensor, at: Tensor) -> Tensor:
    """Linear interpolation of value [K,C] at increasing knot [K]; constant beyond the ends. at (...) -> (...,C)."""
    right = torch.searchsorted(knot, at.contiguous().to(knot.dtype)).clamp(1, max(1, len(knot) - 1))
    left = right - 1
    right = right.clamp(max=len(knot) - 1)
    span = (knot[right] - knot[left]).clamp(min=1e-12)
    share = ((at - knot[left]) / span).clamp(0, 1)[..., None]
    return value[left] + share * (value[right] - value[left])
