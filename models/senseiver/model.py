"""Senseiver: sensors of one frame in, the field of that frame out at any point. It knows no time.

Paper: Santos, Fox, Mohan, O'Malley, Viswanathan, Lubbers, "Development of the Senseiver for efficient field reconstruction from sparse
observations", Nature Machine Intelligence 2023, 10.1038/s42256-023-00746-x. Sizes as in its use for cylinder flow by the authors of DSQ
(models/dsq), who take encoder and decoder over as well (models/perceiver.py).

Shapes::

    R rows (a frame of a window)   N observations   Q queries   D space   C channels   F covariates   M latents   c latent channels

What differs from the paper, `mode: paper` as well as `improved`:

- the context may hold T > 1 frames: the last one is read, older ones are ignored;
- covariates join the tokens and the queries; masks, so that any number of sensors may report;
- the loss is a mean of squares instead of their sum, which to Adam is the same up to clipping;
- the output layer starts at zero, so that an untrained model gives its background (in units of whose standard deviation the correction
  is), or the mean of the training data;
- one highest frequency for all axes: positions are scaled alike along all of them.

`improved` also: whole frequencies on a torus.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import model_validator
from torch import Tensor, nn

from models.contract import DatasetInfo, FieldBatch, FieldModel, FieldPrediction, Frames
from models.perceiver import Decoder, Encoder, LatentSizes

_ROWS = 1 << 16  # query rows that predict holds at a time; bounds its memory
_EPS = 1e-6


class SenseiverConfig(LatentSizes):
    """Settings; `mode` fills in the frequencies' spacing where it is not given."""

    mode: Literal["paper", "improved"] = "improved"

    @model_validator(mode="before")
    @classmethod
    def _mode(cls, given: Any) -> Any:
        return {"spacing": "linear", **given} if isinstance(given, dict) and given.get("mode") == "paper" else given


class Senseiver(FieldModel):
    """The field model; see models/contract.py for what it is given and gives."""

    Config = SenseiverConfig
    tasks: ClassVar[frozenset[str]] = frozenset({"reconstruction", "interpolation"})

    def __init__(self, config: SenseiverConfig, info: DatasetInfo) -> None:
        super().__init__()
        self.config, self.info = config, info
        self.encoder = Encoder(config, info, len(info.context_covariates))
        self.decoder = Decoder(config, info)
        nn.init.zeros_(self.decoder.head.weight)
        nn.init.zeros_(self.decoder.head.bias)

    def loss(self, batch: FieldBatch) -> dict[str, Tensor]:
        """Scalar term: `loss`, the mean squared error in model units. Raises ValueError for a query without values or at another time."""
        query = batch.query
        if query.value is None:
            raise ValueError("the query has no values: there is nothing to train on")
        self._check(batch.context, query)
        mean = self._answer(self._latents(batch.context), query)
        known = query.mask.unsqueeze(-1)
        square = torch.where(known, mean - torch.where(known, query.value, 0), 0).square()
        return {"loss": square.sum() / (known.sum() * square.shape[-1]).clamp(min=1)}

    @torch.no_grad()
    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        """Answer a query at the time of the last context frame, streamed in chunks of points. Raises ValueError for any other time."""
        self._check(context, query)
        training = self.training
        self.eval()
        try:
            latents = self._latents(context)
            rows, q = query.mask.shape[0] * query.mask.shape[1], query.mask.shape[2]
            chunk = max(1, _ROWS // rows)
            parts = [FieldPrediction(self._answer(latents, query.points(slice(i, i + chunk)))) for i in range(0, max(q, 1), chunk)]
            return FieldPrediction.concatenate(parts)
        finally:
            self.train(training)

    def _check(self, context: Frames, query: Frames) -> None:
        lead = (query.time - context.time[:, -1:]) / self.info.step
        if lead.numel() and float(lead.abs().max()) > _EPS:
            furthest = float(lead.flatten()[lead.abs().argmax()])
            raise ValueError(
                f"the query asks for a lead of {furthest:g} frames, Senseiver answers lead 0 only: ask at the time of the last context "
                "frame, or take a model that forecasts"
            )

    def _latents(self, context: Frames) -> Tensor:
        assert context.value is not None
        covariate = None if context.covariate is None else context.covariate[:, -1]
        return self.encoder(context.position[:, -1], context.value[:, -1], context.mask[:, -1], covariate)

    def _answer(self, latents: Tensor, query: Frames) -> Tensor:
        """Latents [B,M,c] read at query points: [B,S,Q,C]."""
        b, s, q, _ = query.position.shape
        covariate = None if query.covariate is None else query.covariate.flatten(1, 2)
        correction = self.decoder(latents, query.position.flatten(1, 2), covariate).view(b, s, q, -1)
        if query.background is None:
            return correction
        background = query.background.to(correction.dtype)
        scale = 1.0 if query.background_scale is None else query.background_scale.to(correction.dtype).clamp(min=_EPS)
        return background + scale * correction
