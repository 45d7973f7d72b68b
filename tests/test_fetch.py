"""Fetching from mirrors and over HTTP from a server that behaves well, badly and not at all."""

from __future__ import annotations

import hashlib
import socket
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipeline import fetch, raw, sources
from tests.drops import tree

NOW = datetime(2026, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(days=1)
CONTENT = {"a.csv": b"x\n1\n", "b.csv": b"x\n2\n" * 100_000}


class Handler(BaseHTTPRequestHandler):
    """/ok/NAME gives a file, /short/NAME less than it promises, /endless/NAME never ends, /stalled/NAME stops, /drop/ lists files."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.server.asked.append(self.path)  # type: ignore[attr-defined]
        self.answer(body=True)

    def answer(self, body: bool) -> None:
        _, kind, name = (*self.path.split("/", 2), "")[:3]
        if kind == "mirror":
            name = name.removeprefix("toy").strip("/")
            links = "".join(f'<a href="{each}">{each}</a>' for each in CONTENT)
            content = CONTENT.get(name, links.encode() if not name else b"")
        else:
            content = CONTENT.get(name, b"")
        if kind == "absent" or not content:
            self.send_error(404)
            return
        self.send_response(200)
        if kind not in ("endless", "stalled"):
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if not body:
            return
        try:
            if kind == "short":
                self.wfile.write(content[:-1])
            elif kind == "stalled":
                self.wfile.write(content[:1])
                self.server.released.wait(10)  # type: ignore[attr-defined]
            else:
                self.wfile.write(content)
                while kind == "endless":
                    self.wfile.write(content)
        except (BrokenPipeError, ConnectionResetError):
            pass

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        running.asked, running.released = [], threading.Event()  # type: ignore[attr-defined]
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield running
        running.released.set()  # type: ignore[attr-defined]
        running.shutdown()


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch, server: ThreadingHTTPServer):
    """A source `toy` whose official addresses are on the server; call it to change them."""

    def declare(**kinds: str) -> str:
        base = f"http://127.0.0.1:{server.server_port}"
        official = []
        for name, content in CONTENT.items():
            url = f"{base}/{kinds.get(name[0], 'ok')}/{name}"
            official.append(raw.Remote(name, url, hashlib.sha256(content).hexdigest(), optional=name == "b.csv"))
        drop = raw.Drop("CC0-1.0", "Toy", "https://example.org", ("*.csv",), tuple(official))
        monkeypatch.setattr(sources, "load", lambda name: SimpleNamespace(DROP=drop))
        return base

    declare()
    return declare


def settings(**more: float) -> fetch.Params:
    return fetch.Params(sources=("toy",), **{"connect_timeout": 2, "stall_timeout": 2, **more})


def get(destination: Path, mirror: str | None = None, now: datetime = NOW, **more: float) -> raw.Manifest:
    return fetch.fetch("toy", destination, settings(**more), mirror=mirror, now=now)


def test_official_files_come_with_a_manifest(tmp_path: Path, toy) -> None:
    manifest = get(tmp_path / "toy")
    assert manifest == raw.verify(tmp_path / "toy")
    assert {name: (tmp_path / "toy" / name).read_bytes() for name in CONTENT} == CONTENT
    entry = manifest.files["a.csv"]
    assert entry.origin.startswith("http://127.0.0.1")
    assert (entry.sha256, entry.bytes, entry.retrieved_at) == (hashlib.sha256(b"x\n1\n").hexdigest(), 4, "2026-01-01T00:00:00Z")
    assert (manifest.licence, manifest.attribution) == ("CC0-1.0", "Toy")


def test_a_second_fetch_asks_for_nothing_and_changes_nothing(tmp_path: Path, toy, server: ThreadingHTTPServer) -> None:
    get(tmp_path / "toy")
    before, touched = tree(tmp_path / "toy"), (tmp_path / "toy").stat().st_mtime_ns
    server.asked.clear()  # type: ignore[attr-defined]
    get(tmp_path / "toy", now=LATER)
    assert server.asked == []  # type: ignore[attr-defined]
    assert (tree(tmp_path / "toy"), (tmp_path / "toy").stat().st_mtime_ns) == (before, touched)


def test_a_damaged_file_is_fetched_again_and_the_others_keep_their_entries(tmp_path: Path, toy) -> None:
    get(tmp_path / "toy")
    (tmp_path / "toy" / "a.csv").write_bytes(b"x\n9\n")
    manifest = get(tmp_path / "toy", now=LATER)
    assert (tmp_path / "toy" / "a.csv").read_bytes() == CONTENT["a.csv"]
    assert {name: entry.retrieved_at[:10] for name, entry in manifest.files.items()} == {"a.csv": "2026-01-02", "b.csv": "2026-01-01"}


def test_the_mirror_comes_first(tmp_path: Path, toy, server: ThreadingHTTPServer) -> None:
    folder = tmp_path / "mirror" / "toy"
    folder.mkdir(parents=True)
    (folder / "c.csv").write_bytes(b"x\n3\n")
    (folder / "notes.txt").write_bytes(b"not asked for")
    manifest = get(tmp_path / "toy", mirror=str(tmp_path / "mirror"))
    assert list(manifest.files) == ["c.csv"]
    assert server.asked == []  # type: ignore[attr-defined]


def test_unchanged_bytes_of_a_mirror_keep_their_entry(tmp_path: Path, toy) -> None:
    folder = tmp_path / "mirror" / "toy"
    folder.mkdir(parents=True)
    (folder / "c.csv").write_bytes(b"x\n3\n")
    get(tmp_path / "toy", mirror=str(tmp_path / "mirror"))
    before = tree(tmp_path / "toy")
    get(tmp_path / "toy", mirror=str(tmp_path / "mirror"), now=LATER)
    assert tree(tmp_path / "toy") == before
    (folder / "d.csv").write_bytes(b"x\n4\n")
    manifest = get(tmp_path / "toy", mirror=str(tmp_path / "mirror"), now=LATER)
    assert [entry.retrieved_at[:10] for entry in manifest.files.values()] == ["2026-01-01", "2026-01-02"]
    (folder / "c.csv").unlink()
    get(tmp_path / "toy", mirror=str(tmp_path / "mirror"), now=LATER)
    assert set(tree(tmp_path / "toy")) == {"d.csv", "manifest.json"}, "what the source no longer has goes"


def test_a_mirror_by_url(tmp_path: Path, toy) -> None:
    base = toy(a="absent", b="absent")
    manifest = get(tmp_path / "toy", mirror=f"{base}/mirror")
    assert {name: (tmp_path / "toy" / name).read_bytes() for name in manifest.files} == CONTENT


def test_without_the_source_in_the_mirror_the_official_address_is_asked(tmp_path: Path, toy) -> None:
    (tmp_path / "mirror").mkdir()
    assert set(get(tmp_path / "toy", mirror=str(tmp_path / "mirror")).files) == set(CONTENT)


def test_an_optional_file_that_cannot_be_had_is_named(tmp_path: Path, toy) -> None:
    toy(b="absent")
    manifest = get(tmp_path / "toy")
    assert list(manifest.files) == ["a.csv"]
    assert "404" in manifest.missing["b.csv"] or "FileNotFound" in manifest.missing["b.csv"]


@pytest.mark.parametrize(
    ("kind", "limits", "reason"),
    [
        ("absent", {}, "404"),
        ("short", {}, "received 3 of 4 bytes"),
        ("stalled", {"stall_timeout": 0.3}, "Timeout"),
    ],
)
def test_a_source_that_cannot_be_had_says_why_in_one_line(tmp_path: Path, toy, kind: str, limits: dict, reason: str) -> None:
    toy(a=kind)
    with pytest.raises(fetch.SourceUnavailable, match=reason) as failure:
        get(tmp_path / "toy", **limits)
    text = str(failure.value)
    assert text.startswith("toy: http://127.0.0.1")
    assert "\n" not in text
    assert list(tmp_path.iterdir()) == [], "nothing half-done stays"


def test_an_endless_download_ends_at_the_limit(tmp_path: Path, toy) -> None:
    toy(a="endless")
    with pytest.raises(fetch.SourceUnavailable, match=r"more than 1000000 bytes \(fetch\.max_bytes\)"):
        get(tmp_path / "toy", max_bytes=1_000_000)
    assert list(tmp_path.iterdir()) == []


def test_other_bytes_than_declared_are_refused(tmp_path: Path, toy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONTENT, "a.csv", b"x\n8\n")
    with pytest.raises(fetch.SourceUnavailable, match=r"expected sha256 [0-9a-f]{64}, found [0-9a-f]{64} in 4 bytes"):
        get(tmp_path / "toy")


def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    drop = raw.Drop("CC0-1.0", "Toy", "https://example.org", ("*",), (raw.Remote("a.csv", f"http://127.0.0.1:{port}/a.csv"),))
    monkeypatch.setattr(sources, "load", lambda name: SimpleNamespace(DROP=drop))
    with pytest.raises(fetch.SourceUnavailable, match=r"refused|Connect call failed"):
        get(tmp_path / "toy")


def test_what_was_fetched_before_stays_when_the_source_is_gone(tmp_path: Path, toy) -> None:
    get(tmp_path / "toy")
    (tmp_path / "toy" / "a.csv").unlink()
    before = tree(tmp_path / "toy")
    toy(a="absent")
    with pytest.raises(fetch.SourceUnavailable, match="what was fetched before stays"):
        get(tmp_path / "toy", now=LATER)
    assert tree(tmp_path / "toy") == before


def test_what_a_killed_fetch_left_behind_goes_with_the_next(tmp_path: Path, toy) -> None:
    (tmp_path / ".toy.fetch").mkdir()
    (tmp_path / ".toy.fetch" / "a.csv").write_bytes(b"x\n")
    get(tmp_path / "toy")
    assert {path.name for path in tmp_path.iterdir()} == {"toy", ".toy.lock"}


def test_a_full_disk_is_no_unavailable_source(tmp_path: Path, toy, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource
    import signal

    (tmp_path / "mirror" / "toy").mkdir(parents=True)
    (tmp_path / "mirror" / "toy" / "b.csv").write_bytes(CONTENT["b.csv"])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            get(tmp_path / "toy", mirror=str(tmp_path / "mirror"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, ignored)
    assert not (tmp_path / "toy").exists()


def test_a_clock_without_a_zone_is_refused(tmp_path: Path, toy) -> None:
    with pytest.raises(ValueError, match="needs a time zone"):
        get(tmp_path / "toy", now=datetime(2026, 1, 1))


def test_a_manifest_that_is_none_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"files": 3}')
    with pytest.raises(raw.RawError, match=r"is not a manifest .* fetch the source again"):
        raw.read_manifest(tmp_path)


@pytest.mark.real
@pytest.mark.parametrize("source", ["airdelhi", "beijing", "era5", "kolkata"])
def test_every_source_is_in_the_mirror(mirror: Path, tmp_path: Path, source: str) -> None:
    manifest = fetch.fetch(source, tmp_path / source, settings(), mirror=str(mirror), now=NOW)
    assert manifest.files
    for name, entry in manifest.files.items():
        assert entry.sha256 == hashlib.sha256((mirror / source / name).read_bytes()).hexdigest()
