"""Publishing: one commit and one tag a run, no duplicates, no half runs whatever happens, receipts that name their sources."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Event
from pathlib import Path

import icechunk
import numpy as np
import pytest
import xarray as xr
import yaml
import zarr

from pipeline import publish, receipt
from tests import forecasts, worlds

NOW = datetime(2026, 11, 22, 6, tzinfo=UTC)
PARAMS = publish.Params(model="plane", title="PM2.5 on the plane", license="CC-BY-4.0", attribution="An analytic world")


def _folder(root: Path, name: str, **params: object) -> Path:
    (root / name).mkdir()
    return forecasts.make(root / name, worlds.stations(), **params)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Forecasts from three consecutive frames, one of them again with other values, and one with another grid."""
    root = tmp_path_factory.mktemp("forecasts")
    folders = {f"at{frame}": _folder(root, f"at{frame}", init=[frame]) for frame in (390, 391, 392)}
    return folders | {"at391_sure": _folder(root, "at391_sure", init=[391], levels=[0.1, 0.5, 0.9]), "coarse": _folder(root, "c", grid=9)}


def put(forecast: Path, published: Path, hours: float = 0, **changes: object) -> publish.Outcome:
    now = NOW + timedelta(hours=hours)
    params = PARAMS.model_copy(update=changes)
    paper = receipt.build(
        forecast,
        output="",
        lock=None,
        repository=None,
        settings=params.model_dump(),
        inputs={"seen": ["plane"], "missing": ["era5"]},
        now=now,
    )
    (summary := forecast.parent / "summary.json").write_text('{"headline": ["Better than <nothing>."]}')
    pages = {"report.html": forecast.parent / "absent.html", "summary.json": summary}
    return publish.publish(forecast, published, "plane", params, paper, now, pages)


def published_cube(published: Path, group: str | None = None, **where: str) -> xr.Dataset:
    """What a reader sees with icechunk and xarray alone."""
    repository = icechunk.Repository.open(icechunk.local_filesystem_storage(str(published / "plane" / "forecast.icechunk")))
    return xr.open_zarr(repository.readonly_session(**(where or {"branch": "main"})).store, group=group, consolidated=False)


def _commits(published: Path) -> tuple[list[str], set[str]]:
    repository = publish.open_repository(published / "plane" / "forecast.icechunk")
    return [commit.message for commit in repository.ancestry(branch="main")][:-1], repository.list_tags()


def _original(folder: Path) -> np.ndarray:
    return xr.open_zarr(folder / "forecast.zarr", consolidated=False)["pm2p5"].values[0]


@pytest.mark.parametrize("order", [("at390", "at392", "at391"), ("at392", "at391", "at390")])
def test_runs_lie_along_init_time_in_any_order_of_arrival(made: dict[str, Path], tmp_path: Path, order: tuple[str, ...]) -> None:
    for number, name in enumerate(order):
        assert put(made[name], tmp_path, number).status == "published"
    cube, at_stations = published_cube(tmp_path), published_cube(tmp_path, "stations")
    assert (np.diff(cube["init_time"]) == np.timedelta64(1, "h")).all()
    assert cube.sizes["init_time"] == at_stations.sizes["init_time"] == 3
    for number, name in enumerate(("at390", "at391", "at392")):
        np.testing.assert_array_equal(cube["pm2p5"][number], _original(made[name]))
    assert (cube["valid_time"] == cube["init_time"] + cube["lead_time"]).all()
    issued = [np.datetime64("2026-11-22T06") + np.timedelta64(order.index(name), "h") for name in ("at390", "at391", "at392")]
    assert list(cube["issue_time"].values) == issued
    messages, tags = _commits(tmp_path)
    assert len(messages) == len(tags) == 3
    assert published_cube(tmp_path, tag=f"2015-09-0{'4T22' if order[0] == 'at390' else '5T00'}Z").sizes["init_time"] == 1


def test_the_same_forecast_again_changes_nothing_and_another_of_the_same_time_replaces_it(made: dict[str, Path], tmp_path: Path) -> None:
    assert put(made["at390"], tmp_path) == publish.Outcome("published", "2015-09-04T22Z")
    assert put(made["at390"], tmp_path, 5) == publish.Outcome("unchanged", "2015-09-04T22Z")
    assert json.loads((tmp_path / "plane/latest/receipt.json").read_text())["published_at"] == "2026-11-22T06:00:00Z"
    assert len(_commits(tmp_path)[0]) == 1
    put(made["at391"], tmp_path, 6)
    changed = tmp_path / "changed"
    _copy_with(made["at390"], changed, lambda values: values + 1)
    assert put(changed, tmp_path, 7).tag == "2015-09-04T22Z.2"
    cube = published_cube(tmp_path)
    assert cube.sizes["init_time"] == 2
    np.testing.assert_array_equal(cube["pm2p5"][0], _original(made["at390"]) + 1)
    np.testing.assert_array_equal(published_cube(tmp_path, tag="2015-09-04T22Z")["pm2p5"][0], _original(made["at390"]))


