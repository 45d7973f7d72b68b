"""SCENT's modes and sizes: what they fill in, what is refused, how many parameters they have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from models.scent.config import SIZES
from models.scent.model import Scent
from tests import worlds


def test_modes_fill_in_what_is_not_given() -> None:
    paper, improved = Scent.Config(horizon=4, mode="paper"), Scent.Config(horizon=4)
    assert (paper.order, paper.calibration, paper.clock, paper.adaptive_norm) == ("given", "plain", "absolute", False)
    assert (improved.order, improved.calibration, improved.clock, improved.adaptive_norm) == ("canonical", "anchored", "lead", True)
    assert Scent.Config(horizon=4, mode="paper", calibration="anchored").calibration == "anchored"
    assert Scent.Config(horizon=4, head="gaussian").loss == "nll"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"head": "gaussian", "loss": "mse"}, "loss mse does not fit head gaussian: expected nll"),
        ({"width": 30, "heads": 4}, "width 30 is not a multiple of heads 4"),
        ({"levels": (0.5, 0.1)}, "levels must be two or more, increasing"),
        ({"absolute_position": False}, "anchored CN tells its anchors apart"),
        ({"widht": 3}, "Extra inputs are not permitted"),
        ({"horizon": 0}, "greater than or equal to 1"),
    ],
)
def test_wrong_settings_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Scent.Config(**{"horizon": 4, **wrong})


# One variable on a torus, one context frame, no covariates: the table of docs/models.md.
PARAMETERS = {"m1": 404_097, "m2": 1_532_545, "m3": 3_234_817, "m4": 7_211_521, "m5": 12_761_089, "m6": 33_357_313, "m7": 92_295_681}


def test_every_size_has_its_stated_number_of_parameters() -> None:
    assert [*PARAMETERS] == [*SIZES]
    for size, expected in PARAMETERS.items():
        with torch.device("meta"):  # shapes alone
            model = Scent(Scent.Config(horizon=10, mode="paper", size=size), worlds.torus_info())  # type: ignore[arg-type]
        assert sum(p.numel() for p in model.parameters()) == expected, size


def test_the_number_of_parameters_by_hand() -> None:
    """m5 without CEN and CN: eight blocks of width d = 256, their projections, feed-forwards of factor 4 and norms."""
    d, place, clock, values = 256, 2 * 2 * 32 + 2, 2 * 16 + 1, 32
    block = 4 * d * d + d + (8 * d * d + 8 * d) + (4 * d * d + d) + 2 * 2 * d
    encoder = (values + clock + place) * d + d + clock * d + 128 * d + (block + 2 * d) + 6 * block
    decoder = place * d + (clock * d + d) + 2 * d + (block + 2 * d) + (d + 1)
    model = Scent(Scent.Config(horizon=10, mode="paper", cen_layers=0, cn_layers=0), worlds.torus_info())
    assert sum(p.numel() for p in model.parameters()) == encoder + decoder


def test_a_size_fills_in_what_is_not_given() -> None:
    small = Scent.Config(horizon=4, size="m1")
    assert (small.width, small.heads, small.latents, small.processor_layers, small.ffn_factor) == (64, 4, 64, 3, 2)
    assert Scent.Config(horizon=4, size="m1", latents=32).model_dump() == {**small.model_dump(), "latents": 32}
    assert Scent.Config(horizon=4) == Scent.Config(horizon=4, size="m5")
    with pytest.raises(ValidationError, match="size"):
        Scent.Config(horizon=4, size="m8")  # type: ignore[arg-type]
