"""The released CST beside ours: how to load it, and which of its weights is which of ours.

    git clone https://github.com/vandijklab/CST

It needs einops, matplotlib, scikit-image, scikit-learn, h5py and a Lightning that still has the name pytorch_lightning; its module is used
without a trainer, so that a new one will do.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.cst.config import CstConfig
from models.cst.model import Cst

CHANNELS = 2


def released(folder: Path, config: CstConfig, points: int) -> Any:
    """Their Lightning module with the sizes of `config` for curves of `points` points, and its loss inside."""
    if not (folder / "continuous_transformer").is_dir():
        raise FileNotFoundError(f"{folder / 'continuous_transformer'} is not there: name a checkout of vandijklab/CST")
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    from continuous_transformer.models_lightning import BERT_Model
    from continuous_transformer.sobolev_loss import sobolev_loss

    c, frame = config, {"rows": CHANNELS, "cols": 1}
    network = {
        "model_type": "linear_encoder", "dim": c.width, "attention_type": "quad", "operation_with_pos_encoding": "sum", "dim_ff": c.ffn,
        "n_layers": c.layers, "n_heads": c.heads, "p_drop_attn": c.attention_dropout, "p_drop_hidden": c.dropout, "max_len": points,
        "frame_size": frame, "patch_size": np.array([CHANNELS, 1]), "range_imshow": None, "scale_gauss": None, "plot_predictions": False,
        "plot_training_curves": False, "plot_every_epochs": 10, "plot_att_weights": False, "penalty_orthogonality": 1,
    }  # fmt: skip
    sampling = {
        "num_frames": points, "num_patches": 6, "structure": "grid", "num_patches_to_hide": 1, "n_frames_to_hide": points,
        "num_in_between_frames": c.dummies, "in_between_frame_init": "interpolation", "interpolation_kind": "linear",
        "prob_replace_masked_token": 1.0, "sampling_type": "random", "masking_type": "random_masking", "mode": "",
    }  # fmt: skip
    training = {
        "experiment_name": "", "compute_loss_whole_curve": False, "compute_loss_on_dummy_points": True, "weight_loss_on_real": 0.5,
        "std_noise_t": 0.0, "std_to_data": c.jitter,
    }  # fmt: skip
    loss = sobolev_loss(k=c.order, p=c.power, dim=CHANNELS, minimize=True, factor=c.mu)
    with contextlib.redirect_stdout(io.StringIO()):
        return BERT_Model(network, sampling, training, my_loss=loss)


def answered(theirs: Any, value: Tensor, time: Tensor) -> Tensor:
    """What their network gives [B,S,2] at tokens of values [B,S,2] and times [S] in 0..1."""
    still = torch.zeros(len(time), dtype=torch.int64)
    every = torch.arange(len(time)).repeat(len(value), 1)
    found, *_ = theirs(theirs.model.encoder(value), time, still, still, None, torch.ones(value.shape[:2]), every)
    return found.squeeze(-1)


def with_their_weights(ours: Cst, theirs: Any) -> None:
    """Give ours the weights of theirs. Raises RuntimeError where one is left over or has another shape."""
    there = {name.removeprefix("model."): weight for name, weight in theirs.state_dict().items()}
    del there["transformer.embed.pos_embed.weight"]  # a table that nothing reads
    names = {
        "encoder": "value", "decoder": "out", "linear": "inner", "norm": "norm_out", "transformer.embed.pos_embed_3DLin": "place.linear",
        "transformer.embed.norm": "norm",
    }  # fmt: skip
    parts = {
        "attn.proj_q": "query", "attn.proj_k": "key", "attn.proj_v": "val", "proj": "mix", "norm1": "norm_attention", "norm2": "norm_ffn",
        "pwff.fc1": "ffn.0", "pwff.fc2": "ffn.2",
    }  # fmt: skip
    for layer in range(len(ours.layers)):
        names |= {f"transformer.blocks.{layer}.{old}": f"layers.{layer}.{new}" for old, new in parts.items()}
    kinds = {"gamma": "weight", "beta": "bias"}
    found = {}
    for name, weight in there.items():
        part, _, kind = name.rpartition(".")
        if part not in names:
            raise RuntimeError(f"their weight {name} has no place in ours")
        found[f"{names[part]}.{kinds.get(kind, kind)}"] = weight
    ours.load_state_dict(found)
