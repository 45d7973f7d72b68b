"""Frames as tasks of a neural process: some points of a frame are context, others are asked, and which is drawn anew.

In training frames every point is kept, and windows draw context and questions from it (`context_points` of pipeline/batches.py). In the
frames of validation and test the draw is frozen: a random number of points in random order is context, the next ones are asked.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field, model_validator

from pipeline.params import Section
from pipeline.sensors import ASKED, SEEN, SEEN_AND_ASKED


class Tasks(Section):
    context: tuple[int, int]  # [least, most): number of context points
    query: int | None = Field(default=None, ge=1)  # so many points are asked; None: all others
    noise: float = Field(default=0.0, ge=0)  # standard deviation of what is added to frozen context values; windows add their own
    ask_context: bool = False  # ask context points too, counted in `query`

    @model_validator(mode="after")
    def _consistent(self) -> Tasks:
        low, high = self.context
        if not 0 <= low < high:
            raise ValueError(f"context must be [least, most) with 0 <= least < most, found {list(self.context)}")
        if self.ask_context and self.noise:
            raise ValueError("ask_context needs noise 0: the true value of a noisy point is not kept")
        return self

    def frozen(self, value: np.ndarray, seed: int, trajectory: int, frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the true values [P,C] of a frame: the points [n] that are seen or asked, what is recorded there [n,C], their role [n]."""
        rng = np.random.default_rng([seed, trajectory, 2, frame])
        point = rng.permutation(np.flatnonzero(np.isfinite(value).all(axis=1)))
        seen = int(rng.integers(*self.context))
        noise = self.noise * rng.standard_normal((len(point), value.shape[1]))
        first = 0 if self.ask_context else seen  # number of the first point that is asked
        last = len(point) if self.query is None else first + self.query
        number = np.arange(len(point))
        is_seen, is_asked = number < seen, (number >= first) & (number < last)
        role = np.select([is_seen & is_asked, is_seen, is_asked], [SEEN_AND_ASKED, SEEN, ASKED], -1)
        recorded = value[point] + np.where(is_seen[:, None], noise, 0)
        kept = role >= 0
        return point[kept], recorded[kept], role[kept]
