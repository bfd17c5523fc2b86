"""Inverse questions, profiles, and what is said when nothing fits."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import quantmix as qm
from quantmix.budget import Budget
from quantmix.design import run
from quantmix.errors import InfeasibleBudget, UsageError
from quantmix.flag_texts import parse_ctx, parse_percent
from quantmix.inverse import longest_context, smallest_budget
from quantmix.options import Options
from quantmix.palette import TypeLimits
from quantmix.request import Request, budget_of, fulfil

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


@pytest.mark.parametrize(
    ("trained", "ctx", "why"),
    [
        (2048, 2048, "all it was trained on"),
        (10000, 9984, "all it was trained on"),
        (100, 256, "all it was trained on"),
        (0, 131072, "what it was trained on is not known"),
    ],
)
def test_no_context_goes_beyond_the_training(trained: int, ctx: int, why: str) -> None:
    """--ctx max ends at the trained length, rounded to the engine's 256, and says so."""
    model = qm.load_model(SMALL)
    model = replace(model, hparams=replace(model.hparams, ctx_train=trained))
    _, found, notes = longest_context(model, Budget.from_vram("80G"), Options())
    assert found.recipe.settings.ctx == ctx
    assert notes == (f"longest context that fits: {ctx} ({why})",)


def test_the_smallest_budget_for_a_quality_is_smallest() -> None:
    """--max-loss 1% gives a budget that reaches it; a tenth of a GiB less does not."""
    model = qm.load_model(SMALL)
    budget, found, _ = smallest_budget(model, Budget.from_vram("100G"), Options(), 0.01)
    assert math.expm1(found.recipe.quality.ln_ppl_ratio) <= 0.01
    less = float(budget.label.removesuffix("G")) - 0.1
    worse = qm.design(model, Budget.from_vram(f"{less:.1f}G"))
    assert math.expm1(worse.quality.ln_ppl_ratio) > 0.01


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"size": "8bpw"}, r"--size [3-7]\.\d\dbpw$"),
        ({"size": "4G"}, r"--size [1-3]\.\d\dG$"),
        ({"vram": "12G"}, r"--vram \d+\.\dG$"),
        ({"gpus": "1x24G", "ram": "64G"}, r"\d+% of 1x24G-64G, GPU0 \d"),
        ({}, r"--vram \d+\.\dG$"),
    ],
)
def test_a_named_budget_is_what_the_smallest_is_sought_in(
    flags: dict[str, str], said: str, tmp_path: Path
) -> None:
    """--max-loss answers in the kind of budget it was asked with, within it."""
    request = Request(SMALL, **flags, max_loss="1%", no_check=True, out=tmp_path)  # type: ignore[arg-type]
    answer = fulfil(request)
    assert re.search(said, answer.notes[0])
    assert math.expm1(answer.recipe.quality.ln_ppl_ratio) <= 0.01
    assert len(answer.recipe.devices) == (0 if "size" in flags else 2)


def test_a_share_of_the_gpus_is_the_least() -> None:
    """One percent less of every card's memory and the rise is above the limit."""
    model = qm.load_model(SMALL)
    budget, found, notes = smallest_budget(model, Budget.from_gpus("12G,6G"), Options(), 0.01)
    assert budget.rig is not None
    full = Budget.from_gpus("12G,6G").rig
    assert full is not None
    share = int(notes[0].split(": ", 1)[1].split("%", 1)[0])
    sizes = [g.capacity_bytes or 0 for g in full.gpus]
    assert [g.capacity_bytes for g in budget.rig.gpus] == [n * share // 100 for n in sizes]
    less = tuple(
        replace(g, capacity_bytes=(g.capacity_bytes or 0) * (share - 1) // 100) for g in full.gpus
    )
    there = replace(budget, rig=replace(full, gpus=less))
    assert math.expm1(qm.design(model, there).quality.ln_ppl_ratio) > 0.01
    assert found.recipe.devices[1].capacity_bytes == budget.rig.gpus[1].capacity_bytes


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"size": "3bpw"}, r"the best there has \d.*; the smallest that works is --size \S+bpw$"),
        ({"vram": "4G"}, r"the smallest that works is --vram \S+G$"),
        ({"gpus": "2x3G"}, r"the smallest that works is 1\d\d% of 2x3G"),
        ({"gpus": "1xrtx-4090", "min_tps": 900.0}, "nothing fits at --min-tps 900"),
        ({"types": "q3_K"}, "on any device has no mix .* more memory alone does not help"),
    ],
)
def test_a_budget_too_small_for_the_quality_gets_the_one_that_works(
    flags: dict[str, Any], said: str
) -> None:
    """The message says what the best there comes to, and the smallest budget that does."""
    budget, _ = budget_of(Request(SMALL, **flags, max_loss="1%"), is_mla=False)
    limits = TypeLimits(types=(flags["types"],) if "types" in flags else ())
    options = Options(limits=limits, min_tps=flags.get("min_tps"))
    with pytest.raises(InfeasibleBudget, match=r"at most 1\.00%") as caught:
        smallest_budget(qm.load_model(SMALL), budget, options, 0.01)
    assert re.search(said, str(caught.value))


