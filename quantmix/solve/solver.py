"""Solve the knapsack: bound, round, fill, then close the gap exactly on the few undecided groups.

1. Prices and a lower bound from the dual (`bound.py`), milliseconds.
2. A feasible choice: the dual's own, then every upgrade that still fits, best first.
3. Pool by pool, dynamic programming over the undecided groups (`core.py`); if the gap is still too
   wide, the large groups are enumerated against the convex curve of the small (`tighten.py`).
4. If that does not do either: reduced-cost fixing. An option whose reduced cost exceeds
   (choice - bound) cannot be in a better answer (Dantzig; Pisinger's core). What stays, a few
   options of some groups, goes to HiGHS.
5. Upgrades again, so that no single one that lowers the cost still fits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quantmix.solve.bound import (
    cheapest,
    lagrangian,
    priced_cost,
    prices_by_lp,
    prices_one_pool,
    total,
    usage,
)
from quantmix.solve.core import improve_pool
from quantmix.solve.exact import Limits, solve_core
from quantmix.solve.problem import FloatArray, IntArray, Problem, Solution
from quantmix.solve.tighten import tighten

_STATES = (150, 600)
"""States kept by the dynamic programme in its passes: a quick one, then a thorough one."""

_ROUGH = Limits(gap=1.0, seconds=0.0)  # the bound and some choice, nothing more


def solve(problem: Problem, limits: Limits | None = None) -> Solution:
    """Return the best choice found and a bound that proves how good it is.

    Every level z is a problem of its own; the bound is the least of theirs. The largest comes
    first (it allows every option), then the most promising; a level whose bound is no better than
    the best answer is not solved to the end.
    """
    limits = limits or Limits()
    best: Solution | None = None
    lowest = np.inf
    short: Solution | None = None
    waiting = [int(i) for i in np.argsort(-problem.levels, kind="stable")]
    bounds = dict.fromkeys(waiting, -np.inf)
    while waiting:
        i = min(waiting, key=lambda k: (bounds[k], waiting.index(k)))
        waiting.remove(i)
        cutoff = np.inf if best is None else best.objective * (1 - limits.gap / 2)
        if bounds[i] >= cutoff:
            lowest = min(lowest, bounds[i])
            continue
        cost = np.where(problem.level <= problem.levels[i], problem.cost, np.inf)
        capacity = problem.capacities[i]
        found = _solve_level(cost, problem.use, capacity, limits, int(problem.levels[i]), cutoff)
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
    """The LP relaxation at the first level: its objective and x, shape (G, J)."""

    objective: float
    x: FloatArray


def relax(problem: Problem) -> Relaxed | None:
    """Return the LP relaxation of a problem at its first level, or None when it is infeasible."""
    z, capacity = problem.levels[0], problem.capacities[0]
    cost = np.where(problem.level <= z, problem.cost, np.inf)
    if not np.isfinite(cost).any(axis=1).all():
        return None
    lp = prices_by_lp(cost, problem.use, capacity)
    if lp is None:
        return None
    x = lp[1]
    return Relaxed(float((np.where(np.isfinite(cost), cost, 0.0) * x).sum()), x)


def _solve_level(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    limits: Limits,
    level: int,
    cutoff: float = np.inf,
) -> Solution:
    """Solve for one value of z; once its bound reaches `cutoff` any choice will do."""
    if not np.isfinite(cost).any(axis=1).all():
        return _infeasible(cost, use, capacity, level)
    limited = np.isfinite(capacity)
    if limited.any() and not limited.all():
        part = _solve_level(cost, use[limited], capacity[limited], limits, level, cutoff)
        return _with_free_pools(part, use, limited)
    owner = _owners(cost, use)
    if owner is not None and len(np.unique(owner)) > 1:
        return _separately(cost, use, capacity, owner, limits, level, cutoff)
    start = _dual(cost, use, capacity)
    if start is None:
        return _infeasible(cost, use, capacity, level)
    prices, choice = start
    bound = lagrangian(cost, use, capacity, prices)
    if choice is None:
        choice, _ = solve_core(cost, use, capacity, prices, bound, None, limits)
        if choice is None:
            return _infeasible(cost, use, capacity, level)
    choice = fill(cost, use, capacity, choice, prices)
    if bound >= cutoff:
        objective = total(cost, choice)
        used = usage(use, choice)
        return Solution("feasible", choice, objective, bound, prices, used, level)
    enough = limits.gap * max(bound, 0.0)
    passes = _STATES if limits.seconds > 0 else _STATES[:1]
    choice = _by_pools(cost, use, capacity, choice, prices, bound, enough, passes)
    objective = total(cost, choice)
    if limits.seconds > 0 and len(capacity) == 1 and objective - bound > limits.gap * objective:
        choice, bound = _tightened(cost, use, capacity, choice, prices, bound)
        objective = total(cost, choice)
    if limits.seconds > 0 and objective - bound > limits.gap * abs(objective):
        better, proven = solve_core(cost, use, capacity, prices, bound, choice, limits)
        bound = max(bound, min(proven, objective))
        if better is not None:
            better = fill(cost, use, capacity, better, prices)
            if total(cost, better) < objective:
                choice, objective = better, total(cost, better)
    return Solution("feasible", choice, objective, bound, prices, usage(use, choice), level)


def _tightened(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    choice: IntArray,
    prices: FloatArray,
    bound: float,
) -> tuple[IntArray, float]:
    """Enumerate the large groups of a pool: a better bound, and often a better choice."""
    left = float(capacity[0] - usage(use, choice)[0])
    tight = tighten(cost, use[0], left, choice, float(prices[0]))
    if tight is None:
        return choice, bound
    small = np.setdiff1d(np.arange(len(choice)), tight.large)
    for large in tight.candidates:
        taken = float(use[0][tight.large, large].sum())
        rest = np.array([capacity[0] - taken])
        if not _least_fits(cost[small], use[:, small], rest):
            continue
        part = _solve_level(cost[small], use[:, small], rest, Limits(gap=1e-6, seconds=0.0), 0)
        if part.status == "infeasible":
            continue
        whole = choice.copy()
        whole[tight.large], whole[small] = large, part.choice
        whole = fill(cost, use, capacity, whole, prices)
        if total(cost, whole) < total(cost, choice):
            choice = whole
    return choice, max(bound, min(tight.lower_bound, total(cost, choice)))


def _owners(cost: FloatArray, use: FloatArray) -> IntArray | None:
    """Return the only pool that each group uses, or None when a group uses several."""
    touched = (np.where(np.isfinite(cost), use, 0.0) != 0).any(axis=2)
    if (touched.sum(axis=0) > 1).any():
        return None
    owner: IntArray = touched.argmax(axis=0).astype(np.int64)
    return owner


def _separately(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    owner: IntArray,
    limits: Limits,
    level: int,
    cutoff: float,
) -> Solution:
    """Solve every pool on its own when no group uses two; the bounds add up."""
    if limits.seconds > 0 and np.isfinite(cutoff):
        quick = _separately(cost, use, capacity, owner, _ROUGH, level, np.inf)
        if quick.status == "infeasible" or quick.lower_bound >= cutoff:
            return quick
    n_groups, n_pools = len(cost), len(capacity)
    choice = np.zeros(n_groups, dtype=np.int64)
    prices, shortfall = np.zeros(n_pools), np.zeros(n_pools)
    bound, feasible = 0.0, True
    each = replace(limits, seconds=limits.seconds / n_pools)
    for p in range(n_pools):
        mine = np.nonzero(owner == p)[0]
        if len(mine) == 0:
            shortfall[p] = max(0.0, -float(capacity[p]))
            feasible &= bool(capacity[p] >= 0)
            continue
        part = _solve_level(cost[mine], use[[p]][:, mine], capacity[[p]], each, level)
        prices[p] = part.prices[0]
        if part.status == "infeasible":
            feasible = False
            shortfall[p] = part.shortfall[0]
            continue
        choice[mine] = part.choice
        bound += part.lower_bound
    if not feasible:
        nothing = np.zeros(0, dtype=np.int64)
        return Solution(
            "infeasible", nothing, np.inf, np.inf, prices, np.zeros(n_pools), level, shortfall
        )
    return Solution(
        "feasible", choice, total(cost, choice), bound, prices, usage(use, choice), level
    )


def _by_pools(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    choice: IntArray,
    prices: FloatArray,
    bound: float,
    enough: float,
    passes: tuple[int, ...],
) -> IntArray:
    """Improve the choice inside one pool after another, until the gap is small or nothing helps."""
    rows = np.arange(len(choice))
    for most_states in passes:
        for p in range(len(capacity)):
            if total(cost, choice) - bound <= enough:
                return choice
            others = np.delete(np.arange(len(capacity)), p)
            here = use[others]
            same = (here <= here[:, rows, choice][:, :, None]).all(axis=0)
            left = float(capacity[p] - usage(use, choice)[p])
            better = improve_pool(
                np.where(same, cost, np.inf), use[p], left, choice, float(prices[p]), most_states
            )
            choice = fill(cost, use, capacity, better, prices)
    return choice


def _with_free_pools(part: Solution, use: FloatArray, limited: NDArray[np.bool_]) -> Solution:
    """Give a solution of the limited pools entries for the others: price 0, no shortfall."""
    prices = np.zeros(len(limited))
    prices[limited] = part.prices
    shortfall = np.zeros(len(limited))
    if part.status == "infeasible":
        shortfall[limited] = part.shortfall
        return replace(part, prices=prices, used=np.zeros(len(limited)), shortfall=shortfall)
    return replace(part, prices=prices, used=usage(use, part.choice))


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
    priced = priced_cost(cost, use, prices)
    while True:
        fits = cost < cost[rows, choice][:, None]
        for p in range(len(capacity)):
            fits &= use[p] <= (use[p, rows, choice] + left[p])[:, None]
        if not fits.any():
            return choice
        worth = np.where(fits, priced[rows, choice][:, None] - priced, -np.inf)
        g, j = np.unravel_index(int(worth.argmax()), worth.shape)
        left = left - (use[:, g, j] - use[:, g, choice[g]])
        choice[g] = j


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


__all__ = ["Limits", "cheapest", "fill", "solve"]
