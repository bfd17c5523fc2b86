"""Fits the hyper-parameters: what models have in common, and how far they differ.

Population means (scale of sparse models, scale of dense models by size, damage of a usual mix by
size) come from fits of every model; the rest minimises the leave-one-out negative log density
(Student's t, 5 degrees of freedom) summed over models, by coordinate descent on a grid. The tilt
of the curve is held to what whole-model sweeps allow: their spread at the lowest types is 0.15 to
0.2 in ln gain of 3.5 to 4, a tilt of 0.05, doubled for text and engine that differ. For
leave-model-out checks the same choice is made once without each model (`without` in params.json).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy.stats import norm, t

from quantmix.loss import backtest, calibrate, cases, evidence, features, prior, response
from quantmix.loss.calibrate import Hyper
from quantmix.loss.fit.curve import CurveFit

_GRID: Final[dict[str, tuple[float, ...]]] = {
    "form": (0.03, 0.045, 0.06, 0.08, 0.11),
    "mid": (0.0, 0.005, 0.01, 0.015, 0.02, 0.03),
    "group_sd": (0.1, 0.2, 0.3, 0.4, 0.6),
    "type_sd": (0.02, 0.05, 0.08, 0.12, 0.18),
    "tilt_sd": (0.03, 0.05, 0.07, 0.1),
    "ln_onset_sd": (0.1, 0.2, 0.3, 0.5, 0.8),
    "row_sd": (0.0005, 0.001, 0.0015, 0.002, 0.003),
}
_SOLVED: Final = tuple(round(0.1 * k, 1) for k in range(16))
_UNKNOWN_MIX: Final = (0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0)
_PASSES: Final = 2
# A little above 90 %: what is fitted on the same rows is a little too sure of itself.
_COVER: Final = 0.92
_MIN_ROWS: Final = 5
_NORMAL: Final = 1.65
_WIDEST: Final = 6.0
# What the same types cost one model on two texts, as sd of ln: 0.37 over eleven models, 0.44 over
# the six of them that are not sparse (last column of tests/bench/bench_sweeps.py, without
# GLM-4.7-Flash). A prior has to hold on any text.
_TEXT: Final = 0.4
# How many times the noise the uncertainty of the rise must be to decide, where only the prior
# speaks: it is so uncertain of any rise that few predictions are left to fit noise on otherwise.
_MOSTLY_PRIOR: Final = 2.0


# Leave-one-out result of one setting: negative log density by model.
_Losses = Mapping[str, float]


def start(curve: CurveFit) -> Hyper:
    """Return where the search begins: the middle of each grid."""
    return Hyper(
        power=round(curve.power, 3), ln_onset=round(curve.ln_c, 3), ln_onset_sd=0.3, tilt_sd=0.06,
        group_sd=0.3, type_sd=0.05, row_sd=0.0015, form=0.06, mid=0.01, unknown_mix=0.45,
        solved=0.0, quantiles=(1.645, 1.645), quantile_prior=1.645,
        moe_ln_scale=-4.2, moe_ln_scale_sd=0.3,
        dense_ln_scale=-4.8, dense_size_slope=0.4, dense_ln_scale_sd=0.3,
        hybrid_ln_scale=-4.8, hybrid_size_slope=0.4, hybrid_ln_scale_sd=0.3,
        size_curve=(0.5, -3.0, 0.0),
    )  # fmt: skip


def fit_hyper(
    curve: CurveFit, part: Sequence[Mapping[str, str]], recipes: Path | None
) -> dict[str, Any]:
    """Return the document of params.json: `hyper`, `without` each model, and how it was made.

    Rows of `part` (a text of their own) say how far models differ, and nothing else.
    """
    h = start(curve)
    found, _ = cases.gather(evidence.published(), recipes, h)
    apart = _apart(part, h)
    h = population([*(c for c in found if not backtest.fails(c)), *apart], h)
    # Again, since rows known by size only are placed by the size curve just found.
    found, _ = cases.gather(evidence.published(), recipes, h)
    usable = [c for c in found if not backtest.fails(c)]
    tested = [c for c in usable if len(c.exact) >= _MIN_ROWS]
    path = _descend(tested, h)
    best = _best(path, None)
    best = population([*usable, *apart], best)
    best = replace(best, unknown_mix=_unknown_mix(usable, best))
    best = _quantiles(usable, tested, best, None)
    # Last, with all else held: it says how recipes of a tool differ, not how models do.
    tilts = _solved_losses(recipes, best)
    best = replace(best, solved=_least_solved(tilts, None))
    without = {}
    for case in usable:
        others = [c for c in usable if c.model.id != case.model.id]
        alone = population([*others, *apart], _best(path, case.model.id))
        alone = replace(alone, unknown_mix=_unknown_mix(others, alone))
        alone = _quantiles(usable, tested, alone, case.model.id)
        alone = replace(alone, solved=_least_solved(tilts, case.model.id))
        without[case.model.id] = _differences(alone, best)
    return {
        "hyper": _plain(best),
        "without": without,
        "onset_c": round(math.exp(curve.ln_c), 3),
        "curve_rms_ln": round(curve.rms, 3),
        "n_models": len(tested),
        "n_rows": sum(len(c.exact) for c in tested),
        "command": "python -m quantmix.loss.fit --tables DIR --measurements CSV",
    }


def _apart(part: Sequence[Mapping[str, str]], h: Hyper) -> list[cases.Cases]:
    """Return the cases of models measured on another text, each on its own base."""
    rows = [replace(p, corpus=evidence.CORPUS) for p in evidence.parse_rows(part)]
    return cases.gather(rows, None, h)[0]


def population(found: Sequence[cases.Cases], h: Hyper) -> Hyper:
    """Return `h` with population means and spreads fitted to the models of `found`."""
    wide = replace(h, moe_ln_scale_sd=1.0, dense_ln_scale_sd=1.0, hybrid_ln_scale_sd=1.0)
    points = [p for p in (_point(c, wide) for c in found) if p is not None]
    sparse = [p for p in points if p.law == "sparse"]
    moe, _, moe_sd = _random_effects([(0.0, p.scale, p.variance) for p in sparse], slope=False)
    dense, dense_slope, dense_sd = _by_size(points, "dense")
    hybrid, hybrid_slope, hybrid_sd = _by_size(points, "hybrid")
    x, y = np.array([s for p in sparse for s in p.sizes]).T
    size = np.polynomial.polynomial.polyfit(x, y, 2)
    return replace(
        h, moe_ln_scale=round(moe, 2), moe_ln_scale_sd=round(moe_sd, 2),
        dense_ln_scale=round(dense, 2), dense_size_slope=round(dense_slope, 2),
        dense_ln_scale_sd=round(dense_sd, 2), hybrid_ln_scale=round(hybrid, 2),
        hybrid_size_slope=round(hybrid_slope, 2), hybrid_ln_scale_sd=round(hybrid_sd, 2),
        size_curve=tuple(round(float(c), 2) for c in size),
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Point:
    """One model's own scale with its variance, and ln damage of its mixes by ln(bpw/4)."""

    law: str
    smallness: float
    scale: float
    variance: float
    sizes: list[tuple[float, float]]


