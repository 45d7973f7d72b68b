"""What the pages tell people to type exists. What the commands do is tested elsewhere (end to end, serve, flows)."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.imports import ROOT

PAGES = ["README.md", "docs/operations.md", "docs/benchmarks.md", "docs/datasets.md"]


def commands(page: str) -> list[str]:
    """Every command line in the fenced blocks of a page, prompts and comments left out."""
    lines = []
    for block in re.findall(r"```\n(.*?)```", (ROOT / page).read_text(), flags=re.S):
        for line in block.splitlines():
            text = re.sub(r"\s+#.*", "", re.sub(r"^\w+\$ ", "", line)).strip()
            lines += [part.strip() for part in text.split("&&")]
    names = r"(?:[A-Z_]+=\S+ )*(make|dvc|prefect|python|pip|git) "
    return [line for line in lines if re.match(names, line)]


ALL = sorted({command for page in PAGES for command in commands(page)})
ENV = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "PREFECT_SERVER_ANALYTICS_ENABLED": "false", "DVC_NO_ANALYTICS": "1"}


def test_there_are_commands_to_test() -> None:
    assert {"make run", "make test", "make serve", "dvc repro", "dvc metrics show"} <= set(ALL)


@pytest.mark.parametrize("command", [c for c in ALL if " make " in f" {c} "])
def test_make_targets_exist(command: str) -> None:
    target = command.split("make ", 1)[1].split()[0]
    assert shutil.which("make"), "the README asks for make"
    done = subprocess.run(["make", "--dry-run", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [c for c in ALL if c.startswith(("dvc ", "prefect ", "python -m flows", "python -m pipeline"))])
def test_subcommands_exist(command: str, tmp_path: Path) -> None:
    words = command.split()
    verb = [word for word in words[1:3] if re.fullmatch(r"[a-z][a-z-]*", word)]
    program = [sys.executable, "-m", words[2]] if words[0] == "python" else [sys.executable, "-m", words[0], *_verb(words[0], verb)]
    env = {**ENV, "PREFECT_HOME": str(tmp_path), "HOME": str(tmp_path)}
    done = subprocess.run([*program, "--help"], cwd=ROOT, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stdout + done.stderr


def _verb(program: str, words: list[str]) -> list[str]:
    """The part of the words that names a subcommand; the rest are names of people's own things."""
    groups = {"dvc": {"metrics", "plots", "remote"}, "prefect": {"server", "work-pool", "gcl", "worker", "deployment"}}
    return words if words and words[0] in groups[program] else words[:1]


def test_pages_link_to_files_that_exist() -> None:
    for page in [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_repository_names_no_machine() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for name in listed:
        path = ROOT / name
        if path.suffix in {".md", ".py", ".yaml", ".toml", ".html", ".js", ".css"} and path.name != "test_readme.py":
            text = path.read_text(encoding="utf-8")
            for place in (ROOT, Path.home()):
                assert len(place.parts) < 2 or f"{place}/" not in text, f"{name} names {place}"
