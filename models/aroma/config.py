"""Settings of AROMA, and what its modes mean; see models/aroma/model.py for the shapes and words."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MODES: dict[str, dict[str, Any]] = {
    "paper": {
        "spacing": "powers",
        "place_in_value": False,
        "dropout": (),
        "calendar": False,
        "standardise": "none",
        "noise": False,
        "members": 1,
    },
    "improved": {
        "spacing": None,
        "place_in_value": True,
        "dropout": (0.0, 0.25, 0.5, 0.75),
        "calendar": True,
        "standardise": "token",
        "noise": True,
        "members": 8,
    },
}


class AromaConfig(BaseModel):
    """Settings; `mode` fills in the switches that are not given. Defaults are those of Navier-Stokes 1e-3 in the released code."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["paper", "improved"] = "improved"
    width: int = Field(default=128, ge=1)
    tokens: int = Field(default=32, ge=1)
    channels: int = Field(default=8, ge=1)  # of a latent token
    heads: int = Field(default=4, ge=1)
    head_width: int = Field(default=32, ge=1)
    bands: int = Field(default=12, ge=1)  # frequencies of a place, and of each scale of a query
    highest: float = Field(default=4.0, gt=0)  # places: frequencies from 1 to 2^highest
    scales: tuple[float, ...] = Field(default=(2.0, 3.0), min_length=1)  # queries: 1 .. 2^s_1, 2^s_1 .. 2^s_2, ...
    feature_width: int = Field(default=16, ge=1)  # what a query reads at each scale
    encode_geometry: bool = True  # tokens read the places before the values
    decoder_repeats: int = Field(default=3, ge=1)
    shared_decoder: bool = True  # one block repeated; off: weights of their own
    field_width: int = Field(default=64, ge=1)  # of the MLP at the end
    field_depth: int = Field(default=3, ge=1)
    sample_latents: bool = True  # in training; off: the mean, a plain auto-encoder but for the KL term
    kl_weight: float = Field(default=1e-5, ge=0)
    reconstruction: Literal["mse", "relative_l2"] = "mse"
    stepper_width: int = Field(default=128, ge=1)
    stepper_depth: int = Field(default=4, ge=1)
    stepper_heads: int = Field(default=4, ge=1)
    ffn_factor: int = Field(default=4, ge=1)
    diffusion: bool = True  # off: one call gives the next latents
    refinements: int = Field(default=3, ge=1)  # K
    min_noise: float = Field(default=1e-3, gt=0, lt=1)  # variance of the lowest noise level
    difference: bool = False  # step to the change of the latents, not to the next ones
    difference_factor: float = Field(default=50.0, gt=0)  # changes are multiplied by it, where they are not standardised
    seed: int = 0  # of the noise of rollouts
    spacing: Literal["powers", "whole"] | None = None  # of frequencies: powers of 2, rounded if `whole`; None: whole on a torus
    place_in_value: bool
    dropout: tuple[float, ...]  # shares of observations hidden from the encoder in training, one drawn for each frame
    calendar: bool
    standardise: Literal["none", "channel", "token"]  # latents before the stepper, by statistics measured while it trains
    noise: bool  # what the decoder leaves unexplained is estimated at every point, and part of the uncertainty
    members: int = Field(ge=1)  # rollouts of a prediction

    @model_validator(mode="before")
    @classmethod
    def _mode(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        single = {} if given.get("diffusion", True) else {"members": 1}
        return {**MODES.get(given.get("mode", "improved"), {}), **single, **given}

    @model_validator(mode="after")
    def _consistent(self) -> AromaConfig:
        if self.stepper_width % self.stepper_heads:
            raise ValueError(f"stepper_width {self.stepper_width} is not a multiple of stepper_heads {self.stepper_heads}")
        edges = (0.0, *self.scales)
        if any(a >= b for a, b in pairwise(edges)):
            raise ValueError(f"scales must be positive and increasing, found {self.scales}")
        if any(not 0 <= share < 1 for share in self.dropout):
            raise ValueError(f"dropout must be shares in [0, 1), found {self.dropout}")
        if self.members > 1 and not self.diffusion:
            raise ValueError(f"without diffusion all rollouts are equal, but members is {self.members}: set it to 1")
        return self
