"""gpt-oss 20b and 120b (gpt-oss): biases everywhere, attention sinks, experts native in mxfp4.

Source: llama.cpp src/models/openai-moe.cpp; counts per type equal to a public loader log of 120b.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantmix.models.arch import base
from quantmix.models.arch.base import Entry
from quantmix.models.model import HParams, Layout

ARCHS = ("gpt-oss",)
EXPERTS_TYPE = "mxfp4"


def entries(h: HParams, arch: str, layout: Layout) -> Iterator[Entry]:
    """Yield the tensor list; the expert biases have two dimensions and stay f32."""
    yield from base.embedding(h)
    for i in range(h.n_layer):
        yield from base.block(i, _layer(h))
    yield from base.head(h)


def _layer(h: HParams) -> Iterator[Entry]:
    yield "attn_norm.weight", (h.n_embd,)
    yield "ffn_down_exps.bias", (h.n_embd, h.n_expert)
    yield "ffn_gate_exps.bias", (h.n_ff_exp, h.n_expert)
    yield "ffn_up_exps.bias", (h.n_ff_exp, h.n_expert)
    yield from base.experts(h)
    yield "ffn_gate_inp.bias", (h.n_expert,)
    yield from base.router(h)
    yield "post_attention_norm.weight", (h.n_embd,)
    yield from base.attention(h)
    yield "attn_output.bias", (h.n_embd,)
    yield "attn_sinks.weight", (h.n_head,)
