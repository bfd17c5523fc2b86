"""The backtest: what it says of itself."""

from __future__ import annotations

import io
import json
import random
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from quantmix.errors import BadFile
from quantmix.loss import backtest, cases, evidence, measured_recipes, prior

from .conftest import catalog_model


@pytest.fixture(scope="module")
def doc() -> dict[str, Any]:
    """The backtest on package data alone."""
    return backtest.run()


def _band(bands: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(b for b in bands if b["band"] == name)


@pytest.mark.slow
def test_targets_hold_on_package_data(doc: dict[str, Any]) -> None:
    """Median errors and coverage by band, next to the controls, as docs/loss-evidence.md says."""
    high, middle = _band(doc["bands"], ">=3.3"), _band(doc["bands"], "2.3-3.3")
    assert high["median"] <= 0.005
    assert middle["median"] <= 0.02
    control = {b["band"]: b for b in doc["controls"]["bpw_only"]["bands"]}
    assert middle["p90"] <= 0.8 * control["2.3-3.3"]["p90"]
    assert 0.85 <= _band(doc["bands"], "all")["coverage90"] <= 0.97
    assert _band(doc["leave_model_out"]["bands"], "all")["coverage90"] >= 0.8


@pytest.mark.slow
def test_a_model_left_out_is_covered_in_every_family(doc: dict[str, Any]) -> None:
    """The prior's intervals hold for each kind of model, not just for all together."""
    inside: dict[str, list[bool]] = {}
    for row in doc["leave_model_out"]["rows"]:
        if not row["shown_apart"]:
            family = prior.family(catalog_model(row["model"]))
            inside.setdefault(family, []).append(row["low"] <= row["measured"] <= row["high"])
    assert set(inside) == {"dense", "gqa", "hybrid", "hybrid_moe", "mla"}
    for family, covered in inside.items():
        assert sum(covered) >= 0.8 * len(covered), family


@pytest.mark.slow
def test_recipes_of_a_tool_are_predicted_from_mixes_by_class(doc: dict[str, Any]) -> None:
    """What one tool solved by tensor is covered when only other people's mixes are known."""
    rows = doc["leave_tool_out"]["rows"]
    assert len(rows) >= 50
    assert all("recipe" in r["id"] for r in rows)
    covered = [r["low"] <= r["measured"] <= r["high"] for r in rows]
    assert sum(covered) >= 0.85 * len(rows)


@pytest.mark.slow
def test_nothing_is_dropped_silently(doc: dict[str, Any]) -> None:
    """Every published row is judged, or skipped with a reason."""
    assert doc["n"] == len(doc["rows"])
    assert all(s["why"] for s in doc["skipped"])
    judged = {r["id"] for r in doc["rows"]}
    skipped = {s["id"] for s in doc["skipped"]}
    for row in evidence.published():
        name = f"{row.model}: {row.label}"
        assert name in judged or name in skipped, name


@pytest.mark.slow
def test_the_base_itself_is_not_judged(doc: dict[str, Any]) -> None:
    """Where the q8_0 file *is* the base, predicting it is no achievement."""
    assert not any(r["id"] == "deepseek-r1-0528: Q8_0" for r in doc["rows"])
    why = {s["id"]: s["why"] for s in doc["skipped"]}
    assert "base" in why["deepseek-r1-0528: Q8_0"]
    # A bf16 base: the q8_0 file is a mix like any other.
    assert any(r["id"] == "glm-4.5-air: Q8_0" for r in doc["rows"])


def test_a_mix_that_measures_like_the_base_is_judged() -> None:
    """Six bits at exactly the base's perplexity: a coincidence, not the base."""
    rows = [p for p in evidence.published() if p.model == "deepseek-r1"]
    row = next(p for p in rows if p.label.startswith("Q8_0"))
    six = replace(row, label="six bits", mix="all=q6_K", bpw=6.57, imatrix=True)
    model = catalog_model("deepseek-r1")
    bench = evidence.bench(model, prior.shares(model), [row, six])
    assert [r.id for r in bench.rows] == ["six bits"]
    assert [label for label, _ in bench.skipped] == [row.label]


@pytest.mark.slow
def test_models_on_which_perplexity_means_nothing_stand_apart(doc: dict[str, Any]) -> None:
    """GLM-4.7-Flash is judged, marked, and kept out of the bands."""
    assert "glm-4.7-flash" in doc["shown_apart"]["models"]
    rows = [r for r in doc["rows"] if r["model"] == "glm-4.7-flash"]
    assert rows
    assert all(r["shown_apart"] for r in rows)
    assert sum(b["n"] for b in doc["everything"]["bands"][:3]) == doc["n"]


@pytest.mark.slow
def test_the_document_is_plain_json(doc: dict[str, Any]) -> None:
    """No NaN, no infinity, intervals in order."""
    json.dumps(doc, allow_nan=False)
    for row in (*doc["rows"], *doc["leave_model_out"]["rows"]):
        assert row["low"] <= row["predicted"] <= row["high"]


def test_twins_are_left_out_together() -> None:
    """A mix that was measured twice is never predicted from its twin."""
    found, _ = cases.gather([p for p in evidence.published() if p.model == "deepseek-v3-0324"])
    case = found[0]
    labels = [r.id for r in case.bench.rows]
    i = next(k for k, x in enumerate(labels) if x == "IQ2_K_R4 (ubergarm)")
    assert not any("IQ2_K_R4" in labels[j] and "PURE" not in labels[j] for j in
                   backtest.others(case, i) if case.bench.rows[j].exact)  # fmt: skip


def test_recipes_with_their_ppl_in_the_name(tmp_path: Path) -> None:
    """Names give model and ppl; bad measurements and foreign names are skipped with a reason."""
    body = "token_embd=q8_0\noutput=q8_0\nexps=iq2_ks\n.*=iq5_k\n"
    name = "DeepSeek-R1-0528.THIREUS-2.5bpw-{}ppl.1GB-GGUF.abc.recipe"
    (tmp_path / name.format("3.6001")).write_text(body)
    (tmp_path / name.format("3.7001")).write_text("# incorrect ppl!\n" + body)
    (tmp_path / name.format("0.0")).write_text(body)
    (tmp_path / "Other.recipe").write_text(body)
    (tmp_path / "Nobody.ME-2.5bpw-3.6ppl.recipe").write_text(body)
    (tmp_path / name.format("3.8001")).write_text("output=q8_0\n")
    recipes, skipped = measured_recipes.read(tmp_path)
    assert [(r.model, r.ppl) for r in recipes] == [("deepseek-r1-0528", 3.6001)]
    model = catalog_model("deepseek-r1-0528")
    types = dict(zip([t.name for t in model.tensors], recipes[0].types, strict=True))
    assert types["blk.5.ffn_down_exps.weight"] == "iq2_ks"
    assert types["blk.5.attn_norm.weight"] is None
    assert len(skipped) == 5
    with pytest.raises(BadFile):
        measured_recipes.read(tmp_path / "nowhere")


def test_a_damaged_archive_of_recipes_is_named(tmp_path: Path) -> None:
    """A .tar.gz whose download was cut is a bad file."""
    whole = tmp_path / "recipes.tar.gz"
    with tarfile.open(whole, "w:gz") as tar:
        info = tarfile.TarInfo("DeepSeek-R1.ME-2.5bpw-3.6ppl.recipe")
        info.size = 100_000
        tar.addfile(info, io.BytesIO(random.Random(0).randbytes(info.size)))
    whole.write_bytes(whole.read_bytes()[:50_000])
    with pytest.raises(BadFile, match=r"recipes\.tar\.gz is damaged"):
        measured_recipes.read(whole)


@pytest.mark.slow
def test_a_csv_of_measurements_adds_rows(tmp_path: Path) -> None:
    """Rows of a model the package has never seen are predicted; other benches are skipped."""
    file = tmp_path / "m.csv"
    file.write_text(
        "model,label,bpw,ppl,corpus,n_ctx,base_ppl_bf16_or_q8,mix\n"
        "GLM-4.5,q4 all,4.5,4.60,wiki.test.raw,512,4.55,all=q4_K\n"
        "GLM-4.5,other text,4.5,9.60,c4,512,4.55,all=q4_K\n"
        "Nobody-1B,x,4.5,9.60,wiki.test.raw,512,,all=q4_K\n"
    )
    doc = backtest.run(measurements=file)
    row = next(r for r in doc["rows"] if r["id"] == "glm-4.5: q4 all")
    assert row["measured"] == pytest.approx(4.60)
    assert row["low"] < row["predicted"] < row["high"]
    reasons = {s["id"]: s["why"] for s in doc["skipped"]}
    assert "corpus" in reasons["glm-4.5: other text"]
    assert "catalog" in reasons["Nobody-1B: x"]
