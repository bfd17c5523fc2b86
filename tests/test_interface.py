"""docs/interface.md is what comes out: its tables against real documents."""

from __future__ import annotations

import io
import json
import re
import shlex
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

sys.path.insert(0, str(Path(__file__).parent / "engine"))

from tiny import write_tiny

import quantmix
from quantmix.batch import pipeline
from quantmix.cli import main
from quantmix.engine.mainline_find import Mainline
from quantmix.store import Measurement, Store
from quantmix.texts import text as shipped

PAGE = (Path(__file__).parent.parent / "docs" / "interface.md").read_text(encoding="utf-8")

WHOLE = ("bytes", "count", "tokens", "index", "MiB", "int")
NUMBERS = ("nats", "PPL", "seconds", "tokens/s", "bits/weight", "GB/s", "share", "number")
PLAIN: dict[str, Any] = {
    **dict.fromkeys(WHOLE, int),
    **dict.fromkeys(NUMBERS, (int, float)),
    "text": str,
    "bool": bool,
    "any": (dict, list),
}

Run = Callable[..., Any]


# --- the page ---------------------------------------------------------------------------------


@cache
def chapters() -> dict[str, list[str]]:
    """Return the lines below every heading, links and backticks taken off."""
    found: dict[str, list[str]] = {}
    title, in_code = "", False
    for line in PAGE.splitlines():
        in_code ^= line.startswith("```")
        if line.startswith("#") and not in_code:
            title = line.lstrip("# ").replace("`", "")
            assert title not in found, f"two headings are called {title}"
            found[title] = []
        elif title:
            found[title].append(re.sub(r"\[([^]]*)\]\(#[^)]*\)", r"\1", line).replace("`", ""))
    return found


def table(title: str, head: str) -> dict[str, str]:
    """Return the second column by the first of the table below a heading that begins so."""
    rows = [re.split(r"(?<!\\)\|", line)[1:-1] for line in chapters()[title] if line[:1] == "|"]
    heads = [i for i, row in enumerate(rows) if row[0].strip() == head]
    return {row[0].strip(): row[1].strip() for i in heads for row in rows[i + 2 :]}


@cache
def keys(title: str) -> dict[str, str]:
    """Return key → type of an object of the page, with those that it takes over from others."""
    found: dict[str, str] = {}
    for line in chapters()[title]:
        if taken := re.fullmatch(r"(\S.*?)(?: without (\w+))?, and", line):
            found |= {k: v for k, v in keys(taken[1]).items() if k != taken[2]}
    return found | table(title, "key")


def objects() -> set[str]:
    """Return the headings with a table of keys."""
    return {title for title in chapters() if keys(title)}


def inline(kind: str) -> dict[str, str]:
    """Return key → type of `{ a: X, b: Y }`."""
    parts, depth = [""], 0
    for letter in kind[1:-1]:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if letter == "," and not depth:
            parts.append("")
        else:
            parts[-1] += letter
    return {k.strip(): v.strip() for k, _, v in (p.partition(":") for p in parts)}


def wrong(value: Any, kind: str, where: str) -> Iterator[str]:
    """Yield what in a JSON value is not of a type of the page."""
    may_be_null = kind.endswith(" or null")
    kind = kind.removesuffix(" or null")
    word, _, rest = kind.partition(" of ")
    if value is None and may_be_null:
        return
    if word == "list" and isinstance(value, list):
        for i, item in enumerate(value):
            yield from wrong(item, rest, f"{where}[{i}]")
    elif word == "map" and isinstance(value, dict):
        for name, item in value.items():
            yield from wrong(item, rest, f"{where}.{name}")
    elif word in ("list", "map"):
        yield f"{where} is {value!r:.60}, not {kind}"
    elif kind in PLAIN:
        if not isinstance(value, PLAIN[kind]) or (isinstance(value, bool) and kind != "bool"):
            yield f"{where} is {value!r:.60}, not {kind}"
    else:
        yield from wrong_keys(value, inline(kind) if kind[0] == "{" else keys(kind), where)


