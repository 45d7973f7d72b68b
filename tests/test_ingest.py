"""The ingest stage as a whole: incremental, repeatable, safe against kills and full disks, and honest about what it read."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from pipeline import ingest, observations, raw
from pipeline.params import ParamsError
from tests.drops import bus_day, bus_days, bus_row, ingested, section, table, tree, write_drop

ROOT = Path(__file__).parents[1]
RAW = {"structure": "raw"}


def described(out: Path) -> dict:
    return json.loads((out / "ingest.json").read_text())


def test_a_second_run_rewrites_nothing(tmp_path: Path) -> None:
    files = bus_days(3, 30)
    out = ingested(tmp_path, "airdelhi", files, **RAW)
    first, inodes = tree(out), {path.name: path.stat().st_ino for path in (out / "observations").iterdir()}
    ingested(tmp_path, "airdelhi", files, **RAW)
    assert tree(out) == first
    assert {path.name: path.stat().st_ino for path in (out / "observations").iterdir()} == inodes


def test_only_the_partition_whose_input_changed_is_rewritten(tmp_path: Path) -> None:
    files = bus_days(3, 30)
    out = ingested(tmp_path, "airdelhi", files, **RAW)
    inodes = {path.stem: path.stat().st_ino for path in (out / "observations").iterdir()}
    files["2020-11-02_all.csv"] = files["2020-11-02_all.csv"].replace(b",142", b",143").replace(b"0,1.0,", b"0,2.0,", 1)
    ingested(tmp_path, "airdelhi", files, **RAW)
    changed = {path.stem for path in (out / "observations").iterdir() if path.stat().st_ino != inodes[path.stem]}
    assert changed == {"2020-11-02"}


def test_the_result_does_not_depend_on_the_order_of_increments(tmp_path: Path) -> None:
    files = bus_days(4, 30)
    whole = tree(ingested(tmp_path / "whole", "airdelhi", files, **RAW))
    names = list(files)
    grown = tmp_path / "grown"
    for step in ([2], [2, 0], [3], [3, 1, 0, 2]):
        write_drop(grown / "raw", "airdelhi", {})  # a new manifest; files of earlier steps are no longer listed
        ingested(grown, "airdelhi", {names[i]: files[names[i]] for i in sorted(step)}, **RAW)
    assert tree(grown / "out") == whole


def test_a_partition_without_input_is_removed(tmp_path: Path) -> None:
    files = bus_days(2, 30)
    out = ingested(tmp_path, "airdelhi", files, **RAW)
    del files["2020-11-01_all.csv"]
    ingested(tmp_path, "airdelhi", files, **RAW)
    assert [path.stem for path in observations.partitions(out)] == ["2020-11-02"]
    assert list(described(out)["partitions"]) == ["2020-11-02"]


def test_a_damaged_partition_is_written_again(tmp_path: Path) -> None:
    files = bus_days(2, 30)
    out = ingested(tmp_path, "airdelhi", files, **RAW)
    whole = tree(out)
    (out / "observations" / "2020-11-01.parquet").write_bytes(b"damaged")
    ingested(tmp_path, "airdelhi", files, **RAW)
    assert tree(out) == whole


def test_a_changed_parameter_rewrites(tmp_path: Path) -> None:
    files = bus_days(1, 3)
    out = ingested(tmp_path, "airdelhi", files, **RAW)
    assert (table(out)["knowledge_time"] == table(out)["time"]).all()
    ingested(tmp_path, "airdelhi", files, **RAW, latency="PT2H")
    assert (table(out)["knowledge_time"] - table(out)["time"]).unique().tolist() == [pd.Timedelta("2h")]


def test_what_is_written_obeys_the_contract(tmp_path: Path) -> None:
    out = ingested(tmp_path, "airdelhi", bus_days(1, 60), **RAW)
    (path,) = observations.partitions(out)
    assert observations.check_rows(observations.read_partition(path)) == []
    rows = observations.read_partition(path)
    assert rows.equals(rows.sort_values(observations.KEY, kind="stable"))


def test_slices_make_no_difference_to_the_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = bus_days(1, 60)
    whole = table(ingested(tmp_path / "one", "airdelhi", files, **RAW))
    monkeypatch.setattr(ingest, "SLICE", 7)
    pd.testing.assert_frame_equal(table(ingested(tmp_path / "many", "airdelhi", files, **RAW)), whole)


def test_slices_out_of_order_are_refused(tmp_path: Path) -> None:
    rows = ingested(tmp_path, "airdelhi", bus_days(1, 6), **RAW) / "observations" / "2020-11-01.parquet"
    import pyarrow.parquet as pq

    written = pq.read_table(rows)
    with pytest.raises(ValueError, match="not sorted by"):
        observations.write_slices([written.slice(9), written.slice(0, 9)], tmp_path / "wrong.parquet")
    with pytest.raises(ValueError, match=r"repeated \('time', 'platform_id', 'variable'\)"):
        observations.write_slices([written.slice(0, 9), written.slice(8)], tmp_path / "wrong.parquet")


def test_every_row_and_cell_is_accounted_for(tmp_path: Path) -> None:
    good = [bus_row(f"2021-01-30 00:00:{i:02d}+05:30") for i in range(20)]
    good[3] = bus_row("2021-01-30 00:00:03+05:30", pm="-999.0,,156.0")
    rows = [*good, good[5], good[6], good[7].replace("142.0", "143.0"), bus_row("no time"), bus_row("2021-01-30 00:01:00+05:30", lat=0)]
    out = ingested(tmp_path, "airdelhi", {"2021-01-30_all.csv": bus_day(*rows)}, **RAW)
    entry = described(out)["partitions"]["2021-01-30"]
    counts = entry["files"]["2021-01-30_all.csv"]
    assert counts == {"rows": 25, "duplicates": 2, "held_back": 3, "masked pm1_0 as -999": 1}
    assert entry["quarantined"] == 3 == len(table(out, "quarantine"))
    kept = counts["rows"] - counts["duplicates"] - counts["held_back"]
    assert entry["missing"] == {"pm1": 1, "pm10": 0, "pm2p5": 1}
    assert entry["observations"] == 3 * kept - 2 == len(table(out)) == described(out)["rows"]


def test_the_record_says_where_the_numbers_come_from_and_holds_no_clock(tmp_path: Path) -> None:
    out = ingested(tmp_path, "airdelhi", bus_days(1, 3), **RAW)
    record = described(out)
    assert (record["licence"], record["zone"], record["source_time_label"]) == ("CC-BY-4.0", "Asia/Kolkata", "instant")
    assert "IIT Delhi" in record["attribution"]
    assert "2026-01-01" not in (out / "ingest.json").read_text(), "retrieved_at stays in the manifest"


def test_a_drop_unlike_its_manifest_is_refused_with_all_that_is_wrong(tmp_path: Path) -> None:
    files = bus_days(3, 3)
    drop = write_drop(tmp_path / "raw", "airdelhi", files)
    first, second, third = (drop / name for name in files)
    first.write_bytes(first.read_bytes().replace(b"94", b"95").replace(b",0.0", b",1.0"))
    second.write_bytes(second.read_bytes()[:-10])
    third.unlink()
    with pytest.raises(raw.RawError) as failure:
        ingest.run(section("airdelhi", **RAW), "key", raw=drop, out=tmp_path / "out")
    text = str(failure.value)
    size = len(files[second.name])
    assert f"{first.name}: expected sha256" in text
    assert f"{second.name}: expected {size} bytes, found {size - 10}" in text
    assert f"{third.name}: expected {len(files[third.name])} bytes, found no file" in text
    assert "fetch again" in text
    assert not (tmp_path / "out").exists()


def test_a_drop_without_a_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(raw.RawError, match=r"has no manifest\.json; fetch the source first"):
        ingest.run(section("airdelhi", **RAW), "key", raw=tmp_path / "raw", out=tmp_path / "out")


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no observation at all for ingest\.key; held back because: the file is empty \(1 x"):
        ingested(tmp_path / "empty", "airdelhi", {"2021-01-30_all.csv": b""}, **RAW)
    with pytest.raises(ValueError, match=r"holds nothing for ingest\.key: found train\.csv"):
        grid = b"dateTime,lat,long,pressure,temperature,humidity,pm1_0,pm2_5,pm10\n"
        ingested(tmp_path / "other", "airdelhi", {"train.csv": grid}, **RAW)


def test_an_unusable_file_does_not_stop_the_others(tmp_path: Path) -> None:
    out = ingested(tmp_path, "airdelhi", {**bus_days(1, 3), "2020-11-02_all.csv": b""}, **RAW)
    assert len(table(out)) == 9
    (row,) = table(out, "quarantine").to_dict("records")
    assert (row["source_file"], row["source_row"], row["reason"]) == ("2020-11-02_all.csv", -1, "the file is empty")


def test_settings_are_checked_by_the_source_they_name() -> None:
    with pytest.raises(ParamsError, match=r"unknown source 'delhi'.* knows airdelhi, beijing, era5, kolkata"):
        section("delhi")
    with pytest.raises(ParamsError, match=r"ingest\.key\.lable: unknown key"):
        section("kolkata", lable="end")
    with pytest.raises(ParamsError, match=r"ingest\.key\.zone: .*not a time zone"):
        section("kolkata", zone="Asia/Calcuta")
    with pytest.raises(ParamsError, match="the raw files have no pressure"):
        section("airdelhi", structure="raw", variables=["sp"])


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    """The stage's command line on twelve days of 6,000 rows."""
    write_drop(tmp_path / "raw", "airdelhi", bus_days(12, 6000))
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"ingest": {"bus": {"source": "airdelhi", "structure": "raw"}}}))
    return ["ingest", "bus", "--params", str(tmp_path / "params.yaml"), "--raw", str(tmp_path / "raw"), "--out", str(tmp_path / "out")]


