"""The adapters of tables, on files in their own formats and on the real ones."""

from __future__ import annotations

import gzip
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import ingest, raw, sources
from pipeline.params import ParamsError
from pipeline.sources import airdelhi, beijing
from tests.drops import bus_day, bus_row, ingested, section, table, write_drop

TABLES = [name for name in sources.SOURCES if hasattr(sources.load(name), "rows")]
GRID_HEADER = "dateTime,lat,long,pressure,temperature,humidity,pm1_0,pm2_5,pm10\n"
PRSA_HEADER = '"No","year","month","day","hour","PM2.5","PM10","SO2","NO2","CO","O3","TEMP","PRES","DEWP","RAIN","wd","WSPM","station"\r\n'
PRSA_NAME = "PRSA_Data_Wanliu_20130301-20170228.csv"


@pytest.mark.parametrize("name", sources.SOURCES)
def test_a_source_declares_its_files_and_terms(name: str) -> None:
    adapter = sources.load(name)
    assert adapter.DROP.licence
    assert adapter.DROP.attribution
    assert adapter.DROP.mirror
    assert all(remote.url.startswith("https://") for remote in adapter.DROP.official)
    assert hasattr(adapter, "field") != hasattr(adapter, "rows"), "a source is of fields or of tables"
    assert adapter.Params.model_config.get("extra") == "forbid"


@pytest.mark.parametrize("name", TABLES)
def test_a_source_of_tables_knows_the_units_of_its_variables(name: str) -> None:
    from pipeline import lexicon

    settings = {"structure": "grid"} if name == "airdelhi" else {}
    assert all(lexicon.lookup(variable) for variable in section(name, **settings).variables)


# AirDelhi ------------------------------------------------------------------------------------------------------------------------------


def test_grid_cells_become_stations_at_their_centres(tmp_path: Path) -> None:
    rows = "2021-01-20 09:00:00+05:30,28.633,77.2326,990.75,26.07,40.32,90.14,148.28,168.75\n"
    out = ingested(tmp_path, "airdelhi", {"train.csv": (GRID_HEADER + rows).encode()}, structure="grid", variables=["pm2p5", "sp"])
    found = table(out)
    assert found["variable"].tolist() == ["pm2p5", "sp"]
    assert found["value"].tolist() == [148.28, 99075.0]
    assert found["platform_id"].unique().tolist() == ["cell:17,13"]
    assert np.allclose(found[["longitude", "latitude"]], [77.2326 + 0.0051, 28.633 + 0.0045], atol=1e-12)
    assert found["time"].unique().tolist() == [pd.Timestamp("2021-01-20T03:30Z")]
    assert found["trip_id"].isna().all()


def test_cells_south_and_west_of_the_origin_have_names_of_their_own() -> None:
    settings = section("airdelhi", structure="grid", variables=["pm10"])
    lat, long = [28.48 - 13 * 0.009, 28.48, 28.48], [77.1 - 0.0102, 77.1, 77.1 + 0.0051]
    columns = {"dateTime": pa.array([0] * 3, airdelhi.TIME), "lat": lat, "long": long, "pm10": [1.0] * 3}
    rows = airdelhi.rows(settings, Path(), "train.csv", pa.table(columns))
    assert rows.platform.to_pylist()[:2] == ["cell:-13,-1", "cell:0,0"]
    assert rows.problems[0][0].tolist() == [False, False, True], "half a step off the grid"


def test_housing_temperature_is_no_variable() -> None:
    with pytest.raises(ParamsError, match=r"ingest\.key\.variables\.0: Input should be 'pm1', 'pm2p5', 'pm10' or 'sp', found 't2m'"):
        section("airdelhi", structure="grid", variables=["t2m"])


def test_structures_are_told_apart_by_the_header(tmp_path: Path) -> None:
    grid = (GRID_HEADER + "2021-01-20 09:00:00+05:30,28.633,77.2326,990.75,26.07,40.32,90.14,148.28,168.75\n").encode()
    files = {"2021-01-30_all.csv": bus_day(bus_row("2021-01-30 00:00:01+05:30")), "train.csv": grid}
    assert table(ingested(tmp_path, "airdelhi", files, structure="raw"))["platform_id"].unique().tolist() == ["00000000c37f0aa8"]
    assert table(ingested(tmp_path, "airdelhi", files, structure="grid"))["platform_id"].unique().tolist() == ["cell:17,13"]


