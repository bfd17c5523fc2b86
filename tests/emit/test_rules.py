"""Rules give every tensor its type, whatever engine reads them."""

from __future__ import annotations

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from quantmix.emit.ftype import ftype_of
from quantmix.emit.rules import build_rules, first_match, split_rule
from quantmix.models.sources import load_model

R1 = load_model("deepseek-r1")
FREE = [t for t in R1.tensors if t.quantizable]
TYPES = ("iq1_s_r4", "iq2_kt", "q6_K", "q8_0")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["ik", "mainline"]))
def test_rules_matched_back_give_the_plan(seed: int, engine: str) -> None:
    """For random mixes the first match of every tensor is its type, and every rule is needed."""
    import random

    rng = random.Random(seed)
    runs = {role: rng.randint(1, 8) for role in {t.role for t in FREE}}
    plan = {t.name: TYPES[((t.layer or 0) // runs[t.role] + seed) % len(TYPES)] for t in FREE}
    rules = build_rules(R1.tensors, plan)
    pairs = [split_rule(r.text) for r in rules]
    assert first_match(plan, pairs, engine) == plan  # type: ignore[arg-type]
    kept = [t.name for t in R1.tensors if not t.quantizable]
    assert set(first_match(kept, pairs, engine).values()) == {None}  # type: ignore[arg-type]
    # Anchored and disjoint: read backwards they give the same.
    assert first_match(plan, pairs[::-1], engine) == plan  # type: ignore[arg-type]


def test_a_rule_holds_no_comma_and_one_equals_sign() -> None:
    """ik splits on commas and at the first `=`."""
    rules = build_rules(R1.tensors, {t.name: TYPES[(t.layer or 0) % 4] for t in FREE})
    for rule in rules:
        assert "," not in rule.text
        assert rule.text.count("=") == 1
        assert rule.pattern.startswith("^")
        assert rule.pattern.endswith("$")
        re.compile(rule.pattern)


def test_roles_with_the_same_plan_share_a_rule() -> None:
    """Up and gate experts of the same layers are one readable rule."""
    plan = {t.name: "iq1_s_r4" if "_exps" in t.name else "q8_0" for t in FREE}
    texts = [r.text for r in build_rules(R1.tensors, plan)]
    assert r"^blk\.[0-9]+\.ffn_(down|gate|up)_exps\.weight$=iq1_s_r4" in texts
    assert r"^output\.weight$=q8_0" in texts
    assert len(texts) < 12


def test_ftype_is_never_a_float_nor_one_that_demands_an_imatrix() -> None:
    """The preset follows the bytes, among those that llama-quantize takes as they are."""
    assert ftype_of({"iq2_kt": 10, "f32": 99}, "ik") == "IQ2_KT"
    assert ftype_of({"iq1_s_r4": 10}, "ik") == "IQ1_KT"
    assert ftype_of({"q4_K": 10}, "mainline") == "Q4_K_M"
    assert ftype_of({"iq2_xxs": 10}, "mainline") == "Q2_K"
    assert ftype_of({"f32": 1}, "ik") == "Q8_0"
    assert ftype_of({"iq3_kt": 1}, "ik", "deepseek2") == "IQ3_KT"
    assert ftype_of({"iq3_kt": 1}, "ik", "deepseek32") == "IQ3_XXS"  # IQ3_KT would abort
