"""GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7 (glm4moe): biased attention, shared expert, MTP block.

Source: llama.cpp src/models/glm4-moe.cpp, checked against published bf16 tensor maps.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantmix.models.arch import base
from quantmix.models.arch.base import Entry
from quantmix.models.model import HParams, Layout

ARCHS = ("glm4moe",)


def entries(h: HParams, arch: str, layout: Layout) -> Iterator[Entry]:
    """Yield the tensor list, MTP block included."""
    yield from base.embedding(h)
    for i in range(h.n_layer):
        yield from base.block(i, _layer(h, i))
    for i in base.mtp_layers(h):
        yield from base.mtp_block(h, i, _layer(h, i))
    yield from base.head(h)


def _layer(h: HParams, i: int) -> Iterator[Entry]:
    yield "attn_norm.weight", (h.n_embd,)
    yield from base.moe_or_dense(h, i)
    yield "post_attention_norm.weight", (h.n_embd,)
    yield from base.attention(h)