def test_day_files_in_an_archive(tmp_path: Path) -> None:
    days = {day: bus_day(bus_row(f"{day} 00:00:01+05:30")) for day in ("2021-01-29", "2021-01-30")}
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for day, content in days.items():
            archive.writestr(f"data/{day}_all.csv", content)
    zipped = ingested(tmp_path / "zip", "airdelhi", {"days.zip": packed.getvalue()}, structure="raw")
    plain = ingested(tmp_path / "csv", "airdelhi", {f"{day}_all.csv": content for day, content in days.items()}, structure="raw")
    pd.testing.assert_frame_equal(table(zipped), table(plain))


def test_a_raw_file_without_its_day_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"all\.csv: expected a name like 2021-01-30_all\.csv"):
        ingested(tmp_path, "airdelhi", {"all.csv": bus_day(bus_row("2021-01-30 00:00:01+05:30"))}, structure="raw")


def test_the_grid_ends_with_the_campaign(tmp_path: Path) -> None:
    inside = "2021-01-30 23:00:00+05:30,28.633,77.2326,990.75,26.07,40.32,90.14,148.28,168.75\n"
    out = ingested(
        tmp_path, "airdelhi", {"test.csv": (GRID_HEADER + inside + inside.replace("-30 23", "-31 00")).encode()}, structure="grid"
    )
    assert len(table(out)) == 3
    assert "the time lies outside what this file covers" in table(out, "quarantine")["reason"].item()


# Beijing -------------------------------------------------------------------------------------------------------------------------------


def prsa(*rows: str) -> bytes:
    return (PRSA_HEADER + "".join(f"{row}\r\n" for row in rows)).encode()


def test_beijing_units_zone_and_wind(tmp_path: Path) -> None:
    out = ingested(tmp_path, "beijing", {PRSA_NAME: prsa('1,2013,3,1,0,8,NA,6,28,400,52,-0.7,1023,-18.8,2.5,"NNW",4.4,"Wanliu"')})
    found = table(out).set_index("variable")["value"]
    angle = np.radians(337.5)  # the wind comes from there
    expected = {"pm2p5": 8, "t2m": 272.45, "d2m": 254.35, "sp": 102300, "tp": 0.0025, "co": 400, "o3": 52, "no2": 28, "so2": 6}
    expected |= {"u10": -4.4 * np.sin(angle), "v10": -4.4 * np.cos(angle)}
    assert found.to_dict() == pytest.approx(expected, rel=1e-12)
    assert found["u10"] > 0, "from the north-north-west the wind blows east"
    assert found["v10"] < 0, "and south"
    assert table(out)["time"].unique().tolist() == [pd.Timestamp("2013-02-28T16:00Z")]


def test_all_sixteen_directions() -> None:
    u, v, odd = beijing.wind(pa.array([*beijing.COMPASS, None, "cv"]), np.ones(18))
    degrees = np.degrees(np.arctan2(-u[:16], -v[:16])) % 360
    assert np.allclose(degrees, 22.5 * np.arange(16))
    assert np.isnan(u[16:]).all()
    assert np.isnan(v[16:]).all()
    assert odd.tolist() == [False] * 17 + [True]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('1,2013,2,30,0,8,8,6,28,400,52,1,1,1,0,"N",1,"Wanliu"', "make no time"),
        ('1,2013,3,1,24,8,8,6,28,400,52,1,1,1,0,"N",1,"Wanliu"', "make no time"),
        ('1,2012,3,1,0,8,8,6,28,400,52,1,1,1,0,"N",1,"Wanliu"', "outside what this file covers"),
        ('1,2017,3,1,0,8,8,6,28,400,52,1,1,1,0,"N",1,"Wanliu"', "outside what this file covers"),
        ('1,2013,3,1,0,8,8,6,28,400,52,1,1,1,0,"up",1,"Wanliu"', "wd is none of N NNE"),
        ('1,2013,3,1,0,8,8,6,28,400,52,1,1,1,0,"N",1,"Wanlui"', "unknown station; coordinates are known of Aotizhongxin"),
    ],
)
def test_what_beijing_cannot_place_is_held_back(tmp_path: Path, row: str, reason: str) -> None:
    good = '1,2013,3,1,1,8,8,6,28,400,52,1,1,1,0,"N",1,"Wanliu"'
    out = ingested(tmp_path, "beijing", {PRSA_NAME: prsa(good, row)})
    assert table(out)["time"].nunique() == 1
    held = table(out, "quarantine")
    assert held["source_row"].tolist() == [3]
    assert reason in held["reason"].item()


