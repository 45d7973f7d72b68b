"""SCENT: a conditioned neural field for sparse, noisy sensors and any lead time.

Paper: Park, Luo, Zhao, Lee, Oprescu, Yoo, "SCENT: Robust Spatiotemporal Learning for Continuous Scientific Data via Scalable
Conditioned Neural Fields", ICML 2025, arXiv 2504.12262. Written from the description; the authors' full code is not public.

    tokens of the sensors -> context embedding network (CEN, sparse self-attention) -> learned queries summarise them (TTSE)
    -> temporal warp processor (TWP, self-attention of latents) -> queries read the latents (decoder) -> calibration network (CN)

Shapes::

    B batch   T context frames   N observations a frame   S query frames   Q queries   R = B*S rows
    D space   C channels   F covariates   d width   M latents   A anchors   K neighbours a frame

What differs from the paper, `mode: paper` as well as `improved`:

- the context may hold T > 1 frames: all their tokens are one set, each with its own time feature t_j (T = 1 is the paper);
- covariates join the tokens and the queries, and a background (models/contract.py) makes the output a correction that starts at zero, in
  units of the background's standard deviation; the head starts at zero in any case, so an untrained model gives its background, or the
  mean of the training data;
- Gaussian and quantile heads beside the mean;
- the sizes that the paper does not state are ours (config.py).

`improved` also: sensors are sorted by place before the random groups are cut, so their order never matters; CN reads fixed anchor points
instead of the other queries, so an answer does not depend on what else is asked; the lead enters the processor by adaptive layer norms;
times are (t_j - t_i, t_o - t_i); frequencies on a torus are whole numbers. Every one of these is a key of `Config` of its own.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from models.contract import TASKS, DatasetInfo, FieldBatch, FieldModel, FieldPrediction, Frames
from models.scent import around, unrolling
from models.scent.config import ScentConfig
from models.scent.decoder import Decoder
from models.scent.encoder import Coordinates, Encoder, Seen
from models.scent.head import Head

_ROWS = 1 << 16  # rows of tokens or queries that predict holds at a time; bounds its memory
_EPS = 1e-6


class Scent(FieldModel):
    """The field model; see models/contract.py for what it is given and gives."""

    Config = ScentConfig
    tasks: ClassVar[frozenset[str]] = frozenset(TASKS)

    def __init__(self, config: ScentConfig, info: DatasetInfo) -> None:
        super().__init__()
        self.config, self.info = config, info
        self.levels = config.levels if config.head == "quantile" else ()
        coordinates = Coordinates(config, info)
        self.encoder = Encoder(config, info, coordinates)
        self.decoder = Decoder(config, info, coordinates, self.encoder)
        self.head = Head(config, len(info.variables))

    def loss(self, batch: FieldBatch) -> dict[str, Tensor]:
        """Scalar terms: `loss` as configured, and for reading `mse` and `relative_mse` of the mean, in model units.

        Raises ValueError where a lead is negative or beyond the horizon, or `remaining` has no background to compare with.
        """
        query, context = batch.query, batch.context
        if query.value is None:
            raise ValueError("the query has no values: there is nothing to train on")
        if self.config.around:
            context, query = around.windows(context, query, self.config.around, self.info)
        assert query.value is not None
        lead = self._lead(context, query)
        if float(lead.max()) > self.config.horizon + _EPS:
            raise ValueError(f"a training lead is {float(lead.max()):g} frames, horizon is {self.config.horizon}: make them agree")
        seen = self.encoder.see(context)
        prediction = self._answer(seen, self.encoder(seen, lead), query, lead)
        known = query.mask.unsqueeze(-1).to(query.value.dtype)
        truth = torch.where(query.mask.unsqueeze(-1), query.value, 0)
        count = (known.sum() * truth.shape[-1]).clamp(min=1)
        square = (prediction.mean - truth).square() * known
        mse = square.sum() / count
        relative = _relative(square, truth, query.mask)
        terms = {"mse": mse.detach(), "relative_mse": relative.detach()}
        if self.config.loss == "mse":
            return {"loss": mse, **terms}
        if self.config.loss == "relative_mse":
            return {"loss": relative, **terms}
        if self.config.loss == "remaining":
            if query.background is None:
                raise ValueError("loss remaining is a share of the background's error: give a background, or set loss to relative_mse")
            return {"loss": relative / _relative((query.background - truth).square() * known, truth, query.mask), **terms}
        return {"loss": (self.head.score(prediction, truth, self.config.loss) * known).sum() / count, **terms}

    @torch.no_grad()
    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        """Answer a query; beyond the horizon by warp-unrolled forecasting (unrolling.py). Points are streamed in chunks, except with
        plain CN, whose answers depend on what is asked together.

        Raises ValueError for times before the last context time, and beyond the horizon where the query has a background or lacks the
        covariates of the times in between.
        """
        training = self.training
        self.eval()
        try:
            if self.config.around:
                return around.together(self._direct(*around.windows(context, query, self.config.around, self.info)), query.mask.shape[1])
            return self._unrolling(context, query)
        finally:
            self.train(training)

    @property
    def _unrolling(self) -> unrolling.Unrolling:
        return unrolling.Unrolling(self._direct, self.config.horizon, self.config.warp, self.info)

    def _lead(self, context: Frames, query: Frames) -> Tensor:
        """Leads [B,S] in frames; negative ones only where a question has frames around it."""
        if self.config.around:
            return (query.time - context.time[:, -1:]).double() / self.info.step
        return unrolling.lead(context, query, self.info)

    def _direct(self, context: Frames, query: Frames) -> FieldPrediction:
        """One evaluation for all leads of `query`."""
        seen = self.encoder.see(context)
        # May be negative for a window of the batch that was carried on beyond what it is asked: that answer is dropped.
        lead = (query.time - context.time[:, -1:]) / self.info.step
        b, s, q = query.mask.shape
        together = max(1, _ROWS // (b * max(1, seen.mask.shape[1])))
        frames = []
        for k in range(0, s, together):
            part, leads = unrolling.some_frames(query, slice(k, k + together)), lead[:, k : k + together]
            latents = self.encoder(seen, leads)
            rows = leads.numel()  # a point needs
            if self.decoder.neighbours is not None:  # and so many pairs with observations, which weigh more than anything else
                t, n = context.mask.shape[1:]
                once = part.position.stride(1) == 0  # the same points in every query frame
                rows = max(rows, (b if once else rows) * t * min(self.config.neighbours, n) // 4)
            chunk = q if self.decoder.coupled else max(1, _ROWS // rows)
            answers = [self._answer(seen, latents, part.points(slice(i, i + chunk)), leads) for i in range(0, max(q, 1), chunk)]
            frames.append(FieldPrediction.concatenate(answers))
        if len(frames) == 1:
            return frames[0]
        return FieldPrediction(*[_cat([getattr(f, name) for f in frames], 1) for name in ("mean", "scale", "quantiles")])

    def _answer(self, seen: Seen, latents: Tensor, query: Frames, lead: Tensor) -> FieldPrediction:
        """The prediction for all points of `query` at leads [B,S]."""
        features = self.decoder(seen, latents, query, lead)
        return self.head(features.unflatten(0, query.mask.shape[:2]), query)


def _relative(square: Tensor, truth: Tensor, mask: Tensor) -> Tensor:
    """Mean over samples of the squared errors [B,S,Q,C] as a share of the truth's squares. One sample is one query frame of one window;
    those without any answer count for nothing."""
    share = square.sum((2, 3)) / (truth.square().sum((2, 3)) + _EPS)
    return share.sum() / mask.any(-1).sum().clamp(min=1)


def _cat(tensors: list[Any], axis: int) -> Any:
    return None if tensors[0] is None else torch.cat(tensors, axis)
