"""The server on a real local port: pages, Zarr over HTTP for plain xarray, health, problems."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
import uvicorn
import xarray as xr

from pipeline import serve
from tests import forecasts, worlds
from tests.test_publish import put


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("forecasts")
    for frame in (390, 391):
        (root / str(frame)).mkdir()
    return [forecasts.make(root / str(frame), worlds.stations(), init=[frame]) for frame in (390, 391)]


@pytest.fixture
def published(tmp_path: Path) -> Path:
    return tmp_path / "published"


@pytest.fixture
def address(published: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(serve.app(published), host="127.0.0.1", port=port, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def get(url: str) -> tuple[int, str, str]:
    try:
        with urllib.request.urlopen(url) as answer:
            return answer.status, answer.headers["Content-Type"], answer.read().decode("utf-8", "replace")
    except urllib.error.HTTPError as error:
        return error.code, error.headers["Content-Type"], error.read().decode()


def test_an_empty_house_is_served_politely(address: str) -> None:
    assert "Nothing has been published yet" in get(address)[2]
    assert json.loads(get(f"{address}/health")[2])["datasets"] == []


def test_pages_data_and_health_follow_each_publication(address: str, published: Path, made: list[Path]) -> None:
    put(made[0], published)
    status, kind, page = get(f"{address}/maps/plane")
    assert (status, kind.split(";")[0]) == (200, "text/html")
    assert page == (published / "plane/latest/map.html").read_text()
    assert 'href="plane/latest/map.html"' in get(address)[2]
    assert get(f"{address}/plane/latest/map.html")[2] == page
    cube = xr.open_zarr(f"{address}/data/plane").load()
    original = [xr.open_zarr(folder / "forecast.zarr", consolidated=False)["pm2p5"].values[0] for folder in made]
    np.testing.assert_array_equal(cube["pm2p5"], original[:1])
    put(made[1], published, 1)
    np.testing.assert_array_equal(xr.open_zarr(f"{address}/data/plane")["pm2p5"], original)
    assert xr.open_zarr(f"{address}/data/plane", group="stations").sizes["station"] == 8
    assert xr.open_zarr(f"{address}/data/plane@2015-09-04T22Z").sizes["init_time"] == 1
    (entry,) = json.loads(get(f"{address}/health")[2])["datasets"]
    assert entry["init_time"] == "2015-09-04T23:00:00Z"
    age = (datetime.now(UTC) - datetime(2015, 9, 4, 23, tzinfo=UTC)).total_seconds() / 3600
    assert entry["data_age_hours"] == pytest.approx(age, abs=0.1)
    assert entry["sensors_used"] <= entry["sensors_expected"] == 6
    put(made[0], published, 2, max_age_hours=1.0)
    assert "stale input" in json.loads(get(f"{address}/health")[2])["datasets"][0]["refused"]["reasons"][0]


@pytest.mark.parametrize(
    "path", ["/maps/moon", "/data/moon/zarr.json", "/data/../zarr.json", "/nothing", "/..%2F..%2Fetc/passwd", "/data/plane@x/zarr.json"]
)
def test_what_is_not_there_is_a_problem(address: str, path: str) -> None:
    status, kind, text = get(address + path)
    assert (status, kind) == (404, "application/problem+json")
    assert json.loads(text)["status"] == 404
    assert json.loads(text)["detail"]
