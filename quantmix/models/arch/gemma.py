"""Gemma 3 (gemma3) and Gemma 4 dense (gemma4): sandwich norms, sliding-window layers, tied head.

Sources: llama.cpp src/models/{gemma3,gemma4}.cpp; a local GGUF of 270m and a published map of 31B.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantmix.models.arch import base
from quantmix.models.arch.base import Entry
from quantmix.models.model import HParams, Layout

ARCHS = ("gemma3", "gemma4")

# Every sixth layer sees the whole context (swa_pattern 5:1 of the Gemma 3 and 4 configs).
FULL_EVERY = 6


def entries(h: HParams, arch: str, layout: Layout) -> Iterator[Entry]:
    """Yield the tensor list."""
    yield from base.embedding(h)
    for i in range(h.n_layer):
        yield from base.block(i, _layer(h, arch, (i + 1) % FULL_EVERY == 0))
    yield from base.head(h)


def _layer(h: HParams, arch: str, full: bool) -> Iterator[Entry]:
    yield "attn_norm.weight", (h.n_embd,)
    if arch == "gemma4":
        yield "layer_output_scale.weight", (1,)
    yield from base.dense_ffn(h)
    yield "post_attention_norm.weight", (h.n_embd,)
    yield "post_ffw_norm.weight", (h.n_embd,)
    yield "ffn_norm.weight", (h.n_embd,)
    if arch == "gemma4" and full:
        # Keys serve as values in the full layers: no attn_v.
        yield from base.attention(h, n_kv=h.n_head_kv_full, has_v=False)
    else:
        yield from base.attention(h, head_dim=h.head_dim_swa)
