"""Which predictors exist. Import strings, so that editing one model makes no other stale and nothing is imported before it is used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

FIELD_MODELS = {
    "aroma": "models.aroma.model:Aroma",
    "bsa_tnp": "models.bsa_tnp.model:BsaTnp",
    "convcnp": "models.convcnp.model:ConvCnp",
    "cst": "models.cst.model:Cst",
    "dsq": "models.dsq.model:Dsq",
    "fno": "models.fno.model:Fno",
    "scent": "models.scent.model:Scent",
    "senseiver": "models.senseiver.model:Senseiver",
}

BASELINES = {
    "persistence": "models.baselines.persistence:Persistence",
    "climatology": "models.baselines.climatology:Climatology",
    "interpolation": "models.baselines.linear_time:LinearTime",
    "inverse_distance": "models.baselines.inverse_distance:InverseDistance",
    "kriging": "models.baselines.kriging:Kriging",
    "ridge": "models.baselines.ridge:RidgePropagator",
    "boosting": "models.baselines.boosting:Boosting",
    "case_mean": "models.baselines.per_case:CaseMean",
    "case_inverse_distance": "models.baselines.per_case:CaseInverseDistance",
    "case_forest": "models.baselines.case_trees:CaseForest",
    "case_boosting": "models.baselines.case_trees:CaseBoosting",
    "case_arima": "models.baselines.case_arima:CaseArima",
    "case_nbeats": "models.baselines.case_nbeats:CaseNbeats",
    "case_nsgp": "models.baselines.case_nsgp:CaseNsgp",
    "case_sage": "models.baselines.case_sage:CaseSage",
}


def load(name: str) -> Any:
    """The class of a predictor, built as `cls(config, info)`; its frozen pydantic settings are `cls.Config`."""
    known = {**FIELD_MODELS, **BASELINES}
    if name not in known:
        raise ValueError(f"unknown model {name!r}: expected one of {', '.join(sorted(known))}")
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)
