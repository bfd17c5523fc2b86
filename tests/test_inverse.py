"""Inverse questions, profiles, and what is said when nothing fits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

import quantmix as qm
from quantmix.budget import Budget
from quantmix.design import Options
from quantmix.errors import InfeasibleBudget, UsageError
from quantmix.inverse import longest_context, smallest_budget
from quantmix.request import Request, fulfil, parse_ctx, parse_percent

SMALL = "qwen3-4b-instruct-2507"


def test_the_longest_context_fits_and_one_step_more_does_not() -> None:
    """--ctx max finds the edge to 256 tokens."""
    model = qm.load_model(SMALL)
    budget, found, notes = longest_context(model, Budget.from_vram("6G"), Options())
    ctx = found.recipe.settings.ctx
    assert str(ctx) in notes[0]
    assert found.recipe.devices[0].used_bytes <= 6 * 2**30
    with pytest.raises(InfeasibleBudget):
        qm.design(model, Budget.from_vram("6G", ctx=ctx + 256))
    assert budget.settings.ctx == ctx


def test_the_smallest_budget_for_a_quality_is_smallest() -> None:
    """--max-loss 1% gives a budget that reaches it; a tenth of a GiB less does not."""
    model = qm.load_model(SMALL)
    budget, found, _ = smallest_budget(model, Budget.from_vram("1G"), Options(), 0.01)
    assert math.expm1(found.recipe.quality.ln_ppl_ratio) <= 0.01
    less = float(budget.label.removesuffix("G")) - 0.1
    worse = qm.design(model, Budget.from_vram(f"{less:.1f}G"))
    assert math.expm1(worse.quality.ln_ppl_ratio) > 0.01


def test_a_profile_tells_its_price(tmp_path: Path) -> None:
    """--profile prompt takes a large ubatch and says what it costs in VRAM."""
    answer = fulfil(Request(SMALL, vram="12G", profile="prompt", no_check=True, out=tmp_path))
    assert answer.recipe.settings.ubatch == 4096
    assert any("iB on GPU0" in note for note in answer.notes)


def test_a_rig_that_is_too_small_gets_both_ways_out() -> None:
    """The message names the smallest cards and the smallest RAM; feeding them back works."""
    model = qm.load_model("glm-4.5-air")
    with pytest.raises(InfeasibleBudget) as caught:
        qm.design(model, Budget.from_gpus("1x12G", ram="16G"))
    words = str(caught.value)
    assert "--gpus 1x" in words
    ram = words.split("--ram ", 1)[1].split("G", 1)[0]
    assert qm.design(model, Budget.from_gpus("1x12G", ram=f"{ram}G")).devices
    cards = words.split("--gpus ", 1)[1].split(" ", 1)[0].rstrip(";")
    assert qm.design(model, Budget.from_gpus(cards, ram="16G")).devices


@pytest.mark.parametrize(("text", "value"), [("32768", 32768), ("32k", 32768), ("max", None)])
def test_contexts_are_read(text: str, value: int | None) -> None:
    """Plain, in k, or max."""
    assert parse_ctx(text) == value


def test_percentages_are_read() -> None:
    """1% and 1 mean the same; words do not."""
    assert parse_percent("1%") == parse_percent("1") == 0.01
    with pytest.raises(UsageError, match="little"):
        parse_percent("little")
