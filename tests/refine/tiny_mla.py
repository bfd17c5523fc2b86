"""A tiny random model with multi-head latent attention, in the split layout."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent / "engine"))

from tiny import _byte_tokens

WIDTH, FF, LAYERS, HEADS = 256, 512, 2, 4
RANK, NOPE, ROPE, Q_RANK = 512, 128, 64, 64  # ik knows MLA by 512 + 64


def write_mla(path: Path) -> Path:
    """Write a dense deepseek2 model with attn_k_b and attn_v_b, without attn_kv_b."""
    rng = np.random.default_rng(0)
    letters = _byte_tokens()
    tokens = [*letters, "<|end|>", letters[0] + letters[1]]
    w = gguf.GGUFWriter(path, "deepseek2")
    w.add_name("mla")
    w.add_context_length(2048)
    w.add_embedding_length(WIDTH)
    w.add_block_count(LAYERS)
    w.add_leading_dense_block_count(LAYERS)
    w.add_feed_forward_length(FF)
    w.add_head_count(HEADS)
    w.add_head_count_kv(1)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(ROPE)
    w.add_q_lora_rank(Q_RANK)
    w.add_kv_lora_rank(RANK)
    w.add_key_length(RANK + ROPE)
    w.add_value_length(RANK)
    w.add_key_length_mla(NOPE + ROPE)
    w.add_value_length_mla(NOPE)
    w.add_expert_count(4)
    w.add_expert_used_count(2)
    w.add_expert_feed_forward_length(64)
    w.add_expert_shared_count(1)
    w.add_expert_weights_scale(1.0)
    w.add_vocab_size(len(tokens))
    w.add_file_type(1)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens)
    w.add_token_types([1] * 256 + [3, 1])
    w.add_token_merges([f"{letters[0]} {letters[1]}"])
    w.add_bos_token_id(256)
    w.add_eos_token_id(256)
    w.add_add_bos_token(False)

    def matrix(name: str, *shape: int) -> None:
        data = rng.standard_normal(shape) / np.sqrt(shape[-1])
        w.add_tensor(f"{name}.weight", data.astype(np.float16))

    def norm(name: str, n: int) -> None:
        w.add_tensor(f"{name}.weight", (1 + 0.1 * rng.standard_normal(n)).astype(np.float32))

    matrix("token_embd", len(tokens), WIDTH)
    matrix("output", len(tokens), WIDTH)
    norm("output_norm", WIDTH)
    for i in range(LAYERS):
        block = f"blk.{i}"
        norm(f"{block}.attn_norm", WIDTH)
        norm(f"{block}.attn_q_a_norm", Q_RANK)
        norm(f"{block}.attn_kv_a_norm", RANK)
        norm(f"{block}.ffn_norm", WIDTH)
        matrix(f"{block}.attn_q_a", Q_RANK, WIDTH)
        matrix(f"{block}.attn_q_b", HEADS * (NOPE + ROPE), Q_RANK)
        matrix(f"{block}.attn_kv_a_mqa", RANK + ROPE, WIDTH)
        matrix(f"{block}.attn_k_b", HEADS, RANK, NOPE)
        matrix(f"{block}.attn_v_b", HEADS, NOPE, RANK)
        matrix(f"{block}.attn_output", WIDTH, HEADS * NOPE)
        matrix(f"{block}.ffn_gate", FF, WIDTH)
        matrix(f"{block}.ffn_up", FF, WIDTH)
        matrix(f"{block}.ffn_down", WIDTH, FF)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
