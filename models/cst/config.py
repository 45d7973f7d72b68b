"""Settings of CST, and what its modes mean; see models/cst/model.py for the shapes and words.

Modes, each switch of which is a key of `Config` of its own:

- `paper`: all tokens see each other, post-norm, linear coordinates, the data term at the real tokens. What is asked together in one pass
  (up to 512 points, in the order of the query) changes the answers. Takes no background.
- `legacy`: `paper` as the authors released it: derivatives of the sum of all outputs with respect to the values, of which only the first
  order trains; time divided by the number of real tokens less one; attention dropout 0.8; 500 dummies, k = p = 3.
- `improved`: dummies and asked tokens see the real tokens and themselves, and nothing sees them, so an answer does not depend on what else
  is asked, and derivatives are those of each token alone; the answer is the interpolation (or the background) plus a correction that starts
  at zero; the data term is at the query; pre-norm; Fourier features of the coordinates.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

_PAPER = {"features": "linear", "norm": "post", "sees": "all", "anchored": False, "targets": "real", "squeezed_time": False}
MODES: dict[str, dict[str, Any]] = {
    "paper": {**_PAPER, "derivative": "coordinates", "width": 32, "ffn": 3072},
    "legacy": {
        **_PAPER, "derivative": "values", "width": 32, "ffn": 3072, "attention_dropout": 0.8, "dummies": 500, "order": 3, "power": 3.0,
        "squeezed_time": True,
    },
    "improved": {
        "features": "fourier", "norm": "pre", "sees": "real", "anchored": True, "targets": "query", "squeezed_time": False,
        "derivative": "coordinates", "width": 64,
    },
}  # fmt: skip


class CstConfig(BaseModel):
    """Settings; `mode` fills in the switches that are not given."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["paper", "legacy", "improved"] = "improved"
    horizon: int = Field(default=0, ge=0)  # frames after the last context frame that the window reaches
    width: int = Field(ge=1)
    layers: int = Field(default=4, ge=1)
    heads: int = Field(default=4, ge=1)
    ffn: int = Field(ge=1)  # hidden channels; improved: four times the width where not given
    attention_dropout: float = Field(default=0.1, ge=0, lt=1)
    dropout: float = Field(default=0.1, ge=0, lt=1)
    jitter: float = Field(default=0.1, ge=0)  # standard deviation of what training adds to the value of every token
    dummies: int = Field(default=64, ge=1)  # a sample
    order: int = Field(default=2, ge=0)  # k
    power: float = Field(default=2.0, ge=1)  # p
    mu: float = Field(default=0.01, ge=0)
    features: Literal["linear", "fourier"]  # of the coordinates
    bands: int = Field(default=16, ge=1)
    highest: float = Field(default=8.0, ge=1)  # highest frequency of the Fourier features, in half waves a window
    norm: Literal["post", "pre"]
    sees: Literal["all", "real"]  # what dummies and asked tokens attend to beside themselves
    anchored: bool  # the answer is the value that goes with the coordinate plus a correction that starts at zero
    targets: Literal["real", "query"]  # where the data term is taken
    derivative: Literal["coordinates", "values"]  # values: as released, models/cst/sobolev.py; only with targets real
    squeezed_time: bool  # divide times by the number of real tokens less one, as released

    @model_validator(mode="before")
    @classmethod
    def _mode(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        filled = {**MODES.get(given.get("mode", "improved"), {}), **given}
        return {"ffn": 4 * filled["width"], **filled} if isinstance(filled.get("width"), int) else filled

    @model_validator(mode="after")
    def _consistent(self) -> CstConfig:
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        if self.derivative == "values" and self.targets != "real":
            raise ValueError(f"derivative is values, which needs targets real, found {self.targets}")
        return self
