"""The report page: what it says follows from the numbers, and it works alone in a browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from models import registry
from pipeline import evaluate, report, runs, scores, sensors
from pipeline.bootstrap import Bootstrap
from pipeline.report import tables, verdict
from tests import forecasts, worlds
from tests.test_evaluate import Nearest, many_waves, score

TEXTS: dict[str, Any] = {"title": "An <analytic> world", "source": "Made up.", "license": "CC0-1.0", "attribution": "Nobody."}


def make(folder: Path, dataset: sensors.SensorDataset, leads: tuple[int, ...], edges: tuple[float, ...]) -> Path:
    """A report by the real stages: two baselines and one model, the model better than one of them and worse than the other."""
    sensors.write(folder / "data.zarr", dataset)
    prior = folder / "runs" / "baselines" / "nearest"
    for path, offset in (("baselines/nearest", 0.0), ("baselines/shifted", 0.6), ("mine", 0.4)):
        runs.save(folder / "runs" / path, "nearest", {"offset": offset, "scale": 0.7}, dataset.info, {"offset": torch.tensor(offset)}, 1)
    shutil.copytree(prior, folder / "runs" / "mine" / "background")
    history = pd.DataFrame({"phase": "fit", "step": [10, 20, 30], "loss": [3.0, 2.0, 1.5], "validation_loss": [3.2, 2.4, 2.5]})
    history.to_csv(folder / "runs" / "mine" / "history.csv", index=False)
    (folder / "runs" / "mine" / "summary.json").write_text(
        json.dumps({"budget": "quick", "parameters": 1234, "phases": {"fit": {"trained": 1234, "best_step": 20}}})
    )
    given = evaluate.Params(leads=leads, batch=16, distance_edges=edges, bootstrap=Bootstrap(draws=200))
    for model, run in (("baselines", "baselines"), ("mine", "mine")):
        evaluate.run(given, "world", model, sensors=folder / "data.zarr", run=folder / "runs" / run, out=folder / "scores" / model)
    (folder / "checked").mkdir()
    rules = {"in_range": {"passed": False, "severity": "warn"}}
    (folder / "checked" / "report.json").write_text(json.dumps({"rows": 1000, "suspect_share": 0.0123, "rules": rules}))
    (folder / "checked" / "page.html").write_text("<p>quality")
    build(folder, folder / "report", leads)
    return folder


def build(folder: Path, out: Path, leads: tuple[int, ...] = (0, 1)) -> None:
    paths = {name: folder / name for name in ("checked", "runs", "scores", "forecasts")}
    report.run(report.Params(**TEXTS, picture_leads=leads[:2]), "world", sensors=folder / "data.zarr", out=out, **paths)


@pytest.fixture(scope="module")
def registered() -> Iterator[None]:
    registry.BASELINES["nearest"] = "tests.test_evaluate:Nearest"
    yield
    del registry.BASELINES["nearest"]


@pytest.fixture(scope="module")
def gridded(registered: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("gridded"), many_waves(), (0, 1, 2), (0.15,))


@pytest.fixture(scope="module")
def stations(registered: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, dataset = tmp_path_factory.mktemp("stations"), worlds.stations(hours=1600)
    dataset = replace(dataset, sensor_names=(*"abcdefg", "Huairou"))
    (folder / "forecasts").mkdir()
    shutil.move(forecasts.make(folder / "made", dataset), folder / "forecasts" / "mine")
    return make(folder, dataset, (0, 3, 6), (10.0,))


def text(folder: Path) -> str:
    return (folder / "report" / "report.html").read_text(encoding="utf-8")


def test_the_page_is_small_self_contained_and_the_same_each_time(gridded: Path, tmp_path: Path) -> None:
    build(gridded, tmp_path / "again", (0, 1, 2))
    assert (tmp_path / "again" / "report.html").read_bytes() == (gridded / "report" / "report.html").read_bytes()
    page = text(gridded)
    assert len(page) < 3_000_000
    assert "An &lt;analytic&gt; world" in page
    remote = [part[:60] for part in page.split('"') if part.startswith(("http://", "https://")) and "www.w3.org" not in part]
    assert remote == []
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


def test_the_page_says_what_data_split_quality_and_recipe_it_rests_on(gridded: Path) -> None:
    page, table = text(gridded), scores.read_all(gridded / "scores")
    for said in ("Made up.", "CC0-1.0", "1.23 %", "in_range (warn)", "quality.html", table.about["cases"]["sha256"], "1,234 parameters"):
        assert said in page, said
    assert (gridded / "report" / "quality.html").read_text() == "<p>quality"
    assert json.loads((gridded / "runs" / "mine" / "run.json").read_text())["weights_sha256"] in page


def test_the_page_shows_how_validation_cases_corrected_a_model(gridded: Path, tmp_path: Path) -> None:
    assert "<h3>Calibration" not in text(gridded)
    for part in ("checked", "runs", "scores", "data.zarr"):
        shutil.copytree(gridded / part, tmp_path / part)
    tables = {"weight": [[[0.25], [0.75]], [[1.0], [1.0]]], "factor": [[[1.0], [2.5]], [[1.0], [1.0]]]}
    (tmp_path / "runs" / "mine" / "calibration.json").write_text(json.dumps({"leads": [0.0, 2.0], **tables}))
    build(tmp_path, tmp_path / "report", (0, 1, 2))
    page = text(tmp_path)
    rows = page[page.index("<h3>Calibration") :].split("</table>")[0].split("<tr>")[1:]
    assert ["lead 0" in rows[0], "lead 2" in rows[0], len(rows)] == [True, True, 2]  # at the context's sensors nothing changed
    assert [said in rows[1] for said in ("mine", "elsewhere", "0.25 × 1.00", "0.75 × 2.50")] == [True] * 4


def test_losses_are_said_like_wins(gridded: Path) -> None:
    summary = json.loads((gridded / "report" / "summary.json").read_text())
    assert summary["headline"][0].startswith("Forecast at all grid points: mine ")
    assert "loses to" in summary["headline"][1]
    assert any(line.startswith("Against its own background, nearest, mine is") and "worse in" in line for line in summary["headline"])
    page = text(gridded)
    assert "Ranking: forecast of" in page
    assert "beaten by no model" in page
    assert 'class="n better"' in page
    assert 'class="n worse"' in page


def test_pictures_of_stations_maps_and_series_are_there(stations: Path) -> None:
    page = text(stations)
    assert "held-out station Huairou" in page
    assert "context station" in page
    assert "The forecast field that" in page
    assert "PM2.5 by mine from" in page
    assert "µg/m³" in page


def judged(mine: list[float], theirs: list[float], blocks: int = 12) -> scores.Table:
    """Scores of a model, `mine`, and a baseline, `nearest`, whose RMSE in every block is about what is given by lead."""
    dataset = many_waves()
    table = scores.merge([score(dataset, Nearest()), score(dataset, Nearest(), "mine", "model")])
    about = {**table.about, "cases": {**table.about["cases"], "blocks": blocks}}
    rng = np.random.default_rng(0)
    rows = []
    template = table.blocks.iloc[0].to_dict()
    for name, errors in (("nearest", theirs), ("mine", mine)):
        for lead, error in enumerate(errors, start=1):
            for block in range(blocks):
                noise = 1 + 0.1 * rng.standard_normal()
                cell = {"model": name, "stratum": "field", "distance": "all", "lead": float(lead), "block": block}
                rows.append({**template, **cell, "n": 10, "squared": 10 * error**2 * noise, "truth_squared": 10.0})
    return scores.build(about, pd.DataFrame(rows))


def sentence(mine: list[float], theirs: list[float], blocks: int = 12) -> str:
    return verdict.headline(judged(mine, theirs, blocks))[0]


def test_the_headline_follows_the_numbers() -> None:
    assert "mine beats the best baseline at every lead (RMSE 48 to 50 % lower)" in sentence([0.5, 0.5], [1.0, 1.0])
    mixed = sentence([0.5, 1.0, 2.5], [1.0, 1.0, 1.0])
    assert "beats the best baseline at lead 1" in mixed
    assert "cannot be told from the best baseline (nearest) at lead 2" in mixed
    assert "loses to nearest at lead 3 (RMSE 2.5 times as large)" in mixed
    assert "3 blocks are too few to tell mine from the best baseline" in sentence([0.5], [1.0], blocks=3)


def test_who_does_not_forecast_does_not_speak_for_the_forecast() -> None:
    """A model with the lowest error at lead 0 alone has a better mean rank than one that answers all leads."""
    table = judged([0.5, 0.5], [1.0, 1.0])
    rows = table.blocks[(table.blocks["model"] == "mine") & (table.blocks["lead"] == 1.0)]
    early = table.blocks[table.blocks["lead"] == 1.0].assign(lead=0.0)
    now = rows.assign(model="now", lead=0.0, squared=rows["squared"] / 100)
    models = {**table.about["models"], "now": table.about["models"]["mine"]}
    with_now = scores.build({**table.about, "models": models}, pd.concat([table.blocks, early, now], ignore_index=True))
    said = verdict.headline(with_now)
    assert said[0].startswith("Forecast at all grid points: mine beats")
    assert verdict.best_model(with_now, "vorticity", "field", "reconstruction") == "now"


def test_the_ranking_orders_predictors_and_says_how_sure_that_is() -> None:
    def standing(*given: Any) -> dict[str, list[float]]:
        table = judged(*given)
        found = scores.standing(table, "rmse", "vorticity", "field", sorted(set(table.rows["lead"])))
        assert list(found["rank"]) == sorted(found["rank"])
        return {row["model"]: [row["rank"], row["low"], row["high"]] for row in found.to_dict("records")}

    assert standing([0.5, 0.5], [1.0, 1.0]) == {"mine": [1, 1, 1], "nearest": [2, 2, 2]}
    assert standing([0.5, 2.0], [1.0, 1.0]) == {"mine": [1.5, 1.5, 1.5], "nearest": [1.5, 1.5, 1.5]}
    close = standing([1.0], [1.0])
    assert {tuple(span[1:]) for span in close.values()} == {(1.0, 2.0)}, "either may be first"
    assert all(np.isnan(span[1:]).all() for span in standing([0.5], [1.0], 3).values()), "three blocks cannot say"


def test_the_ranking_says_by_lead_which_baseline_no_model_beat() -> None:
    table = judged([0.5, 1.0, 2.5], [1.0, 1.0, 1.0])
    (ranking,) = tables.rankings(table, scores.skill(table), {"mine": "quick (no `paper` preset)"})
    assert ranking["leads"] == ["1", "2", "3"]
    assert ranking["unbeaten"] == [[], ["nearest"], ["nearest"]]
    assert {row["model"]: row["budget"] for row in ranking["rows"]} == {"mine": "quick (no `paper` preset)", "nearest": ""}


@pytest.mark.parametrize(
    ("skills", "expected"),
    [
        ([0.12, 0.5], "12 to 50 % lower"),
        ([-0.03, -0.2], "3 to 20 % higher"),
        ([-2.0, -30.0], "3 to 31 times as large"),
        ([0.1], "10 % lower"),
    ],
)
def test_changes_read_naturally(skills: list[float], expected: str) -> None:
    assert verdict.change(skills) == expected


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium on this machine: install the package chromium")
    from playwright.sync_api import sync_playwright

    quiet = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    quiet += ["--disable-component-update", "--disable-sync"]
    with sync_playwright() as play:
        started = play.chromium.launch(executable_path=chromium, args=quiet)
        yield started
        started.close()


@pytest.mark.browser
@pytest.mark.parametrize("world", ["gridded", "stations"])
def test_the_page_works_alone_in_a_browser(world: str, browser: Any, request: pytest.FixtureRequest) -> None:
    folder: Path = request.getfixturevalue(world)
    page, asked, complaints = browser.new_page(), [], []
    page.on("request", lambda r: asked.append(r.url))
    page.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda e: complaints.append(str(e)))
    address = (folder / "report" / "report.html").as_uri()
    page.goto(address)
    assert complaints == []
    assert [url for url in asked if not url.startswith(("data:", address))] == []
    assert page.locator("#headline").inner_text() == json.loads((folder / "report" / "summary.json").read_text())["headline"][0]

    drawn = page.evaluate("[...document.querySelectorAll('figure > svg')].map(s => s.getBBox().width * s.getBBox().height)")
    assert len(drawn) >= 6
    assert all(area > 1000 for area in drawn)
    pictures = page.evaluate(
        """Promise.all([...document.querySelectorAll('svg image')].map(i => new Promise(done => {
             const copy = new Image();
             copy.onload = () => done(copy.naturalWidth);
             copy.onerror = () => done(0);
             copy.src = i.href.baseVal;
           })))"""
    )
    assert pictures
    assert all(width > 0 for width in pictures)

    table = page.locator("table.scores").first
    head = table.locator("thead button").nth(2)
    column = "rows => rows.map(r => Number(r.cells[2].dataset.value))"
    for order in (1, -1):
        head.click()
        values = table.locator("tbody tr").evaluate_all(column)
        assert values == sorted(values, reverse=order < 0)
        assert len(values) == 3
    assert table.locator("thead th").nth(2).get_attribute("aria-sort") == "descending"

    shown = page.locator(".choice").first.locator("table:visible")
    assert shown.count() == 1
    page.locator(".choice").first.locator("select").select_option(index=1)
    assert shown.get_attribute("data-metric") != "rmse"
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
    page.close()
