"""Bad input to tables: each case ends in a quarantine entry with its line and reason, nothing is lost and nothing is silently wrong."""

from __future__ import annotations

import gzip
import io
import json
import math
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import delimited, members, tables
from tests.drops import HEADER, bus_day, bus_row, ingested, table

DAY = "2021-01-30_all.csv"
GOOD = [bus_row(f"2021-01-30 00:00:{i:02d}+05:30") for i in range(3)]


def bus(folder: Path, content: bytes, name: str = DAY, **settings) -> tuple[pd.DataFrame, pd.DataFrame]:
    out = ingested(folder, "airdelhi", {name: content}, structure="raw", **settings)
    return table(out), table(out, "quarantine")


def only(quarantine: pd.DataFrame) -> tuple[int, str, str]:
    assert len(quarantine) == 1
    row = quarantine.iloc[0]
    return int(row["source_row"]), row["reason"], row["raw"]


def test_a_row_that_does_not_fit_is_held_back_with_its_line_and_text(tmp_path: Path) -> None:
    bad = bus_row("2021-01-30 00:00:09+05:30", pm="94.0,high,156.0")
    kept, held = bus(tmp_path, bus_day(*GOOD, bad, GOOD[0].replace(":00+", ":30+")))
    assert len(kept) == 12
    assert only(held) == (5, "pm2_5 is 'high', expected a number", bad)


def test_text_that_is_no_utf8(tmp_path: Path) -> None:
    content = bus_day(*GOOD) + bus_row("2021-01-30 00:00:09+05:30", device="b\xfcs").encode("latin-1") + b"\n"
    kept, held = bus(tmp_path, content)
    assert len(kept) == 9
    line, reason, text = only(held)
    assert line == 5
    assert reason.startswith("this is no UTF-8 text (invalid start byte at byte 66")
    assert r"b\xfcs" in text


@pytest.mark.parametrize(("cut", "reason"), [(3, "the file ends within this line"), (1, "the file ends within this line")])
def test_a_cut_file_loses_only_its_last_line(tmp_path: Path, cut: int, reason: str) -> None:
    kept, held = bus(tmp_path, bus_day(*GOOD)[:-cut])  # the last value would read 15, or look whole
    assert len(kept) == 6
    line, found, text = only(held)
    assert line == 4
    assert reason in found
    assert GOOD[2].startswith(text)


def test_wrong_number_of_columns(tmp_path: Path) -> None:
    _, held = bus(tmp_path, bus_day(*GOOD, GOOD[0] + ",7"))
    assert only(held) == (5, "expected 9 columns, found 10", GOOD[0] + ",7")


@pytest.mark.parametrize(("mark", "reason"), [('"', "a quote is not closed"), ("\r", "a carriage return stands within the line")])
def test_a_stray_mark_takes_no_other_line_with_it(tmp_path: Path, mark: str, reason: str) -> None:
    stray = bus_row("2021-01-30 00:00:09+05:30").replace("0000c3", f"0000{mark}c3")
    kept, held = bus(tmp_path, bus_day(GOOD[0], stray, *GOOD[1:]))
    assert len(kept) == 9
    assert only(held)[:2] == (3, reason)


def test_reordered_columns_are_read_by_name(tmp_path: Path) -> None:
    columns = HEADER.split(",")
    order = [3, 8, 7, 6, 5, 4, 2]
    lines = [",".join(columns[i] for i in order), *(",".join(row.split(",")[i] for i in order) for row in GOOD)]
    kept, _ = bus(tmp_path / "a", ("\r\n".join(lines) + "\r\n").encode())
    as_published, _ = bus(tmp_path / "b", bus_day(*GOOD))
    pd.testing.assert_frame_equal(kept, as_published)


