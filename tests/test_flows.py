"""The flow walks DVC's plan: a toy project with real DVC stages, run by the real flow on one shared Prefect test server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prefect.testing.utilities import prefect_test_harness

from flows import artifacts, build, dvc

TOY = """
stages:
  ingest:
    foreach: [here, gone]
    do:
      cmd: mkdir -p data/ingested && cat data/raw/${item}/x.txt > data/ingested/${item}.txt
      deps: ["data/raw/${item}"]
      outs: ["data/ingested/${item}.txt"]
  validate:
    foreach: [here, gone]
    do:
      cmd: mkdir -p data/checked && cp data/ingested/${item}.txt data/checked/${item}.txt
      deps: ["data/ingested/${item}.txt"]
      outs: ["data/checked/${item}.txt"]
  simulate:
    cmd: "echo this stage is broken; exit 3"
    outs: [data/broken.txt]
  train:
    cmd: cp data/broken.txt data/weights.txt
    deps: [data/broken.txt]
    outs: [data/weights.txt]
"""


@pytest.fixture(scope="module")
def server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q", "--no-scm"], check=True)
    Path("dvc.yaml").write_text(TOY)
    raw = tmp_path / "data" / "raw" / "here"
    raw.mkdir(parents=True)
    (raw / "x.txt").write_text("1\n")
    return tmp_path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    """No fetching and no publishing: these have tests of their own."""
    monkeypatch.setattr(build, "fetch_sources", lambda sources: {"gone": "gone: no such address"})
    monkeypatch.setattr(build, "publish_datasets", lambda outcome, unavailable: {})


def test_the_plan_is_dvcs_plan_in_walking_order(project: Path) -> None:
    plan = dvc.plan()
    order = list(plan)
    assert set(order) == {"ingest@here", "ingest@gone", "validate@here", "validate@gone", "simulate", "train"}
    assert plan["validate@here"] == {"ingest@here"}
    assert all(order.index(before) < order.index(stage) for stage, waits in plan.items() for before in waits)
    stale = dvc.changed()
    assert dvc.missing_raw(stale["ingest@gone"]) == ["data/raw/gone"]
    assert dvc.missing_raw(stale["ingest@here"]) == []


def test_raw_data_files_are_not_stages() -> None:
    dot = 'strict digraph {\n"data/raw/x.dvc";\n"ingest@x";\n"data/raw/x.dvc" -> "ingest@x";\n"ingest@x" -> "validate@x";\n}'
    assert dvc.parse_graph(dot) == {"ingest@x": set(), "validate@x": {"ingest@x"}}


def test_outcomes_and_a_second_walk(server: None, project: Path, offline: None) -> None:
    state = build.build(return_state=True)
    assert state.is_failed()
    assert "simulate" in state.message
    assert "train" not in state.message
    assert Path("data/checked/here.txt").read_text() == "1\n"
    assert not Path("data/weights.txt").exists()
    again = build.build(stages=["ingest", "validate"], return_state=True)
    assert again.is_completed()
    assert again.message == "0 ran, 2 cached, 2 skipped, 0 blocked"
    Path("data/raw/here/x.txt").write_text("2\n")
    changed = build.build(stages=["ingest", "validate"], return_state=True)
    assert changed.message == "2 ran, 0 cached, 2 skipped, 0 blocked"
    assert Path("data/checked/here.txt").read_text() == "2\n"


def test_the_ui_shows_stages_by_name_and_state(server: None, project: Path, offline: None) -> None:
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

    build.build(stages=["ingest", "validate"], return_state=True)
    state = build.build(stages=["ingest", "validate"], return_state=True)
    expected = {"ingest@here": "Cached", "ingest@gone": "Skipped", "validate@here": "Cached", "validate@gone": "Skipped"}
    this = FlowRunFilter(id=FlowRunFilterId(any_=[state.state_details.flow_run_id]))
    with get_client(sync_client=True) as client:
        for _ in range(100):  # the server learns the last states by events, a moment after the flow has ended
            shown = {run.name: run.state_name for run in client.read_task_runs(flow_run_filter=this)}
            if shown == expected:
                break
            time.sleep(0.3)
        found = client.request("POST", "/artifacts/filter", json={}).json()
    assert shown == expected
    mine = {a["key"]: a for a in found if a["flow_run_id"] == str(state.state_details.flow_run_id)}
    assert {"stages", "summary"} <= set(mine)
    assert "gone: no such address" in mine["summary"]["data"]


def test_a_run_that_starts_too_late_is_skipped(server: None, project: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Late:
        scheduled_start_time = datetime.now(UTC) - timedelta(minutes=50)

    monkeypatch.setattr(build.runtime, "flow_run", Late)
    state = build.build(skip_if_late=45.0, return_state=True)
    assert (state.name, state.is_completed()) == ("Skipped", True)
    assert not Path("data/ingested").exists()
    assert build.build(stages=["ingest"], skip_if_late=55.0, return_state=True).name == "Completed"


def test_stages_run_side_by_side_but_trainings_one_after_the_other(
    server: None, project: Path, offline: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ingests meet while they run, or neither would end; the trainings never see each other."""
    stage = "    do:\n      cmd: python meet.py {kind} ${key} ${item}\n      outs: ['data/${key}.txt']\n"
    pairs = {"ingest": "{a: b, b: a}", "train": "{c: d, d: c}"}
    parts = [f"  {kind}:\n    foreach: {pair}\n" + stage.replace("{kind}", kind) for kind, pair in pairs.items()]
    Path("dvc.yaml").write_text("stages:\n" + "".join(parts))
    Path("meet.py").write_text(
        textwrap.dedent("""
        import pathlib, sys, time
        kind, name, other = sys.argv[1:]
        mine, theirs = pathlib.Path(f"{name}.here"), pathlib.Path(f"{other}.here")
        mine.write_text("")
        if kind == "ingest":
            late = time.monotonic() + 300
            while not theirs.exists():
                assert time.monotonic() < late, "the other ingest never started"
                time.sleep(0.05)
        else:
            assert not theirs.exists(), "two trainings at once"
            time.sleep(2)
            mine.unlink()
        pathlib.Path(f"data/{name}.txt").write_text(name)
        """)
    )
    monkeypatch.setenv("FIELDCAST_JOBS", "4")
    state = build.build(return_state=True)
    assert state.message == "4 ran, 0 cached, 0 skipped, 0 blocked"


