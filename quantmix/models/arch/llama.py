"""Llama 3.x, Mistral, Mixtral, SmolLM2 (llama), Llama 4 (llama4), Qwen3 dense and MoE, MiniMax-M2.

Plain pre-norm decoders that differ in q/k norms, biases and which layers hold experts.
Sources: llama.cpp src/models/{llama,llama4,qwen3,qwen3moe,qwen3vlmoe,minimax-m2}.cpp.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantmix.models.arch import base
from quantmix.models.arch.base import Entry
from quantmix.models.model import HParams, Layout

ARCHS = ("llama", "llama4", "qwen2", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe", "minimax-m2")


def entries(h: HParams, arch: str, layout: Layout) -> Iterator[Entry]:
    """Yield the tensor list of a plain decoder."""
    yield from base.embedding(h)
    for i in range(h.n_layer):
        yield from base.block(i, _layer(h, i))
    yield from base.head(h)


def _layer(h: HParams, i: int) -> Iterator[Entry]:
    yield "attn_norm.weight", (h.n_embd,)
    yield from base.moe_or_dense(h, i)
    yield "ffn_norm.weight", (h.n_embd,)
    yield from base.attention(h)