def test_a_renamed_column_holds_the_file_back_and_names_the_header(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no column 'pm2_5'; the header is '.*PM25"):
        bus(tmp_path, bus_day(*GOOD, header=HEADER.replace("pm2_5", "PM25")))


def test_a_column_named_twice(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="2 columns 'lat'"):
        bus(tmp_path, bus_day(*GOOD, header=HEADER.replace("uid", "lat")))


def test_swapped_coordinates_are_named_as_such(tmp_path: Path) -> None:
    kept, held = bus(tmp_path, bus_day(*GOOD, bus_row("2021-01-30 00:00:09+05:30", lat=77.2, long=28.6)))
    assert len(kept) == 9
    assert only(held)[1] == "latitude and longitude are swapped"


@pytest.mark.parametrize(
    ("lat", "reason"), [(12.9, "the position lies outside"), ("", "there is no position"), (-9999, "there is no position")]
)
def test_positions_elsewhere_or_nowhere(tmp_path: Path, lat: object, reason: str) -> None:
    _, held = bus(tmp_path, bus_day(*GOOD, bus_row("2021-01-30 00:00:09+05:30", lat=lat)))
    assert reason in only(held)[1]


def test_exact_duplicates_go_and_contradictions_are_held_back(tmp_path: Path) -> None:
    other = GOOD[1].replace("142.0", "150.0")
    kept, held = bus(tmp_path, bus_day(*GOOD, GOOD[0], other))
    assert len(kept) == 9
    assert 150.0 not in kept["value"].tolist()
    assert only(held) == (6, "contradicts line 3, the same platform at the same time", other)


def test_local_time_is_not_taken_for_utc(tmp_path: Path) -> None:
    kept, held = bus(tmp_path, bus_day(*GOOD, bus_row("2021-01-30 12:00:00"), bus_row("2021-01-30 12:00:00+00:00")))
    assert kept["time"].max() == pd.Timestamp("2021-01-30T12:00Z"), "an offset is taken at its word"
    assert kept["time"].min() == pd.Timestamp("2021-01-29T18:30Z")
    assert only(held)[1] == "dateTime is '2021-01-30 12:00:00', expected a date and time with its UTC offset"


def test_a_jump_of_the_clock_is_held_back(tmp_path: Path) -> None:
    jumps = [bus_row("2021-03-30 00:00:05+05:30"), bus_row("1970-01-01 05:30:00+05:30"), bus_row("2021-01-30 23:00:00+00:00")]
    kept, held = bus(tmp_path, bus_day(*GOOD, *jumps))
    assert len(kept) == 9
    assert held["source_row"].tolist() == [5, 6, 7]
    assert (
        held["reason"]
        .str.contains("outside what this file covers, 2021-01-30 00:00:00+05:30 to 2021-01-31 00:00:00+05:30", regex=False)
        .all()
    )


@pytest.mark.parametrize("code", ["-999", "-9999.0", "1e20", "1.00000002004e20", "-1e20", "9.96921e36"])
def test_codes_are_masked(tmp_path: Path, code: str) -> None:
    kept, held = bus(tmp_path, bus_day(*GOOD, bus_row("2021-01-30 00:00:09+05:30", pm=f"94.0,{code},156.0")))
    assert len(kept) == 11
    assert len(held) == 0
    assert kept["value"].between(0, 200).all()


def test_codes_are_masked_before_units_are_converted(tmp_path: Path) -> None:
    header = b'"No","year","month","day","hour","PM2.5","PM10","SO2","NO2","CO","O3","TEMP","PRES","DEWP","RAIN","wd","WSPM","station"\r\n'
    row = b'1,2013,3,1,0,-3,8,6,28,-9999,52,-999,-9999,1e20,-999,"NNW",-999,"Wanliu"\r\n'
    out = ingested(tmp_path, "beijing", {"PRSA_Data_Wanliu_20130301-20170228.csv": header + row})
    found = table(out).set_index("variable")["value"].to_dict()
    assert found == {"no2": 28.0, "o3": 52.0, "pm10": 8.0, "pm2p5": -3.0, "so2": 6.0}, "codes dropped, the small negative kept"
    counts = json.loads((out / "ingest.json").read_text())["partitions"]["2013"]["files"]["PRSA_Data_Wanliu_20130301-20170228.csv"]
    assert counts["masked TEMP as -999"] == counts["masked DEWP as 1e19 or more"] == counts["masked PRES as -9999"] == 1


def test_an_infinite_value_is_held_back(tmp_path: Path) -> None:
    _, held = bus(tmp_path, bus_day(*GOOD, bus_row("2021-01-30 00:00:09+05:30", pm="94.0,inf,156.0")))
    assert only(held)[1] == "pm2p5 is infinite"


def test_daylight_saving_is_not_guessed(tmp_path: Path) -> None:
    rows = "lat,long,time,pm\n22.5,88.35,10/29/2023 0:00,1\n22.5,88.35,10/29/2023 1:00,2\n22.5,88.35,10/29/2023 2:00,3\n"
    out = ingested(tmp_path, "kolkata", {"Static_Autumn.csv": rows.encode()}, zone="Europe/London")
    assert table(out)["time"].tolist() == [pd.Timestamp("2023-10-28T23:00Z"), pd.Timestamp("2023-10-29T02:00Z")]
    line, reason, _ = only(table(out, "quarantine"))
    assert (line, reason) == (3, "the clock of Europe/London shows this time twice or never (daylight saving)")


def test_a_skipped_hour_is_no_time() -> None:
    naive = np.array(["2023-03-26T00:30", "2023-03-26T01:30", "2023-03-26T02:30"], "M8[us]")
    found = tables.local_to_utc(naive, "Europe/London")
    assert found.tolist() == [pd.Timestamp("2023-03-26T00:30"), None, pd.Timestamp("2023-03-26T01:30")]


@pytest.mark.parametrize(("label", "hours"), [("begin", 1), ("centre", 0.5), ("end", 0), ("unknown", 0), ("instant", 0)])
def test_labels_come_out_at_the_end_of_the_hour(tmp_path: Path, label: str, hours: float) -> None:
    rows = b"lat,long,time,pm\n22.5,88.35,10/1/2023 0:00,1\n"
    out = ingested(tmp_path, "kolkata", {"Static_Autumn.csv": rows}, label=label)
    assert table(out)["time"].tolist() == [pd.Timestamp("2023-10-01", tz="Asia/Kolkata") + pd.Timedelta(hours=hours)]
    assert json.loads((out / "ingest.json").read_text())["source_time_label"] == label


def test_a_row_of_two_months_is_counted_once(tmp_path: Path) -> None:
    rows = "lat,long,time,pm\n22.5,88.35,9/30/2023 23:00,1\n22.5,88.35,10/1/2023 0:00,2\n22.5,88.35,soon,3\n22.5,88.35,7/1/2023 0:00,4\n"
    out = ingested(tmp_path, "kolkata", {"Static_Autumn.csv": rows.encode()})
    assert table(out)["value"].tolist() == [1.0, 2.0]
    assert table(out, "quarantine")["source_row"].tolist() == [4, 5]
    counts = [p["files"]["Static_Autumn.csv"]["rows"] for p in json.loads((out / "ingest.json").read_text())["partitions"].values()]
    assert sum(counts) == 4


def test_a_half_downloaded_archive_is_held_back_whole(tmp_path: Path) -> None:
    rows = [bus_row(f"2021-01-30 {i // 3600:02d}:{i // 60 % 60:02d}:{i % 60:02d}+05:30", pm=f"{i % 97}.0,2.0,3.0") for i in range(3000)]
    cut = gzip.compress(bus_day(*rows), mtime=0)[:-2000]
    out = ingested(
        tmp_path, "airdelhi", {f"{DAY}.gz": cut, "2021-01-29_all.csv": bus_day(GOOD[0].replace("01-30", "01-29"))}, structure="raw"
    )
    assert len(table(out)) == 3, "only the other file"
    assert "the archive is damaged or cut short" in only(table(out, "quarantine"))[1]


def test_a_decompression_bomb_is_held_back(tmp_path: Path) -> None:
    bomb = gzip.compress(bus_day(*GOOD) + (GOOD[0] + "\n").encode() * 200_000, mtime=0)
    assert len(bomb) < 100_000
    with pytest.raises(ValueError, match="more than 5000000 bytes when decompressed"):
        bus(tmp_path / "gz", bomb, f"{DAY}.gz", max_file_bytes=5_000_000)
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(DAY, gzip.decompress(bomb))
    with pytest.raises(ValueError, match="more than 5000000 bytes when decompressed"):
        bus(tmp_path / "zip", packed.getvalue(), "days.zip", max_file_bytes=5_000_000)


def test_no_line_end_in_sight(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"line 1 is longer than 1048576 bytes"):
        bus(tmp_path, b"\0" * 3_000_000)


@pytest.mark.parametrize("content", [HEADER.encode(), HEADER.encode() + b"\n", b"\n"])
def test_files_without_rows(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match="no observation at all"):
        bus(tmp_path, content)


def test_blank_lines_and_a_byte_order_mark_do_no_harm(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + bus_day(GOOD[0], "", GOOD[1], "", "", bus_row("never"))
    kept, held = bus(tmp_path, content)
    assert len(kept) == 6
    assert only(held)[0] == 7


def test_trips_are_cut_at_pauses_and_jumps(tmp_path: Path) -> None:
    clock = ["00:00:00", "00:05:00", "00:10:01", "00:10:02", "00:10:03"]
    lat = [28.5, 28.5, 28.5, 28.5085, 28.5180]  # 945 m, then 1056 m
    rows = [bus_row(f"2021-01-30 {t}+05:30", "bus", y) for t, y in zip(clock, lat, strict=True)]
    kept, _ = bus(tmp_path, bus_day(*rows, bus_row("2021-01-30 00:00:00+05:30", "other")))
    trips = kept[(kept["variable"] == "pm10") & (kept["platform_id"] == "bus")]["trip_id"].tolist()
    first, second, third = (f"bus/2021012{stamp}Z" for stamp in ("9T183000", "9T184001", "9T184003"))
    assert trips == [first, first, second, second, third]
    assert kept.loc[kept["platform_id"] == "other", "trip_id"].unique().tolist() == ["other/20210129T183000Z"]


# Blocks of text ------------------------------------------------------------------------------------------------------------------------

COLUMNS = {"t": pa.timestamp("us", "UTC"), "who": pa.string(), "x": pa.float64(), "n": pa.int32()}
TEXT = b"t,who,x,skipped,n\n" + b"".join(b'2021-01-30 00:00:%02d+05:30,"a %d",%d.5,,%d\n' % (i, i, i, i) for i in range(30))


def read(text: bytes, limit: int = 1 << 30) -> tuple[dict[int, tuple], list[tuple[int, str]]]:
    rows, rejected = {}, []
    for block in delimited.blocks(io.BytesIO(text), COLUMNS, limit):
        assert block.table.schema.types == list(COLUMNS.values())
        rows |= dict(zip(block.line.tolist(), zip(*block.table.to_pydict().values(), strict=True), strict=True))
        rejected += block.rejected
    return rows, rejected


@pytest.mark.parametrize("size", [1, 7, 40, 1000])
def test_the_size_of_blocks_makes_no_difference(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty = TEXT.replace(b"7.5", b"seven").replace(b'"a 9"', b'"a 9').replace(b",12.5,,", b",12.5,")
    whole = read(faulty)
    assert [line for line, _ in whole[1]] == [9, 11, 14, 19, 29]
    monkeypatch.setattr(delimited, "BLOCK_BYTES", size)
    assert read(faulty) == whole


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(18, len(TEXT) - 2), st.binary(min_size=0, max_size=3)), min_size=1, max_size=4))
def test_every_line_is_read_or_rejected_and_damage_stays_where_it_is(damage: list[tuple[int, bytes]]) -> None:
    """Overwrite some bytes after the header: every line is accounted for once, untouched lines read as before."""
    text = bytearray(TEXT)
    for at, content in damage:
        text[at : at + 1] = content
    lines = bytes(text).split(b"\n")
    expected = {i for i, content in enumerate(lines, 1) if i > 1 and content.strip()}
    rows, rejected = read(bytes(text))
    accounted = [*rows, *(line for line, _ in rejected)]
    assert sorted(accounted) == sorted(expected)
    before = dict(zip(TEXT.split(b"\n")[1:], read(TEXT)[0].values(), strict=False))
    for number, content in enumerate(lines[:-1], 1):
        if number > 1 and content in before:
            assert rows[number] == before[content]


