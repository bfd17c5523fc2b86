"""Bytes of the KV cache, block by block, exactly as the engines allocate it.

    GQA / MHA    n_ctx · (K row + V row)                       per attention layer
    MLA, ik      n_ctx · row(ctk, 512 + 64)                    `-mla 1..3` with flash attention
                 … + n_ctx · 512 · 2                           `-mla 1` without (V transposed, f16)
                 n_ctx · n_head · (K row + V row)              `-mla 0`
    sliding      ik: as a full layer; mainline: pad256(min(n_ctx, window + ubatch)) cells
    recurrent    ((d_conv-1)·(d_inner + 2·n_group·d_state) + d_state·d_inner) · 4   per sequence
    DSA indexer  n_ctx · row(f16, head_dim)                    on layers that have an indexer

A row is `ggml_row_size(type, n)`. Sources: llama.cpp src/llama-kv-cache.cpp,
llama-kv-cache-iswa.cpp, llama-memory-recurrent.cpp; ik_llama.cpp src/llama.cpp
(llama_kv_cache_init); checked against 169 published logs (docs/memory-model.md).
"""

from __future__ import annotations

import re
from typing import Final

from quantmix.errors import UsageError
from quantmix.ggml import types
from quantmix.memory.settings import Settings
from quantmix.models.arch.base import mtp_layers
from quantmix.models.arch.mla import indexer_layers
from quantmix.models.model import HParams, Model
from quantmix.units import pad

CTX_PAD: Final = 256
_STATE_BYTES: Final = 4  # recurrent state is f32 in both engines

IK_SKIPS_IDLE_MTP: Final = "2025-10-20"  # ik_llama.cpp PR 843
MAINLINE_SKIPS_IDLE_MTP: Final = "2026-09-28"  # release 0.5.0
IK_INDEXER: Final = "2026-06-27"  # PR 2045; needs `--dsa` to be used, counted as an upper bound
MAINLINE_MLA: Final = "2025-04-15"  # llama.cpp PR 12801
MAINLINE_MLA_WITHOUT_V: Final = "2026-01-25"  # llama.cpp PR 19067
MAINLINE_FULL_INDEXERS_ONLY: Final = "2026-08-15"  # llama.cpp PR 26474, opened 2026-08-02


def kv_bytes(model: Model, settings: Settings) -> tuple[int, ...]:
    """Return the bytes of KV cache (or recurrent state) of every block of the file.

    The tuple has `n_blocks(model)` entries: trunk layers, then the MTP blocks that the file holds;
    the latter are 0 unless `settings.mtp` (or an ik build that still allocated them).

    Raises:
        UsageError: a cache type whose rows do not divide, or that the engine does not have.
    """
    h = model.hparams
    swa, full = swa_layers(h), attention_layers(h)
    trunk = [
        _attention(model, settings, swa=swa[i], layer=i)
        if full[i]
        else recurrent_state_bytes(h) * settings.parallel
        for i in range(h.n_layer)
    ]
    cached = _mtp_cached(model, settings)
    mtp = _attention(model, settings, swa=False, layer=h.n_layer) if cached else 0
    return (*trunk, *([mtp] * (n_blocks(model) - h.n_layer)))


def n_blocks(model: Model) -> int:
    """Number of blocks in the file: trunk layers plus the MTP blocks it holds."""
    return mtp_layers(model.hparams).stop


