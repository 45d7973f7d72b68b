"""Raw drops for tests: small files in the sources' own formats, with a manifest; how to ingest them and look at the result."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from pipeline import ingest, params, raw, sources

RETRIEVED = "2026-01-01T00:00:00Z"


def write_drop(folder: Path, source: str, files: Mapping[str, bytes]) -> Path:
    """Write files and the manifest that fetch would write."""
    folder.mkdir(parents=True, exist_ok=True)
    entries = {}
    for name, content in files.items():
        (folder / name).write_bytes(content)
        entries[name] = raw.RawFile(f"https://example.org/{name}", hashlib.sha256(content).hexdigest(), len(content), RETRIEVED)
    declared = sources.load(source).DROP
    (folder / raw.MANIFEST).write_text(raw.Manifest(source, declared.licence, declared.attribution, declared.page, entries).text())
    return folder


def section(source: str, **settings):
    return params.validated({"source": source, **settings}, ingest.params_model("key"), "ingest.key")


def ingested(folder: Path, source: str, files: Mapping[str, bytes], **settings) -> Path:
    """Ingest a drop made of these files; the folder with the result."""
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / "out"
    ingest.run(section(source, **settings), "key", raw=write_drop(folder / "raw", source, files), out=out)
    return out


def table(out: Path, kind: str = "observations") -> pd.DataFrame:
    paths = sorted((out / kind).glob("*.parquet"))
    return pd.concat([pd.read_parquet(path) for path in paths], ignore_index=True) if paths else pd.DataFrame()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder with its bytes."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


HEADER = ",uid,dateTime,deviceId,lat,long,pm1_0,pm2_5,pm10"


def bus_row(
    time: str, device: str = "00000000c37f0aa8", lat: object = 28.57937, long: object = 77.228798, pm: object = "94.0,142.0,156.0"
) -> str:
    return f"0,0db83849-cd24-477a-a9d8-e48da1c914a3,{time},{device},{lat},{long},{pm}"


def bus_day(*rows: str, header: str = HEADER) -> bytes:
    return "".join(f"{line}\n" for line in (header, *rows)).encode()


def bus_days(days: int, rows: int) -> dict[str, bytes]:
    """Day files of three buses that report every 3 s, each at a speed of its own."""
    files = {}
    for day in pd.date_range("2020-11-01", periods=days).strftime("%Y-%m-%d"):
        lines = []
        for i in range(rows):
            second = 3 * (i // 3)
            clock = f"{day} {second // 3600:02d}:{second // 60 % 60:02d}:{second % 60:02d}+05:30"
            lines.append(bus_row(clock, f"{i % 3:016x}", round(28.5 + 1e-5 * i, 6), 77.2, f"{i % 90}.0,{i % 170}.0,{i % 210}.0"))
        files[f"{day}_all.csv"] = bus_day(*lines)
    return files