def test_cells_read_alike_beside_a_faulty_one() -> None:
    """The faulty block takes the slow way; numbers must come out bit for bit as on the fast one."""
    numbers = [0.1, 1 / 3, 28.579414000000003, 1e-300, 123456789.123456789, -7.0]
    lines = [b"2021-01-30 00:00:00.5Z,b, %r ,,1" % number for number in numbers]
    fast, _ = read(b"\n".join([b"t,who,x,skipped,n", *lines, b""]))
    slow, rejected = read(b"\n".join([b"t,who,x,skipped,n", *lines, b"never,,,,", b""]))
    assert len(rejected) == 1
    assert fast == slow
    assert [row[2] for row in fast.values()] == numbers


def test_nested_archives_are_read_as_streams(tmp_path: Path) -> None:
    inner, outer = io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(inner, "w") as archive:
        archive.writestr("folder/a.csv", "x\n1\n")
    with zipfile.ZipFile(outer, "w") as archive:
        archive.writestr("inner.zip", inner.getvalue())
        archive.writestr("b.csv.gz", gzip.compress(b"x\n2\n"))
    (tmp_path / "all.zip").write_bytes(outer.getvalue())
    (tmp_path / "plain.csv").write_bytes(b"x\n3\n")
    found = [*members.members(tmp_path, "all.zip"), *members.members(tmp_path, "plain.csv")]
    assert found == ["all.zip!b.csv.gz", "all.zip!inner.zip!folder/a.csv", "plain.csv"]
    contents = []
    for member in found:
        with members.opened(tmp_path, member) as stream:
            contents.append(stream.read())
    assert contents == [b"x\n2\n", b"x\n1\n", b"x\n3\n"]


def test_trip_distance_is_metric() -> None:
    """One degree of latitude is 111.19 km on a sphere of 6,371 km; at 60 degrees north one of longitude is half of it."""
    time = np.array(["2021-01-01", "2021-01-01T00:00:01"], "M8[us]")
    for jump, trips in ((55_700, 1), (55_500, 2)):
        rule = tables.Trips(gap=timedelta(hours=1), jump=jump)
        _, found = tables.number_trips(rule, time, np.zeros(2, "i4"), ["a"], np.array([0.0, 1.0]), np.array([60.0, 60.0]))
        assert len(found) == trips
    assert math.isclose(math.pi / 180 * tables.EARTH_RADIUS * 0.5, 55_597, rel_tol=1e-4)
