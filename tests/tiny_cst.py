"""A small CST and the curves it is asked about."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.contract import DatasetInfo, FieldBatch, Frames
from models.cst.config import CstConfig
from models.cst.model import Cst
from tests import worlds

SMALL: dict[str, Any] = {
    "width": 16,
    "heads": 2,
    "layers": 2,
    "ffn": 24,
    "dummies": 7,
    "bands": 4,
    "dropout": 0.0,
    "attention_dropout": 0.0,
}
ONE_PLACE = worlds.torus_info(geometry="plane", variables=("curve_x", "curve_y"), units=("1", "1"), mean=(0.0, 0.0), std=(1.0, 1.0),
                              limits=((None, None),) * 2)  # fmt: skip


def curves(b: int = 2, t: int = 30, seen: int = 6, asked: int = 12, seed: int = 0) -> FieldBatch:
    """Series at one place, `seen` of `t` frames observed (the first and the last among them), asked at `asked` times in between."""
    g = torch.Generator().manual_seed(seed)
    phase = torch.rand(b, 1, 2, generator=g).double() * 6

    def curve(time: Tensor) -> Tensor:
        return torch.sin(0.25 * time.unsqueeze(-1) + phase).unsqueeze(2)

    time = torch.arange(t).double().expand(b, t) + 5
    shown = torch.zeros(b, t, 1, dtype=torch.bool)
    for row in range(b):
        shown[row, torch.randperm(t - 2, generator=g)[: seen - 2] + 1] = True
    shown[:, [0, -1]] = True
    place = torch.zeros(b, t, 1, 2).double()
    context = Frames(place, shown, time, curve(time) * shown.unsqueeze(-1))
    at = 5 + torch.rand(b, asked, generator=g).double().sort(1).values * (t - 1)
    return FieldBatch(context, Frames(place[:, :1].expand(b, asked, 1, 2), torch.ones(b, asked, 1, dtype=torch.bool), at, curve(at)))


def built(mode: str = "improved", info: DatasetInfo = ONE_PLACE, head: float = 0.3, seed: int = 0, **changes: Any) -> Cst:
    torch.manual_seed(seed)
    model = Cst(CstConfig(**{"mode": mode, **SMALL, **changes}), info).double().eval()
    if head and not model.out.weight.any():
        torch.nn.init.normal_(model.out.weight, std=head)
    return model


def answer(model: Cst, batch: FieldBatch) -> Tensor:
    return model.predict(batch.context, batch.query).mean


def gradient(model: Cst, batch: FieldBatch) -> Tensor:
    model.zero_grad()
    model.loss(batch)["loss"].backward()
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in model.parameters()])
