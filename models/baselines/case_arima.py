"""ARIMA (Box and Jenkins 1970) of the series of each place, as in the AirDelhi benchmark: three autoregressive terms, one difference, one
moving average.

Absent values are handled exactly by the Kalman filter of the model's state space, or are taken for readings of zero, as the benchmark
does. A series with fewer values than the model has parameters, or whose search ends at a model that states no finite forecast, is
continued with its mean.
"""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from models.baselines.case_series import CaseSeries
from models.contract import DatasetInfo


class CaseArima(CaseSeries):
    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        order: tuple[int, int, int] = (3, 1, 1)  # autoregressive terms, differences, terms of the moving average
        missing: Literal["state_space", "zero"] = "state_space"
        iterations: int = Field(50, ge=1)  # of the search for the most likely parameters

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config
        if config.missing == "zero" and len(info.variables) > 1:
            raise ValueError(f"`missing: zero` is of one variable, and {info.name} has {len(info.variables)}: use state_space")

    def continued(self, series: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        if self.config.missing == "zero":
            series = np.where(np.isnan(series), -self.info.mean[0] / self.info.std[0], series)
        least = sum(self.config.order) + 2
        mean = np.repeat(np.nanmean(series, axis=1, keepdims=True), steps, axis=1)
        scale = np.full_like(mean, np.nanstd(series))
        for row, values in enumerate(series):
            known = values[~np.isnan(values)]
            if len(known) < least or np.ptp(known) == 0:
                continue
            forecast = self._forecast(values, steps)
            if np.isfinite(forecast).all():
                mean[row], scale[row] = forecast
        return mean, scale

    def _forecast(self, values: np.ndarray, steps: int) -> np.ndarray:
        """Mean and standard error [2,steps]."""
        from statsmodels.tsa.arima.model import ARIMA  # a second to import, which nobody else should wait for

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # starting values that are not stationary and searches that stop early are usual here
            model = ARIMA(values, order=self.config.order)
            try:
                ahead = model.fit(method_kwargs={"maxiter": self.config.iterations, "disp": False}).get_forecast(steps)
            except np.linalg.LinAlgError:  # the search met a model at the edge of stationarity, whose start cannot be solved for
                return np.full((2, steps), np.nan)
        return np.stack([ahead.predicted_mean, ahead.se_mean])
