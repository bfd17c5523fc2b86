"""Pages in a real browser: silent console, nothing out of its place, on a desk and on a phone."""

from __future__ import annotations

import pytest

from tests.report import chromium

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser():
    """A headless Chromium."""
    program = chromium.find()
    if program is None:
        pytest.skip("no Chromium is installed: apt-get install chromium")
    with chromium.Browser(program) as found:
        yield found


@pytest.mark.parametrize("width", [1280, 390])
def test_pages_are_quiet_and_in_bounds(browser, documents, tmp_path, width):
    """No error in the console, no element wider than the page, at either width."""
    for kind, (_, content) in documents.items():
        page = tmp_path / f"{kind}.html"
        page.write_text(content, encoding="utf-8")
        assert browser.open(page, width) == []
        browser.evaluate(chromium.OPEN_ALL)
        assert browser.evaluate(chromium.OVERFLOW) == []
        assert browser.evaluate("document.documentElement.scrollWidth") <= width


def test_dark_pages_are_dark(browser, documents, tmp_path):
    """The page follows the reader's preference."""
    page = tmp_path / "page.html"
    page.write_text(documents["design"][1], encoding="utf-8")
    colours = []
    for dark in (False, True):
        browser.open(page, 1280, dark=dark)
        colours.append(browser.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 27)"]


def test_one_width_of_each_drawing_shows(browser, documents, tmp_path):
    """Of the two widths of a drawing exactly one is shown."""
    page = tmp_path / "page.html"
    page.write_text(documents["design"][1], encoding="utf-8")
    visible = "[...document.querySelectorAll('svg.{}')].filter(e => e.clientWidth).length"
    for width, shown, hidden in ((1280, "wide", "narrow"), (390, "narrow", "wide")):
        browser.open(page, width)
        assert browser.evaluate(visible.format(shown)) >= 4
        assert browser.evaluate(visible.format(hidden)) == 0
