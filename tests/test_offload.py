"""Placement of files that exist: it fits, it is fast, its flags are proven."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest

from quantmix.budget import make_settings, with_ram
from quantmix.emit.simulate import replay
from quantmix.errors import InfeasibleBudget, UsageError
from quantmix.ggml.types import Engine
from quantmix.memory.model import HOST
from quantmix.memory.settings import Settings
from quantmix.models.sources import load_model
from quantmix.offload import OffloadPlan, StoredModel, holds, place, stored
from quantmix.rig.device import Rig
from quantmix.rig.rigs import parse_gpus


@cache
def file_of(name: str, at: str) -> StoredModel:
    """A catalog model with every matrix at one type."""
    return stored(load_model(name), "ik", at)


def rig_of(gpus: str, ram: str | None = None) -> Rig:
    """A rig from flags."""
    return with_ram(parse_gpus(gpus), ram, None, None, False)


def check(plan: OffloadPlan, file: StoredModel, rig: Rig, settings: Settings) -> None:
    """No device over capacity, up and gate together, flags replayed = table of devices."""
    for use in plan.devices:
        assert use.free_bytes is None or use.free_bytes >= 0, use
    where = replay(plan.flags, file.model, settings, rig, file.sizes)
    for name, home in where.items():
        if "ffn_up_exps" in name:
            assert where[name.replace("ffn_up_exps", "ffn_gate_exps")] == home
    for use in plan.devices:
        held = sum(file.sizes[n] for n, d in where.items() if d == use.name)
        assert held == use.weights_bytes


CASES = [
    ("deepseek-r1", "iq4_ks", "2xrtx-5090,2xrtx-4090", "512G"),
    ("deepseek-r1", "iq2_kt", "2xrtx-pro-6000", None),
    ("deepseek-r1", "iq2_k", "16xrtx-3090", None),
    ("qwen3-235b-a22b", "q4_K", "2xrtx-5090,2xrtx-4090", "512G"),
    ("qwen3-235b-a22b", "q4_K", "1x24G", "256G"),
    ("llama-3.1-70b", "q4_K", "1xrtx-4090", "128G"),
    ("llama-3.1-70b", "q4_K", "2x32G", None),
    ("glm-4.5-air", "q4_0", "1x24G,1x16G", "128G"),
]


@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
@pytest.mark.parametrize("build", ["2026-08-15", "2025-06-16"])
def test_a_file_is_placed_within_every_device(
    case: tuple[str, str, str, str | None], build: str
) -> None:
    """Published mixes on rigs of the field: fits, and the flags do it."""
    name, at, gpus, ram = case
    file, rig, settings = file_of(name, at), rig_of(gpus, ram), Settings(build=build)
    check(place(file, rig, settings), file, rig, settings)


def test_mainline_places_as_well() -> None:
    """The same for mainline, which splits by count."""
    file = stored(load_model("qwen3-235b-a22b"), "mainline", "q4_K")
    settings = Settings(engine="mainline", build="2026-10-01")
    rig = rig_of("2x24G", "256G")
    check(place(file, rig, settings), file, rig, settings)


def test_what_fits_is_fully_resident_without_overrides() -> None:
    """R1 at iq2_kt on two 96 GB cards needs no -ot."""
    plan = place(file_of("deepseek-r1", "iq2_kt"), rig_of("2xrtx-pro-6000"), Settings())
    assert "-ot" not in plan.flags.flags
    assert not plan.placement.cpu_experts


def test_gpus_are_filled_with_whole_expert_layers() -> None:
    """No GPU keeps room for two more layers of experts while some are in RAM."""
    file = file_of("qwen3-235b-a22b", "q4_K")
    plan = place(file, rig_of("2x24G", "256G"), Settings())
    layer = sum(b for n, b in file.sizes.items() if n.startswith("blk.5.") and "exps" in n)
    assert plan.placement.cpu_experts
    assert all((u.free_bytes or 0) < 2 * layer for u in plan.devices if u.kind == "gpu")


def test_a_dense_model_leaves_as_few_layers_in_ram_as_it_must() -> None:
    """A 70B on one 24 GB card: leading layers in RAM, less than one more would fit."""
    file = file_of("llama-3.1-70b", "q4_K")
    plan = place(file, rig_of("1xrtx-4090", "128G"), Settings())
    homes = plan.placement.layer_device
    first = homes.index(0)
    assert set(homes[:first]) == {HOST}
    layer = sum(b for n, b in file.sizes.items() if n.startswith("blk.5."))
    assert (plan.devices[0].free_bytes or 0) < 2 * layer


def test_types_without_a_cuda_kernel_stay_in_ram() -> None:
    """Experts of an interleaved type are never put on a GPU, however much room there is."""
    plan = place(file_of("deepseek-r1", "q4_k_r4"), rig_of("1x96G", "512G"), Settings())
    assert plan.placement.cpu_experts == frozenset(range(3, 61))
    assert any("q4_k_r4" in w and "no CUDA kernel" in w for w in plan.warnings)


@pytest.mark.parametrize(("gpus", "ram"), [("1x24G", None), ("1x24G", "64G")])
def test_what_does_not_fit_says_what_is_missing(gpus: str, ram: str | None) -> None:
    """Too little of everything is infeasible, with the need and the mend in one line."""
    with pytest.raises(InfeasibleBudget, match=r"needs about .* give more --gpus") as err:
        place(file_of("deepseek-r1", "iq2_ks"), rig_of(gpus, ram), Settings())
    assert "\n" not in str(err.value)


def test_parts_of_experts_are_named_where_they_lie() -> None:
    """A layer whose down experts alone are on a device is not called `experts`."""
    file = file_of("qwen3-235b-a22b", "q4_K")
    rig = rig_of("1x96G", "256G")
    placement = place(file, rig, Settings()).placement
    where = {t.name: "CPU" if "ffn_down_exps" in t.name else "GPU0" for t in file.model.tensors}
    text = holds(file.model, rig, placement, where)
    assert text["CPU"] == "ffn_down_exps of layers 0-93"
    assert "ffn_gate_exps + ffn_up_exps of layers 0-93" in text["GPU0"]


def test_a_loaded_mtp_block_takes_time() -> None:
    """Its weights are read for every token, which a plan without it does not do."""
    file, rig = file_of("glm-4.5-air", "q4_0"), rig_of("1xrtx-pro-6000")
    without, with_it = (place(file, rig, Settings(mtp=mtp)).speed.tg_tps for mtp in (False, True))
    assert without
    assert with_it
    assert 0.9 * without < with_it < without


@pytest.mark.parametrize(
    ("name", "at", "gpus", "ram"),
    [
        ("qwen3-30b-a3b", "q8_0", "1GiB,24GiB", "64G"),
        ("qwen2.5-32b-instruct", "iq4_ks", "400MiB,24GiB", None),
    ],
)
def test_a_card_too_small_to_be_of_use_is_left_out(
    name: str, at: str, gpus: str, ram: str | None
) -> None:
    """What fits one card fits it with a small one beside, as fast and at the same bytes."""
    file, settings = file_of(name, at), Settings(ctx=8192)
    rig, alone = rig_of(gpus, ram), rig_of("24GiB", ram)
    plan, wanted = place(file, rig, settings), place(file, alone, settings)
    check(plan, file, rig, settings)
    assert plan.flags.env["CUDA_VISIBLE_DEVICES"] == "1"
    assert plan.flags.flags == wanted.flags.flags
    assert plan.devices[0].used_bytes == 0
    assert [replace(u, name="") for u in plan.devices[1:]] == [
        replace(u, name="") for u in wanted.devices
    ]


def test_a_machine_without_gpus_is_named_none() -> None:
    """`--gpus none` leaves everything to RAM, which must be stated."""
    file = stored(load_model("qwen3-30b-a3b"), "ik", "q4_K")
    plan = place(file, with_ram(parse_gpus("none"), "32G", None, None, False), Settings(ctx=4096))
    assert [d.name for d in plan.devices] == ["CPU"]
    assert plan.flags.flags[:2] == ["-ngl", "0"]
    assert plan.flags.env == {}
    with pytest.raises(UsageError, match="add --ram"):
        with_ram(parse_gpus("none"), None, None, None, False)


def test_a_context_beyond_the_trained_one_is_told() -> None:
    """Per slot: 65536 tokens for one of 40960 are too many, for two slots they are not."""
    file = stored(load_model("qwen3-30b-a3b"), "ik", "q4_K")
    rig = with_ram(parse_gpus("rtx-3090"), None, None, None, False)
    for parallel, told in ((1, True), (2, False)):
        settings = Settings(ctx=65536, ctk="q8_0", ctv="q8_0", parallel=parallel)
        notes = place(file, rig, settings).flags.notes
        assert any("more than the 40960" in n for n in notes) == told


def test_memory_that_cpu_and_gpu_share_is_not_counted_twice() -> None:
    """RAM of a Mac beyond what its GPU leaves is refused; a card of its own keeps its RAM."""
    with pytest.raises(UsageError, match=r"share its 128 GiB.* give at most 32G"):
        with_ram(parse_gpus("apple-m4-max-40c"), "128G", None, None, False)
    assert with_ram(parse_gpus("apple-m4-max-40c"), "32G", None, None, False).has_ram
    assert with_ram(parse_gpus("rtx-3090"), "128G", None, None, False).has_ram


@pytest.mark.parametrize(
    ("card", "engine", "told"),
    [
        ("apple-m4-max-40c", "ik", True),
        ("strix-halo", "ik", True),
        ("tesla-p40", "ik", True),
        ("rtx-2080-ti", "ik", False),
        ("96G", "ik", False),
        ("apple-m4-max-40c", "mainline", False),
    ],
)
def test_cards_that_ik_is_not_made_for_are_told(card: str, engine: Engine, told: bool) -> None:
    """ik_llama.cpp supports CUDA from Turing on; a Mac gets no CUDA environment."""
    file = stored(load_model("qwen3-4b"), engine, "q4_K")
    rig = with_ram(parse_gpus(card), None, None, None, False)
    flags = place(file, rig, make_settings(engine, ctx=4096)).flags
    assert any("use --engine mainline" in n for n in flags.notes) == told
    assert bool(flags.env) == (not card.startswith("apple"))
