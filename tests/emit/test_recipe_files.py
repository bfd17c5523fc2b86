"""Published recipe files of another tool: every tensor resolved, the bpw of their names given."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator, Set
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from quantmix.clone import import_rules, layout_named_in, model_named_in
from quantmix.ggml.types import GgmlType, get, resolve
from quantmix.models.model import Model, Tensor
from quantmix.models.sources import load_model
from quantmix.rule_lines import resolve_rules

RESEARCH = os.environ.get("QUANTMIX_RESEARCH")
PAGE: Final = Path(__file__).parents[2] / "docs" / "recipe-files.md"
# The folder of recipes that the tool's author set aside; all exceptions lie in it.
OLD_FOLDER: Final = "unsuccessful_recipe_examples"
# Errors in the names of old files, as docs/recipe-files.md explains them.
REASONS: Final = ("anchors", "digits", "scales")
TABLE_ROW: Final = re.compile(r"^# [*+]*(\S+)\s+(\d+)\s+([\d.]+)\s+[\d.]+ GiB", re.MULTILINE)
TOTAL: Final = re.compile(r"^# *(?:GPU\+CPU|GPU) Total: ([\d.]+) GiB", re.MULTILINE)


needs_tables = pytest.mark.skipif(
    RESEARCH is None, reason="QUANTMIX_RESEARCH does not name the raw tables"
)


def test_mainline_lowercases_patterns() -> None:
    """A pattern with capitals matches in mainline and not in ik, as in the engines."""
    model = load_model("smollm2-135m")
    assert resolve_rules(["ATTN_Q=q8_0"], model, "ik") == {}
    assert len(resolve_rules(["ATTN_Q=q8_0"], model, "mainline")) == 30


def bpw(model: Model, types: dict[str, str]) -> float:
    """Bits per weight of what the engine writes for the asked types, row scales included."""
    n_bytes = sum(written(t, types).tensor_bytes(t.shape) for t in model.tensors)
    return 8 * n_bytes / model.n_elements


def written(t: Tensor, types: dict[str, str]) -> GgmlType:
    """The type that the engine writes for the one asked, fallbacks applied."""
    return resolve(types[t.name], t.name, t.shape) if t.quantizable else get(types[t.name])


def bpw_of_old_tool(model: Model, text: str, errors: Set[str] = frozenset(REASONS)) -> float:
    """Bits per weight by the arithmetic of the tool's versions of 2025, or by part of its errors.

    It divides the bytes by the weights that it infers from them: bytes / bits of the type asked.
    `anchors`: every rule means whole names. `scales`: bytes and bits have no row scales. `digits`:
    a type spelled `qN_K` has N bits, since its map of sizes spells it `qN_k` and none is found.
    """
    types = resolve_rules(anchored(text) if "anchors" in errors else text.splitlines(), model)
    n_bytes = n_weights = 0.0
    for t in model.tensors:
        kind, asked = written(t, types), get(types[t.name])
        own_bytes = t.n_elements * kind.bpw / 8
        bits = asked.bpw
        if "scales" not in errors:
            own_bytes = kind.tensor_bytes(t.shape)
            bits += 8 * asked.row_meta / t.ncols
        if "digits" in errors and (found := re.fullmatch(r"q(\d)_K", asked.name)):
            bits = float(found[1])
        n_bytes += own_bytes
        n_weights += own_bytes * 8 / bits
    return 8 * n_bytes / n_weights


def anchored(text: str) -> list[str]:
    """The rules of a recipe with every pattern made to match whole names."""
    rules = (line.rpartition("=") for line in text.splitlines() if not line.startswith("#"))
    return [f"^{p.removeprefix('^').removesuffix('$')}$={q}" for p, _, q in rules if p]


def recipes() -> Iterator[tuple[str, str]]:
    """(path, text) of every published recipe."""
    archive = Path(str(RESEARCH)) / "data" / "thireus" / "recipes.tar.gz"
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            file = tar.extractfile(member) if member.isfile() else None
            if file is not None:
                yield member.name, file.read().decode()


@cache
def model_of(file: str, layout: str | None) -> Model:
    """The model that a recipe's file name begins with."""
    return load_model(re.split(r"\.(?:ROOT|THIREUS|WEB_USER)", file)[0], layout=layout)


def all_recipes() -> Iterator[tuple[str, str, float, Model, str]]:
    """(folder, short name, bpw stated in the name, model, text) of every published recipe."""
    for path, text in recipes():
        folder, _, file = path.rpartition("/")
        name = re.match(r".*-([0-9.]+)bpw-[0-9.]+ppl", file)
        assert name, file
        model = model_of(file, "ik" if "attn_kv_b" in text else None)
        yield folder, name[0], float(name[1]), model, text


