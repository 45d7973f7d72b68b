"""The trees of the AirDelhi benchmark, fitted to the context of each case (per_case.py): a random forest (Breiman 2001) and gradient
boosting (Friedman 2001), with scikit-learn's defaults. What the benchmark calls "XGB" is the second one."""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, ConfigDict, Field
from sklearn.ensemble import GradientBoostingRegressor, RandomForestRegressor

from models.baselines.per_case import Case, PerCase, certain
from models.contract import DatasetInfo


class CaseTrees(PerCase):
    """Subclasses say which model of scikit-learn is fitted to each variable."""

    def model(self) -> RandomForestRegressor | GradientBoostingRegressor:
        raise NotImplementedError

    def answers(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        known, asked = case.scaled()
        columns = [self.model().fit(known, column).predict(asked) for column in case.value.T]
        return certain(np.stack(columns, axis=-1))


class CaseForest(CaseTrees):
    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        trees: int = Field(100, ge=1)
        seed: int = 0

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config

    def model(self) -> RandomForestRegressor:
        return RandomForestRegressor(self.config.trees, random_state=self.config.seed)


class CaseBoosting(CaseTrees):
    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        rounds: int = Field(100, ge=1)
        seed: int = 0

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config

    def model(self) -> GradientBoostingRegressor:
        return GradientBoostingRegressor(n_estimators=self.config.rounds, random_state=self.config.seed)