def test_stations_of_the_drop_replace_those_known_here(tmp_path: Path) -> None:
    row = prsa('1,2013,3,1,1,8,8,6,28,400,52,1,1,1,0,"N",1,"Xidan"')
    out = ingested(tmp_path, "beijing", {PRSA_NAME: row, "stations.csv": b"station,latitude,longitude\nXidan,39.9,116.4\n"})
    assert table(out)[["longitude", "latitude"]].drop_duplicates().to_numpy().tolist() == [[116.4, 39.9]]
    moved = b"station,latitude,longitude\nXidan,39.8,116.4\n"
    out = ingested(tmp_path, "beijing", {PRSA_NAME: row, "stations.csv": moved})
    assert table(out)["latitude"].unique().tolist() == [39.8], "a changed list is noticed"


# The real files --------------------------------------------------------------------------------------------------------------------------


def real(mirror: Path, source: str, *patterns: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for pattern in patterns for path in sorted((mirror / source).glob(pattern))}


@pytest.mark.real
def test_beijing_has_the_missing_values_it_is_known_for(mirror: Path, tmp_path: Path) -> None:
    out = ingested(tmp_path, "beijing", real(mirror, "beijing", "PRSA*", "stations.csv"))
    record = json.loads((out / "ingest.json").read_text())
    missing = pd.DataFrame([entry["missing"] for entry in record["partitions"].values()]).sum().to_dict()
    wind = missing.pop("u10"), missing.pop("v10")
    assert missing == {
        "pm2p5": 8739, "pm10": 6449, "so2": 9021, "no2": 12116, "co": 20701, "o3": 13277, "t2m": 398, "d2m": 403, "sp": 393, "tp": 390,
    }  # fmt: skip
    assert wind[0] == wind[1] >= 1822, "where the direction or the speed is missing"
    rows = sum(counts["rows"] for entry in record["partitions"].values() for counts in entry["files"].values())
    assert rows == 12 * 35064
    assert record["quarantined"] == 0
    assert record["rows"] == 12 * rows - sum(missing.values()) - sum(wind)
    found = pq.read_table(out / "observations").to_pandas()
    values = {name: group["value"] for name, group in found.groupby("variable")}
    assert [(values["pm10"] == 999).sum(), (values["pm2p5"] == 999).sum(), (values["co"] == 10000).sum()] == [3, 1, 56], "caps stay"
    hours = found.loc[found["variable"] == "t2m"].groupby(found["time"].dt.tz_convert("Asia/Shanghai").dt.hour)["value"].mean()
    assert (hours.idxmax(), hours.idxmin()) == (15, 5)
    assert found["time"].min() == pd.Timestamp("2013-03-01", tz="Asia/Shanghai")
    assert found["time"].max() == pd.Timestamp("2017-02-28 23:00", tz="Asia/Shanghai")


