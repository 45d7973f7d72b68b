"""A copy of this repository whose parameters are so small that the whole line runs in a minute: the simulation alone, no raw data."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from tests.imports import ROOT

TINY: Mapping[str, Any] = {
    "datasets": ["ns"],
    "models": ["scent"],
    "source_of": {"ns": "ns"},
    "ingested": {},
    "validated": ["ns"],
    "fetch": {"sources": []},
    "simulate.ns": {"grid": 16, "frames": 10, "trajectories": 12, "validation_trajectories": 3, "test_trajectories": 6},
    "subsample.ns": {"cases": {"stride": 2, "horizon": 4}, "layout": {"strategy": "random", "rate": 0.2}},
    "baselines.ns": {"windows": {"max_lead": 4, "batch": 4, "query_points": 200, "query_frames": 2}, "steps": 6},
    "train.ns.scent": {
        "model": {"horizon": 4, "width": 16, "heads": 2, "latents": 8, "processor_layers": 1, "cen_layers": 0, "cn_layers": 0, "bands": 4},
        "calibration": {"leads": [0, 1, 3], "batch": 4},
    },
    "train.ns.scent.phases.fit": {
        "windows": {"max_lead": 4, "batch": 4, "query_points": 64},
        "validation": {"leads": [0, 2], "batch": 4, "max_cases": 4},
        "steps": 20,
        "validate_every": 5,
    },
    "evaluate.ns": {"leads": [0, 1, 3], "distance_edges": [0.1], "bootstrap": {"draws": 100, "run": 1, "seed": 0}},
    "forecast.ns": {"max_lead": 4},
    "report.ns": {"picture_leads": [0, 3]},
}  # fmt: skip


def make(folder: Path) -> Path:
    """Copy every tracked file into `folder`, shrink params.yaml, and make it a git repository with one commit."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    (folder / "dvc.lock").unlink(missing_ok=True)
    change(folder, TINY)
    _only_ns(folder)
    for command in (["init", "-q"], ["add", "-A"], ["-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "Start"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


def change(folder: Path, changes: Mapping[str, Any]) -> None:
    """Set values of params.yaml at dotted names; mappings are merged, other values replaced."""
    path = folder / "params.yaml"
    content = yaml.safe_load(path.read_text())
    for section in ("validate", "report", "publish", "subsample", "baselines", "train", "evaluate", "forecast"):
        content[section] = {key: value for key, value in content[section].items() if key == "ns"}
    for dotted, value in changes.items():
        *parents, last = dotted.split(".")
        node = content
        for name in parents:
            node = node[name]
        node[last] = {**node[last], **value} if isinstance(value, dict) and value and dotted not in ("source_of",) else value
    path.write_text(yaml.safe_dump(content, sort_keys=False))


def _only_ns(folder: Path) -> None:
    """Show the quality report of what the copy makes."""
    path = folder / "dvc.yaml"
    content = yaml.safe_load(path.read_text())
    content["metrics"] = ["data/checked/ns/report.json"]
    path.write_text(yaml.safe_dump(content, sort_keys=False, width=200))


def environment(folder: Path, **more: str) -> dict[str, str]:
    """The copy's own code and Prefect home, this interpreter, one thread."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder), "PREFECT_HOME": str(folder / ".prefect"), "PATH": path}
    return {**os.environ, **own, **more}


def run(folder: Path, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a Python module in the copy."""
    done = subprocess.run([sys.executable, "-m", *command], cwd=folder, env=environment(folder), capture_output=True, text=True)
    if check and done.returncode:
        raise AssertionError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done
