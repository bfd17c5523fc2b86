"""What the pages are made from."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from quantmix.errors import BadFile, UsageError
from quantmix.report import build, data
from quantmix.report.markdown import card_table, mix_table
from quantmix.store import Store
from tests.report.conftest import MODEL, measurement


def test_damage_and_bytes_add_up(recipes):
    """Roles sum to the damage of the recipe, and their bytes to those of its quantized tensors."""
    for recipe in recipes:
        rows = data.damage_by_role(recipe)
        assert sum(r["damage"] for r in rows) == pytest.approx(recipe.quality.damage)
        assert sum(r["damage_share"] for r in rows) == pytest.approx(1.0)
        kept = sum(t.bytes for t in recipe.tensors if t.type == "f32")
        assert sum(r["bytes"] for r in rows) + kept == recipe.size.tensor_bytes


def test_runs_cover_every_tensor_once(recipes):
    """Unrolled, the runs of the map give the type of every quantized tensor and all its bytes."""
    recipe = recipes[2]
    cells = {}
    for run in data.type_runs(recipe):
        layers = [None] if run["first"] is None else range(run["first"], run["last"] + 1)
        for layer in layers:
            assert (run["role"], layer) not in cells
            cells[run["role"], layer] = run["type"]
    quantized = [t for t in recipe.tensors if t.type not in ("f32", "f16", "bf16")]
    assert cells == {(t.role, t.layer): t.type for t in quantized}
    assert sum(r["bytes"] for r in data.type_runs(recipe)) == sum(t.bytes for t in quantized)


def test_compositions_sum_to_one(recipes):
    """The shares of a mix add up, in order of bits per weight."""
    mix = data.composition(recipes[0])
    assert sum(p["share"] for p in mix["parts"]) == pytest.approx(1.0)
    assert [p["bpw"] for p in mix["parts"]] == sorted(p["bpw"] for p in mix["parts"])


def test_only_comparable_measurements_are_shown_together(recipes):
    """Rows of another corpus or length are counted, not mixed in; the newest of a file counts."""
    first = measurement(recipes[0])
    rows = [
        replace(first, ppl=9.0),
        first,
        measurement(recipes[1]),
        measurement(recipes[1], corpus="other"),
        measurement(recipes[1], chunks=2),
    ]
    bench, elsewhere = data.one_bench(rows)
    assert [m.data for m in bench] == [recipes[0].name, recipes[1].name]
    assert bench[0].ppl == first.ppl
    assert elsewhere == 2


def test_a_measurement_belongs_by_tensors_and_name(recipes):
    """Other tensors, or the name of another known model, keep a measurement out."""
    names = [t.name for t in recipes[0].tensors]
    assert data.belongs(measurement(recipes[0]), MODEL, names)
    assert not data.belongs(measurement(recipes[0]), MODEL, names[1:])
    other = measurement(recipes[0], model_name="qwen3-0.6b")
    assert not data.belongs(other, MODEL, names)


def test_measured_rows_take_the_name_of_their_recipe(subject):
    """A file with exactly the types of a recipe is ours; another is named by its file."""
    rows = data.section(subject)["measured"]
    assert {(r["label"], r["ours"]) for r in rows} == {
        (subject.recipes[0].name, True),
        ("stock-Q4_K", False),
    }


def test_residuals_compare_what_was_left_out(subject):
    """Residuals are the log of measured over predicted; the summary counts those inside."""
    section = data.section(subject)
    rows, summary = section["residuals"], section["residuals_summary"]
    assert len(rows) > 5
    assert sum(r["ours"] for r in rows) == 1
    for r in rows:
        assert r["residual"] == pytest.approx(math.log(r["measured"] / r["predicted"]))
        assert r["holds"] == (r["low"] <= r["measured"] <= r["high"])
    assert summary["inside"] == sum(r["holds"] for r in rows)
    assert summary["n"] == len(rows)


def test_the_frontier_spans_what_is_marked(subject):
    """The curve reaches beyond the smallest and largest recipe, published mix and measurement."""
    section = data.section(subject)
    sizes = [p["tensor_bytes"] for p in section["frontier"]["points"]]
    marks = [r["size"]["tensor_bytes"] for r in section["recipes"]]
    assert sizes[0] <= min(marks)
    assert sizes[-1] >= max(marks)


def test_the_card_prefers_what_was_measured(subject):
    """A measured recipe shows its measured PPL with its error, another its interval."""
    section = data.section(subject)
    lines = card_table(section).splitlines()
    assert len(lines) == 2 + len(section["recipes"])
    assert len({line.count("|") for line in lines}) == 1
    name = subject.recipes[0].name
    measured = next(line for line in lines if name in line)
    assert "measured" in measured
    (row,) = (m for m in section["measured"] if m["label"] == name)
    assert f"{row['ppl']:.4f} ± {row['ppl_err']:.4f}" in measured
    predicted = next(line for line in lines if subject.recipes[1].name in line)
    assert "predicted" in predicted
    assert "[" in predicted


def test_the_mix_table_has_a_line_per_role(recipes):
    """The mix as Markdown lists every role."""
    rows = data.damage_by_role(recipes[0])
    assert mix_table(rows).count("\n") == 2 + len(rows)


def test_a_sweep_reads_a_folder(folder, recipes, tmp_path):
    """Recipes below a folder come in order of size, with the measurements of a store."""
    with Store(tmp_path / "m.db") as store:
        store.add(measurement(recipes[0]))
    doc = build.sweep(folder, db=tmp_path / "m.db", frontier=False)
    (section,) = doc["sections"]
    sizes = [r["size"]["tensor_bytes"] for r in section["recipes"]]
    assert sizes == sorted(sizes)
    assert len(sizes) == len(recipes)
    assert len(section["measured"]) == 1


def test_a_sweep_reads_a_store(recipes, tmp_path):
    """A store alone gives a section per measured model; with --model, the model's frontier too."""
    with Store(tmp_path / "m.db") as store:
        store.add(measurement(recipes[0]))
        store.add(measurement(recipes[1]))
    (section,) = build.sweep(tmp_path / "m.db")["sections"]
    assert section["name"] == "unknown model"
    assert len(section["measured"]) == 2
    assert section["frontier"] is None
    (section,) = build.sweep(tmp_path / "m.db", model=MODEL)["sections"]
    assert section["frontier"]["points"]


