"""The receipt of a published forecast: every hash it depends on, back to the raw bytes."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from pipeline import utc

_LIBRARIES = ("torch", "numpy", "scipy", "pandas", "xarray", "zarr", "icechunk", "dvc", "lightgbm", "gstools")


def build(
    forecast: Path,
    *,
    output: str,
    lock: Path | None,
    repository: Path | None,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Any],
    now: datetime,
) -> dict[str, Any]:
    """Everything needed to say what a forecast was made from.

    `output` is the forecast folder's path as dvc.yaml writes it, `lock` is dvc.lock, `repository` a git checkout, `inputs` says which
    raw sources were seen and which were missing. None for `lock` or `repository` leaves that part out, as null.
    """
    summary = json.loads((forecast / "forecast.json").read_text(encoding="utf-8"))
    return {
        "dataset": summary["dataset"],
        "model": summary["model"],
        "published_at": utc.text(now),
        "runs": summary["runs"],
        "forecast_sha256": tree_sha256(forecast),
        "weights_sha256": summary["weights_sha256"],
        "dataset_inputs": summary["dataset_inputs"],
        "inputs": dict(inputs),
        "settings": dict(settings),
        "git": git_state(repository) if repository else None,
        "lineage": lineage(lock, output) if lock else None,
        "python": platform.python_version(),
        "libraries": {name: metadata.version(name) for name in _LIBRARIES},
    }


def tree_sha256(folder: Path) -> str:
    """One hash of all files of a folder: their relative names and bytes, in sorted order."""
    total = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()}\0{digest}\n".encode())
    return total.hexdigest()


def git_state(repository: Path) -> dict[str, Any]:
    """The commit of a checkout and the tracked files that differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"git {' '.join(arguments)} failed in {repository}: {done.stderr.strip()}")
        return done.stdout

    changed = [line[3:] for line in git("status", "--porcelain", "--untracked-files=no").splitlines()]
    return {"commit": git("rev-parse", "HEAD").strip(), "changed": changed}


def lineage(lock: Path, output: str) -> list[dict[str, Any]]:
    """The stages of dvc.lock that `output` depends on, its own included: hashes of what each read and wrote, and its parameters."""
    stages: dict[str, Any] = yaml.safe_load(lock.read_text(encoding="utf-8")).get("stages", {}) if lock.exists() else {}
    makers = {name: [out["path"] for out in stage.get("outs", [])] for name, stage in stages.items()}
    wanted, found = [output], []
    while wanted:
        path = wanted.pop(0)
        for name in (name for name, outs in makers.items() if any(_overlap(path, out) for out in outs)):
            if name not in found:
                found.append(name)
                wanted += [dep["path"] for dep in stages[name].get("deps", [])]
    if not found:
        raise ValueError(f"{lock}: no stage makes {output}; run `dvc repro` first, or give the path as dvc.yaml writes it")
    return [
        {
            "stage": name,
            "deps": {dep["path"]: _hash(dep) for dep in stages[name].get("deps", [])},
            "outs": {out["path"]: _hash(out) for out in stages[name].get("outs", [])},
            "params": stages[name].get("params", {}),
        }
        for name in sorted(found)
    ]


def _overlap(a: str, b: str) -> bool:
    first, second = Path(a), Path(b)
    return first == second or first in second.parents or second in first.parents


def _hash(entry: Mapping[str, Any]) -> str:
    kind = entry.get("hash", "md5")
    return f"{kind}:{entry[kind]}" if kind in entry else next(f"{key}:{entry[key]}" for key in ("md5", "etag", "checksum") if key in entry)
