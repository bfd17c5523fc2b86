"""Solve the knapsack: bound, round, fill, then close the gap exactly on the few undecided groups.

1. Prices and a lower bound from the dual (`bound.py`), milliseconds.
2. A feasible choice: the dual's own, then every upgrade that still fits, best first.
3. Reduced-cost fixing: an option whose reduced cost exceeds (choice - bound) cannot be in a better
   answer (Dantzig; Pisinger's core). What stays, a few options of some groups, goes to HiGHS.
4. Upgrades again, so that no single one that lowers the cost still fits.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from quantmix.solve.bound import (
    cheapest,
    lagrangian,
    priced_cost,
    prices_by_lp,
    prices_one_pool,
    usage,
)
from quantmix.solve.problem import FloatArray, IntArray, Problem, Solution

_CORE_LIMIT = 6000
"""Most 0/1 variables handed to HiGHS; beyond it the core keeps those of least reduced cost."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop: relative gap, nodes and seconds of the exact step."""

    gap: float = 1e-5
    nodes: int = 2000
    seconds: float = 10.0


def solve(problem: Problem, limits: Limits | None = None) -> Solution:
    """Return the best choice found and a bound that proves how good it is.

    Every level z is a problem of its own; the bound is the least of theirs.
    """
    limits = limits or Limits()
    best: Solution | None = None
    lowest = np.inf
    short: Solution | None = None
    for z, capacity in zip(problem.levels, problem.capacities, strict=True):
        cost = np.where(problem.level <= z, problem.cost, np.inf)
        found = _solve_level(cost, problem.use, capacity, limits, int(z))
        if found.status == "infeasible":
            if short is None or found.shortfall.sum() < short.shortfall.sum():
                short = found
            continue
        lowest = min(lowest, found.lower_bound)
        if best is None or found.objective < best.objective:
            best = found
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


def _solve_level(
    cost: FloatArray, use: FloatArray, capacity: FloatArray, limits: Limits, level: int
) -> Solution:
    """Solve for one value of z."""
    if not np.isfinite(cost).any(axis=1).all():
        return _infeasible(cost, use, capacity, level)
    start = _dual(cost, use, capacity)
    if start is None:
        return _infeasible(cost, use, capacity, level)
    prices, choice = start
    bound = lagrangian(cost, use, capacity, prices)
    if choice is None:
        choice = _exact(cost, use, capacity, prices, bound, None, limits)
        if choice is None:
            return _infeasible(cost, use, capacity, level)
    choice = fill(cost, use, capacity, choice, prices)
    objective = _total(cost, choice)
    if objective - bound > limits.gap * abs(objective):
        better = _exact(cost, use, capacity, prices, bound, choice, limits)
        if better is not None:
            better = fill(cost, use, capacity, better, prices)
            if _total(cost, better) < objective:
                choice, objective = better, _total(cost, better)
    return Solution("feasible", choice, objective, bound, prices, usage(use, choice), level)


def _dual(
    cost: FloatArray, use: FloatArray, capacity: FloatArray
) -> tuple[FloatArray, IntArray | None] | None:
    """Return prices and a fitting choice (None when rounding found none), or None if infeasible."""
    if not _least_fits(cost, use, capacity):
        return None
    if use.shape[0] == 1:
        price, choice = prices_one_pool(cost, use, float(capacity[0]))
        return np.array([price]), choice
    lp = prices_by_lp(cost, use, capacity)
    if lp is None:
        return None
    prices, x = lp
    return prices, _round(cost, use, capacity, prices, x)


def _least_fits(cost: FloatArray, use: FloatArray, capacity: FloatArray) -> bool:
    """Whether every pool alone could be satisfied by the options that use least of it."""
    least = np.where(np.isfinite(cost), use, np.inf).min(axis=2).sum(axis=1)
    return bool((least <= capacity).all())


def _round(
    cost: FloatArray, use: FloatArray, capacity: FloatArray, prices: FloatArray, x: FloatArray
) -> IntArray | None:
    """Round an LP solution: whole groups stay, split ones take what fits, cheapest priced first."""
    choice: IntArray = x.argmax(axis=1).astype(np.int64)
    split = np.nonzero(x.max(axis=1) < 1 - 1e-9)[0]
    if (usage(use, choice) <= capacity).all():
        return choice
    priced = priced_cost(cost, use, prices)
    rest = np.setdiff1d(np.arange(len(choice)), split)
    left = capacity - use[:, rest, choice[rest]].sum(axis=1)
    for g in sorted(split, key=lambda g: -float(use[:, g, choice[g]].sum())):
        order = np.argsort(priced[g], kind="stable")
        fits = [j for j in order if np.isfinite(cost[g, j]) and (use[:, g, j] <= left).all()]
        if not fits:
            return _repair(cost, use, capacity, prices, choice)
        choice[g] = fits[0]
        left = left - use[:, g, fits[0]]
    return choice if (usage(use, choice) <= capacity).all() else None