def wrong_keys(value: Any, known: dict[str, str], where: str) -> Iterator[str]:
    """Yield what in an object is missing, not on the page, or of another type than there."""
    if not isinstance(value, dict):
        yield f"{where} is {value!r:.60}, not an object"
        return
    yield from (f"{where}.{k} is not on the page" for k in value if k not in known)
    for key, kind in known.items():
        if key in value:
            yield from wrong(value[key], kind.removeprefix("optional "), f"{where}.{key}")
        elif not kind.startswith("optional "):
            yield f"{where}.{key} is missing"


def require_as_documented(document: Any, title: str) -> None:
    """Require that a document has the keys and types of its table, at any depth."""
    assert not list(wrong(document, title, title))


# --- the documents ----------------------------------------------------------------------------


@cache
def command() -> Any:
    """Return the whole command line."""
    if not main.app.registered_commands:
        main._register()
    return get_command(main.app)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder for everything that is made here, the store included."""
    place = tmp_path_factory.mktemp("interface")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUANTMIX_DB", str(place / "store.db"))
        yield place


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    """Run a command line and return its JSON; `{}` in it is the folder."""

    def call(line: str, code: int = 0) -> Any:
        out = io.StringIO()
        args = [a.replace("{}", str(folder)) for a in shlex.split(line)]
        with redirect_stdout(out):
            ended = command()([*args, "--json", "--quiet"], standalone_mode=False)
        assert (ended or 0) == code
        return json.loads(out.getvalue())

    return call


@pytest.fixture(scope="module")
def designed(run: Run) -> Any:
    """What `design` printed for a small model, in GPU and RAM, with the recipe in `{}/a`."""
    line = "design qwen3-4b --gpus 1x24G --ram 16G --ctx 4096 --types q8_0,iq4_ks,iq3_k --no-check"
    return run(f"{line} --out {{}} --name a")


@pytest.fixture(scope="module")
def cloned(run: Run, folder: Path, designed: Any) -> Any:
    """What `import` printed for other rules, with the recipe in `{}/b`."""
    (folder / "rules.txt").write_text(".*=iq4_xs\n")
    return run("import {}/rules.txt --model qwen3-4b --out {} --name b")


PRINTED = {
    "frontier": "frontier deepseek-r1-0528 --points 3",
    "predict": "predict smollm2-135m --uniform iq4_xs",
    "inspect": "inspect smollm2-135m --at iq4_xs",
    "models": "models",
    "types": "types --all",
    "rigs": "rigs --total 192G",
    "doctor": "doctor",
    "credits": "credits",
    "offload": "offload qwen3-30b-a3b --at iq4_ks --gpus 1xrtx-4090 --ram 64G --ctx 4096",
    "choose": "choose qwen3-235b-a22b --rig 1x96g-384g --engine ik",
}
"""Documents of commands that need nothing made before."""


@pytest.mark.parametrize("title", PRINTED)
def test_a_document_has_the_keys_of_its_table(title: str, run: Run) -> None:
    """Every documented key is there, every key that is there is documented, types agree."""
    require_as_documented(run(PRINTED[title]), title)


@pytest.mark.parametrize("kind", ["memory", "speed"])
def test_backtests_have_the_keys_of_their_table(kind: str, run: Run) -> None:
    """Bands and rows of both kinds, with what only one of them has."""
    require_as_documented(run(f"backtest {kind}"), "backtest")


def test_pasted_flags_have_the_keys_of_their_table(run: Run) -> None:
    """Findings, overrides and the better line of `offload --lint`."""
    line = "offload qwen3-30b-a3b --at iq4_ks --gpus 1xrtx-4090 --ram 64G --cpu xeon-8-ch-ddr5-4800"
    found = run(f"{line} --measured 8 --lint '-ngl 99 -ot exps=CPU'")
    require_as_documented(found, "offload --lint")
    assert found["better"]


def test_recipes_have_the_keys_of_their_table(run: Run, folder: Path, designed: Any) -> None:
    """What `design` prints, and the recipe.json that it writes."""
    require_as_documented(designed, "design")
    recipe = json.loads((folder / "a" / "recipe.json").read_text(encoding="utf-8"))
    require_as_documented(recipe, "recipe.json")


def test_what_reads_recipes_has_the_keys_of_its_table(run: Run, cloned: Any) -> None:
    """`import`, `check`, `diff` and the pages."""
    require_as_documented(cloned, "clone, import")
    require_as_documented(run("check {}/a"), "check")
    require_as_documented(run("diff {}/a {}/b"), "diff")
    for line in ("design {}/a", "sweep {}", "compare {}/a {}/b"):
        require_as_documented(run(f"report {line} --no-frontier --out {{}}/page.html"), "report")


def test_a_choice_is_printed_where_nothing_fits(run: Run) -> None:
    """Exit 3, and the document with `pick` null."""
    found = run("choose qwen3-235b-a22b --gpus 1x24G", code=3)
    require_as_documented(found, "choose")
    assert found["pick"] is None


def test_an_imported_table_has_the_keys_of_its_table(run: Run, folder: Path) -> None:
    """The document, and the measurements file that it names."""
    lines = "QTYPE,blk.0.attn_k.weight,blk.1.attn_k.weight\niq1_kt,0.02,0.03\niq4_k,0.002,0.003\n"
    (folder / "table.csv").write_text(lines)
    found = run("import {}/table.csv --model qwen3-4b --out {}")
    require_as_documented(found, "import of a table")
    require_as_documented(json.loads(Path(found["measurements"]).read_text()), "measure")


def test_a_batch_has_the_keys_of_its_tables(run: Run, folder: Path) -> None:
    """The plan, and the summary of a run in which a budget fits and another does not."""
    job = '[[job]]\nmodel = "smollm2-135m"\nbudgets = ["--size 5bpw", "--size 1bpw"]'
    (folder / "p.toml").write_text(f'[defaults]\nout = "batch"\n{job}\nsteps = ["design"]\n')
    require_as_documented(run("batch {}/p.toml --dry-run"), "batch --dry-run")
    require_as_documented(run("batch {}/p.toml", code=3), "batch")


@pytest.mark.engine
def test_what_measures_has_the_keys_of_its_table(run: Run, folder: Path) -> None:
    """From a tiny real model to a refined recipe, by the real engine."""
    write_tiny(folder / "tiny.gguf")
    (folder / "text.txt").write_text(shipped("probe").read_text(encoding="utf-8")[2000:9000])
    types, text = "--types q4_K,q6_K", "--corpus {}/text.txt --chunks 1 --ctx 64"
    matrix, base = "--imatrix {}/tiny.dat", "--base {}/tiny.gguf"
    run(f"design {{}}/tiny.gguf --size 5bpw {types} --out {{}} --name tiny")
    require_as_documented(run(f"imatrix {{}}/tiny.gguf {text} --out {{}}/tiny.dat"), "imatrix")
    converted = run("imatrix {}/tiny.dat --convert --out {}/tiny-imatrix.gguf")
    require_as_documented(converted, "imatrix")
    made = run(f"quantize {{}}/tiny {{}}/tiny.gguf {matrix}")
    require_as_documented(made, "quantize")
    run(f"measure {{}}/tiny.gguf {types} {text} {matrix} --errors --out {{}}/roles.json")
    require_as_documented(json.loads((folder / "roles.json").read_text()), "measure")
    seen = run(f"verify {{}}/tiny {text} {base} {matrix} --measurements {{}}/roles.json")
    require_as_documented(seen, "verify")
    assert seen["kld"]
    assert seen["predicted"]
    assert seen["predicted_kld"]
    better = run(
        f"refine {{}}/tiny {{}}/tiny.gguf {matrix} --by role --corpus {{}}/text.txt --chunks 2 "
        "--held-out 4 --ctx 32"
    )
    require_as_documented(better, "refine")
    if better["accepted"]:
        refined = json.loads((Path(better["recipe"]) / "recipe.json").read_text(encoding="utf-8"))
        require_as_documented(refined, "recipe.json")
        assert refined["refined"]
    with Store(folder / "store.db") as store:
        (row,) = store.find()
    columns = {f.name: getattr(row, f.name) for f in fields(Measurement)}
    assert not list(wrong_keys(columns, table("Measurements store", "column"), "store"))


@pytest.mark.engine
def test_an_oracle_has_the_keys_of_its_table(run: Run, folder: Path, mainline: Mainline) -> None:
    """`check --oracle` of a recipe for mainline."""
    write_tiny(folder / "small.gguf")
    run("design {}/small.gguf --engine mainline --gpus 1x24G --ctx 512 --out {} --name oracle")
    found = run("check {}/oracle --oracle")
    require_as_documented(found, "check")
    assert found["oracle"]["ok"]


# --- the rest of the page ---------------------------------------------------------------------

NOT_RUN = {"demo-model", "fetch-corpus"}
"""Documents of commands that need the network."""


def test_every_table_is_of_a_document_that_is_looked_at() -> None:
    """No table describes an object that nothing on the page leads to."""
    roots = {*PRINTED, *NOT_RUN, "backtest", "offload --lint", "design", "recipe.json", "check"}
    roots |= {"clone, import", "import of a table", "diff", "report", "batch --dry-run", "batch"}
    roots |= {"imatrix", "quantize", "measure", "verify", "refine"}
    known = objects()
    seen: set[str] = set()
    left = list(roots)
    while left:
        title = left.pop()
        seen.add(title)
        taken = [line.removesuffix(", and") for line in chapters()[title] if line.endswith(", and")]
        words = " ".join([*keys(title).values(), *taken])
        left += [o for o in known - seen if re.search(rf"(?<!\w){re.escape(o)}(?!\w)", words)]
    assert seen == known


def test_every_command_is_on_the_page_and_no_other() -> None:
    """The table of commands is that of `quantmix --help`, and each has its document."""
    named = {line.split()[0] for line in table("Commands", "command")}
    assert named == set(command().commands)
    described = {word for title in objects() for word in re.split(r"[, ]+", title)}
    assert named <= described


def test_links_within_the_page_lead_somewhere() -> None:
    """Every anchor is that of a heading."""
    anchors = {re.sub(r"[^\w -]", "", t.lower()).replace(" ", "-") for t in chapters()}
    assert set(re.findall(r"\]\(#([^)]*)\)", PAGE)) <= anchors


def test_a_recipe_folder_holds_the_files_of_the_page(folder: Path, designed: Any) -> None:
    """All of them where the budget names devices."""
    assert {f.name for f in (folder / "a").iterdir()} == set(table("Recipe folder", "file"))


def test_the_pipeline_of_the_page_loads(tmp_path: Path) -> None:
    """The example has every key of a pipeline that is no flag of `design`."""
    text = PAGE.split("```toml\n")[1].split("```")[0]
    (tmp_path / "p.toml").write_text(text, encoding="utf-8")
    assert pipeline.load(tmp_path / "p.toml").jobs[0].steps == pipeline.STEPS
    document = tomllib.loads(text)
    job = {"model", "budgets", *(f.name for f in fields(pipeline.Job))} - {"number", "requests"}
    assert set(document["job"][0]) == job
    assert set(document["defaults"]) == {"out", "keep", "disk"}


def test_the_python_names_of_the_page_are_the_public_ones() -> None:
    """The table is the package's `__all__`."""
    named = {name.partition("(")[0] for name in table("Python", "name")}
    assert named == set(quantmix.__all__)
