"""Run one stage: `python -m pipeline STAGE [KEY ...] --ARGUMENT PATH ...`. This is what dvc.yaml calls.

The stage's section of params.yaml is `STAGE.KEY...`, or only the first SECTION_KEYS of these keys where the stage module says so; the paths
become keyword arguments of the module's `run`.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import os
import signal
import sys
from importlib import import_module
from pathlib import Path

from pipeline import params

# Read when torch is loaded. Threads that wait in a loop take the cores of the stages beside this one: of two evaluations at once each took
# 529 s, alone 10 s. With 2000 turns in place of the usual 300,000 it is 20 s, and alone a stage is within a tenth of what it was.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")

STAGES = ("simulate", "ingest", "validate", "subsample", "baselines", "train", "evaluate", "forecast", "report")


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipeline", description=__doc__)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("keys", nargs="*", help="rest of the section's dotted name in params.yaml")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    known, rest = parser.parse_known_args(arguments)
    if len(rest) % 2 or any(not flag.startswith("--") for flag in rest[::2]):
        parser.error(f"paths must come as --name PATH pairs, found {' '.join(rest)}")
    paths = {flag.removeprefix("--").replace("-", "_"): Path(value) for flag, value in zip(rest[::2], rest[1::2], strict=True)}
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    logging.getLogger("pipeline").setLevel(logging.INFO)  # ours, not what libraries say about themselves
    _die_with_parent()
    stage = import_module(f"pipeline.{known.stage}")
    dotted = params.name_of(stage, known.keys)
    try:
        section = params.load(known.params, dotted, stage.params_model(*known.keys))
        stage.run(section, *known.keys, **paths)
    except (ValueError, OSError) as error:  # what a user can act on; anything else keeps its traceback
        if os.environ.get("FIELDCAST_TRACEBACK"):
            raise
        print(f"{dotted}: {error}", file=sys.stderr)
        return 1
    return 0


def _die_with_parent() -> None:
    """On Linux, end this stage when the `dvc` that started it is killed, so that no orphan goes on writing."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
