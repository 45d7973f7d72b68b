"""ERA5 (Copernicus/C3S, doi 10.24381/cds.adbb2d47) in every layout it comes in, as one CF field.

    CDS netCDF now       dim `valid_time`; `number`; `expver` a scalar or one a time step
    CDS netCDF before    dim `time`, packed int16, sometimes an `expver` dimension (1, 5) whose members fill each other's gaps
    GRIB                 through cfgrib; analyses by `time`, accumulations by `time` and `step`; netCDF that cfgrib wrote
    CDS zip              the netCDF files inside; a request that mixes instants and sums arrives like this, whatever its suffix
    Zarr by URL          ARCO-ERA5, WeatherBench2: long names, 0..360, either order of axes and latitudes; only what the box needs is read

ARCO-ERA5 is gs://gcp-public-data-arco-era5/ar/full_37-1h-0p25deg-chunk-1.zarr-v3. A chunk is an hour of the whole globe, 4 MB a variable
before compression, so a month of one city reads 3 GB: a store is read only where `url` asks for it, with a box and a period.

Layouts are told apart by what is in a file, never by its name. `expver` 0001 is final, 0005 preliminary (ERA5T): kept for every time
step, so that a later run can ask again for what was preliminary. Accumulations are of the hour that ends at the label.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import dask
import numpy as np
import pandas as pd
import xarray as xr
from pydantic import Field, field_validator, model_validator

from pipeline import fields, lexicon
from pipeline.params import Section
from pipeline.raw import Drop, Remote

PRELIMINARY, UNKNOWN = "0005", "unknown"
SENTINELS = (-999.0, -9999.0, -32767.0)  # and whatever the file declares, and anything as large as 1e19
HUGE = 1e19


_DELHI = "https://github.com/abdullahhrashid/air-quality-forecasting-using-classical-machine-learning/raw/ea7b1d4f96ba8258232ca4be83455e47a0797d2a"

DROP = Drop(
    licence="LicenseRef-Copernicus",
    attribution="Contains modified Copernicus Climate Change Service information",
    page="https://doi.org/10.24381/cds.adbb2d47",
    mirror=("era5*.nc", "era5*.grib", "era5*.zip"),
    official=(  # the Climate Data Store needs an account, so these are its files where others published them unchanged
        Remote(
            path="era5-2mt-2019-03-uk.grib",
            url="https://github.com/pydata/xarray-data/raw/ad8beddce86c0395426c3e72a4ef0fa0ddcb48f0/era5-2mt-2019-03-uk.grib",
            sha256="e5e82609f0e28e84822852e15d20c88dbb4b142a30264a7e6f87b9b5c7501df9",
        ),
        Remote(
            path="era5_delhi_blh_ssr_2025_cds_original_mixed_expver.nc",
            url=f"{_DELHI}/data/raw/solar/2025.nc",
            sha256="9aba95d2103967515797375d6b05f256a6d53104f584c22e6cd14b4672231c8b",
            optional=True,
        ),
    ),
)


@dataclass(frozen=True)
class Known:
    """A variable: the names it goes by, and whether it is summed over the hour before its label."""

    names: tuple[str, ...]
    accumulated: bool = False


VARIABLES = {
    "t2m": Known(("t2m", "2t", "2m_temperature")),
    "d2m": Known(("d2m", "2d", "2m_dewpoint_temperature")),
    "u10": Known(("u10", "10u", "10m_u_component_of_wind")),
    "v10": Known(("v10", "10v", "10m_v_component_of_wind")),
    "blh": Known(("blh", "boundary_layer_height")),
    "sp": Known(("sp", "surface_pressure")),
    "msl": Known(("msl", "mean_sea_level_pressure")),
    "tcc": Known(("tcc", "total_cloud_cover")),
    "tp": Known(("tp", "total_precipitation"), accumulated=True),
    "ssr": Known(("ssr", "surface_net_solar_radiation"), accumulated=True),
}

# Factor from a unit as sources spell it to the lexicon's unit. Spelling is compared without blanks and `**`.
UNITS = {
    ("K", "K"): 1.0,
    ("m", "m"): 1.0,
    ("mofwaterequivalent", "m"): 1.0,
    ("ms-1", "m s-1"): 1.0,
    ("m/s", "m s-1"): 1.0,
    ("Pa", "Pa"): 1.0,
    ("hPa", "Pa"): 100.0,
    ("(0-1)", "1"): 1.0,
    ("0-1", "1"): 1.0,
    ("1", "1"): 1.0,
    ("%", "1"): 0.01,
    ("Jm-2", "W m-2"): 1 / 3600,  # the energy of one hour
    ("Wm-2", "W m-2"): 1.0,
}

_DIMS = ("time", "latitude", "longitude")
_PLACES = {"longitude": ("lon", "long"), "latitude": ("lat",)}


class Box(Section):
    """Degrees; edges belong to the box."""

    north: float = Field(ge=-90, le=90)
    west: float = Field(ge=-180, le=180)
    south: float = Field(ge=-90, le=90)
    east: float = Field(ge=-180, le=180)

    @model_validator(mode="after")
    def _ordered(self) -> Box:
        if self.south >= self.north or self.west >= self.east:
            raise ValueError(f"needs south < north and west < east (-180..180), found {self.south}..{self.north}, {self.west}..{self.east}")
        return self


class Params(Section):
    """Which files, or which Zarr store, and what of it."""

    source: Literal["era5"]
    files: tuple[str, ...] = ()  # names below data/raw/era5, * allowed
    url: str | None = None  # a Zarr store: https://..., gs://..., or any address fsspec reads
    variables: tuple[str, ...] = Field(min_length=1)
    box: Box | None = None
    period: tuple[datetime, datetime] | None = None  # UTC where no offset is given; both ends belong to it

    @field_validator("variables")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        unknown = [name for name in names if name not in VARIABLES]
        if unknown:
            raise ValueError(f"unknown {', '.join(unknown)}; pipeline/sources/era5.py reads {', '.join(VARIABLES)}")
        return names

    @model_validator(mode="after")
    def _one_place(self) -> Params:
        if bool(self.files) == bool(self.url):
            raise ValueError(f"give either files or url, found {'both' if self.files else 'neither'}")
        if self.url and (self.box is None or self.period is None):
            raise ValueError("a url needs a box and a period: the stores are global, decades long and read in whole-globe hours")
        if self.period and _utc(self.period[1]) < _utc(self.period[0]):
            raise ValueError(f"the period ends before it starts: {self.period[0]} to {self.period[1]}")
        return self


def _utc(moment: datetime) -> np.datetime64:
    return np.datetime64(moment.astimezone(UTC).replace(tzinfo=None) if moment.tzinfo else moment)


def field(params: Params, raw: Path, out: Path) -> dict[str, Any]:
    """Write `out`/field.zarr from the files in `raw`, or from a Zarr store, and say what was done, with counts.

    Raises ValueError with every mismatch of every file: unreadable or cut files, absent variables, unknown units, axes that are no
    latitude-longitude grid, grids or times that do not fit together, a box or period outside the data.
    """
    problems: list[str] = []
    outside: list[str] = []
    parts: list[_Part] = []
    found: set[str] = set()
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as open_files:
        for name, dataset in _opened(params, raw, Path(scratch), problems):
            open_files.callback(dataset.close)
            found |= set(map(str, dataset.data_vars))
            part = _part(name, dataset, params, problems, outside)
            if part is not None:
                parts.append(part)
        if not problems and not parts and outside:
            problems += outside
        if not problems:
            absent = [name for name in params.variables if not any(name in part.values for part in parts)]
            if absent:
                problems.append(f"no {', '.join(absent)} anywhere; found {', '.join(sorted(found)) or 'nothing'}")
            problems += _unlike(parts, [name for name in params.variables if name not in absent])
        if problems:
            raise ValueError("ERA5 input cannot be used:\n  " + "\n  ".join(problems))
        return _write(params, parts, out / "field.zarr")


@dataclass(frozen=True)
class _Part:
    """What one hypercube of one file gives, still unread: arrays (time, latitude, longitude) in source units, space already increasing."""

    name: str
    values: dict[str, xr.DataArray]
    aliases: dict[str, str]  # our name -> the file's
    time: np.ndarray
    expver: np.ndarray  # one text a time step
    latitude: np.ndarray
    longitude: np.ndarray


# Opening ------------------------------------------------------------------------------------------------------------------------------


def _opened(params: Params, raw: Path, scratch: Path, problems: list[str]) -> Iterator[tuple[str, xr.Dataset]]:
    if params.url:
        try:
            yield params.url, _open_store(params.url)
        except Exception as error:  # whatever the store's client raises
            problems.append(f"{params.url} cannot be opened as Zarr: {type(error).__name__}: {error}")
        return
    for pattern in params.files:
        matches = sorted(path for path in raw.glob(pattern) if path.is_file())
        if not matches:
            held = ", ".join(sorted(path.name for path in raw.glob("*"))) if raw.is_dir() else "no such folder"
            problems.append(f"no file {pattern} in {raw} ({held or 'empty'}): fetch it first")
        for path in matches:
            try:
                for dataset in _open_file(path, scratch):
                    yield path.name, dataset
            except Exception as error:  # each library has its own
                reason = str(error) or type(error).__name__
                problems.append(f"{path.name} cannot be read ({reason}): if it was cut short, fetch it again")


def _open_store(url: str) -> xr.Dataset:
    # Google's public buckets answer to plain HTTPS, so no cloud client is needed.
    return xr.open_zarr(re.sub(r"^gs://", "https://storage.googleapis.com/", url), chunks=None)


def _open_file(path: Path, scratch: Path) -> list[xr.Dataset]:
    """The hypercubes of a file, told by its first bytes."""
    with path.open("rb") as handle:
        magic = handle.read(4)
    if magic == b"PK\x03\x04":
        return [dataset for inside in _unzipped(path, scratch / path.name) for dataset in _open_file(inside, scratch)]
    if magic == b"GRIB":
        import cfgrib

        # No index file beside the raw file, and no skipping of broken messages.
        return cfgrib.open_datasets(str(path), backend_kwargs={"indexpath": "", "errors": "raise"})
    if magic[:3] == b"CDF":
        return [xr.open_dataset(path, engine="scipy")]  # netCDF's own library reads the absent end of a cut file as zeros
    if magic == b"\x89HDF":
        return [xr.open_dataset(path, engine="netcdf4")]
    raise ValueError(f"it starts with {magic!r}, which is neither netCDF, GRIB nor zip")


def _unzipped(path: Path, folder: Path) -> list[Path]:
    with zipfile.ZipFile(path) as archive:
        size = sum(member.file_size for member in archive.infolist())
        if size > 100 * path.stat().st_size:
            raise ValueError(f"it would grow from {path.stat().st_size} to {size} bytes, which no ERA5 file does")
        archive.extractall(folder)
    return sorted(inside for inside in folder.rglob("*") if inside.is_file())


# One hypercube ------------------------------------------------------------------------------------------------------------------------


def _part(name: str, dataset: xr.Dataset, params: Params, problems: list[str], outside: list[str]) -> _Part | None:
    """Bring one hypercube to our names, axes, box and period without reading its values.

    None where it has none of the variables, no time in the period (then a line goes to `outside`), or does not fit (to `problems`).
    """
    aliases = {short: alias for short in params.variables for alias in VARIABLES[short].names if alias in dataset.data_vars}
    if not aliases:
        return None
    dataset = dataset.set_coords([extra for extra in ("valid_time", "step", "number", "expver") if extra in dataset.data_vars])
    dataset = dataset[list(aliases.values())].rename({alias: short for short, alias in aliases.items()})
    wrong = [problem for short in aliases if (problem := _misfit(short, dataset[short]))]
    dataset = _axes(dataset, wrong)
    if not wrong:
        latitude, longitude = _places(dataset, params.box, wrong)
    if wrong:
        problems += [f"{name}: {problem}" for problem in wrong]
        return None
    dataset = dataset.isel(latitude=latitude.index.to_numpy(), longitude=longitude.index.to_numpy())
    dataset, span = _within(dataset, params.period)
    if not dataset.sizes["time"]:
        asked = " to ".join(str(edge) for edge in params.period or ())
        outside.append(f"{name}: covers {span}, nothing of the period {asked}")
        return None
    length = fields.block_length({"time": dataset.sizes["time"], "y": len(latitude), "x": len(longitude)})
    dataset, expver = _versions(dataset.chunk(time=length))
    values = {short: dataset[short].transpose(*_DIMS).reset_coords(drop=True).drop_vars(_DIMS) for short in aliases}
    return _Part(name, values, aliases, dataset["time"].values.astype("M8[ns]"), expver, latitude.to_numpy(), longitude.to_numpy())


def _misfit(short: str, array: xr.DataArray) -> str | None:
    unit, step = array.attrs.get("units"), array.attrs.get("GRIB_stepType")
    if _factor(short, unit) is None:
        known = ", ".join(source for source, ours in UNITS if ours == lexicon.lookup(short).unit)
        return f"{short} has the unit {unit!r}, which is not one of {known}"
    expected = "accum" if VARIABLES[short].accumulated else "instant"
    return f"{short} is of step type {step!r}, expected {expected!r}" if step not in (None, expected) else None


def _factor(short: str, unit: str | None) -> float | None:
    return UNITS.get((re.sub(r"\s|\*\*", "", unit or ""), lexicon.lookup(short).unit))


def _axes(dataset: xr.Dataset, wrong: list[str]) -> xr.Dataset:
    """Dims (time, expver?, latitude, longitude), where `time` is the time the values are valid for."""
    renamed = {n: ours for ours, names in _PLACES.items() for n in names if n in dataset.variables}
    dataset = dataset.rename(renamed)
    if "valid_time" in dataset.dims:
        dataset = dataset.drop_vars("time", errors="ignore").rename(valid_time="time")
    elif "step" in dataset.dims:
        dataset = _unfolded(dataset)
    else:
        if "time" not in dataset.dims and "time" in dataset.coords:
            dataset = dataset.expand_dims("time")
        if "valid_time" in dataset.coords:  # cfgrib's `time` is the start of a forecast
            dataset = dataset.assign_coords(time=np.atleast_1d(dataset["valid_time"].values)).drop_vars("valid_time")
    single = [dim for dim, size in dataset.sizes.items() if size == 1 and dim not in (*_DIMS, "expver")]
    dataset = dataset.squeeze(single, drop=True)
    wrong += [f"no axis {dim}; found {dict(dataset.sizes)}" for dim in _DIMS if dim not in dataset.dims or dim not in dataset.coords]
    extra = {str(dim): size for dim, size in dataset.sizes.items() if dim not in (*_DIMS, "expver")}
    wrong += [f"axis {dim} of {size}: a field has time, latitude and longitude; select one first" for dim, size in extra.items()]
    if "time" in dataset.coords and not np.issubdtype(dataset["time"].dtype, np.datetime64):
        wrong.append(f"time is {dataset['time'].dtype}, expected dates of the standard calendar")
    return dataset


def _unfolded(dataset: xr.Dataset) -> xr.Dataset:
    """GRIB sums come by start and step of the forecast: one row per valid time, without the pairs that have no message."""
    pair = [dim for dim in ("time", "step") if dim in dataset.dims]
    dataset = dataset.chunk(dict.fromkeys(pair, 12)).stack(moment=pair, create_index=False)
    there = dataset.to_array().notnull().any(["variable", "latitude", "longitude"]).values
    time = dataset["valid_time"].values[there]
    dataset = dataset.drop_vars(["time", "step", "valid_time"]).isel(moment=np.flatnonzero(there))
    return dataset.rename(moment="time").assign_coords(time=time)


def _places(dataset: xr.Dataset, box: Box | None, wrong: list[str]) -> tuple[pd.Series, pd.Series]:
    """Latitudes and longitudes (-180..180) inside the box, increasing; the index of each series says where the file has them."""
    low = {"latitude": box.south, "longitude": box.west} if box else {"latitude": -90.0, "longitude": -180.0}
    high = {"latitude": box.north, "longitude": box.east} if box else {"latitude": 90.0, "longitude": 180.0}
    chosen = []
    for name in ("latitude", "longitude"):
        value = pd.Series(dataset[name].values.astype("f8").round(6))
        if name == "latitude" and value.abs().max() > 90:
            wrong.append(f"latitude runs {value.min()} to {value.max()}: are latitude and longitude swapped?")
        if name == "longitude":
            value = (value + 180) % 360 - 180
        value = value.round(6).sort_values(kind="stable").drop_duplicates()
        inside = value[value.between(low[name], high[name])]
        if inside.empty:
            wrong.append(f"no {name} in {low[name]}..{high[name]}; the data have {value.min()}..{value.max()}")
        chosen.append(inside)
    return chosen[0], chosen[1]


def _within(dataset: xr.Dataset, period: tuple[datetime, datetime] | None) -> tuple[xr.Dataset, str]:
    """The time steps of the period, and what the data span. ARCO's axis is longer than its data: attributes say how far these go."""
    if "valid_time_stop" in dataset.attrs:
        dataset = dataset.sel(time=slice(dataset.attrs.get("valid_time_start"), dataset.attrs["valid_time_stop"]))
    time = dataset["time"].values
    span = f"{time.min()} to {time.max()}" if len(time) else "no time at all"
    if period is None:
        return dataset, span
    start, end = map(_utc, period)
    inside = np.flatnonzero((time >= start) & (time <= end))
    together = len(inside) and inside[-1] - inside[0] + 1 == len(inside)
    return dataset.isel(time=slice(inside[0], inside[-1] + 1) if together else inside), span


