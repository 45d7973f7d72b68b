"""ERA5 read from a Zarr store by URL."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import xarray as xr

from tests.era5_files import bad, matches, read, truth


class _Counting(SimpleHTTPRequestHandler):
    """Serves a folder and keeps what was asked for."""

    requests: list[str] = []  # noqa: RUF012

    def log_request(self, code: Any = "-", size: Any = "-") -> None:
        if str(getattr(code, "value", code)) == "200":
            self.requests.append(self.path)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    folder = tmp_path / "served"
    folder.mkdir()
    _Counting.requests.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Counting, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def store(path: Path, order: tuple[str, ...], ascending: bool, zarr_format: int, written: int = 48) -> None:
    """A global store of 10 days on 15 degrees, one hour a chunk; the hours after `written` are not there yet."""
    time = pd.date_range("2020-01-01", periods=240, freq="h").values.astype("M8[ns]")
    latitude, longitude = np.linspace(-90, 90, 13)[:: 1 if ascending else -1], np.arange(0, 360, 15.0)
    value = truth(time, latitude, (longitude + 180) % 360 - 180).astype("f4")
    value[written:] = np.nan
    dims = ("time", "latitude", "longitude")
    variables = {"2m_temperature": (dims, value, {"units": "K"}), "geopotential": (dims, value, {"units": "m**2 s**-2"})}
    data = xr.Dataset(variables, coords={"time": time, "latitude": latitude, "longitude": longitude}).transpose("time", *order)
    data.attrs = {"valid_time_start": "2020-01-01", "valid_time_stop": "2020-01-02"} if written < len(time) else {}
    chunks = (1, *(data.sizes[dim] for dim in order))
    encoding = {name: {"chunks": chunks} for name in variables}
    data.to_zarr(path, zarr_format=zarr_format, consolidated=True, encoding=encoding)


@pytest.mark.filterwarnings("ignore:Consolidated metadata is currently not part")
@pytest.mark.parametrize(
    ("order", "ascending", "zarr_format"), [(("longitude", "latitude"), True, 2), (("latitude", "longitude"), False, 3)]
)
def test_a_store_is_read_by_url_and_only_where_it_is_needed(
    served: tuple[Path, str], order: tuple[str, ...], ascending: bool, zarr_format: int
) -> None:
    folder, address = served
    store(folder / "era5.zarr", order, ascending, zarr_format, written=240)
    box = {"north": 45, "south": 15, "west": -30, "east": 30}
    field, counts = read(folder, url=f"{address}/era5.zarr", box=box, period=["2020-01-03T05:00", "2020-01-03T08:00"])
    assert matches(field)
    assert field["latitude"].values.tolist() == [15, 30, 45]
    assert field["longitude"].values.tolist() == [-30, -15, 0, 15, 30]
    assert counts["frames"] == 4
    chunks = [path for path in _Counting.requests if "2m_temperature" in path and "json" not in path and "/.z" not in path]
    assert len(chunks) == 4  # one a frame, each once
    assert not [path for path in _Counting.requests if "geopotential/" in path and "json" not in path and "/.z" not in path]


def test_hours_that_a_store_has_not_written_yet_are_not_read(served: tuple[Path, str]) -> None:
    folder, address = served
    store(folder / "era5.zarr", ("latitude", "longitude"), False, 2)
    box = {"north": 45, "south": 15, "west": -30, "east": 30}
    field, counts = read(folder, url=f"{address}/era5.zarr", box=box, period=["2020-01-02T20:00", "2020-01-09"])
    assert field["time"].values[-1] == np.datetime64("2020-01-02T23:00")
    assert matches(field)
    assert counts["variables"]["t2m"]["empty_frames"]["count"] == 0
    message = bad(folder, url=f"{address}/era5.zarr", box=box, period=["2020-01-04", "2020-01-09"])
    assert "covers 2020-01-01T00:00:00.000000000 to 2020-01-02T23" in message


def test_a_store_that_is_not_there(served: tuple[Path, str]) -> None:
    folder, address = served
    box = {"north": 45, "south": 15, "west": -30, "east": 30}
    assert f"{address}/none.zarr cannot be opened as Zarr" in bad(folder, url=f"{address}/none.zarr", box=box, period=["2020", "2021"])
