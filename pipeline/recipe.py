"""The section `subsample.KEY`: how a source becomes a sensor dataset; and what the dataset then says of itself (DatasetInfo).

Observations take `network` or `blocks` (pipeline/protocol.py), fields `layout` (pipeline/strategies.py) or `tasks` (pipeline/tasks.py).
"""

from __future__ import annotations

from datetime import date
from typing import Any, Literal

from pydantic import Field, model_validator

from models.contract import DatasetInfo
from pipeline import lexicon, protocol, splits
from pipeline.geometry import Cells
from pipeline.params import Section
from pipeline.query_covariates import QUERY_COVARIATES
from pipeline.strategies import Layout
from pipeline.tasks import Tasks


class Network(Section):
    """How observations become frames."""

    step: float = Field(default=1.0, gt=0)  # hours between frames
    covariates: tuple[str, ...] = ()  # variables seen beside the value at context sensors; with them comes their availability
    sectors: int | None = Field(default=None, ge=2)  # u10 and v10 give way to one column for each direction the wind comes from
    known_ahead: bool = False  # covariates are given with a question too, as some benchmarks have it; a forecast cannot be made then
    utc_offset: float = 0.0  # hours; frames lie at whole steps of local time, and the hour of the day is the local one
    periods: tuple[tuple[date, date], ...] | None = None  # [first, last) days in UTC, each a trajectory; None: everything is one
    moving: str | None = None  # regular expression: platforms that are moving sensors though they have no trips
    cells: Cells | None = None  # moving sensors are averaged per cell, and held-out cells are scored as fixed sensors
    held_out: splits.HeldOut = splits.HeldOut()

    @model_validator(mode="after")
    def _wind(self) -> Network:
        if self.sectors and not {"u10", "v10"} <= set(self.covariates):
            raise ValueError(f"sectors needs u10 and v10 among the covariates, found {', '.join(self.covariates) or 'none'}")
        if self.known_ahead and not self.covariates:
            raise ValueError("known_ahead says that covariates are known ahead, and there are none: list them, or leave known_ahead out")
        return self


class Scale(Section):
    """How values are scaled; and numbers in place of measured ones, in physical units: for values that need no scaling, and for datasets
    that share a model."""

    by: Literal["moments", "range"] = "moments"  # range: the least training value becomes 0, the greatest 1, covariates as well
    mean: tuple[float, ...] | None = None  # one a variable
    std: tuple[float, ...] | None = None
    centre: tuple[float, ...] | None = None  # one a coordinate
    half_extent: float | None = Field(default=None, gt=0)


class Subsample(Section):
    source: str
    variables: tuple[str, ...] = Field(min_length=1)
    seed: int = 0
    max_flag: int = Field(default=3, ge=1, le=4)  # worst aggregate QARTOD flag of a value, or of a frame of a field, that is used
    network: Network | None = None  # for a source of observations
    blocks: protocol.Blocks | None = None  # for a source of observations: the days and folds of a benchmark
    layout: Layout | None = None  # for a source that is a field: its sensors
    tasks: Tasks | None = None  # for a source that is a field: its points are context or asked
    scale: Scale = Scale()
    split: splits.TimeBlocks | None = None  # None: trajectories are split by the role the source gives them
    cases: splits.Cases = splits.Cases()  # `blocks` make their own
    calendar: tuple[str, ...] = ("hour_sin", "hour_cos")  # query covariates; simulations have none

    @model_validator(mode="after")
    def _consistent(self) -> Subsample:
        if sum(how is not None for how in (self.network, self.blocks, self.layout, self.tasks)) != 1:
            raise ValueError(
                "give either `network` or `blocks` (a source of observations), or `layout` or `tasks` (a source that is a field)"
            )
        if self.blocks is not None and (len(self.variables) > 1 or {"split", "cases"} & self.model_fields_set):
            raise ValueError("`blocks` are of one variable, and they make the split and the cases: leave out `split` and `cases`")
        if self.network is None and self.scale.by == "range":
            raise ValueError("scale.by: range is for observations (`network`); of a field or of `blocks` give scale.mean and scale.std")
        if self.network is not None and self.split is None:
            raise ValueError("observations need `split`: {validation, test, gap}")
        unknown = sorted(set(self.calendar) - set(QUERY_COVARIATES))
        if unknown:
            raise ValueError(f"calendar: unknown {', '.join(unknown)}; known: {', '.join(QUERY_COVARIATES)}")
        for name in (*self.variables, *(self.network.covariates if self.network else ())):
            lexicon.lookup(name)
        for name in ("mean", "std"):
            given = getattr(self.scale, name)
            if given is not None and len(given) != len(self.variables):
                raise ValueError(f"scale.{name} must have one number for each of {', '.join(self.variables)}, found {list(given)}")
        return self


def dataset_info(params: Subsample, key: str, *, simulated: bool = False, ahead: tuple[str, ...] = (), **values: Any) -> DatasetInfo:
    """`ahead` names covariates that come with a question."""
    known = [lexicon.lookup(name) for name in params.variables]
    classes = [v.name for v in known if v.share]
    if classes and (len(classes) < 2 or len(classes) < len(known)):
        raise ValueError(f"subsample.{key}.variables: {', '.join(classes)} are classes: give all classes, and nothing beside them")
    unit = "km" if values["projection"] else "deg" if values["geometry"] == "sphere" and len(values["centre"]) == 2 else "1"
    values |= {name: value for name, value in params.scale.model_dump(exclude={"by"}).items() if value is not None}
    space = values.setdefault("space", ("x", "y"))
    if len(values["centre"]) != len(space):
        raise ValueError(f"subsample.{key}.scale.centre must have one number for each of {', '.join(space)}, found {values['centre']}")
    for name in ("mean", "std"):
        values[name] = tuple(map(float, values[name]))
    return DatasetInfo(
        name=key,
        variables=params.variables,
        units=tuple(v.unit for v in known),
        limits=tuple(v.fail for v in known),
        position_unit=unit,
        time_unit="1" if simulated else "h",
        time_origin="" if simulated else "1970-01-01T00:00:00Z",
        query_covariates=() if simulated else params.calendar + ahead,
        classes=bool(classes),
        **values,
    )
