"""Comma separated text in typed blocks: streamed, bounded, every line accounted for.

A line that cannot be read as a row is rejected with its number and a reason, and the lines around it are kept. A file that cannot be
trusted as a whole (cut archive, wrong header, no text, endless) is Unreadable.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv

from pipeline.members import BROKEN

NULLS = ("", "NA", "N/A", "NaN", "nan", "null", "NULL", "None")
BLOCK_BYTES = 4 << 20
LINE_BYTES = 1 << 20  # no row of a table is as long


class Unreadable(ValueError):
    """The file as a whole is no such table; the message says why, without the file's name."""


@dataclass(frozen=True)
class Block:
    table: pa.Table  # the asked columns, in the asked types
    line: np.ndarray  # int64 [rows], 1-based line of the file
    rejected: list[tuple[int, str]]  # (line, reason)


def blocks(stream: IO[bytes], columns: Mapping[str, pa.DataType], limit: int) -> Iterator[Block]:
    """Blocks of about BLOCK_BYTES of a file with a header line; columns are found by name, others are skipped.

    `limit` is the most decompressed bytes a file may have. Rows before a fault in the file are yielded before Unreadable is raised.
    """
    pending, read, line = b"", 0, 1
    names: list[str] | None = None
    while chunk := _read(stream, read):
        read += len(chunk)
        if read > limit:
            raise Unreadable(f"more than {limit} bytes when decompressed: it may be a decompression bomb; else raise max_file_bytes")
        whole, separator, rest = chunk.rpartition(b"\n")
        if not separator:
            pending += rest
        else:
            text, pending = pending + whole + separator, rest
            if names is None:
                head, _, text = text.partition(b"\n")
                names = _header(head, columns)
                line = 2
            if text:
                total = text.count(b"\n")
                yield _parse(text, names, columns, line, total)
                line += total
        if len(pending) > LINE_BYTES:
            raise Unreadable(f"line {line} is longer than {LINE_BYTES} bytes: this is no table of comma separated text")
    if not read:
        raise Unreadable("the file is empty")
    if names is None:
        raise Unreadable(f"the file ends in its first line, after {read} bytes")
    if pending:
        yield Block(_empty(columns), np.empty(0, "i8"), [(line, "the file ends within this line: it may have been cut short")])


def lines(stream: IO[bytes], wanted: set[int], limit: int) -> dict[int, str]:
    """The text of some lines (1-based), as it stands in the file; bytes that are no UTF-8 are written as \\xNN."""
    found: dict[int, str] = {}
    read, number = 0, 0
    while len(found) < len(wanted) and read <= limit and (text := stream.readline(LINE_BYTES)):
        read += len(text)
        number += 1
        if number in wanted:
            found[number] = text.rstrip(b"\r\n").decode("utf-8", "backslashreplace")
    return found


def _read(stream: IO[bytes], before: int) -> bytes:
    try:
        return stream.read(BLOCK_BYTES)
    except BROKEN as error:
        raise Unreadable(f"the archive is damaged or cut short ({error or type(error).__name__}) after {before} readable bytes") from None


def _header(head: bytes, columns: Mapping[str, pa.DataType]) -> list[str]:
    try:
        text = head.decode("utf-8-sig").rstrip("\r")
    except UnicodeDecodeError as error:
        raise Unreadable(f"the header is no UTF-8 text ({error.reason} at byte {error.start})") from None
    names = [name.strip() for name in next(csv.reader([text]), [])]
    problems = [f"no column {name!r}" for name in columns if name not in names]
    problems += [f"{names.count(name)} columns {name!r}" for name in columns if names.count(name) > 1]
    if problems:
        raise Unreadable(f"{', '.join(problems)}; the header is {text[:300]!r}")
    return names


def _parse(text: bytes, names: list[str], columns: Mapping[str, pa.DataType], first: int, total: int) -> Block:
    """One block of `total` whole lines, the first of which has number `first`."""
    if _has_stray_bytes(text):
        return _without_stray_bytes(text, names, columns, first)
    table, skipped = _fast(text, names, columns)
    rejected: list[tuple[int, str]] = []
    if table is None:  # a cell does not fit its type
        table, skipped = _fast(text, names, dict.fromkeys(columns, pa.string()))
    assert table is not None
    number = np.arange(first, first + total)
    if table.num_rows + len(skipped) != total:
        raise Unreadable(f"lines {first} to {first + total - 1} give {table.num_rows + len(skipped)} rows")
    if skipped:
        rejected += [(first + row - 1, f"expected {expected} columns, found {found}") for row, expected, found in skipped]
        number = np.delete(number, [row - 1 for row, _, _ in skipped])
    if all(table[name].null_count for name in columns):  # Arrow makes a row of nulls out of a blank line
        blank = {first + i for i, content in enumerate(text.split(b"\n")) if not content.strip()}
        keep = ~np.isin(number, list(blank))
        table, number = table.filter(pa.array(keep)), number[keep]
        rejected = [each for each in rejected if each[0] not in blank]
    if table.schema.types != list(columns.values()):
        table, number, bad = _lenient(table, number, columns)
        rejected += bad
    return Block(table, number, sorted(rejected))


