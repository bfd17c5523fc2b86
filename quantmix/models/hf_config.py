"""Hyper-parameters from a Hugging Face `config.json`, one reader per family of `model_type`.

Sources: the configs published with the models of the catalog, the defaults of transformers'
configuration classes (5.23.0) for keys they leave out, and what llama.cpp's converter makes of them
(conversion/*.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from quantmix.errors import BadFile
from quantmix.models.model import MAX_LAYERS, HParams

# Multi-token-prediction blocks that mainline's converter keeps in the file by default; it drops
# those of DeepSeek V3/R1 and Kimi, and published files of the Qwen hybrids leave theirs out.
_MTP_IN_FILE: Final = frozenset({"glm4moe", "glm-dsa", "deepseek32"})


class Config:
    """The text part of a config, with checked kinds."""

    def __init__(self, raw: Mapping[str, Any], where: str) -> None:
        inner = raw.get("text_config")
        self.where = where
        self.raw: dict[str, Any] = {**raw, **inner} if isinstance(inner, dict) else dict(raw)
        self.model_type = str(raw.get("model_type", ""))

    def count(self, *keys: str, default: int | None = None) -> int:
        """The first of `keys` that is there, a count; null and absent give the default.

        Raises:
            BadFile: none is there and there is no default, or it is not a count.
        """
        for key in keys:
            value = self.raw.get(key)
            if value is None:
                continue
            if type(value) is not int or not 0 <= value < 1 << 31:
                raise BadFile(f"{self.where}: {key} is {value!r}, not a count")
            return value
        if default is None:
            raise BadFile(f"{self.where}: {keys[0]} is missing")
        return default

    def flag(self, key: str, default: bool = False) -> bool:
        """A yes or no."""
        value = self.raw.get(key)
        return default if value is None else bool(value)

    def text(self, key: str) -> str:
        """A word, empty when absent."""
        value = self.raw.get(key)
        return value if isinstance(value, str) else ""

    def ratio(self, key: str, default: float) -> float:
        """A share between 0 and 1, here or under `rope_parameters`."""
        inner = self.raw.get("rope_parameters")
        value = self.raw.get(key)
        if value is None and isinstance(inner, dict):
            value = inner.get(key)
        return float(value) if isinstance(value, int | float) and 0 < value <= 1 else default

    def llama3_rope(self) -> bool:
        """Whether RoPE frequencies are scaled as in Llama 3.1, which stores rope_freqs.weight."""
        for key in ("rope_scaling", "rope_parameters"):
            inner = self.raw.get(key)
            if isinstance(inner, dict):
                kind = inner.get("rope_type") or inner.get("type")
                if kind == "llama3":
                    return True
        return False


Reader = Callable[[Config], dict[str, Any]]


def _common(c: Config) -> dict[str, Any]:
    heads = c.count("num_attention_heads")
    embd = c.count("hidden_size")
    if not heads or not embd:
        raise BadFile(f"{c.where}: hidden_size and num_attention_heads must be above zero")
    dim = c.count("head_dim", default=embd // heads)
    return {
        "n_layer": c.count("num_hidden_layers"),
        "n_embd": embd,
        "n_vocab": c.count("vocab_size"),
        "n_head": heads,
        "n_head_kv": c.count("num_key_value_heads", default=heads),
        "head_dim_k": dim,
        "head_dim_v": dim,
        "rope_dim": dim,
        "n_ff": c.count("intermediate_size", default=0),
        "ctx_train": c.count("max_position_embeddings", default=0),
        "tied_embeddings": c.flag("tie_word_embeddings"),
        "qkv_bias": c.flag("attention_bias"),
    }


def _llama(c: Config) -> dict[str, Any]:
    return _common(c) | {"rope_freqs": c.llama3_rope()}


def _mixtral(c: Config) -> dict[str, Any]:
    out = _common(c)
    return out | {
        "n_ff_exp": out["n_ff"],
        "n_expert": c.count("num_local_experts"),
        "n_expert_used": c.count("num_experts_per_tok"),
    }


def _llama4(c: Config) -> dict[str, Any]:
    ff = c.count("intermediate_size")
    return _common(c) | {
        "rope_freqs": c.llama3_rope(),
        "n_ff": c.count("intermediate_size_mlp"),
        "n_ff_exp": ff,
        "n_ff_shexp": ff,
        "n_expert": c.count("num_local_experts"),
        "n_expert_used": c.count("num_experts_per_tok"),
        "n_expert_shared": 1,
        "moe_layer_step": c.count("interleave_moe_layer_step", default=1),
        "sliding_window": c.count("attention_chunk_size", default=8192),
        "swa_pattern": "chunked: 3 of 4 layers (every 4th full/NoPE)",
    }


def _qwen2(c: Config) -> dict[str, Any]:
    return _common(c) | {"qkv_bias": True}


def _qwen3(c: Config) -> dict[str, Any]:
    return _common(c) | {"qk_norm": "head"}


def _qwen3_moe(c: Config) -> dict[str, Any]:
    return _qwen3(c) | {
        "n_ff_exp": c.count("moe_intermediate_size"),
        "n_expert": c.count("num_experts"),
        "n_expert_used": c.count("num_experts_per_tok"),
    }


def _hybrid(c: Config) -> dict[str, Any]:
    out = _qwen3(c)
    out |= {
        "rope_dim": round(out["head_dim_k"] * c.ratio("partial_rotary_factor", 0.25)),
        "full_attn_interval": c.count("full_attention_interval", default=4),
        "ssm_d_conv": c.count("linear_conv_kernel_dim"),
        "ssm_d_state": c.count("linear_key_head_dim"),
        "ssm_n_group": c.count("linear_num_key_heads"),
        "ssm_dt_rank": c.count("linear_num_value_heads"),
        "nextn_layers": c.count("mtp_num_hidden_layers", default=0),
    }
    if out["full_attn_interval"] == 0:
        raise BadFile(f"{c.where}: full_attention_interval is 0")
    if c.count("num_experts", default=0):
        shared = c.count("shared_expert_intermediate_size", default=0)
        out |= {
            "n_ff_exp": c.count("moe_intermediate_size"),
            "n_ff_shexp": shared,
            "n_expert": c.count("num_experts"),
            "n_expert_used": c.count("num_experts_per_tok"),
            "n_expert_shared": 1 if shared else 0,
        }
    return out


def _routed(c: Config) -> dict[str, Any]:
    """Experts as DeepSeek and GLM name them."""
    each, shared = c.count("moe_intermediate_size"), c.count("n_shared_experts", default=0)
    return {
        "n_dense_lead": c.count("first_k_dense_replace", default=0),
        "n_ff_exp": each,
        "n_ff_shexp": each * shared,
        "n_expert": c.count("n_routed_experts"),
        "n_expert_used": c.count("num_experts_per_tok"),
        "n_expert_shared": shared,
        "nextn_layers": c.count("num_nextn_predict_layers", default=0),
    }


def _mla(c: Config) -> dict[str, Any]:
    rope = c.count("qk_rope_head_dim")
    old = c.model_type == "deepseek_v2" and c.text("topk_method") != "noaux_tc"
    out = _common(c) | _routed(c)
    out |= {
        "qkv_bias": False,
        "n_head_kv": out["n_head"],
        "head_dim_k": c.count("qk_nope_head_dim") + rope,
        "head_dim_v": c.count("v_head_dim"),
        "rope_dim": rope,
        "q_lora_rank": c.count("q_lora_rank", default=0),
        "kv_lora_rank": c.count("kv_lora_rank"),
        "exp_probs_b": not old,
    }
    return out


def _indexed(c: Config) -> dict[str, Any]:
    """MLA with a sparse-attention indexer (GLM-5, DeepSeek V3.2)."""
    heads = 64 if c.model_type == "deepseek_v32" else 32
    types = c.raw.get("indexer_types")
    out = _mla(c)
    layers = "all"
    if isinstance(types, list) and types:
        full = [i for i, kind in enumerate(types) if kind in ("full", 1, True)]
        full += range(out["n_layer"], out["n_layer"] + out["nextn_layers"])
        layers = ",".join(map(str, full))
    return out | {
        "indexer_n_head": c.count("index_n_heads", default=heads),
        "indexer_head_dim": c.count("index_head_dim", default=128),
        "indexer_top_k": c.count("index_topk", default=2048),
        "indexer_layers": layers,
        "indexer_proj_f32": True,
    }


def _glm4_moe(c: Config) -> dict[str, Any]:
    out = _common(c) | _routed(c)
    return out | {
        "rope_dim": round(out["head_dim_k"] * c.ratio("partial_rotary_factor", 0.5)),
        "qkv_bias": c.flag("attention_bias", default=True),
        "qk_norm": "head" if c.flag("use_qk_norm") else "",
        "exp_probs_b": True,
    }


def _minimax(c: Config) -> dict[str, Any]:
    out = _common(c)
    return out | {
        "rope_dim": c.count("rotary_dim", default=out["head_dim_k"]),
        "n_ff_exp": out["n_ff"],
        "n_expert": c.count("num_local_experts"),
        "n_expert_used": c.count("num_experts_per_tok"),
        "qk_norm": "full" if c.flag("use_qk_norm", default=True) else "",
        "exp_probs_b": c.flag("use_routing_bias", default=True),
        "nextn_layers": c.count("num_mtp_modules", default=0),
    }


def _gpt_oss(c: Config) -> dict[str, Any]:
    out = _common(c)
    return out | {
        "n_ff_exp": out["n_ff"],
        "n_expert": c.count("num_local_experts"),
        "n_expert_used": c.count("num_experts_per_tok", "experts_per_token"),
        "qkv_bias": True,
        "attn_sinks": True,
        "sliding_window": c.count("sliding_window", default=128),
        "swa_pattern": "alternate: even layers SWA",
    }


_GEMMA_SWA: Final = "5 SWA : 1 full (layer i full when (i+1)%6==0)"


def _gemma3(c: Config) -> dict[str, Any]:
    # Gemma3TextConfig's defaults; the published configs leave out what equals them.
    for key, value in (
        ("num_attention_heads", 8),
        ("num_key_value_heads", 4),
        ("head_dim", 256),
        ("vocab_size", 262208),
        ("max_position_embeddings", 131072),
        ("tie_word_embeddings", True),
    ):
        c.raw.setdefault(key, value)
    return _common(c) | {
        "qk_norm": "head",
        "sliding_window": c.count("sliding_window", default=4096),
        "swa_pattern": _GEMMA_SWA,
    }


def _gemma4(c: Config) -> dict[str, Any]:
    if c.flag("enable_moe_block") or c.count("hidden_size_per_layer_input", default=0):
        raise BadFile(f"{c.where}: only the dense Gemma 4 without per-layer inputs is known")
    c.raw.setdefault("tie_word_embeddings", True)
    out, full = _common(c), c.count("global_head_dim", default=512)
    return out | {
        "head_dim_swa": out["head_dim_k"],
        "head_dim_k": full,
        "head_dim_v": full,
        "rope_dim": full,
        "n_head_kv_full": c.count("num_global_key_value_heads", default=out["n_head_kv"]),
        "rope_freqs": True,
        "qk_norm": "head",
        "qkv_bias": False,
        "sliding_window": c.count("sliding_window", default=1024),
        "swa_pattern": _GEMMA_SWA,
    }


_READERS: Final[dict[str, tuple[str, Reader]]] = {
    "llama": ("llama", _llama),
    "mistral": ("llama", _llama),
    "mixtral": ("llama", _mixtral),
    "llama4": ("llama4", _llama4),
    "qwen2": ("qwen2", _qwen2),
    "qwen3": ("qwen3", _qwen3),
    "qwen3_moe": ("qwen3moe", _qwen3_moe),
    "qwen3_vl": ("qwen3vl", _qwen3),
    "qwen3_vl_moe": ("qwen3vlmoe", _qwen3_moe),
    "qwen3_next": ("qwen3next", _hybrid),
    "qwen3_5": ("qwen35", _hybrid),
    "qwen3_5_moe": ("qwen35moe", _hybrid),
    "deepseek_v2": ("deepseek2", _mla),
    "deepseek_v3": ("deepseek2", _mla),
    "kimi_k2": ("deepseek2", _mla),
    "kimi_k25": ("deepseek2", _mla),
    "glm4_moe_lite": ("deepseek2", _mla),
    "deepseek_v32": ("deepseek32", _indexed),
    "glm_moe_dsa": ("glm-dsa", _indexed),
    "glm4_moe": ("glm4moe", _glm4_moe),
    "minimax": ("minimax-m2", _minimax),
    "minimax_m2": ("minimax-m2", _minimax),
    "gpt_oss": ("gpt-oss", _gpt_oss),
    "gemma3": ("gemma3", _gemma3),
    "gemma4": ("gemma4", _gemma4),
}


def architecture_of(config: Config) -> str | None:
    """Return the GGUF architecture of a config, None when no reader knows its `model_type`."""
    found = _READERS.get(_base_type(config))
    return found[0] if found else None


def read_config(config: Config) -> HParams:
    """Return the hyper-parameters of a config of a known family.

    Which optional tensors the checkpoint holds (a head although tied, MTP embeddings) is not in a
    config: `output_in_gguf` follows the tie, MTP blocks get the final norm only.

    Raises:
        BadFile: a key is missing or is not what it must be.
    """
    arch, reader = _READERS[_base_type(config)]
    values = reader(config)
    if not 0 < values["n_layer"] + values.get("nextn_layers", 0) <= MAX_LAYERS:
        raise BadFile(f"{config.where}: num_hidden_layers must be from 1 to {MAX_LAYERS}")
    if not values["n_layer"] or not values["n_vocab"]:
        raise BadFile(f"{config.where}: num_hidden_layers and vocab_size must be above zero")
    in_file = arch in _MTP_IN_FILE and values.get("nextn_layers", 0) > 0
    whole_mtp = arch == "deepseek32" and in_file
    return HParams(
        **values,
        output_in_gguf=not values["tied_embeddings"],
        nextn_in_gguf=in_file,
        nextn_norm=in_file,
        nextn_embed=whole_mtp,
        nextn_head=whole_mtp,
    )


def _base_type(config: Config) -> str:
    """`gemma3_text` and the like name the text part of `gemma3`."""
    return config.model_type.removesuffix("_text")
