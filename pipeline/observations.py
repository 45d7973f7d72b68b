"""The observations contract: long rows in Parquet, one file per time partition.

    FOLDER/observations/PARTITION.parquet   rows in the columns below, sorted by (time, platform_id, variable), unique in them
    FOLDER/quarantine/PARTITION.parquet     rows held back, with the columns of QUARANTINE; nothing is ever only dropped
    FOLDER/ingest.json | report.json        what was done, with counts

A row that is absent was never measured. Raw values are never changed: quality control adds `flag_*` columns (QARTOD: 1 pass,
2 not evaluated, 3 suspect, 4 fail, 9 missing).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

OBSERVATIONS = pa.schema(
    [
        ("time", pa.timestamp("us", tz="UTC")),  # instant, or end of the averaging interval
        ("knowledge_time", pa.timestamp("us", tz="UTC")),  # when we could first have had it
        ("longitude", pa.float64()),  # degrees_east, -180..180, WGS 84
        ("latitude", pa.float64()),  # degrees_north
        ("platform_id", pa.string()),
        ("trip_id", pa.string()),  # null for fixed stations
        ("variable", pa.string()),  # short name, pipeline/lexicon.py
        ("value", pa.float64()),  # in the lexicon's unit
    ]
)

QUARANTINE = pa.schema(
    [
        ("source_file", pa.string()),
        ("source_row", pa.int64()),  # 1-based line of the file (header = 1), or -1 where the whole file is held back
        ("reason", pa.string()),
        ("raw", pa.string()),  # the row as it was read
    ]
)

KEY = ["time", "platform_id", "variable"]
# Times ascend and texts and values repeat: these encodings halve the files and are written faster than the defaults.
STORAGE = {"compression": "zstd", "column_encoding": dict.fromkeys(("time", "knowledge_time"), "DELTA_BINARY_PACKED")}
REPEATING = ["platform_id", "trip_id", "variable", "value"]
FLAGS = {"pass": 1, "not_evaluated": 2, "suspect": 3, "fail": 4, "missing": 9}


def write_partition(rows: pd.DataFrame, path: Path) -> None:
    """Write one partition, sorted and checked, with the same bytes for the same rows. `flag_*` columns are kept after the schema."""
    flags = sorted(name for name in rows.columns if name.startswith("flag_"))
    schema = pa.schema([*OBSERVATIONS, *((name, pa.int8()) for name in flags)])
    ordered = rows.sort_values(KEY, kind="stable")[schema.names]
    problems = check_rows(ordered)
    if problems:
        raise ValueError(f"{path} would break the observations contract: " + "; ".join(problems))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pandas(ordered, schema=schema, preserve_index=False), path, use_dictionary=[*REPEATING, *flags], **STORAGE)


def write_slices(slices: Iterable[pa.Table], path: Path) -> int:
    """Write one partition that comes in order, slice by slice, so that it need not fit in memory; returns its number of rows.

    Checks what `write_partition` checks. The same slices give the same bytes; no row, no file.
    """
    last: pa.Table | None = None
    written = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with pq.ParquetWriter(path, OBSERVATIONS, use_dictionary=REPEATING, **STORAGE) as writer:
            for rows in slices:
                if not rows.num_rows:
                    continue
                joined = rows if last is None else pa.concat_tables([last, rows])
                if not _sound(joined):
                    problems = check_rows(joined.to_pandas()) or [f"rows are not sorted by {tuple(KEY)}"]
                    raise ValueError(f"{path} would break the observations contract: " + "; ".join(problems))
                writer.write_table(rows)
                written += rows.num_rows
                last = rows.slice(rows.num_rows - 1)
    finally:
        if not written:
            path.unlink(missing_ok=True)
    return written


def _sound(rows: pa.Table) -> bool:
    """No nulls, positions on Earth, keys strictly increasing."""
    if any(rows[name].null_count for name in OBSERVATIONS.names if name != "trip_id"):
        return False
    for name, bound in (("longitude", 180.0), ("latitude", 90.0)):
        if not pc.all(pc.less_equal(pc.abs(rows[name]), bound)).as_py():  # NaN is not less
            return False
    rows = rows.combine_chunks()
    before, after = rows.slice(0, rows.num_rows - 1), rows.slice(1)
    increasing = pa.array([False] * len(after), pa.bool_())
    for name in reversed(KEY):
        more = pc.greater(after[name], before[name])
        increasing = pc.or_(more, pc.and_(pc.equal(after[name], before[name]), increasing))
    return bool(pc.all(increasing).as_py() is not False)


def check_rows(rows: pd.DataFrame) -> list[str]:
    """Every way in which rows (sorted by KEY) break the contract, with counts and the first offender."""
    problems = []
    for name in ("time", "knowledge_time", "longitude", "latitude", "platform_id", "variable", "value"):
        absent = rows[name].isna()
        if absent.any():
            problems.append(f"{absent.sum()} null {name}, first at row {int(absent.argmax())}")
    outside = (rows["longitude"].abs() > 180) | (rows["latitude"].abs() > 90)
    if outside.any():
        first = rows.loc[outside, ["longitude", "latitude"]].iloc[0].tolist()
        problems.append(f"{outside.sum()} positions outside -180..180 / -90..90, first {first}")
    repeated = rows.duplicated(KEY)
    if repeated.any():
        problems.append(f"{repeated.sum()} repeated {tuple(KEY)}, first {rows.loc[repeated, KEY].iloc[0].tolist()}")
    return problems


def partitions(folder: Path, kind: str = "observations") -> list[Path]:
    """The Parquet files of a folder in time order; an empty or absent folder is an error for observations."""
    found = sorted((folder / kind).glob("*.parquet"))
    if not found and kind == "observations":
        raise ValueError(f"{folder / kind}: no *.parquet partitions; run the stage that writes them first")
    return found


def read_partition(path: Path, columns: list[str] | None = None, variables: list[str] | None = None) -> pd.DataFrame:
    """Read one partition, optionally only some columns or variables; a missing or wrongly typed column is an error."""
    schema = pq.read_schema(path)
    wrong = [
        f"{field.name}: expected {field.type}, found {schema.field(field.name).type if field.name in schema.names else 'no such column'}"
        for field in OBSERVATIONS
        if field.name not in schema.names or schema.field(field.name).type != field.type
    ]
    if wrong:
        raise ValueError(f"{path} is not an observations partition: " + "; ".join(wrong))
    filters = [("variable", "in", variables)] if variables else None
    return pd.read_parquet(path, columns=columns, filters=filters)
