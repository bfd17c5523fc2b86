"""Regularised least squares on ln PPL: what published and own measurements say of one model.

The parameters of `response` have Gaussian priors (params.json, fitted over models); the noise of
a row is

    sd² = sd_row² + mid² · y + (form · y)² + (unknown · y)²

sd_row from the repeatability of paired runs and, where it is known, the row's own error, `mid` for
what averages out as damage grows, `form` for what the model's form cannot express in proportion,
`unknown` when only the size of the mix is known (times the number of such rows: mixes of one author
share what makes them unusual, so all together say as much as one). Residuals weigh as under
Student's t (5 degrees of freedom), so that one broken row does not bend the fit, and a model whose
rows scatter more than that gets wider intervals. The posterior covariance goes into the interval of
every prediction.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from quantmix.loss import features, response
from quantmix.loss.model import FloatArray

_NU = 5.0
_MAX_STEPS = 60
# Median of |t| with 5 degrees of freedom.
_MEDIAN_T = 0.727
_FEW = 5
# A row that the fit follows wholly says nothing of its own noise.
_LEAST_FREE = 0.05
_DOUBTFUL = 4.0


@dataclass(frozen=True, slots=True)
class Hyper:
    """Hyper-parameters, all fitted by `python -m quantmix.loss.fit` (params.json).

    `quantiles` are those of ln rise and of the noise of base and row, `quantile_prior` that of ln
    rise where only the prior speaks.
    """

    power: float
    ln_onset: float
    ln_onset_sd: float
    tilt_sd: float
    group_sd: float
    type_sd: float
    row_sd: float
    form: float
    mid: float
    unknown_mix: float
    solved: float
    quantiles: tuple[float, float]
    quantile_prior: float
    moe_ln_scale: float
    moe_ln_scale_sd: float
    dense_ln_scale: float
    dense_size_slope: float
    dense_ln_scale_sd: float
    hybrid_ln_scale: float
    hybrid_size_slope: float
    hybrid_ln_scale_sd: float
    size_curve: tuple[float, ...]


@cache
def hyper(without: str = "") -> Hyper:
    """Return the shipped hyper-parameters, or those fitted `without` a model of that id."""
    doc = json.loads((files("quantmix.loss") / "params.json").read_text(encoding="utf-8"))
    raw: dict[str, Any] = {**doc["hyper"], **doc["without"].get(without, {})}
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in raw.items()}
    return Hyper(**values)


@dataclass(frozen=True, slots=True)
class Row:
    """One measured mix as the fit sees it.

    Attributes:
        id: label for people.
        w: features, shape (N_GROUPS, n_columns).
        ln_ppl: measured.
        bpw: bits per weight of the whole file.
        exact: False when only the size is known and `w` stands for a typical mix of that size.
        sd: error of `ln_ppl` as a ratio to the base, where the row says it; 0 for published ones,
            whose errors are of the text and common to all.
    """

    id: str
    w: FloatArray
    ln_ppl: float
    bpw: float
    exact: bool = True
    sd: float = 0.0


@dataclass(frozen=True, slots=True)
class Prior:
    """Gaussian prior of the parameter vector: mean and standard deviation."""

    mean: FloatArray
    sd: FloatArray


@dataclass(frozen=True)
class Posterior:
    """Fitted parameters: mean, covariance, and how many rows stand behind them.

    `inflation` ≥ 1 widens intervals of a model whose own rows scatter more than the noise says.
    `known` is what rows took off the prior's uncertainty of the scale: 0 for none, 1 for all.
    `doubtful` are the ids of exact rows that lie over four standard deviations off.
    """

    theta: FloatArray
    covariance: FloatArray
    n_rows: int
    inflation: float = 1.0
    known: float = 0.0
    doubtful: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Prediction:
    """ln PPL of one mix: centre, additive damage, rise over the base, and its uncertainty.

    `relative` is the sd of ln rise, `edge` the sd in ln PPL of base and row, `known` that of the
    posterior.
    """

    ln_ppl: float
    damage: float
    rise: float
    relative: float
    edge: float
    known: float = 0.0

    @property
    def sd(self) -> float:
        """Standard deviation of ln PPL."""
        return float(np.hypot(self.relative * self.rise, self.edge))

    def interval(self, h: Hyper) -> tuple[float, float]:
        """Return the 90 % interval of ln PPL, with the quantile of ln rise between the fitted ones.

        Where only the prior speaks it is the prior's, and it goes to that of calibrated models as
        rows take over.
        """
        first = h.quantile_prior + self.known * (h.quantiles[0] - h.quantile_prior)
        return self.bounds((first, h.quantiles[1]))

    def bounds(self, quantiles: tuple[float, float]) -> tuple[float, float]:
        """Return the interval of ln PPL, `quantiles` standard deviations wide.

        Parameter, form and low-bit uncertainty act on ln rise, so the rise lies in y · e^±s with
        the first quantile; the noise of base and row is added in squares with the second.
        """
        edge = (quantiles[1] * self.edge) ** 2
        reach = min(quantiles[0] * self.relative, 20.0)
        down = (self.rise * float(np.expm1(-reach))) ** 2
        up = (self.rise * float(np.expm1(reach))) ** 2
        return self.ln_ppl - float(np.sqrt(down + edge)), self.ln_ppl + float(np.sqrt(up + edge))


def ln_scale_prior(n_elements: int, law: str, h: Hyper) -> tuple[float, float]:
    """Return mean and sd of k for a model of that size under a law of `loss.prior.scale_law`.

    Models that are not sparse lose more when small: those of one line closely, others loosely.
    """
    if law == "sparse":
        return h.moe_ln_scale, h.moe_ln_scale_sd
    size = float(np.log(27e9 / max(n_elements, 10**7)))
    if law == "hybrid":
        return h.hybrid_ln_scale + h.hybrid_size_slope * size, h.hybrid_ln_scale_sd
    return h.dense_ln_scale + h.dense_size_slope * size, h.dense_ln_scale_sd


def prior(
    ln_base: float, ln_base_sd: float, n_elements: int, law: str, h: Hyper | None = None
) -> Prior:
    """Return the prior of one model's parameters; `ln_base` is its ln PPL unquantized.

    `law` is how damage goes with size, of `loss.prior.scale_law`.
    """
    h = h or hyper()
    scale, scale_sd = ln_scale_prior(n_elements, law, h)
    n_types = len(features.columns())
    mean = np.concatenate(
        [[ln_base, scale, 0.0, h.ln_onset], np.zeros(features.N_GROUPS + n_types)]
    )
    sd = np.concatenate(
        [
            [ln_base_sd, scale_sd, h.tilt_sd, h.ln_onset_sd],
            np.full(features.N_GROUPS, h.group_sd),
            np.hypot(h.type_sd, features.ln_gain_sds()),
        ]
    )
    return Prior(mean, sd)


def noise_variance(
    rise: FloatArray, exact: FloatArray, h: Hyper, own_sd: FloatArray | float = 0.0
) -> FloatArray:
    """Return the variance of ln PPL around the model, shape (n,); `own_sd` is `Row.sd`."""
    y = np.clip(rise, 0.0, None)
    shared = h.unknown_mix**2 * max(1, int(np.count_nonzero(exact == 0)))
    relative = h.form**2 + np.where(exact, 0.0, shared)
    row = h.row_sd**2 + np.square(own_sd)
    return np.asarray(row + h.mid**2 * y + relative * y**2)


def fit(rows: Sequence[Row], known: Prior, h: Hyper | None = None) -> Posterior:
    """Return the posterior of the parameters given measured rows (none: the prior itself)."""
    h = h or hyper()
    theta = known.mean.copy()
    precision = np.diag(known.sd**-2.0)
    if not rows:
        return Posterior(theta, np.diag(known.sd**2), 0)
    seen = _Seen(
        w=np.array([r.w for r in rows]),
        y=np.array([r.ln_ppl for r in rows]),
        exact=np.array([r.exact for r in rows]),
        sd=np.array([r.sd for r in rows]),
    )
    for _ in range(_MAX_STEPS):
        r = response.respond(theta, seen.w, h.power)
        normal = precision + _information(r, seen, h)
        gradient = r.jacobian.T @ (_weights(r, seen, h) * (seen.y - r.ln_ppl))
        step = np.linalg.solve(normal, gradient - (theta - known.mean) / known.sd**2)
        step *= min(1.0, 0.5 / max(float(np.abs(step[1:]).max()), 1e-12))
        theta = theta + step
        if np.abs(step).max() < 1e-7:
            break
    r = response.respond(theta, seen.w, h.power)
    covariance = np.asarray(np.linalg.inv(precision + _information(r, seen, h)))
    covariance = covariance.astype(np.float64)
    k = response.SCALE
    off = np.abs(seen.y - r.ln_ppl) / np.sqrt(_variance(r, seen, h))
    return Posterior(
        theta,
        covariance,
        len(rows),
        _scatter(r, seen, covariance, h),
        known=max(0.0, 1.0 - math.sqrt(covariance[k, k]) / float(known.sd[k])),
        doubtful=tuple(x.id for x, z in zip(rows, off, strict=True) if x.exact and z > _DOUBTFUL),
    )


@dataclass(frozen=True, slots=True)
class _Seen:
    """Rows as arrays: features (n, N_GROUPS, n_columns), ln PPL, `exact` and `sd`, shape (n,)."""

    w: FloatArray
    y: FloatArray
    exact: FloatArray
    sd: FloatArray


def _variance(r: response.Response, seen: _Seen, h: Hyper) -> FloatArray:
    return noise_variance(r.rise, seen.exact, h, seen.sd)


def _scatter(r: response.Response, seen: _Seen, covariance: FloatArray, h: Hyper) -> float:
    """Return by how much exact rows scatter more than their noise, at least 1 (Birge's ratio).

    From the median of |residual|/sd against what Student's t gives, shrunk to 1 by five rows. A
    row draws the fit towards itself by its leverage l, so its residual counts as if it had been
    left out: sd² · (1 - l), the standardized residual of linear regression.
    """
    leverage = np.einsum("ij,jk,ik->i", r.jacobian, covariance, r.jacobian)
    leverage *= _weights(r, seen, h)
    telling = seen.exact & (1.0 - leverage > _LEAST_FREE)
    n = int(np.count_nonzero(telling))
    if n < _FEW:
        return 1.0
    variance = _variance(r, seen, h)[telling] * (1.0 - leverage[telling])
    z = np.abs(seen.y - r.ln_ppl)[telling] / np.sqrt(variance)
    excess = float(np.median(z)) / _MEDIAN_T
    return max(1.0, float(np.sqrt((n * excess**2 + _FEW) / (n + _FEW))))


def _weights(r: response.Response, seen: _Seen, h: Hyper) -> FloatArray:
    var = _variance(r, seen, h)
    return np.asarray((_NU + 1.0) / (_NU + (seen.y - r.ln_ppl) ** 2 / var) / var)


def _information(r: response.Response, seen: _Seen, h: Hyper) -> FloatArray:
    return np.asarray((r.jacobian * _weights(r, seen, h)[:, None]).T @ r.jacobian)


def predict(
    posterior: Posterior,
    w: FloatArray,
    h: Hyper | None = None,
    *,
    exact: bool = True,
    over_base: bool = False,
) -> Prediction:
    """Predict one mix, features `w` of shape (N_GROUPS, n_columns).

    With `over_base` the uncertainty is that of the ratio to the base: what is not known of the
    base itself cancels.
    """
    h = h or hyper()
    r = response.respond(posterior.theta, w[None], h.power)
    y = float(r.rise[0])
    jac = r.jacobian[0].copy()
    if over_base:
        jac[response.BASE] = 0.0
    edge = jac[response.BASE] * float(posterior.covariance[response.BASE, response.BASE])
    edge += h.row_sd**2
    total = float(jac @ posterior.covariance @ jac)
    total += float(noise_variance(r.rise, np.array([exact]), h)[0])
    total *= posterior.inflation**2
    edge *= posterior.inflation**2
    return Prediction(
        ln_ppl=float(r.ln_ppl[0]),
        damage=float(r.damage[0]),
        rise=y,
        relative=float(np.sqrt(max(total - edge, 0.0))) / max(y, 1e-12),
        edge=float(np.sqrt(edge)),
        known=posterior.known,
    )