def _by_size(points: Sequence[_Point], law: str) -> tuple[float, float, float]:
    """Return mean at 27 B weights, slope towards small models, and spread under one law."""
    mine = [(p.smallness, p.scale, p.variance) for p in points if p.law == law]
    return _random_effects(mine, slope=True)


def _point(case: cases.Cases, wide: Hyper) -> _Point | None:
    exact = [case.bench.rows[i] for i in case.exact]
    if not case.bench.base_known or not exact:
        return None
    m = case.model
    known = calibrate.prior(
        case.bench.ln_base, case.bench.ln_base_sd, m.n_elements, prior.scale_law(m), wide
    )
    posterior = calibrate.fit(exact, known, wide)
    gains = np.exp(features.ln_gains())
    return _Point(
        law=prior.scale_law(m),
        smallness=math.log(27e9 / m.n_elements),
        scale=float(posterior.theta[response.SCALE]),
        variance=float(posterior.covariance[response.SCALE, response.SCALE]),
        sizes=[
            (
                math.log(min(max(row.bpw, 1.5), 9.0) / 4.0),
                math.log(float((row.w.sum(axis=0) * gains).sum())),
            )
            for row in exact
        ],
    )


def _random_effects(
    points: Sequence[tuple[float, float, float]], *, slope: bool
) -> tuple[float, float, float]:
    """Return mean, slope and the spread between models of (x, value, variance) points.

    The spread is iterated (Paule-Mandel) and includes the uncertainty of the mean; at least what
    one model differs by from text to text. It is what a normal interval must use to reach as far as
    Student's t at 90 %: a spread seen on eight models is itself uncertain.
    """
    x = np.array([p[0] for p in points])
    v = np.array([p[1] for p in points])
    var = np.array([p[2] for p in points])
    design = np.column_stack([np.ones_like(x), x]) if slope else np.ones((len(x), 1))
    between = 0.05
    for _ in range(60):
        weight = 1.0 / (var + between)
        normal = design.T @ (design * weight[:, None])
        beta = np.linalg.solve(normal, design.T @ (weight * v))
        excess = float(np.sum(weight * (v - design @ beta) ** 2)) - (len(v) - design.shape[1])
        between = max(0.0, between * (1.0 + 0.5 * excess / len(v)))
        between = max(between, 1e-4)
    spread = math.sqrt(between + float(np.linalg.inv(normal)[0, 0]))
    spread *= float(t.ppf(0.95, max(1, len(v) - design.shape[1])) / norm.ppf(0.95))
    return float(beta[0]), float(beta[1]) if slope else 0.0, max(spread, _TEXT)


