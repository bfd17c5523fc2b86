"""Mixes that follow from a file's name and its size."""

from __future__ import annotations

import pytest

from quantmix.loss import evidence
from quantmix.loss.fit import by_size, curate

from .conftest import catalog_model


def _items(mix: str) -> dict[str, str]:
    return dict(item.partition("=")[::2] for item in mix.split(";"))


def _known() -> list[evidence.Published]:
    """Rows of the author whose mix stands on a page, by class."""
    named = {(evidence.catalog_id(m), label) for m, label in curate.pages()}
    return [
        p
        for p in evidence.published()
        if (p.model, p.label) in named
        and p.bpw
        and p.imatrix
        and "ffn_down_exps" in _items(p.mix)
        and "[" not in p.mix
    ]


def test_where_a_page_says_the_mix_the_size_finds_the_same_or_nothing() -> None:
    """With the pairs of the other models only; most are found, none wrong."""
    found = 0
    rows = _known()
    assert len(rows) > 20
    for row in rows:
        others = [m for (name, _), m in curate.pages().items()
                  if evidence.catalog_id(name) != row.model]  # fmt: skip
        model = catalog_model(row.model)
        seen = by_size.readings(model, row.label, row.bpw or 0.0, by_size.pairs_of(others))
        reading = by_size.middle(model, seen)
        if reading is not None:
            found += 1
            assert reading.types["gate_up"] == _items(row.mix)["ffn_gate_exps"], row.label
            assert reading.down == _items(row.mix)["ffn_down_exps"], row.label
    assert found >= 10


def test_every_reading_has_the_size_to_three_decimals() -> None:
    """The written mix gives back the published bits per weight, its rounding granted."""
    for (name, label), mix in curate.mixes_by_size().items():
        row = next(p for p in evidence.published() if (p.model, p.label) == (name, label))
        assert row.mix == mix
        model = catalog_model(name)
        sizes = by_size._Sizes(model)
        pairs = by_size.pairs_of(curate.pages().values())
        seen = by_size.readings(model, label, row.bpw or 0.0, pairs)
        reading = by_size.middle(model, seen)
        assert reading is not None, label
        assert reading.mix() == mix, label
        assert sizes.classes >= set(reading.types)


@pytest.mark.parametrize("label", ["UD-Q2_K_XL (unsloth)", "IQ3_KS (ubergarm v0.1)", "IQ9_X (me)"])
def test_other_names_have_no_reading(label: str) -> None:
    """Only the one author's convention is known."""
    model = catalog_model("kimi-k2-thinking")
    assert by_size.readings(model, label, 3.5, {"iq3_ks": {"iq4_ks"}}) == []


def test_experts_that_cannot_be_told_apart_are_left_open() -> None:
    """Kimi-K2-Thinking's IQ3_K may have ffn_down_exps at iq4_k or in what it was trained in."""
    model = catalog_model("kimi-k2-thinking")
    seen = by_size.readings(model, "IQ3_K (ubergarm)", 3.845, {"iq3_k": {"iq4_k"}})
    assert {r.down for r in seen} == {"iq4_k", "q4_0"}
    assert by_size.middle(model, seen) is None
