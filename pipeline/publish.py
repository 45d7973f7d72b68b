"""Publish a forecast: append it to an Icechunk repository in one commit, then swap the pages that show it in one step.

    PUBLISHED/KEY/forecast.icechunk   every run published, appended along init_time; one commit and one tag a run
    PUBLISHED/KEY/latest -> runs/RUN  forecast.nc, stations.nc (plain time axis, for viewers), receipt.json, map.html, report.html, ...
    PUBLISHED/KEY/refused.json        why the last forecast was not published; absent when it was
    PUBLISHED/index.html              what there is

The commit is the publication. Readers of the repository keep their snapshot, readers of `latest` follow a link that is replaced whole, so
nobody sees half a run; what a killed publication left undone is done by the next one. Local storage takes one writer: a lock sees to it.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import icechunk
import jinja2
import numpy as np
import xarray as xr
import zarr
from pydantic import Field

from pipeline import atomic, map_page, sanity, utc
from pipeline import cube as cubes

BRANCH = "main"


class Params(sanity.Limits):
    """Section `publish.KEY`."""

    model: str  # which model's forecast is published
    title: str
    license: str = Field(min_length=1)  # SPDX identifier of the data, or LicenseRef-...
    attribution: str = Field(min_length=1)


@dataclass(frozen=True)
class Outcome:
    status: Literal["published", "unchanged", "refused"]
    tag: str | None  # of the run in the repository, None where it was refused
    reasons: tuple[str, ...] = ()


def publish(
    forecast: Path, published: Path, key: str, params: Params, receipt: Mapping[str, Any], now: datetime, pages: Mapping[str, Path]
) -> Outcome:
    """Publish a forecast folder as `key`, or refuse it and leave the last good one in place.

    `receipt` comes from pipeline/receipt.py; `pages` are files by the name they get (report.html, quality.html, summary.json of the
    report), those that do not exist are left out. The same forecast again makes no new commit.
    """
    folder = published / key
    folder.mkdir(parents=True, exist_ok=True)
    with _one_writer(folder):
        summary = json.loads((forecast / "forecast.json").read_text(encoding="utf-8"))
        try:
            cube, stations = cubes.read_folder(forecast)
            reasons = sanity.refusals(cube, stations, summary, params, now)
        except ValueError as error:
            reasons = [str(error)]
        if reasons:
            refusal = {"at": utc.text(now), "dataset": key, "model": params.model, "reasons": reasons, "runs": summary["runs"]}
            atomic.write_text(folder / "refused.json", json.dumps(refusal, indent=1) + "\n")
            write_index(published)
            return Outcome("refused", None, tuple(reasons))
        repository = open_repository(folder / "forecast.icechunk", create=True)
        last = next(iter(repository.ancestry(branch=BRANCH)))
        unchanged = last.metadata.get("receipt", {}).get("forecast_sha256") == receipt["forecast_sha256"]
        attributes = {"title": params.title, "license": params.license, "acknowledgement": params.attribution}
        cube, stations = cube.assign_attrs(attributes), None if stations is None else stations.assign_attrs(attributes)
        if unchanged:  # also after a kill between the commit and what follows it
            receipt, tag = last.metadata["receipt"], last.metadata["tag"]
        else:
            tag = _free_tag(repository, cube["init_time"].values[-1])
            issued = np.datetime64(now.astimezone(UTC).replace(tzinfo=None), "s")
            _commit(repository, _issued(cube, issued), None if stations is None else _issued(stations, issued), tag, receipt)
        if tag not in repository.list_tags():
            repository.create_tag(tag, repository.lookup_branch(BRANCH))
        _write_pages(folder, tag, forecast, cube, stations, params, receipt, pages)
        atomic.remove(folder / "refused.json")
        write_index(published)
        return Outcome("unchanged" if unchanged else "published", tag)


def open_repository(path: Path, create: bool = False) -> icechunk.Repository:
    """The Icechunk repository at `path`; one that does not exist is an error unless it is to be created."""
    if not create and not path.exists():
        raise ValueError(f"{path} does not exist: nothing was published there yet")
    icechunk.set_logs_filter("error")  # it warns of several writers at each opening; `publish` sees to it that there is one
    storage = icechunk.local_filesystem_storage(str(path))
    return icechunk.Repository.open_or_create(storage) if create else icechunk.Repository.open(storage)


def state(published: Path) -> list[dict[str, Any]]:
    """What is published: key, receipt, pages, the report's headline and the last refusal of each dataset, in order of keys."""
    result = []
    for folder in sorted(path for path in published.glob("*") if path.is_dir()):
        receipt, refusal = folder / "latest" / "receipt.json", folder / "refused.json"
        summary = folder / "latest" / "summary.json"
        if receipt.exists() or refusal.exists():
            result.append(
                {
                    "key": folder.name,
                    "receipt": json.loads(receipt.read_text(encoding="utf-8")) if receipt.exists() else None,
                    "pages": [page.stem for page in sorted((folder / "latest").glob("*.html"))],
                    "headline": json.loads(summary.read_text(encoding="utf-8"))["headline"] if summary.exists() else [],
                    "refused": json.loads(refusal.read_text(encoding="utf-8")) if refusal.exists() else None,
                }
            )
    return result


