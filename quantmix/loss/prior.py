"""The prior: how much each tensor matters, before anything about the model was measured.

    share(t) = S[family, role] / n_layer · shape(family, class, depth of t)

for tensors of blocks, S[family, role] outside them, scaled to sum to one over the tensors that
can be quantized. A role found in a quarter of the layers so weighs a quarter. `sensitivity.csv`
holds S and the shapes, fitted by `python -m quantmix.loss.fit` from per-tensor perplexities.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np

from quantmix.loss import shipped
from quantmix.loss.model import FloatArray
from quantmix.models.model import Model, Tensor

CLASSES: Final = ("experts", "ffn", "attention")
# A role that no table knows counts like a small attention matrix.
_UNKNOWN_SHARE: Final = 0.06
# Architecture of the hybrid models that the law of size was fitted on: Qwen3.5 and its successors.
_HYBRID_LINE: Final = "qwen35"
# A sparse-attention indexer chooses among more than its top-k (2048) tokens: on the common bench
# (context 512) it does nothing. Above zero, so that no solver starves it.
_INDEXER_SHARE: Final = 0.01
# ik's MLA files hold k_b and v_b a second time as kv_b; prompts read one copy, generation the
# other, so each counts half.
MLA_COPIES: Final = ("attn_kv_b", "attn_k_b", "attn_v_b")
# Fused or renamed roles that no table measured, as the sum of those that were.
_SUMS: Final = {
    "attn_kv_b": ("attn_k_b", "attn_v_b"),
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
    "ffn_gate_up": ("ffn_gate", "ffn_up"),
    "ssm_ba": ("ssm_alpha", "ssm_beta"),
    "ssm_in": ("attn_qkv", "attn_gate"),
    "nextn.embed_tokens": ("token_embd",),
    "nextn.shared_head_head": ("output",),
}


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """S of a role and the shape of its class over depth."""

    share: float
    slope: float
    bend: float
    first: float
    last: float


@cache
def _table() -> dict[tuple[str, str], Sensitivity]:
    return {
        (r["family"], r["role"]): Sensitivity(
            float(r["share"]),
            float(r["slope"]),
            float(r["bend"]),
            float(r["first"]),
            float(r["last"]),
        )
        for r in shipped.rows("sensitivity.csv")
    }


def role_class(role: str) -> str:
    """Return the class whose shape over depth a role follows."""
    if role.endswith("_exps"):
        return "experts"
    return "ffn" if role.startswith("ffn") else "attention"


def family(model: Model) -> str:
    """Return the sensitivity family: mla, gqa (sparse), dense, hybrid or hybrid_moe."""
    h = model.hparams
    if h.ssm_d_state > 0 or any(t.role.startswith("ssm_") for t in model.tensors):
        return "hybrid_moe" if h.is_moe else "hybrid"
    if h.is_mla:
        return "mla"
    return "gqa" if h.is_moe else "dense"


def scale_law(model: Model) -> str:
    """Return how the damage of a model goes with its size: sparse, hybrid or dense.

    "hybrid" is the law of the one line of models it was fitted on; what else mixes attention and
    recurrence is as uncertain as any dense model.
    """
    if model.hparams.is_moe:
        return "sparse"
    return "hybrid" if family(model) == "hybrid" and model.arch == _HYBRID_LINE else "dense"


def depth_shape(
    u: FloatArray | float, slope: float, bend: float, first: float, last: float
) -> FloatArray:
    """Return exp(slope·u + bend·(u² - 1/3)) · e^first at u = -1 · e^last at u = 1."""
    u = np.asarray(u, dtype=np.float64)
    ends = np.where(u <= -1.0, first, 0.0) + np.where(u >= 1.0, last, 0.0)
    return np.asarray(np.exp(slope * u + bend * (u * u - 1.0 / 3.0) + ends))


def shares(model: Model) -> FloatArray:
    """Return the share of each tensor in the damage of a uniform model, shape (n_tensors,).

    Shares sum to one; they are zero for tensors that cannot be quantized or are not loaded.
    """
    fam = family(model)
    roles = {t.role for t in model.tensors}
    raw = np.array([_raw_share(t, fam, model.hparams.n_layer, roles) for t in model.tensors])
    total = float(raw.sum())
    return raw / total if total > 0.0 else raw


def head_role(model: Model) -> str:
    """Return the role of the tensor that makes the logits: the embedding when it is tied."""
    return "output" if any(t.role == "output" for t in model.tensors) else "token_embd"


def unknown_roles(model: Model) -> tuple[str, ...]:
    """Return the quantizable roles whose sensitivity nobody measured."""
    fam = family(model)
    roles = {t.role for t in model.tensors if t.quantizable and t.loaded}
    return tuple(sorted(r for r in roles if _find(fam, _tied(r, roles)) is None))


def _raw_share(tensor: Tensor, fam: str, n_layer: int, roles: set[str]) -> float:
    if not (tensor.quantizable and tensor.loaded):
        return 0.0
    s = _find(fam, _tied(tensor.role, roles))
    if s is None:
        guess = _INDEXER_SHARE if tensor.role.startswith("indexer.") else _UNKNOWN_SHARE
        s = Sensitivity(guess, 0.0, 0.0, 0.0, 0.0)
    if tensor.layer is None:
        return s.share
    copies = 0.5 if "attn_kv_b" in roles and "attn_k_b" in roles else 1.0
    part = copies if tensor.role in MLA_COPIES else 1.0
    u = 2.0 * tensor.layer / max(1, n_layer - 1) - 1.0
    return (
        part * s.share * float(depth_shape(u, s.slope, s.bend, s.first, s.last)) / max(1, n_layer)
    )


def _tied(role: str, roles: Iterable[str]) -> str:
    return "token_embd_tied" if role == "token_embd" and "output" not in roles else role


@cache
def _find(fam: str, role: str) -> Sensitivity | None:
    known = _table()
    for where in (fam, "any"):
        if (where, role) in known:
            return known[where, role]
    parts = [p for p in (_find(fam, r) for r in _SUMS.get(role, ())) if p is not None]
    if not parts:
        return None
    first = parts[0]
    return Sensitivity(
        sum(p.share for p in parts), first.slope, first.bend, first.first, first.last
    )
