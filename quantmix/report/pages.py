"""The three pages: one design, a sweep of a model (or several), recipes side by side."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from html import escape
from typing import Any

from quantmix.emit.scripts import shell_line
from quantmix.report.bars import composition_chart, damage_chart, memory_charts
from quantmix.report.html import Book, both, called, facts, figure, keys, page, table
from quantmix.report.markdown import card_table, mix_table
from quantmix.report.sections import (
    NARROW,
    WIDE,
    curve_figure,
    device_table,
    frontier_table,
    map_figure,
    measured_table,
    memory_keys,
    published_table,
    quality_remark,
    residual_figure,
)
from quantmix.report.svg import tag


def design_page(doc: dict[str, Any]) -> str:
    """Return the page of one recipe, from `data.design_document`."""
    book = Book(doc)
    recipe = doc["recipe"]
    engine = "ik_llama.cpp" if recipe["engine"]["name"] == "ik" else "llama.cpp"
    body = [
        f"<h1>{escape(recipe['name'])}</h1>",
        f'<p class="lead">A quantization mix of {escape(doc["section"]["name"])} for '
        f"{escape(recipe['budget'].get('label') or 'a budget')}, {engine} build "
        f"{escape(recipe['engine']['build'])}. Made {escape(recipe['created'][:10])} by quantmix "
        f"{escape(recipe['quantmix'])}.</p>",
        _design_facts(book),
        *(f'<p class="warn">{escape(w)}</p>' for w in recipe["quality"]["warnings"]),
        "<h2>Perplexity against size</h2>",
        *curve_figure(book, "section"),
        *measured_table(book, "section"),
        *frontier_table(book, "section"),
        *published_table(book, "section", unfolded=False),
        *_memory(book, "recipe.devices"),
        "<h2>Types by layer</h2>",
        map_figure(doc["map"], "map.", "The darker, the fewer bits per weight."),
        *_damage(book),
        *residual_figure(book, "section"),
        *_proof(book),
        *_commands(recipe),
        *_card(card_table(doc["section"]) + "\n" + mix_table(doc["damage_by_role"])),
    ]
    return page(f"{recipe['name']} · quantmix", body, doc)


def sweep_page(doc: dict[str, Any]) -> str:
    """Return the page of a sweep, from `data.sweep_document`: one part per model."""
    book = Book(doc)
    sections = doc["sections"]
    many = len(sections) > 1
    title = "Perplexity against size" if many else sections[0]["name"]
    body = [f"<h1>{escape(title)}</h1>"]
    if many:
        links = (f'<a href="#m{i}">{escape(s["name"])}</a>' for i, s in enumerate(sections))
        body.append(f"<nav>{''.join(links)}</nav>")
    for i, section in enumerate(sections):
        if many:
            body.append(f'<h2 id="m{i}">{escape(section["name"])}</h2>')
        body += _sweep_section(book, f"sections.{i}", section)
    return page(f"{title} · quantmix", body, doc)


def compare_page(doc: dict[str, Any]) -> str:
    """Return the page of recipes side by side, from `data.compare_document`."""
    book = Book(doc)
    section = doc["section"]
    names = [r["name"] for r in section["recipes"]]
    body = [
        f"<h1>{escape(section['name'])}</h1>",
        f'<p class="lead">{escape(", ".join(names[:-1]))} and {escape(names[-1])}, '
        "side by side.</p>",
        "<h2>In short</h2>",
        _recipe_table(book, "section", differing=True),
        "<h2>Perplexity against size</h2>",
        *curve_figure(book, "section"),
        *measured_table(book, "section"),
        *frontier_table(book, "section"),
        *published_table(book, "section"),
        "<h2>What they are made of</h2>",
        _composition(doc["composition"], "composition."),
        "<h3>Bits per weight by role</h3>",
        *_role_tables(book, names),
        "<h2>Types by layer</h2>",
    ]
    for i, name in enumerate(names):
        body += [f"<h3>{escape(name)}</h3>", map_figure(doc["maps"][i], f"maps.{i}.", "")]
    for i, name in enumerate(names):
        if doc["devices"][i]:
            body += _memory(book, f"devices.{i}", f"Memory of {name}")
    body += _card(card_table(section))
    return page(f"{' / '.join(names)} · quantmix", body, doc)


def _sweep_section(book: Book, at: str, section: dict[str, Any]) -> list[str]:
    body = []
    if section["recipes"]:
        body.append(_recipe_table(book, at))
    body += curve_figure(book, at)
    body += measured_table(book, at)
    body += frontier_table(book, at)
    if section["composition"]:
        body += [
            "<h2>What the mixes are made of</h2>",
            _composition(section["composition"], f"{at}.composition."),
        ]
    body += residual_figure(book, at)
    body += published_table(book, at)
    if section["recipes"]:
        body += _card(card_table(section))
    return body


def _recipe_table(book: Book, at: str, *, differing: bool = False) -> str:
    rows = []
    for i, r in enumerate(book.value(at)["recipes"]):
        p = f"{at}.recipes.{i}"
        low, high = f"{p}.quality.ln_ppl_ratio_low", f"{p}.quality.ln_ppl_ratio_high"
        row = [
            called(r["name"]),
            book.num(f"{p}.size.tensor_bytes", "gib"),
            book.num(f"{p}.size.bpw", "bpw"),
            book.num(f"{p}.quality.ppl", "ppl"),
            book.num(f"{p}.quality.ln_ppl_ratio", "rise"),
            book.span(low, high, "rise"),
            book.num(f"{p}.speed.tg_tps", "tps"),
        ]
        if differing:
            row.append(book.num(f"differing.{i}", "int"))
        else:
            row.append(book.num(f"{p}.tensors_compared", "int"))
        rows.append(row)
    last = "tensors unlike the first" if differing else "tensors checked"
    heads = ("recipe", "size", "bpw", "PPL", "rise", "interval of the rise", "t/s", last)
    kept = [k for k in range(len(heads)) if any(row[k] not in ("–", "") for row in rows)]
    return table(
        [heads[k] for k in kept],
        [[row[k] for k in kept] for row in rows],
        "".join("tnNnnNNN"[k] for k in kept),
    )


def _design_facts(book: Book) -> str:
    recipe = book.value("recipe")
    q = "recipe.quality"
    entries = [
        (
            "Size",
            book.num("recipe.size.tensor_bytes", "gib"),
            f"{book.num('recipe.size.bpw', 'bpw')} bits per weight",
        )
    ]
    if recipe["quality"]["ppl"] is not None:
        entries.append(("Perplexity", book.num(f"{q}.ppl", "ppl"), quality_remark(book, q)))
    rise = book.span(f"{q}.ln_ppl_ratio_low", f"{q}.ln_ppl_ratio_high", "rise")
    entries.append(("Over the original", book.num(f"{q}.ln_ppl_ratio", "rise"), rise))
    if recipe["speed"]["tg_tps"] is not None:
        span = book.span("recipe.speed.tg_low", "recipe.speed.tg_high", "tps")
        entries.append(("Generation", f"{book.num('recipe.speed.tg_tps', 'tps')} t/s", span))
    ctx = book.num("recipe.settings.ctx", "int")
    cache = f"cache {escape(recipe['settings']['ctk'])} / {escape(recipe['settings']['ctv'])}"
    entries.append(("Context", ctx, cache))
    return facts(entries)


def _memory(book: Book, at: str, title: str = "Memory") -> list[str]:
    devices = book.value(at)
    if not devices:
        return []
    wide, narrow = (memory_charts(devices, width, f"{at}.") for width in (WIDE, NARROW))
    chart = "".join(both(a, b) for a, b in zip(wide, narrow, strict=True))
    return [
        f"<h2>{escape(title)}</h2>",
        figure(chart + memory_keys(devices)),
        device_table(book, at),
    ]


def _damage(book: Book) -> list[str]:
    rows = book.value("damage_by_role")
    at = "damage_by_role"
    cells = []
    for i, r in enumerate(rows):
        cells.append(
            [
                called(r["role"]),
                escape(r["types"]),
                book.num(f"{at}.{i}.bytes", "gib"),
                book.num(f"{at}.{i}.damage", "nats"),
                book.num(f"{at}.{i}.damage_share", "share"),
            ]
        )
    shown = [r for r in rows[:10] if r["damage_share"] >= 5e-4] or rows[:1]
    chart = both(
        damage_chart(shown, WIDE, f"{at}."), damage_chart(shown, NARROW, f"{at}.")
    )  # fmt: skip
    entries = [
        (tag("rect", x=0, y=0, width=14, height=14, rx=3, class_="damage"), "share of the damage"),
        (tag("rect", x=0, y=0, width=14, height=14, rx=3, class_="bytes"), "share of the bytes"),
    ]
    total = book.num("recipe.quality.damage", "nats")
    caption = f"Predicted damage of the whole mix: {total} nats."
    return [
        "<h2>Damage by role</h2>",
        figure(chart + keys(entries), caption),
        table(("tensors", "types", "size", "nats", "share"), cells, "tTnnn"),
    ]


def _proof(book: Book) -> list[str]:
    recipe = book.value("recipe")
    o = "recipe.optimality"
    given = ""
    if recipe["optimality"].get("given_for_speed"):
        given = (
            f" Of these, {book.num(f'{o}.given_for_speed', 'nats')} were given up for speed, "
            "within the quality slack; the gap is that of the damage before."
        )
    does = f"{book.num(f'{o}.objective', 'nats')}"
    if str(recipe["optimality"].get("holds_for")).startswith("nothing"):
        lines = [f"<p>No bound was proven: this mix was not searched. It does {does} nats.</p>"]
    else:
        lines = [
            f"<p>No mix under these constraints does less than "
            f"{book.num(f'{o}.lower_bound', 'nats')} nats; this one does {does} "
            f"(gap {book.num(f'{o}.gap', 'gap')}).{given}</p>"
        ]
    prices = recipe["optimality"]["prices"]
    if prices:
        worth = ", ".join(
            f"{escape(name)} {book.num(f'{o}.prices.{name}', 'price')}" for name in prices
        )
        lines.append(f"<p>A further GiB would save, in nats: {worth}.</p>")
    check = recipe["check"]
    if check and check.get("engine"):
        lines.append(
            f"<p>Checked by {escape(check['engine'])}: "
            f"{book.num('recipe.check.tensors_compared', 'int')} tensors compared, "
            f"{book.num('recipe.check.types_differing', 'int')} types and "
            f"{book.num('recipe.check.bytes_differing', 'int')} sizes differing.</p>"
        )
    items = recipe["optimality"]["constraints"]
    if items:
        lines.append(
            "<p>Constraints: " + "; ".join(f"<code>{escape(c)}</code>" for c in items) + ".</p>"
        )
    return ["<h2>Proof</h2>", *lines]


def _commands(recipe: dict[str, Any]) -> list[str]:
    body = ["<h2>Commands</h2>", "<h3>Quantize</h3>"]
    imatrix = " IMATRIX.dat" if "--imatrix" in recipe["commands"]["quantize"] else ""
    body.append(f"<pre>./quantize.sh SOURCE.gguf OUT.gguf{imatrix}</pre>")
    rules = escape("\n".join(recipe["rules"]))
    body.append(f"<details><summary>Rules</summary><pre>{rules}</pre></details>")
    if recipe["offload"].get("flags"):
        serve = shell_line(recipe["offload"]["env"], recipe["commands"]["serve"])
        body += ["<h3>Serve</h3>", f"<pre>{escape(serve)}</pre>"]
        notes = recipe["offload"].get("notes", [])
        body += [f'<p class="note">{escape(n)}</p>' for n in notes]
    measure = shlex.join(recipe["commands"]["perplexity"])
    return [*body, "<h3>Measure</h3>", f"<pre>{escape(measure)}</pre>"]


def _card(markdown: str) -> list[str]:
    return ["<h2>For the model card</h2>", f"<pre>{escape(markdown.rstrip())}</pre>"]


def _composition(rows: Sequence[dict[str, Any]], prefix: str) -> str:
    chart = both(composition_chart(rows, WIDE, prefix), composition_chart(rows, NARROW, prefix))
    return figure(chart, "Share of the bytes by type; the darker, the fewer bits per weight.")


def _role_tables(book: Book, names: Sequence[str]) -> list[str]:
    """Return roles × recipes; at most four recipes a table, so that it stays on the page."""
    body = []
    budgets = [r["budget"] for r in book.value("section.recipes")]
    heads = budgets if all(budgets) and len(set(budgets)) == len(budgets) else names
    for first in range(0, len(names), 4):
        group = range(first, min(first + 4, len(names)))
        rows = []
        for i, row in enumerate(book.value("roles")):
            cells = [book.num(f"roles.{i}.cells.{j}.bpw", "bpw") for j in group]
            rows.append([called(row["role"]), *cells])
        body.append(table(("tensors", *(heads[j] for j in group)), rows, "t" + "n" * len(group)))
    return body