def _versions(dataset: xr.Dataset) -> tuple[xr.Dataset, np.ndarray]:
    """The `expver` of every time step; an axis of versions is merged, final values first."""
    n = dataset.sizes["time"]
    if "expver" not in dataset.coords:
        return dataset, np.full(n, UNKNOWN)
    labels = np.array([f"{int(v):04d}" if str(v).strip().isdigit() else str(v) for v in np.atleast_1d(dataset["expver"].values)])
    if "expver" not in dataset.dims:
        return dataset, np.broadcast_to(labels, n).copy()
    first, *later = np.argsort(labels, kind="stable")
    merged, expver = dataset.isel(expver=first, drop=True), np.full(n, labels[first])
    for member in later:
        other = dataset.isel(expver=member, drop=True)
        filled = (merged.isnull() & other.notnull()).to_array().any(["variable", "latitude", "longitude"]).values
        expver[filled] = labels[member]  # a time step with any preliminary value is preliminary
        merged = merged.fillna(other)
    return merged, expver


# Together -----------------------------------------------------------------------------------------------------------------------------


def _unlike(parts: list[_Part], variables: list[str]) -> list[str]:
    """Grids that differ from the first, and variables that do not have the times of the first."""
    problems = []
    for part in parts[1:]:
        for name in ("latitude", "longitude"):
            ours, theirs = getattr(parts[0], name), getattr(part, name)
            if not np.array_equal(ours, theirs):
                problems.append(f"{part.name}: {name} {_span(theirs)} differs from {_span(ours)} in {parts[0].name}")
    times = {short: np.unique(np.concatenate([part.time for part in parts if short in part.values])) for short in variables}
    for short in variables[1:]:
        odd = np.setxor1d(times[short], times[variables[0]])
        if len(odd):
            problems.append(f"{short} and {variables[0]} do not have the same times: {len(odd)} differ, first {odd[0]}")
    return problems