def test_another_layout_starts_the_cube_anew_and_keeps_the_old_one_under_its_tags(made: dict[str, Path], tmp_path: Path) -> None:
    put(made["at390"], tmp_path)
    put(made["coarse"], tmp_path, 1)
    assert "start anew: coordinate latitude" in _commits(tmp_path)[0][0]
    assert published_cube(tmp_path).sizes["y"] == 9
    assert published_cube(tmp_path, tag="2015-09-04T22Z").sizes["y"] == 16
    put(made["at391_sure"], tmp_path, 2)
    assert "coordinate quantile" in _commits(tmp_path)[0][0]


def _copy_with(forecast: Path, target: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    shutil.copytree(forecast, target)
    array = zarr.open_array(target / "forecast.zarr" / "pm2p5", mode="r+")
    array[...] = change(array[...])


def test_a_refused_forecast_leaves_the_last_good_one_and_says_why(made: dict[str, Path], tmp_path: Path) -> None:
    put(made["at390"], tmp_path)
    before = (tmp_path / "plane/latest").resolve()
    bad = tmp_path / "bad"
    _copy_with(made["at391"], bad, lambda values: np.where(values > 60, np.nan, values))
    outcome = put(bad, tmp_path, 1)
    assert outcome.status == "refused"
    assert "not finite" in outcome.reasons[0]
    assert (tmp_path / "plane/latest").resolve() == before
    assert len(_commits(tmp_path)[0]) == published_cube(tmp_path).sizes["init_time"] == 1
    assert "not finite" in json.loads((tmp_path / "plane/refused.json").read_text())["reasons"][0]
    index = (tmp_path / "index.html").read_text()
    assert "Newest forecast refused" in index
    assert "plane/latest/map.html" in index
    put(made["at391"], tmp_path, 2)
    assert not (tmp_path / "plane/refused.json").exists()
    index = (tmp_path / "index.html").read_text().split("<main>")[1]
    assert "refused" not in index
    assert "Better than &lt;nothing&gt;." in index


def test_a_damaged_or_missing_forecast_is_refused_by_name(made: dict[str, Path], tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(made["at390"], damaged)
    shutil.rmtree(damaged / "forecast.zarr" / "distance_to_sensor")
    outcome = put(damaged, tmp_path / "out")
    assert "distance_to_sensor" in outcome.reasons[0]
    assert not (tmp_path / "out/plane/latest").exists()


KILLED = """
import os, signal, sys
from pathlib import Path
import icechunk
from tests.test_publish import put
forecast, root = map(Path, sys.argv[1:])
moments = {"commit": (icechunk.Session, "commit"), "tag": (icechunk.Repository, "create_tag"), "link": (Path, "symlink_to")}
for name, (owner, method) in moments.items():
    child = os.fork()
    if not child:
        setattr(owner, method, lambda *given, **named: os.kill(os.getpid(), signal.SIGKILL))
        put(forecast, root / name, 1)
        os._exit(1)
    print(name, -os.WTERMSIG(os.waitpid(child, 0)[1]))
"""


def test_kill_9_at_any_moment_leaves_whole_runs_and_the_next_publication_repairs(made: dict[str, Path], tmp_path: Path) -> None:
    moments = ("commit", "tag", "link")
    for moment in moments:
        put(made["at390"], tmp_path / moment)
    pages = {moment: (tmp_path / moment / "plane/latest").resolve() for moment in moments}
    command = [sys.executable, "-c", KILLED, str(made["at391"]), str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["commit", "-9", "tag", "-9", "link", "-9"], done.stderr
    for moment in moments:
        published = tmp_path / moment
        cube = published_cube(published).load()
        assert cube.sizes["init_time"] == (1 if moment == "commit" else 2)
        assert np.isfinite(cube["pm2p5"]).all()
        assert (published / "plane/latest").resolve() == pages[moment]
        put(made["at391"], published, 2)
        assert published_cube(published).sizes["init_time"] == 2
        messages, tags = _commits(published)
        assert len(messages) == len(tags) == 2
        assert json.loads((published / "plane/latest/receipt.json").read_text())["runs"][0]["frame"] == 391


def read_on(published: Path, allowed: dict[str, np.ndarray], stop: Event, found: Queue[tuple[int, list[str]]]) -> None:
    """Read until told to stop; report each number of runs when it is first seen, and what was not as it was published."""
    seen: set[int] = set()
    while not stop.is_set():
        cube = published_cube(published).load()
        number = cube.sizes["init_time"]
        wrong = [name for i, name in enumerate(list(allowed)[:number]) if not np.array_equal(cube["pm2p5"][i], allowed[name])]
        plain = xr.load_dataset(published / "plane/latest" / "forecast.nc")
        if not np.isfinite(plain["pm2p5"]).all():
            wrong.append("latest")
        if wrong or number not in seen:
            found.put((number, wrong))
        seen.add(number)


def test_readers_during_publication_see_whole_runs_only(made: dict[str, Path], tmp_path: Path) -> None:
    """In a process of its own, as readers are: the netCDF library is not made for two threads of one."""
    put(made["at390"], tmp_path)
    allowed = {name: _original(made[name]) for name in ("at390", "at391", "at392")}
    context = multiprocessing.get_context("spawn")
    stop, found = context.Event(), context.Queue()
    reader = context.Process(target=read_on, args=(tmp_path, allowed, stop, found), daemon=True)
    reader.start()
    try:
        reports = [found.get(timeout=120)]
        for number, name in enumerate(("at391", "at392")):
            put(made[name], tmp_path, number + 1)
        while reports[-1][0] != 3:
            reports.append(found.get(timeout=120))
    finally:
        stop.set()
        reader.join(60)
    assert [wrong for _, wrong in reports if wrong] == []
    assert reader.exitcode == 0


def test_the_latest_file_has_a_plain_time_axis(made: dict[str, Path], tmp_path: Path) -> None:
    put(made["at390"], tmp_path)
    latest = xr.load_dataset(tmp_path / "plane/latest/forecast.nc")
    assert latest["pm2p5"].dims == ("time", "latitude", "longitude")
    assert latest["init_time"].ndim == 0
    assert latest["pm2p5"].attrs["units"] == "ug m-3"
    assert latest.attrs["license"] == "CC-BY-4.0"
    np.testing.assert_array_equal(latest["pm2p5_q95"], _original(made["at390"])[:, 4])
    at_stations = xr.load_dataset(tmp_path / "plane/latest/stations.nc")
    assert at_stations["pm2p5"].dims == ("time", "station")


def test_old_pages_do_not_pile_up(made: dict[str, Path], tmp_path: Path) -> None:
    for number, name in enumerate(("at390", "at391", "at392")):
        put(made[name], tmp_path, number)
    runs = [path.name for path in (tmp_path / "plane/runs").iterdir() if path.is_dir()]
    assert sorted(runs) == ["2015-09-04T23Z-2", "2015-09-05T00Z-3"]
    assert os.readlink(tmp_path / "plane/latest") == "runs/2015-09-05T00Z-3"


def test_simulations_are_published_in_model_time(tmp_path: Path) -> None:
    folder = forecasts.make(tmp_path, worlds.waves(), init="case", max_lead=4)
    assert put(folder, tmp_path / "out").tag == "t4"
    cube = published_cube(tmp_path / "out")
    assert list(cube["lead_time"].values) == [0.0, 2.0, 4.0]
    assert xr.load_dataset(tmp_path / "out/plane/latest/forecast.nc")["vorticity"].dims == ("time", "y", "x")


def test_the_receipt_names_everything_the_forecast_depends_on(made: dict[str, Path], tmp_path: Path) -> None:
    stages = {
        "ingest@beijing": {
            "deps": [{"path": "data/raw/beijing", "md5": "aa.dir"}],
            "outs": [{"path": "data/ingested/plane", "md5": "bb.dir"}],
        },
        "train": {
            "deps": [{"path": "data/ingested/plane/observations", "md5": "cc.dir"}],
            "outs": [{"path": "data/runs/plane", "md5": "dd.dir"}],
            "params": {"params.yaml": {"train.plane.steps": 7}},
        },
        "forecast": {"deps": [{"path": "data/runs/plane", "md5": "dd.dir"}], "outs": [{"path": "data/forecasts/plane", "md5": "ee.dir"}]},
        "other": {"deps": [], "outs": [{"path": "data/runs/planet", "md5": "ff"}]},
    }
    lock = tmp_path / "dvc.lock"
    lock.write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}))
    repository = Path(__file__).parents[1]
    paper = receipt.build(
        made["at390"],
        output="data/forecasts/plane",
        lock=lock,
        repository=repository,
        settings={"model": "plane"},
        inputs={"seen": [1]},
        now=NOW,
    )
    assert [stage["stage"] for stage in paper["lineage"]] == ["forecast", "ingest@beijing", "train"]
    assert paper["lineage"][1]["deps"] == {"data/raw/beijing": "md5:aa.dir"}
    assert paper["lineage"][2]["params"] == {"params.yaml": {"train.plane.steps": 7}}
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, capture_output=True, text=True, check=True).stdout.strip()
    assert paper["git"]["commit"] == commit
    assert paper["published_at"] == "2026-11-22T06:00:00Z"
    assert paper["weights_sha256"] == json.loads((made["at390"].parent / "run/run.json").read_text())["weights_sha256"]
    assert paper["libraries"]["icechunk"] == icechunk.__version__
    with pytest.raises(ValueError, match="no stage makes data/forecasts/moon"):
        receipt.build(made["at390"], output="data/forecasts/moon", lock=lock, repository=None, settings={}, inputs={}, now=NOW)


def test_the_receipt_travels_with_the_commit(made: dict[str, Path], tmp_path: Path) -> None:
    put(made["at390"], tmp_path)
    last = next(iter(publish.open_repository(tmp_path / "plane/forecast.icechunk").ancestry(branch="main")))
    on_disk = json.loads((tmp_path / "plane/latest/receipt.json").read_text())
    assert last.metadata["receipt"] == on_disk
    assert on_disk["forecast_sha256"] == receipt.tree_sha256(made["at390"])
    assert on_disk["inputs"] == {"seen": ["plane"], "missing": ["era5"]}
