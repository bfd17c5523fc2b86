"""Compute buffers, against published logs and the shape of the formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmix.memory.compute import (
    DeviceRole,
    copies_experts,
    mla_chunk_bytes,
    output_bytes,
    regimes,
)
from quantmix.memory.margins import margins, safe
from quantmix.memory.model import Regime
from quantmix.memory.settings import Settings
from quantmix.models.model import HParams, Model
from quantmix.units import MIB

from .conftest import QWEN3_235B, R1, bare

GLM_45 = HParams(
    n_layer=92,
    n_embd=5120,
    n_vocab=151552,
    n_head=96,
    n_head_kv=8,
    head_dim_k=128,
    head_dim_v=128,
    n_dense_lead=3,
    n_ff_exp=1536,
    n_expert=160,
    n_expert_used=8,
)
FIRST = DeviceRole(first=True, layers=True, experts=False, output=False)
LAST = DeviceRole(first=False, layers=True, experts=False, output=True)


def estimate(model: Model, settings: Settings, role: DeviceRole, expert_mib: float = 0) -> float:
    """Largest regime in MiB."""
    s = int(expert_mib * MIB)
    return max(r.bytes_at(s) for r in regimes(model, settings, role)) / MIB


@pytest.mark.parametrize(("ubatch", "out", "attn"), [(512, 306, 260), (16384, 9792, 8320)])
def test_glm_45_at_64k(ubatch: int, out: float, attn: float) -> None:
    """The output GPU holds logits, the first one masks and attention (logs L274 to L279)."""
    model, settings = bare(GLM_45), Settings(ctx=65536, ubatch=ubatch, build="2025-08-15")
    assert estimate(model, settings, LAST) == out
    assert estimate(model, settings, FIRST) == attn


def test_experts_in_ram_widen_attention_on_the_first_gpu() -> None:
    """Qwen3-235B at 32k, ub 2048 takes 832 MiB on the first GPU, attention alone 576 (L181)."""
    settings = Settings(ctx=32768, ubatch=2048, build="2025-07-18")
    alone = estimate(bare(QWEN3_235B), settings, FIRST)
    role = replace(FIRST, cpu_experts=True)
    names = {r.name: r.constant_bytes / MIB for r in regimes(bare(QWEN3_235B), settings, role)}
    assert names["attn"] == 832.0
    assert alone == 576.0


@pytest.mark.parametrize(
    ("settings", "logged"),
    [
        (Settings(ctx=163840, ubatch=512, amb=512, build="2025-07-11"), 13649.0),
        (Settings(ctx=20480, ubatch=4096, amb=512, build="2025-07-10"), 2872.0),
        (Settings(ctx=153600, ubatch=4096, amb=512, build="2025-07-11"), 16257.0),
    ],
)
def test_mla_before_2026_holds_all_heads(settings: Settings, logged: float) -> None:
    """R1 decompresses K and V of every head: gigabytes at long contexts (L045, L149, L048)."""
    assert estimate(bare(R1, "ik"), settings, FIRST) == pytest.approx(logged, rel=0.02)


def test_mla_since_2026_01_31_is_bound_by_amb() -> None:
    """The newest builds hold one head group only: R1 at 160k falls from 13.7 GiB to below 1."""
    old = Settings(ctx=163840, build="2026-01-30")
    new = Settings(ctx=163840)
    assert estimate(bare(R1, "ik"), old, FIRST) > 13000
    assert estimate(bare(R1, "ik"), new, FIRST) < 1000


@pytest.mark.parametrize(
    ("gate_up_mib", "logged"), [(2016, 4472.01), (1904, 4252.01)], ids=["iq4_k", "iq4_ks"]
)
def test_copied_experts_decide_the_buffer(gate_up_mib: float, logged: float) -> None:
    """Only the type of the experts in RAM differs between two runs (logs L040, L041)."""
    settings = Settings(ctx=32768, ubatch=2048, amb=512, build="2025-07-09")
    role = DeviceRole(first=True, layers=True, experts=True, output=True, cpu_experts=True)
    assert estimate(bare(R1, "ik"), settings, role, gate_up_mib) == pytest.approx(logged, rel=0.005)


def test_the_copy_threshold_by_engine_and_build() -> None:
    """ik copies from 32·experts/used tokens on, older ik and mainline from 32."""
    r1 = bare(R1, "split")
    assert not copies_experts(r1, Settings(ubatch=1023))
    assert copies_experts(r1, Settings(ubatch=1024))
    assert copies_experts(r1, Settings(ubatch=32, build="2025-05-11"))
    assert copies_experts(r1, Settings(ubatch=32, engine="mainline"))
    assert not copies_experts(r1, Settings(ubatch=31, engine="mainline"))
    assert not copies_experts(r1, Settings(ubatch=4096, ctx=512))


def test_a_pair_is_copied_only_by_ik_with_fused_experts() -> None:
    """Mainline and unfused ik copy one expert tensor at a time."""
    role = replace(FIRST, cpu_experts=True)

    def most(settings: Settings, fused: bool = True) -> float:
        found = regimes(bare(R1, "split"), settings, replace(role, fused=fused))
        return max(r.coefficient for r in found)

    assert most(Settings(ubatch=2048)) == 2.0
    assert most(Settings(ubatch=2048), fused=False) == 1.0
    assert most(Settings(ubatch=2048, engine="mainline")) == 1.0


def test_softcapped_logits_count_twice() -> None:
    """Gemma 4 holds two copies of its logits: 1034.5 MiB at ub 512 (log L266)."""
    h = HParams(60, 5376, 262144, 32, 16, 512, 512)
    settings = Settings(ctx=4096, build="2026-05-08")
    assert estimate(bare(h, arch="gemma4"), settings, LAST) == 1034.5
    assert estimate(bare(h, arch="llama"), settings, LAST) == 522.5


def test_head_groups_halve_until_they_fit() -> None:
    """128 heads of 1 GiB at 8192 cells become 32 of 256 MiB; amb 0 sets no limit."""
    assert mla_chunk_bytes(R1, Settings(ctx=8192, amb=256)) == 256 * MIB
    assert mla_chunk_bytes(R1, Settings(ctx=8192, amb=0)) == 1024 * MIB


def test_output_rows() -> None:
    """One row of R1's vocabulary is 0.49 MiB, one per slot."""
    assert output_bytes(bare(R1), Settings()) == 4 * 129280
    assert output_bytes(bare(R1), Settings(parallel=3)) == 3 * 4 * 129280
    assert output_bytes(bare(R1), Settings(), 8) == 8 * 4 * 129280


