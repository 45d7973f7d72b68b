"""A scheduled run really fires: a Prefect server, a process worker, the deployment of prefect.yaml on a short interval."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.imports import ROOT

STAGE = "stages:\n  simulate:\n    cmd: mkdir -p data && echo 1 > data/x.txt\n    outs: [data/x.txt]\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """The flows and prefect.yaml of this repository beside a plan of one stage."""
    for name in ("flows", "pipeline", "models"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "dvc.yaml").write_text(STAGE)
    fetch = yaml.safe_load((ROOT / "params.yaml").read_text())["fetch"]
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"fetch": {**fetch, "sources": []}, "publish": {}}))
    prefect = yaml.safe_load((ROOT / "prefect.yaml").read_text())
    nightly = next(d for d in prefect["deployments"] if d["name"] == "nightly")
    nightly["schedules"] = [{"interval": 15}]
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump({**prefect, "deployments": [nightly]}))
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], cwd=tmp_path, check=True)
    return tmp_path


@pytest.fixture
def server(project: Path) -> Iterator[dict[str, str]]:
    """A Prefect server of its own on a free port; the environment that reaches it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    env |= {"PREFECT_HOME": str(project / ".prefect"), "PREFECT_API_URL": f"http://127.0.0.1:{port}/api", "PATH": path}
    env |= {"PREFECT_SERVER_ANALYTICS_ENABLED": "false", "PREFECT_WORKER_QUERY_SECONDS": "2", "PYTHONPATH": str(project)}
    process = _start(project, env, "server", "start", "--host", "127.0.0.1", "--port", str(port), log="server.log")
    try:
        _until(lambda: _get(env, "/health") is True, 120, project / "server.log")
        yield env
    finally:
        _stop(process)


def test_the_nightly_deployment_fires_and_shows_its_stages(project: Path, server: dict[str, str]) -> None:
    _prefect(project, server, "work-pool", "create", "cpu", "--type", "process")
    _prefect(project, server, "--no-prompt", "deploy", "--all")
    worker = _start(project, server, "worker", "start", "--pool", "cpu", log="worker.log")
    try:
        _until(lambda: any(run["state_type"] == "COMPLETED" for run in _runs(server)), 180, project / "worker.log")
    finally:
        _stop(worker)
    done = next(run for run in _runs(server) if run["state_type"] == "COMPLETED")
    assert done["auto_scheduled"] is True
    assert done["deployment_id"]
    tasks = _post(server, "/task_runs/filter", {"flow_runs": {"id": {"any_": [done["id"]]}}})
    assert {task["name"] for task in tasks} == {"simulate"}
    assert (project / "data/x.txt").read_text() == "1\n"
    assert _post(server, "/artifacts/filter", {})[0]["flow_run_id"]


def _start(project: Path, env: dict[str, str], *words: str, log: str) -> subprocess.Popen[bytes]:
    with (project / log).open("wb") as handle:
        command = [sys.executable, "-m", "prefect", *words]
        return subprocess.Popen(command, cwd=project, env=env, stdout=handle, stderr=subprocess.STDOUT, start_new_session=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)


def _prefect(project: Path, env: dict[str, str], *words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "prefect", *words], cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _get(env: dict[str, str], path: str) -> object:
    try:
        with urllib.request.urlopen(env["PREFECT_API_URL"] + path, timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


def _post(env: dict[str, str], path: str, body: object) -> list[dict]:
    request = urllib.request.Request(env["PREFECT_API_URL"] + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)


def _runs(env: dict[str, str]) -> list[dict]:
    return _post(env, "/flow_runs/filter", {"sort": "EXPECTED_START_TIME_DESC"})


def _until(true: object, seconds: float, log: Path) -> None:
    deadline = time.monotonic() + seconds
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(1)