def _span(axis: np.ndarray) -> str:
    return f"{axis[0]:g}..{axis[-1]:g} ({len(axis)})"


def _joined(parts: list[_Part], short: str) -> tuple[xr.DataArray, np.ndarray, np.ndarray]:
    """One variable over all parts in order of time, with its times and versions. Of a repeated time the final version, then the first
    file, is kept."""
    parts = [part for part in parts if short in part.values]
    time, expver = (np.concatenate([getattr(part, name) for part in parts]) for name in ("time", "expver"))
    order = np.lexsort((expver == PRELIMINARY, time))
    order = order[np.concatenate([[True], time[order][1:] != time[order][:-1]])]
    array = xr.concat([part.values[short] for part in parts], "time", combine_attrs="override")
    if not np.array_equal(order, np.arange(len(time))):
        array = array.isel(time=order)
    return array, time[order], expver[order]


def _write(params: Params, parts: list[_Part], path: Path) -> dict[str, Any]:
    joined = {short: _joined(parts, short) for short in params.variables}
    time = next(iter(joined.values()))[1]
    versions = np.stack([expver for _, _, expver in joined.values()])
    expver = np.where((versions == PRELIMINARY).any(axis=0), PRELIMINARY, versions[0])
    grid = xr.Dataset(
        coords={
            "time": time,
            "latitude": ("y", parts[0].latitude),
            "longitude": ("x", parts[0].longitude),
            "expver": ("time", expver.astype(object), {"long_name": "ERA5 experiment version: 0001 final, 0005 preliminary"}),
        },
        attrs={
            "title": f"ERA5 {', '.join(lexicon.lookup(name).long_name for name in params.variables)}",
            "license": DROP.licence,
            "acknowledgment": DROP.attribution,
            "references": DROP.page,
            "source": "ERA5 hourly data on single levels, ECMWF",
            "history": f"read from {params.url or ', '.join(sorted({part.name for part in parts}))}",
            "geometry": "plane",
        },
    )
    fields.create(path, grid, {short: _attributes(short) for short in params.variables})
    return {
        "source": "era5",
        "parts": [
            {"name": part.name, "variables": part.aliases, "frames": len(part.time), "expver": dict(Counter(part.expver.tolist()))}
            for part in parts
        ],
        "variables": {short: _fill(path, short, array, time) for short, (array, _, _) in joined.items()},
        "frames": len(time),
        "repeated_frames": max(sum(len(part.time) for part in parts if short in part.values) for short in params.variables) - len(time),
        "first": f"{np.datetime_as_string(time[0], unit='s')}Z",
        "last": f"{np.datetime_as_string(time[-1], unit='s')}Z",
        "latitude": _span(parts[0].latitude),
        "longitude": _span(parts[0].longitude),
        "expver": dict(Counter(expver.tolist())),
    }


