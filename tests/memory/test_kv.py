"""The KV cache, against what the engines logged."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quantmix.errors import UsageError
from quantmix.memory.kv import (
    attention_layers,
    kv_bytes,
    n_cells,
    recurrent_state_bytes,
    swa_layers,
)
from quantmix.memory.settings import Settings
from quantmix.models.arch.mla import indexer_layers
from quantmix.models.model import HParams, Model
from quantmix.units import MIB

from .conftest import QWEN3_235B, R1, bare

GEMMA3_27B = HParams(
    n_layer=62,
    n_embd=5376,
    n_vocab=262144,
    n_head=32,
    n_head_kv=16,
    head_dim_k=128,
    head_dim_v=128,
    sliding_window=1024,
    swa_pattern="5 SWA : 1 full (layer i full when (i+1)%6==0)",
)
GEMMA4_31B = replace(
    GEMMA3_27B, n_layer=60, head_dim_k=512, head_dim_v=512, head_dim_swa=256, n_head_kv_full=4
)
GPT_OSS_20B = HParams(
    n_layer=24,
    n_embd=2880,
    n_vocab=201088,
    n_head=64,
    n_head_kv=8,
    head_dim_k=64,
    head_dim_v=64,
    sliding_window=128,
    swa_pattern="alternate: even layers SWA",
)
QWEN3_NEXT = HParams(
    n_layer=48,
    n_embd=2048,
    n_vocab=151936,
    n_head=16,
    n_head_kv=2,
    head_dim_k=256,
    head_dim_v=256,
    full_attn_interval=4,
    ssm_d_conv=4,
    ssm_d_state=128,
    ssm_n_group=16,
    ssm_dt_rank=32,
)


def mib(model: Model, **settings: object) -> float:
    """Total of the cache in MiB."""
    return sum(kv_bytes(model, Settings(**settings))) / MIB  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("settings", "logged"),
    [
        ({"ctx": 32768}, 2196.00),
        ({"ctx": 32768, "ctk": "q8_0"}, 1166.62),
        ({"ctx": 65536, "ctk": "q8_0", "mla": 2}, 2333.25),
        ({"ctx": 2048, "mla": 0}, 9760.00),
        ({"ctx": 163840, "mla": 2, "fa": False, "build": "2025-03-01"}, 10980.00),
    ],
)
def test_deepseek_r1_in_ik(r1: Model, settings: dict[str, object], logged: float) -> None:
    """DeepSeek-R1 takes what ik logged in every MLA mode (logs L033, L032, L025, L014, L011)."""
    assert mib(r1, **settings) == pytest.approx(logged, abs=0.006)


def test_mla_1_without_flash_attention_holds_a_transposed_copy() -> None:
    """DeepSeek-V2-Lite with q8_KV takes 2713.5 MiB without and 985.5 with FA (L021, L022)."""
    lite = bare(replace(R1, n_layer=27, n_head=16, n_head_kv=16), "split")
    common = {"ctx": 65536, "mla": 1, "ctk": "q8_KV", "ctv": "q8_KV"}
    assert mib(lite, fa=False, **common) == 2713.5
    assert mib(lite, fa=True, **common) == 985.5


@pytest.mark.parametrize(
    ("settings", "logged"),
    [
        ({"ctx": 32768}, 6016.0),
        ({"ctx": 32768, "ctk": "q8_0", "ctv": "q8_0"}, 3196.0),
        ({"ctx": 182016, "ctk": "q8_0"}, 25584.89),
    ],
)
def test_qwen3_235b(qwen: Model, settings: dict[str, object], logged: float) -> None:
    """Grouped-query attention takes K and V of the KV heads (logs L088, L087, L241)."""
    assert mib(qwen, **settings) == pytest.approx(logged, abs=0.006)


def test_mainline_mla_dropped_its_v_cache(r1: Model) -> None:
    """Mainline held 512 more values per token until 2026-01-25, and full heads for old files."""
    assert mib(r1, engine="mainline", build="2026-10-01") == pytest.approx(2196.0)
    assert mib(r1, engine="mainline", build="2025-05-20") == pytest.approx(2196.0 * 1088 / 576)
    legacy = bare(R1, "legacy")
    assert mib(legacy, engine="mainline", ctx=2048) == 9760.0


def test_sliding_window_is_full_in_ik_and_short_in_mainline() -> None:
    """ik gives window layers every cell; mainline window plus ubatch, padded to 256."""
    gpt = bare(GPT_OSS_20B)
    assert mib(gpt, ctx=131072) == 6144.0
    full = 12 * 8 * 128 * 2 * 131072
    window = 12 * 8 * 128 * 2 * 768
    assert mib(gpt, ctx=131072, engine="mainline") == (full + window) / MIB


def test_two_kinds_of_heads_in_gemma_4() -> None:
    """Gemma 4 mixes 4 wide heads on full layers and 16 narrow ones on the others (L266)."""
    assert mib(bare(GEMMA4_31B), ctx=4096) == 3520.0


def test_recurrent_layers_hold_a_state_per_slot() -> None:
    """Qwen3-Next keeps 75.4 MiB of state per sequence besides its 12 attention layers."""
    model = bare(QWEN3_NEXT)
    state = 36 * recurrent_state_bytes(QWEN3_NEXT)
    assert state / MIB == pytest.approx(75.375)
    one, four = mib(model, ctx=4096), mib(model, ctx=4096, parallel=4)
    assert (four - one) * MIB == 3 * state
    assert one * MIB == 12 * 4096 * 2 * 2 * 256 * 2 + state
    assert sum(attention_layers(QWEN3_NEXT)) == 12


def test_indexer_layers_cost_an_f16_row_in_ik() -> None:
    """A DSA indexer adds one key row per cell, on its own layers only."""
    h = replace(R1, indexer_head_dim=128, indexer_layers="0-2,6-60:4", indexer_n_head=64)
    layers = indexer_layers(h)
    assert layers == {0, 1, 2, *range(6, 61, 4)}
    plain = kv_bytes(bare(R1, "split"), Settings(ctx=4096))
    with_index = kv_bytes(bare(h, "split"), Settings(ctx=4096))
    extra = {
        i for i, (a, b) in enumerate(zip(plain, with_index, strict=True)) if b - a == 4096 * 256
    }
    assert extra == layers


def test_mtp_block_is_cached_when_it_runs_or_when_the_build_is_old() -> None:
    """GLM-4.5 had 93 cached layers in ik before 2025-10-20, 92 after, 93 again with MTP on."""
    glm = bare(replace(QWEN3_235B, n_layer=92, nextn_layers=1, nextn_in_gguf=True))
    cached = [
        sum(b > 0 for b in kv_bytes(glm, s))
        for s in (Settings(build="2025-08-15"), Settings(), Settings(mtp=True))
    ]
    assert cached == [93, 92, 93]


def test_unreadable_patterns_are_refused() -> None:
    """A window pattern that nobody can read is an error, not a guess."""
    with pytest.raises(UsageError, match="pattern"):
        swa_layers(replace(GPT_OSS_20B, swa_pattern="sometimes"))


def test_a_row_that_does_not_divide_is_refused(r1: Model) -> None:
    """A cache type with blocks of 256 cannot hold rows of 576."""
    with pytest.raises(UsageError, match="does not divide"):
        kv_bytes(r1, Settings(ctk="q4_K"))


@given(
    ctx=st.integers(1, 400_000),
    slots=st.integers(1, 16),
    engine=st.sampled_from(["ik", "mainline"]),
)
def test_cells_cover_the_context(ctx: int, slots: int, engine: str) -> None:
    """Cells are never fewer than asked for, and at most one pad per slot more."""
    cells = n_cells(Settings(engine=engine, ctx=ctx, parallel=slots))  # type: ignore[arg-type]
    assert ctx <= cells < ctx + 256 * slots + slots
    assert cells % 256 == 0


@given(ctx=st.integers(256, 200_000))
def test_the_cache_grows_with_the_context(ctx: int) -> None:
    """A longer context never takes less."""
    model = bare(R1, "split")
    assert sum(kv_bytes(model, Settings(ctx=ctx))) <= sum(kv_bytes(model, Settings(ctx=ctx + 300)))
