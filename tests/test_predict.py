"""Predicting mixes that others made."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from quantmix import predict
from quantmix.errors import BadFile, UnknownName, UsageError
from quantmix.models.model import Model
from quantmix.models.sources import load_model


@pytest.fixture(scope="module")
def r1() -> Model:
    """DeepSeek-R1-0528."""
    return load_model("deepseek-r1-0528")


def test_a_uniform_mix_has_size_quality_and_roles(r1: Model) -> None:
    """Roles add up to damage and bytes; fallbacks of short rows are named."""
    found = predict.predict(r1, predict.uniform(r1, "iq3_k"))
    assert sum(r["damage"] for r in found.roles.values()) == pytest.approx(found.quality.damage)
    assert sum(r["bytes"] for r in found.roles.values()) == found.size.tensor_bytes
    assert 3.4 < found.size.bpw < 3.5
    assert {(asked, written) for _, asked, written in found.fallbacks} == {("iq3_k", "iq4_nl")}
    assert not found.unmatched


def test_rules_of_other_tools(tmp_path: Path, r1: Model) -> None:
    """First match wins un-anchored; what no rule names is listed and kept."""
    file = tmp_path / "mix.txt"
    file.write_text("# mine\nblk\\..*_exps\\.=iq2_ks\nattn_=iq5_k\n")
    found = predict.predict(r1, predict.read_mix(file, r1))
    types = dict(zip([t.name for t in r1.tensors], found.types, strict=True))
    assert types["blk.9.ffn_down_exps.weight"] == "iq2_ks"
    assert types["blk.9.attn_output.weight"] == "iq5_k"
    assert "output.weight" in found.unmatched
    assert "blk.9.attn_norm.weight" not in found.unmatched


def _alternating(r1: Model) -> dict[str, str]:
    """Experts of every layer at iq2_ks or iq4_ks in no order of depth, the rest at iq5_k."""
    low = {n for n in range(61) if (n * 7) % 11 < 5}
    return {
        t.name: ("iq2_ks" if t.layer in low else "iq4_ks") if "_exps" in t.role else "iq5_k"
        for t in r1.tensors
        if t.quantizable
    }


def test_a_foreign_mix_that_alternates_is_taken_as_solved(r1: Model) -> None:
    """It is predicted better, says so, keeps its upper bound, and its roles still add up."""
    plain = predict.predict(r1, _alternating(r1))
    found = predict.predict(r1, _alternating(r1), foreign=True)
    assert 0.3 * plain.quality.damage < found.quality.damage < 0.97 * plain.quality.damage
    assert found.quality.ppl is not None
    assert plain.quality.ppl is not None
    assert found.quality.ppl < plain.quality.ppl
    assert found.quality.ppl_high == plain.quality.ppl_high
    assert any("alternate from layer to layer" in w for w in found.quality.warnings)
    assert sum(r["damage"] for r in found.roles.values()) == pytest.approx(found.quality.damage)
    assert found.size == plain.size


def test_a_foreign_mix_made_by_class_is_predicted_as_any(r1: Model) -> None:
    """Types that change a few times over the depth say nothing of what its author knew."""
    asked = {
        t.name: "iq4_ks" if (t.layer or 0) < 9 or (t.layer or 0) > 50 else "iq3_ks"
        for t in r1.tensors
        if t.quantizable
    }
    assert predict.predict(r1, asked, foreign=True) == predict.predict(r1, asked)


def test_a_stock_preset_is_predicted_as_any(r1: Model) -> None:
    """Q4_K_M's pattern (every third middle layer better) is a rule; so is our own shipped mix."""
    asked = {
        t.name: "q6_K"
        if t.role in ("ffn_down_exps", "attn_output") and _more_bits(t.layer or 0, 61)
        else "q4_K"
        for t in r1.tensors
        if t.quantizable
    }
    assert predict.predict(r1, asked, foreign=True) == predict.predict(r1, asked)
    shipped = Path(__file__).parent.parent / "recipes" / "qwen3-235b-a22b-96G"
    qwen = load_model("qwen3-235b-a22b")
    ours = predict.read_mix(shipped / "rules.txt", qwen)
    assert predict.predict(qwen, ours, foreign=True) == predict.predict(qwen, ours)


def _more_bits(layer: int, n: int) -> bool:
    """llama-quantize's `use_more_bits`."""
    return layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2


def test_what_is_no_mix_is_refused(tmp_path: Path, r1: Model) -> None:
    """Missing files, foreign rules and unknown types are told apart."""
    with pytest.raises(BadFile):
        predict.read_mix(tmp_path / "none", r1)
    file = tmp_path / "mix.txt"
    file.write_text("^nothing$=q8_0\n")
    with pytest.raises(UsageError, match="is it for that model"):
        predict.read_mix(file, r1)
    for odd in ('{"rules": null}', '{"rules": [5]}', "{}"):
        file.write_text(odd)
        with pytest.raises(BadFile, match="no list `rules`"):
            predict.read_mix(file, r1)
    with pytest.raises(UnknownName):
        predict.uniform(r1, "q9")


def test_a_type_that_cannot_be_written_is_refused(tmp_path: Path, r1: Model) -> None:
    """q8_1 is for activations: no rule and no uniform mix may ask for it."""
    rules = tmp_path / "rules.txt"
    rules.write_text("output=q8_1\n.*=q4_K\n")
    with pytest.raises(UsageError, match="ik knows q8_1 but cannot write it"):
        predict.read_mix(rules, r1)
    with pytest.raises(UsageError, match="cannot write"):
        predict.uniform(r1, "q8_1")


def test_the_command_prints_one_json_document(capsys: pytest.CaptureFixture[str]) -> None:
    """`--json` gives size, quality, roles and unmatched, and nothing else on stdout."""
    from quantmix.cli.predict import predict as command

    command("qwen3.5-0.8b", uniform="iq4_ks", as_json=True, quiet=True)
    doc = json.loads(capsys.readouterr().out)
    assert {"size", "quality", "roles", "unmatched"} <= set(doc)
    assert doc["quality"]["ppl_low"] < doc["quality"]["ppl"] < doc["quality"]["ppl_high"]


def test_people_get_the_interval_too(capsys: pytest.CaptureFixture[str]) -> None:
    """Where no base perplexity is known, the rise in percent has its interval as in a design."""
    from quantmix.cli.predict import predict as command

    command("qwen3-0.6b", uniform="iq4_ks")
    assert re.search(r"predicted PPL \+[\d.]+% \[.*%, .*%\] at 90%", capsys.readouterr().err)