def _attributes(short: str) -> dict[str, str]:
    if not VARIABLES[short].accumulated:
        return {"cell_methods": "time: point"}
    mean = lexicon.lookup(short).unit.startswith("W")
    return {"cell_methods": f"time: {'mean' if mean else 'sum'} (interval: 1 hour)", "comment": "over the hour that ends at the label"}


def _fill(path: Path, short: str, array: xr.DataArray, time: np.ndarray) -> dict[str, Any]:
    """Read one variable stretch by stretch: mask sentinels in the source's unit, convert, write. Returns the counts."""
    length = fields.block_length({"time": array.sizes["time"], "y": array.shape[1], "x": array.shape[2]})
    unit = str(array.attrs["units"])
    declared = [float(array.attrs[name]) for name in ("missing_value", "GRIB_missingValue") if name in array.attrs]
    masked = missing = 0
    empty: list[str] = []
    # One thread: a stretch is bounded, the readers of files hold a lock anyway, and Zarr fetches several chunks at a time itself.
    with dask.config.set(scheduler="synchronous"):
        for start in range(0, len(time), length):
            values = array[start : start + length].values.astype("f8")
            sentinel = np.isin(values, [*SENTINELS, *declared]) | (abs(values) >= HUGE)
            values = np.where(sentinel, np.nan, values) * _factor(short, unit)
            fields.write_block(path, short, start, values)
            absent = np.isnan(values)
            masked, missing = masked + int(sentinel.sum()), missing + int(absent.sum())
            empty += np.datetime_as_string(time[start : start + length][absent.all(axis=(1, 2))], unit="s").tolist()
    return {
        "unit": unit,
        "factor": _factor(short, unit),
        "masked_sentinels": masked,
        "missing": missing,
        "empty_frames": {"count": len(empty), "first": empty[:20]},
    }
