"""Questions about frames of the context itself: each reads the frames around the one it asks for, in a window of its own.

SCENT looks ahead from the last frame that it is given. Where a block of hours is to be filled (pipeline/protocol.py), what came after the
asked hour is known as well as what came before. So a question about frame i becomes a window of the frames i - reach .. i + reach, empty
where the context has none, and its lead is minus `reach` frames; times stay what they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.contract import DatasetInfo, FieldPrediction, Frames


def windows(context: Frames, query: Frames, reach: int, info: DatasetInfo) -> tuple[Frames, Frames]:
    """Context [B*S,2*reach+1,N] and query [B*S,1,Q] of each query frame. One after the context counts as its last one.

    Raises ValueError where a frame before the context is asked for.
    """
    now = (context.time[:, None, :] <= query.time[..., None] + 1e-6 * info.step).sum(-1) - 1  # [B,S]
    if (now < 0).any():
        raise ValueError(f"{int((now < 0).sum())} of {now.numel()} query frames lie before the context of {context.mask.shape[1]} frames")
    b, s = now.shape
    t = context.mask.shape[1]
    wanted = (now[..., None] + torch.arange(-reach, reach + 1, device=now.device)).flatten(0, 1)  # [B*S,W]
    inside = wanted.clamp(0, t - 1)
    sample = torch.arange(b, device=now.device).repeat_interleave(s)[:, None]

    def taken(x: Tensor | None) -> Tensor | None:
        return None if x is None else x[sample, inside]

    there = (wanted == inside)[..., None] & context.mask[sample, inside]
    value = taken(context.value)
    seen = Frames(
        position=context.position[sample, inside],
        mask=there,
        time=context.time[sample, inside] + (wanted - inside) * info.step,
        value=None if value is None else torch.where(there[..., None], value, 0),
        covariate=taken(context.covariate),
        sensor=taken(context.sensor),
    )
    asked = {
        name: None if (x := getattr(query, name)) is None else x.flatten(0, 1)[:, None]
        for name in ("position", "mask", "time", "value", "covariate", "sensor", "background", "background_scale")
    }
    return seen, Frames(**asked)  # type: ignore[arg-type]


def together(answer: FieldPrediction, frames: int) -> FieldPrediction:
    """Answers [B*S,1,Q,...] of windows as those of the S query frames [B,S,Q,...]."""
    mean, scale, quantiles = (
        None if x is None else x[:, 0].unflatten(0, (-1, frames)) for x in (answer.mean, answer.scale, answer.quantiles)
    )
    assert mean is not None
    return FieldPrediction(mean, scale, quantiles)
