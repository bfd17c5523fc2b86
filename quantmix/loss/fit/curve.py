"""Fits the type curve from whole-model sweeps.

    KLD[m, q] = floor_m + x · (1 + (c · x)^P),   x = K_m · gain_q,   gain of iq4_k = 1

over all models m and types q, robustly in ln KLD. floor_m is the noise of the model's runs (a
sparse model flips experts under the smallest disturbance; some baselines were run with another
batch), K_m its damage at iq4_k. Sweeps alone hardly tell a steep curve from strong
super-additivity, so c and P are held by what both tables of one model say together:

    whole-model KLD / sum of single-tensor KLD = 1 + (c · sum)^P        at the table's type

on models without routing (flipped experts inflate single cells). With floor and super-additivity
taken out, one curve serves a 0.8 B dense model and a 235 B sparse one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from scipy.optimize import least_squares

from quantmix.ggml.types import table
from quantmix.loss.curve import OWN_CURVE
from quantmix.loss.fit.tables import Sweep
from quantmix.loss.model import FloatArray

# Sweeps measured against a quantized baseline flatter the types near it (their notes name it).
_NEAR_BASELINE: Final = {
    "DeepSeek-V3.1-Terminus": 4.0,
    "Kimi-K2-Thinking": 4.0,
    "GLM-4.6": 6.0,
    "GLM-4.7": 6.0,
    "Qwen3-VL-235B-A22B-Instruct": 7.0,
    "Qwen3-VL-235B-A22B-Thinking": 7.0,
    "Qwen3.5-397B-A17B": 7.0,
}
# PPL and KLD of this model are not monotonic in anything; its sweep is left out.
_BROKEN: Final = frozenset({"GLM-4.7-Flash"})
_SCALE: Final = 0.08
_OUTLIER: Final = 0.6
_FEW: Final = 5
# An anchor counts like nine cells of a sweep: there are few, and only they separate the two.
_ANCHOR: Final = 3.0


@dataclass(frozen=True)
class CurveFit:
    """Fitted curve: ln gain, spread and number of models by type; c and P; rms of ln KLD."""

    ln_gain: dict[str, float]
    sd: dict[str, float]
    n_models: dict[str, int]
    ln_c: float
    power: float
    rms: float
    scale: dict[str, float]
    floor: dict[str, float]


@dataclass(frozen=True, slots=True)
class _Data:
    model: NDIntArray
    type: NDIntArray
    ln_kld: FloatArray
    models: tuple[str, ...]
    types: tuple[str, ...]
    sums: FloatArray
    ln_ratios: FloatArray


NDIntArray = np.ndarray[tuple[int, ...], np.dtype[np.int64]]


def fit_curve(sweeps: Sequence[Sweep], anchors: Sequence[tuple[float, float]]) -> CurveFit:
    """Fit gains, floors, scales and super-additivity; then refit without broken cells.

    `anchors` are (sum of single-tensor KLD, whole-model KLD) pairs.
    """
    data = _collect(sweeps, anchors)
    start = _start(data)
    first = _solve(data, start)
    residual = _predict(data, first) - data.ln_kld
    # Of a type on few models nothing tells a broken cell from a wide spread.
    few = np.bincount(data.type, minlength=len(data.types))[data.type] < _FEW
    keep = (np.abs(residual) < _OUTLIER) | few
    data = replace(data, model=data.model[keep], type=data.type[keep], ln_kld=data.ln_kld[keep])
    params = _solve(data, first)
    residual = _predict(data, params) - data.ln_kld
    n = len(data.models)
    gains = _gains(data, params)
    sd, count = {}, {}
    for j, name in enumerate(data.types):
        mine = residual[data.type == j]
        count[name] = len(mine)
        # Shrink the spread towards the pooled one: few models say little about a spread.
        pooled = float(np.mean(residual**2))
        sd[name] = float(np.sqrt((np.sum(mine**2) + 4 * pooled) / (len(mine) + 4)))
    return CurveFit(
        ln_gain=dict(zip(data.types, map(float, gains), strict=True)),
        sd=sd,
        n_models=count,
        ln_c=float(params[-2]),
        power=float(np.exp(params[-1])),
        rms=float(np.sqrt(np.mean(residual**2))),
        scale=dict(zip(data.models, map(float, np.exp(params[:n])), strict=True)),
        floor=dict(zip(data.models, map(float, np.exp(params[n : 2 * n])), strict=True)),
    )


def _collect(sweeps: Sequence[Sweep], anchors: Sequence[tuple[float, float]]) -> _Data:
    types = table("ik")
    cells = []
    for sweep in sweeps:
        if sweep.model in _BROKEN:
            continue
        limit = _NEAR_BASELINE.get(sweep.model, 99.0)
        for name, kld in sweep.kld.items():
            known = types.get(name)
            usable = known is not None and known.writable and known.family != "ternary"
            if usable and known is not None and kld > 0.0 and known.bpw < limit:
                own = known.interleave == 1 or name in OWN_CURVE
                near = limit == 4.0 and known.bpw >= 4.0 and name not in ("iq4_k", "q4_K")
                if own and not near:
                    cells.append((sweep.model, name, np.log(kld)))
    models = tuple(sorted({c[0] for c in cells}))
    names = tuple(sorted({c[1] for c in cells}, key=lambda q: (-types[q].bpw, q)))
    return _Data(
        np.array([models.index(c[0]) for c in cells]),
        np.array([names.index(c[1]) for c in cells]),
        np.array([c[2] for c in cells]),
        models,
        names,
        np.array([a for a, _ in anchors]),
        np.array([np.log(b / a) for a, b in anchors]),
    )


def _start(data: _Data) -> FloatArray:
    types = table("ik")
    n = len(data.models)
    gains = [-1.4 * (types[q].bpw - 4.5) for q in data.types]
    return np.concatenate([np.full(n, np.log(0.015)), np.full(n, np.log(1e-3)), gains, [0.0, 0.0]])


def _gains(data: _Data, params: FloatArray) -> FloatArray:
    gains = params[2 * len(data.models) : -2].copy()
    return np.asarray(gains - gains[data.types.index("iq4_k")])


def _predict(data: _Data, params: FloatArray) -> FloatArray:
    n = len(data.models)
    x = np.exp(params[data.model] + _gains(data, params)[data.type])
    y = x * (1.0 + (np.exp(params[-2]) * x) ** np.exp(params[-1]))
    return np.asarray(np.log(y + np.exp(params[n + data.model])))


def _solve(data: _Data, start: FloatArray) -> FloatArray:
    n = len(data.models)

    def residual(params: FloatArray) -> FloatArray:
        return np.concatenate(
            [
                _predict(data, params) - data.ln_kld,
                0.15 * (params[n : 2 * n] - np.log(1e-3)),
                0.02 * (params[:n] - np.log(0.015)),
                0.3 * params[-2:],
                _ANCHOR
                * (
                    np.log1p((np.exp(params[-2]) * data.sums) ** np.exp(params[-1]))
                    - data.ln_ratios
                ),
            ]
        )

    return np.asarray(
        least_squares(residual, start, loss="soft_l1", f_scale=_SCALE, max_nfev=400).x
    )
