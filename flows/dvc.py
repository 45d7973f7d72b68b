"""DVC's command line, and the only place that calls it: what the plan is, what changed, run one stage, version raw data."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from graphlib import TopologicalSorter
from pathlib import Path

EDGE = re.compile(r'^"(?P<before>[^"]+)" -> "(?P<after>[^"]+)";$')
NODE = re.compile(r'^"(?P<node>[^"]+)";$')


class StageFailed(RuntimeError):
    """A DVC command ended with an error; the message holds its last lines."""


def plan() -> dict[str, set[str]]:
    """Every stage with the stages it waits for, in an order that can be walked from front to back."""
    return parse_graph(_output(["dag", "--dot"]))


def parse_graph(dot: str) -> dict[str, set[str]]:
    """Read `dvc dag --dot`; nodes that are data files rather than stages (raw/*.dvc) are left out."""
    graph: dict[str, set[str]] = {}
    for line in dot.splitlines():
        if node := NODE.match(line.strip()):
            graph.setdefault(node["node"], set())
        elif edge := EDGE.match(line.strip()):
            graph.setdefault(edge["after"], set()).add(edge["before"])
            graph.setdefault(edge["before"], set())
    stages = {name: {w for w in waits if not w.endswith(".dvc")} for name, waits in graph.items() if not name.endswith(".dvc")}
    return {name: stages[name] for name in TopologicalSorter({n: sorted(stages[n]) for n in sorted(stages)}).static_order()}


def changed() -> dict[str, list[str]]:
    """Stages that are not up to date by themselves, each with the reasons DVC gives."""
    status = json.loads(_output(["status", "--json"]) or "{}")
    return {name: _reasons(entries) for name, entries in status.items() if not name.endswith(".dvc")}


def _reasons(entries: Iterable[object]) -> list[str]:
    reasons = []
    for entry in entries:
        if isinstance(entry, Mapping):
            reasons += [f"{kind}: {path} {what}" for kind, paths in entry.items() for path, what in dict(paths).items()]
        else:
            reasons.append(str(entry))
    return reasons


def missing_raw(reasons: Iterable[str]) -> list[str]:
    """Raw folders that a stage needs and that are not there, out of its reasons to be stale."""
    found = (re.match(r"changed deps: (data/raw/\S+) deleted$", reason) for reason in reasons)
    return [match[1] for match in found if match]


def reproduce(stage: str, log: Callable[[str], None]) -> bool:
    """Run one stage if it is not up to date; True when it ran, False when it was up to date. Ancestors are left alone."""
    lines = _stream(["--wait-for-lock", "repro", "--single-item", stage], log)
    return not any("didn't change, skipping" in line for line in lines)


def add(folder: Path, log: Callable[[str], None]) -> None:
    """Version a raw folder: its bytes go to the cache, its hash into FOLDER.dvc."""
    _stream(["add", "--quiet", str(folder)], log)


def _command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "dvc", *arguments]


def _environment() -> dict[str, str]:
    """`python` in dvc.yaml means the interpreter that runs this."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    return {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1", "PYTHONUNBUFFERED": "1"}


def _output(arguments: list[str]) -> str:
    done = subprocess.run(_command(arguments), capture_output=True, text=True, env=_environment())
    if done.returncode:
        raise StageFailed(f"dvc {' '.join(arguments)} ended with {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _stream(arguments: list[str], log: Callable[[str], None]) -> list[str]:
    """Run dvc in a process group of its own, passing lines on as they come; whatever happens, nothing of the group survives this call."""
    process = subprocess.Popen(
        _command(arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env=_environment(),
        start_new_session=True,
        preexec_fn=_die_with_parent if sys.platform == "linux" else None,
    )
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if text := line.rstrip():
                lines.append(text)
                log(text)
        process.wait()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        raise StageFailed(f"dvc {' '.join(arguments)} ended with {process.returncode}:\n" + "\n".join(lines[-25:]))
    return lines


def _die_with_parent() -> None:
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
