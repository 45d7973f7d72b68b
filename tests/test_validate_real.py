"""The validate stage on real data with the parameters of params.yaml: known faults are caught, good data are left alone."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from pipeline import ingest, observations, params, qc, raw, sources, validate

ROOT = Path(__file__).parents[1]


def section(stage, key: str):
    name = f"{stage.__name__.split('.')[-1]}.{key}"
    return params.load(ROOT / "params.yaml", name, stage.params_model(key))


def checked(mirror: Path, tmp_path: Path, key: str, source: str, *names: str) -> tuple[dict, pd.DataFrame]:
    drop, adapter = tmp_path / "raw", sources.load(source)
    drop.mkdir()
    files = {}
    for path in sorted((mirror / source).iterdir()):
        if any(fnmatch.fnmatch(path.name, name) for name in names):
            shutil.copy(path, drop / path.name)
            files[path.name] = raw.RawFile("mirror", raw.sha256(path), path.stat().st_size, "2020-01-01T00:00:00Z")
    manifest = raw.Manifest(source, adapter.DROP.licence, adapter.DROP.attribution, adapter.DROP.page, files)
    (drop / raw.MANIFEST).write_text(manifest.text())
    ingest.run(section(ingest, key), key, raw=drop, out=tmp_path / "ingested")
    validate.run(section(validate, key), key, ingested=tmp_path / "ingested", out=tmp_path / "checked")
    rows = pd.concat([observations.read_partition(path) for path in observations.partitions(tmp_path / "checked")])
    return json.loads((tmp_path / "checked" / "report.json").read_text()), rows


@pytest.mark.real
def test_kolkata_outliers_are_caught_and_little_else(mirror, tmp_path):
    report, rows = checked(mirror, tmp_path, "kolkata", "kolkata", "Static_Autumn*", "Mobile_Autumn*")
    worst = rows.nlargest(3, "value")
    assert worst["value"].round(2).tolist() == [1775.85, 631.6, 417.87]
    assert worst["flag_aggregate"].tolist() == [qc.FAIL] * 3
    assert report["suspect_share"] + report["fail_share"] < 0.008
    assert report["checked_rows"] == report["rows"] == len(rows)
    assert "attribution" in (tmp_path / "checked" / "page.html").read_text()


@pytest.mark.real
def test_two_beijing_stations_are_nearly_all_good(mirror, tmp_path):
    """Too few stations to judge each other, which the report says; the longest outage and the caps are found."""
    names = ("PRSA_Data_Dongsi*", "PRSA_Data_Aotizhongxin*", "stations.csv")
    report, rows = checked(mirror, tmp_path, "beijing", "beijing", *names)
    assert report["suspect_share"] + report["fail_share"] < 0.005
    assert "neighbor" in report["not_run"]
    assert report["rules"]["daily_cycle"]["passed"]
    pm = rows[(rows["variable"] == "pm2p5") & (rows["platform_id"] == "Aotizhongxin")].sort_values("time")
    silence = pm["time"].diff()
    assert silence.max() == pd.Timedelta("344h")  # 343 hours without a value
    assert pm.loc[silence > pd.Timedelta("24h"), "flag_gap"].tolist() == [qc.SUSPECT] * int((silence > pd.Timedelta("24h")).sum())
    assert 0.95 < report["completeness"] < 1
