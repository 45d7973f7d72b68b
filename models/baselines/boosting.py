"""Gradient boosting with lags (LightGBM) for networks of fixed sensors: predicts the change from persistence.

Features come from the context alone: lags and trends of the place's own series, lags of its neighbours' (inverse distance weighted, itself
left out), the range of the network, covariates now, the query's calendar covariates, the hour and the lead. A place whose sensor is not in
the context takes its neighbours' series for its own, so unmonitored places are answered too; the model learns to tell them apart where
training hides sensors. A second model learns the mean absolute error on batches the first has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import lightgbm
import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.baselines.climatology import local_hour
from models.baselines.fitted import FLOOR, Fitted, along, by_lead
from models.baselines.inverse_distance import weights
from models.contract import DatasetInfo, FieldBatch, FieldPrediction, Frames

_CHUNK = 2048  # query points whose features are made at a time


@dataclass(frozen=True)
class Rows:
    """What the trees see, one row a question."""

    feature: np.ndarray  # [M,P] float32, NaN where unknown
    reference: np.ndarray  # [M,C] persistence
    known: np.ndarray  # [M] the place was observed in the last context frame and is asked for at lead 0
    empty: np.ndarray  # [M] nothing at all was observed
    lead: np.ndarray  # [M] frames


class Boosting(Fitted):
    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        lags: tuple[int, ...] = Field((0, 1, 2, 3, 6, 12, 23), min_length=1)  # frames back; those beyond the context are unknown
        rounds: int = Field(250, ge=1)
        spread_rounds: int = Field(80, ge=1)
        leaves: int = Field(31, ge=2)
        rate: float = Field(0.05, gt=0)
        least: int = Field(100, ge=1)  # rows a leaf needs
        held: int = Field(4, ge=2)  # every so many batches trains the spread in place of the mean
        rows: int = Field(250_000, ge=100)  # most training rows, thinned evenly
        exponent: float = Field(2.0, gt=0)  # of the neighbours' weights
        seed: int = 0

    crossfit = True
    parts = ("size", "mean", "spread")  # root mean square change [L,C] by lead; LightGBM models as text, one a variable

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config
        if not info.n_sensors:
            raise ValueError(f"boosting follows fixed sensors through time, and {info.name} has none")
        if info.period:
            raise ValueError(f"boosting serves places on a plane, and {info.name} lies on a torus")

    def fit(self, batches: Iterable[FieldBatch]) -> None:
        parts: tuple[list[tuple[Rows, np.ndarray]], ...] = ([], [])
        for number, batch in enumerate(batches):
            assert batch.query.value is not None
            valid = batch.query.mask.numpy().reshape(-1)
            rows = self._rows(batch.context, batch.query)
            valid = valid & ~rows.known & ~rows.empty
            answer = batch.query.value.double().numpy().reshape(len(valid), -1)[valid]
            cut = Rows(*(getattr(rows, field.name)[valid] for field in fields(Rows)))
            parts[number % self.config.held == self.config.held - 1].append((cut, answer - cut.reference))
        if not parts[0] or not parts[1] or not sum(len(change) for _, change in parts[0]):
            raise ValueError(
                f"{self.info.name}: boosting needs at least {self.config.held} training batches with answered questions: raise `steps`"
            )
        (feature, change, lead), (held, held_change, held_lead) = (self._joined(part) for part in parts)
        size = by_lead(torch.from_numpy(change).square(), torch.from_numpy(lead)).sqrt().clamp(min=FLOOR)
        self._state = {"size": size}
        change, held_change = change / self._size(lead), held_change / self._size(held_lead)
        mean, spread = [], []
        for c in range(change.shape[1]):
            model = self._train("regression", feature, change[:, c], self.config.rounds)
            error = np.abs(held_change[:, c] - model.predict(held, num_threads=1))
            mean.append(model.model_to_string())
            spread.append(self._train("regression", held, error, self.config.spread_rounds).model_to_string())
        self._state |= {"mean": _SEPARATOR.join(mean), "spread": _SEPARATOR.join(spread)}

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        mean, spread = ([_booster(text) for text in str(self.state()[name]).split(_SEPARATOR)] for name in ("mean", "spread"))
        parts = []
        for start in range(0, query.mask.shape[2], _CHUNK):
            part = query.points(slice(start, start + _CHUNK))
            rows = self._rows(context, part)
            size = self._size(rows.lead)
            change = np.stack([model.predict(rows.feature, num_threads=1) for model in mean], axis=-1) * size
            # sd of a Gaussian from its mean absolute error
            scale = np.stack([model.predict(rows.feature, num_threads=1) for model in spread], axis=-1) * size * math.sqrt(math.pi / 2)
            still, nothing = rows.known[:, None], rows.empty[:, None]
            answer = rows.reference + np.where(still | nothing, 0.0, change)
            scale = np.where(nothing, 1.0, np.where(still, FLOOR, np.maximum(scale, FLOOR)))
            shape = (*part.mask.shape, -1)
            parts.append(FieldPrediction(*(torch.from_numpy(array).to(query.position).reshape(shape) for array in (answer, scale))))
        return FieldPrediction.concatenate(parts)

    def _rows(self, context: Frames, query: Frames) -> Rows:
        context, query = context.to("cpu"), query.to("cpu")
        series, place, cover = _by_sensor(context, self.info.n_sensors)  # [B,T,K,C], [B,K,D], [B,K,F]
        lags = self.config.lags
        series = F.pad(series, (0, 0, 0, 0, max(lags) + 1 - series.shape[1], 0), value=math.nan)  # as many frames as the lags need
        b, t, _, c = series.shape
        s, q = query.mask.shape[1:]
        at = query.position.double()
        # A place has one context whatever the lead, so its part is made once where the questions are the same at all leads.
        same = bool((at == at[:, :1]).all()) and (query.sensor is None or bool((query.sensor == query.sensor[:, :1]).all()))
        leads = 1 if same else s
        asked = torch.full((b, leads, q), -1) if query.sensor is None else query.sensor[:, :leads]
        near = torch.stack([torch.stack([self._near(at[i, k], place[i], asked[i, k]) for k in range(leads)]) for i in range(b)])
        there = series.isfinite()
        # Neighbours' mean [B,S',Q,T,C] over the sensors that reported in each frame.
        total = torch.einsum("bsqk,btkc->bsqtc", near, there.double())
        around = torch.einsum("bsqk,btkc->bsqtc", near, series.nan_to_num()) / total
        index = asked.clamp(min=0).reshape(b, 1, -1, 1).expand(b, t, leads * q, c)
        own = series.gather(2, index).view(b, t, leads, q, c).permute(0, 2, 3, 1, 4)
        own = torch.where((asked >= 0)[..., None, None], own, math.nan)
        monitored = own.isfinite().any(3)[..., 0]
        own = torch.where(monitored[..., None, None], own, around)
        age, last = _last(own)
        reference = last.nan_to_num()  # [B,S',Q,C]
        now = series[:, -1]
        everyone = torch.stack([_filled(now, math.inf).amin(1), _filled(now, -math.inf).amax(1), now.nanmean(1)], dim=-1)
        everyone = torch.where(everyone.isinf(), math.nan, everyone).flatten(1)
        weather = torch.where(monitored[..., None], _pick(cover, asked), cover.nanmean(1)[:, None, None])
        parts = [
            *(own[..., t - 1 - lag, :] for lag in lags),
            *(around[..., t - 1 - lag, :] for lag in lags[:4]),
            *(own[..., -1, :] - own[..., t - 1 - lag, :] for lag in lags[1:4]),
            around[..., -1, :] - around[..., t - 1 - lags[min(2, len(lags) - 1)], :],
            around[..., -1, :] - own[..., -1, :],
            now.nanmean(1)[:, None, None] - own[..., -1, :],
            own.nanmean(3),
            (own - own.nanmean(3, keepdim=True)).square().nanmean(3).sqrt(),
            everyone[:, None, None].expand(b, leads, q, -1),
            weather,
            age[..., None],
            monitored[..., None].double(),
        ]
        wide = torch.cat(parts, dim=-1).expand(b, s, q, -1)
        lead = self.lead(context, query)
        hour = local_hour(self.info, query.time) if self.info.time_origin else torch.zeros_like(query.time)
        clock = torch.stack([lead, hour], dim=-1)[:, :, None].expand(b, s, q, 2)
        feature = [wide, clock] if query.covariate is None else [wide, clock, query.covariate.double()]
        empty = ~torch.isfinite(last).all(-1).expand(b, s, q)
        known = (lead.abs() < 1e-6)[..., None] & (age == 0).expand(b, s, q) & monitored.expand(b, s, q)
        return Rows(
            torch.cat(feature, dim=-1).flatten(0, 2).float().numpy(),
            reference.expand(b, s, q, c).flatten(0, 2).numpy(),
            known.flatten().numpy(),
            empty.flatten().numpy(),
            lead[..., None].expand(b, s, q).flatten().numpy(),
        )

    def _near(self, at: Tensor, place: Tensor, asked: Tensor) -> Tensor:
        """Weights [Q,K] of the sensors at place [K,D] (NaN: not in the context) for points at [Q,D], a point's own sensor left out."""
        present = place.isfinite().all(-1)
        out = torch.zeros(len(at), len(place), dtype=torch.float64)
        if present.any():
            out[:, present] = weights(
                torch.cdist(at, place[present], compute_mode="donot_use_mm_for_euclid_dist"), self.config.exponent, None
            )
        mine = asked[:, None] == torch.arange(len(place))
        return torch.where(mine, 0.0, out)

    def _size(self, lead: np.ndarray) -> np.ndarray:
        """Usual size of a change [M,C] at lead [M]: with it divided out, short leads weigh as much as long ones."""
        table = self._state["size"]
        assert isinstance(table, Tensor)
        return along(torch.arange(len(table), dtype=torch.float64), table, torch.from_numpy(lead)).numpy()

    def _joined(self, part: list[tuple[Rows, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Feature [M,P], change [M,C] and lead [M] of a bounded number of rows, evenly thinned."""
        feature = np.concatenate([rows.feature for rows, _ in part])
        change = np.concatenate([change for _, change in part])
        lead = np.concatenate([rows.lead for rows, _ in part])
        thin = slice(None, None, -(-len(feature) // self.config.rows))
        return feature[thin], change[thin], lead[thin]

    def _train(self, objective: str, feature: np.ndarray, target: np.ndarray, rounds: int) -> lightgbm.Booster:
        settings = {
            "objective": objective,
            "learning_rate": self.config.rate,
            "num_leaves": self.config.leaves,
            "min_data_in_leaf": min(self.config.least, max(1, len(feature) // 20)),
            "feature_fraction": 0.7,
            "seed": self.config.seed,
            "num_threads": 1,  # the sums of several threads differ in the last bits
            "deterministic": True,
            "force_row_wise": True,
            "verbosity": -1,
        }
        return lightgbm.train(settings, lightgbm.Dataset(feature, target, params={"verbosity": -1}), num_boost_round=rounds)


_SEPARATOR = "\n=== next variable ===\n"


def _booster(text: str) -> lightgbm.Booster:
    return lightgbm.Booster(model_str=text)


def _by_sensor(context: Frames, n_sensors: int) -> tuple[Tensor, Tensor, Tensor]:
    """The context of fixed sensors as series [B,T,K,C], places [B,K,D] and covariates of the last frame [B,K,F]; NaN where absent."""
    assert context.value is not None
    b, t, _, c = context.value.shape
    if context.sensor is None:
        raise ValueError("boosting needs the sensor index of the context observations")
    fixed = context.mask & (context.sensor >= 0)
    at = fixed.nonzero(as_tuple=True)
    sensor = context.sensor[at]
    series = torch.full((b, t, n_sensors, c), math.nan, dtype=torch.float64)
    series[at[0], at[1], sensor] = context.value[at].double()
    place = torch.full((b, n_sensors, context.position.shape[-1]), math.nan, dtype=torch.float64)
    place[at[0], sensor] = context.position[at].double()
    width = 0 if context.covariate is None else context.covariate.shape[-1]
    cover = torch.full((b, n_sensors, width), math.nan, dtype=torch.float64)
    if context.covariate is not None:
        last = at[1] == t - 1
        cover[at[0][last], sensor[last]] = context.covariate[at][last].double()
    return series, place, cover


def _last(own: Tensor) -> tuple[Tensor, Tensor]:
    """Age in frames [...] and value [...,C] of the last observed entry of own [...,T,C]; NaN where there is none."""
    seen = own.isfinite().all(-1)
    age = seen.flip(-1).double().argmax(-1)
    value = own.flip(-2).gather(-2, age[..., None, None].expand(*age.shape, 1, own.shape[-1]))[..., 0, :]
    return torch.where(seen.any(-1), age.double(), math.nan), value


def _filled(value: Tensor, with_: float) -> Tensor:
    return torch.where(value.isnan(), with_, value)


def _pick(cover: Tensor, asked: Tensor) -> Tensor:
    """Rows of cover [B,K,F] at sensors asked [B,S,Q] -> [B,S,Q,F]."""
    return cover[torch.arange(len(cover))[:, None, None], asked.clamp(min=0)]
