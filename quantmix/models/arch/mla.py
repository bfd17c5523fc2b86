"""DeepSeek V2/V3/R1, Kimi K2, GLM-4.7-Flash (deepseek2), V3.2 (deepseek32), GLM-5 (glm-dsa).

Multi-head latent attention in three layouts: `split` (attn_k_b and attn_v_b in 3-D, mainline's
converter since April 2025), `legacy` (attn_kv_b alone), `ik` (attn_kv_b and both parts in 2-D).
Sources: llama.cpp src/models/deepseek2.cpp, ik_llama.cpp src/llama-load-tensors.cpp
create_deepseek2_tensors, checked against full quantization logs of all three.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantmix.models.arch import base
from quantmix.models.arch.base import Entry
from quantmix.models.model import HParams, Layout

ARCHS = ("deepseek2", "deepseek32", "glm-dsa")


def entries(h: HParams, arch: str, layout: Layout) -> Iterator[Entry]:
    """Yield the tensor list of an MLA model in the given layout."""
    indexed = indexer_layers(h)
    yield from base.embedding(h)
    for i in range(h.n_layer):
        yield from base.block(i, _layer(h, i, layout, i in indexed))
    for i in base.mtp_layers(h):
        yield from base.mtp_block(h, i, _layer(h, i, layout, i in indexed))
    yield from base.head(h)


def indexer_layers(h: HParams) -> frozenset[int]:
    """Return the blocks with a sparse-attention indexer, MTP blocks included.

    `indexer_layers` is `all`, or ranges with an optional step: `0-2,6-78:4`.
    """
    if not h.indexer_n_head or not h.indexer_layers:
        return frozenset()
    n_blocks = base.mtp_layers(h).stop
    if h.indexer_layers == "all":
        return frozenset(range(n_blocks))
    layers: set[int] = set()
    for part in h.indexer_layers.split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        layers.update(range(int(first), int(last or first) + 1, int(step or 1)))
    return frozenset(i for i in layers if i < n_blocks)


def _layer(h: HParams, i: int, layout: Layout, indexed: bool) -> Iterator[Entry]:
    yield "attn_norm.weight", (h.n_embd,)
    yield from base.moe_or_dense(h, i)
    yield "ffn_norm.weight", (h.n_embd,)
    if indexed:
        yield from _indexer(h)
    yield from _attention(h, layout)


def _indexer(h: HParams) -> Iterator[Entry]:
    yield "indexer.k_norm.bias", (h.indexer_head_dim,)
    yield "indexer.k_norm.weight", (h.indexer_head_dim,)
    yield "indexer.proj.weight", (h.n_embd, h.indexer_n_head)
    yield "indexer.attn_k.weight", (h.n_embd, h.indexer_head_dim)
    yield "indexer.attn_q_b.weight", (h.q_lora_rank, h.indexer_n_head * h.indexer_head_dim)


def _attention(h: HParams, layout: Layout) -> Iterator[Entry]:
    e, heads, rank, dv = h.n_embd, h.n_head, h.kv_lora_rank, h.head_dim_v
    nope = h.head_dim_k - h.rope_dim
    yield "attn_kv_a_norm.weight", (rank,)
    yield "attn_kv_a_mqa.weight", (e, rank + h.rope_dim)
    if layout in ("legacy", "ik"):
        yield "attn_kv_b.weight", (rank, heads * (nope + dv))
    if layout == "ik":
        yield "attn_k_b.weight", (nope, rank * heads)
        yield "attn_v_b.weight", (rank, dv * heads)
    elif layout == "split":
        yield "attn_k_b.weight", (nope, rank, heads)
        yield "attn_v_b.weight", (rank, dv, heads)
    yield "attn_output.weight", (heads * dv, e)
    if h.q_lora_rank:
        yield "attn_q_a_norm.weight", (h.q_lora_rank,)
        yield "attn_q_a.weight", (e, h.q_lora_rank)
        yield "attn_q_b.weight", (h.q_lora_rank, heads * h.head_dim_k)
    else:
        yield "attn_q.weight", (e, heads * h.head_dim_k)
