"""Ridge propagator: the large scales of the kriged analysis, moved on by one linear map per lead.

The analysis is projected on smooth products of one-dimensional waves: Fourier modes on a torus, cosines on a plane. For each lead a ridge
regression maps these coefficients to those of the truth; what the modes do not hold is the small scales of the analysis, kept by the share
that fits best at that lead. Lead 0 is the analysis itself. Needs training questions all over the domain (`query_points`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from models.baselines.analysis import alike
from models.baselines.fitted import FLOOR, Fitted, along, by_lead
from models.baselines.kriging import HEAD, Kriging
from models.contract import DatasetInfo, FieldBatch, FieldPrediction, Frames


class RidgePropagator(Fitted):
    class Config(BaseModel):
        model_config = ConfigDict(frozen=True, extra="forbid")

        waves: int = Field(4, ge=1)  # largest wave number of an axis
        penalty: float = Field(1e-3, gt=0)  # relative to the mean variance of a coefficient
        held: int = Field(5, ge=2)  # every so many batches is kept to measure the spread
        kriging: Kriging.Config = Kriging.Config.model_validate({"covariance": "matern52", "nugget": False})

    crossfit = True
    # box [2,D], maps [L,J*C+1,J*C] and small [L,C] and variance [L,C] by lead
    parts = ("box", "maps", "small", "variance", *(f"kriging.{name}" for name in Kriging.parts))

    def __init__(self, config: Config, info: DatasetInfo) -> None:
        super().__init__(info)
        self.config = config
        self.kriging = Kriging(config.kriging, info)

    def load(self, state: Mapping[str, Tensor | str]) -> None:
        super().load(state)
        self.kriging.load({name: state[f"kriging.{name}"] for name in Kriging.parts})

    def fit(self, batches: Iterable[FieldBatch]) -> None:
        stream = iter(batches)
        head = list(itertools.islice(stream, HEAD))
        self.kriging.fit(head)
        self._state = {"box": self._box(head)}
        pairs: list[list[Tensor]] = []
        held: list[FieldBatch] = []
        for number, batch in enumerate(itertools.chain(head, stream)):
            if number % self.config.held == self.config.held - 1:
                held.append(batch)
            else:
                pairs.append(self._pairs(batch))
        if not pairs or not held:
            raise ValueError(f"{self.info.name}: the ridge propagator needs at least {self.config.held} training batches: raise `steps`")
        lead, start, end = (torch.cat(tensors) for tensors in zip(*pairs, strict=True))
        self._state["maps"] = self._maps(lead, start, end)
        length = len(self._state["maps"])
        channels = len(self.info.variables)
        self._state["small"] = torch.zeros(length, channels, dtype=torch.float64)
        self._state["variance"] = torch.ones(length, channels, dtype=torch.float64)
        self._fit_small(held)
        self._state.update({f"kriging.{name}": value for name, value in self.kriging.state().items()})

    def predict(self, context: Frames, query: Frames) -> FieldPrediction:
        """Raises ValueError for a lead beyond those fitted."""
        lead = self.lead(context, query)
        longest = len(self.tensor("maps", lead)) - 1
        if lead.max() > longest + 1e-6:
            raise ValueError(
                f"the ridge propagator was fitted up to lead {longest} of {self.info.name}, asked {lead.max():g}: raise windows.max_lead"
            )
        now, large, small = self._parts(context, query)
        later = (lead > 1e-6)[..., None, None]
        knots = torch.arange(longest + 1, dtype=torch.float64, device=lead.device)
        keep = along(knots, self.tensor("small", lead), lead)[:, :, None]
        moved = along(knots, self.tensor("variance", lead), lead).sqrt()[:, :, None].expand(now.mean.shape)
        assert now.scale is not None
        mean = torch.where(later, large + keep * small, now.mean.double())
        scale = torch.where(later, moved, now.scale.double()).clamp(min=FLOOR)
        return FieldPrediction(mean.to(query.position.dtype), scale.to(query.position.dtype))

    def _parts(self, context: Frames, query: Frames) -> tuple[FieldPrediction, Tensor, Tensor]:
        """The persisted analysis, its large scales moved to the lead, and its small scales, the last two [B,S,Q,C]."""
        both = self._with_design(query)
        now = self.kriging.predict(context, both)
        assert now.scale is not None
        asked = query.mask.shape[2]
        start = self._coefficients(now.mean[:, 0, asked:])
        now = FieldPrediction(now.mean[:, :, :asked], now.scale[:, :, :asked])
        lead = self.lead(context, query)
        maps = self.tensor("maps", lead)
        low = lead.clamp(0, len(maps) - 1).floor().long()
        high = (low + 1).clamp(max=len(maps) - 1)
        share = (lead - low).clamp(0, 1)[..., None]
        ones = torch.cat([start, torch.ones_like(start[:, :1])], 1)[:, None, None]
        end = (1 - share) * (ones @ maps[low])[:, :, 0] + share * (ones @ maps[high])[:, :, 0]
        channels = len(self.info.variables)
        large, still = torch.zeros_like(now.mean, dtype=torch.float64), torch.zeros_like(now.mean, dtype=torch.float64)
        for where, basis in self._bases(query):
            for i, k in where:
                large[i, k], still[i, k] = basis @ end[i, k].view(-1, channels), basis @ start[i].view(-1, channels)
        return now, large, now.mean.double() - still

    def _pairs(self, batch: FieldBatch) -> list[Tensor]:
        """Lead [M], coefficients of the analysis and of the truth at that lead [M,J*C]."""
        query = batch.query
        assert query.value is not None
        start = self._coefficients(self.kriging.analyse(batch.context, self._with_design(query.points(slice(0)))).mean[:, 0])
        end = torch.zeros(*query.time.shape, start.shape[1], dtype=torch.float64)
        for where, basis in self._bases(query):
            i, k = (torch.tensor(index) for index in zip(*where, strict=True))
            known = query.mask[i[0], k[0]]
            if known.sum() < 2 * basis.shape[1]:
                raise ValueError(
                    f"the ridge propagator needs at least {2 * basis.shape[1]} answered questions a frame over the whole domain of"
                    f" {self.info.name}, found {int(known.sum())}: set windows.query_points, or lower `waves`"
                )
            value = query.value[i, k].double().permute(1, 0, 2)[known].flatten(1)
            solved = torch.linalg.lstsq(
                basis[known], value, driver="gels"
            ).solution  # the default driver's last bits vary from call to call
            end[i, k] = solved.view(len(solved), len(i), -1).transpose(0, 1).flatten(1)
        return [self.lead(batch.context, query).flatten(), start[:, None].expand(end.shape).flatten(0, 1), end.flatten(0, 1)]

    def _bases(self, query: Frames) -> Iterable[tuple[list[tuple[int, int]], Tensor]]:
        """Frames (b, s) that ask at the same points with the same mask, and the basis [Q,J] there."""
        frames = [(i, k) for i in range(query.mask.shape[0]) for k in range(query.mask.shape[1])]
        for same in alike([torch.cat([query.position[at], query.mask[at][:, None]], dim=-1) for at in frames]):
            yield [frames[index] for index in same], self._basis(query.position[frames[same[0]]])

    def _maps(self, lead: Tensor, start: Tensor, end: Tensor) -> Tensor:
        """One map [J*C+1,J*C] a whole lead, the last row its constant; lead 0 keeps everything."""
        whole = lead.round().long()
        size = start.shape[1]
        maps = torch.zeros(int(whole.max()) + 1, size + 1, size, dtype=torch.float64)
        maps[0, :size] = torch.eye(size, dtype=torch.float64)
        penalty = self.config.penalty * start.var(0).mean()
        for at in range(1, len(maps)):
            x, y = start[whole == at], end[whole == at]
            if len(x) < 2:
                raise ValueError(f"{self.info.name}: no training pair at lead {at}: more steps, or more query_frames, in baselines")
            centred = x - x.mean(0)
            gram = centred.T @ centred + len(x) * penalty * torch.eye(size, dtype=torch.float64)
            maps[at, :size] = torch.linalg.solve(gram, centred.T @ (y - y.mean(0)))
            maps[at, size] = y.mean(0) - x.mean(0) @ maps[at, :size]
        return maps

    def _fit_small(self, held: list[FieldBatch]) -> None:
        """Share of the small scales kept, and the remaining error variance, by lead, on batches the maps have not seen."""
        rows = []
        for batch in held:
            query = batch.query
            assert query.value is not None
            _, large, small = self._parts(batch.context, query)
            lead = self.lead(batch.context, query)[..., None].expand(query.mask.shape)[query.mask]
            rows.append([lead, (query.value.double() - large)[query.mask], small[query.mask]])
        lead, rest, small = (torch.cat(tensors) for tensors in zip(*rows, strict=True))
        share = (by_lead(rest * small, lead) / by_lead(small.square(), lead).clamp(min=1e-12)).clamp(0, 1)
        variance = by_lead((rest - share[lead.round().long()] * small).square(), lead)
        for name, table in (("small", share), ("variance", variance)):
            whole = torch.arange(len(self.tensor("maps", lead)), dtype=torch.float64)
            self._state[name] = along(torch.arange(len(table), dtype=torch.float64), table, whole)

    def _design(self) -> Tensor:
        """Regular grid [G,D] over the domain, twice as fine as the shortest wave needs; the analysis is projected from its values there."""
        low, high = self.tensor("box", torch.empty(0))
        per_axis = 4 * self.config.waves
        steps = (torch.arange(per_axis, dtype=torch.float64) + (0 if self.info.period else 0.5)) / per_axis
        return torch.cartesian_prod(*(a + (b - a) * steps for a, b in zip(low, high, strict=True)))

    def _with_design(self, query: Frames) -> Frames:
        """The query, asked at the design points as well."""
        design = self._design().to(query.position)
        shape = (*query.mask.shape[:2], len(design))
        return Frames(
            position=torch.cat([query.position, design.expand(*shape, -1)], dim=2),
            mask=torch.cat([query.mask, query.mask.new_ones(shape)], dim=2),
            time=query.time,
        )

    def _coefficients(self, analysis: Tensor) -> Tensor:
        """Values [B,G,C] at the design points -> coefficients [B,J*C]."""
        inverse = torch.linalg.pinv(self._basis(self._design())).to(analysis.device)
        return (inverse @ analysis.double()).flatten(1)

    def _box(self, batches: list[FieldBatch]) -> Tensor:
        """Lowest and highest corner [2,D] of the questions; the whole of a torus."""
        if self.info.period:
            half = torch.full((len(self.info.space),), self.info.period / 2, dtype=torch.float64)
            return torch.stack([-half, half])
        asked = torch.cat([batch.query.position[batch.query.mask].double() for batch in batches])
        return torch.stack([asked.amin(0), asked.amax(0)])

    def _basis(self, position: Tensor) -> Tensor:
        """Products of waves (...,J) at positions (...,D)."""
        low, high = self.tensor("box", position)
        unit = (position.double() - low) / (high - low).clamp(min=1e-9)
        number = torch.arange(self.config.waves + 1, dtype=torch.float64, device=unit.device)
        if self.info.period:
            angle = 2 * torch.pi * unit[..., None] * number
            axes = torch.cat([angle.cos(), angle[..., 1:].sin()], dim=-1)
        else:
            axes = (torch.pi * unit[..., None] * number).cos()
        out = axes[..., 0, :]
        for axis in range(1, axes.shape[-2]):
            out = (out[..., :, None] * axes[..., axis, None, :]).flatten(-2)
        return out
