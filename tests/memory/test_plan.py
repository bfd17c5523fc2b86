"""What a device holds besides weights."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantmix.errors import UsageError
from quantmix.memory.model import HOST, Placement
from quantmix.memory.plan import (
    derived_bytes,
    device_memory,
    gpu_reserve_bytes,
    host_reserve_bytes,
)
from quantmix.memory.settings import Settings
from quantmix.models.arch.base import is_moe_layer
from quantmix.models.model import Model, Tensor
from quantmix.rig.device import Device, Rig
from quantmix.units import GIB, MIB

from .conftest import QWEN3_235B, R1, bare

HALVES = Placement(layer_device=(0,) * 31 + (1,) * 30, output_device=1)


def test_kv_follows_the_layer(r1: Model, two_cards: Rig) -> None:
    """Each GPU holds the cache of its own layers; nothing is lost; `-nkvo` moves all to RAM."""
    gpu0, gpu1, host = device_memory(r1, Settings(), two_cards, HALVES)
    assert (gpu0.kv_bytes, gpu1.kv_bytes, host.kv_bytes) == (31 * 36 * MIB, 30 * 36 * MIB, 0)
    moved = device_memory(r1, Settings(nkvo=True), two_cards, HALVES)
    assert [d.kv_bytes for d in moved] == [0, 0, 61 * 36 * MIB]


def test_split_layout_derives_17_mib_per_layer(r1: Model, two_cards: Rig) -> None:
    """ik builds attn_kv_b of the split layout on the layer's device (log L033: 1037 MiB)."""
    gpu0, gpu1, host = device_memory(r1, Settings(), two_cards, HALVES)
    assert (gpu0.derived_bytes, gpu1.derived_bytes, host.derived_bytes) == (
        31 * 17 * MIB,
        30 * 17 * MIB,
        0,
    )


def test_derived_tensors_by_layout_and_mode() -> None:
    """Legacy files derive k_b and v_b in any MLA mode, split ones kv_b in modes 2 and 3 only."""

    def total(layout: str, **kw: object) -> int:
        return sum(derived_bytes(bare(R1, layout), Settings(**kw)))  # type: ignore[arg-type]

    assert total("split", mla=1) == total("split", mla=0) == total("ik") == 0
    assert total("legacy", mla=1) == total("split", mla=2) == 1037 * MIB
    assert total("split", engine="mainline") == 0


def test_reserve_grows_with_ubatch() -> None:
    """300 MiB + 0.32·ubatch on the first GPU, 0.10 on others, never below 512 MiB."""
    gpu = Device("GPU0", "gpu", 24 * GIB)
    big = Settings(ubatch=4096)
    assert gpu_reserve_bytes(gpu, Settings(), first=True, desktop=False) == 512 * MIB
    assert gpu_reserve_bytes(gpu, big, first=True, desktop=False) == pytest.approx(
        1610.72 * MIB, abs=1
    )
    assert gpu_reserve_bytes(gpu, big, first=False, desktop=False) == pytest.approx(
        709.6 * MIB, abs=1
    )
    assert gpu_reserve_bytes(gpu, Settings(), first=True, desktop=True) == 1312 * MIB
    assert gpu_reserve_bytes(replace(gpu, reserve_bytes=5), big, first=True, desktop=True) == 5


def test_host_reserve() -> None:
    """RAM keeps max(4 GiB, 5 %) and the prompt cache; a stated reserve replaces the former."""

    def rig(ram: int | None, reserve: int | None = None) -> Rig:
        return Rig(gpus=(), host=Device("CPU", "host", ram), ram_reserve_bytes=reserve)

    assert host_reserve_bytes(rig(64 * GIB), Settings()) == 4 * GIB
    assert host_reserve_bytes(rig(512 * GIB), Settings()) == pytest.approx(25.6 * GIB, abs=1)
    assert host_reserve_bytes(rig(64 * GIB, GIB), Settings(cram_mib=1024)) == 2 * GIB
    assert host_reserve_bytes(rig(None), Settings()) == 0


def test_experts_in_ram_make_the_first_gpu_copy_them(r1: Model, two_cards: Rig) -> None:
    """At ub 2048 the first GPU's buffer grows by twice the largest expert tensor, no other's."""
    away = replace(HALVES, cpu_experts=frozenset(range(3, 61)))
    gpu0, gpu1, _ = device_memory(r1, Settings(ubatch=2048), two_cards, away)
    step = gpu0.compute_bytes(3 * GIB) - gpu0.compute_bytes(2 * GIB)
    assert step >= 2 * GIB
    assert gpu1.compute_bytes(3 * GIB) == gpu1.compute_bytes(0)
    small = device_memory(r1, Settings(ubatch=512), two_cards, away)[0]
    assert small.compute_bytes(3 * GIB) == small.compute_bytes(0)


