"""A small DSQ whose codes are drawn from what it sees, and batches for it."""

from __future__ import annotations

from typing import Any

import torch

from models.contract import DatasetInfo, FieldBatch
from models.dsq.model import Dsq
from tests import worlds

SIZES = {"latents": 16, "channels": 8, "token_width": 8, "query_width": 8, "rounds": 2, "self_layers": 1, "bands": 4, "highest": 4.0}
CODES = {"codes": 12, "code_width": 6, "codes_per_frame": 4, "hidden": 8, "residual_hidden": 4}
TIME = {"width": 16, "depth": 2, "heads": 2, "projection": 20, "horizon": 4, "time_bands": 3}
SMALL: dict[str, Any] = {**SIZES, **CODES, **TIME}
PLANE = worlds.torus_info(geometry="plane")


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def built(info: DatasetInfo = PLANE, seed: int = 0, **changes: Any) -> Dsq:
    """With codes drawn from the features of some windows, so that what is seen decides which are chosen."""
    torch.manual_seed(seed)
    model = Dsq(Dsq.Config(**{**SMALL, **changes}), info).double()
    some = a_batch(info, b=6, s=1)
    with torch.no_grad():
        latents = torch.cat([model.seen(model.encoder, some.query), model.seen(model.sparse, some.context)])
        model.coder.quantizer.code.copy_(model.coder.features(latents)[torch.arange(12), torch.arange(12) % 4])
    return model


def a_batch(info: DatasetInfo = PLANE, **sizes: int) -> FieldBatch:
    return worlds.batch(info, **{"s": 3, **sizes}, dtype=torch.float64)
