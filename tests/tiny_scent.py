"""A small SCENT, and a batch for it."""

from __future__ import annotations

from typing import Any

import torch

from models.contract import DatasetInfo, FieldBatch
from models.scent.model import Scent
from tests import worlds

TINY: dict[str, Any] = {
    "horizon": 4,
    "width": 16,
    "latents": 8,
    "heads": 2,
    "cen_layers": 2,
    "processor_layers": 2,
    "cn_layers": 2,
    "ffn_factor": 1,
    "group": 8,
    "bands": 4,
    "projection_width": 4,
}


def built(info: DatasetInfo | None = None, zero_head: bool = False, seed: int = 0, **changes: Any) -> Scent:
    torch.manual_seed(seed)
    model = Scent(Scent.Config(**{**TINY, **changes}), info or worlds.torus_info()).double().eval()
    return model if zero_head else worlds.stirred(model)


def a_batch(info: DatasetInfo | None = None, **sizes: int) -> FieldBatch:
    return worlds.batch(info or worlds.torus_info(), dtype=torch.float64, **sizes)
