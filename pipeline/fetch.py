"""Get a source's raw files: from a mirror, or else from their official addresses, into data/raw/SOURCE with a manifest.

Nothing here knows a clock or a schedule: the caller passes the time and decides about trying again. Files arrive whole or not at all, and a
drop changes only when bytes change: what is there and intact keeps its entry, `retrieved_at` included. Archives do not change, so a file
that is already there intact is not asked for again at its official address.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from datetime import datetime
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import IO, Any

import fsspec
from pydantic import Field

from pipeline import atomic, raw, sources, utc
from pipeline.params import Section
from pipeline.raw import Drop, Manifest, RawFile, Remote

CHUNK = 1 << 20
Copied = tuple[str, int]  # sha256, bytes


class Params(Section):
    """Section `fetch` of params.yaml."""

    sources: tuple[str, ...]
    connect_timeout: float = Field(default=5.0, gt=0)  # s
    stall_timeout: float = Field(default=30.0, gt=0)  # s without a byte
    file_timeout: float = Field(default=1800.0, gt=0)  # s for one file
    max_bytes: int = Field(default=4 << 30, gt=0)  # of one file


class SourceUnavailable(RuntimeError):
    """A source cannot be had; the message is one line that says from where and why."""


class _Refused(ValueError):
    """A file came, but it is not what it should be."""


def fetch(source: str, destination: Path, params: Params, *, mirror: str | None, now: datetime) -> Manifest:
    """Bring `destination` (data/raw/SOURCE) up to date and return its manifest.

    `mirror` is a folder or any URL that fsspec reads, laid out SOURCE/files; None has the official addresses only. Raises SourceUnavailable
    when no mirror holds the source and one of its official files cannot be had; what was there before stays.
    """
    drop: Drop = sources.load(source).DROP
    before = _intact(destination)
    staging = destination.with_name(f".{destination.name}.fetch")  # of a fixed name: what a killed fetch left behind goes with the next
    atomic.remove(staging)
    staging.mkdir(parents=True)
    try:
        missing: dict[str, str] = {}
        had, where = _from_mirror(source, drop, mirror, staging, params) if mirror else ({}, "")
        if not had:
            had = _official(source, drop, staging, params, before, destination, missing, where)
        entries = {}
        for name, (origin, (sha256, size)) in sorted(had.items()):
            old = before.get(name)
            same = old is not None and old.sha256 == sha256
            entries[name] = old if same and old is not None else RawFile(origin, sha256, size, utc.text(now))
        manifest = Manifest(source, drop.licence, drop.attribution, drop.page, entries, missing)
        if _unchanged(destination, manifest, before):
            return manifest
        (staging / raw.MANIFEST).write_text(manifest.text(), encoding="utf-8")
        with atomic.writing(destination) as folder:
            staging.rename(folder)
        return manifest
    finally:
        atomic.remove(staging)


def _intact(destination: Path) -> dict[str, RawFile]:
    """Entries of files that are there and as their manifest says."""
    try:
        files = raw.read_manifest(destination).files
    except raw.RawError:
        return {}
    return {
        name: entry for name, entry in files.items() if (destination / name).is_file() and raw.sha256(destination / name) == entry.sha256
    }


def _unchanged(destination: Path, manifest: Manifest, before: dict[str, RawFile]) -> bool:
    """Is the drop there, whole, with this very manifest and nothing else?"""
    path = destination / raw.MANIFEST
    if manifest.files != before or not path.is_file() or path.read_text(encoding="utf-8") != manifest.text():
        return False
    return {each.name for each in destination.iterdir()} == {*manifest.files, raw.MANIFEST}


def _from_mirror(source: str, drop: Drop, mirror: str, staging: Path, params: Params) -> tuple[dict[str, tuple[str, Copied]], str]:
    """Copy what the mirror holds of a source; nothing, and the reason, where it holds nothing."""
    place = f"the mirror {mirror}"
    try:
        system, root = fsspec.core.url_to_fs(mirror, **_timeouts(mirror, params))
        listed = {str(path).rstrip("/").rpartition("/")[2]: str(path) for path in system.ls(f"{root.rstrip('/')}/{source}", detail=False)}
    except Exception as error:  # each file system has its own
        return {}, f"{place} has no {source} ({_reason(error)}); "
    names = sorted(name for name in listed if any(fnmatch(name, pattern) for pattern in drop.mirror))
    if not names:
        return {}, f"{place} holds no file {', '.join(drop.mirror)} of {source}; "
    had = {}
    for name in names:
        try:
            copied = _copy(partial(_open, system, listed[name]), staging / name, params, None)
            had[name] = (f"{mirror.rstrip('/')}/{source}/{name}", copied)
        except Exception as error:
            _not_our_disk(error)
            raise SourceUnavailable(f"{source}: {name} cannot be copied from {place}: {_reason(error)}") from error
    return had, ""


def _official(
    source: str,
    drop: Drop,
    staging: Path,
    params: Params,
    before: dict[str, RawFile],
    destination: Path,
    missing: dict[str, str],
    where: str,
) -> dict[str, tuple[str, Copied]]:
    """The official files: those already here by a hard link, the others by download. Optional ones that fail go to `missing`."""
    had: dict[str, tuple[str, Copied]] = {}
    for remote in drop.official:
        old = before.get(remote.path)
        if old is not None and remote.sha256 in (None, old.sha256):
            _take_over(destination / remote.path, staging / remote.path)
            had[remote.path] = (old.origin, (old.sha256, old.bytes))
            continue
        try:
            had[remote.path] = (remote.url, _download(remote, staging, params))
        except Exception as error:
            _not_our_disk(error)
            if not remote.optional:
                kept = "; what was fetched before stays" if before else ""
                raise SourceUnavailable(f"{source}: {where}{remote.url} cannot be had: {_reason(error)}{kept}") from error
            missing[remote.path] = f"{remote.url}: {_reason(error)}"
    if not had:
        raise SourceUnavailable(f"{source}: {where}no official file can be had: {'; '.join(missing.values()) or 'none is declared'}")
    return had


def _take_over(old: Path, new: Path) -> None:
    try:
        os.link(old.resolve(), new)
    except OSError:
        shutil.copyfile(old, new)


def _download(remote: Remote, staging: Path, params: Params) -> Copied:
    system, path = fsspec.core.url_to_fs(remote.url, **_timeouts(remote.url, params))
    return _copy(partial(_open, system, path), staging / remote.path, params, remote.sha256)


def _open(system: Any, path: str) -> Any:
    streamed = {"block_size": 0} if "http" in system.protocol else {}  # as one stream, not by ranges held in memory
    return system.open(path, "rb", **streamed)


def _copy(opened: Callable[[], Any], target: Path, params: Params, expected: str | None) -> Copied:
    """Stream one file to disk, counting and hashing; too many bytes, or others than expected, are refused."""
    digest, size = hashlib.sha256(), 0
    stream: IO[bytes]
    with opened() as stream, target.open("xb") as written:
        while chunk := stream.read(CHUNK):
            size += len(chunk)
            if size > params.max_bytes:
                raise _Refused(f"more than {params.max_bytes} bytes (fetch.max_bytes)")
            digest.update(chunk)
            written.write(chunk)
    if not size:
        raise _Refused("the file is empty")
    if expected is not None and digest.hexdigest() != expected:
        raise _Refused(f"expected sha256 {expected}, found {digest.hexdigest()} in {size} bytes")
    return digest.hexdigest(), size


def _timeouts(url: str, params: Params) -> dict[str, Any]:
    if not url.startswith(("http://", "https://")):
        return {}
    import aiohttp

    limits = aiohttp.ClientTimeout(total=params.file_timeout, connect=params.connect_timeout, sock_read=params.stall_timeout)
    return {"client_kwargs": {"timeout": limits}}


def _not_our_disk(error: BaseException) -> None:
    """A full disk is no fault of the source: say so instead of going on without it."""
    if isinstance(error, OSError) and error.errno in atomic.NO_ROOM:
        raise error


def _reason(error: BaseException) -> str:
    """An error in one line; file systems wrap what really happened, so the cause at the bottom."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