def start(arguments: list[str], prelude: str = "pass") -> subprocess.Popen[str]:
    code = f"import sys; {prelude}; from pipeline.__main__ import main; sys.exit(main(sys.argv[1:]))"
    environment = {**os.environ, "FIELDCAST_WORKERS": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_leaves_nothing_half_done_and_its_rerun_gives_the_same_bytes(tmp_path: Path, command: list[str]) -> None:
    running = start(command)
    partial = tmp_path / ".out.tmp" / "observations"
    deadline = time.monotonic() + 60
    while not (partial.is_dir() and len(list(partial.iterdir())) > 2) and time.monotonic() < deadline and running.poll() is None:
        time.sleep(0.002)
    running.send_signal(signal.SIGKILL)
    running.wait()
    assert running.returncode == -signal.SIGKILL, "it was still at work"
    assert partial.is_dir()
    assert not (tmp_path / "out").exists()
    ingest.run(section("airdelhi", **RAW), "bus", raw=tmp_path / "raw", out=tmp_path / "out")
    ingest.run(section("airdelhi", **RAW), "bus", raw=tmp_path / "raw", out=tmp_path / "undisturbed")
    assert tree(tmp_path / "out") == tree(tmp_path / "undisturbed")
    assert not partial.exists()


def test_a_full_disk_is_an_error_that_says_so_and_keeps_what_was_there(tmp_path: Path, command: list[str]) -> None:
    earlier = tree(ingested(tmp_path / "earlier", "airdelhi", {"2020-11-01_all.csv": bus_days(1, 3)["2020-11-01_all.csv"]}, **RAW))
    (tmp_path / "earlier" / "out").rename(tmp_path / "out")
    largest = 20_000  # bytes a file may grow to: less than one partition needs
    running = start(command, f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({largest}, {resource.RLIM_INFINITY}))")
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "ingest.bus: " in errors
    assert "no room to write" in errors
    assert "Free space and run again" in errors
    assert tree(tmp_path / "out") == earlier


def test_a_dask_cluster_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from distributed import LocalCluster

    files = bus_days(3, 30)
    here = tree(ingested(tmp_path / "here", "airdelhi", files, **RAW))
    with LocalCluster(n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None) as cluster:
        monkeypatch.setenv("FIELDCAST_DASK", cluster.scheduler_address)
        assert tree(ingested(tmp_path / "there", "airdelhi", files, **RAW)) == here
