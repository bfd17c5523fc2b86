"""A llama forward pass in numpy, float64: what the engine's numbers are held against."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiny
from numpy.typing import NDArray

from quantmix.ggml.weights import open_weights

Array = NDArray[np.float64]


def load(path: Path) -> dict[str, Array]:
    """Return all tensors of an f32/f16 GGUF as float64, numpy order."""
    weights = open_weights(path)
    kinds = {"f32": np.float32, "f16": np.float16}
    return {
        name: np.frombuffer(weights.read(name), kinds[info.type.name])
        .reshape(tuple(reversed(info.shape)))
        .astype(np.float64)
        for name, (info, _, _) in weights.tensors.items()
    }


@dataclass
class Reference:
    """Forward pass of a tiny model; `inputs` keeps what flowed into each matrix."""

    weights: dict[str, Array]
    inputs: dict[str, list[Array]] = field(default_factory=dict)

    def matmul(self, name: str, x: Array) -> Array:
        self.inputs.setdefault(name, []).append(x)
        return x @ self.weights[name].T

    def logits(self, tokens: NDArray[np.int32]) -> Array:
        """Return logits [n, n_vocab] of one sequence [n]."""
        w = self.weights
        x = w["token_embd.weight"][tokens]
        for i in range(tiny.LAYERS):
            x = x + self._attention(i, _norm(x, w[f"blk.{i}.attn_norm.weight"]))
            h = _norm(x, w[f"blk.{i}.ffn_norm.weight"])
            gate = self.matmul(f"blk.{i}.ffn_gate.weight", h)
            up = self.matmul(f"blk.{i}.ffn_up.weight", h)
            x = x + self.matmul(f"blk.{i}.ffn_down.weight", gate / (1 + np.exp(-gate)) * up)
        head = "output.weight" if "output.weight" in w else "token_embd.weight"
        return self.matmul(head, _norm(x, w["output_norm.weight"]))

    def _attention(self, i: int, h: Array) -> Array:
        n, size = len(h), tiny.WIDTH // tiny.HEADS
        q = self.matmul(f"blk.{i}.attn_q.weight", h).reshape(n, tiny.HEADS, size)
        k = self.matmul(f"blk.{i}.attn_k.weight", h).reshape(n, tiny.KV_HEADS, size)
        v = self.matmul(f"blk.{i}.attn_v.weight", h).reshape(n, tiny.KV_HEADS, size)
        q, k = _rope(q), _rope(k)
        share = tiny.HEADS // tiny.KV_HEADS
        out = np.empty((n, tiny.HEADS, size))
        mask = np.triu(np.full((n, n), -np.inf), 1)
        for head in range(tiny.HEADS):
            weights = q[:, head] @ k[:, head // share].T / np.sqrt(size) + mask
            weights = np.exp(weights - weights.max(axis=1, keepdims=True))
            out[:, head] = weights / weights.sum(axis=1, keepdims=True) @ v[:, head // share]
        return self.matmul(f"blk.{i}.attn_output.weight", out.reshape(n, -1))


def _norm(x: Array, weight: Array) -> Array:
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + 1e-5) * weight


def _rope(x: Array) -> Array:
    """Rotate neighbouring pairs, base 10000 (rope type NORM)."""
    n, _, size = x.shape
    angle = np.arange(n)[:, None] * 10000.0 ** (-np.arange(0, size, 2) / size)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    even, odd = x[..., ::2], x[..., 1::2]
    out = np.empty_like(x)
    out[..., ::2], out[..., 1::2] = even * cos - odd * sin, even * sin + odd * cos
    return out
