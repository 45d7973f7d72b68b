"""What limits a trained DSQ: its forecast beside the errors that its parts make alone, on the frozen test cases, in one run.

    python -m benchmarks.dsq_floors SENSORS RUN [RUN ...]      # for example data/sensors/ns.zarr data/runs/ns/dsq

Rows, each the mean over cases of the relative squared error of a frame at all points asked:

    RUN, head           its forecast
    persistence         frame 0 as its sensors' codes reconstruct it, held
    VQ floor            the codes that the teacher finds in the frame itself, decoded: no forecast of codes can be better but by luck
    teacher             the same without codes: what coding costs is the difference

To compare the heads, train a second run with `model.head: frame` or `regress` in its section: the phases before `predict` do not depend on
the head, so floors agree where seeds and budgets do. The teacher sees as many points of a frame as in training, the first evenly spread.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from models.contract import FieldBatch, Frames
from models.dsq.model import Dsq
from pipeline import runs, sensors
from pipeline.cases import cases

LEADS = (0, 1, 2, 3, 5, 7, 10)
CASES, BATCH, POINTS = 64, 8, 512


def rows(model: Dsq, batch: FieldBatch) -> dict[str, Tensor]:
    """Relative squared errors [B,S] of one batch of cases."""
    context, query = batch.context, batch.query
    assert query.value is not None
    spread = slice(None, None, max(1, query.mask.shape[2] // POINTS))
    dense = model.seen(model.encoder, query.points(spread))
    _, coded = model.coded(dense)

    def field(latents: Tensor) -> Tensor:
        frames = latents.unflatten(0, query.time.shape).unbind(1)
        return torch.stack([model.decoded(each, query, k)[0] for k, each in enumerate(frames)], 1)

    return {
        f"head {model.config.head}": error(model.predict(context, query).mean, query),
        "persistence": error(model.predict(context, first(query)).mean.expand_as(query.value), query),
        "VQ floor": error(field(coded), query),
        "teacher": error(field(dense), query),
    }


def first(query: Frames) -> Frames:
    """The first query frame, which is asked at lead 0."""
    covariate = None if query.covariate is None else query.covariate[:, :1]
    return Frames(query.position[:, :1], query.mask[:, :1], query.time[:, :1], covariate=covariate)


def error(mean: Tensor, query: Frames) -> Tensor:
    assert query.value is not None
    known = query.mask.unsqueeze(-1)
    return ((mean - query.value).square() * known).sum((2, 3)) / (query.value.square() * known).sum((2, 3))


def main(path: Path, folders: list[Path]) -> int:
    dataset = sensors.read(path)
    table = Table(title=f"{dataset.info.name}: relative squared error by lead, {CASES} test cases")
    for column in ("what", *map(str, LEADS)):
        table.add_column(column, justify="left" if column == "what" else "right")
    for folder in folders:
        run = runs.load(folder, dataset.info)
        if not isinstance(run.predictor, Dsq):
            raise ValueError(f"{folder} holds {run.name!r}, not a run of dsq")
        parts: dict[str, list[Tensor]] = {}
        with torch.no_grad():
            for case in cases(dataset, "test", run.context_frames, LEADS, BATCH, limit=CASES):
                for name, each in rows(run.predictor, case.batch).items():
                    parts.setdefault(name, []).append(each)
        for name, each in parts.items():
            table.add_row(f"{folder.name}, {name}", *[f"{x:.4f}" for x in torch.cat(each).nanmean(0).tolist()])
    Console(width=120).print(table)
    return 0


if __name__ == "__main__":
    if len(sys.argv) < 3:
        Console().print("skipped: name a sensor dataset and one or more run folders of dsq")
        raise SystemExit(0)
    raise SystemExit(main(Path(sys.argv[1]), [Path(name) for name in sys.argv[2:]]))
