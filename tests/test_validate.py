"""The validate stage on small networks with planted faults: nothing is lost, nothing is silent, everything is deterministic."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml

from pipeline import observations, params, qc, validate

ROOT = Path(__file__).parents[1]
STATIONS = 8


@pytest.fixture(autouse=True)
def one_process(monkeypatch):
    monkeypatch.setenv("FIELDCAST_WORKERS", "1")


def gate(**changes):
    """The parameters of Beijing, for a network of eight stations in January and February 2020 (UTC)."""
    section = yaml.safe_load((ROOT / "params.yaml").read_text())["validate"]["beijing"]
    section |= {"variables": ["pm2p5", "pm10", "t2m"], "partition_offset": "0h", "campaigns": [], **changes}
    return params.validated(section, validate.params_model("beijing"), "validate.beijing")


def severity(rule: str, value: str, mostly: float = 1.0):
    rules = yaml.safe_load((ROOT / "params.yaml").read_text())["validate"]["beijing"]["rules"]
    return {**rules, rule: {"severity": value, "mostly": mostly}}


def network(hours: int = 24 * 30, seed: int = 0) -> pd.DataFrame:
    """Long rows of eight stations: hour-ending labels, a daily cycle that peaks at 15 h local solar time, no fault."""
    rng = np.random.default_rng(seed)
    time = pd.date_range("2020-01-11 01:00", periods=hours, freq="h", tz="UTC").as_unit("us")
    common = 70 + np.cumsum(rng.normal(0, 2, hours)).clip(-50, 80)
    cycle = np.cos(2 * np.pi * (np.arange(hours) + 1 + 116.4 / 15 - 15) / 24)
    parts = []
    for number in range(STATIONS):
        pm = common + rng.normal(0, 3, hours) + number
        for variable, value in (("pm2p5", pm), ("pm10", 1.6 * pm), ("t2m", 270 + 5 * cycle + rng.normal(0, 0.3, hours))):
            parts.append(
                pd.DataFrame(
                    {
                        "time": time,
                        "knowledge_time": time,
                        "longitude": 116.3 + 0.03 * number,
                        "latitude": 39.8 + 0.02 * (number * 3 % 8),
                        "platform_id": f"station {number}",
                        "trip_id": pd.Series([None] * hours, dtype="str"),
                        "variable": variable,
                        "value": value,
                    }
                )
            )
    return pd.concat(parts, ignore_index=True)


def ingested(folder: Path, rows: pd.DataFrame, freq: str = "%Y-%m") -> Path:
    """Write rows as ingest would, but without its checks; hour-ending labels belong to the hour before them."""
    names = (rows["time"] - pd.Timedelta("1us")).dt.strftime(freq)
    (folder / "observations").mkdir(parents=True)
    for name, part in rows.groupby(names):
        ordered = part.sort_values(observations.KEY, kind="stable")[observations.OBSERVATIONS.names]
        ordered.to_parquet(folder / "observations" / f"{name}.parquet", index=False)
    (folder / "ingest.json").write_text(json.dumps({"rows": len(rows)}))
    return folder


def run(tmp_path: Path, rows: pd.DataFrame, name: str = "checked", **changes) -> tuple[dict, pd.DataFrame, pd.DataFrame]:
    """Report, checked rows, quarantined rows."""
    folder = ingested(tmp_path / f"{name}-in", rows)
    validate.run(gate(**changes), "beijing", ingested=folder, out=tmp_path / name)
    return read(tmp_path / name)


def read(out: Path) -> tuple[dict, pd.DataFrame, pd.DataFrame]:
    held = [pd.read_parquet(path) for path in observations.partitions(out, "quarantine")]
    checked = [observations.read_partition(path) for path in sorted((out / "observations").glob("*.parquet"))]
    report = json.loads((out / "report.json").read_text())
    return report, pd.concat(checked, ignore_index=True) if checked else pd.DataFrame(), pd.concat(held) if held else pd.DataFrame()


def value_at(checked: pd.DataFrame, platform: str, time: str, variable: str = "pm2p5") -> pd.Series:
    return checked[(checked.platform_id == platform) & (checked.time == pd.Timestamp(time)) & (checked.variable == variable)].iloc[0]


def test_sound_network_passes_and_raw_values_are_untouched(tmp_path):
    rows = network()
    report, checked, held = run(tmp_path, rows)
    assert len(held) == 0
    assert report["failed_warn"] == report["failed_quarantine"] == report["failed_block"] == 0
    assert report["completeness"] == 1.0
    assert report["checked_rows"] == len(rows)
    assert report["suspect_share"] + report["fail_share"] < 1e-3
    for name in qc.FLAGS:
        assert checked[name].dtype == np.int8
    key = observations.KEY
    before = rows.sort_values(key, ignore_index=True)["value"]
    assert checked.sort_values(key, ignore_index=True)["value"].tolist() == before.tolist()


def test_flags_do_not_depend_on_the_partitions(tmp_path):
    """The look-back and look-ahead at every border make many small partitions equal to one."""
    rows = network(24 * 6)
    rows.loc[rows.index[30:60], "value"] = 59.0  # a flat line over a border of days
    rows.loc[rows.index[120], "value"] = 900.0
    rows = rows.drop(rows.index[200:240])  # and a silence
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    validate.run(gate(), "beijing", ingested=ingested(tmp_path / "a", rows, "%Y"), out=whole)
    validate.run(gate(), "beijing", ingested=ingested(tmp_path / "b", rows, "%Y-%m-%d"), out=parts)
    one, many = (read(out)[1].sort_values(observations.KEY, ignore_index=True) for out in (whole, parts))
    assert (one["flag_flat_line"] == qc.FAIL).sum() == 30
    assert (one["flag_gap"] == qc.SUSPECT).sum() == 1
    pd.testing.assert_frame_equal(one, many)


def test_planted_faults_are_flagged(tmp_path):
    rows = network()

    def plant(platform, hours, value, variable="pm2p5"):
        mine = rows.index[(rows.platform_id == platform) & (rows.variable == variable)]
        rows.loc[mine[hours], "value"] = value

    plant("station 1", [200], 420.0)
    plant("station 2", list(range(300, 340)), 88.0)
    plant("station 3", [77], 1985.0)
    plant("station 4", [90], -3.0)
    report, checked, _ = run(tmp_path, rows)
    spike = value_at(checked, "station 1", "2020-01-19T09:00Z")
    assert (spike.value, spike.flag_spike, spike.flag_neighbor, spike.flag_aggregate) == (420.0, qc.FAIL, qc.FAIL, qc.FAIL)
    assert (checked[checked.value == 88.0]["flag_flat_line"] == qc.FAIL).all()
    assert checked[checked.value == 1985.0]["flag_gross_range"].tolist() == [qc.FAIL]
    assert (checked[checked.value == -3.0]["flag_gross_range"] == qc.PASS).all()
    worst = {row["platform_id"]: row["fail"] for row in report["per_sensor"]}
    assert worst["station 2"] >= 40
    assert worst["station 7"] == 0


def test_rows_are_held_back_with_reasons_and_none_is_lost(tmp_path):
    rows = network(24 * 25)
    rows.loc[3, "longitude"], rows.loc[3, "latitude"] = rows.loc[3, "latitude"], rows.loc[3, "longitude"]
    rows.loc[10, "variable"] = "ozone"
    rows.loc[20, "value"] = np.nan
    rows.loc[30, "knowledge_time"] -= pd.Timedelta("8h")
    rows = pd.concat([rows, rows.loc[[40]], rows.loc[[50]].assign(value=999.5)], ignore_index=True)
    report, checked, held = run(tmp_path, rows)
    assert len(checked) + len(held) == len(rows) == report["rows"]
    assert report["quarantined_rows"] == len(held)
    reasons = "\n".join(held["reason"])
    for part in ("inside_area: (39.8, 116.3)", "known_variable: ozone", "not_null: no value", "known_after: known at"):
        assert part in reasons
    assert set(observations.OBSERVATIONS.names) < set(held.columns)
    twice = held[held["reason"].str.contains("unique")]
    assert len(twice) == 3  # the copy of row 40, both of the contradicting pair
    assert twice["value"].isin([rows.loc[40, "value"], rows.loc[50, "value"], 999.5]).all()


def test_same_rows_in_two_partitions(tmp_path):
    rows = network(24 * 25)
    folder = ingested(tmp_path / "in", rows)
    january, february = sorted((folder / "observations").iterdir())
    a, b = pd.read_parquet(january), pd.read_parquet(february)
    copies = b.head(5).copy()
    copies.loc[copies.index[0], "value"] += 1  # contradicts the row in February
    both = pd.concat([a, copies]).sort_values(observations.KEY)
    both.to_parquet(january, index=False)
    (folder / "ingest.json").write_text(json.dumps({"rows": len(rows) + 5}))
    rules = severity("inside_partition", "warn")
    validate.run(gate(rules=rules), "beijing", ingested=folder, out=tmp_path / "out")
    report, checked, held = read(tmp_path / "out")
    assert report["rules"]["unique_across"]["offenders"] == 6
    assert len(checked) + len(held) == len(rows) + 5
    assert len(held) == 6
    assert held["reason"].str.startswith("unique_across").all()
    assert not checked.duplicated(observations.KEY).any()


def test_completeness_counts_what_should_have_come(tmp_path):
    """A sensor that is away for a month and an hour in which no sensor reports both count as missing."""
    rows = network()
    gone = (rows.platform_id == "station 5") & (rows.time >= pd.Timestamp("2020-02-01T01:00Z"))
    silent = rows.time == pd.Timestamp("2020-01-20T00:00Z")
    rows = rows[~gone & ~silent]
    report, _, _ = run(tmp_path, rows)
    expected = 24 * 30 * STATIONS * 3
    assert report["completeness"] == pytest.approx(len(rows) / expected, abs=1e-6)
    sensors = {row["platform_id"]: row for row in report["per_sensor"]}
    assert sensors["station 0"]["completeness"] == pytest.approx((24 * 30 - 1) / (24 * 30), abs=1e-6)
    assert sensors["station 5"]["completeness"] < 0.75
    assert not report["rules"]["completeness_sensor"]["passed"]
    assert "station 5 pm10" in report["rules"]["completeness_sensor"]["detail"]


def test_campaigns_set_the_expected_number(tmp_path):
    rows = network()
    campaigns = [["2020-01-11T01:00Z", "2020-02-20T00:00Z"]]
    report, _, _ = run(tmp_path, rows, campaigns=campaigns)
    assert report["completeness"] == pytest.approx(30 / 40, abs=1e-6)


def test_block_stops_the_run_and_leaves_a_report(tmp_path):
    out = tmp_path / "checked"
    rows = network(24 * 10)
    validate.run(gate(), "beijing", ingested=ingested(tmp_path / "good", rows), out=out)
    before = (out / "report.json").read_bytes()
    rows.loc[3, "value"] = 5000.0
    with pytest.raises(ValueError, match=r"in_range: 1 of 5,760 .*\n.*checked.blocked/page.html"):
        validate.run(gate(rules=severity("in_range", "block")), "beijing", ingested=ingested(tmp_path / "bad", rows), out=out)
    blocked = json.loads((tmp_path / "checked.blocked" / "report.json").read_text())
    assert blocked["blocked"] == 1
    assert "Not fit for use" in (tmp_path / "checked.blocked" / "page.html").read_text()
    assert (out / "report.json").read_bytes() == before
    validate.run(gate(), "beijing", ingested=tmp_path / "good", out=out)
    assert not (tmp_path / "checked.blocked").exists()


def test_thin_partition_can_be_held_back_whole(tmp_path):
    rows = network()
    thin = (rows.time > pd.Timestamp("2020-02-01T00:00Z")) & (rows.index % 3 != 0)
    rows = rows[~thin]
    report, checked, held = run(tmp_path, rows, rules=severity("completeness_partition", "quarantine"))
    assert report["quarantined_partitions"] == 1
    assert set(checked.time.dt.month) == {1, 2}  # 2020-02-01T00:00Z is the end of the last hour of January
    assert checked.time.max() == pd.Timestamp("2020-02-01T00:00Z")
    assert len(checked) + len(held) == len(rows)
    assert held["reason"].str.contains("completeness_partition").all()


@pytest.mark.parametrize("level", ["block", "quarantine"])
def test_partition_with_wrong_columns(tmp_path, level):
    folder = ingested(tmp_path / "in", network(24 * 25))
    broken = sorted((folder / "observations").iterdir())[0]
    table = pd.read_parquet(broken)
    table.drop(columns="latitude").assign(value=table["value"].astype(str)).to_parquet(broken, index=False)
    arguments = gate(rules=severity("schema", level)), "beijing"
    if level == "block":
        with pytest.raises(ValueError, match=r"schema: .*latitude: no such column; value: is str, expected float64"):
            validate.run(*arguments, ingested=folder, out=tmp_path / "out")
    else:
        validate.run(*arguments, ingested=folder, out=tmp_path / "out")
        report, checked, held = read(tmp_path / "out")
        assert len(held) == len(table) == report["quarantined_rows"]
        assert len(checked) + len(held) == report["rows"]


def test_local_time_taken_for_utc_is_noticed(tmp_path):
    rows = network()
    shifted = rows.assign(time=rows.time + pd.Timedelta("8h"))
    report, _, held = run(tmp_path, shifted, rules=severity("known_after", "warn"))
    assert not report["rules"]["daily_cycle"]["passed"]
    assert "t2m peaks at 2" in report["rules"]["daily_cycle"]["detail"]
    assert not report["rules"]["known_after"]["passed"]
    assert len(held) == 0


def test_constant_and_moved_and_twin_sensors_are_warned_about(tmp_path):
    rows = network()
    rows.loc[(rows.platform_id == "station 1") & (rows.variable == "pm10"), "value"] = 55.0
    rows.loc[(rows.platform_id == "station 2") & (rows.time > pd.Timestamp("2020-02-01", tz="UTC")), "latitude"] += 0.2
    twin = rows.platform_id == "station 3"
    here = rows[rows.platform_id == "station 4"].iloc[0]
    rows.loc[twin, ["longitude", "latitude"]] = [here.longitude, here.latitude]
    report, checked, _ = run(tmp_path, rows)
    assert report["rules"]["varies"]["detail"].startswith("station 1 pm10 is 55 in all 720 values")
    assert report["rules"]["stays_in_place"]["detail"] == "station 2"
    assert report["rules"]["own_place"]["detail"] == "station 3 = station 4"
    assert (checked[(checked.platform_id == "station 1") & (checked.variable == "pm10")]["flag_flat_line"] == qc.FAIL).all()


def test_counts_that_contradict_ingest_block(tmp_path):
    folder = ingested(tmp_path / "in", network(24 * 10))
    (folder / "ingest.json").write_text(json.dumps({"rows": 1}))
    with pytest.raises(ValueError, match=r"totals: .*5760 rows found, 1 written by ingest"):
        validate.run(gate(), "beijing", ingested=folder, out=tmp_path / "out")


def test_same_bytes_again_and_with_processes(tmp_path, monkeypatch):
    rows = network(24 * 25)
    rows.loc[3, "longitude"] = 39.8
    folder = ingested(tmp_path / "in", rows)
    first, second = tmp_path / "first" / "x", tmp_path / "second" / "x"
    validate.run(gate(), "beijing", ingested=folder, out=first)
    monkeypatch.setenv("FIELDCAST_WORKERS", "2")
    monkeypatch.setattr("pipeline.check_observations.ROWS_A_WORKER", 1000)
    validate.run(gate(), "beijing", ingested=folder, out=second)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert [str(f) for f in files] == [
        "observations/2020-01.parquet", "observations/2020-02.parquet", "page.html", "quarantine/2020-01.parquet", "report.json",
    ]  # fmt: skip
    for name in files:
        assert (first / name).read_bytes() == (second / name).read_bytes(), name


def test_killed_run_leaves_nothing_half_done_and_the_next_one_is_the_same(tmp_path):
    rows = network(24 * 25)
    folder = ingested(tmp_path / "in", rows)
    expected, out = tmp_path / "expected" / "x", tmp_path / "out" / "x"
    validate.run(gate(), "x", ingested=folder, out=expected)
    section = {"validate": {"x": json.loads(gate().model_dump_json())}}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(section))
    command = [sys.executable, "-m", "pipeline", "validate", "x", "--params", tmp_path / "params.yaml", "--ingested", folder, "--out", out]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    begun = out.with_name(".x.tmp")
    while not begun.exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert begun.exists()
    assert not out.exists()
    validate.run(gate(), "x", ingested=folder, out=out)
    assert not begun.exists()
    for path in (path for path in expected.rglob("*") if path.is_file()):
        assert (out / path.relative_to(expected)).read_bytes() == path.read_bytes(), path


def test_moving_sensors_have_no_expected_number_and_no_gap_test(tmp_path):
    rows = network(24 * 10)
    bus = rows[rows.platform_id == "station 6"].assign(platform_id="bus", trip_id="bus-1")
    bus = bus[bus.time.dt.hour.between(6, 9)].assign(longitude=lambda t: t.longitude + 0.001 * np.arange(len(t)))
    report, checked, _ = run(tmp_path, pd.concat([rows, bus], ignore_index=True))
    sensors = {row["platform_id"]: row for row in report["per_sensor"]}
    assert sensors["bus"]["expected"] is None
    assert report["completeness"] == 1.0
    assert (checked[checked.platform_id == "bus"]["flag_gap"] == qc.NOT_EVALUATED).all()
    assert report["rules"]["stays_in_place"]["passed"]


def test_page_is_whole_and_tells_the_numbers(tmp_path):
    rows = network(24 * 25)
    rows.loc[3, "longitude"] = 39.8
    run(tmp_path, rows)
    page = (tmp_path / "checked" / "page.html").read_text()
    assert "Fit for use, with data held back" in page
    assert "inside_area: (39.8, 39.8) lies outside" in page
    assert "14,399 rows from 8 sensors" in page
    for foreign in ("http://", "https://", "src=", "@import", "url("):
        assert foreign not in page
    assert page.count("<svg") == 2


def test_why_a_test_did_not_run_is_told(tmp_path):
    report, _, _ = run(tmp_path, network(24 * 10), neighbors="the network is a line of buses", ordering=None)
    assert report["not_run"]["neighbor"] == "the network is a line of buses"
    assert "multi_variate" in report["not_run"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rules": {}}, "missing rules: .*schema"),
        ({"rules": severity("colour", "warn")}, "unknown rules: .*colour"),
        ({"variables": ["pm3"]}, "unknown variable 'pm3'"),
        ({"sept": "1h"}, "validate.beijing.sept: unknown key"),
        ({"kind": "grid"}, "unknown kind 'grid'"),
    ],
)
def test_wrong_parameters_are_named(changes, message):
    with pytest.raises(params.ParamsError, match=message):
        gate(**changes)
