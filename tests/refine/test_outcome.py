"""The recipe that a search ends in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from quantmix.budget import Budget
from quantmix.design import design
from quantmix.emit.folder import write_folder
from quantmix.engine.ghost import static_problems
from quantmix.models.model import Model
from quantmix.options import Options
from quantmix.palette import TypeLimits
from quantmix.recipe import Recipe, load
from quantmix.refine import outcome
from quantmix.refine.frame import limits_of
from quantmix.refine.search import Found, Settings, search
from quantmix.rig.device import Device, Rig
from quantmix.speed.prediction import Speed
from quantmix.units import GIB

from .conftest import TYPES, Engine, frame, in_file, on_devices

CONDITIONS = {"corpus": "0" * 64, "engine": "made up"}
TRUTH = {"attn_v": 8.0, "ffn_down": 5.0, "ffn_down_exps": 5.0, "ffn_up": 0.2, "attn_q": 0.1}


# What is read for every token matters most: better types there are slower.
ATTENTION = {"attn_q": 30.0, "attn_k": 30.0, "attn_v": 30.0, "attn_output": 30.0, "output": 30.0}


def refined(
    recipe: Recipe, model: Model, truth: Mapping[str, float] = TRUTH
) -> tuple[Recipe, Found]:
    """Refine with a made-up engine."""
    made = frame(recipe, model)
    settings = Settings(chunks=4, held_out=8, rounds=2, by="tensor")
    found = search(made, settings, Engine(made, truth))
    assert found is not None
    assert found.accepted
    return outcome.refined_recipe(recipe, made, found, "better", CONDITIONS, 512), found


@pytest.mark.parametrize("which", ["file", "devices", "experts"])
def test_it_fits_where_the_recipe_did(model: Model, moe: Model, tmp_path: Path, which: str) -> None:
    """Homes, buffers and flags stay; types and rules are new and agree; nothing is over."""
    which_model = moe if which == "experts" else model
    recipe = in_file(model) if which == "file" else on_devices(which_model)
    made, found = refined(recipe, which_model)
    assert static_problems(made, which_model) == ()
    assert made.size.tensor_bytes <= recipe.size.tensor_bytes
    homes = {t.name: t.device for t in recipe.tensors}
    assert {t.name: t.device for t in made.tensors} == homes
    assert made.offload["flags"] == recipe.offload["flags"]
    for before, after in zip(recipe.devices, made.devices, strict=True):
        assert after.used_bytes <= before.used_bytes
        if after.capacity_bytes is not None:
            assert after.free_bytes == after.capacity_bytes - after.used_bytes
        same = replace(after, weights_bytes=before.weights_bytes, free_bytes=before.free_bytes)
        assert same == before
    assert made.rules != recipe.rules
    assert made.quality.basis == "measured"
    assert found.after is not None
    assert made.quality.damage == pytest.approx(found.after.mean)
    assert made.optimality.objective == made.quality.damage
    write_folder(made, tmp_path / "better", figures=False)
    assert load(tmp_path / "better").refined == made.refined
    text = (tmp_path / "better" / "README.md").read_text()
    assert "no bound is proven" in text
    assert f"from which {len(outcome.swaps_of(recipe, made.tensors))} tensors differ" in text


def test_a_refined_recipe_can_be_refined(model: Model) -> None:
    """It keeps the limits of the first one, so that a second run starts from the same options."""
    recipe = in_file(model, pins=(("attn_k", "q6_K"),))
    made, _ = refined(recipe, model)
    assert limits_of(made, (), imatrix=True) == limits_of(recipe, (), imatrix=True)
    assert frame(made, model).capacity[0] <= frame(recipe, model).capacity[0]


def test_without_an_imatrix_types_that_need_one_are_left_out(model: Model) -> None:
    """Of the types that the recipe was allowed."""
    recipe = in_file(model)
    told = {"limits": {"types": ["q8_0", "iq2_xxs", "q4_K"]}}
    recipe = replace(recipe, budget={**recipe.budget, **told})
    assert limits_of(recipe, (), imatrix=False).types == ("q8_0", "q4_K")
    assert limits_of(recipe, (), imatrix=True).types == ("q8_0", "iq2_xxs", "q4_K")


def on_cards(model: Model, min_tps: float | None = None) -> Recipe:
    """As `on_devices`, for a card and RAM of known bandwidths."""
    tight = on_devices(model).devices[0].capacity_bytes
    gpu = Device("GPU0", "gpu", tight, bandwidth_gbs=1.0)
    host = Device("CPU", "host", 8 * GIB, bandwidth_gbs=0.1)
    budget = replace(Budget.from_vram(GIB, ctx=512), rig=Rig((gpu,), host), label="card")
    options = Options(limits=TypeLimits(types=TYPES), min_tps=min_tps, name="tiny")
    return design(model, budget, options=options)


def test_a_speed_that_was_asked_for_is_held(moe: Model) -> None:
    """Swaps that only look at bytes may read more per token; with --min-tps they may not."""
    free = on_cards(moe)
    slower, _ = refined(free, moe, ATTENTION)
    assert free.speed.tg_tps is not None
    assert slower.speed.tg_tps is not None
    wanted = free.speed.tg_tps * 0.999
    assert slower.speed.tg_tps < wanted
    asked = on_cards(moe, min_tps=wanted)
    held, found = refined(asked, moe, ATTENTION)
    assert found.accepted
    assert held.speed.tg_tps is not None
    assert held.speed.tg_tps >= wanted
    assert held.budget == asked.budget
    assert not any("speed" in w for w in held.quality.warnings)


def test_a_speed_that_moved_is_told() -> None:
    """Beyond a hundredth, where it is known at all."""
    before, after = Speed(tg_tps=20.0), Speed(tg_tps=18.0)
    told = outcome.speed_note(before, after)
    assert told == ("predicted generation 18.0 tokens/s, before 20.0",)
    assert outcome.speed_note(before, Speed(tg_tps=19.9)) == ()
    assert outcome.speed_note(before, Speed()) == ()


def test_a_recipe_that_tells_nothing_of_its_machine_gets_no_speed(moe: Model) -> None:
    """It says so, where a speed was predicted before."""
    recipe = on_cards(moe)
    told = {k: v for k, v in recipe.budget.items() if k != "machine"}
    made, _ = refined(replace(recipe, budget=told), moe)
    assert made.speed.tg_tps is None
    assert any("speed was not predicted again" in w for w in made.quality.warnings)
