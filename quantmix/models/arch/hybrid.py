"""Qwen3.5/3.6/3.8 (qwen35, qwen35moe) and Qwen3-Next (qwen3next): gated delta net + attention.

Block i is full attention when (i+1) % full_attn_interval == 0, else linear attention with a
constant state. Sources: llama.cpp src/models/{qwen35,qwen35moe,qwen3next}.cpp, checked against
published bf16 tensor maps of seven models.
"""

from __future__ import annotations

from collections.abc import Iterator

from quantmix.models.arch import base
from quantmix.models.arch.base import Entry
from quantmix.models.model import HParams, Layout

ARCHS = ("qwen35", "qwen35moe", "qwen3next")


def entries(h: HParams, arch: str, layout: Layout) -> Iterator[Entry]:
    """Yield the tensor list of a hybrid; an MTP block has full attention."""
    yield from base.embedding(h)
    for i in range(h.n_layer):
        full = (i + 1) % h.full_attn_interval == 0
        yield from base.block(i, _layer(h, arch, full))
    for i in base.mtp_layers(h):
        yield from base.mtp_block(h, i, _layer(h, arch, full=True))
    yield from base.head(h)


def _layer(h: HParams, arch: str, full: bool) -> Iterator[Entry]:
    yield "attn_norm.weight", (h.n_embd,)
    if not full:
        yield from _linear_attention(h, arch)
    if h.is_moe:
        yield from base.experts(h)
        yield from base.router(h)
        yield from base.shared_expert(h)
        yield "ffn_gate_inp_shexp.weight", (h.n_embd, 1)
    else:
        yield from base.dense_ffn(h)
    yield "post_attention_norm.weight", (h.n_embd,)
    if full:
        yield from base.attention(h, q_factor=2)


def _linear_attention(h: HParams, arch: str) -> Iterator[Entry]:
    e, n_v = h.n_embd, h.ssm_dt_rank
    key, value = h.ssm_d_state * h.ssm_n_group, h.ssm_d_state * h.ssm_dt_rank
    yield "ssm_a", (n_v,)
    yield "ssm_conv1d.weight", (h.ssm_d_conv, 2 * key + value)
    yield "ssm_dt.bias", (n_v,)
    if arch == "qwen3next":
        yield "ssm_ba.weight", (e, 2 * n_v)
    else:
        yield "ssm_alpha.weight", (e, n_v)
        yield "ssm_beta.weight", (e, n_v)
    yield "attn_qkv.weight", (e, 2 * key + value)
    yield "attn_gate.weight", (e, value)
    yield "ssm_norm.weight", (h.ssm_d_state,)
    yield "ssm_out.weight", (value, e)
