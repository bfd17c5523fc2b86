"""GGUF metadata of a model made from its hyper-parameters: what both engines' loaders ask for.

Only what shapes tensors, caches and buffers is true. Constants that only matter to the numbers a
model computes (RMS epsilon, RoPE base, expert scale) are placeholders: a ghost has no weights.
Keys: llama.cpp src/llama-arch.cpp; who asks for what: load_arch_hparams in llama.cpp src/models/*
and llm_load_hparams in ik_llama.cpp src/llama-hparams.cpp.
"""

from __future__ import annotations

from typing import Any, Final

from quantmix.models.arch import base, gemma, hybrid, mla
from quantmix.models.model import HParams, Model

_FILE_TYPE_BF16: Final = 32  # llama.h LLAMA_FTYPE_MOSTLY_BF16
_GATING_SOFTMAX: Final = 1
_GATING_SIGMOID: Final = 2
_RMS_EPS: Final = 1e-6
_ROPE_BASE: Final = 10000.0
# Interleaved M-RoPE of Qwen3-VL and Qwen3.5: (t, h, w, -) shares of half the rotary dimensions.
_MROPE: Final = {"qwen3vl": (24, 20, 20, 0), "qwen3vlmoe": (24, 20, 20, 0)}
_MROPE_HYBRID: Final = (11, 11, 10, 0)


def gguf_metadata(model: Model) -> dict[str, Any]:
    """Return the metadata of a ghost of `model`, without a vocabulary (`no_vocab`)."""
    h, arch = model.hparams, model.arch
    own = {
        **_common(h),
        **(_mla(h, model.layout) if h.is_mla else _heads(h, arch)),
        **_experts(h),
        **_by_family(h, arch),
    }
    return {
        "general.architecture": arch,
        "general.name": model.display or model.id,
        "general.file_type": _FILE_TYPE_BF16,
        "general.quantization_version": 2,
        **{f"{arch}.{key}": value for key, value in own.items()},
        "tokenizer.ggml.model": "no_vocab",
    }


def _common(h: HParams) -> dict[str, Any]:
    out: dict[str, Any] = {
        "block_count": base.mtp_layers(h).stop,
        "context_length": h.ctx_train or 4096,
        "embedding_length": h.n_embd,
        "feed_forward_length": h.n_ff,
        "vocab_size": h.n_vocab,
        "attention.layer_norm_rms_epsilon": _RMS_EPS,
        "rope.dimension_count": h.rope_dim or h.head_dim_k,
        "rope.freq_base": _ROPE_BASE,
    }
    if h.nextn_in_gguf and h.nextn_layers:
        out["nextn_predict_layers"] = h.nextn_layers
    if h.sliding_window:
        out["attention.sliding_window"] = h.sliding_window
    return out


def _heads(h: HParams, arch: str) -> dict[str, Any]:
    out: dict[str, Any] = {
        "attention.head_count": h.n_head,
        "attention.head_count_kv": h.n_head_kv,
        "attention.key_length": h.head_dim_k,
        "attention.value_length": h.head_dim_v,
    }
    if arch == "gemma4":
        full = [(i + 1) % gemma.FULL_EVERY == 0 for i in range(h.n_layer)]
        out["attention.head_count_kv"] = [h.n_head_kv_full if f else h.n_head_kv for f in full]
        out["attention.sliding_window_pattern"] = [not f for f in full]
        out["attention.key_length_swa"] = h.head_dim_swa
        out["attention.value_length_swa"] = h.head_dim_swa
        out["rope.dimension_count_swa"] = h.head_dim_swa
        out["embedding_length_per_layer_input"] = 0
    return out


def _mla(h: HParams, layout: str) -> dict[str, Any]:
    """The split layout describes one shared latent head; older ones the decompressed heads."""
    split = layout == "split"
    out: dict[str, Any] = {
        "attention.head_count": h.n_head,
        "attention.head_count_kv": 1 if split else h.n_head,
        "attention.key_length": h.kv_lora_rank + h.rope_dim if split else h.head_dim_k,
        "attention.value_length": h.kv_lora_rank if split else h.head_dim_v,
        "attention.kv_lora_rank": h.kv_lora_rank,
    }
    if split:
        out["attention.key_length_mla"] = h.head_dim_k
        out["attention.value_length_mla"] = h.head_dim_v
    if h.q_lora_rank:
        out["attention.q_lora_rank"] = h.q_lora_rank
    if h.indexer_n_head:
        layers = mla.indexer_layers(h)
        out["attention.indexer.head_count"] = h.indexer_n_head
        out["attention.indexer.key_length"] = h.indexer_head_dim
        out["attention.indexer.top_k"] = h.indexer_top_k
        out["attention.indexer.types"] = [i in layers for i in range(h.n_layer)]
    return out


def _experts(h: HParams) -> dict[str, Any]:
    if not h.is_moe:
        return {}
    out: dict[str, Any] = {
        "expert_count": h.n_expert,
        "expert_used_count": h.n_expert_used,
        "expert_feed_forward_length": h.n_ff_exp,
        "expert_weights_scale": 1.0,
        "expert_weights_norm": True,
        "expert_gating_func": _GATING_SIGMOID if h.exp_probs_b else _GATING_SOFTMAX,
        "leading_dense_block_count": h.n_dense_lead,
    }
    if h.n_expert_shared:
        out["expert_shared_count"] = h.n_expert_shared
    if h.n_ff_shexp:
        out["expert_shared_feed_forward_length"] = h.n_ff_shexp
    return out


def _by_family(h: HParams, arch: str) -> dict[str, Any]:
    if arch == "llama4":
        return {"interleave_moe_layer_step": h.moe_layer_step}
    if arch in _MROPE:
        return {"rope.dimension_sections": _MROPE[arch], "n_deepstack_layers": 3}
    if arch in hybrid.ARCHS:
        return {
            "full_attention_interval": h.full_attn_interval,
            "ssm.conv_kernel": h.ssm_d_conv,
            "ssm.inner_size": h.ssm_d_state * h.ssm_dt_rank,
            "ssm.state_size": h.ssm_d_state,
            "ssm.time_step_rank": h.ssm_dt_rank,
            "ssm.group_count": h.ssm_n_group,
            "rope.dimension_sections": _MROPE_HYBRID,
        }
    return {}
