"""A local reading beside the latents: each query attends to the observations around it. Not in the paper."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.scent.encoder import Seen


class Neighbours(nn.Module):
    """What the observations near a point say: attention of each query to its K nearest observations of every context frame.

    A key knows the token and where it lies from the query; a value is linear in the token's features, without a norm in between, so that
    a large reading stays large. Head by head this can become the last value of the own station, its mean of some hours, or a kernel
    smoother of its surroundings.
    """

    def __init__(self, width: int, heads: int, count: int, features: int, space: int, period: float | None) -> None:
        super().__init__()
        self.count, self.heads, self.period = count, heads, period
        self.norm, self.norm_keys = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width)
        self.key, self.value = nn.Linear(width, width, bias=False), nn.Linear(features, width, bias=False)
        self.offset = nn.Linear(space + 2, 2 * width)

    def forward(self, asked: Tensor, position: Tensor, seen: Seen) -> Tensor:
        """asked [B,S,Q,d] queries at position [B,S,Q,D] -> [B,S,Q,d]."""
        b, t, n, _ = seen.position.shape
        if position.stride(1) == 0:  # the same points in every query frame
            position = position[:, :1]
        away = position[:, :, :, None, None] - seen.position[:, None, None]  # [B,s,Q,T,N,D]
        if self.period is not None:
            away = away - self.period * (away / self.period).round()
        square = away.square().sum(-1)
        # Sensors equally far are taken in their order, whatever the selection does with ties.
        tie = 1e-6 / n * torch.arange(n, device=square.device, dtype=square.dtype)
        hidden = ~seen.mask.view(b, 1, 1, t, n)
        nearest = (square + tie).masked_fill(hidden, torch.inf).topk(min(self.count, n), dim=-1, largest=False, sorted=True).indices
        away = away.gather(-2, nearest.unsqueeze(-1).expand(*nearest.shape, away.shape[-1]))
        distance = away.square().sum(-1, keepdim=True).add(1e-12).sqrt()
        offset = self.offset(torch.cat([away, distance, (distance + 0.01).log()], -1))  # [B,s,Q,T,K,2d]
        known = torch.cat([self.key(self.norm_keys(seen.token)), self.value(seen.features).flatten(1, 2)], -1)  # [B,T*N,2d]
        first = torch.arange(b, device=nearest.device).view(b, 1, 1, 1, 1) * (t * n)
        row = nearest + first + n * torch.arange(t, device=nearest.device).view(t, 1)
        pairs = known.flatten(0, 1).index_select(0, row.flatten()).view(*row.shape, -1) + offset
        mask = seen.mask.flatten().index_select(0, row.flatten()).view(row.shape)

        # One attention per point: its S queries against the T*K observations around it.
        shared = pairs.shape[1]
        key, value = pairs.reshape(b, shared, -1, t * nearest.shape[-1], 2, self.heads, pairs.shape[-1] // (2 * self.heads)).unbind(4)
        query = self.query(self.norm(asked)).unflatten(-1, (self.heads, -1))  # [B,S,Q,h,e]
        query = query.permute(0, 2, 3, 1, 4).unsqueeze(1) if shared == 1 else query.unsqueeze(4)  # [B,1,Q,h,S,e] or [B,S,Q,h,1,e]
        sees = mask.flatten(3)[..., None, None, :]
        out = F.scaled_dot_product_attention(query, key.transpose(3, 4), value.transpose(3, 4), sees)
        out = out.squeeze(1).permute(0, 3, 1, 2, 4) if shared == 1 else out.squeeze(4)
        return self.out(out.flatten(-2))
