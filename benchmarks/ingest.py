"""Ingest of AirDelhi-format day files against the same work in plain pandas and in duckdb: time, CPU time, peak memory, in one run.

    python -m benchmarks.ingest [--rows 12500000] [--folder FOLDER]

The work: read the day files, mask codes, keep rows of their day and region, take out repeated rows, cut trips, turn each row into one
observation a variable, sort, write zstd Parquet a day. The other two do no more than that: they check no manifest and hold nothing back.
Each runs in a process of its own, one after the other, and all must give the same observations before anything is printed.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date, timedelta
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd

DAYS = 91
FIRST = date(2020, 11, 1)
VARIABLES = {"pm1_0": "pm1", "pm2_5": "pm2p5", "pm10": "pm10"}
WEST, SOUTH, EAST, NORTH = 76.5, 28.0, 78.0, 29.2


def generate(folder: Path, rows: int) -> None:
    """Day files in AirDelhi's raw format: 40 buses in turn, a code in one row of 5,000, one row of 10,000 repeated. No randomness."""
    per_day = rows // DAYS
    for i in range(DAYS):
        day = FIRST + timedelta(days=i)
        duckdb.sql(
            f"""
            copy (
              select n as "row", md5((n + {i} * {per_day})::varchar)::uuid as uid,
                     strftime(timestamp '{day}' + to_seconds(second), '%Y-%m-%d %H:%M:%S') || '+05:30' as "dateTime",
                     printf('%016x', bus * 40503) as "deviceId",
                     round(28.6 + 0.1 * sin(second / 1500.0 + bus), 6) as lat,
                     round(77.2 + 0.1 * cos(second / 1700.0 + 2 * bus), 6) as long,
                     printf('%d.0', case when n % 5000 = 77 then -999 else 40 + (n * 7919) % 150 end) as pm1_0,
                     printf('%d.0', 60 + (n * 104729) % 250) as pm2_5, printf('%d.0', 70 + (n * 1299709) % 300) as pm10
              from (select n, (n * 7) % 40 as bus, (n * 86400) // {per_day} as second
                    from (select case when m % 10000 = 9999 then m - 1 else m end as n from range({per_day}) t(m)))
              order by n
            ) to '{folder / f"{day}_all.csv"}' (header, delimiter ',')
            """
        )


def with_fieldcast(raw: Path, out: Path) -> None:
    from pipeline import ingest, params

    settings = params.validated({"source": "airdelhi", "structure": "raw"}, ingest.params_model("benchmark"), "ingest.benchmark")
    ingest.run(settings, "benchmark", raw=raw, out=out)


def with_pandas(raw: Path, out: Path) -> None:
    (out / "observations").mkdir(parents=True)
    for path in sorted(raw.glob("*.csv")):
        wide = pd.read_csv(path, dtype={"deviceId": str}, usecols=["dateTime", "deviceId", "lat", "long", *VARIABLES])
        wide[list(VARIABLES)] = wide[list(VARIABLES)].replace([-999.0, -9999.0, 1e20], np.nan)
        wide["time"] = pd.to_datetime(wide["dateTime"], utc=True, format="%Y-%m-%d %H:%M:%S%z")
        start = pd.Timestamp(path.name[:10], tz="Asia/Kolkata")
        inside = wide["time"].between(start, start + pd.Timedelta(days=1), inclusive="left")
        wide = wide[inside & wide["lat"].between(SOUTH, NORTH) & wide["long"].between(WEST, EAST)]
        wide = wide.drop_duplicates(["time", "deviceId", "lat", "long", *VARIABLES]).sort_values(["deviceId", "time"])
        bus = wide.groupby("deviceId", sort=False)
        x, y = np.radians(wide["long"]), np.radians(wide["lat"])
        middle = (y + y.groupby(wide["deviceId"], sort=False).shift()) / 2
        metres = 6_371_000 * np.hypot(x.groupby(wide["deviceId"], sort=False).diff() * np.cos(middle), y.groupby(wide["deviceId"]).diff())
        starts = bus["time"].diff().isna() | (bus["time"].diff() > pd.Timedelta(minutes=5)) | (metres > 1000)
        stamp = wide["deviceId"] + "/" + wide["time"].dt.strftime("%Y%m%dT%H%M%SZ")
        wide["trip_id"] = stamp.where(starts).ffill()
        wide = wide.rename(columns={"deviceId": "platform_id", "lat": "latitude", "long": "longitude", **VARIABLES})
        fixed = ["time", "longitude", "latitude", "platform_id", "trip_id"]
        long = wide.melt(id_vars=fixed, value_vars=list(VARIABLES.values()), var_name="variable").dropna(subset=["value"])
        long["knowledge_time"] = long["time"]
        long = long.sort_values(["time", "platform_id", "variable"])
        long.to_parquet(out / "observations" / f"{path.name[:10]}.parquet", compression="zstd", index=False)


