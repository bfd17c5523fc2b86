"""What the tensor lists of all architectures share: entries, common parts, dtypes, roles.

A family module yields entries (name, shape) in the order in which the converter meets them in a
Hugging Face checkpoint: embedding, blocks by number, MTP blocks, final norm, head; inside a block
by the checkpoint's names. Real files also interleave blocks by checkpoint shard, which no rule
can know without the shards. Shapes are in ggml order, row length (ne0) first.

Abbreviations used by the family modules, as in the papers and in llama.cpp:
E n_embd, V n_vocab, H n_head, K n_head_kv, dk/dv head sizes, F n_ff, X n_ff_exp, N n_expert,
S n_ff_shexp, R kv_lora_rank, Q q_lora_rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from quantmix.ggml.types import drop_ones
from quantmix.models.model import HParams, Tensor
from quantmix.models.roles import is_quantizable, split_name

Entry = tuple[str, tuple[int, ...]]

# Written as f32 by the converter although they have two dimensions
# (llama.cpp conversion/base.py, the F32 overrides of prepare_tensors).
_F32_PARTS = ("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_inp_shexp.weight", "ssm_conv1d")

# One expert of a file made before experts were merged (llama.cpp, March 2024).
_ONE_EXPERT = re.compile(r"\.ffn_(gate|up|down)\.\d+\.weight$")


def block(i: int, entries: Iterable[Entry]) -> Iterator[Entry]:
    """Prefix the entries of block `i`."""
    for suffix, shape in entries:
        yield f"blk.{i}.{suffix}", shape


def head(h: HParams) -> Iterator[Entry]:
    """Final norm and, when the file stores one, the output matrix."""
    yield "output_norm.weight", (h.n_embd,)
    if h.output_in_gguf:
        yield "output.weight", (h.n_embd, h.n_vocab)


def embedding(h: HParams) -> Iterator[Entry]:
    """Rope frequency factors (generated first by the converter) and the input embedding."""
    if h.rope_freqs:
        yield "rope_freqs.weight", (h.rope_dim // 2,)
    yield "token_embd.weight", (h.n_embd, h.n_vocab)


def attention(
    h: HParams, *, head_dim: int = 0, n_kv: int = 0, has_v: bool = True, q_factor: int = 1
) -> Iterator[Entry]:
    """Grouped-query attention, with the biases and q/k norms that the model has.

    `head_dim` and `n_kv` override the model's own for layers that differ (Gemma 4);
    `q_factor` 2 means that q also carries an output gate (Qwen3-Next).
    """
    dk = head_dim or h.head_dim_k
    dv = head_dim or h.head_dim_v
    k = n_kv or h.n_head_kv
    if h.qk_norm:
        yield "attn_k_norm.weight", (dk if h.qk_norm == "head" else k * dk,)
    if h.qkv_bias:
        yield "attn_k.bias", (k * dk,)
    yield "attn_k.weight", (h.n_embd, k * dk)
    yield "attn_output.weight", (h.n_head * dv, h.n_embd)
    if h.qk_norm:
        yield "attn_q_norm.weight", (dk if h.qk_norm == "head" else h.n_head * dk,)
    if h.qkv_bias:
        yield "attn_q.bias", (h.n_head * dk,)
    yield "attn_q.weight", (h.n_embd, q_factor * h.n_head * dk)
    if has_v:
        if h.qkv_bias:
            yield "attn_v.bias", (k * dv,)
        yield "attn_v.weight", (h.n_embd, k * dv)


def dense_ffn(h: HParams) -> Iterator[Entry]:
    """Gated feed-forward."""
    yield "ffn_down.weight", (h.n_ff, h.n_embd)
    yield "ffn_gate.weight", (h.n_embd, h.n_ff)
    yield "ffn_up.weight", (h.n_embd, h.n_ff)


def experts(h: HParams) -> Iterator[Entry]:
    """Routed experts, merged to one 3-D tensor per projection."""
    yield "ffn_down_exps.weight", (h.n_ff_exp, h.n_embd, h.n_expert)
    yield "ffn_gate_exps.weight", (h.n_embd, h.n_ff_exp, h.n_expert)
    yield "ffn_up_exps.weight", (h.n_embd, h.n_ff_exp, h.n_expert)


def router(h: HParams) -> Iterator[Entry]:
    """Expert router, with its selection bias when the model has one."""
    if h.exp_probs_b:
        yield "exp_probs_b.bias", (h.n_expert,)
    yield "ffn_gate_inp.weight", (h.n_embd, h.n_expert)


def shared_expert(h: HParams) -> Iterator[Entry]:
    """The expert that every token uses."""
    if h.n_ff_shexp:
        yield "ffn_down_shexp.weight", (h.n_ff_shexp, h.n_embd)
        yield "ffn_gate_shexp.weight", (h.n_embd, h.n_ff_shexp)
        yield "ffn_up_shexp.weight", (h.n_embd, h.n_ff_shexp)


def is_moe_layer(h: HParams, i: int) -> bool:
    """Whether block `i` has routed experts."""
    return h.is_moe and i >= h.n_dense_lead and (i + 1) % h.moe_layer_step == 0


def moe_or_dense(h: HParams, i: int) -> Iterator[Entry]:
    """The feed-forward part of block `i`."""
    if is_moe_layer(h, i):
        yield from experts(h)
        yield from router(h)
        yield from shared_expert(h)
    else:
        yield from dense_ffn(h)


def mtp_block(h: HParams, i: int, body: Iterable[Entry]) -> Iterator[Entry]:
    """One MTP (NextN) block: its own projections around a full decoder layer."""
    e, v = h.n_embd, h.n_vocab
    parts: list[Entry] = [("nextn.eh_proj.weight", (2 * e, e))]
    if h.nextn_embed:
        parts.append(("nextn.embed_tokens.weight", (e, v)))
    parts += [("nextn.enorm.weight", (e,)), ("nextn.hnorm.weight", (e,)), *body]
    if h.nextn_head:
        parts.append(("nextn.shared_head_head.weight", (e, v)))
    if h.nextn_norm:
        parts.append(("nextn.shared_head_norm.weight", (e,)))
    yield from block(i, parts)


def mtp_layers(h: HParams) -> range:
    """Block numbers of the MTP blocks that the file holds."""
    return range(h.n_layer, h.n_layer + (h.nextn_layers if h.nextn_in_gguf else 0))


def source_type(name: str, shape: tuple[int, ...], h: HParams, mxfp4_experts: bool) -> str:
    """Return the dtype that the converter writes for an unquantized conversion."""
    if len(shape) == 1 or not name.endswith(".weight") or any(p in name for p in _F32_PARTS):
        return "f32"
    if h.indexer_proj_f32 and name.endswith("indexer.proj.weight"):
        return "f32"
    if mxfp4_experts and "_exps." in name:
        return "mxfp4"
    return "bf16"


def active_fraction(name: str, h: HParams, *, has_output: bool, has_k_b: bool) -> float:
    """Share of a tensor's bytes that one generated token reads.

    Routed experts: used / all. Input embedding: a row lookup, unless it is also the head.
    attn_kv_b next to attn_k_b and attn_v_b holds the same weights twice and is read for prompts.
    """
    if h.n_expert and ("_exps." in name or _ONE_EXPERT.search(name)):
        return h.n_expert_used / h.n_expert
    if name == "token_embd.weight" and has_output:
        return 0.0
    if has_k_b and name.endswith(".attn_kv_b.weight"):
        return 0.0
    return 1.0


def as_tensor(
    name: str,
    shape: Iterable[int],
    dtype: str,
    h: HParams,
    *,
    has_output: bool,
    has_k_b: bool = False,
    exact_type: str = "",
) -> Tensor:
    """Build the Tensor: role, layer, active share, whether engines may quantize or load it."""
    dims = drop_ones(shape)
    role, layer = split_name(name)
    loaded = layer is None or layer < h.n_layer
    fraction = active_fraction(name, h, has_output=has_output, has_k_b=has_k_b) if loaded else 0.0
    return Tensor(
        name=name,
        shape=dims,
        source_type=dtype,
        role=role,
        layer=layer,
        active_fraction=fraction,
        quantizable=is_quantizable(name, dims),
        loaded=loaded,
        exact_type=exact_type,
    )
