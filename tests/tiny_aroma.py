"""A small AROMA whose zero layers are not zero."""

from __future__ import annotations

from typing import Any

import torch

from models.aroma.model import Aroma
from models.contract import DatasetInfo
from tests import worlds

SMALL: dict[str, Any] = {
    "width": 16,
    "tokens": 6,
    "channels": 3,
    "heads": 2,
    "head_width": 8,
    "bands": 4,
    "feature_width": 8,
    "field_width": 16,
    "stepper_width": 16,
    "stepper_depth": 2,
    "stepper_heads": 2,
    "ffn_factor": 2,
}


def built(about: DatasetInfo | None = None, seed: int = 0, dtype: torch.dtype = torch.float64, **changes: Any) -> Aroma:
    """A small model whose zero layers are not zero."""
    torch.manual_seed(seed)
    model = Aroma(Aroma.Config(**{**SMALL, **changes}), about or worlds.torus_info()).to(dtype).eval()
    return worlds.stirred(model)