def write_index(published: Path) -> None:
    """Render index.html from what is published now."""
    atomic.write_text(published / "index.html", environment().get_template("index.html").render(entries=state(published)))


def environment() -> jinja2.Environment:
    return jinja2.Environment(loader=jinja2.PackageLoader("pipeline"), autoescape=True, undefined=jinja2.StrictUndefined)


def _commit(
    repository: icechunk.Repository,
    cube: xr.Dataset,
    stations: xr.Dataset | None,
    tag: str,
    receipt: Mapping[str, Any],
) -> None:
    """Merge the new runs into the repository and commit, unless the result would break the contract: then nothing was written."""
    session = repository.writable_session(BRANCH)
    groups = [(None, cube), *([(cubes.STATIONS, stations)] if stations is not None else [])]
    old = {group: _existing(repository, group) for group, _ in groups}
    message = f"Publish {tag}"
    changed = [difference for group, new in groups if (before := old[group]) is not None for difference in cubes.same_layout(before, new)]
    if changed or old[None] is None or any(before is None for before in old.values()):
        if old[None] is not None:  # the cube so far stays under its tags
            message += f"; start anew: {'; '.join(changed) or 'stations were added'}"
        cubes.write(session.store, cube, stations)
    else:
        for group, new in groups:
            before = old[group]
            assert before is not None
            _merge(session.store, group, before, new)
    zarr.open_group(session.store, mode="r+").attrs.update({**cube.attrs, "date_issued": receipt["published_at"]})
    problems = cubes.check(cubes.read(session.store))
    if problems:  # the session is dropped with its writes
        raise ValueError(f"{tag} would break the published cube, nothing was committed:\n  " + "\n  ".join(problems))
    session.commit(message, metadata={"tag": tag, "receipt": dict(receipt)})


def _existing(repository: icechunk.Repository, group: str | None) -> xr.Dataset | None:
    store = repository.readonly_session(BRANCH).store
    try:
        return cubes.read(store, group)
    except (FileNotFoundError, KeyError):  # a fresh repository, or one without stations
        return None


def _merge(store: Any, group: str | None, old: xr.Dataset, new: xr.Dataset) -> None:
    """Put the runs of `new` where they belong along init_time: replace, append, or insert between older ones."""
    common: dict[str, Any] = {"group": group, "zarr_format": 3, "consolidated": False}
    along = new.drop_vars([name for name, variable in new.variables.items() if "init_time" not in variable.dims])
    known, wanted = old["init_time"].values, new["init_time"].values
    if set(wanted) <= set(known):
        for index, init_time in enumerate(wanted):
            place = int(np.flatnonzero(known == init_time)[0])
            one = along.isel(init_time=slice(index, index + 1))
            one.to_zarr(store, mode="r+", region={"init_time": slice(place, place + 1)}, **common)
    elif wanted[0] > known[-1]:
        new.to_zarr(store, append_dim="init_time", **common)
    else:  # rare, and costs a rewrite; lazy, one run at a time
        kept = old.isel(init_time=~np.isin(known, wanted)).chunk({"init_time": 1}).drop_encoding()
        both = xr.concat([kept, new], "init_time", data_vars="minimal", coords="minimal", compat="override").sortby("init_time")
        both = both.assign_coords({name: coordinate.load() for name, coordinate in both.coords.items()})
        both.to_zarr(store, mode="w", encoding=cubes.encoding(both), **common)