def test_a_tied_head_is_held_twice(two_cards: Rig) -> None:
    """Without output.weight the output's GPU holds the embedding a second time."""
    embd = Tensor("token_embd.weight", (4096, 151936), "bf16", "token_embd", None)
    head = Tensor("output.weight", (4096, 151936), "bf16", "output", None)
    place = Placement((0,) * 47 + (1,) * 47, 1)
    tied = replace(bare(QWEN3_235B), tensors=(embd,))
    untied = replace(bare(QWEN3_235B), tensors=(embd, head))
    assert [d.duplicate_embedding for d in device_memory(tied, Settings(), two_cards, place)] == [
        False,
        True,
        False,
    ]
    assert not any(
        d.duplicate_embedding for d in device_memory(untied, Settings(), two_cards, place)
    )


def test_layers_in_ram_are_the_hosts(r1: Model, two_cards: Rig) -> None:
    """A layer on the host has its cache and derived tensors there."""
    place = Placement((HOST,) * 10 + (0,) * 51, 0)
    gpu0, gpu1, host = device_memory(r1, Settings(), two_cards, place)
    assert host.kv_bytes == 10 * 36 * MIB
    assert host.derived_bytes == 10 * 17 * MIB
    assert gpu0.kv_bytes == 51 * 36 * MIB
    assert gpu1.kv_bytes == gpu1.compute_bytes() == 0


def test_wrong_placements_are_refused(r1: Model, two_cards: Rig) -> None:
    """A GPU that is not there, or too few layers, is an error."""
    with pytest.raises(UsageError, match="GPU5"):
        device_memory(r1, Settings(), two_cards, replace(HALVES, output_device=5))
    with pytest.raises(UsageError, match="3 blocks"):
        device_memory(r1, Settings(), two_cards, Placement((0, 0, 0), 0))


def test_moe_layers_by_step_and_lead() -> None:
    """Dense leading layers and every other layer of Maverick have no routed experts."""
    assert [is_moe_layer(R1, i) for i in (0, 2, 3, 60)] == [False, False, True, True]
    maverick = replace(QWEN3_235B, moe_layer_step=2)
    assert [is_moe_layer(maverick, i) for i in range(4)] == [False, True, False, True]


def test_a_tied_head_in_ram_is_one_mapping_until_ik_stops_mapping(two_cards: Rig) -> None:
    """Overrides to the CPU make ik allocate its host tensors: then the head is there twice."""
    embd = Tensor("token_embd.weight", (4096, 151936), "bf16", "token_embd", None)
    tied = replace(bare(QWEN3_235B), tensors=(embd,))
    mapped = Placement((HOST,) * 10 + (0,) * 84, HOST)
    moved = replace(mapped, cpu_experts=frozenset(range(50, 94)))
    mainline = Settings(engine="mainline", build="2026-10-01")
    assert not device_memory(tied, Settings(), two_cards, mapped)[-1].duplicate_embedding
    assert device_memory(tied, Settings(), two_cards, moved)[-1].duplicate_embedding
    assert not device_memory(tied, mainline, two_cards, moved)[-1].duplicate_embedding


def test_a_gpu_that_the_flags_hide_holds_nothing(r1: Model, two_cards: Rig) -> None:
    """The first GPU in use copies experts and has the first one's reserve; a hidden one is free."""
    settings = Settings(ubatch=2048)
    on_second = Placement((1,) * 61, 1, frozenset(range(3, 61)))
    hidden, used, host = device_memory(r1, settings, two_cards, on_second)
    alone = replace(two_cards, gpus=two_cards.gpus[1:])
    on_first = Placement((0,) * 61, 0, on_second.cpu_experts)
    first, host_alone = device_memory(r1, settings, alone, on_first)
    assert (used, host) == (first, host_alone)
    assert hidden.fixed_bytes(GIB) == 0


def test_the_engines_order_says_which_gpu_is_first(r1: Model, two_cards: Rig) -> None:
    """With CUDA_VISIBLE_DEVICES=1,0 experts are copied to GPU1; the desktop stays with card 0."""
    settings, desk = Settings(ubatch=2048), replace(two_cards, desktop=True)
    away = replace(HALVES, cpu_experts=frozenset(range(3, 61)))
    gpu0, gpu1, _ = device_memory(r1, settings, desk, away, visible=(1, 0))
    assert gpu0.compute_bytes(3 * GIB) == gpu0.compute_bytes(0)
    assert gpu1.compute_bytes(3 * GIB) >= gpu1.compute_bytes(0) + 2 * GIB
    plain = device_memory(r1, settings, two_cards, away, visible=(1, 0))
    assert gpu0.reserve_bytes == plain[0].reserve_bytes + 800 * MIB
    assert gpu1.reserve_bytes == plain[1].reserve_bytes


def test_one_gpu_in_use_is_no_pipeline(two_cards: Rig) -> None:
    """Mainline keeps copies of the inputs for several GPUs that it sees, not for those it has."""
    dense, settings = bare(QWEN3_235B), Settings(engine="mainline", build="2026-10-01")
    both = device_memory(dense, settings, two_cards, Placement((0,) * 47 + (1,) * 47, 1))
    one = device_memory(dense, settings, two_cards, Placement((1,) * 94, 1))
    assert one[1].compute_bytes() < both[1].compute_bytes()