def with_duckdb(raw: Path, out: Path) -> None:
    (out / "observations").mkdir(parents=True)
    connection = duckdb.connect()
    connection.sql(f"set threads = {os.environ.get('FIELDCAST_WORKERS') or os.cpu_count()}; set timezone = 'UTC'")
    masked = ", ".join(f"case when {c} in (-999, -9999) or abs({c}) >= 1e19 then null else {c} end as {v}" for c, v in VARIABLES.items())
    for path in sorted(raw.glob("*.csv")):
        start = pd.Timestamp(path.name[:10], tz="Asia/Kolkata")
        connection.sql(
            f"""
            copy (
              with wide as (
                select distinct "dateTime" as time, "deviceId" as platform_id, long as longitude, lat as latitude, {masked}
                from read_csv('{path}', header = true, auto_detect = false, delim = ',', columns = {{
                  'n': 'bigint', 'uid': 'varchar', 'dateTime': 'timestamptz', 'deviceId': 'varchar', 'lat': 'double', 'long': 'double',
                  'pm1_0': 'double', 'pm2_5': 'double', 'pm10': 'double'}})
                where "dateTime" >= timestamptz '{start}' and "dateTime" < timestamptz '{start + pd.Timedelta(days=1)}'
                  and lat between {SOUTH} and {NORTH} and long between {WEST} and {EAST}),
              steps as (
                select *, lag(time) over bus as before, radians(longitude - lag(longitude) over bus) as dx,
                       radians(latitude - lag(latitude) over bus) as dy, radians(latitude + lag(latitude) over bus) / 2 as middle
                from wide window bus as (partition by platform_id order by time)),
              cut as (
                select *, case when before is null or time - before > interval 5 minutes
                                 or 6371000 * sqrt((dx * cos(middle)) ** 2 + dy ** 2) > 1000 then time end as starts from steps),
              trips as (
                select *, platform_id || '/' || strftime(last_value(starts ignore nulls) over (partition by platform_id order by time),
                                                         '%Y%m%dT%H%M%SZ') as trip_id from cut)
              select time, time as knowledge_time, longitude, latitude, platform_id, trip_id, variable, value
              from (unpivot trips on pm1, pm2p5, pm10 into name variable value value)
              order by time, platform_id, variable
            ) to '{out / "observations" / path.name[:10]}.parquet' (format parquet, compression zstd)
            """
        )


WAYS = {"fieldcast": with_fieldcast, "pandas": with_pandas, "duckdb": with_duckdb}


def result(out: Path) -> tuple[object, ...]:
    """What must agree: rows, trips, order and sums over all days."""
    parquet = f"read_parquet('{out}/observations/*.parquet', file_row_number = true, filename = true)"
    return duckdb.sql(
        f"""
        select count(*), count(distinct trip_id), sum(value)::bigint, sum(epoch_us(time))::hugeint, round(sum(latitude), 3),
               sum(hash(epoch_us(time), platform_id, trip_id, variable, value) % 1000003)::hugeint,
               sum(hash(filename[-18:], file_row_number, platform_id, variable) % 1000003)::hugeint
        from {parquet}
        """
    ).fetchall()[0]


def child(step: str, raw: Path, out: Path, rows: int) -> dict[str, float]:
    """Run one step in a process of its own; seconds and CPU seconds of work (imports left out), and peak memory in GiB."""
    arguments = [sys.executable, "-m", "benchmarks.ingest", "--step", step, "--folder", str(raw), "--out", str(out), "--rows", str(rows)]
    done = subprocess.run(arguments, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def run_step(step: str, raw: Path, out: Path, rows: int) -> None:
    import pyarrow.parquet  # noqa: F401  (imports are no part of the work)

    from pipeline import ingest
    from pipeline import raw as raw_drop
    from pipeline.sources import airdelhi

    assert ingest
    began, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
    if step == "generate":
        raw.mkdir(parents=True)
        generate(raw, rows)
        files = {
            path.name: raw_drop.RawFile("generated", raw_drop.sha256(path), path.stat().st_size, "2026-01-01T00:00:00Z")
            for path in sorted(raw.glob("*.csv"))
        }
        manifest = raw_drop.Manifest("airdelhi", airdelhi.DROP.licence, "generated", airdelhi.DROP.page, files)
        (raw / raw_drop.MANIFEST).write_text(manifest.text(), encoding="utf-8")
    else:
        WAYS[step](raw, out)
    seconds = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    print(json.dumps({"seconds": seconds, "cpu": cpu, "gib": after.ru_maxrss / (1 << 20)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12_500_000)
    parser.add_argument("--folder", type=Path, help="where to write (default: a temporary folder); left as it is at the end")
    parser.add_argument("--step", choices=["generate", *WAYS], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.step:
        run_step(options.step, options.folder, options.out, options.rows)
        return
    from rich.console import Console
    from rich.table import Table

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        raw = folder / f"raw-{options.rows}"
        if not raw.exists():
            child("generate", raw, raw, options.rows)
        size = sum(path.stat().st_size for path in raw.iterdir()) / (1 << 30)
        measured = {way: child(way, raw, folder / f"out-{options.rows}" / way, options.rows) for way in WAYS}
        measured["fieldcast, nothing changed"] = child("fieldcast", raw, folder / f"out-{options.rows}" / "fieldcast", options.rows)
        results = {way: result(folder / f"out-{options.rows}" / way) for way in WAYS}
        if len(set(results.values())) != 1:
            raise SystemExit(f"the three do not agree: {results}")
    title = f"{options.rows:,} rows in {DAYS} day files, {size:.2f} GiB, to {results['pandas'][0]:,} observations; {os.cpu_count()} cores"
    table = Table("", "seconds", "times fieldcast's", "CPU seconds", "times fieldcast's", "peak GiB", title=title)
    for way, each in measured.items():
        ratios = [f"{each[what] / measured['fieldcast'][what]:.2f}" for what in ("seconds", "cpu")]
        table.add_row(way, f"{each['seconds']:.1f}", ratios[0], f"{each['cpu']:.1f}", ratios[1], f"{each['gib']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