def listed() -> dict[str, tuple[float, float, set[str]]]:
    """The exceptions that docs/recipe-files.md lists: name → bpw stated, bpw of the bytes, why."""
    rows = re.findall(
        r"^\| `(\S+)` \| ([\d.]+) \| ([\d.]+) \| ([a-z, ]+) \|$", PAGE.read_text("utf-8"), re.M
    )
    return {name: (float(a), float(b), set(why.split(", "))) for name, a, b, why in rows}


def test_every_reason_of_the_page_is_one_that_the_tests_know() -> None:
    """The page lists 33 exceptions: 14 without row scales alone, 19 with another cause."""
    why = [reasons for _, _, reasons in listed().values()]
    assert len(why) == 33
    assert sum(reasons == {"scales"} for reasons in why) == 14
    counts = dict(re.findall(r"^\| (\w+) \| (\d+) \|", PAGE.read_text("utf-8"), re.M))
    assert counts == {name: str(sum(name in reasons for reasons in why)) for name in REASONS}


@pytest.mark.slow
@needs_tables
def test_published_recipes_reproduce_the_bpw_in_their_names() -> None:
    """All 252 cover every tensor; all give their bpw to 3 decimals but those the page lists."""
    exceptions, seen = listed(), 0
    wrong = {}
    for folder, name, stated, model, text in all_recipes():
        types = resolve_rules(text.splitlines(), model)
        assert len(types) == len(model.tensors), name
        seen += 1
        if abs(bpw(model, types) - stated) >= 5e-4:
            assert OLD_FOLDER in folder
            wrong[name] = (stated, round(bpw(model, types), 4))
    assert seen == 252
    assert wrong == {name: (a, b) for name, (a, b, _) in exceptions.items()}


@pytest.mark.slow
@needs_tables
def test_every_published_recipe_file_imports(tmp_path: Path) -> None:
    """`import` takes all 252: model and layout as the file names them, sizes as the engine's."""
    for number, (_, name, _, model, text) in enumerate(all_recipes()):
        file = tmp_path / f"{number}.recipe"
        file.write_text(text, "utf-8")
        spec = model_named_in(file)
        assert spec is not None
        named = load_model(spec, layout=layout_named_in(file))
        recipe = import_rules(file, named)
        types = resolve_rules(text.splitlines(), model)
        assert 8 * sum(t.bytes for t in recipe.tensors) / named.n_elements == bpw(model, types), (
            name
        )


@pytest.mark.slow
@needs_tables
def test_old_names_follow_from_the_errors_of_the_old_tool() -> None:
    """Its arithmetic gives all 33 names to 4 decimals, and each reason listed is necessary.

    A reason is listed exactly when the figure moves by over 0.0005 without that error.
    """
    exceptions = listed()
    for _, name, stated, model, text in all_recipes():
        if name not in exceptions:
            continue
        assert bpw_of_old_tool(model, text) == pytest.approx(stated, abs=6e-5), name
        without = {why: bpw_of_old_tool(model, text, set(REASONS) - {why}) for why in REASONS}
        needed = {why for why, value in without.items() if abs(value - stated) >= 5e-4}
        assert needed == exceptions[name][2], name


@pytest.mark.slow
@needs_tables
def test_old_recipes_count_types_by_whole_names() -> None:
    """The tool's own table in each file agrees with the cause found for its name.

    It counts the types as if rules meant whole names, prints the digit as the bits of `qN_K`
    types, and its total is the bytes without row scales.
    """
    exceptions = listed()
    for _, name, _, model, text in all_recipes():
        if name not in exceptions:
            continue
        reasons = exceptions[name][2]
        meant = resolve_rules(anchored(text), model)
        counts: Counter[str] = Counter()
        for qtype, n, bits in TABLE_ROW.findall(text):
            counts[qtype] += int(n)
            off = float(bits) != pytest.approx(get(qtype).bpw, abs=1e-3)
            assert off == ("digits" in reasons and qtype.endswith("_K")), (name, qtype)
        assert +counts == Counter(meant.values()), name
        taken = {n for n, q in resolve_rules(text.splitlines(), model).items() if q != meant[n]}
        assert bool(taken) == ("anchors" in reasons), name
        assert all(n.endswith(".attn_output.weight") for n in taken), name
        n_bytes = sum(t.n_elements * written(t, meant).bpw / 8 for t in model.tensors)
        total = TOTAL.findall(text)[-1]
        digits = len(total.partition(".")[2])
        assert f"{n_bytes / 2**30:.{digits}f}" == total, name