def test_bad_places_are_named(folder, tmp_path, monkeypatch):
    """No recipe, no store, another model's name: an error that says which."""
    monkeypatch.setenv("QUANTMIX_DB", str(tmp_path / "none.db"))
    with pytest.raises(BadFile, match="holds no recipe"):
        build.sweep(tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(BadFile, match="neither a folder"):
        build.sweep(tmp_path / "text")
    with pytest.raises(BadFile, match="no store"):
        build.sweep(folder, db=tmp_path / "none.db")
    with pytest.raises(UsageError, match="no recipe and no measurement of smollm2"):
        build.sweep(folder, model="smollm2-135m")


def test_comparisons_are_of_one_model(recipes, subject):
    """One recipe, or recipes of two models, cannot be compared; differing tensors are counted.

    A file that was cloned is of the model whose tensors it has, whatever it is called.
    """
    with pytest.raises(UsageError, match="two recipes"):
        data.compare_document(replace(subject, recipes=(recipes[0],)))
    named = [replace(recipes[1], model=replace(recipes[1].model, id=i)) for i in ("r1", "v3", "x")]
    fewer = replace(named[2], tensors=named[2].tensors[1:])
    for two in (named[:2], [recipes[0], fewer]):
        with pytest.raises(UsageError, match="different models"):
            data.compare_document(replace(subject, recipes=tuple(two)))
    cloned = data.compare_document(replace(subject, recipes=(recipes[0], named[2])))
    assert cloned["differing"][1] > 0
    doc = data.compare_document(replace(subject, recipes=(recipes[0], recipes[0], recipes[1])))
    assert doc["differing"][:2] == [0, 0]
    assert doc["differing"][2] > 0
