"""Parts that several pages share; each takes the book and the place of its model's section."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from quantmix.emit.figures import COMPONENTS
from quantmix.report.bars import legend, type_map
from quantmix.report.curve import kld_chart, residual_chart, rise_chart
from quantmix.report.html import Book, both, called, figure, keys, source_link, table
from quantmix.report.svg import tag

WIDE, NARROW = 860, 358

_FRONTIER = tag("line", x1=0, x2=14, y1=7, y2=7, class_="frontier")
_BAND = tag("rect", x=0, y=1, width=14, height=12, class_="band")
_RECIPE = tag("path", d="M7 0.5l6.5 6.5l-6.5 6.5l-6.5 -6.5z", class_="recipe")
_OURS = tag("circle", cx=7, cy=7, r=5, class_="ours")
_STOCK = tag("rect", x=2.5, y=2.5, width=9, height=9, class_="stock")
_PUBLISHED = tag("circle", cx=7, cy=7, r=4.5, class_="published")
_INTERVAL = tag("rect", x=3, y=0, width=8, height=14, rx=4, class_="span")


def curve_figure(book: Book, at: str) -> list[str]:
    """The perplexity chart with its legend, and the KLD chart when anything has a KLD."""
    section = book.value(at)
    frontier, measured = section["frontier"], section["measured"]
    if not frontier and not section["recipes"] and not any(m["ln_ppl_ratio"] for m in measured):
        return []
    entries = []
    if frontier:
        level = f"{frontier['interval']:.0%} interval"
        entries += [(_FRONTIER, "predicted frontier"), (_BAND, level)]
    if section["recipes"]:
        entries.append((_RECIPE, "recipe, predicted"))
    if any(m["ours"] for m in measured):
        entries.append((_OURS, "ours, measured"))
    if any(not m["ours"] for m in measured):
        entries.append((_STOCK, "other files, measured"))
    if frontier and any(m["ln_ppl_ratio"] is not None for m in frontier["published"]):
        entries.append((_PUBLISHED, "published, numbered as in the table"))
    chart = both(
        rise_chart(section, WIDE, 460, f"{at}."), rise_chart(section, NARROW, 340, f"{at}.")
    )
    parts = [figure(chart + keys(entries), _curve_caption(book, at))]
    if any(m["kld"] for m in measured):
        chart = both(
            kld_chart(section, WIDE, 380, f"{at}."), kld_chart(section, NARROW, 300, f"{at}.")
        )
        caption = "Measured KLD against the base" + (
            "; the line is the predicted damage, in nats too." if frontier else "."
        )
        parts += ["<h3>KLD against size</h3>", figure(chart, caption)]
    return parts


def _curve_caption(book: Book, at: str) -> str:
    frontier = book.value(at)["frontier"]
    if not frontier:
        return "Both axes are logarithmic."
    knee = f"{at}.frontier.points.{frontier['knee']}"
    size = book.num(f"{knee}.tensor_bytes", "gib")
    base, unplaced = "", ""
    if frontier["ppl_base"] is None and frontier["published"]:
        unplaced = " Published mixes are in the table only: nobody published the base to compare."
    if frontier["ppl_base"] is not None:
        base = f" over PPL {book.num(f'{at}.frontier.ppl_base', 'ppl')} of the unquantized model"
    return (
        f"Rise of perplexity{base} against size, both logarithmic; a mark pointing down lies "
        f"below the axis. The knee of the range shown is at {size} "
        f"({book.num(f'{knee}.bpw', 'bpw')} bpw, {book.num(f'{knee}.ln_ppl_ratio', 'rise')}). "
        f"Predictions are {escape(frontier['basis'])}.{unplaced}"
    )  # fmt: skip


def frontier_table(book: Book, at: str) -> list[str]:
    """Every point of the frontier, folded away."""
    if not book.value(at)["frontier"]:
        return []
    rows, n = [], len(book.value(f"{at}.frontier.points"))
    for i in range(n):
        p = f"{at}.frontier.points.{i}"
        rows.append(
            [
                book.num(f"{p}.tensor_bytes", "gib"),
                book.num(f"{p}.bpw", "bpw"),
                book.num(f"{p}.vram_bytes", "gib"),
                book.num(f"{p}.ppl", "ppl"),
                book.span(f"{p}.ppl_low", f"{p}.ppl_high", "ppl"),
                book.num(f"{p}.ln_ppl_ratio", "rise"),
                book.num(f"{p}.price_per_gib", "price"),
            ]
        )
    heads = ("size", "bpw", "one device", "PPL", "interval", "rise", "nats per GiB")
    knee = book.value(f"{at}.frontier.knee")
    ctx = book.num(f"{at}.frontier.settings.ctx", "int")
    note = (
        f'<p class="note">One device: memory with cache and buffers at {ctx} tokens of context. '
        "Bold: the knee.</p>"
    )
    body = table(heads, rows, "nnNnNnN", [knee])
    return [f"<details><summary>The frontier in numbers</summary>{note}{body}</details>"]


def published_table(book: Book, at: str, *, unfolded: bool = True) -> list[str]:
    """Published mixes with sources, and what the frontier promises at their size."""
    frontier = book.value(at)["frontier"]
    if not frontier or not frontier["published"]:
        return []
    rows = []
    for i, mark in enumerate(frontier["published"]):
        p = f"{at}.frontier.published.{i}"
        there = book.num(f"{p}.frontier_there.ppl", "ppl") if mark["frontier_there"] else "–"
        label = called(mark["label"])
        rows.append(
            [
                str(i + 1),
                label,
                book.num(f"{p}.tensor_bytes", "gib"),
                book.num(f"{p}.bpw", "bpw"),
                book.num(f"{p}.ppl", "ppl"),
                there,
                source_link(mark["source"]),
            ]
        )
    heads = ("#", "mix", "size", "bpw", "PPL", "frontier there", "source")
    n = len(rows)
    return [
        f"<details{' open' if unfolded else ''}><summary>Published mixes ({n}), with sources"
        "</summary>"
        '<p class="note">As their authors measured them on wiki.test.raw, context 512. '
        "Frontier there: the PPL predicted for the best mix of that size.</p>"
        f"{table(heads, rows, 'ntnNnnT')}</details>",
    ]


def measured_table(book: Book, at: str) -> list[str]:
    """Files measured here, on one bench."""
    section = book.value(at)
    if not section["measured"]:
        return []
    rows = []
    for i, m in enumerate(section["measured"]):
        p = f"{at}.measured.{i}"
        error = "" if m["ppl_err"] is None else f" ± {book.num(f'{p}.ppl_err', 'ppl')}"
        rows.append(
            [
                called(m["label"]),
                book.num(f"{p}.tensor_bytes", "gib"),
                book.num(f"{p}.bpw", "bpw"),
                book.num(f"{p}.ppl", "ppl") + error,
                book.num(f"{p}.ln_ppl_ratio", "rise"),
                book.num(f"{p}.kld", "nats"),
                book.num(f"{p}.same_top", "share"),
            ]
        )
    bench = f"{at}.bench"
    left = section["measured_elsewhere"]
    more = (
        f" {book.num(f'{at}.measured_elsewhere', 'int')} other measurements are of another bench."
        if left
        else ""
    )
    return [
        "<h3>Measured here</h3>",
        f'<p class="note">Context {book.num(f"{bench}.n_ctx", "int")}, '
        f"{book.num(f'{bench}.chunks', 'int')} chunks, {book.num(f'{bench}.tokens', 'int')} tokens "
        f"of one text.{more}</p>",
        table(("file", "size", "bpw", "PPL", "rise", "KLD", "same top"), rows, "tnNnnnN"),
    ]


def residual_figure(book: Book, at: str) -> list[str]:
    """Predicted against measured, with the count inside the interval."""
    rows = book.value(at)["residuals"]
    if not rows:
        return []
    s = f"{at}.residuals_summary"
    chart = both(
        residual_chart(rows, WIDE, 300, f"{at}."), residual_chart(rows, NARROW, 260, f"{at}.")
    )
    entries = [(_INTERVAL, "predicted interval"), (_PUBLISHED, "published, left out of the fit")]
    if any(r["ours"] for r in rows):
        entries.append((_OURS, "ours, measured"))
    caption = (
        f"{book.num(f'{s}.inside', 'int')} of {book.num(f'{s}.n', 'int')} measurements lie inside "
        f"the interval of their prediction; median error {book.num(f'{s}.median_error', 'error')}. "
        "Published mixes are predicted from the model's other mixes alone."
    )
    cells = []
    for i, r in enumerate(rows):
        p = f"{at}.residuals.{i}"
        cells.append(
            [
                called(r["label"]),
                book.num(f"{p}.bpw", "bpw"),
                book.num(f"{p}.measured", "ppl"),
                book.num(f"{p}.predicted", "ppl"),
                book.span(f"{p}.low", f"{p}.high", "ppl"),
                book.num(f"{p}.residual", "rise"),
            ]
        )
    body = table(
        ("mix", "bpw", "measured", "predicted", "interval", "residual"), cells, "tNnnNn"
    )  # fmt: skip
    return [
        "<h2>Predicted against measured</h2>",
        figure(chart + keys(entries), caption),
        f"<details><summary>Residuals in numbers</summary>{body}</details>",
    ]


def map_figure(runs: Sequence[dict[str, Any]], prefix: str, caption: str) -> str:
    """The map of types with the colours of the types it uses."""
    chart = both(type_map(runs, WIDE, prefix), type_map(runs, NARROW, prefix))
    entries = [
        (tag("rect", x=0, y=0, width=14, height=14, rx=3, fill=colour), name)
        for name, _, colour in legend(runs)
    ]
    return figure(chart + keys(entries), caption)


def memory_keys(devices: Sequence[dict[str, Any]]) -> str:
    """The legend of the memory bars."""
    entries = [
        (tag("rect", x=0, y=0, width=14, height=14, rx=3, class_=key[:-6]), label)
        for key, label, _ in COMPONENTS
        if any(d[key] for d in devices)
    ]
    entries.append((tag("line", x1=7, x2=7, y1=0, y2=14, class_="capacity"), "capacity"))
    return keys(entries)


def device_table(book: Book, at: str) -> str:
    """Memory of every device in numbers."""
    rows = []
    for i, d in enumerate(book.value(at)):
        used = [book.num(f"{at}.{i}.{key}", "gib") for key, _, _ in COMPONENTS]
        rows.append(
            [
                called(d["name"]),
                *used,
                book.num(f"{at}.{i}.free_bytes", "gib"),
                book.num(f"{at}.{i}.capacity_bytes", "gib"),
            ]
        )
    heads = ("", *(label for _, label, _ in COMPONENTS), "free", "capacity")
    return table(heads, rows, "tnnNNNnn")


def quality_remark(book: Book, at: str) -> str:
    """The interval of a predicted quality, as the small print of a key figure."""
    q = book.value(at)
    if q["ppl_low"] is not None:
        return f"{book.span(f'{at}.ppl_low', f'{at}.ppl_high', 'ppl')} predicted"
    if q["ln_ppl_ratio_low"] is not None:
        return f"{book.span(f'{at}.ln_ppl_ratio_low', f'{at}.ln_ppl_ratio_high', 'rise')} predicted"
    return "predicted"