@pytest.mark.real
def test_the_official_archive_of_beijing_is_read_like_the_plain_files(mirror: Path, tmp_path: Path) -> None:
    plain = {name: gzip.decompress(content) for name, content in real(mirror, "beijing", "PRSA_Data_Wanliu*").items()}
    inner, outer = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(inner, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in plain.items():
            archive.writestr(f"PRSA_Data_20130301-20170228/{name.removesuffix('.gz')}", content)
    with zipfile.ZipFile(outer, "w") as archive:
        archive.writestr("PRSA2017_Data_20130301-20170228.zip", inner.getvalue())
        archive.writestr("data.csv", "not,this\n")
    zipped = ingested(tmp_path / "zip", "beijing", {"PRSA2017_Data.zip": outer.getvalue()}, variables=["pm2p5"])
    packed = ingested(tmp_path / "gz", "beijing", real(mirror, "beijing", "PRSA_Data_Wanliu*", "stations.csv"), variables=["pm2p5"])
    pd.testing.assert_frame_equal(table(zipped), table(packed))


@pytest.mark.real
def test_stations_known_here_are_those_of_the_list(mirror: Path) -> None:
    assert beijing.stations(mirror / "beijing") == beijing.STATIONS


@pytest.mark.real
def test_kolkata_keeps_every_row(mirror: Path, tmp_path: Path) -> None:
    out = ingested(tmp_path, "kolkata", real(mirror, "kolkata", "Static*", "Mobile*"))
    record = json.loads((out / "ingest.json").read_text())
    rows = pd.DataFrame([{m: c["rows"] for m, c in p["files"].items()} for p in record["partitions"].values()]).sum().astype(int).to_dict()
    assert rows == {
        "Static_Spring.csv.gz": 12571, "Static_Autumn.csv.gz": 19569, "Static_Winter.csv.gz": 23376,
        "Mobile_Spring.csv.gz": 522, "Mobile_Autumn.csv.gz": 13843, "Mobile_Winter.csv.gz": 34566,
    }  # fmt: skip
    assert record["rows"] == sum(rows.values()) == 104_447
    assert not (out / "quarantine").exists()
    found = table(out)
    assert found["time"].min() == pd.Timestamp("2023-03-28", tz="Asia/Kolkata")
    assert found["value"].nlargest(2).round(2).tolist() == [1775.85, 631.60], "outliers are no codes: quality control judges them"
    season = found["time"].dt.tz_convert("Asia/Kolkata").dt.month.map({3: 0, 4: 0, 9: 1, 10: 1, 11: 1, 12: 2, 1: 2, 2: 2})
    platforms = found.groupby([found["platform_id"].str.partition(":")[0], season])["platform_id"].nunique()
    assert platforms["static"].tolist() == [22, 21, 22]
    assert platforms["mobile"].tolist() == [54, 108, 139]
    moving = found[found["platform_id"].str.startswith("mobile:")]
    night = moving["time"].dt.tz_convert("Asia/Kolkata").dt.hour.between(0, 4).mean()
    assert night < 0.06, "buses rest at night, which tells the zone"


@pytest.mark.real
def test_the_id_that_kolkata_lists_twice_is_two_stations(mirror: Path, tmp_path: Path) -> None:
    listed = pd.read_csv(mirror / "kolkata" / "Locations-staticLCS.csv")
    assert listed["id"].isna().sum() == 1
    twice = listed[listed["id"] == "S21"]
    assert len(twice) == 2
    found = set(table(ingested(tmp_path, "kolkata", real(mirror, "kolkata", "Static*"), kinds=["static"]))["platform_id"])
    sites = {f"static:{row.lat:.2f},{row.long:.2f}" for row in listed.dropna().itertuples()}
    assert found <= sites, "every platform stands at a listed place"
    assert {f"static:{row.lat:.2f},{row.long:.2f}" for row in twice.itertuples()} <= found


@pytest.mark.real
def test_airdelhi_samples(mirror: Path, tmp_path: Path) -> None:
    files = real(mirror, "airdelhi", "*.csv")
    buses = table(ingested(tmp_path / "raw", "airdelhi", files, structure="raw"))
    assert len(buses) == 30
    assert buses["platform_id"].nunique() == buses["trip_id"].nunique() == 3
    assert "00000000c37f0aa8" in set(buses["platform_id"]), "leading zeros stay"
    assert buses["time"].min() == pd.Timestamp("2021-01-29T18:30:01Z")
    out = ingested(tmp_path / "grid", "airdelhi", files, structure="grid")
    record, grid = json.loads((out / "ingest.json").read_text()), table(out)
    assert record["quarantined"] == 0
    duplicates = sum(counts["duplicates"] for entry in record["partitions"].values() for counts in entry["files"].values())
    assert (duplicates, len(grid)) == (5, 3 * (1000 + 13 + 10 - 5))
    wide = grid.pivot(index=["time", "platform_id"], columns="variable", values="value")
    assert ((wide["pm1"] <= wide["pm2p5"]) & (wide["pm2p5"] <= wide["pm10"])).all()


@pytest.mark.real
def test_a_field_source_is_handed_its_verified_files(mirror: Path, tmp_path: Path) -> None:
    name = "era5_t2m_u10_v10_tcc_karnataka_2024-01-01T12_cds_original.nc"
    drop, out = write_drop(tmp_path / "raw", "era5", real(mirror, "era5", name)), tmp_path / "out"
    settings = section("era5", files=[name], variables=["t2m"])
    ingest.run(settings, "key", raw=drop, out=out)
    assert (out / "field.zarr").is_dir()
    record = json.loads((out / "ingest.json").read_text())
    assert (record["kind"], record["source"], list(record["raw"])) == ("field", "era5", [name])
    (drop / name).write_bytes((drop / name).read_bytes()[:-1])
    with pytest.raises(raw.RawError, match="differs from its manifest"):
        ingest.run(settings, "key", raw=drop, out=out)
