"""The type curve: damage of a type relative to iq4_k, measured on whole models.

`curve.csv` beside this module holds one row per measured type, fitted over models by
`python -m quantmix.loss.fit`: gain is the damage while it is small (super-additivity and noise
floor taken out), sd the spread of its logarithm between models. A type that nobody measured is
placed by its bits per weight on the *worst* measured types around it, with a penalty, so that no
solver picks it for a number that does not exist (docs/architecture.md, fact 10).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Final

import numpy as np

from quantmix.ggml.types import ENGINES, GgmlType, table
from quantmix.loss import shipped
from quantmix.loss.model import FloatArray

# Rounding of a float type against its bf16 source, relative to iq4_k: nothing in practice, but
# above zero so that a smaller type never ties with a larger one.
_FLOAT_GAIN: Final = {"f32": 0.0, "f64": 0.0, "bf16": 1e-6, "f16": 2e-6}
# Row-interleaved types that measure otherwise than their base; all others are repackings of it.
# The first two are types of their own; the others hold the same weights and round activations in
# another way.
_OWN_WEIGHTS: Final = frozenset({"iq1_s_r4", "iq1_m_r4"})
OWN_CURVE: Final = _OWN_WEIGHTS | {"q6_k_r4", "q8_k_r8"}
_UNMEASURED_PENALTY: Final = 1.25
_UNMEASURED_SD: Final = 0.35
# Types of eight bits and more are rounded the same with a matrix and without.
_IGNORES_IMATRIX_BPW: Final = 8.0
# Row of `no_imatrix.csv` for a type that nobody measured both ways.
_USUAL: Final = "usual"


@dataclass(frozen=True, slots=True)
class TypeGain:
    """Damage relative to iq4_k: central value, sd of its ln, and whether it was measured."""

    gain: float
    sd: float
    measured: bool


@cache
def measured() -> dict[str, TypeGain]:
    """Return the measured types of `curve.csv` by name."""
    return _by_type("curve.csv", "gain")


def _by_type(file: str, column: str) -> dict[str, TypeGain]:
    return {r["type"]: TypeGain(float(r[column]), float(r["sd"]), True) for r in shipped.rows(file)}


def own_name(qtype: GgmlType) -> str:
    """Return the name under which a type has its curve: its own, or that of its base."""
    return qtype.name if qtype.name in OWN_CURVE else qtype.base


def weights_name(qtype: GgmlType) -> str:
    """Return the name of the type that rounds *weights* as this one does: mostly its base."""
    return qtype.name if qtype.name in _OWN_WEIGHTS else qtype.base


def gain(qtype: GgmlType) -> TypeGain:
    """Return the gain of one type; an unmeasured one is placed pessimistically by its bits."""
    return gain_of(own_name(qtype))


@cache
def gain_of(name: str) -> TypeGain:
    """Return the gain of the type that has its curve under `name` (see `own_name`)."""
    known = measured()
    if name in known:
        return known[name]
    if name in _FLOAT_GAIN:
        return TypeGain(_FLOAT_GAIN[name], 0.0, True)
    qtype = next(table(e)[name] for e in ENGINES if name in table(e))
    if qtype.family == "ternary":
        return TypeGain(max(g.gain for g in known.values()) * 2, 0.7, False)
    bpw, worst_ln = _upper_hull()
    if qtype.bpw < bpw[0]:
        slope = float(worst_ln[0] - np.interp(bpw[0] + 1.0, bpw, worst_ln))
        ln_gain = float(worst_ln[0]) + slope * float(bpw[0] - qtype.bpw)
    else:
        ln_gain = float(np.interp(qtype.bpw, bpw, worst_ln))
    return TypeGain(float(np.exp(ln_gain)) * _UNMEASURED_PENALTY, _UNMEASURED_SD, False)


@cache
def without_imatrix(name: str) -> TypeGain:
    """Return damage of a type made without an importance matrix over damage with one.

    From `no_imatrix.csv`, fitted over models; sd is the spread of its logarithm between models,
    mostly common to all types. Types that ignore the matrix (q8_0, floats) lose nothing; one that
    nobody measured both ways gets the factor of the usual type.
    """
    known = _factors_without_imatrix()
    if name in known:
        return known[name]
    qtype = next((table(e)[name] for e in ENGINES if name in table(e)), None)
    if qtype is None or not qtype.is_quantized or qtype.bpw >= _IGNORES_IMATRIX_BPW:
        return TypeGain(1.0, 0.0, True)
    return replace(known[_USUAL], measured=False)


@cache
def _factors_without_imatrix() -> dict[str, TypeGain]:
    return _by_type("no_imatrix.csv", "factor")


@cache
def _upper_hull() -> tuple[FloatArray, FloatArray]:
    """Bits per weight (rising) and the ln gain of the worst measured type at or above them.

    Types without a CUDA kernel are left out: what they lose is lost on activations (q8_KV, at
    eight bits, costs like iq4_k), which says nothing of other types.
    """
    ik = table("ik")
    points = sorted((ik[n].bpw, float(np.log(g.gain))) for n, g in measured().items() if ik[n].cuda)
    bpw = np.array([p[0] for p in points])
    worst = np.maximum.accumulate(np.array([p[1] for p in points])[::-1])[::-1]
    return bpw, worst


def gains(types: Sequence[GgmlType]) -> FloatArray:
    """Return the central gains of `types`, shape (n_types,)."""
    return np.array([gain(t).gain for t in types])
