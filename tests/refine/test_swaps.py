"""Which swaps are chosen, against a made-up engine whose truth is known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantmix.errors import BadFile, UsageError
from quantmix.models.model import Model
from quantmix.refine import factors
from quantmix.refine.factors import Measured
from quantmix.refine.frame import Frame, limits_of
from quantmix.refine.probes import DOWN, UP, parts_of, probes_of, step
from quantmix.refine.search import Place, Settings, paired, search
from quantmix.refine.swaps import candidates

from .conftest import TYPES, Engine, frame, in_file, on_devices

SMALL = Settings(chunks=4, held_out=8, rounds=1, by="role")
ROLES = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture(scope="module")
def plain(model: Model) -> Frame:
    """The frame of a file's recipe."""
    return frame(in_file(model), model)


def used(made: Frame, choice: np.ndarray) -> np.ndarray:
    """Bytes that a choice takes on each device."""
    return made.use[:, np.arange(len(choice)), choice].sum(axis=1)


def test_a_step_goes_to_the_nearest_type_that_is_different_enough() -> None:
    """At least 15 % of the bytes away, better or worse, and never to one that another beats."""
    damage = np.array([8.0, 5.0, 4.0, 4.5, 1.0, np.inf])
    sizes = np.array([50.0, 80.0, 100.0, 120.0, 130.0, 150.0])
    assert step(damage, sizes, 2, UP) == 4
    assert step(damage, sizes, 2, DOWN) == 1
    assert step(damage, sizes, 1, DOWN) == 0
    assert step(damage, sizes, 0, DOWN) == 0
    assert step(damage, sizes, 4, UP) == 4
    assert step(np.array([8.0, 4.0, 1.0]), np.array([99.0, 100.0, 105.0]), 1, UP) == 1


def test_parts_hold_every_group_with_a_choice_once(plain: Frame) -> None:
    """By role, band or tensor; a probe changes its own part only, all of it in one way."""
    free = {g for g in range(len(plain.start)) if np.isfinite(plain.damage[g]).sum() > 1}
    for by, count in (("role", 8), ("band", 15), ("tensor", 15)):
        parts = parts_of(plain, by, bands=2)  # type: ignore[arg-type]
        assert sorted(g for p in parts for g in p.groups) == sorted(free)
        assert len(parts) == count
    parts = parts_of(plain, "role")
    for probe in probes_of(plain, parts, plain.start):
        changed = np.flatnonzero(probe.choice != plain.start)
        assert set(changed) <= set(parts[probe.part].groups)
        more = (
            plain.sizes[changed, probe.choice[changed]] > plain.sizes[changed, plain.start[changed]]
        )
        assert (more == (probe.way == UP)).all()
        assert (probe.predicted < 0) == (probe.way == UP)


def test_factors_follow_sure_probes_and_shrink_unsure_ones() -> None:
    """What is measured well stands; what is noise goes to the mean of the others."""
    sure = [Measured(i, UP, -0.1, -0.1 * r, 0.001) for i, r in enumerate((0.5, 1.0, 3.0))]
    found = factors.fit([*sure, Measured(3, UP, -0.1, 0.9, 5.0)], 5)
    assert found[0, UP].mean == pytest.approx(0.5, rel=0.05)
    assert found[2, UP].mean == pytest.approx(3.0, rel=0.05)
    assert 0.5 < found[3, UP].mean < 3.0
    assert found[4, UP].mean == pytest.approx(found[3, UP].mean, rel=0.2)
    assert found[3, UP].err > found[2, UP].err
    assert found[2, UP].cautious(UP) < found[2, UP].mean < found[2, UP].cautious(DOWN)
    alone = factors.fit([Measured(0, UP, -0.1, 0.2, 0.001)], 1)
    assert alone[0, UP].cautious(UP) > 0.0


def test_changes_at_the_probed_types_are_what_was_measured(plain: Frame) -> None:
    """But for the caution; beyond them a gain counts for less and a loss for more."""
    parts = parts_of(plain, "tensor")
    probes = probes_of(plain, parts, plain.start)
    sure = [Measured(p.part, p.way, p.predicted, 2.0 * p.predicted, 0.0) for p in probes]
    change = factors.changes(plain, parts, plain.start, factors.fit(sure, len(parts)))
    rows = np.arange(len(plain.start))
    assert (change[rows, plain.start] == 0.0).all()
    delta = plain.damage - plain.damage[rows, plain.start][:, None]
    for p in probes:
        g = parts[p.part].groups[0]
        assert change[g, p.choice[g]] == pytest.approx(2.0 * delta[g, p.choice[g]])
        beyond = np.isfinite(delta[g]) & (p.way * delta[g] < p.way * delta[g, p.choice[g]] - 1e-12)
        assert (change[g, beyond] > 2.0 * delta[g, beyond] + 1e-15).all()


@pytest.mark.parametrize("rounds", [1, 2])
def test_what_the_loss_model_had_wrong_is_found(plain: Frame, rounds: int) -> None:
    """One role matters five times as much as predicted, another hardly: bytes go to the former."""
    engine = Engine(plain, {"attn_v": 5.0, "ffn_down": 5.0, "ffn_up": 0.2, "ffn_gate": 0.2})
    found = search(plain, replace(SMALL, rounds=rounds), engine)
    assert found is not None
    assert found.accepted
    assert engine.kld(plain.mix(found.choice)) < 0.9 * engine.kld(plain.mix(plain.start))
    assert (used(plain, found.choice) <= plain.capacity).all()
    sizes = {
        name: sum(
            plain.sizes[g, c[g]]
            for g, group in enumerate(plain.choices.groups)
            if plain.model.tensors[group.members[0]].role == "ffn_down"
        )
        for name, c in (("before", plain.start), ("after", found.choice))
    }
    assert sizes["after"] > sizes["before"]


