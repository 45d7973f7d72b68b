"""Where torch runs: FIELDCAST_DEVICE is `auto` (a GPU if there is one), `cpu` or `gpu`. It changes no meaning, so it is no parameter."""

from __future__ import annotations

import os

import torch

CHOICES = ("auto", "cpu", "gpu")


def accelerator() -> str:
    """The choice, as Lightning names it."""
    choice = os.environ.get("FIELDCAST_DEVICE", "auto")
    if choice not in CHOICES:
        raise ValueError(f"FIELDCAST_DEVICE is {choice!r}, expected one of {', '.join(CHOICES)}")
    if choice == "gpu" and not torch.cuda.is_available():
        raise ValueError("FIELDCAST_DEVICE is 'gpu', but torch finds no GPU here; unset it or set it to cpu")
    return choice


def name() -> str:
    """The choice, as torch names it."""
    return "cuda" if accelerator() != "cpu" and torch.cuda.is_available() else "cpu"
