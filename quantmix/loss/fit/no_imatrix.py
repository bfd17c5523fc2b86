"""Fits what a missing importance matrix costs, type by type (`no_imatrix.csv`).

Pairs of one model at one type, made with a matrix and without:

- presets of the same name in the measurement rows: LLaMA-3-8B (KLD, llama.cpp's perplexity
  README), and Qwen models of which one author publishes without and another with a matrix (PPL);
- the old simple types of LLaMA-3-8B without a matrix against what its other files with one say of
  them by the type curve;
- all block matrices of a small model at one type, measured here by hot swap
  (`no_imatrix_smollm2.csv`, made by `tests/bench/bench_no_imatrix.py`).

With super-additivity taken out, ln(damage without / damage with) of model m at type t is
a_t + b_m: what a type loses, and how much a model leans on its matrix. Both are shrunk by their own
spread; the spread of b is what a new model may differ by.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from quantmix.loss import evidence, shipped
from quantmix.loss.fit.curve import CurveFit
from quantmix.loss.fit.tables import CREDIT

COLUMNS: Final = ("type", "factor", "sd", "n_models", "source")
SOURCE: Final = (
    "llama.cpp examples/perplexity/README.md (LLaMA-3-8B); own measurement (SmolLM2-135M); "
    f"{CREDIT}"
)
_MAIN_TYPE: Final = {
    "Q2_K": "q2_K", "Q3_K_S": "q3_K", "Q3_K_M": "q3_K", "Q3_K_L": "q3_K", "Q4_K_S": "q4_K",
    "Q4_K_M": "q4_K", "Q5_K_S": "q5_K", "Q5_K_M": "q5_K", "IQ4_XS": "iq4_xs", "IQ4_NL": "iq4_nl",
}  # fmt: skip
_BY: Final = re.compile(r"^(\w+)(?: \((mradermacher|bartowski)\))$")
_TABLE: Final = "LLaMA-3-8B"
_SIMPLE: Final = ("q4_0", "q4_1", "q5_0", "q5_1")
# Rises that differ by what two runs of unequal files do anyway (ln units), and damage so small
# that the floor of a KLD run decides.
_ROW_SD: Final = 0.006
_FLOOR: Final = 0.015
_OWN_SD: Final = 0.1


@dataclass(frozen=True, slots=True)
class Pair:
    """ln(damage without an importance matrix / with) of a model at a type, and its sd."""

    model: str
    type: str
    ln_factor: float
    sd: float


def pairs(rows: Sequence[Mapping[str, str]], fitted: CurveFit) -> list[Pair]:
    """Return every pair, in a fixed order."""
    return [*_of_authors(rows, fitted), *_of_table(rows, fitted), *_own(fitted)]


def fit(found: Sequence[Pair]) -> list[dict[str, str]]:
    """Return the rows of `no_imatrix.csv`, types in order of the factor, and the usual type."""
    types = sorted({p.type for p in found})
    models = sorted({p.model for p in found})
    y = np.array([p.ln_factor for p in found])
    var = np.array([p.sd**2 for p in found])
    design = np.zeros((len(found), 1 + len(types) + len(models)))
    design[:, 0] = 1.0
    for i, p in enumerate(found):
        design[i, 1 + types.index(p.type)] = 1.0
        design[i, 1 + len(types) + models.index(p.model)] = 1.0
    # Spreads of types, of models and of what is left: expectation-maximisation.
    spread = np.array([0.3, 0.3, 0.2]) ** 2
    which = np.array([0] * len(types) + [1] * len(models))
    for _ in range(500):
        precision = np.concatenate([[1e-6], 1.0 / spread[which]])
        weight = 1.0 / (var + spread[2])
        covariance = np.linalg.inv(np.diag(precision) + design.T @ (design * weight[:, None]))
        beta = covariance @ (design.T @ (weight * y))
        square = beta[1:] ** 2 + np.diag(covariance)[1:]
        residual = y - design @ beta
        fuzzy = np.einsum("ij,jk,ik->i", design, covariance, design)
        left = float(np.mean(np.maximum(residual**2 + fuzzy - var, 0.0)))
        spread = np.array([square[which == 0].mean(), square[which == 1].mean(), left])
        spread = np.maximum(spread, 0.05**2)
    out = []
    for j, name in enumerate(types):
        pick = np.zeros(len(beta))
        pick[[0, 1 + j]] = 1.0
        sd = math.sqrt(spread[1] + spread[2] + float(pick @ covariance @ pick))
        n = len({p.model for p in found if p.type == name})
        out.append(_row(name, float(pick @ beta), sd, n))
    usual_sd = math.sqrt(float(spread.sum()) + float(covariance[0, 0]))
    out.sort(key=lambda r: (float(r["factor"]), r["type"]))
    return [*out, _row("usual", float(beta[0]), usual_sd, len(models))]


def _row(name: str, ln_factor: float, sd: float, n_models: int) -> dict[str, str]:
    # No type gains by leaving the matrix away.
    factor = max(1.0, math.exp(ln_factor))
    return {
        "type": name,
        "factor": f"{factor:.3g}",
        "sd": f"{sd:.2g}",
        "n_models": str(n_models),
        "source": SOURCE,
    }


def _of_authors(rows: Sequence[Mapping[str, str]], fitted: CurveFit) -> list[Pair]:
    """Pairs of presets of two authors of one Qwen model, ln PPL over its base."""
    ppl: dict[tuple[str, str], dict[str, float]] = {}
    bases: dict[str, float] = {}
    for r in rows:
        found = _BY.match(r["label"])
        if r["corpus"] != evidence.CORPUS or not r["ppl"]:
            continue
        if r["base_ppl_bf16_or_q8"]:
            bases.setdefault(r["model"], float(r["base_ppl_bf16_or_q8"]))
        if found and found[1] in {*_MAIN_TYPE, "Q8_0"}:
            ppl.setdefault((r["model"], found[1]), {})[found[2]] = float(r["ppl"])
    for (model, preset), by in ppl.items():
        if preset == "Q8_0":
            bases.setdefault(model, min(by.values()))
    out = []
    for (model, preset), by in sorted(ppl.items()):
        if preset not in _MAIN_TYPE or len(by) < 2:
            continue
        with_, without = (math.log(by[a] / bases[model]) for a in ("bartowski", "mradermacher"))
        if with_ > 2 * _ROW_SD and without > 2 * _ROW_SD:
            sd = _ROW_SD * math.hypot(1 / with_, 1 / without)
            out.append(Pair(model, _MAIN_TYPE[preset], _ratio(without, with_, fitted), sd))
    return out


def _of_table(rows: Sequence[Mapping[str, str]], fitted: CurveFit) -> list[Pair]:
    """Pairs of the one published table of KLD with and without a matrix."""
    klds: dict[tuple[str, str], list[float]] = {}
    for r in rows:
        if r["model"] == _TABLE and r["kld_mean"]:
            preset = r["label"].split()[0].split("(")[0].upper()
            klds.setdefault((preset, r["imatrix"]), []).append(float(r["kld_mean"]))
    kld = {k: float(np.exp(np.mean(np.log(v)))) for k, v in klds.items()}
    out = []
    for preset, name in _MAIN_TYPE.items():
        if (preset, "no") in kld and (preset, "yes") in kld:
            pair = kld[preset, "no"], kld[preset, "yes"]
            out.append(Pair(_TABLE, name, _ratio(*pair, fitted), _OWN_SD))
    level = [
        math.log(_additive(kld[p.upper(), "yes"], fitted)) - fitted.ln_gain[p]
        for p in ("iq4_xs", "iq4_nl")
        if (p.upper(), "yes") in kld
    ]
    for name in (*_SIMPLE, "q5_K"):
        preset = "Q5_K_S" if name == "q5_K" else name.upper()
        if level and (preset, "no") in kld:
            ln_with = float(np.mean(level)) + fitted.ln_gain[name]
            ln_without = math.log(_additive(kld[preset, "no"], fitted))
            out.append(Pair(_TABLE, name, ln_without - ln_with, 2 * _OWN_SD))
    return out


def _own(fitted: CurveFit) -> list[Pair]:
    """Pairs measured with the engine on a small model: mean KLD in nats."""
    out = []
    for r in shipped.rows("no_imatrix_smollm2.csv", "quantmix.loss.fit"):
        with_, without = float(r["kld_with"]), float(r["kld_without"])
        if with_ > _FLOOR:
            name = r["type"]
            out.append(Pair("SmolLM2-135M", name, _ratio(without, with_, fitted), _OWN_SD))
    return out


def _ratio(without: float, with_: float, fitted: CurveFit) -> float:
    return math.log(_additive(without, fitted) / _additive(with_, fitted))


def _additive(y: float, fitted: CurveFit) -> float:
    """Return the x of y = x · (1 + (c · x)^P), by Newton's method."""
    c, power = math.exp(fitted.ln_c), fitted.power
    x = y
    for _ in range(60):
        value = x * (1.0 + (c * x) ** power) - y
        slope = 1.0 + (1.0 + power) * (c * x) ** power
        x = max(x - value / slope, 1e-9)
    return x
