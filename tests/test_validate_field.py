"""The validate stage on fields: a sound wave, and the faults a frame can have."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import yaml

from pipeline import params, qc, validate
from tests import worlds

ROOT = Path(__file__).parents[1]


def gate(key="era5_uk", rules=(), **changes):
    section = yaml.safe_load((ROOT / "params.yaml").read_text())["validate"][key]
    section = {**section, **changes, "rules": {**section["rules"], **dict(rules)}}
    return params.validated(section, validate.params_model(key), f"validate.{key}")


def weather(hours: int = 96, shift: float = 0.0) -> xr.Dataset:
    """Temperature over southern England, warmest at 15 h local solar time; `shift` hours late."""
    time = pd.date_range("2019-03-01", periods=hours, freq="h")
    latitude, longitude = np.linspace(50, 53, 7), np.linspace(-4, 1, 9)
    hour = time.hour.to_numpy() - shift
    cycle = 5 * np.cos(2 * np.pi * (hour - 15) / 24)
    space = latitude[:, None] * -0.5 + 0.3 * np.sin(longitude)[None]
    value = 305 + cycle[:, None, None] + space[None] + 0.01 * np.arange(hours)[:, None, None]
    array = (("time", "y", "x"), value.astype("f4"), {"units": "K"})
    coordinates = {"time": time, "latitude": ("y", latitude), "longitude": ("x", longitude)}
    attributes = {"title": "Test weather", "license": "CC0-1.0", "source": "a formula", "history": "", "geometry": "plane"}
    return xr.Dataset({"t2m": array}, coords=coordinates, attrs=attributes)


def run(tmp_path: Path, field: xr.Dataset, name: str = "checked", **changes) -> tuple[dict, pd.DataFrame]:
    folder = tmp_path / f"{name}-in"
    folder.mkdir()
    worlds.write_field(field, folder / "field.zarr")
    (folder / "ingest.json").write_text(json.dumps({"source": "era5", "attribution": "A formula", "raw": {"a.nc": {"sha256": "00ff"}}}))
    validate.run(gate(**changes), "era5_uk", ingested=folder, out=tmp_path / name)
    return json.loads((tmp_path / name / "report.json").read_text()), pd.read_parquet(tmp_path / name / "frames.parquet")


def test_sound_field_passes(tmp_path):
    report, frames = run(tmp_path, weather())
    assert (frames["flag_aggregate"] == qc.PASS).all()
    assert frames[["trajectory", "time"]].columns.tolist() == ["trajectory", "time"]
    assert all(rule["passed"] for rule in report["rules"].values())
    assert report["frames"] == len(frames) == 96
    assert frames["t2m_mean"].to_numpy() == pytest.approx(weather()["t2m"].mean(("y", "x")).to_numpy(), abs=1e-4)


def test_faulty_frames_are_flagged_and_their_neighbours_are_not(tmp_path):
    field = weather()
    value = field["t2m"].values
    value[10] = np.nan  # empty
    value[20, 2, 3] = np.nan  # partly empty
    value[30, 0, 0] = 1e20
    value[40] = value[39]  # frozen
    value[60:] += 12  # jump
    report, frames = run(tmp_path, field)
    assert frames["flag_missing"][10] == qc.FAIL
    assert frames["flag_missing"][20] == qc.SUSPECT
    assert frames["flag_gross_range"][30] == qc.FAIL
    assert frames["flag_flat_line"][40] == qc.FAIL
    assert frames["flag_rate_of_change"][60] == qc.SUSPECT
    assert frames["flag_aggregate"][[10, 20, 30, 40, 60]].tolist() == [4, 3, 4, 4, 3]
    around_the_fill_value = [30, 31]
    sound = frames.drop(index=[10, 20, 40, 60, *around_the_fill_value])
    assert (sound["flag_aggregate"] == qc.PASS).all()
    assert report["empty_frames"] == 1
    for rule in ("no_empty_frame", "no_missing_cells", "in_range", "not_frozen", "no_jump"):
        assert not report["rules"][rule]["passed"], rule


def test_empty_frame_can_block(tmp_path):
    field = weather()
    field["t2m"].values[10] = np.nan
    with pytest.raises(ValueError, match=r"no_empty_frame: 1 of 96 .*\n.*blocked/page\.html"):
        run(tmp_path, field, rules={"no_empty_frame": {"severity": "block"}})
    assert not (tmp_path / "checked").exists()
    assert (tmp_path / "checked.blocked" / "page.html").exists()


def test_cells_that_are_never_there_are_no_fault(tmp_path):
    field = weather()
    field["t2m"].values[:, :3, :3] = np.nan
    field["t2m"].values[50, 4, 4] = np.nan
    report, frames = run(tmp_path, field)
    assert frames["flag_missing"].tolist() == [1] * 50 + [3] + [1] * 45
    assert report["rules"]["no_missing_cells"]["offenders"] == 1


def test_uniform_frames_are_not_frozen(tmp_path):
    """Radiation is nothing at all, everywhere, night after night."""
    field = weather()
    field["t2m"].values[20:26] = 280.0
    _, frames = run(tmp_path, field)
    assert (frames["flag_flat_line"][20:26] == qc.NOT_EVALUATED).all()


def test_missing_hour_is_a_gap(tmp_path):
    report, frames = run(tmp_path, weather().isel(time=[*range(40), *range(42, 96)]))
    assert np.flatnonzero(frames["flag_gap"] == qc.SUSPECT).tolist() == [40]
    assert not report["rules"]["steady_steps"]["passed"]


def test_local_time_taken_for_utc_is_noticed(tmp_path):
    report, _ = run(tmp_path, weather(shift=8))
    assert not report["rules"]["daily_cycle"]["passed"]
    report, _ = run(tmp_path, weather().isel(time=slice(0, None, 6)), "six-hourly")
    assert report["rules"]["daily_cycle"]["evaluated"] == 0


def test_trajectories_do_not_see_each_other(tmp_path):
    rng = np.random.default_rng(0)
    value = np.cumsum(rng.normal(size=(3, 6, 4, 4)), axis=1).astype("f4")
    value[1] += 100  # another history, not a jump
    value[2, 3] = value[2, 2]
    axis = np.arange(4) / 4
    field = xr.Dataset(
        {"vorticity": (("trajectory", "time", "y", "x"), value, {"units": "1"})},
        coords={"seed": ("trajectory", [0, 1, 2]), "time": np.arange(6.0), "y": axis, "x": axis},
        attrs={"title": "Walks", "license": "CC0-1.0", "source": "a formula", "history": "", "geometry": "torus"},
    )
    _, frames = run(tmp_path, field, key="ns")
    assert frames["flag_flat_line"].to_numpy().reshape(3, 6).tolist() == [[2, 1, 1, 1, 1, 1], [2, 1, 1, 1, 1, 1], [2, 1, 1, 4, 1, 1]]
    assert (frames["flag_rate_of_change"] <= qc.NOT_EVALUATED).all()


def test_same_bytes_again_and_a_page_that_needs_no_network(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        run(folder, weather())
    for name in ("report.json", "page.html", "frames.parquet"):
        assert (first / "checked" / name).read_bytes() == (second / "checked" / name).read_bytes(), name
    page = (first / "checked" / "page.html").read_text()
    assert "A formula" in page
    assert "00ff" in page
    for foreign in ("http://", "https://", "src=", "@import", "url("):
        assert foreign not in page


def test_kind_must_agree_with_the_data(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with pytest.raises(ValueError, match=r"holds observations, but params\.yaml says validate\.era5_uk\.kind: field"):
        validate.run(gate(), "era5_uk", ingested=folder, out=tmp_path / "out")
