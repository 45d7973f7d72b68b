"""Results appear whole or not at all, whatever happens to the writer."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline import atomic


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    for text in ("old", "new"):
        with atomic.writing(out) as folder:
            folder.mkdir()
            (folder / f"{text}.txt").write_text(text)
    assert [path.name for path in out.iterdir()] == ["new.txt"]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".tmp", ".old"))]


def test_an_error_leaves_the_old_result(tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    atomic.write_text(out, "old")
    with pytest.raises(RuntimeError, match="half way"), atomic.writing(out) as temporary:
        temporary.write_text("ne")
        raise RuntimeError("half way")
    assert out.read_text() == "old"
    with pytest.raises(FileNotFoundError, match="nothing was written"), atomic.writing(out):
        pass
    assert out.read_text() == "old"


def test_kill_9_leaves_the_old_result_and_the_next_writer_cleans_up(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic.writing(out) as folder:
        folder.mkdir()
        (folder / "a").write_text("old")
    code = (
        "import pathlib, sys, time\nfrom pipeline import atomic\n"
        "with atomic.writing(pathlib.Path(sys.argv[1])) as f:\n"
        "    f.mkdir(); (f / 'a').write_text('half'); print('writing', flush=True); time.sleep(60)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "writing\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert (out / "a").read_text() == "old"
    with atomic.writing(out) as folder:
        folder.mkdir()
        (folder / "a").write_text("new")
    assert (out / "a").read_text() == "new"
    assert not (tmp_path / ".out.tmp").exists()


def _write(path: str, text: str, log: str) -> None:
    with atomic.writing(Path(path)) as temporary:
        with Path(log).open("a") as handle:
            handle.write(f"{text} in\n")
        time.sleep(0.3)
        temporary.write_text(text)
        with Path(log).open("a") as handle:
            handle.write(f"{text} out\n")


def test_two_writers_take_turns(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    log = tmp_path / "log"
    writers = [context.Process(target=_write, args=(str(tmp_path / "out"), name, str(log))) for name in ("one", "two")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    words = [line.split() for line in log.read_text().splitlines()]
    assert [verb for _, verb in words] == ["in", "out", "in", "out"]
    assert words[0][0] == words[1][0] != words[2][0]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a file size limit of a child process")
def test_a_full_disk_is_an_error_and_keeps_the_old_result(tmp_path: Path) -> None:
    out = tmp_path / "out.txt"
    atomic.write_text(out, "old")
    code = (
        "import pathlib, resource, signal, sys\nfrom pipeline import atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\nresource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "atomic.write_text(pathlib.Path(sys.argv[1]), 'x' * 100_000)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True)
    assert done.returncode != 0
    assert "File too large" in done.stderr
    assert out.read_text() == "old"
    assert not (tmp_path / ".out.txt.tmp").exists()