def _fast(text: bytes, names: list[str], columns: Mapping[str, pa.DataType]) -> tuple[pa.Table | None, list[tuple[int, int, int]]]:
    """Arrow's own parser: the table, or None where a cell does not fit; and the rows it skipped (1-based) with columns expected, found."""
    skipped: list[tuple[int, int, int]] = []

    def skip(row: pa_csv.InvalidRow) -> str:
        skipped.append((row.number, row.expected_columns, row.actual_columns))
        return "skip"

    try:
        table = pa_csv.read_csv(
            pa.BufferReader(text),
            read_options=pa_csv.ReadOptions(column_names=names, use_threads=False, block_size=len(text) + 1),
            parse_options=pa_csv.ParseOptions(ignore_empty_lines=False, invalid_row_handler=skip),
            convert_options=pa_csv.ConvertOptions(
                column_types=columns, include_columns=list(columns), null_values=NULLS, strings_can_be_null=True
            ),
        )
    except pa.ArrowInvalid:
        return None, []
    return table, skipped


def _has_stray_bytes(text: bytes) -> bool:
    """Is there a line that is no UTF-8, whose quotes do not pair up, or that holds a bare carriage return? It could take others along."""
    if b"\r" in text and text.count(b"\r") != text.count(b"\r\n"):
        return True
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return True
    if b'"' not in text:
        return False
    content = np.frombuffer(text, "u1")
    quotes = np.cumsum(content == ord('"'), dtype="i4")[content == ord("\n")]
    return bool((np.diff(quotes, prepend=np.int32(0)) % 2).any())


def _without_stray_bytes(text: bytes, names: list[str], columns: Mapping[str, pa.DataType], first: int) -> Block:
    """Reject the lines with stray bytes, one by one, and parse the others."""
    good, number, rejected = [], [], []
    for i, content in enumerate(text.split(b"\n")[:-1], first):
        try:
            content.decode("utf-8")
        except UnicodeDecodeError as error:
            rejected.append((i, f"this is no UTF-8 text ({error.reason} at byte {error.start} of the line)"))
            continue
        if content.count(b'"') % 2:
            rejected.append((i, "a quote is not closed"))
        elif b"\r" in content[:-1]:
            rejected.append((i, "a carriage return stands within the line"))
        else:
            good.append(content)
            number.append(i)
    if not good:
        return Block(_empty(columns), np.empty(0, "i8"), rejected)
    block = _parse(b"\n".join(good) + b"\n", names, columns, 0, len(good))
    there = np.array(number)
    return Block(block.table, there[block.line], sorted(rejected + [(int(there[row]), reason) for row, reason in block.rejected]))


def _lenient(table: pa.Table, number: np.ndarray, columns: Mapping[str, pa.DataType]) -> tuple[pa.Table, np.ndarray, list[tuple[int, str]]]:
    """Cells read as text -> typed columns; rows with a cell that does not fit are taken out, with the reason."""
    arrays, faults = [], np.full(len(number), None, dtype=object)
    for name, kind in columns.items():
        raw = table[name].combine_chunks()
        typed = _cast(raw, kind)
        wrong = pc.and_(pc.is_valid(raw), pc.is_null(typed)).to_numpy(zero_copy_only=False)
        texts = pc.filter(raw, pa.array(wrong)).to_pylist()
        for row, cell in zip(np.flatnonzero(wrong), texts, strict=True):
            if (shown := cell.strip()) not in NULLS:
                faults[row] = faults[row] or f"{name} is {shown[:80]!r}, expected {_expected(kind)}"
        arrays.append(typed)
    bad = np.array([fault is not None for fault in faults], dtype=bool)
    good = pa.table(arrays, names=list(columns)).filter(pa.array(~bad))
    return good, number[~bad], [(int(line), str(fault)) for line, fault in zip(number[bad], faults[bad], strict=True)]


def _expected(kind: pa.DataType) -> str:
    if pa.types.is_timestamp(kind):
        return "a date and time with its UTC offset" if kind.tz else "a date and time"
    return "a whole number" if pa.types.is_integer(kind) else "a number"


def _cast(raw: pa.Array, kind: pa.DataType) -> pa.Array:
    """Cast text to a type, null where that fails: halves what fails until the culprits are alone."""
    if pa.types.is_string(kind):
        return raw
    try:
        return pc.utf8_trim_whitespace(raw).cast(kind)
    except pa.ArrowInvalid:
        if len(raw) == 1:
            return pa.nulls(1, kind)
        middle = len(raw) // 2
        return pa.concat_arrays([_cast(raw[:middle], kind), _cast(raw[middle:], kind)])


def _empty(columns: Mapping[str, pa.DataType]) -> pa.Table:
    return pa.schema(list(columns.items())).empty_table()
