"""The map page in headless Chromium: it shows the cube's own numbers, answers to pointer, keys and touch, and loads nothing."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipeline import cube as cubes
from pipeline import map_page, publish
from tests import forecasts, worlds

pytestmark = pytest.mark.browser

ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run"]
ARGUMENTS += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
TEXTS = publish.Params(model="plane", title="PM2.5 <on> the plane", license="CC-BY-4.0", attribution="An analytic world & its sensors")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    executable = shutil.which("chromium")
    if executable is None:
        pytest.skip("no chromium on this machine: install the Debian packages chromium and chromium-driver")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=executable, args=ARGUMENTS)
        yield started
        started.close()


class Page:
    """An open map page, the cube behind it, and everything that went wrong in it."""

    def __init__(self, browser: Any, forecast: Path, file: Path, **context: Any) -> None:
        self.cube = cubes.read_folder(forecast)[0].isel(init_time=0)
        file.write_text(map_page.render(forecast, TEXTS, "2026-11-22T06:00:00Z"), encoding="utf-8")
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **context})
        self.page = self.context.new_page()
        self.problems: list[str] = []
        self.page.on("console", lambda message: self.problems.append(message.text))
        self.page.on("pageerror", lambda error: self.problems.append(str(error)))
        self.page.on("request", lambda request: request.url.startswith(("file:", "data:")) or self.problems.append(request.url))
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-ready=true]")

    def hovered(self, x: float, y: float) -> tuple[int, int, float]:
        """Row, column and value under the pointer."""
        self.page.mouse.move(x, y)
        data = self.page.locator("#tip").evaluate("tip => ({...tip.dataset})")
        return int(data["row"]), int(data["column"]), float(data["value"])

    def pixel(self, x: float, y: float) -> tuple[float, float]:
        """Where a place in coordinates of the cube is drawn."""
        left, top, right, bottom = map(float, self.page.locator("#map").get_attribute("data-box").split(","))
        edges = self.page.evaluate("JSON.parse(document.getElementById('data').textContent).space")
        (west, east), (south, north) = edges["x"], edges["y"]
        return left + (x - west) / (east - west) * (right - left), bottom - (y - south) / (north - south) * (bottom - top)

    def picture(self) -> str:
        return self.page.locator("#map").evaluate("map => map.toDataURL()")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("map")
    names = ("stations", "waves", "sure")
    for name in names:
        (root / name).mkdir()
    return {
        "stations": forecasts.make(root / "stations", worlds.stations(), init="case"),
        "waves": forecasts.make(root / "waves", worlds.waves(), init="case", max_lead=4),
        "sure": forecasts.make(root / "sure", replace(worlds.stations(), sensor_names=(*"ABCDEFG", "<i>Huairou</i>")), scale=False),
    }


@pytest.fixture
def opened(browser: Any, folders: dict[str, Path], tmp_path: Path) -> Iterator[Any]:
    pages = []

    def open_page(name: str, **context: Any) -> Page:
        pages.append(Page(browser, folders[name], tmp_path / "map.html", **context))
        return pages[-1]

    yield open_page
    for page in pages:
        page.context.close()
        assert page.problems == []


@pytest.mark.parametrize("name", ["stations", "waves"])
def test_the_value_under_the_pointer_is_the_cubes(opened: Any, name: str) -> None:
    page = opened(name)
    variable = "pm2p5" if name == "stations" else "vorticity"
    step = float(np.ptp(page.cube[variable].values)) / 65535
    cells = set()
    for lead, (x, y) in enumerate([(560, 300), (640, 420), (720, 520)]):
        page.page.locator("#lead").fill(str(lead))
        row, column, value = page.hovered(x, y)
        expected = page.cube[variable].sel(quantile=0.5).isel(lead_time=lead, y=row, x=column).item()
        assert value == pytest.approx(expected, abs=step)
        shown = page.page.locator("#tip b").inner_text()
        assert float(shown) == pytest.approx(expected, abs=0.5 * 10 ** -len(shown.partition(".")[2]) + step)
        cells.add((row, column))
    assert len(cells) == 3
    coordinates = page.page.locator("#tip").inner_text()
    if name == "stations":
        south, east = re.search(r"([\d.]+)° N, ([\d.]+)° E", coordinates).groups()  # type: ignore[union-attr]
        assert float(south) == pytest.approx(page.cube["latitude"].values[row], abs=0.02)
        assert float(east) == pytest.approx(page.cube["longitude"].values[column], abs=0.02)


def test_the_slider_changes_picture_and_time(opened: Any) -> None:
    page = opened("stations")
    before, time = page.picture(), page.page.locator("#valid").inner_text()
    page.page.locator("#lead").focus()
    page.page.keyboard.press("ArrowRight")
    assert page.page.locator("#lead").input_value() == "1"
    assert page.page.locator("#ahead").inner_text().startswith("+2 h")
    assert page.page.locator("#valid").inner_text() != time
    assert page.picture() != before
    page.page.locator("#play").click()
    page.page.wait_for_function("document.getElementById('lead').value === '3'")
    page.page.locator("#play").click()
    assert page.page.locator("#play").get_attribute("aria-pressed") == "false"


def test_layers_show_quantiles_and_their_distance(opened: Any) -> None:
    page = opened("stations")
    pictures = {page.picture()}
    at = page.cube["pm2p5"].isel(lead_time=0)
    for layer, expected in (("low", at.sel(quantile=0.05)), ("high", at.sel(quantile=0.95)), ("width", at[-1] - at[0])):
        page.page.locator(f"#layers [data-value={layer}]").click()
        row, column, value = page.hovered(600, 400)
        assert value == pytest.approx(expected.values[row, column], abs=0.01)
        page.page.mouse.move(20, 400)
        pictures.add(page.picture())
    assert len(pictures) == 4
    assert "90 % interval" in page.page.locator("#caption").inner_text()


def test_sensors_tell_what_they_observed_and_a_click_opens_the_series(opened: Any) -> None:
    page = opened("stations")
    page.page.locator("#close").click()
    assert page.page.locator("#series").is_hidden()
    sensor = page.page.evaluate("JSON.parse(document.getElementById('data').textContent).sensors[7]")
    place = page.pixel(*sensor["at"])
    page.page.mouse.move(*place)
    words = page.page.locator("#tip").inner_text()
    assert "Station 8, held out for testing" in words
    observed = [value for time, value in sensor["series"]["pm2p5"] if time <= page.cube["init_time"].values.astype("M8[s]").astype(int)]
    assert f"observed {observed[-1]:.0f}" in words
    page.page.mouse.click(*place)
    assert page.page.locator("#place").inner_text() == "Station 8 · PM2.5"
    assert page.page.locator("#chart .seen").count() == len(observed)
    assert page.page.locator("#chart .later").count() == len(sensor["series"]["pm2p5"]) - len(observed)
    assert page.page.locator("#chart .median").count() == 1


def test_a_sensor_goes_by_its_name_as_text(opened: Any) -> None:
    page = opened("sure")
    sensor = page.page.evaluate("JSON.parse(document.getElementById('data').textContent).sensors[7]")
    place = page.pixel(*sensor["at"])
    page.page.mouse.move(*place)
    assert "Station <i>Huairou</i>, held out for testing" in page.page.locator("#tip").inner_text()
    page.page.mouse.click(*place)
    assert page.page.locator("#place").inner_text() == "Station <i>Huairou</i> · PM2.5"


def test_the_keyboard_alone_is_enough(opened: Any) -> None:
    page = opened("waves")
    page.page.locator("#map").focus()
    page.page.keyboard.press("ArrowUp")
    first = page.page.locator("#tip").evaluate("tip => [+tip.dataset.row, +tip.dataset.column]")
    page.page.keyboard.press("ArrowRight")
    assert page.page.locator("#tip").evaluate("tip => [+tip.dataset.row, +tip.dataset.column]") == [first[0], first[1] + 1]
    page.page.keyboard.press("Enter")
    assert page.page.locator("#place").inner_text().startswith("Vorticity at x 0.583")
    before = page.picture()
    page.page.keyboard.press("+")
    assert page.picture() != before
    page.page.keyboard.press("Escape")
    assert page.page.locator("#series").is_hidden()
    page.page.keyboard.press(".")
    assert page.page.locator("#lead").input_value() == "1"


def test_a_forecast_without_uncertainty_offers_no_layers(opened: Any) -> None:
    page = opened("sure", color_scheme="dark")
    assert page.page.locator("#layers button").count() == 0
    assert page.page.evaluate("document.documentElement.dataset.theme") == "dark"
    row, column, value = page.hovered(600, 400)
    assert value == pytest.approx(page.cube["pm2p5"].isel(lead_time=0).values[row, column], abs=0.01)
    assert "interval" not in page.page.locator("#tip").inner_text()


def test_touch_on_a_phone(opened: Any) -> None:
    page = opened("stations", has_touch=True, viewport={"width": 390, "height": 844})
    assert page.page.locator("#series").is_hidden()
    page.page.touchscreen.tap(120, 300)
    assert page.page.locator("#series").is_visible()
    assert page.page.locator("#tip b").is_visible()
    assert page.page.evaluate("document.documentElement.scrollWidth") <= 390


def test_words_of_the_settings_are_text_not_markup(folders: dict[str, Path]) -> None:
    html = map_page.render(folders["stations"], TEXTS, "2026-11-22T06:00:00Z")
    assert "PM2.5 &lt;on&gt; the plane" in html
    assert "world &amp; its" in html
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", html)
    assert html == map_page.render(folders["stations"], TEXTS, "2026-11-22T06:00:00Z")