def test_a_failed_stage_says_why(project: Path) -> None:
    with pytest.raises(dvc.StageFailed, match="this stage is broken"):
        dvc.reproduce("simulate", lambda line: None)


@pytest.mark.skipif(sys.platform != "linux", reason="orphans are ended by a Linux signal")
def test_killing_the_flow_ends_its_stage(project: Path) -> None:
    """kill -9 of whoever walks the plan must not leave a stage that goes on writing."""
    Path("dvc.yaml").write_text("stages:\n  train:\n    cmd: python stage.py\n    outs: [out.txt]\n")
    Path("stage.py").write_text(
        textwrap.dedent("""
        import os, pathlib, sys, time
        from pipeline.__main__ import _die_with_parent
        _die_with_parent()
        pathlib.Path("pid").write_text(str(os.getpid()))
        time.sleep(60)
        """)
    )
    walker = subprocess.Popen([sys.executable, "-c", "from flows import dvc; dvc.reproduce('train', print)"])
    started = time.monotonic() + 300  # a busy machine takes long to import dvc
    while not (Path("pid").exists() and Path("pid").read_text()) and time.monotonic() < started:
        time.sleep(0.1)
    child = int(Path("pid").read_text())
    walker.kill()
    walker.wait()
    ended = time.monotonic() + 60
    while _alive(child) and time.monotonic() < ended:
        time.sleep(0.1)
    alive = _alive(child)
    if alive:
        os.kill(child, signal.SIGKILL)
    assert not alive


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except FileNotFoundError:
        return False


def test_score_rows_have_a_row_a_model(tmp_path: Path) -> None:
    folder = tmp_path / "ns" / "scent"
    folder.mkdir(parents=True)
    (folder / "leads.csv").write_text("model,variable,stratum,lead,n,rmse\nscent,vorticity,field,0,9,0.5\nscent,vorticity,field,3,9,1.5\n")
    expected = {"dataset": "ns", "stratum": "field", "variable": "vorticity", "model": "scent", "RMSE lead 0": "0.5", "RMSE lead 3": "1.5"}
    assert artifacts.score_rows(tmp_path) == [expected]