def test_every_margin_raises() -> None:
    """Bounds are never below their estimates, and regimes without a row use the general one."""
    table = margins()
    assert "*" in table
    for margin in table.values():
        assert margin.factor >= 1.0
        assert margin.add_bytes >= 0
    (bound,) = safe((Regime("never seen", 1000, 2.0),))
    assert bound.constant_bytes >= 1000
    assert bound.coefficient >= 2.0


@given(
    ubatch=st.integers(1, 8192),
    ctx=st.integers(256, 200_000),
    mla=st.integers(0, 3),
    fa=st.booleans(),
    engine=st.sampled_from(["ik", "mainline"]),
    build=st.sampled_from(["2025-06-01", "2025-12-01", "2026-08-15"]),
)
def test_buffers_are_positive_and_grow_with_ubatch(
    ubatch: int, ctx: int, mla: int, fa: bool, engine: str, build: str
) -> None:
    """Twice the ubatch never needs less, whatever the mode; no buffer is empty."""
    settings = Settings(
        engine=engine,  # type: ignore[arg-type]
        build=build,
        ctx=ctx,
        ubatch=ubatch,
        mla=mla,
        fa=fa,
    )
    role = DeviceRole(first=True, layers=True, experts=True, output=True, cpu_experts=True)
    model = bare(R1, "split")
    one = estimate(model, settings, role, 1000)
    two = estimate(model, replace(settings, ubatch=2 * ubatch), role, 1000)
    assert 0 < one <= two
