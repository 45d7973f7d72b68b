"""Raw files -> observations or a field: `ingest.KEY` of params.yaml, data/raw/SOURCE -> data/ingested/KEY.

    observations/PARTITION.parquet, quarantine/PARTITION.parquet     from tables, or
    field.zarr                                                       from gridded sources
    ingest.json     what was read, written, masked and held back, per partition and file; zone, label, licence; fingerprints. No clock.

Tables are read partition by partition with Dask (FIELDCAST_WORKERS threads here, or the cluster at FIELDCAST_DASK, which has to see the
same folders), so memory is bounded by the largest partitions. A partition is rewritten only when its fingerprint changes: the bytes that
feed it, the parameters, the code that reads it and the libraries that write it. The result is the same whatever was there before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import dask
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from dask.diagnostics.progress import ProgressBar

from pipeline import atomic, delimited, members, observations, sources, tables, workers
from pipeline import raw as raw_drop
from pipeline.params import ParamsError, Section

log = logging.getLogger(__name__)
SLICE = 200_000  # wide rows turned into observations at a time
READING = ("ingest", "tables", "delimited", "members", "observations")  # modules that decide what an observation is


class Source(Section):
    """A section of `ingest`: its `source` says which further parameters it has."""

    source: str

    @classmethod
    def chosen(cls, raw: Any) -> type[Section]:
        try:
            return sources.load(raw.get("source") if isinstance(raw, dict) else None).Params
        except ValueError as error:
            raise ParamsError(f"ingest: {error}") from None


def params_model(key: str) -> type[Section]:
    return Source


def run(params: Any, key: str, *, raw: Path, out: Path) -> None:
    """Bring the folder `out` up to date with the raw drop.

    Raises RawError where the drop differs from its manifest, ValueError where nothing can be made of it, OSError on a full disk.
    """
    adapter = sources.load(params.source)
    try:
        if hasattr(adapter, "field"):
            _run_field(params, key, adapter, raw, out)
        else:
            _run_tables(params, key, adapter, raw, out)
    except OSError as error:
        if error.errno in atomic.NO_ROOM:
            raise OSError(error.errno, f"no room to write {out}: {error}; what was there before stays. Free space and run again") from error
        raise


def _run_field(params: Any, key: str, adapter: Any, raw: Path, out: Path) -> None:
    manifest = raw_drop.verify(raw) if (raw / raw_drop.MANIFEST).exists() or not getattr(params, "url", None) else None
    with atomic.writing(out) as folder:
        folder.mkdir()
        counts = adapter.field(params, raw, folder)
        _write_json(folder, {**_heading(params, key, adapter, manifest), "kind": "field", **counts})


def _run_tables(params: Any, key: str, adapter: Any, raw: Path, out: Path) -> None:
    manifest = raw_drop.verify(raw)
    try:
        partitions = adapter.partitions(params, raw)
    except members.BROKEN as error:
        raise ValueError(
            f"{raw}: an archive is damaged or cut short ({error}), although it is as the manifest says: fetch it anew"
        ) from None
    if not partitions:
        raise ValueError(f"{raw} holds nothing for ingest.{key}: found {', '.join(sorted(manifest.files)) or 'no files'}")
    plan = _Plan(params, adapter, manifest, partitions)
    before = _read_json(out).get("partitions", {})
    with atomic.writing(out) as folder:
        for kind in ("observations", "quarantine"):
            (folder / kind).mkdir(parents=True)
        done = {p.name: before[p.name] for p in partitions if _kept(before.get(p.name), plan.fingerprints[p.name], p.name, out, folder)}
        todo = [p for p in partitions if p.name not in done]
        log.info("ingest %s: %d partitions, %d unchanged", key, len(partitions), len(done))
        written = _compute(
            [(params, raw, p, {m: plan.spans[m] for m in p.members}, plan.home[p.name], folder, plan.fingerprints[p.name]) for p in todo]
        )
        done |= dict(zip([p.name for p in todo], written, strict=True))
        totals: Counter[str] = Counter()
        for entry in done.values():
            totals.update({name: entry[name] for name in ("observations", "quarantined")})
        reasons = _reasons(folder)
        if not totals["observations"]:
            raise ValueError(f"{raw} gave no observation at all for ingest.{key}; held back because: {'; '.join(reasons[:5]) or 'no rows'}")
        if totals["quarantined"]:
            log.warning("ingest %s: %d rows or files held back: %s", key, totals["quarantined"], "; ".join(reasons[:5]))
        described = {
            **_heading(params, key, adapter, manifest),
            "kind": "observations",
            "rows": totals["observations"],
            "quarantined": totals["quarantined"],
            "zone": params.zone,
            "source_time_label": params.label,
            "time_label": "instant" if params.label == "instant" else "end",
            "partitions": {p.name: done[p.name] for p in partitions},
        }
        _write_json(folder, described)
        for kind in ("observations", "quarantine"):
            if not any((folder / kind).iterdir()):
                (folder / kind).rmdir()


class _Plan:
    """What each partition depends on."""

    def __init__(self, params: Any, adapter: Any, manifest: raw_drop.Manifest, partitions: list[tables.Partition]) -> None:
        self.spans: dict[str, list[tuple[pd.Timestamp, pd.Timestamp]]] = defaultdict(list)
        homes: dict[str, str] = {}  # the first partition that a member feeds accounts for its stray rows
        for p in partitions:
            for member in p.members:
                self.spans[member].append((p.start, p.end))
                homes.setdefault(member, p.name)
        self.home = {p.name: frozenset(m for m in p.members if homes[m] == p.name) for p in partitions}
        extra = {name: entry.sha256 for name, entry in manifest.files.items() if name in getattr(adapter, "ALONGSIDE", ())}
        common = [params.model_dump(mode="json"), _code(adapter), pa.__version__, pd.__version__, np.__version__, extra]
        self.fingerprints = {
            p.name: _hash(
                [
                    *common,
                    [p.name, str(p.start), str(p.end), sorted(self.home[p.name])],
                    [[m, manifest.files[m.partition("!")[0]].sha256, [[str(a), str(b)] for a, b in self.spans[m]]] for m in p.members],
                ]
            )
            for p in partitions
        }


def _code(adapter: Any) -> list[str]:
    here = Path(__file__).parent
    return [raw_drop.sha256(path) for path in (*(here / f"{name}.py" for name in READING), Path(adapter.__file__))]


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _kept(entry: dict[str, Any] | None, fingerprint: str, name: str, out: Path, folder: Path) -> bool:
    """Take over a partition that is up to date, byte by byte as it was written; False when it has to be read anew."""
    if entry is None or entry.get("fingerprint") != fingerprint:
        return False
    old = {kind: out / kind / f"{name}.parquet" for kind in entry["sha256"]}
    if not all(path.is_file() and raw_drop.sha256(path) == entry["sha256"][kind] for kind, path in old.items()):
        return False
    for kind, path in old.items():
        try:
            os.link(path.resolve(), folder / kind / path.name)  # no file is ever written in place, so both names are safe
        except OSError:
            shutil.copyfile(path, folder / kind / path.name)
    return True


def _compute(arguments: list[tuple[Any, ...]]) -> list[dict[str, Any]]:
    """`_ingest(*each)` for every partition, in threads here or on the cluster at FIELDCAST_DASK; progress on a terminal only."""
    tasks = [dask.delayed(_attempted, pure=False)(*each) for each in arguments]
    shown = sys.stderr.isatty()
    if address := os.environ.get("FIELDCAST_DASK"):
        from distributed import Client, progress  # takes a second to import

        with Client(address) as client:
            futures = client.compute(tasks)
            if shown:
                progress(futures, notebook=False)
            results = client.gather(futures)
    else:
        with ProgressBar(out=sys.stderr) if shown else nullcontext():
            results = list(dask.compute(*tasks, scheduler="threads", num_workers=workers.count()))
    for result in results:
        if isinstance(result, Exception):
            raise result
    return results


def _attempted(*arguments: Any) -> dict[str, Any] | Exception:
    """`_ingest`, whose failure is a result: it is raised when no thread writes any more, so that cleaning up races nobody."""
    try:
        return _ingest(*arguments)
    except Exception as error:
        return error


def _ingest(
    params: Any,
    raw: Path,
    partition: tables.Partition,
    spans: dict[str, list[tuple[pd.Timestamp, pd.Timestamp]]],
    home: frozenset[str],
    folder: Path,
    fingerprint: str,
) -> dict[str, Any]:
    """Read one partition, write its files, return its entry of ingest.json."""
    clean = tables.read(params, sources.load(params.source), raw, partition, spans, home)
    written = {kind: folder / kind / f"{partition.name}.parquet" for kind in ("observations", "quarantine")}
    count = observations.write_slices(_long(clean, params.latency), written["observations"])
    if clean.held_back:
        pq.write_table(_quarantine(clean.held_back, raw, params.max_file_bytes), written["quarantine"], compression="zstd")
    return {
        "fingerprint": fingerprint,
        "observations": count,
        "missing": {name: int(np.isnan(values).sum()) for name, values in clean.values.items()},
        "quarantined": len(clean.held_back),
        "files": {member: dict(sorted(counts.items())) for member, counts in clean.counts.items()},
        "sha256": {kind: raw_drop.sha256(path) for kind, path in written.items() if path.exists()},
    }


def _long(clean: tables.Clean, latency: Any) -> Iterator[pa.Table]:
    """Wide rows -> slices of observations, in the order of the contract; missing cells give no row."""
    names = sorted(clean.values)
    variables, platforms, trips = (pa.array(texts, pa.string()) for texts in (names, clean.platforms, clean.trips))
    for start in range(0, len(clean.time), SLICE):
        part = slice(start, start + SLICE)
        values = np.stack([clean.values[name][part] for name in names], axis=1)
        row, column = np.nonzero(~np.isnan(values))
        time = clean.time[part][row]
        trip = pa.nulls(len(row), pa.string()) if clean.trip is None else trips.take(pa.array(clean.trip[part][row]))
        yield pa.table(
            [
                pa.array(time, observations.OBSERVATIONS.field("time").type),
                pa.array(time + np.timedelta64(latency), observations.OBSERVATIONS.field("knowledge_time").type),
                pa.array(clean.longitude[part][row]),
                pa.array(clean.latitude[part][row]),
                platforms.take(pa.array(clean.platform[part][row])),
                trip,
                variables.take(pa.array(column)),
                pa.array(values[row, column]),
            ],
            schema=observations.OBSERVATIONS,
        )


def _quarantine(held_back: list[tuple[str, int, str]], raw: Path, limit: int) -> pa.Table:
    """Rows held back, with their text read once more from the file."""
    wanted: dict[str, set[int]] = defaultdict(set)
    for member, line, _ in held_back:
        if line > 0:
            wanted[member].add(line)
    texts: dict[tuple[str, int], str] = {}
    for member, numbers in wanted.items():
        with members.opened(raw, member) as stream:
            texts |= {(member, number): text for number, text in delimited.lines(stream, numbers, limit).items()}
    columns = [[m for m, _, _ in held_back], [n for _, n, _ in held_back], [r for _, _, r in held_back]]
    return pa.table([*columns, [texts.get((m, n), "") for m, n, _ in held_back]], schema=observations.QUARANTINE)


def _reasons(folder: Path) -> list[str]:
    """Why rows were held back, most frequent first, each with its number and its first place."""
    found: Counter[str] = Counter()
    first: dict[str, str] = {}
    for path in sorted((folder / "quarantine").glob("*.parquet")):
        for row in pq.read_table(path, columns=["source_file", "source_row", "reason"]).to_pylist():
            found[row["reason"]] += 1
            first.setdefault(row["reason"], row["source_file"] + (f" line {row['source_row']}" if row["source_row"] > 0 else ""))
    return [f"{reason} ({count} x, first in {first[reason]})" for reason, count in found.most_common()]


def _heading(params: Any, key: str, adapter: Any, manifest: raw_drop.Manifest | None) -> dict[str, Any]:
    # where and when a file was had stays in the manifest: the same bytes give the same result
    files = {} if manifest is None else {name: {"sha256": entry.sha256, "bytes": entry.bytes} for name, entry in manifest.files.items()}
    return {
        "key": key,
        "source": params.source,
        "params": params.model_dump(mode="json"),
        "licence": adapter.DROP.licence,
        "attribution": adapter.DROP.attribution,
        "raw": files,
        "raw_missing": [] if manifest is None else sorted(manifest.missing),
    }


def _read_json(out: Path) -> dict[str, Any]:
    """What an earlier run said of `out`; nothing where there is none or it cannot be read, which means reading everything anew."""
    try:
        content = json.loads((out / "ingest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_json(folder: Path, content: dict[str, Any]) -> None:
    (folder / "ingest.json").write_text(json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
