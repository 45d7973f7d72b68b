"""The settings of one phase of a model's training: what it sees, what chooses its weights, and how it is optimised."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pipeline.batches import Windows
from pipeline.params import Section


class Validation(Section):
    leads: tuple[int, ...] = Field(min_length=1)  # frames
    batch: int = Field(default=32, ge=1)
    max_cases: int = Field(default=256, ge=1)  # evenly spread over the frozen validation cases
    max_points: int = Field(default=1024, ge=1)  # of the query, evenly spread


class Phase(Section):
    """What one phase of a model's training sees, and how it is optimised."""

    windows: Windows
    validation: Validation
    steps: int = Field(ge=1)
    validate_every: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    warm_up: float = Field(default=0.05, ge=0, lt=1)  # share of the steps
    final_rate: float = Field(default=0.0, ge=0, le=1)  # share of learning_rate at the end of the cosine
    epsilon: float = Field(default=1e-8, gt=0)  # of Adam: gradients below it are not followed, and on a good background they are small
    weight_decay: float = Field(default=1e-2, ge=0)
    decayed: Literal["matrices", "all"] = "matrices"  # which parameters weight_decay pulls to zero
    clip: float | None = Field(default=1.0, gt=0)  # norm of the gradient; None: none, as some papers have it
    average: float = Field(default=0.0, ge=0, lt=1)  # decay of the exponential moving average of the weights; 0 is off
    accumulate: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _whole_epochs(self) -> Phase:
        if self.steps % self.validate_every:
            raise ValueError(f"steps {self.steps} is not a multiple of validate_every {self.validate_every}")
        return self
