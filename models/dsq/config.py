"""Settings of DSQ, and what its modes mean; see models/dsq/model.py for the parts they size."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from models.dsq.latent_codes import halvings
from models.perceiver import LatentSizes

_LEARNED = {"spacing": "linear", "codebook": "learned", "restart": 0.0, "centred": False}
_REGRESS = {"width": 2048, "depth": 12, "heads": 8}
MODES: dict[str, dict[str, Any]] = {
    "paper": {"head": "index", **_LEARNED},
    "improved": {"head": "index", "codebook": "average", "restart": 0.1, "centred": True},
    "released": {"head": "regress", **_LEARNED, **_REGRESS, "code_width": 512, "hidden": 2048, "match_weight": 0.01},
}


class DsqConfig(LatentSizes):
    """Settings; `mode` fills in the switches that are not given. Defaults are the sheet's sizes, about 12 M parameters."""

    mode: Literal["paper", "improved", "released"] = "improved"
    # latents <-> codes
    codes: int = Field(default=256, ge=2)
    code_width: int = Field(default=64, ge=1)
    codes_per_frame: int = Field(default=16, ge=1)  # latents / 4, / 16, ...
    hidden: int = Field(default=128, ge=2)  # of the convolutions
    residual_hidden: int = Field(default=32, ge=1)
    commitment: float = Field(default=0.25, ge=0)
    codebook: Literal["learned", "average"]
    decay: float = Field(default=0.99, gt=0, lt=1)  # of the moving averages of codes and their uses
    restart: float = Field(ge=0, lt=1)  # a code used less than this share of an even use starts again; 0: never
    centred: bool  # codes do not carry the mean of the latents
    match_weight: float = Field(default=1.0, ge=0)  # of the distance between sparse and dense latents before quantisation
    # time
    head: Literal["index", "frame", "regress"]  # the next code, all codes of the next frame at once, or its latents
    width: int = Field(default=384, ge=1)
    depth: int = Field(default=6, ge=1)
    heads: int = Field(default=6, ge=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    projection: int = Field(default=8192, ge=1)  # hidden width between latents and the vectors of `regress`
    token_weight: float = Field(default=0.3, ge=0)  # of the distance between those vectors and the ones aimed at
    horizon: int = Field(default=20, ge=1)  # frames that count as 1 in the time features
    time_bands: int = Field(default=16, ge=1)
    dense_start: float = Field(default=0.5, ge=0, le=1)  # share of training windows whose frame 0 is dense
    # answers of heads that foresee codes
    temperature: float = Field(default=0.0, ge=0)  # 0: the likeliest code each time
    members: int = Field(default=1, ge=1)  # forecasts that are sampled
    seed: int = 0  # of the sampling
    soft_decode: bool = False  # decode the mean of the codes under their probabilities, not the one chosen

    @model_validator(mode="before")
    @classmethod
    def _mode(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {**MODES.get(given.get("mode", "improved"), {}), **given}

    @model_validator(mode="after")
    def _consistent(self) -> DsqConfig:
        halvings(self.latents, self.codes_per_frame)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        sampled = self.temperature > 0
        if self.members > 1 and not sampled:
            raise ValueError(f"members is {self.members}, but at temperature 0 all are the same: set temperature above 0")
        if self.head == "regress" and (sampled or self.soft_decode):
            raise ValueError("temperature and soft_decode belong to heads index and frame: head regress has no probabilities")
        return self
