"""The whole line, for real and very small: dvc repro, no-op, a changed parameter, kill -9 in every stage, the flow that publishes."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import xarray as xr
import yaml

from pipeline import atomic
from tests import tiny_project

STAGES = [
    "simulate@ns",
    "validate@ns",
    "subsample@ns",
    "baselines@ns",
    "train@ns-scent",
    "evaluate@ns-scent",
    "forecast@ns-scent",
    "report@ns",
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_project.make(tmp_path_factory.mktemp("project"))
    tiny_project.run(folder, "dvc", "repro")
    return folder


def outputs(folder: Path) -> dict[str, str]:
    """Hash of every output as the lock file records it."""
    stages = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    return {out["path"]: out["md5"] for stage in stages.values() for out in stage["outs"]}


def stale(folder: Path) -> set[str]:
    return set(json.loads(tiny_project.run(folder, "dvc", "status", "--json").stdout or "{}"))


def test_repro_builds_everything_and_the_second_does_nothing(built: Path) -> None:
    assert stale(built) == set()
    again = tiny_project.run(built, "dvc", "repro").stdout
    assert "Running stage" not in again
    assert "up to date" in again
    report = (built / "data/reports/ns/report.html").read_text()
    assert "SCENT" in report or "scent" in report
    shown = tiny_project.run(built, "dvc", "metrics", "show").stdout
    assert "data/scores/ns/scent/metrics.json" in shown
    drawn = tiny_project.run(built, "dvc", "plots", "show", "--json").stdout
    assert {"data/reports/ns/leads.csv", "data/reports/ns/training.csv"} == set(json.loads(drawn)["data"])


def test_one_scent_parameter_reruns_only_what_depends_on_it(built: Path) -> None:
    original = (built / "params.yaml").read_text()
    try:
        tiny_project.change(built, {"train.ns.scent.phases.fit": {"learning_rate": 1.5e-3}})
        done = tiny_project.run(built, "dvc", "repro").stdout
        ran = {line.split("'")[1] for line in done.splitlines() if line.startswith("Running stage")}
        assert ran == {"train@ns-scent", "evaluate@ns-scent", "forecast@ns-scent", "report@ns"}
    finally:
        (built / "params.yaml").write_text(original)
    back = tiny_project.run(built, "dvc", "repro").stdout
    assert "Running stage" not in back, "what was built before comes back from the cache"
    assert stale(built) == set()


def test_a_typo_in_params_is_an_error_with_its_dotted_name(built: Path) -> None:
    original = (built / "params.yaml").read_text()
    try:
        tiny_project.change(built, {"train.ns.scent": {"lerning_rate": 1.0}})
        failed = tiny_project.run(built, "dvc", "repro", "train@ns-scent", check=False)
        assert failed.returncode != 0
        assert "train.ns.scent.lerning_rate: unknown key" in failed.stdout + failed.stderr
    finally:
        (built / "params.yaml").write_text(original)


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are ended by a Linux signal")
def test_kill_9_in_each_stage_then_repro_gives_the_same_bytes(built: Path) -> None:
    """Every stage is started, killed hard while it works, and run again; the lock file must not notice."""
    expected = outputs(built)
    killed = []
    for stage in STAGES:
        outs = [Path(out) for out in _outs(built, stage)]
        for out in outs:
            atomic.remove(built / out)
        process = subprocess.Popen(
            [sys.executable, "-m", "dvc", "repro", "--single-item", "--force", stage],
            cwd=built,
            env=tiny_project.environment(built),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        if _wait_for_work(built, outs, process):
            killed.append(stage)
        with contextlib.suppress(ProcessLookupError):  # it may have ended just now
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        _wait_for_quiet(built)
        tiny_project.run(built, "dvc", "repro", "--single-item", "--force", stage)
    assert len(killed) >= 6, f"only {killed} were caught at work"
    assert outputs(built) == expected
    assert stale(built) == set()


def _outs(folder: Path, stage: str) -> list[str]:
    stages = yaml.safe_load((folder / "dvc.lock").read_text())["stages"]
    return [out["path"] for out in stages[stage]["outs"]]


def _wait_for_work(folder: Path, outs: list[Path], process: subprocess.Popen[bytes]) -> bool:
    """Wait until the stage writes beside one of its outputs; False if it ended before it was seen."""
    written = [path for out in outs for path in (out, out.parent)]  # some stages declare the files of their folder
    marks = [folder / path.parent / f".{path.name}{suffix}" for path in written for suffix in (".tmp", ".resume")]
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if any(mark.exists() for mark in marks):
            return True
        time.sleep(0.01)
    return False


def _wait_for_quiet(folder: Path) -> None:
    """No process of this project is left."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if not [p for p in Path("/proc").iterdir() if p.name.isdigit() and _cwd(p) == folder.resolve()]:
            return
        time.sleep(0.1)
    raise AssertionError("a killed stage left a process behind")


def _cwd(process: Path) -> Path | None:
    try:
        return (process / "cwd").resolve(strict=True)
    except OSError:
        return None


def test_the_flow_publishes_what_dvc_built(built: Path) -> None:
    done = tiny_project.run(built, "flows")
    assert "Completed" in done.stdout, done.stdout
    assert "8 cached" in done.stdout
    assert "index.html" in done.stdout
    published = built / "data/published"
    receipt = json.loads((published / "ns/latest/receipt.json").read_text())
    weights = (built / "data/runs/ns/scent/weights.safetensors").read_bytes()
    assert receipt["weights_sha256"] == hashlib.sha256(weights).hexdigest()
    assert receipt["git"]["commit"]
    assert {stage["stage"] for stage in receipt["lineage"]} >= {"simulate@ns", "subsample@ns", "train@ns-scent", "forecast@ns-scent"}
    forecast = xr.open_dataset(published / "ns/latest/forecast.nc")
    assert forecast["vorticity"].notnull().all()
    for page in ("index.html", "ns/latest/map.html", "ns/latest/report.html", "ns/latest/quality.html"):
        assert (published / page).stat().st_size > 1000, page
