"""SCENT's settings: modes fill in the switches, sizes the widths, and what is given explicitly stays."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from models.layers import Spacing

MODES: dict[str, dict[str, Any]] = {
    "paper": {"order": "given", "calibration": "plain", "clock": "absolute", "adaptive_norm": False, "spacing": "linear"},
    "improved": {"order": "canonical", "calibration": "anchored", "clock": "lead", "adaptive_norm": True, "spacing": None},
}
# The paper scales over seven sizes M1..M7 without saying what they are. These are ours: m1 for a CPU, m3 for a GPU's half hour, m5 the
# reference setting, each two to four times the parameters of the one before (docs/models.md has the counts).
SIZES: dict[str, dict[str, int]] = {
    "m1": {"width": 64, "heads": 4, "latents": 64, "processor_layers": 3, "ffn_factor": 2},
    "m2": {"width": 96, "heads": 6, "latents": 64, "processor_layers": 4, "ffn_factor": 4},
    "m3": {"width": 128, "heads": 8, "latents": 128, "processor_layers": 6, "ffn_factor": 4},
    "m4": {"width": 192, "heads": 8, "latents": 128, "processor_layers": 6, "ffn_factor": 4},
    "m5": {"width": 256, "heads": 8, "latents": 128, "processor_layers": 6, "ffn_factor": 4},
    "m6": {"width": 384, "heads": 12, "latents": 256, "processor_layers": 8, "ffn_factor": 4},
    "m7": {"width": 640, "heads": 20, "latents": 256, "processor_layers": 8, "ffn_factor": 4},
}
# `remaining` is the relative MSE as a share of the background's: as large whether that is poor or good.
LOSSES = {"mean": ("relative_mse", "mse", "remaining"), "gaussian": ("nll", "crps"), "quantile": ("pinball",)}


class ScentConfig(BaseModel):
    """Settings; `mode` and `size` fill in what is not given. The default size, m5, has about 12.6 M parameters."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    mode: Literal["paper", "improved"] = "improved"
    size: Literal["m1", "m2", "m3", "m4", "m5", "m6", "m7"] = "m5"
    horizon: int = Field(ge=1)  # t_h: the largest training lead in frames; predict unrolls beyond it
    width: int = Field(ge=1)
    latents: int = Field(ge=1)
    heads: int = Field(ge=1)
    cen_layers: int = Field(default=2, ge=0)  # 0 is the ablation without CEN
    processor_layers: int = Field(ge=0)
    cn_layers: int = Field(default=2, ge=0)  # 0 is the ablation without CN
    group: int = Field(default=64, ge=1)  # tokens a token attends to in CEN and in plain CN
    ffn_factor: int = Field(ge=1)
    query_residual: bool = True  # keep the decoder's query beside what it read
    bands: int = Field(default=32, ge=1)  # of space
    highest: float = Field(default=32.0, gt=0)  # highest linear frequency of space: half the resolution across the domain
    time_bands: int = Field(default=16, ge=1)
    time_scale: float | None = Field(default=None, gt=0)  # frames that count as 1 in the time features; None: the horizon
    projection: Literal["frozen", "trainable", "none"] = "frozen"  # of the values; none: raw values
    projection_width: int = Field(default=32, ge=1)
    time_targeting: bool = True  # the encoder sees the time asked for
    absolute_position: bool = True  # off: tokens and queries do not see coordinates, better with few stations
    around: int = Field(default=0, ge=0)  # a question reads so many frames before and after the one it asks for; 0: it looks ahead only
    neighbours: int = Field(default=0, ge=0)  # each query also reads so many nearest observations of every context frame
    head: Literal["mean", "gaussian", "quantile"] = "mean"
    loss: Literal["relative_mse", "mse", "remaining", "nll", "crps", "pinball"]  # LOSSES says which goes with which head
    levels: tuple[float, ...] = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)  # of the quantile head
    warp: Literal["sensors", "queries"] = "sensors"  # where an unrolled forecast is decoded and read again
    permutation_seed: int = 0  # of the random groups outside training
    order: Literal["given", "canonical"]  # canonical: observations sorted by place before anything else
    calibration: Literal["plain", "anchored"]
    anchors: int = Field(default=64, ge=1)  # points that anchored CN reads
    clock: Literal["absolute", "lead"]  # absolute: simulations see t_i and t_o; calendar data always have (0, lead) and covariates
    adaptive_norm: bool
    spacing: Spacing | None = None  # of space frequencies; None: integers on a torus, else linear

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        head, mode, size = given.get("head", "mean"), given.get("mode", "improved"), given.get("size", "m5")
        return {"loss": LOSSES.get(head, ("mse",))[0], **MODES.get(mode, {}), **SIZES.get(size, SIZES["m5"]), **given}

    @model_validator(mode="after")
    def _consistent(self) -> ScentConfig:
        if self.loss not in LOSSES[self.head]:
            raise ValueError(f"loss {self.loss} does not fit head {self.head}: expected {' or '.join(LOSSES[self.head])}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is not a multiple of heads {self.heads}")
        levels = self.levels
        if len(levels) < 2 or levels[0] <= 0 or levels[-1] >= 1 or any(a >= b for a, b in pairwise(levels)):
            raise ValueError(f"levels must be two or more, increasing, inside 0..1, found {levels}")
        if self.cn_layers and self.calibration == "anchored" and not self.absolute_position:
            raise ValueError("anchored CN tells its anchors apart by their coordinates: set cn_layers to 0 or absolute_position to true")
        return self
