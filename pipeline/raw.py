"""The raw drop: data/raw/SOURCE/ holds a source's bytes as they were received, and manifest.json says what they are.

    manifest.json   source, licence (SPDX), attribution, home page; per file: origin, sha256, bytes, retrieved_at; what is missing and why

`retrieved_at` is the only clock stored in the pipeline. Nobody edits a raw file; whoever reads one checks it against the manifest first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Remote:
    """A file at its official address."""

    path: str  # its name in the drop
    url: str
    sha256: str | None = None  # where the source states one, or we once took it
    optional: bool = False  # the drop is of use without it


@dataclass(frozen=True)
class Drop:
    """What a source declares about its raw files: which names a mirror may hold, where they come from officially, on which terms."""

    licence: str  # SPDX identifier
    attribution: str
    page: str
    mirror: tuple[str, ...]  # patterns of file names below MIRROR/SOURCE
    official: tuple[Remote, ...]


@dataclass(frozen=True)
class RawFile:
    origin: str
    sha256: str
    bytes: int
    retrieved_at: str  # ISO 8601, UTC


@dataclass(frozen=True)
class Manifest:
    source: str
    licence: str
    attribution: str
    page: str
    files: dict[str, RawFile]
    missing: dict[str, str] = field(default_factory=dict)  # optional files that could not be had, with the reason

    def text(self) -> str:
        return json.dumps(asdict(self), indent=1, sort_keys=True) + "\n"


class RawError(ValueError):
    """A raw drop is not what its manifest says; the message lists every file with expected, found and what to do."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a drop. Raises RawError when it is absent or not a manifest."""
    path = folder / MANIFEST
    if not path.is_file():
        raise RawError(f"{folder} is not a raw drop: it has no {MANIFEST}; fetch the source first")
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = {name: RawFile(**entry) for name, entry in content.pop("files").items()}
        return Manifest(files=files, **content)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise RawError(f"{path} is not a manifest ({error}): remove {folder} and fetch the source again") from None


def verify(folder: Path, names: Sequence[str] | None = None) -> Manifest:
    """Check files of a drop (all, or only `names`) against their manifest, byte by byte, and return it."""
    manifest = read_manifest(folder)
    problems = []
    for name in manifest.files if names is None else names:
        expected, path = manifest.files.get(name), folder / name
        if expected is None:
            problems.append(f"{name}: not listed in {MANIFEST}")
        elif not path.is_file():
            problems.append(f"{name}: expected {expected.bytes} bytes, found no file")
        elif path.stat().st_size != expected.bytes:
            problems.append(f"{name}: expected {expected.bytes} bytes, found {path.stat().st_size}")
        elif (found := sha256(path)) != expected.sha256:
            problems.append(f"{name}: expected sha256 {expected.sha256}, found {found}")
    if problems:
        raise RawError(
            f"{folder} differs from its manifest:\n  "
            + "\n  ".join(problems)
            + f"\nRaw files are never edited: remove {folder} and fetch again"
        )
    return manifest


def sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
