"""A self-contained page: its shell, numbers tied to the JSON they come from, tables, figures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from typing import Any

from quantmix.report.words import say
from quantmix.sources import CREDIT


@dataclass(frozen=True)
class Book:
    """The document behind a page; `num` looks a value up and writes it with its place."""

    doc: dict[str, Any]

    def value(self, key: str) -> Any:
        """Return the value at a dotted path; list indices are numbers."""
        found: Any = self.doc
        for part in key.split("."):
            found = found[int(part)] if isinstance(found, list) else found[part]
        return found

    def num(self, key: str, kind: str) -> str:
        """Return the value at `key` written as `kind`, as a `<data>` element."""
        value = self.value(key)
        if value is None:
            return "–"
        raw = escape(json.dumps(value) if not isinstance(value, str) else value)
        return (
            f'<data value="{raw}" data-k="{escape(key)}" data-f="{kind}">'
            f"{escape(say(value, kind))}</data>"
        )

    def span(self, low: str, high: str, kind: str) -> str:
        """Return an interval in brackets, nothing when there is none."""
        if self.value(low) is None or self.value(high) is None:
            return ""
        return f"[{self.num(low, kind)}, {self.num(high, kind)}]"


def page(title: str, body: Sequence[str], doc: dict[str, Any]) -> str:
    """Return the whole HTML file with the document embedded."""
    style = (files("quantmix.report") / "style.css").read_text(encoding="utf-8")
    data = json.dumps(doc, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n"
        f'<link rel="icon" href="data:,">\n<style>\n{style}</style>\n</head>\n<body>\n<main>\n'
        + "\n".join(body)
        + f"\n<footer><p>{escape(CREDIT)} Perplexities of published mixes are as their authors "
        "measured them, each with its source. Every number here is also in the JSON of this file "
        '(<code>script id="data"</code>).</p></footer>\n</main>\n'
        f'<script type="application/json" id="data">{data}</script>\n</body>\n</html>\n'
    )


def table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], kinds: str, marked: Sequence[int] = ()
) -> str:
    """Return a table; `kinds` has a letter per column: t text, n number, upper case: wide only.

    Cells are HTML already. `marked` rows are set off.
    """
    styles = [
        " ".join(s for s in ("n" if k in "nN" else "", "wide" if k.isupper() else "") if s)
        for k in kinds
    ]
    head = "".join(_cell("th", s, escape(h)) for s, h in zip(styles, heads, strict=True))
    lines = []
    for i, row in enumerate(rows):
        here = ' class="here"' if i in marked else ""
        cells = "".join(_cell("td", s, c) for s, c in zip(styles, row, strict=True))
        lines.append(f"<tr{here}>{cells}</tr>")
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"


def both(wide: str, narrow: str) -> str:
    """Return a drawing in two widths, of which the style shows the one that suits the screen."""
    return wide.replace('class="chart"', 'class="chart wide"', 1) + narrow.replace(
        'class="chart"', 'class="chart narrow"', 1
    )


def figure(content: str, caption: str = "") -> str:
    """Return a figure with its caption (HTML)."""
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{content}{below}</figure>"


def keys(entries: Sequence[tuple[str, str]]) -> str:
    """Return a legend: (drawing of 14 × 14 inside, label) each."""
    items = "".join(
        f'<li><svg viewBox="0 0 14 14" aria-hidden="true">{mark}</svg>{escape(label)}</li>'
        for mark, label in entries
    )
    return f'<ul class="keys">{items}</ul>'


def called(name: str) -> str:
    """Return a name as HTML: digits in it are not numbers of the page."""
    return f'<span class="id">{escape(name)}</span>'


def facts(entries: Sequence[tuple[str, str, str]]) -> str:
    """Return the key figures: (name, value as HTML, remark as HTML)."""
    cells = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{value}"
        + (f"<small>{remark}</small>" if remark else "")
        + "</dd></div>"
        for name, value, remark in entries
    )
    return f'<dl class="facts">{cells}</dl>'


def source_link(source: str) -> str:
    """Return a source as a link when it is one."""
    if source.startswith(("http://", "https://")):
        short = source.split("://", 1)[1]
        return f'<a href="{escape(source)}" rel="noreferrer">{escape(_shorten(short))}</a>'
    return escape(source)


def _shorten(address: str) -> str:
    for host in ("github.com/", "huggingface.co/"):
        address = address.removeprefix(host)
    return address if len(address) < 44 else f"{address[:24]}…{address[-18:]}"


def _cell(tag: str, style: str, content: str) -> str:
    return f'<{tag} class="{style}">{content}</{tag}>' if style else f"<{tag}>{content}</{tag}>"
