"""The type curve: damage of a type relative to iq4_k, measured on whole models.

`curve.csv` beside this module holds one row per measured type. A type that nobody measured is
placed by its bits per weight on the *worst* measured types around it (DESIGN §4.10: a solver
finds every under-estimated cell), so that it is never chosen for a number that does not exist.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
from numpy.typing import NDArray

from quantmix.ggml.types import GgmlType, table

FloatArray = NDArray[np.float64]

# Rounding of a float type against its bf16 source, relative to iq4_k: nothing in practice, but
# above zero so that a smaller type never ties with a larger one.
_FLOAT_GAIN = {"f32": 0.0, "f64": 0.0, "bf16": 1e-6, "f16": 2e-6}
_OWN_CURVE = frozenset({"iq1_s_r4", "iq1_m_r4"})
_UNMEASURED_PENALTY = 1.25


@dataclass(frozen=True, slots=True)
class TypeGain:
    """Damage relative to iq4_k: central value, its 10-90 % range, and whether it was measured."""

    gain: float
    low: float
    high: float
    measured: bool


@cache
def measured() -> dict[str, TypeGain]:
    """Return the measured types of `curve.csv` by name."""
    text = (files("quantmix.loss") / "curve.csv").read_text(encoding="utf-8")
    return {
        r["type"]: TypeGain(float(r["gain"]), float(r["low"]), float(r["high"]), True)
        for r in csv.DictReader(text.splitlines())
    }


@cache
def _upper_hull() -> tuple[FloatArray, FloatArray]:
    """Bits per weight (rising) and the ln gain of the worst measured type at or above them."""
    ik = table("ik")
    points = sorted((ik[n].bpw, np.log(g.gain)) for n, g in measured().items() if "_bn" not in n)
    bpw = np.array([p[0] for p in points])
    worst = np.maximum.accumulate(np.array([p[1] for p in points])[::-1])[::-1]
    return bpw, worst


def gain(qtype: GgmlType) -> TypeGain:
    """Return the gain of one type; an unmeasured one is placed pessimistically by its bits."""
    known = measured()
    name = qtype.name if qtype.name in _OWN_CURVE else qtype.base
    if name in known:
        return known[name]
    if name in _FLOAT_GAIN:
        value = _FLOAT_GAIN[name]
        return TypeGain(value, value, value, True)
    if qtype.family == "ternary":
        worst = known["iq1_bn"]
        return TypeGain(worst.high, worst.gain, 2 * worst.high, False)
    bpw, worst_ln = _upper_hull()
    if qtype.bpw < bpw[0]:
        slope = (worst_ln[0] - np.interp(bpw[0] + 1, bpw, worst_ln)) / 1.0
        ln_gain = worst_ln[0] + slope * (bpw[0] - qtype.bpw)
    else:
        ln_gain = float(np.interp(qtype.bpw, bpw, worst_ln))
    value = float(np.exp(ln_gain)) * _UNMEASURED_PENALTY
    return TypeGain(value, value / 2, value * 2, False)


def gains(types: Sequence[GgmlType]) -> FloatArray:
    """Return the central gains of `types`, shape (n_types,)."""
    return np.array([gain(t).gain for t in types])
