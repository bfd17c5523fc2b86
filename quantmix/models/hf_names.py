"""Names of Hugging Face checkpoints, translated to GGUF by convention.

Only what most architectures share; the rest keeps its name. Conventions: gguf-py
tensor_mapping.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from quantmix.models.model import HParams
from quantmix.models.safetensors import Shape

_LAYER: Final = re.compile(
    r"^(?:model\.|transformer\.|language_model\.|text_model\.)*(?:layers|h|blocks)\.(\d+)\.(.+)$"
)
_EXPERT: Final = re.compile(r"^(?:.*\.)?experts\.(\d+)\.(.+)$")
# What is not part of a text model's GGUF: vision and audio towers, quantization scales, buffers.
_LEFT_OUT: Final = re.compile(
    r"(^|\.)(visual|vision_tower|vision_model|audio_tower|multi_modal_projector|mm_projector|mtp)\."
    r"|(_scale|_scale_inv|_scales|weight_shape|rotary_emb\.inv_freq|input_scale)$"
)
_PACKED: Final = re.compile(r"(weight_packed|qweight|_blocks|weight\.absmax)$")

_GLOBAL: Final = {
    "embed_tokens.weight": "token_embd.weight",
    "wte.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "ln_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
_IN_LAYER: Final = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "mlp.router": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "mlp.gate.e_score_correction_bias": "exp_probs_b.bias",
    "mlp.shared_expert.gate_proj": "ffn_gate_shexp",
    "mlp.shared_expert.up_proj": "ffn_up_shexp",
    "mlp.shared_expert.down_proj": "ffn_down_shexp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
_EXPERT_PARTS: Final = {
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
    "w1": "ffn_gate_exps",
    "w3": "ffn_up_exps",
    "w2": "ffn_down_exps",
}


def is_packed(name: str) -> bool:
    """Whether a stored tensor holds several weights per number."""
    return _PACKED.search(name) is not None


def in_text_gguf(name: str, h: HParams) -> bool:
    """Whether a stored tensor ends up in the text model's GGUF."""
    if _LEFT_OUT.search(name):
        return False
    if name.endswith("lm_head.weight") and not h.output_in_gguf:
        return False
    match = _LAYER.match(name)
    return match is None or h.nextn_in_gguf or int(match.group(1)) < h.n_layer


def translate(
    stored: Mapping[str, tuple[str, Shape]],
) -> tuple[list[tuple[str, Shape]], int, list[str]]:
    """Translate (HF order) names and shapes to GGUF entries (ggml order), experts merged.

    Returns:
        Entries (embedding, blocks by number, then the rest), how many tensors were left out, and
        the names that no convention covers.
    """
    entries: dict[str, Shape] = {}
    experts: dict[str, tuple[Shape, int]] = {}
    dropped, kept_names = 0, []
    for name, (_, shape) in stored.items():
        if _LEFT_OUT.search(name):
            dropped += 1
            continue
        new, expert = _translate(name)
        ggml = tuple(reversed(shape)) or (1,)
        if expert:
            seen = experts.get(new, (ggml, 0))
            experts[new] = (seen[0], seen[1] + 1)
            continue
        if new == name:
            kept_names.append(name)
        entries[new] = ggml
    entries |= {n: (*shape, count) for n, (shape, count) in experts.items()}
    return sorted(entries.items(), key=lambda e: _place(e[0])), dropped, kept_names


def _translate(name: str) -> tuple[str, bool]:
    """Return the GGUF name, and whether the tensor is one expert of several."""
    match = _LAYER.match(name)
    if match is None:
        short = re.sub(r"^(model\.|transformer\.|language_model\.|text_model\.)+", "", name)
        return _GLOBAL.get(short, name), False
    layer, rest = match.groups()
    expert = _EXPERT.match(rest)
    if expert:
        part, _, suffix = expert.group(2).rpartition(".")
        return f"blk.{layer}.{_EXPERT_PARTS.get(part, part + '_exps')}.{suffix}", True
    if rest in _IN_LAYER:
        return f"blk.{layer}.{_IN_LAYER[rest]}", False
    part, _, suffix = rest.rpartition(".")
    if part in _IN_LAYER:
        return f"blk.{layer}.{_IN_LAYER[part]}.{suffix}", False
    return f"blk.{layer}.{rest}", False


def _place(name: str) -> tuple[int, int, str]:
    """Embedding, blocks by number, the rest."""
    parts = name.split(".")
    if parts[0] == "blk" and parts[1].isdecimal():
        return 1, int(parts[1]), name
    return (0 if name == "token_embd.weight" else 2), 0, name
