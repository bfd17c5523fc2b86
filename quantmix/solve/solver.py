"""Solve the knapsack: bound, round, fill, then close the gap exactly on the few undecided groups.

1. Prices and a lower bound from the dual (`bound.py`), milliseconds.
2. A feasible choice: the dual's own, then every upgrade that still fits, best first.
3. Pool by pool, dynamic programming over the undecided groups (`core.py`); if the gap is still too
   wide, the large groups are enumerated against the convex curve of the small (`tighten.py`).
4. If that does not do either: reduced-cost fixing. An option whose reduced cost exceeds
   (choice - bound) cannot be in a better answer (Dantzig; Pisinger's core). What stays, a few
   options of some groups, goes to HiGHS.
5. Upgrades again, so that no single one that lowers the cost still fits.

This module walks the levels z; `level.py` solves one of them, `pools.py` what falls apart.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantmix.solve.bound import cheapest, lagrangian, prices_by_lp
from quantmix.solve.exact import Limits
from quantmix.solve.level import bound_at_price, is_coupled, solve_level
from quantmix.solve.pools import Memo
from quantmix.solve.problem import FloatArray, Problem, Solution
from quantmix.solve.rounding import fill

_QUICK = Limits(gap=2e-3, seconds=0.0)  # which level to look at first

_COUPLED_NEAR = (1e-2, 5e-3)
"""Levels that promise less than this are not looked at where no gap is closed anyway: in a large
problem whose pools are coupled; of a quick solve, and of a thorough one."""


def solve(problem: Problem, limits: Limits | None = None, memo: Memo | None = None) -> Solution:
    """Return the best choice found and a bound that proves how good it is.

    Every level z is a problem of its own; the bound is the least of theirs. The best of a quick
    pass comes first (else the largest, which allows every option), then the most promising; a
    level whose bound is no better than the best answer is not solved to the end. A `memo` shared
    by problems that differ in a few pools only spares solving the others again.
    """
    limits = limits or Limits()
    memo = {} if memo is None else memo
    best: Solution | None = None
    lowest = np.inf
    short: Solution | None = None
    waiting = [int(i) for i in np.argsort(-problem.levels, kind="stable")]
    if limits.seconds > 0 and len(waiting) > 1:
        first = solve(problem, _QUICK, memo)
        waiting.sort(key=lambda k: problem.levels[k] != first.level)
    near = limits.gap / 2
    if is_coupled(problem.cost, problem.use, problem.capacities[0]):
        near = max(near, _COUPLED_NEAR[0 if limits.seconds == 0 else 1])
    bounds = dict.fromkeys(waiting, -np.inf)
    while waiting:
        i = min(waiting, key=lambda k: (bounds[k], waiting.index(k)))
        waiting.remove(i)
        cutoff = np.inf if best is None else best.objective * (1 - near)
        if bounds[i] >= cutoff:
            lowest = min(lowest, bounds[i])
            continue
        cost = np.where(problem.level <= problem.levels[i], problem.cost, np.inf)
        capacity = problem.capacities[i]
        hint = None if best is None else best.prices
        z = int(problem.levels[i])
        found = solve_level(cost, problem.use, capacity, limits, z, cutoff, memo, hint)
        if found.status == "infeasible":
            if short is None or found.shortfall.sum() < short.shortfall.sum():
                short = found
            continue
        lowest = min(lowest, found.lower_bound)
        if best is None or found.objective < best.objective:
            best = found
        for k in waiting:
            other = np.where(problem.level <= problem.levels[k], problem.cost, np.inf)
            value = lagrangian(other, problem.use, problem.capacities[k], found.prices)
            bounds[k] = max(bounds[k], value)
    if best is None:
        assert short is not None, "a problem has at least one level"
        return short
    bound = min(lowest, best.objective)
    done = best.objective - bound <= limits.gap * abs(best.objective) + 1e-15
    return Solution(
        "optimal" if done else best.status,
        best.choice,
        best.objective,
        bound,
        best.prices,
        best.used,
        best.level,
    )


@dataclass(frozen=True)
class Relaxed:
    """The LP relaxation at one level: its objective, x of shape (G, J), prices (P,)."""

    objective: float
    x: FloatArray
    prices: FloatArray


def relax(problem: Problem, at: int = 0) -> Relaxed | None:
    """Return the LP relaxation of a problem at level `at`, or None when it is infeasible."""
    z, capacity = problem.levels[at], problem.capacities[at]
    cost = np.where(problem.level <= z, problem.cost, np.inf)
    if not np.isfinite(cost).any(axis=1).all():
        return None
    lp = prices_by_lp(cost, problem.use, capacity)
    if lp is None:
        return None
    prices, x = lp
    return Relaxed(float((np.where(np.isfinite(cost), cost, 0.0) * x).sum()), x, prices)


def relaxed_at_price(problem: Problem, price: float, memo: Memo | None = None) -> float:
    """Return the bound at the first level for a given price of the last pool; cheaper than an LP.

    Pools without a limit must not be the last; +inf when nothing fits, -inf when pools are mixed.
    """
    cost = np.where(problem.level <= problem.levels[0], problem.cost, np.inf)
    if not np.isfinite(cost).any(axis=1).all():
        return np.inf
    limited = np.isfinite(problem.capacities[0])
    return bound_at_price(cost, problem.use[limited], problem.capacities[0][limited], price, memo)


__all__ = ["Limits", "cheapest", "fill", "solve"]