def n_cells(settings: Settings) -> int:
    """Context cells that the engine allocates: `ctx` padded, per slot where slots are separate.

    Both engines pad to 256; ik without flash attention to 32 (llama_kv_cache_get_padding).
    """
    if settings.engine == "ik":
        return pad(settings.ctx, CTX_PAD if settings.fa else 32)
    slots = max(1, settings.parallel)
    return slots * pad(-(-settings.ctx // slots), CTX_PAD)


def attention_layers(h: HParams) -> tuple[bool, ...]:
    """Whether each trunk layer is attention (True) or recurrent; every n-th in hybrids."""
    step = h.full_attn_interval
    return tuple(step <= 1 or (i + 1) % step == 0 for i in range(h.n_layer))


def swa_layers(h: HParams) -> tuple[bool, ...]:
    """Whether each trunk layer attends over a sliding window (or chunk) only.

    Raises:
        UsageError: the model has a window but a pattern that cannot be read.
    """
    if not h.sliding_window or not h.swa_pattern:
        return (False,) * h.n_layer
    text = h.swa_pattern.lower()
    if re.fullmatch(r"[01]+", text):
        return tuple(c == "1" for c in text.ljust(h.n_layer, text[-1])[: h.n_layer])
    if "alternate" in text:
        return tuple(i % 2 == 0 for i in range(h.n_layer))
    match = re.search(r"%\s*(\d+)\s*==\s*0", text) or re.search(r"every (\d+)(?:th|nd|rd)", text)
    match = match or re.fullmatch(r"(\d+)", text)
    if match is None or int(match.group(1)) < 1:
        raise UsageError(f"sliding-window pattern {h.swa_pattern!r} is not understood")
    step = int(match.group(1))
    return tuple((i + 1) % step != 0 for i in range(h.n_layer))


def recurrent_state_bytes(h: HParams) -> int:
    """Bytes of one linear layer's state for one sequence (f32: convolution tail plus state)."""
    d_inner = h.ssm_d_state * h.ssm_dt_rank
    conv = max(h.ssm_d_conv - 1, 0) * (d_inner + 2 * h.ssm_n_group * h.ssm_d_state)
    return (conv + h.ssm_d_state * d_inner) * _STATE_BYTES


def _attention(model: Model, settings: Settings, *, swa: bool, layer: int) -> int:
    """Bytes of one attention layer over its cells, DSA indexer included."""
    h = model.hparams
    if _latent(model, settings):
        per_cell = _mla_cell(h, settings)
    elif swa and h.head_dim_swa:
        per_cell = _gqa_cell(settings, h.n_head_kv, h.head_dim_swa, h.head_dim_swa)
    elif h.n_head_kv_full and not swa and h.sliding_window:
        per_cell = _gqa_cell(settings, h.n_head_kv_full, h.head_dim_k, h.head_dim_v)
    else:
        heads = h.n_head if h.is_mla else h.n_head_kv
        per_cell = _gqa_cell(settings, heads, h.head_dim_k, h.head_dim_v)
    per_cell += _transposed_padding(h, settings, swa=swa)
    cells = _swa_cells(h, settings) if swa else n_cells(settings)
    indexed = layer in _indexed_blocks(h, settings)
    extra = n_cells(settings) * _indexer_cell(h, settings) if indexed else 0
    return cells * per_cell + extra


def _transposed_padding(h: HParams, settings: Settings, *, swa: bool) -> int:
    """Extra V bytes per cell of mainline without flash attention, where layers differ in width.

    V is then held transposed, and every layer is as wide as the widest
    (llama.cpp src/llama-kv-cache.cpp, n_embd_v_gqa_max).
    """
    differs = bool(h.head_dim_swa or h.n_head_kv_full) and bool(h.sliding_window)
    if settings.engine != "mainline" or settings.fa or not differs:
        return 0
    narrow = h.n_head_kv * (h.head_dim_swa or h.head_dim_v)
    wide = (h.n_head_kv_full or h.n_head_kv) * h.head_dim_v
    missing = max(narrow, wide) - (narrow if swa else wide)
    return _row(settings, settings.ctv, missing) if missing else 0


def _latent(model: Model, settings: Settings) -> bool:
    """Whether the engine keeps the compressed cache for this file."""
    if not model.hparams.is_mla:
        return False
    if settings.engine == "ik":
        return settings.mla > 0
    return model.layout != "legacy" and settings.build >= MAINLINE_MLA


def _mla_cell(h: HParams, settings: Settings) -> int:
    """Bytes per cell of the compressed cache."""
    width = h.kv_lora_rank + h.rope_dim
    latent = _row(settings, settings.ctk, width)
    if settings.engine == "mainline":
        if settings.build >= MAINLINE_MLA_WITHOUT_V:
            return latent
        return latent + _row(settings, settings.ctv, h.kv_lora_rank)
    if settings.fa:
        return latent
    if settings.mla == 1:
        # The transposed half cannot be quantized; ik falls back to f16 (PR 206, log L021).
        plain = settings.ctv if settings.ctv in types.FLOATS else "f16"
        return latent + _row(settings, plain, h.kv_lora_rank)
    # Builds differ on which of the two types that one cache takes: assume the larger.
    return max(latent, _row(settings, settings.ctv, width))


def _gqa_cell(settings: Settings, heads: int, dim_k: int, dim_v: int) -> int:
    """Bytes per cell of `heads` K and V rows; rows are whole heads (ik: one ggml row per head)."""
    return heads * (_row(settings, settings.ctk, dim_k) + _row(settings, settings.ctv, dim_v))


def _row(settings: Settings, cache_type: str, width: int) -> int:
    return types.get(cache_type, settings.engine).row_bytes(width)


def _swa_cells(h: HParams, settings: Settings) -> int:
    """Cells of a sliding-window layer: all of them in ik, window plus ubatch in mainline."""
    if settings.engine == "ik":
        return n_cells(settings)
    slots = max(1, settings.parallel)
    per_slot = n_cells(settings) // slots
    window = pad(min(per_slot, h.sliding_window + settings.ubatch), CTX_PAD)
    return slots * window


def _indexed_blocks(h: HParams, settings: Settings) -> frozenset[int]:
    """Blocks that get an indexer cache; older mainline gave one to every block of such models."""
    if settings.engine == "ik" and settings.build < IK_INDEXER:
        return frozenset()
    found = indexer_layers(h)
    if found and settings.engine == "mainline" and settings.build < MAINLINE_FULL_INDEXERS_ONLY:
        return frozenset(range(h.n_layer + h.nextn_layers))
    return found


def _indexer_cell(h: HParams, settings: Settings) -> int:
    """Bytes per cell of the DSA indexer's keys: f16 in ik (`-ictk`), ctk in mainline."""
    kind = settings.ctk if settings.engine == "mainline" else "f16"
    return _row(settings, kind, h.indexer_head_dim)


def _mtp_cached(model: Model, settings: Settings) -> bool:
    """Whether MTP blocks get a KV cache: when they run, and in builds that forgot to leave it out.

    mainline allocated it for GLM-4.5 up to release 0.4.0 (seen there, and gone in 0.5.0).
    """
    if settings.engine == "ik":
        return settings.mtp or settings.build < IK_SKIPS_IDLE_MTP
    old = model.arch == "glm4moe" and settings.build < MAINLINE_SKIPS_IDLE_MTP
    return settings.mtp or old
