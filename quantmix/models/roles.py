"""What a tensor does, read from its name, and what the engines never quantize."""

from __future__ import annotations

import re
from typing import Final

_BLOCK: Final = re.compile(r"^blk\.(\d+)\.(.+)$")

# Sources: llama.cpp src/llama-quant.cpp tensor_allows_quantization, ik_llama.cpp
# src/llama-quantize.cpp (the `quantize &=` chain), read at the commits named in docs/sources.md.
_KEPT_PARTS: Final = (
    "_norm.weight",
    "ffn_gate_inp",
    "ssm_conv1d",
    "altup",
    "laurel",
    "per_layer_model_proj",
    "pos_embd",
    "position_embd",
    "token_types",
    "attn_rel_b.weight",
    "ssm_x.weight",
    "ssm_dt.weight",
)


def split_name(name: str) -> tuple[str, int | None]:
    """Return (role, layer): `blk.3.ffn_down_exps.weight` → (`ffn_down_exps`, 3)."""
    match = _BLOCK.match(name)
    rest, layer = (match.group(2), int(match.group(1))) if match else (name, None)
    return rest.removesuffix(".weight"), layer


def is_quantizable(name: str, shape: tuple[int, ...]) -> bool:
    """Whether llama-quantize may change the type of this tensor, whatever the rules say."""
    n_dims = sum(1 for n in shape if n > 1)
    return n_dims >= 2 and name.endswith("weight") and not any(p in name for p in _KEPT_PARTS)
