"""The cost of a training step, measured before a long run."""

from __future__ import annotations

import torch

from pipeline.estimate import Cost, cost
from tests import worlds
from tests.tiny_model import Tiny


def test_the_memory_of_a_step_grows_with_its_questions_and_nothing_is_disturbed() -> None:
    info = worlds.torus_info()
    network = Tiny(Tiny.Config(width=64), info).eval()
    before, state = {k: v.clone() for k, v in network.state_dict().items()}, torch.get_rng_state()
    few, many = (cost(network, lambda q=q: worlds.batch(info, q=q), "cpu") for q in (50, 500))  # type: ignore[misc]
    weights = 4 * 4 * sum(p.numel() for p in network.parameters())  # themselves, gradients and two moments, four bytes each
    assert weights < few.bytes < many.bytes
    activations = 4 * 3 * 2 * 450 * 64  # of 450 more points in 3 windows of 2 frames, float32
    assert 2 * activations < many.bytes - few.bytes < 10 * activations
    assert few.compute > 0
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in network.state_dict().items())
    assert not network.training
    assert all(p.grad is None for p in network.parameters())


def test_the_slower_of_network_and_loaders_sets_the_pace() -> None:
    assert Cost(compute=1.0, loading=3.0, bytes=0).minutes(60, loaders=2) == 1.5
    assert Cost(compute=2.0, loading=3.0, bytes=0).minutes(60, loaders=2) == 2.0
    assert Cost(compute=2.0, loading=3.0, bytes=0).minutes(60, loaders=0) == 5.0
