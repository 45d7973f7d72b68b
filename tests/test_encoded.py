"""Frames that are encoded once: the same as encoding the windows themselves, for every model that learns from them."""

from __future__ import annotations

import pytest
import torch

from models import registry
from models.contract import EncodedFrames
from pipeline.batches import TrainingBatches, Windows
from pipeline.encoded import EncodedBatches
from pipeline.sensors import SensorDataset
from tests import worlds
from tests.test_model_contract import built

FOLLOWING = [name for name in registry.FIELD_MODELS if registry.load(name).follows]
WINDOWS = {"aroma": Windows(context_frames=3, max_lead=0, batch=5), "dsq": Windows(max_lead=3, query_frames=4, batch=5)}


@pytest.fixture(scope="module")
def dataset() -> SensorDataset:
    return worlds.stations(hours=60)


@pytest.mark.parametrize("name", FOLLOWING)
def test_frames_encoded_once_are_those_of_the_windows(name: str, dataset: SensorDataset) -> None:
    network = built(name, dataset.info).float().train()
    network.begin(*network.follows)
    kept = EncodedBatches(dataset, WINDOWS[name], 7, network, "cpu")
    assert network.training
    for step in (0, 3, 3):
        window = TrainingBatches(dataset, WINDOWS[name], 7)[step]
        each, expected = kept[step], network.encode(window)
        assert torch.equal(each.time, expected.time)
        assert torch.equal(each.mask, expected.mask)
        torch.testing.assert_close(first_row_of_codes(name, each), first_row_of_codes(name, expected), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(network.eval().follow(each)["loss"], network.loss(window)["loss"], atol=1e-4, rtol=1e-4)
        network.train()


def first_row_of_codes(name: str, frames: EncodedFrames) -> torch.Tensor:
    """All there is of AROMA's latents. Of DSQ's codes a window has what the sensors say of frame 0 alone, and kept frames of each."""
    if name == "aroma":
        return frames.value
    return torch.cat([frames.value[:, :, 0], frames.value[:, :1, 1]], 1)


def test_windows_that_hide_something_cannot_be_encoded_once(dataset: SensorDataset) -> None:
    network = built("aroma", dataset.info)
    for hiding in ({"hide": 2}, {"drop": 0.1}, {"context_noise": 0.1}, {"context_points": (1, 4)}):
        windows = Windows(context_frames=3, max_lead=0, batch=5, **hiding)  # type: ignore[arg-type]
        assert not windows.undisturbed
        with pytest.raises(ValueError, match="leave out drop, hide"):
            EncodedBatches(dataset, windows, 0, network, "cpu")
