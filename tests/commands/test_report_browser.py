"""report in a browser: tables sort, nothing is wider than a telephone, and no script but ours runs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from spectral_surgery.codec.rate import Target
from spectral_surgery.commands.compress import compress
from spectral_surgery.commands.report import report
from spectral_surgery.files.compressed.plan import CompressOptions
from tests.commands.test_report import HOSTILE
from tests.support.checkpoints import gaussian, write_folder

playwright = pytest.importorskip("playwright.sync_api")
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of a checkpoint with a hostile name, a long one, and sizes that text would sort wrongly."""
    folder = tmp_path_factory.mktemp("browser")
    tensors = {f"model.layers.{n}.proj.weight": gaussian(64 * (n + 1), 64, seed=n) for n in range(12)}
    tensors |= {HOSTILE: gaussian(80, 64), "n" * 300: gaussian(90, 64), "norm.weight": torch.ones(5)}
    write_folder(folder / "source", tensors)
    compress(folder / "source", folder / "out", CompressOptions(Target("bits", 3.0)))
    report(folder / "out", folder / "page.html")
    return folder / "page.html"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    with playwright.sync_playwright() as started:
        try:
            # the whole thing in a few processes without a sandbox, as containers have it
            browser = started.chromium.launch(
                executable_path=found, args=["--headless=shell", "--no-sandbox", "--no-zygote", "--disable-gpu"]
            )
        except playwright.Error as error:
            pytest.skip(f"no Chromium: {str(error).splitlines()[0]}")
        yield browser
        browser.close()


@pytest.fixture
def opened(browser: Any, page_file: Path) -> Iterator[Any]:
    """The page, 400 pixels wide; what the browser complains about fails the test."""
    context = browser.new_context(viewport={"width": 400, "height": 800})
    page, said = context.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: (said.append("a dialog"), dialog.dismiss()))
    page.on("request", lambda request: said.append(request.url) if not request.url.startswith("file:") else None)
    page.goto(page_file.as_uri())
    yield page
    assert said == []
    context.close()


def column(page: Any, number: int) -> list[str]:
    cells: list[str] = page.locator(f"table >> nth=0 >> tbody td:nth-child({number + 1})").all_inner_texts()
    return cells


def test_a_click_sorts_by_number_and_by_name(opened: Any) -> None:
    heads = opened.locator("table >> nth=0 >> th").all_inner_texts()
    place = next(n for n, head in enumerate(heads) if head.startswith("bytes"))
    button = opened.locator("table >> nth=0 >> th button").nth(place)
    button.click()
    falling = [int(text.replace(",", "")) for text in column(opened, place)]
    assert falling == sorted(falling, reverse=True)
    assert opened.locator("table >> nth=0 >> th").nth(place).get_attribute("aria-sort") == "descending"
    button.click()
    rising = [int(text.replace(",", "")) for text in column(opened, place)]
    assert rising == sorted(falling)
    assert len({len(str(value)) for value in rising}) > 1  # as text they would be in another order
    opened.locator("table >> nth=0 >> th button").nth(0).press("Enter")
    names = [name for name in column(opened, 0) if name.startswith("model.layers")]
    assert names == [f"model.layers.{n}.proj.weight" for n in range(12)]
    assert opened.locator("table >> nth=0 >> th").nth(place).get_attribute("aria-sort") == "none"


@pytest.mark.parametrize("width", [320, 400, 1200])
def test_no_page_is_wider_than_its_window(opened: Any, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 800})
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    shown = opened.locator("svg.wide" if width > 640 else "svg.narrow").first
    assert shown.is_visible()
    box = shown.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width


def test_pointing_says_what_a_shape_is_and_names_are_text(opened: Any) -> None:
    tile = opened.locator("svg.narrow rect.tile").first
    tile.scroll_into_view_if_needed()
    tile.hover()
    assert "bits per weight" in opened.locator("#tip").inner_text()
    assert opened.locator("#tip").is_visible()
    opened.mouse.move(1, 1)
    assert not opened.locator("#tip").is_visible()
    assert HOSTILE in opened.locator("table").first.inner_text()
    assert opened.locator("img").count() == 0


def test_a_script_that_were_in_the_page_would_not_run(browser: Any, page_file: Path, tmp_path: Path) -> None:
    text = page_file.read_text(encoding="utf-8").replace("</main>", "<script>document.title = 'ran'</script></main>")
    (tmp_path / "changed.html").write_text(text, encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "changed.html").as_uri())
    assert page.title() == "out: Compressed checkpoint, data-free"
    page.close()


def test_lines_are_not_filled(browser: Any, page_file: Path, tmp_path: Path) -> None:
    body = {"curve": {"train": [[1, 2.0], [2, 1.0], [3, 1.5]], "held_out": [[0, 2.0], [3, 1.0]]}}
    (page_file.parent / "out" / "heal.json").write_text(json.dumps(body))
    report(page_file.parent / "out", tmp_path / "page.html")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    lines = page.locator("svg.wide path.line")
    assert lines.count() == 2
    assert {lines.nth(n).evaluate("own => getComputedStyle(own).fill") for n in range(2)} == {"none"}
    page.close()


def test_dark_windows_are_dark_and_paper_is_white(opened: Any) -> None:
    def brightness() -> float:
        colour: str = opened.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour.removeprefix("rgb(").removesuffix(")").split(","))) / 765

    assert brightness() > 0.9
    opened.emulate_media(color_scheme="dark")
    assert brightness() < 0.2
    opened.emulate_media(color_scheme="dark", media="print")
    assert brightness() > 0.9
    assert opened.locator("svg.wide").first.is_visible()
    assert not opened.locator("nav").is_visible()