def _descend(found: Sequence[cases.Cases], h: Hyper) -> list[tuple[Hyper, _Losses]]:
    """Return every setting tried, with its losses, along a coordinate descent."""
    tried: dict[Hyper, _Losses] = {h: _losses(found, h)}
    best = h
    for _ in range(_PASSES):
        for name, values in _GRID.items():
            for value in values:
                candidate = Hyper(**{**asdict(best), name: value})
                if candidate not in tried:
                    tried[candidate] = _losses(found, candidate)
            best = min(tried, key=lambda k: _total(tried[k], None))
    return list(tried.items())


def _losses(found: Sequence[cases.Cases], h: Hyper) -> _Losses:
    losses = {}
    for case in found:
        # The noise that models have in common: what one scatters beyond it comes on top.
        total = sum(
            _surprise(measured - p.ln_ppl, p.sd)
            for p, measured in backtest.predictions(case, h, inflate=False)
        )
        # A model with many recipes says more, but not in proportion: its rows resemble each other.
        losses[case.model.id] = total / math.sqrt(len(case.exact))
    return losses


def _surprise(off: float, sd: float) -> float:
    """Return the negative log density of Student's t (5 degrees of freedom), but for a constant."""
    return math.log(sd) + 3.0 * math.log1p((off / sd) ** 2 / 5.0)


def _unknown_mix(found: Sequence[cases.Cases], h: Hyper) -> float:
    """Return the form noise of a row known by size only: exact rows predicted from such rows."""
    totals = {}
    for value in _UNKNOWN_MIX:
        candidate = replace(h, unknown_mix=value)
        total = 0.0
        for case in found:
            for p, measured in backtest.predictions(case, candidate, loose_only=True):
                total += _surprise(measured - p.ln_ppl, p.sd) / math.sqrt(len(case.exact))
        totals[value] = total
    return min(totals, key=lambda v: totals[v])


