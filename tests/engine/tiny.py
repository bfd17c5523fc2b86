"""Tiny random llama models with a byte tokenizer: real to the engine, made in milliseconds."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

WIDTH, FF, LAYERS, HEADS, KV_HEADS = 256, 512, 2, 4, 2


def _byte_tokens() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {b: chr(b) for b in plain}
    extra = 0
    for b in range(256):
        if b not in table:
            table[b] = chr(256 + extra)
            extra += 1
    return [table[b] for b in range(256)]


def write_tiny(
    path: Path,
    *,
    seed: int = 0,
    tied: bool = True,
    experts: int = 0,
    name: str = "tiny",
    add_bos: bool = False,
    nan: bool = False,
    four_bits: bool = False,
    dtype: type[np.floating] = np.float16,
) -> Path:
    """Write a random llama model; with `experts` the FFN is a mixture using two of them.

    With `four_bits` the experts' weights are multiples, up to 7, of one scale per 32 weights.
    """
    rng = np.random.default_rng(seed)
    letters = _byte_tokens()
    # One merge, of bytes 0 and 1, which no text holds: every byte is a token of its own.
    tokens = [*letters, "<|end|>", letters[0] + letters[1]]
    w = gguf.GGUFWriter(path, "llama")
    w.add_name(name)
    w.add_context_length(2048)
    w.add_embedding_length(WIDTH)
    w.add_block_count(LAYERS)
    w.add_feed_forward_length(FF)
    w.add_head_count(HEADS)
    w.add_head_count_kv(KV_HEADS)
    w.add_layer_norm_rms_eps(1e-5)
    w.add_rope_dimension_count(WIDTH // HEADS)
    w.add_vocab_size(len(tokens))
    w.add_file_type(1 if dtype is np.float16 else 0)
    if experts:
        w.add_expert_count(experts)
        w.add_expert_used_count(2)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("smollm")
    w.add_token_list(tokens)
    w.add_token_types([1] * 256 + [3, 1])
    w.add_token_merges([f"{letters[0]} {letters[1]}"])
    w.add_bos_token_id(256)
    w.add_eos_token_id(256)
    w.add_add_bos_token(add_bos)

    def matrix(tensor: str, *shape: int, scale: float = 1.0) -> None:
        data = rng.standard_normal(shape).astype(np.float32) * scale / np.sqrt(shape[-1])
        if nan and tensor == "blk.1.ffn_up.weight":
            data[0, 0] = np.nan
        if four_bits and "_exps" in tensor:
            groups = data.reshape(-1, 32)
            scale32 = np.abs(groups).max(axis=1, keepdims=True).astype(np.float16) / np.float32(7)
            scale32 = scale32.astype(np.float16).astype(np.float32)
            data = (np.clip(np.rint(groups / scale32), -7, 7) * scale32).reshape(shape)
        w.add_tensor(tensor, data.astype(dtype))

    def norm(tensor: str) -> None:
        w.add_tensor(tensor, (1 + 0.1 * rng.standard_normal(WIDTH)).astype(np.float32))

    matrix("token_embd.weight", len(tokens), WIDTH)
    if not tied:
        matrix("output.weight", len(tokens), WIDTH, scale=2.0)
    norm("output_norm.weight")
    kv = WIDTH * KV_HEADS // HEADS
    for i in range(LAYERS):
        norm(f"blk.{i}.attn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", WIDTH, WIDTH)
        matrix(f"blk.{i}.attn_k.weight", kv, WIDTH)
        matrix(f"blk.{i}.attn_v.weight", kv, WIDTH)
        matrix(f"blk.{i}.attn_output.weight", WIDTH, WIDTH)
        norm(f"blk.{i}.ffn_norm.weight")
        if experts:
            w.add_tensor(
                f"blk.{i}.ffn_gate_inp.weight",
                rng.standard_normal((experts, WIDTH)).astype(np.float32),
            )
            matrix(f"blk.{i}.ffn_gate_exps.weight", experts, FF, WIDTH)
            matrix(f"blk.{i}.ffn_up_exps.weight", experts, FF, WIDTH)
            matrix(f"blk.{i}.ffn_down_exps.weight", experts, WIDTH, FF)
        else:
            matrix(f"blk.{i}.ffn_gate.weight", FF, WIDTH)
            matrix(f"blk.{i}.ffn_up.weight", FF, WIDTH)
            matrix(f"blk.{i}.ffn_down.weight", WIDTH, FF)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return path
