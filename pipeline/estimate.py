"""What a phase of training will cost, measured on its first batch before the long run starts. It is printed, never stored."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter

import torch
from torch import Tensor, nn

from models.contract import EncodedFrames, FieldBatch, FieldModel


@dataclass(frozen=True)
class Cost:
    """Of one optimiser step; data loaders work beside the network, so the slower of the two sets the pace."""

    compute: float  # seconds
    loading: float  # seconds, by one process
    bytes: int  # weights, gradients, two moments and what the backward pass holds

    def minutes(self, steps: int, loaders: int) -> float:
        step = self.compute + self.loading if loaders == 0 else max(self.compute, self.loading / loaders)
        return steps * step / 60


def cost(network: FieldModel, make: Callable[[], FieldBatch | EncodedFrames], device: torch.device | str, accumulate: int = 1) -> Cost:
    """Time one training step of a copy of `network` on `device`, and count what it holds. The network and torch's random state stay as
    they are."""
    began = perf_counter()
    batch = make()
    loading = perf_counter() - began
    with torch.random.fork_rng():
        tried = copy.deepcopy(network).to(device).train()
        batch = batch.to(device)
        held: dict[int, int] = {}
        seconds = 0.0
        for _ in range(2):  # the first one warms up
            tried.zero_grad(set_to_none=True)
            began = perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(_noted(held), lambda tensor: tensor):
                loss = tried.terms(batch)["loss"]
            loss.backward()
            if loss.is_cuda:
                torch.cuda.synchronize()
            seconds = perf_counter() - began
    trained = sum(_size(p) for p in network.parameters() if p.requires_grad)
    return Cost(seconds * accumulate, loading * accumulate, sum(_size(p) for p in network.parameters()) + 3 * trained + sum(held.values()))


def _noted(held: dict[int, int]) -> Callable[[Tensor], Tensor]:
    """Note the storage of each tensor kept for the backward pass, once however often it is kept."""

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    return note


def _size(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()
