"""Every number on a page is the JSON's, and a page needs nothing but itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from quantmix.report import data, pages
from quantmix.report.html import Book
from quantmix.report.words import say

FREE = {"code", "pre", "script", "style", "title", "a", "h1", "h2", "h3", "p.warn", ".tick"}
FREE |= {".id", ".label", ".name", "p.lead", "th"}


class Reader(HTMLParser):
    """Collects `<data>` elements, hovers with their key, links, and decimals that stand free."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.numbers: list[tuple[str, str, str, str]] = []
        self.marks: list[tuple[str, str]] = []
        self.loads: list[str] = []
        self.free: list[str] = []
        self.document = ""
        self._open: list[tuple[str, dict[str, str]]] = []

    def handle_starttag(self, name, attributes):
        found = {k: v or "" for k, v in attributes}
        for key in ("src", "href"):
            if key in found and name != "a":
                self.loads.append(found[key])
        if name not in ("meta", "link", "br", "circle", "rect", "line", "path"):
            self._open.append((name, found))

    def handle_startendtag(self, name, attributes):
        pass

    def handle_endtag(self, name):
        while self._open and self._open.pop()[0] != name:
            pass

    def handle_data(self, text):
        if not self._open:
            return
        name, found = self._open[-1]
        if name == "data":
            self.numbers.append((found["data-k"], found["data-f"], found["value"], text))
        elif name == "title" and len(self._open) > 1 and self._open[-2][0] == "g":
            self.marks.append((self._open[-2][1]["data-k"], text))
        elif name == "script":
            self.document += text
        elif not self._named():
            self.free += re.findall(r"\d+[.,]\d+", text)

    def _named(self) -> bool:
        """Whether the text is a name, a command, a title or the tick of an axis."""
        for name, found in self._open:
            classes = found.get("class", "").split()
            if name in FREE or any(f".{c}" in FREE or f"{name}.{c}" in FREE for c in classes):
                return True
        return False


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    return reader


@pytest.fixture(scope="module", params=["design", "sweep", "compare"])
def drawn(request, documents):
    """A document and its page."""
    return documents[request.param]


def test_the_page_embeds_its_document(drawn):
    """The JSON in the page is the document it was drawn from."""
    doc, page = drawn
    assert json.loads(read(page).document) == json.loads(json.dumps(doc))


def test_every_number_is_the_json_s(drawn):
    """Each number names its place in the JSON, has its value and is written as its kind."""
    _, page = drawn
    reader = read(page)
    book = Book(json.loads(reader.document))
    assert len(reader.numbers) > 60
    for key, kind, value, text in reader.numbers:
        found = book.value(key)
        assert json.loads(value) == found, key
        assert text == say(found, kind), key


def test_no_decimal_stands_outside(drawn):
    """Decimals occur as tied numbers, in hovers and ticks, or within names and commands only."""
    _, page = drawn
    assert read(page).free == []


def test_every_hover_says_what_the_json_says(drawn):
    """A mark with a size says the size in its JSON; its place exists."""
    _, page = drawn
    reader = read(page)
    book = Book(json.loads(reader.document))
    assert len(reader.marks) > 60
    sizes = 0
    for key, title in reader.marks:
        found = book.value(key)
        row = found if isinstance(found, dict) else {}
        n = row.get("tensor_bytes") or row.get("size", {}).get("tensor_bytes") or row.get("bytes")
        if n and "nats," not in title and "damage" not in title:
            assert say(n, "gib") in title, (key, title)
            sizes += 1
        if "measured" in row and "predicted" in row:
            assert say(row["measured"], "ppl") in title
            assert say(row["predicted"], "ppl") in title
    assert sizes > 40


def test_every_mark_of_the_curve_is_there(documents):
    """Frontier points, published mixes, recipes and measurements all have their mark."""
    doc, page = documents["design"]
    keys = {k for k, _ in read(page).marks}
    section = doc["section"]
    assert section["frontier"]["published"]
    for group in ("frontier.points", "frontier.published"):
        name = group.split(".")[1]
        for i, row in enumerate(section["frontier"][name]):
            assert row["ln_ppl_ratio"] is None or f"section.{group}.{i}" in keys
    for group in ("recipes", "measured"):
        assert section[group]
        for i in range(len(section[group])):
            assert f"section.{group}.{i}" in keys


def test_a_page_loads_nothing(drawn):
    """No script, style, font or image comes from elsewhere, and there is no code to run."""
    _, page = drawn
    reader = read(page)
    assert reader.loads == ["data:,"]
    assert "@import" not in page
    assert "url(" not in page
    assert re.findall(r"<script(?! type=\"application/json\")", page) == []


def test_the_same_recipes_give_the_same_page(documents, subject):
    """A page made twice from the same recipes and measurements is the same, byte for byte."""
    assert pages.design_page(data.design_document(subject)) == documents["design"][1]


def test_names_cannot_break_the_page(subject):
    """A recipe called like a tag is text, in the body and inside the JSON."""
    evil = "</script><script>alert(1)</script>"
    first = replace(subject.recipes[0], name=evil)
    doc = data.design_document(replace(subject, recipes=(first, *subject.recipes[1:])))
    page = pages.design_page(doc)
    assert "<script>alert" not in page
    assert json.loads(read(page).document)["recipe"]["name"] == evil


def test_a_page_without_frontier_base_or_devices(subject):
    """What is not known is left out: no model, no measurement, no device, no base."""
    recipe = subject.recipes[0]
    bare = replace(recipe.quality, ppl=None, ppl_low=None, ppl_high=None, ppl_base=None)
    lone = data.Subject(None, None, (replace(recipe, quality=bare, devices=()),), ())
    page = pages.design_page(data.design_document(lone))
    assert "Memory" not in page
    assert "Published" not in page
    assert "None" not in re.sub(r"<script.*", "", page, flags=re.S)