def _issued(dataset: xr.Dataset, issued: np.datetime64) -> xr.Dataset:
    attributes = {"long_name": "time the forecast was published"}
    return dataset.assign_coords(issue_time=("init_time", np.full(dataset.sizes["init_time"], issued), attributes))


def _free_tag(repository: icechunk.Repository, init_time: Any) -> str:
    """`2017-02-28T15Z`, or `t12.5` in model time; a tag cannot be moved, so a run published again gets `.2`, `.3`, ..."""
    calendar = np.asarray(init_time).dtype.kind == "M"
    name = f"{np.datetime_as_string(init_time, unit='m')}Z".replace(":00Z", "Z").replace(":", "") if calendar else f"t{float(init_time):g}"
    taken = repository.list_tags()
    return next(tag for n in range(1, len(taken) + 2) if (tag := name if n == 1 else f"{name}.{n}") not in taken)


def _write_pages(
    folder: Path,
    tag: str,
    forecast: Path,
    cube: xr.Dataset,
    stations: xr.Dataset | None,
    params: Params,
    receipt: Mapping[str, Any],
    pages: Mapping[str, Path],
) -> None:
    """Make a folder of everything about the latest run, and let `latest` point to it."""
    current = os.readlink(folder / "latest") if (folder / "latest").is_symlink() else ""
    number = 1 + max((int(path.name.rsplit("-", 1)[1]) for path in (folder / "runs").glob("*-*") if path.is_dir()), default=0)
    with atomic.writing(folder / "runs" / f"{tag}-{number}") as run:
        run.mkdir()
        plain(cube).to_netcdf(run / "forecast.nc", engine="netcdf4")
        if stations is not None:
            plain(stations).to_netcdf(run / "stations.nc", engine="netcdf4")
        (run / "receipt.json").write_text(json.dumps(receipt, indent=1) + "\n", encoding="utf-8")
        (run / "map.html").write_text(map_page.render(forecast, params, receipt["published_at"]), encoding="utf-8")
        for name, page in pages.items():
            if page.exists():
                shutil.copyfile(page, run / name)
    link = folder / ".latest.tmp"
    atomic.remove(link)
    link.symlink_to(f"runs/{tag}-{number}")
    os.replace(link, folder / "latest")
    kept = {f"{tag}-{number}", Path(current).name}
    for old in (folder / "runs").iterdir():
        if old.is_dir() and old.name not in kept:
            atomic.remove(old)


def plain(dataset: xr.Dataset) -> xr.Dataset:
    """The last run as viewers want it: dims (time, latitude, longitude) or (time, y, x) or (time, station), one array per quantile.

    The median keeps the variable's name, other levels become e.g. `pm2p5_q05`; init_time is a scalar.
    """
    last = dataset.isel(init_time=-1)
    arrays = {}
    for name in cubes.variables(dataset):
        for level in last["quantile"].values if "quantile" in last.dims else [0.5]:
            one = last[name].sel(quantile=level, drop=True) if "quantile" in last.dims else last[name]
            suffix = "" if level == 0.5 else f"_q{100 * level:02.0f}"
            arrays[f"{name}{suffix}"] = one.assign_attrs(quantile=float(level))
    extra = {"distance_to_sensor": last["distance_to_sensor"]} if "distance_to_sensor" in last else {}
    crs = {"crs": last["crs"]} if "crs" in last else {}
    result = xr.Dataset({**arrays, **extra, **crs}, attrs=dataset.attrs)
    result = (
        result.rename(valid_time="time").swap_dims(lead_time="time").drop_vars(["lead_time", "trajectory", "quantile"], errors="ignore")
    )
    if "latitude" in result.coords and "y" in result.dims:
        result = result.swap_dims(y="latitude", x="longitude")
    return result


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    with (folder / ".lock").open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
