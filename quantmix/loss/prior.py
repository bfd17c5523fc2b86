"""The prior: how much each tensor matters, before anything about the model was measured.

    damage(t, q) = K · share(t) · gain(q)

K is the damage of the whole model at iq4_k, shares sum to one over the quantizable tensors, and
gain is the type curve. Shares come from `sensitivity.csv`: per family and role the share of one
tensor per layer times the number of layers, so that a role found in a quarter of the layers
weighs a quarter; over depth it is U-shaped (research: first and last blocks matter most).
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np

from quantmix.ggml.types import Engine, GgmlType
from quantmix.loss import curve
from quantmix.loss.model import FloatArray
from quantmix.models.model import Model, Tensor
from quantmix.recipe import Quality

_PPL_PER_NAT = 0.9
_LN_SPREAD = 0.45


@dataclass(frozen=True, slots=True)
class Sensitivity:
    """Share of a role (all layers together) and its rise towards both ends of the stack."""

    share: float
    ends: float


@cache
def _table() -> dict[tuple[str, str], Sensitivity]:
    text = (files("quantmix.loss") / "sensitivity.csv").read_text(encoding="utf-8")
    return {
        (r["family"], r["role"]): Sensitivity(float(r["share"]), float(r["ends"]))
        for r in csv.DictReader(text.splitlines())
    }


def family(model: Model) -> str:
    """Return which sensitivity family a model belongs to."""
    h = model.hparams
    hybrid = h.ssm_d_state > 0 or any(t.role.startswith("ssm_") for t in model.tensors)
    if hybrid:
        return "hybrid_moe" if h.is_moe else "hybrid"
    if h.is_mla:
        return "mla"
    return "gqa" if h.is_moe else "dense"


def shares(model: Model) -> FloatArray:
    """Return the share of each tensor in the damage of a uniform model, shape (n_tensors,).

    Shares sum to one; they are zero for tensors that cannot be quantized or are not loaded.
    """
    fam = family(model)
    n_layer = max(1, model.hparams.n_layer)
    roles = {t.role for t in model.tensors}
    raw = np.array([_raw_share(t, fam, n_layer, roles) for t in model.tensors])
    total = float(raw.sum())
    return raw / total if total > 0 else raw


def _raw_share(tensor: Tensor, fam: str, n_layer: int, roles: set[str]) -> float:
    if not (tensor.quantizable and tensor.loaded):
        return 0.0
    role = tensor.role
    if role == "token_embd" and "output" not in roles:
        role = "token_embd_tied"
    s = _lookup(fam, role)
    if tensor.layer is None:
        return s.share
    halved = 0.5 if role in ("attn_kv_b", "attn_k_b", "attn_v_b") and "attn_kv_b" in roles else 1.0
    depth = (tensor.layer + 0.5) / n_layer
    shape = 1.0 + s.ends * (math.exp(-depth * 12.0) + math.exp(-(1.0 - depth) * 12.0))
    return halved * s.share * shape / n_layer


def _lookup(fam: str, role: str) -> Sensitivity:
    known = _table()
    for where in (fam, "gqa", "mla", "hybrid_moe", "hybrid", "dense"):
        found = known.get((where, role))
        if found is not None:
            return found
    return Sensitivity(0.1, 0.2)


def damage_at_iq4_k(model: Model) -> float:
    """Return K, the whole model's damage at iq4_k in nats.

    Large models lose less: dense ones follow about size^-0.35 (0.047 at 0.8 B, 0.010 at 27 B);
    sparse ones lie near 0.018 whatever their size (whole-model tables of the GGUF Tool Suite).
    """
    if model.hparams.is_moe:
        return 0.018
    return 0.012 * math.pow(27e9 / max(model.n_elements, 10**7), 0.35)


@dataclass(frozen=True)
class PriorModel:
    """A loss model that knows nothing of the model but its shape."""

    share: FloatArray
    scale: float
    engine: Engine
    basis: str = "prior"

    @classmethod
    def of(cls, model: Model, *, engine: Engine = "ik", imatrix: bool = True) -> PriorModel:
        """Build the prior of `model`; without an imatrix everything is worse."""
        scale = damage_at_iq4_k(model) * (1.0 if imatrix else 1.5)
        return cls(share=shares(model), scale=scale, engine=engine)

    def damage(self, model: Model, types: Sequence[GgmlType]) -> FloatArray:
        """Return damage in nats, shape (n_tensors, n_types); see `LossModel.damage`."""
        cells = np.outer(self.scale * self.share, curve.gains(types))
        for j, qtype in enumerate(types):
            same = np.array([t.source_type == qtype.name for t in model.tensors])
            cells[same, j] = 0.0
        return cells

    def quality(self, model: Model, mix: Sequence[GgmlType | None]) -> Quality:
        """Predict the whole mix; see `LossModel.quality`."""
        names = sorted({t.name for t in mix if t is not None})
        by_name = {t.name: t for t in mix if t is not None}
        cells = self.damage(model, [by_name[n] for n in names])
        column = {n: j for j, n in enumerate(names)}
        damage = 0.0
        for i, qtype in enumerate(mix):
            if qtype is not None:
                damage += float(cells[i, column[qtype.name]])
        ratio = _PPL_PER_NAT * damage
        low, high = ratio * math.exp(-1.645 * _LN_SPREAD), ratio * math.exp(1.645 * _LN_SPREAD)
        base = base_ppl(model)
        return Quality(
            damage=damage,
            ln_ppl_ratio=ratio,
            ppl=base * math.exp(ratio) if base else None,
            ppl_low=base * math.exp(low) if base else None,
            ppl_high=base * math.exp(high) if base else None,
            ppl_base=base,
            basis=self.basis,
            ln_ppl_ratio_low=low,
            ln_ppl_ratio_high=high,
        )


@cache
def _base_table() -> dict[str, float]:
    text = (files("quantmix.loss") / "base_ppl.csv").read_text(encoding="utf-8")
    return {r["model"]: float(r["ppl"]) for r in csv.DictReader(text.splitlines())}


def base_ppl(model: Model) -> float | None:
    """Return the base perplexity of a catalog model on wiki.test.raw at 512, None when unknown."""
    return _base_table().get(model.id)