def test_a_right_loss_model_leaves_nothing_to_gain(plain: Frame) -> None:
    """Where the truth is what was predicted, the recipe stays."""
    found = search(plain, SMALL, Engine(plain, {}))
    assert found is not None
    assert not found.accepted


def test_what_helps_on_the_probed_chunks_only_is_not_accepted(plain: Frame) -> None:
    """The held-out chunks have the last word, and are asked for once, at the end."""

    def text(role: str, place: Place) -> float:
        return 5.0 if (role == "ffn_up") != (place.first == 0) else 0.3

    engine = Engine(plain, {}, text=text)
    found = search(plain, SMALL, engine)
    assert found is not None
    assert found.difference is not None
    assert found.difference.mean > 0.0
    assert not found.accepted
    assert [p.first for _, p in engine.asked].count(4) == 2
    assert [p.first for _, p in engine.asked[-2:]] == [4, 4]


def test_noise_is_no_gain(plain: Frame) -> None:
    """A difference below twice its standard error is not accepted, however it falls."""
    engine = Engine(plain, {}, noise=10.0)
    found = search(plain, SMALL, engine)
    assert found is not None
    assert not found.accepted
    assert not paired([1.0, -1.2, 0.9, -1.0], [0.0] * 4).is_gain
    assert paired([-1.0, -1.2, -0.9, -1.0], [0.0] * 4).is_gain
    assert not paired([-1.0], [0.0]).is_gain
    few, many = [-1.0, -0.2, -0.9, -0.1], [-1.0, -0.2, -0.9, -0.1] * 4
    assert paired(few, [0.0] * 4).mean < -2.0 * paired(few, [0.0] * 4).err
    assert not paired(few, [0.0] * 4).is_gain
    assert paired(many, [0.0] * 16).is_gain


def test_a_mix_that_the_engine_cannot_have_costs_itself_only(plain: Frame) -> None:
    """Failed probes and candidates are passed over; a recipe that fails itself is told."""
    engine = Engine(plain, {"ffn_down": 5.0, "ffn_up": 0.2})

    def flaky(mix: dict[str, str], place: Place, what: str) -> object:
        return None if "attn_q" in what else engine(mix, place, what)

    found = search(plain, SMALL, flaky)  # type: ignore[arg-type]
    assert found is not None
    assert found.accepted
    assert search(plain, SMALL, lambda mix, place, what: None) is None


@settings(max_examples=15)
@given(
    st.lists(st.floats(0.05, 20.0), min_size=len(ROLES), max_size=len(ROLES)),
    st.sampled_from(["file", "devices", "experts"]),
    st.sampled_from([0.0, 1e-4]),
)
def test_never_more_bytes_than_the_recipe_on_any_device(
    frames: dict[str, Frame], truth: list[float], which: str, noise: float
) -> None:
    """Whatever the probes say: every candidate and the answer stay within every device."""
    made = frames[which]
    engine = Engine(made, dict(zip(ROLES, truth, strict=True)), noise)
    found = search(made, replace(SMALL, rounds=2), engine)
    assert found is not None
    assert (used(made, found.choice) <= made.capacity).all()
    parts = parts_of(made, "role")
    change = factors.changes(made, parts, made.start, factors.fit([], len(parts)))
    for choice, gain, _ in candidates(made, change, made.start):
        assert (used(made, choice) <= made.capacity).all()
        assert gain < 0.0


@pytest.fixture(scope="module")
def frames(model: Model, moe: Model) -> dict[str, Frame]:
    """Frames of recipes for a file and for devices, dense and with experts."""
    return {
        "file": frame(in_file(model), model),
        "devices": frame(on_devices(model), model),
        "experts": frame(on_devices(moe), moe),
    }


def test_pins_floors_palette_and_ties_hold(model: Model, moe: Model) -> None:
    """They are read off the recipe: no option of any group breaks them."""
    recipe = in_file(model, pins=((r"attn_v", "q6_K"),), floors=((r"ffn_down", "q4_K"),))
    limits = limits_of(recipe, (), imatrix=True)
    assert limits.types == TYPES
    assert limits.pins == (("attn_v", "q6_K"),)
    assert limits.floors == (("ffn_down", "q4_K"),)
    made = frame(recipe, model)
    options = {
        made.model.tensors[group.members[0]].role: {
            made.choices.palette.types[c].name for c in group.columns[:, 0]
        }
        for group in made.choices.groups
    }
    assert options["attn_v"] == {"q6_K"}
    assert options["ffn_down"] == {"q4_K", "q5_K", "q6_K", "q8_0"}
    assert options["ffn_up"] == set(TYPES)
    tied = frame(on_devices(moe), moe)
    members = [{tied.model.tensors[m].role for m in group.members} for group in tied.choices.groups]
    assert {"ffn_gate_exps", "ffn_up_exps"} in members


def test_a_recipe_that_is_no_answer_is_refused(model: Model) -> None:
    """Types outside the palette, and devices that do not hold what they should, are named."""
    recipe = in_file(model)
    with pytest.raises(UsageError, match="not among its options"):
        frame(recipe, model, ("q8_0",))
    wide = on_devices(model)
    device = replace(wide.devices[0], weights_bytes=1)
    with pytest.raises(BadFile, match="design again"):
        frame(replace(wide, devices=(device, *wide.devices[1:])), model)
    untold = replace(recipe, budget={"label": "4bpw"})
    assert limits_of(untold, (), imatrix=True).types == ()
    slow = on_devices(model)
    for told in (0, "fast"):
        with pytest.raises(BadFile, match=r"budget\.min_tps"):
            frame(replace(slow, budget={**slow.budget, "min_tps": told}), model)
