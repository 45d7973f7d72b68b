"""GraphSAGE (Hamilton, Ying and Leskovec 2017) over the observations of a case, as the AirDelhi benchmark uses it.

A node is an observation or a question; its inputs are the value and whether there is one. Every node is told by the observations that lie
within some hours of it, wherever they are, and never by a question: messages are averaged with weights that fall with distance,
1 / (1 + km), and beside that their greatest is taken. Training hides a share of the observations, in every graph others, and asks for some
of them.

Two layers of two aggregations and three dense ones are a page of PyTorch. A library of graph networks has no average with weights in its
SAGE layer, so only the greatest would be left to it.
"""

from __future__ import annotations

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from models.baselines.per_case import Case, PerCase, Points, certain
from models.contract import DatasetInfo


class CaseSage(PerCase):
    """A question without an observation within the hours is answered with the mean of what is known."""

    tasks = frozenset({"reconstruction", "interpolation"})

    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        hours: float = Field(2.0, gt=0)  # between two nodes at most; without a calendar the unit of time of the dataset
        steps: int = Field(100, ge=1)
        graphs: int = Field(8, ge=1)  # that are trained on in turn
        hidden: float = Field(0.5, gt=0, lt=1)  # share of the observations that a graph hides
        batch: int | None = Field(512, ge=1)  # of those so many are asked for; None: all
        learning_rate: float = Field(0.02, gt=0)
        seed: int = 0

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config

    def answers(self, case: Case) -> tuple[np.ndarray, np.ndarray]:
        reach = self.config.hours * (60 if self.info.time_origin else 1)
        centre, spread = case.value.mean(0), case.value.std(0)
        spread[spread == 0] = 1
        told = edges(case.known, case.asked, reach)
        lonely = ~np.isin(np.arange(len(case.asked.minute)), told[1].numpy())
        # Not within the inference mode of an evaluation: this trains.
        with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            value = torch.from_numpy((case.value - centre) / spread).float()
            network = Sage(value.shape[1])
            among = edges(case.known, case.known, reach)
            self._train(network, value, among)
            with torch.no_grad():
                mean = network(value, torch.ones(len(value), dtype=torch.bool), among, told, len(lonely))
        out = centre + spread * mean.double().numpy()
        out[lonely] = centre
        return certain(out)

    def _train(self, network: Sage, value: Tensor, among: Edges) -> None:
        optimizer = torch.optim.Adam(network.parameters(), self.config.learning_rate)
        count = round(self.config.hidden * len(value))
        if not 0 < count < len(value):
            return
        graphs = []
        for _ in range(self.config.graphs):
            hidden = torch.randperm(len(value))[:count]
            shown = torch.ones(len(value), dtype=torch.bool)
            shown[hidden] = False
            asked = torch.zeros_like(shown)
            asked[hidden[: self.config.batch]] = True
            graphs.append((shown, asked, kept(among, shown, shown), kept(among, shown, asked)))
        for step in range(self.config.steps):
            shown, asked, between, told = graphs[step % len(graphs)]
            optimizer.zero_grad()
            mean = network(value, shown, between, told, len(value))
            (mean - value)[asked].square().mean().backward()
            optimizer.step()


Edges = tuple[Tensor, Tensor, Tensor]  # [E] observation that tells, node that is told, weight before it is shared among those that tell


def edges(known: Points, told: Points, reach: float) -> Edges:
    """From observations to other nodes that lie within `reach` in time; none from an observation to itself."""
    order = np.argsort(known.minute, kind="stable")
    minute = known.minute[order]
    first, last = np.searchsorted(minute, told.minute - reach - 1e-6), np.searchsorted(minute, told.minute + reach + 1e-6)
    target = np.repeat(np.arange(len(told.minute)), last - first)
    source = order[np.arange(len(target)) - np.repeat(np.cumsum(last - first) - last, last - first)]
    apart = np.linalg.norm(known.place[source] - told.place[target], axis=-1)
    other = source != target if told is known else slice(None)
    weight = 1 / (1 + apart)
    return (torch.from_numpy(source[other]), torch.from_numpy(target[other]), torch.from_numpy(weight[other]).float())


class Sage(nn.Module):
    """Widths as in the benchmark's program: 24 averages and 8 greatest, then 12 and 4, then dense layers of 8 and 5."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Layer(channels + 1, 24, 8), Layer(32, 12, 4)])
        self.head = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, channels))

    def forward(self, value: Tensor, shown: Tensor, among: Edges, told: Edges, count: int) -> Tensor:
        """Answers [count,C] of nodes that know nothing, from values [N,C] where `shown` [N]: `among` joins those, `told` tells nodes."""
        states = torch.cat([value, torch.ones(len(value), 1)], dim=1) * shown[:, None]
        first, second = self.layers
        nodes, states = first(states, torch.zeros(count, states.shape[1]), told), first(states, states, among)
        return self.head(second(states, nodes, told))


class Layer(nn.Module):
    def __init__(self, width: int, averages: int, greatest: int) -> None:
        super().__init__()
        self.average, self.own_average = nn.Linear(width, averages), nn.Linear(width, averages, bias=False)
        self.greatest, self.own_greatest = nn.Linear(width, greatest), nn.Linear(width, greatest, bias=False)

    def forward(self, states: Tensor, nodes: Tensor, told: Edges) -> Tensor:
        source, target, weight = told
        total = torch.zeros(len(nodes)).index_add(0, target, weight)
        share = weight / total[target]
        message = states[source]
        average = torch.zeros_like(nodes).index_add(0, target, share[:, None] * message)
        index = target[:, None].expand_as(message)
        greatest = torch.zeros_like(nodes).scatter_reduce(0, index, message, "amax", include_self=False)
        return torch.cat([self.average(average) + self.own_average(nodes), self.greatest(greatest) + self.own_greatest(nodes)], 1).relu()


def kept(told: Edges, source: Tensor, target: Tensor) -> Edges:
    """The edges from some observations [N] to some nodes [M]."""
    both = source[told[0]] & target[told[1]]
    return told[0][both], told[1][both], told[2][both]