def test_reserves_are_set_aside_on_the_ideal_device() -> None:
    """--reserve and --desktop count with --vram too, and in the open question."""
    for flags in ({"vram": "10G"}, {"max_loss": "1%"}):
        request = Request(SMALL, reserve="3G", desktop=True, **flags)  # type: ignore[arg-type]
        rig = budget_of(request, is_mla=False)[0].rig
        assert rig is not None
        assert rig.ideal
        assert rig.gpus[0].reserve_bytes == (3 << 30) + (800 << 20)


def test_a_desktop_takes_more_of_the_first_gpu_only() -> None:
    """--desktop adds to a stated reserve as it adds to the automatic one."""
    rig = Budget.from_gpus("2x24G", reserve="1G", desktop=True).rig
    assert rig is not None
    assert [g.reserve_bytes for g in rig.gpus] == [(1 << 30) + (800 << 20), 1 << 30]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"vram": "8G", "ram": "64G"}, "--ram means nothing with --vram"),
        ({"vram": "8G", "ram_reserve": "4G"}, "use --gpus with --ram"),
        ({"vram": "8G", "cpu": "desktop-ddr4-3200-2ch"}, "--cpu means nothing with --vram"),
        ({"vram": "8G", "cpu_cores": 8}, "--cpu-cores means nothing with --vram"),
        ({"vram": "8G", "min_tps": 9.0}, "use --gpus with the names of cards"),
        ({"size": "4bpw", "ram": "64G"}, "--ram means nothing with --size"),
        ({"size": "4bpw", "reserve": "1G"}, "--reserve means nothing with --size"),
        ({"size": "4bpw", "desktop": True}, "--desktop means nothing with --size"),
        ({"size": "4bpw", "cpu": "desktop-ddr4-3200-2ch"}, "--cpu means nothing with --size"),
        ({"size": "4bpw", "min_tps": 9.0}, "--min-tps means nothing with --size"),
        ({"size": "4bpw", "ctx": "max"}, "--ctx max means nothing with --size"),
        ({"max_loss": "1%", "ram": "64G"}, "--ram means nothing with --max-loss alone"),
        ({"max_loss": "1%", "ctx": "max"}, "--ctx max and --max-loss"),
        ({"max_loss": "1%", "ctx": "max", "gpus": "1x24G"}, "--ctx max and --max-loss"),
        ({"gpus": "1x24G", "ram_reserve": "4G"}, "add --ram"),
        ({"vram": "8G", "ubatch": 0}, "--ubatch 0 must be above zero"),
        ({"vram": "8G", "ubatch": 1024, "profile": "fast"}, "neither prompt nor generate"),
    ],
)
def test_flags_without_a_meaning_are_refused(flags: dict[str, object], said: str) -> None:
    """A flag that a kind of budget cannot honour is refused by name, with what to use instead."""
    with pytest.raises(UsageError) as caught:
        budget_of(Request(SMALL, **flags), is_mla=False)  # type: ignore[arg-type]
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize("digits", [400, 5000])
def test_digits_without_end_are_one_short_line(digits: int) -> None:
    """A number beyond any machine is refused by its flag's name, not by Python's."""
    many = "9" * digits
    for flags in (
        {"size": f"{many}bpw"},
        {"size": f"{many}.5G"},
        {"vram": many},
        {"vram": "4G", "ctx": many},
        {"vram": "4G", "ubatch": int("9" * 400)},
        {"vram": "4G", "cram": int("9" * 400)},
        {"gpus": f"{many}G"},
    ):
        with pytest.raises(UsageError) as caught:
            budget_of(Request(SMALL, **flags), is_mla=False)  # type: ignore[arg-type]
        assert len(str(caught.value)) < 200


@pytest.mark.parametrize("flag", ["min_tps", "quality_slack", "time_limit"])
def test_nan_is_no_number(flag: str, tmp_path: Path) -> None:
    """nan compares false with everything: it is refused, not passed."""
    request = Request(SMALL, gpus="1xrtx-4090", no_check=True, out=tmp_path)
    with pytest.raises(UsageError, match=flag.replace("_", "-")):
        fulfil(replace(request, **{flag: math.nan}))  # type: ignore[arg-type]


