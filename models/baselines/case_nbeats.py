"""N-BEATS (Oreshkin, Carpov, Chapados and Bengio 2020), generic blocks, over the series of all places of a case.

One network is trained on the windows of every place, as in the AirDelhi benchmark, and continues each place with its own values; where it
is asked for more frames than it gives at once, it continues what it said. Absent values are filled with those of the places that are most
alike (Troyanskaya et al. 2001), and are not learnt from as targets.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from sklearn.impute import KNNImputer
from torch import Tensor, nn

from models.baselines.case_series import CaseSeries
from models.contract import DatasetInfo


class CaseNbeats(CaseSeries):
    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        back: int = Field(24, ge=1)  # frames that the network reads
        ahead: int = Field(24, ge=1)  # and gives
        blocks: int = Field(6, ge=1)
        width: int = Field(64, ge=1)
        steps: int = Field(200, ge=1)
        batch: int = Field(128, ge=1)
        learning_rate: float = Field(1e-3, gt=0)
        seed: int = 0

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config

    def continued(self, series: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
        c, length = self.config, series.shape[1]
        if length < c.back + c.ahead:
            raise ValueError(f"CaseNbeats learns from windows of back + ahead = {c.back + c.ahead} frames, and the context has {length}")
        centre, spread = np.nanmean(series), np.nanstd(series) or 1.0
        scaled = (series - centre) / spread
        filled = KNNImputer(keep_empty_features=True).fit_transform(scaled)
        # Not within the inference mode of an evaluation: this trains.
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(c.seed)
            network = NBeats(c.back, c.ahead, c.blocks, c.width)
            known = torch.from_numpy(filled).float()
            self._train(network, known, torch.from_numpy(~np.isnan(series)))
            with torch.no_grad():
                while known.shape[1] < length + steps:
                    known = torch.cat([known, network(known[:, -c.back :])], dim=1)
        mean = centre + spread * known[:, length : length + steps].double().numpy()
        return mean, np.full_like(mean, spread)

    def _train(self, network: NBeats, known: Tensor, observed: Tensor) -> None:
        """Mean squared error of windows drawn at random, at what was observed."""
        c = self.config
        optimizer = torch.optim.Adam(network.parameters(), c.learning_rate)
        frame = torch.arange(c.back + c.ahead)
        for _ in range(c.steps):
            place = torch.randint(len(known), (c.batch, 1))
            at = torch.randint(known.shape[1] - c.back - c.ahead + 1, (c.batch, 1)) + frame
            window, seen = known[place, at], observed[place, at][:, c.back :]
            if not seen.any():
                continue
            optimizer.zero_grad()
            (network(window[:, : c.back]) - window[:, c.back :])[seen].square().mean().backward()
            optimizer.step()


class NBeats(nn.Module):
    """Each block takes what it explains of the past away from it, and adds what follows from that to the forecast (section 3.2)."""

    def __init__(self, back: int, ahead: int, blocks: int, width: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(back, ahead, width) for _ in range(blocks)])
        self.ahead = ahead

    def forward(self, past: Tensor) -> Tensor:
        """[P,back] -> [P,ahead]"""
        forecast = past.new_zeros(len(past), self.ahead)
        for block in self.blocks:
            backcast, part = block(past)
            past, forecast = past - backcast, forecast + part
        return forecast


class Block(nn.Module):
    """Four layers, and the two expansions over a learnt basis, which for the generic block are linear (section 3.1 and 3.3)."""

    def __init__(self, back: int, ahead: int, width: int) -> None:
        super().__init__()
        sizes = [back, width, width, width, width]
        self.hidden = nn.Sequential(*(part for a, b in pairwise(sizes) for part in (nn.Linear(a, b), nn.ReLU())))
        self.backcast, self.forecast = nn.Linear(width, back), nn.Linear(width, ahead)

    def forward(self, past: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.hidden(past)
        return self.backcast(hidden), self.forecast(hidden)
