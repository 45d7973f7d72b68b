"""Training steps and a forecast of DSQ against the released program, at equal sizes, in one run.

    git clone https://github.com/wznwznwzn123/SparQT
    python -m benchmarks.sparqt SparQT

The folder may also be named by the environment variable SPARQT. Its modules need einops, tqdm, matplotlib and a Lightning that has the name
pytorch_lightning; it is used without a trainer. They import fairscale for a wrapper that is off by default, so an empty stand-in takes its
place. Encoder and decoder have the released sizes; the released VQ-VAE (120 M weights) and transformer (840 M with its projections) do not
fit a CPU's patience, so both sides get 128 hidden channels, 256 codes of 64, and a transformer of 384 / 6 / 6 with projections of 1536.

    teacher    their stage 1: frames of 512 points encoded and decoded
    quantize   their stage 2; ours also trains on the field, through the frozen decoder
    predict    their stage 3, 2 sequences of 11 frames; theirs also decodes the field, which it only logs; ours also encodes the sensors
    forecast   20 frames from one, at 512 points each

On our side `regress` is the released time model, `index` foresees codes one by one and `frame` all 16 of a frame at once. A training step
is the loss, backward and AdamW.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks import peers, sides
from models.contract import FieldBatch
from models.dsq.model import Dsq
from tests import worlds

FRAMES, POINTS = 4, 512  # of a batch of the first two stages
SEQUENCES, LENGTH, SENSORS, QUERIES = 2, 11, 20, 128  # of the third
AHEAD = 21  # frames of a forecast, the given one included
BANDS = 32
INFO = worlds.torus_info(geometry="plane")
STAGES = {"teacher": "stage1", "quantize": "stage2", "predict": "stage3"}
POINTS_OF = {"teacher": FRAMES * POINTS, "quantize": FRAMES * POINTS, "predict": SEQUENCES * LENGTH * QUERIES, "forecast": AHEAD * POINTS}


def ours(head: str) -> sides.Works:
    torch.manual_seed(0)
    given = {"mode": "released" if head == "regress" else "improved", "head": head, "code_width": 64, "hidden": 128}
    model = Dsq(Dsq.Config.model_validate({**given, "width": 384, "depth": 6, "heads": 6, "projection": 1536}), INFO)
    frame = worlds.batch(INFO, b=FRAMES, n=SENSORS, s=1, q=POINTS, padded=False)
    sequence = worlds.batch(INFO, b=SEQUENCES, n=SENSORS, s=LENGTH, q=QUERIES, padded=False)
    asked = worlds.batch(INFO, b=1, n=SENSORS, s=AHEAD, q=POINTS, padded=False)

    def step(phase: str, batch: FieldBatch) -> Callable[[], None]:
        model.begin(phase)

        def loss() -> torch.Tensor:
            model.begin(phase)
            return model.train().loss(batch)["loss"]

        return sides.training(model, loss)

    works: dict[str, Callable[[], object]] = {phase: step(phase, sequence if phase == "predict" else frame) for phase in STAGES}
    works["forecast"] = lambda: model.predict(asked.context, asked.query)
    return works, sum(p.numel() for p in model.parameters()) - sum(p.numel() for p in model.sparse.parameters())


def released(folder: str) -> sides.Works:
    torch.manual_seed(0)
    module = peer_module(Path(folder))
    with contextlib.redirect_stdout(io.StringIO()):
        net = module.Senseiver(
            training_stage="stage1", space_bands=BANDS, image_size=[64, 64], im_ch=1, enc_preproc_ch=48, num_latents=256,
            enc_num_latent_channels=48, num_layers=6, num_cross_attention_heads=2, enc_num_self_attention_heads=2,
            num_self_attention_layers_per_block=3, dropout=0.0, dec_preproc_ch=48, dec_num_latent_channels=48, latent_size=1,
            dec_num_cross_attention_heads=1, semi_sparse=False, num_hiddens=128, num_vq_embeddings=256, vq_embedding_dim=64,
            commitment_cost=0.25, time_transformer_dim=384, time_transformer_heads=6, time_transformer_layers=6,
        )  # fmt: skip

    def batch(b: int, t: int, n: int, q: int) -> tuple[Any, ...]:
        sensors, place, value = torch.randn(b, t, n, 1 + 4 * BANDS), torch.randn(b, t, q, 4 * BANDS), torch.randn(b, t, q, 1)
        return sensors[:, 0], sensors, torch.linspace(0, 1, t).expand(b, -1), place, value, None, None

    def step(stage: str, given: tuple[Any, ...]) -> Callable[[], None]:
        def loss() -> torch.Tensor:
            with contextlib.redirect_stdout(io.StringIO()):
                net.set_training_stage(stage)
            return net.train().training_step(given, 0)  # type: ignore[no-any-return]

        with contextlib.redirect_stdout(io.StringIO()):
            net.set_training_stage(stage)
        return sides.training(net, loss)

    frame, sequence = batch(FRAMES, 1, POINTS, POINTS), batch(SEQUENCES, LENGTH, SENSORS, QUERIES)
    works: dict[str, Callable[[], object]] = {phase: step(s, sequence if s == "stage3" else frame) for phase, s in STAGES.items()}
    first, _, time, place, *_ = batch(1, AHEAD, SENSORS, POINTS)

    @torch.no_grad()
    def forecast() -> object:
        return net.eval()(first, time, place)

    works["forecast"] = forecast
    return works, sum(p.numel() for p in net.parameters())


def peer_module(folder: Path) -> ModuleType:
    """Their module network_light. Raises FileNotFoundError without it, ModuleNotFoundError without what it needs."""
    if not (folder / "network_light.py").exists():
        raise FileNotFoundError(f"{folder / 'network_light.py'} is not there: name a checkout of wznwznwzn123/SparQT")
    peers.stand_in_for_fairscale()
    sys.path.insert(0, str(folder))
    import network_light

    return network_light  # type: ignore[no-any-return]


if __name__ == "__main__":
    title = f"DSQ: {FRAMES} x {POINTS} points; {SEQUENCES} x {LENGTH} frames; {AHEAD - 1} frames ahead"
    peer = sides.Peer("released", {"SPARQT": "a checkout of wznwznwzn123/SparQT"}, released)
    heads = {f"ours, {head}": partial(ours, head) for head in ("regress", "index", "frame")}
    raise SystemExit(sides.compare("sparqt", title, "points", POINTS_OF, peer, heads))