def refused(name: str, gpus: str, ram: str | None, **options: object) -> str:
    """Return the one line that says why nothing fits."""
    with pytest.raises(InfeasibleBudget) as caught:
        qm.design(qm.load_model(name), Budget.from_gpus(gpus, ram=ram), options=Options(**options))
    words = str(caught.value)
    assert "\n" not in words
    return words


@pytest.mark.parametrize(
    ("name", "gpus", "ram"),
    [("deepseek-r1", "3x24G", "64G"), ("gpt-oss-120b", "2x16G", "32G")],
)
def test_the_shortfall_and_the_mend_are_of_one_placement(name: str, gpus: str, ram: str) -> None:
    """RAM that is missing, added, is the RAM that is named, to its whole GiB and the reserve."""
    words = refused(name, gpus, ram)
    short = float(words.split("short by CPU ", 1)[1].split(" GiB", 1)[0])
    named = int(words.split("--ram ", 1)[1].split("G", 1)[0])
    assert named - 1.5 <= int(ram[:-1]) + short <= named


@pytest.mark.parametrize(
    ("name", "gpus", "ram"),
    [("deepseek-r1", "3x24G", "64G"), ("kimi-k2", "4x25GiB", "96G"), ("qwen3-8b", "1x1G", "6G")],
)
def test_the_smallest_named_is_the_smallest(name: str, gpus: str, ram: str) -> None:
    """What is named works; one GiB less, of RAM or of every card, does not."""
    words = refused(name, gpus, ram)
    model = qm.load_model(name)
    cards, size = words.split("--gpus ", 1)[1].split("GiB", 1)[0].split("x")
    named = int(words.split("--ram ", 1)[1].split("G", 1)[0])
    assert qm.design(model, Budget.from_gpus(gpus, ram=f"{named}G")).devices
    assert qm.design(model, Budget.from_gpus(f"{cards}x{size}GiB", ram=ram)).devices
    for less in (
        Budget.from_gpus(gpus, ram=f"{named - 1}G"),
        Budget.from_gpus(f"{cards}x{int(size) - 1}GiB", ram=ram),
    ):
        with pytest.raises(InfeasibleBudget):
            run(model, less, Options(), explained=False)


def test_cards_that_are_sold_are_named_beside_literal_sizes() -> None:
    """A 24G card shows less than 24 GiB: `4x24G is too small, 4x24GiB works` needs a word more."""
    words = refused("llama-3.1-405b", "4x24G", None)
    assert "--gpus 4x24GiB (of those sold: 32G)" in words


def test_a_speed_that_is_too_much_gets_one_that_works() -> None:
    """The refusal names the most that can be asked for; feeding it back works."""
    name, rig = "qwen3-30b-a3b", {"gpus": "1xrtx-3060", "ram": "64G"}
    words = refused(name, **rig, min_tps=500.0)
    assert "assumed: 100 GB/s for RAM" in words
    reached = float(words.split("lower --min-tps to ", 1)[1].split(",", 1)[0])
    assert 20 < reached < 500
    options = Options(min_tps=reached)
    assert qm.design(qm.load_model(name), Budget.from_gpus(**rig), options=options).devices


@pytest.mark.parametrize("budget", [{"size": "5G"}, {"vram": "12G"}])
def test_a_speed_on_what_has_none_is_refused(budget: dict[str, str], tmp_path: Path) -> None:
    """--min-tps makes no sense for a file or an idealised device."""
    with pytest.raises(UsageError, match="--min-tps means nothing with"):
        fulfil(Request(SMALL, **budget, min_tps=5, no_check=True, out=tmp_path))


def test_assumed_bandwidths_behind_a_speed_are_told(tmp_path: Path) -> None:
    """Unknown cards or RAM: the limit is judged with typical ones, and a note says so."""
    rig = {"gpus": "1x8G", "ram": "64G"}
    answer = fulfil(Request(SMALL, **rig, min_tps=5, no_check=True, out=tmp_path))
    notes = [n for n in answer.notes if "--min-tps 5 was judged with assumed" in n]
    assert "GPU0 (name the cards)" in notes[0]
    assert "--cpu" in notes[0]
    known = Request(SMALL, gpus="1xrtx-3060", min_tps=5, no_check=True, out=tmp_path)
    assert not any("assumed" in n for n in fulfil(known).notes)
