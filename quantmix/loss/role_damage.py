"""KLD of a whole role at any type, from probes of the role at a few types.

    KLD(role, type) = a · e · (e / 0.01)^(p − 1) + f,   e = weighted error of the role at the type

e is known without a model run (`measurements`), a and p belong to the role, f to the role and to
how the engine quantizes activations for the type: bits do not lower it. The packaged CPU engine
has blocks of 256 activations for most iq- and k-types and of 32 for others, and f differs by five.
A type that was probed keeps most of its own deviation from the fit. Where e is not known either,
it is interpolated along the type curve between types where it is. Probes on less text than the
longest are brought to its level by one factor for all roles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from quantmix.ggml.types import ENGINES, GgmlType, table
from quantmix.loss import curve
from quantmix.loss.model import FloatArray
from quantmix.measurements import Measurements, Probe
from quantmix.models.model import Model

# Types that the packaged ik multiplies with activations in blocks of 32 (`vec_dot_type` q8_2_x4 or
# q8_K32 in its type traits; a test compares). All others: 128 or more.
FINE_ACTIVATIONS: Final = frozenset({
    "q4_0", "q4_1", "q5_0", "q5_1", "q6_0", "q8_0", "q4_K", "q5_K", "q6_K", "iq4_nl", "mxfp4",
    "q1_0_g128", "iq1_kt", "iq2_kt", "iq3_kt", "iq4_kt", "q4_0_r8", "q5_0_r4", "q6_0_r4",
    "q8_0_r8", "iq4_nl_r4", "q4_k_r4", "q5_k_r4", "iq4_xs_r8", "iq4_ks_r4", "iq5_ks_r4",
})  # fmt: skip
# Priors of the fit, wide; centres are medians over eight roles of the dithered SmolLM2 demo model.
_LN_FLOOR, _LN_FLOOR_SD = math.log(5e-4), 1.0  # coarse floor per unit of a
_LN_FINE, _LN_FINE_SD = math.log(0.2), 0.5  # fine floor over coarse floor
_POWER_SD = 0.06
_LN_TEXT_SD = 0.25
# Scatter of probed types about the fit, in ln KLD (same roles: 0.04).
_FIT_LN_SD = 0.05
_PIVOT = 0.01
# Weighted error at iq4_k, by which a probe that does not say its own is placed on the type curve:
# error over gain is 0.0026 to 0.0036 (median 0.0034) for ten types, ffn_up of the same model.
_IQ4_K_ERROR = 0.0034
_BELOW_STEEPER = 1.15
# A probe at four times a type's error still shows some of the floor that decides there.
_FLOOR_SHOWS = 0.25
_TINY = 1e-12


@dataclass(frozen=True)
class RoleDamage:
    """Fitted KLD of one role.

    Attributes:
        ln_slope, power: a and p.
        coarse, fine: f in nats, activations in blocks of 256 and of 32.
        errors: weighted error by type (`curve.weights_name`), for types where it is known.
        offsets: likewise by probed type, what is added to the fitted ln KLD.
        worst_error: the largest error that was probed.
        probed: errors of the types that were probed.
        relative_sd: mean relative noise of the probes.
    """

    ln_slope: float
    power: float
    coarse: float
    fine: float
    errors: Mapping[str, float]
    offsets: Mapping[str, float]
    worst_error: float
    relative_sd: float
    probed: tuple[float, ...] = ()

    def error(self, qtype: GgmlType) -> float:
        """Return the weighted error at a type; unknown ones along the type curve.

        What interleaving changes is activations; the weights are those of the base.
        """
        name = curve.weights_name(qtype)
        if name in self.errors:
            return self.errors[name]
        gain = curve.gain_of(name).gain
        if gain <= 0.0:
            return 0.0
        knots = sorted(
            (math.log(g), math.log(e))
            for n, e in self.errors.items()
            if (g := curve.gain_of(n).gain) > 0.0
        )
        x = np.array([k[0] for k in knots])
        y = np.maximum.accumulate(np.array([k[1] for k in knots]))
        at = math.log(gain)
        beyond = min(at - x[0], 0.0) + max(at - x[-1], 0.0)
        return math.exp(float(np.interp(at, x, y)) + beyond)

    def at(self, types: Sequence[GgmlType]) -> FloatArray:
        """Return the KLD of the role in nats, shape (n_types,).

        Beyond the largest probed error it rises 15 % faster than the fit says: a solver would find
        what is too cheap there (docs/architecture.md, fact 10).
        """
        return np.array([self._one(t) for t in types])

    def _one(self, qtype: GgmlType) -> float:
        error = self.error(qtype)
        if error <= 0.0:
            return 0.0
        power = self.power
        ln = self.ln_slope + math.log(error) + (power - 1.0) * math.log(error / _PIVOT)
        if error > self.worst_error:
            ln += (_BELOW_STEEPER - 1.0) * math.log(error / self.worst_error)
        kld = math.exp(ln)
        if qtype.is_quantized:
            kld += self.fine if qtype.name in FINE_ACTIVATIONS else self.coarse
        return kld * math.exp(self.offsets.get(curve.weights_name(qtype), 0.0))

    def reach_ln_sd(self, qtype: GgmlType) -> float:
        """Return the sd of ln KLD that comes from a type's distance to what was probed.

        The slope is known to its prior only where one type was probed, and so is the floor at
        errors under a quarter of the least that was.
        """
        error = self.error(qtype)
        if error <= 0.0 or not self.probed:
            return 0.0
        sd = _POWER_SD * min(abs(math.log(error / e)) for e in self.probed)
        if error < _FLOOR_SHOWS * min(self.probed):
            floor = self.fine if qtype.name in FINE_ACTIVATIONS else self.coarse
            sd = math.hypot(sd, _LN_FLOOR_SD * floor / max(self._one(qtype), _TINY))
        return min(sd, 1.0)

    def outside(self, qtype: GgmlType) -> bool:
        """Whether a type is worse than any that was probed."""
        return self.error(qtype) > self.worst_error * (1.0 + 1e-9)


def fit(
    model: Model, by_role: Mapping[str, Sequence[Probe]], measured: Measurements
) -> dict[str, RoleDamage]:
    """Fit every role that has a usable probe; all roles at once, for the levels of the texts."""
    rows = _rows(by_role, measured)
    if not rows:
        return {}
    roles = list(dict.fromkeys(r.role for r in rows))
    lengths = sorted({r.tokens for r in rows}, reverse=True)
    theta, fitted = _solve(rows, roles, lengths)
    found = {}
    for k, role in enumerate(roles):
        slope, power, coarse, fine = theta[4 * k : 4 * k + 4]
        mine = [(r, y) for r, y in zip(rows, fitted, strict=True) if r.role == role]
        errors = {r.type: r.error for r, _ in mine}
        offsets: dict[str, tuple[float, float]] = {}
        for r, ln in mine:
            sure = _FIT_LN_SD**2 / (_FIT_LN_SD**2 + r.noise**2)
            best = offsets.get(r.type)
            if best is None or sure > best[1]:
                offsets[r.type] = (sure * (r.ln_kld - ln), sure)
        found[role] = RoleDamage(
            ln_slope=float(slope),
            power=float(power),
            coarse=math.exp(slope + coarse),
            fine=math.exp(slope + coarse + fine),
            errors=errors | _other_errors(model, role, errors, measured),
            offsets={name: value for name, (value, _) in offsets.items()},
            worst_error=max(errors.values()),
            relative_sd=float(np.mean([r.noise for r, _ in mine])),
            probed=tuple(sorted(errors.values())),
        )
    return found


@dataclass(frozen=True, slots=True)
class _Row:
    """A probe as the fit sees it; `type` is that of its weights, `noise` is relative."""

    role: str
    type: str
    error: float
    ln_kld: float
    noise: float
    is_fine: bool
    tokens: int


def _rows(by_role: Mapping[str, Sequence[Probe]], measured: Measurements) -> list[_Row]:
    types = _types()
    rows = []
    for role, probes in by_role.items():
        for p in probes:
            if p.type not in types:
                continue
            weights = curve.weights_name(types[p.type])
            gain = curve.gain_of(weights).gain
            if gain <= 0.0:
                continue
            kld = max(p.kld - measured.noise_floor, 0.1 * p.kld, 1e-9)
            noise = min(max(p.kld_err, _TINY) / kld, 1.0)
            fine = p.type in FINE_ACTIVATIONS
            tokens = p.tokens or measured.tokens
            error = p.err if p.err > 0.0 else _IQ4_K_ERROR * gain
            error = max(error, _TINY)
            rows.append(_Row(role, weights, error, math.log(kld), noise, fine, tokens))
    return rows


def _solve(
    rows: Sequence[_Row], roles: Sequence[str], lengths: Sequence[int]
) -> tuple[FloatArray, FloatArray]:
    """Return parameters (ln a, p, ln f/a, ln fine/coarse per role, then levels) and fitted ln KLD.

    Regularised least squares with a robust loss. `lengths` are the texts, longest (the reference)
    first; a level is ln KLD of all roles on a shorter text over that on the longest.
    """
    from scipy.optimize import least_squares

    of_role = np.array([roles.index(r.role) for r in rows])
    of_length = np.array([lengths.index(r.tokens) for r in rows])
    ln_e = np.log([r.error for r in rows])
    ln_k = np.array([r.ln_kld for r in rows])
    fine = np.array([r.is_fine for r in rows])
    sd = np.hypot([r.noise for r in rows], _FIT_LN_SD)
    start_slope = np.array(
        [float(np.median((ln_k - ln_e)[of_role == i])) for i in range(len(roles))]
    )
    centre = np.stack(
        [
            start_slope,
            np.ones(len(roles)),
            np.full(len(roles), _LN_FLOOR),
            np.full(len(roles), _LN_FINE),
        ],
        axis=1,
    ).ravel()
    n_levels = len(lengths) - 1
    centre = np.concatenate([centre, np.zeros(n_levels)])
    width = np.array([2.0, _POWER_SD, _LN_FLOOR_SD, _LN_FINE_SD] * len(roles))
    width = np.concatenate([width, np.full(n_levels, _LN_TEXT_SD)])

    def fitted(theta: FloatArray) -> FloatArray:
        per = theta[: 4 * len(roles)].reshape(-1, 4)[of_role]
        level = np.concatenate([[0.0], theta[4 * len(roles) :]])[of_length]
        bulk = per[:, 1] * ln_e + (1.0 - per[:, 1]) * math.log(_PIVOT)
        floor = per[:, 2] + np.where(fine, per[:, 3], 0.0)
        return np.asarray(per[:, 0] + np.logaddexp(bulk, floor) + level)

    def residuals(theta: FloatArray) -> FloatArray:
        # Priors stand in squares; soft-l1 of the data is written out so that they can.
        z = (fitted(theta) - ln_k) / sd
        robust = np.sign(z) * np.sqrt(2.0 * (np.sqrt(1.0 + z**2) - 1.0))
        return np.concatenate([robust, (theta - centre) / width])

    theta = least_squares(residuals, centre).x
    return theta, fitted(theta)


def _other_errors(
    model: Model, role: str, known: Mapping[str, float], measured: Measurements
) -> dict[str, float]:
    """Return errors of types that were not probed, from the file's errors of single tensors.

    The tensors may be a sample: their mean error is put in relation to their mean at a probed type
    where the file has it, else it counts as it is.
    """
    members = {t.name for t in model.tensors if t.role == role}
    types = _types()
    by_type: dict[str, dict[str, float]] = {}
    for e in measured.errors:
        if e.tensor in members and e.type in types:
            by_type.setdefault(curve.weights_name(types[e.type]), {})[e.tensor] = e.err
    found = {}
    for name, mine in by_type.items():
        if name in known:
            continue
        ratios = [
            known[other] / mean
            for other, theirs in by_type.items()
            if other in known and mine.keys() <= theirs.keys()
            if (mean := float(np.mean([theirs[t] for t in mine]))) > 0.0
        ]
        scale = float(np.median(ratios)) if ratios else 1.0
        found[name] = max(scale * float(np.mean(list(mine.values()))), _TINY)
    return found


def _types() -> dict[str, GgmlType]:
    """Return every known type by name; ik's where both engines have it."""
    return {n: t for e in reversed(ENGINES) for n, t in table(e).items()}