def _repair(
    cost: FloatArray, use: FloatArray, capacity: FloatArray, prices: FloatArray, choice: IntArray
) -> IntArray | None:
    """Swap options until every pool fits: per step the least cost per unit of overflow removed."""
    choice = choice.copy()
    rows = np.arange(len(choice))
    for _ in range(20 * len(choice)):
        over = usage(use, choice) - capacity
        if (over <= 0).all():
            return choice
        weight = np.where(over > 0, 1.0 / np.maximum(np.abs(capacity), 1.0), 0.0)
        weight[~np.isfinite(weight)] = 0.0
        freed = np.tensordot(weight, use[:, rows, choice][:, :, None] - use, axes=1)
        extra = cost - cost[rows, choice][:, None]
        other = np.where(over > 0, 0.0, prices)
        extra = extra + np.tensordot(other, use - use[:, rows, choice][:, :, None], axes=1)
        room = (use - use[:, rows, choice][:, :, None] <= np.maximum(-over, 0)[:, None, None]) | (
            over > 0
        )[:, None, None]
        usable = (freed > 0) & np.isfinite(cost) & room.all(axis=0)
        if not usable.any():
            return None
        rate = np.full(cost.shape, np.inf)
        rate[usable] = np.maximum(extra[usable], 0.0) / freed[usable]
        g, j = np.unravel_index(int(rate.argmin()), rate.shape)
        choice[g] = j
    return None


def fill(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    choice: IntArray,
    prices: FloatArray,
) -> IntArray:
    """Apply single upgrades that lower the cost and still fit until none is left.

    Of those that fit, the one that lowers the priced cost most comes first; ties go to the first
    group. The result is maximal, and never costs more than what came in.
    """
    choice = choice.copy()
    rows = np.arange(len(choice))
    left = capacity - usage(use, choice)
    while True:
        now_cost = cost[rows, choice][:, None]
        extra = use - use[:, rows, choice][:, :, None]
        gain = now_cost - cost
        fits = (extra <= left[:, None, None]).all(axis=0) & (gain > 0)
        if not fits.any():
            return choice
        worth = np.where(fits, gain - np.tensordot(prices, extra, axes=1), -np.inf)
        if not np.isfinite(worth.max()):
            return choice
        g, j = np.unravel_index(int(worth.argmax()), worth.shape)
        left = left - extra[:, g, j]
        choice[g] = j


def _exact(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    prices: FloatArray,
    bound: float,
    incumbent: IntArray | None,
    limits: Limits,
) -> IntArray | None:
    """Solve the core with HiGHS; None when it finds nothing better within its limits."""
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    reduced = priced_cost(cost, use, prices)
    reduced = reduced - reduced.min(axis=1, keepdims=True)
    room = np.inf if incumbent is None else _total(cost, incumbent) - bound
    keep = np.isfinite(cost) & (reduced <= room * (1 + 1e-9) + 1e-15)
    if keep.sum() > _CORE_LIMIT + len(cost):
        keep &= reduced <= np.partition(reduced[keep], _CORE_LIMIT)[_CORE_LIMIT]
    keep[np.arange(len(cost)), reduced.argmin(axis=1)] = True
    if incumbent is not None:
        keep[np.arange(len(cost)), incumbent] = True
    fixed = keep.sum(axis=1) == 1
    choice = keep.argmax(axis=1).astype(np.int64)
    if fixed.all():
        return choice if (usage(use, choice) <= capacity).all() else None
    left = capacity - use[:, fixed, choice[fixed]].sum(axis=1)
    open_groups = np.nonzero(~fixed)[0]
    g_index, j_index = np.nonzero(keep[open_groups])
    groups = open_groups[g_index]
    c = cost[groups, j_index]
    scale_c = float(np.abs(c).max()) or 1.0
    bounded = np.nonzero(np.isfinite(left))[0]
    scale = np.maximum(np.abs(left[bounded]), 1.0)
    one_each = csr_matrix((np.ones(len(groups)), (g_index, np.arange(len(groups)))))
    pool_rows = csr_matrix(use[bounded][:, groups, j_index] / scale[:, None])
    constraints = [LinearConstraint(one_each, 1, 1)]
    if len(bounded):
        constraints.append(LinearConstraint(pool_rows, -np.inf, left[bounded] / scale))
    fixed_cost = float(cost[fixed, choice[fixed]].sum())
    absolute = limits.gap * max(bound, 0.0) / 2
    result = milp(
        c / scale_c,
        integrality=np.ones(len(groups)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={
            "time_limit": limits.seconds,
            "node_limit": limits.nodes,
            "mip_rel_gap": min(1.0, absolute / max(bound - fixed_cost, absolute, 1e-300)),
        },
    )
    if result.x is None:
        return None
    picked = np.nonzero(result.x > 0.5)[0]
    if len(picked) != len(open_groups):
        return None
    choice[groups[picked]] = j_index[picked]
    return choice if (usage(use, choice) <= capacity).all() else None


def _infeasible(cost: FloatArray, use: FloatArray, capacity: FloatArray, level: int) -> Solution:
    """Say by how much the least use of every pool exceeds it."""
    allowed = np.where(np.isfinite(cost), use, np.inf)
    least = allowed.min(axis=2)
    least = np.where(np.isfinite(least), least, 0.0).sum(axis=1)
    missing = np.maximum(0.0, least - capacity)
    empty = np.zeros(0, dtype=np.int64)
    return Solution(
        "infeasible",
        empty,
        np.inf,
        np.inf,
        np.zeros(len(capacity)),
        np.zeros(len(capacity)),
        level,
        missing,
    )


def _total(cost: FloatArray, choice: IntArray) -> float:
    return float(cost[np.arange(len(choice)), choice].sum())


__all__ = ["Limits", "cheapest", "fill", "solve"]
