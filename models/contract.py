"""What every field model sees and gives: batches of frames in, a prediction out.

Shapes::

    B batch   T context frames   N observations   S query frames   Q queries
    D space   C channels         F covariates     K quantile levels   E members

All numbers here are in *model units*: values are standardised with the training statistics of the dataset, positions are
centred and scaled (isotropically) to about [-1, 1], and only time stays in the dataset's own unit (hours, or the time unit of
a simulation) so that a model can still see the hour of the day. `pipeline/rows.py` makes them, `pipeline/predict.py` undoes them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Protocol, Self

import torch
from pydantic import BaseModel
from torch import Tensor, nn

TASKS = ("reconstruction", "interpolation", "forecast")


@dataclass(frozen=True)
class Frames:
    """Observations (context) or questions (query), frame by frame. True in a mask means valid; False is padding or missing."""

    position: Tensor  # [B,T,N,D] float
    mask: Tensor  # [B,T,N] bool
    time: Tensor  # [B,T] float64, dataset time unit
    value: Tensor | None = None  # [B,T,N,C]; None in a query whose answer is not known
    covariate: Tensor | None = None  # [B,T,N,F]; names in DatasetInfo.context_covariates / query_covariates
    sensor: Tensor | None = None  # [B,T,N] int64, index of a fixed sensor, -1 where a point is not a sensor
    background: Tensor | None = None  # [B,T,N,C] prior mean, queries only
    background_scale: Tensor | None = None  # [B,T,N,C] its standard deviation

    def to(self, device: torch.device | str) -> Self:
        return replace(self, **{f.name: getattr(self, f.name).to(device) for f in fields(self) if getattr(self, f.name) is not None})

    def points(self, part: slice) -> Self:
        """The same frames with only a slice of their observations, for streaming queries in chunks."""
        cut = {f.name: getattr(self, f.name)[:, :, part] for f in fields(self) if f.name != "time" and getattr(self, f.name) is not None}
        return replace(self, **cut)


@dataclass(frozen=True)
class FieldBatch:
    context: Frames
    query: Frames

    def to(self, device: torch.device | str) -> FieldBatch:
        return FieldBatch(self.context.to(device), self.query.to(device))


@dataclass(frozen=True)
class EncodedFrames:
    """Consecutive frames as a model keeps them between two of its phases, see FieldModel.encode."""

    value: Tensor  # [B,T,...]
    mask: Tensor  # [B,T] bool; False: nothing is known of the frame
    time: Tensor  # [B,T] float64

    def to(self, device: torch.device | str) -> EncodedFrames:
        return EncodedFrames(self.value.to(device), self.mask.to(device), self.time.to(device))


@dataclass(frozen=True)
class FieldPrediction:
    """A prediction at the query points. `mean` is always there; at most one form of uncertainty beside it.

    Where the variables are classes (DatasetInfo.classes), `mean` is their probability too, in model units.
    """

    mean: Tensor  # [B,S,Q,C]
    scale: Tensor | None = None  # [B,S,Q,C] standard deviation of a Gaussian
    quantiles: Tensor | None = None  # [B,S,Q,C,K] at FieldModel.levels, increasing
    samples: Tensor | None = None  # [E,B,S,Q,C]
    probabilities: Tensor | None = None  # [B,S,Q,C] of the variables as classes; they sum to 1

    @staticmethod
    def concatenate(parts: list[FieldPrediction]) -> FieldPrediction:
        """Join chunks of queries along Q."""

        def join(name: str, axis: int) -> Tensor | None:
            tensors = [getattr(part, name) for part in parts]
            return None if tensors[0] is None else torch.cat(tensors, dim=axis)

        mean = join("mean", 2)
        assert mean is not None
        return FieldPrediction(mean, join("scale", 2), join("quantiles", 2), join("samples", 3), join("probabilities", 2))


@dataclass(frozen=True)
class DatasetInfo:
    """What a dataset is, as far as a model must know. Stored in the sensor dataset and beside every checkpoint."""

    name: str
    variables: tuple[str, ...]  # C names, pipeline/lexicon.py
    units: tuple[str, ...]
    mean: tuple[float, ...]  # training split only
    std: tuple[float, ...]
    limits: tuple[tuple[float | None, float | None], ...]  # physical range in units, None where there is no bound
    space: tuple[str, ...]  # ("x", "y")
    geometry: str  # "plane" | "torus"
    centre: tuple[float, ...]  # position = (physical - centre) / half_extent
    half_extent: float
    position_unit: str  # "km" | "1"
    projection: Mapping[str, float] | None  # local equirectangular {"latitude", "longitude"} for geographic data, else None
    time_unit: str  # "h" | "1"
    time_origin: str  # ISO 8601 with Z for calendar data, "" for a simulation
    step: float  # nominal distance of frames in time_unit
    utc_offset: float  # hours, for the local hour of the day; 0 in simulations
    n_sensors: int  # fixed sensors, 0 where there are none
    context_covariates: tuple[str, ...] = ()
    query_covariates: tuple[str, ...] = ()
    classes: bool = False  # the variables are classes: at every point one of them is 1 and the others are 0

    @property
    def period(self) -> float | None:
        """Length of the domain in model units on a torus (the whole domain is [-1, 1)), None on a plane."""
        return 2.0 if self.geometry == "torus" else None

    def differences(self, other: DatasetInfo) -> list[str]:
        """Everything that stops a checkpoint made for `self` from being used on `other`, all at once; statistics may differ."""
        must_agree: tuple[str, ...] = ("name", "variables", "units", "space", "geometry", "centre", "half_extent", "position_unit")
        must_agree += ("projection", "time_unit", "time_origin", "step", "utc_offset", "n_sensors")
        must_agree += ("context_covariates", "query_covariates", "classes")
        return [
            f"{name}: checkpoint has {getattr(self, name)!r}, data has {getattr(other, name)!r}"
            for name in must_agree
            if getattr(self, name) != getattr(other, name)
        ]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> DatasetInfo:
        def tupled(value: Any) -> Any:
            return tuple(tupled(v) for v in value) if isinstance(value, list) else value

        return cls(**{key: tupled(value) for key, value in data.items()})


class Predictor(Protocol):
    """What evaluation and forecasting need. Baselines and field models both are predictors."""

    tasks: frozenset[str]  # subset of TASKS
    levels: tuple[float, ...]  # quantile levels of FieldPrediction.quantiles, () where none are given

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        """Answer the query in chunks of points. The answer for a point does not depend on which points are asked with it."""
        ...


class FieldModel(nn.Module):
    """A trainable predictor, built as `Model(config, info)`; its frozen settings are `Model.Config`.

    Training runs through `phases` in order. Before each one `begin` is called, with torch's seed set; then `loss` is that phase's. A query
    to train on has values. A phase that learns from whole frames gets them as the query: dense points at lead 0, or at leads 0, 1, 2, ...
    A phase in `follows` sees frames through parts that it does not train: its `loss` is `follow(encode(batch))`, so every frame may be
    encoded once, before the phase, and `follow` be given what was kept.
    """

    Config: ClassVar[type[BaseModel]]
    tasks: ClassVar[frozenset[str]]  # subset of TASKS
    phases: ClassVar[tuple[str, ...]] = ("fit",)
    follows: ClassVar[frozenset[str]] = frozenset()  # phases that learn how encoded frames follow each other
    corrects: ClassVar[bool] = True  # answers are query.background + a correction that starts at zero; False: takes no background
    levels: tuple[float, ...] = ()  # quantile levels of FieldPrediction.quantiles

    def begin(self, phase: str) -> None:
        """Make ready for a phase: what it trains requires gradients, the rest does not; parts that start as copies are copied."""

    def loss(self, batch: FieldBatch) -> dict[str, Tensor]:
        """Scalar terms of the phase begun last, the first one in a fresh model; "loss" is the one to minimise."""
        raise NotImplementedError

    def encode(self, batch: FieldBatch) -> EncodedFrames:
        """The frames of a window as a phase in `follows` needs them, or a frame alone: its observations, and itself asked at lead 0."""
        raise NotImplementedError

    def follow(self, frames: EncodedFrames) -> dict[str, Tensor]:
        """`loss` of a phase in `follows`, from frames that are encoded already."""
        raise NotImplementedError

    def terms(self, batch: FieldBatch | EncodedFrames) -> dict[str, Tensor]:
        """The loss of a training batch of either kind."""
        return self.follow(batch) if isinstance(batch, EncodedFrames) else self.loss(batch)

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        """See Predictor."""
        raise NotImplementedError


class Baseline(Predictor, Protocol):
    """A model without gradient training, built as `Baseline(config, info)`. Its state is plain tensors and strings."""

    crossfit: bool  # closer to the windows it was fitted to than to new ones: as a background of training it must not have seen them

    def fit(self, batches: Iterable[FieldBatch]) -> None: ...
    def state(self) -> dict[str, Tensor | str]: ...
    def load(self, state: Mapping[str, Tensor | str]) -> None: ...
