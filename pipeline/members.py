"""Tables inside files: plain, gzip, zip, or a zip in a zip, told apart by their first bytes and read as a stream.

A member is named by its path in the raw drop, with `!` between an archive and what is inside: `all.zip!2013.zip!Dongsi.csv`.
"""

from __future__ import annotations

import gzip
import io
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, cast

BROKEN = (EOFError, gzip.BadGzipFile, zlib.error, zipfile.BadZipFile, NotImplementedError)  # a cut or damaged archive
INNER_ARCHIVE_LIMIT = 256 << 20  # bytes; an archive inside an archive is held in memory, since zip has to seek
_ZIP, _GZIP = b"PK\x03\x04", b"\x1f\x8b"


def members(folder: Path, name: str) -> list[str]:
    """The members that a file of the drop consists of, sorted; [name] when it is no zip. Raises one of BROKEN for a damaged zip."""
    with (folder / name).open("rb") as stream:
        return _members(stream, name)


def _members(stream: IO[bytes], name: str) -> list[str]:
    if not _starts_with(stream, _ZIP):
        return [name]
    found = []
    with zipfile.ZipFile(stream) as archive:
        for info in sorted(archive.infolist(), key=lambda each: each.filename):
            if info.is_dir():
                continue
            inside = f"{name}!{info.filename}"
            if info.filename.lower().endswith(".zip"):
                found += _members(_inner(archive, info), inside)
            else:
                found.append(inside)
    return found


@contextmanager
def opened(folder: Path, member: str) -> Iterator[IO[bytes]]:
    """The decompressed bytes of a member as a stream. Reading raises one of BROKEN where the compression is damaged or cut."""
    name, *inside = member.split("!")
    with ExitStack() as stack:
        stream: IO[bytes] = stack.enter_context((folder / name).open("rb"))
        for depth, part in enumerate(inside):
            archive = stack.enter_context(zipfile.ZipFile(stream))
            info = archive.getinfo(part)
            stream = _inner(archive, info) if depth < len(inside) - 1 else stack.enter_context(archive.open(info))
        if _starts_with(stream, _GZIP):
            stream = cast(IO[bytes], stack.enter_context(gzip.open(stream, "rb")))
        yield stream


def _starts_with(stream: IO[bytes], magic: bytes) -> bool:
    head = stream.read(len(magic))
    stream.seek(0)
    return head == magic


def _inner(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> IO[bytes]:
    with archive.open(info) as stream:
        content = stream.read(INNER_ARCHIVE_LIMIT + 1)
    if len(content) > INNER_ARCHIVE_LIMIT:
        raise zipfile.BadZipFile(f"{info.filename} inside the archive is larger than {INNER_ARCHIVE_LIMIT} bytes")
    return io.BytesIO(content)
