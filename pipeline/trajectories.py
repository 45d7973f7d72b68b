"""What every simulation says about its trajectories: how many learn, validate and test, and the seed of each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr
from pydantic import Field, model_validator

from pipeline.params import Section

TEST_SEED = 2**31 - 1  # test trajectory i starts from the seed TEST_SEED - seed - i


class Trajectories(Section):
    """Base of the sections of `simulate`."""

    trajectories: int = Field(ge=1, le=2**29)  # training and validation
    validation_trajectories: int = Field(ge=0)  # the last of them
    test_trajectories: int = Field(ge=0, le=2**29)
    seed: int = Field(ge=0, le=2**29)

    @model_validator(mode="after")
    def _some_to_learn_from(self) -> Trajectories:
        if self.validation_trajectories >= self.trajectories:
            raise ValueError(
                f"validation_trajectories are part of trajectories: found {self.validation_trajectories} of {self.trajectories}, "
                "which leaves none for training"
            )
        return self


class Stepped(Trajectories):
    """Base of those that step through time: a frame comes after every so many steps. Times are in model units."""

    frames: int = Field(ge=1)
    interval: float = Field(gt=0)  # between two frames
    burn_in: float = Field(ge=0)  # from the start to the first frame
    dt: float = Field(gt=0)

    @model_validator(mode="after")
    def _whole_steps(self) -> Stepped:
        for name in ("interval", "burn_in"):
            steps = getattr(self, name) / self.dt
            if abs(steps - round(steps)) > 1e-6:
                raise ValueError(f"{name} must be a whole number of steps of dt = {self.dt}, found {steps:g} steps")
        return self

    @property
    def steps(self) -> tuple[int, int]:
        """Steps before the first frame, and between two frames."""
        return round(self.burn_in / self.dt), round(self.interval / self.dt)


def seeds(params: Trajectories) -> np.ndarray:
    """One seed a trajectory: training, then validation, then test."""
    train = params.seed + np.arange(params.trajectories)
    test = TEST_SEED - params.seed - np.arange(params.test_trajectories)
    return np.concatenate([train, test])


def described(params: Trajectories, coordinates: Mapping[str, Any], attrs: Mapping[str, str], points: int | None = None) -> xr.Dataset:
    """The data set without its values: `coordinates` of time and place, the role and seed of each trajectory, and `attrs`, which are
    those of fields.DESCRIBED_BY but for the licence. `points`: so many places without a grid."""
    counts = (params.trajectories - params.validation_trajectories, params.validation_trajectories, params.test_trajectories)
    role = np.repeat(np.array(["train", "validation", "test"], dtype=object), counts)
    coords = {"trajectory": np.arange(len(role)), **coordinates, "role": ("trajectory", role), "seed": ("trajectory", seeds(params))}
    if points is not None:
        coords["point"] = np.arange(points)
    return xr.Dataset(coords=coords, attrs={"license": "Apache-2.0", **attrs, "parameters": params.model_dump_json()})