def _solved_losses(recipes: Path | None, h: Hyper) -> dict[float, _Losses]:
    """Return the negative log density of solved recipes by model, for each ρ of the grid.

    Each recipe is predicted from the mixes of its model that were made by class.
    """
    out: dict[float, _Losses] = {}
    for rho in _SOLVED:
        candidate = replace(h, solved=rho)
        found, _ = cases.gather(evidence.published(), recipes, candidate)
        losses = out[rho] = {}
        for case in (c for c in found if not backtest.fails(c)):
            left = backtest.tool_predictions(case, candidate)
            total = 0.0
            for i, p, _ in left:
                low, high = p.interval(candidate)
                # The bounds hold a rise and its noise; half their width at 90 % is 1.645 sd.
                sd = max((high - low) / (2 * _NORMAL), h.row_sd)
                total += _surprise(case.bench.rows[i].ln_ppl - p.ln_ppl, sd)
            if left:
                losses[case.model.id] = total / math.sqrt(len(left))
    return out


def _least_solved(losses: Mapping[float, _Losses], without: str | None) -> float:
    """Return the ρ of least loss over the models but `without`."""
    return min(losses, key=lambda rho: _total(losses[rho], without))


def _total(losses: _Losses, without: str | None) -> float:
    return sum(v for m, v in losses.items() if m != without)


def _best(path: Sequence[tuple[Hyper, _Losses]], without: str | None) -> Hyper:
    return min(path, key=lambda t: _total(t[1], without))[0]


def _quantiles(
    usable: Sequence[cases.Cases], tested: Sequence[cases.Cases], h: Hyper, without: str | None
) -> Hyper:
    """Return `h` with the quantiles that cover 90 % of left-out rows, and of left-out models.

    Those of ln rise are fitted on predictions whose uncertainty is that of the rise, that of the
    noise on the other left-out rows, in turn: at high bits noise decides, at low bits the model.
    The rows of a model resemble each other: together they count like √n rows where other rows of
    the model are known, and like one where only the prior speaks, since the question there is how
    far the next model lies off.
    """
    rows, models = [], []
    for case in (c for c in tested if c.model.id != without):
        share = 1.0 / math.sqrt(len(case.exact))
        rows += [_Left(p, y, share) for p, y in backtest.predictions(case, h)]
    for case in (c for c in usable if c.model.id != without and c.bench.base_known):
        found = backtest.predictions(case, h, prior_only=True)
        models += [_Left(p, y, 1.0 / len(found)) for p, y in found]
    h = replace(h, quantiles=(_NORMAL, _NORMAL), quantile_prior=_NORMAL)
    alone = [x for x in models if x.decided_by_rise(_MOSTLY_PRIOR)]
    rise = [x for x in rows if x.decided_by_rise()]
    noise = [x for x in rows if not x.decided_by_rise()]
    for _ in range(4):
        h = _least(alone, lambda q, h=h: replace(h, quantile_prior=q))  # type: ignore[misc]
        h = _least(rise, lambda q, h=h: replace(h, quantiles=(q, h.quantiles[1])))  # type: ignore[misc]
        h = _least(noise, lambda q, h=h: replace(h, quantiles=(h.quantiles[0], q)))  # type: ignore[misc]
    return h


@dataclass(frozen=True, slots=True)
class _Left:
    """A prediction of what was left out, the measured ln PPL, and how much it counts."""

    prediction: calibrate.Prediction
    measured: float
    weight: float

    def decided_by_rise(self, mostly: float = 1.0) -> bool:
        """Whether its uncertainty is that of the rise: over `mostly` times the noise."""
        p = self.prediction
        return p.relative * p.rise > mostly * p.edge


def _least(left: Sequence[_Left], setting: Callable[[float], Hyper]) -> Hyper:
    """Return the setting of the least quantile whose intervals cover `_COVER` of `left`.

    Never less than what 90 % take of a normal distribution.
    """
    wanted = _COVER * sum(x.weight for x in left)
    for quantile in np.arange(_NORMAL, _WIDEST, 0.05):
        h = setting(round(float(quantile), 2))
        inside = 0.0
        for x in left:
            low, high = x.prediction.interval(h)
            inside += x.weight * (low <= x.measured <= high)
        if inside >= wanted:
            return h
    return setting(_WIDEST)


def _plain(h: Hyper) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(h).items()}


def _differences(h: Hyper, best: Hyper) -> dict[str, Any]:
    mine, theirs = _plain(h), _plain(best)
    return {k: v for k, v in mine.items() if v != theirs[k]}
