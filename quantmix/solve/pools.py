"""Pools that can be taken one at a time: a single knapsack, and several that share no group.

Where every group uses one pool only (layers on their GPU, experts in RAM), each pool is a knapsack
of its own and the bounds add up. What is solved of one pool is remembered, since related problems
differ in a few pools only. `level` couples pools by the price of one that all groups use.
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b

import numpy as np

from quantmix.solve.bound import lagrangian, prices_one_pool, total, usage
from quantmix.solve.core import improve_pool
from quantmix.solve.exact import Limits, solve_core
from quantmix.solve.problem import FloatArray, IntArray, Solution
from quantmix.solve.rounding import fill
from quantmix.solve.tighten import tighten

_STATES = (150, 600)
"""States kept by the dynamic programme in its passes: a quick one, then a thorough one."""

ROUGH = Limits(gap=1.0, seconds=0.0)
"""The bound and some choice, nothing more."""

Memo = dict[bytes, tuple[Limits, Solution]]
"""Best answers of single pools and their limits, by a digest of what decides them; shared by
related problems."""


def solve_pool(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    limits: Limits,
    level: int = 0,
    cutoff: float = np.inf,
) -> Solution:
    """Solve the knapsack of one pool, `use` (1, G, J) and `capacity` (1,), for one value of z.

    Once the bound reaches `cutoff` any choice will do.
    """
    if not np.isfinite(cost).any(axis=1).all() or not least_fits(cost, use, capacity):
        return infeasible(cost, use, capacity, level)
    price, choice = prices_one_pool(cost, use, float(capacity[0]))
    prices = np.array([price])
    bound = lagrangian(cost, use, capacity, prices)
    choice = fill(cost, use, capacity, choice, prices)
    if bound < cutoff:
        choice, bound = _closer(cost, use, capacity, choice, prices, bound, limits)
    objective = total(cost, choice)
    return Solution("feasible", choice, objective, bound, prices, usage(use, choice), level)


def _closer(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    choice: IntArray,
    prices: FloatArray,
    bound: float,
    limits: Limits,
) -> tuple[IntArray, float]:
    """Close the gap between a choice of one pool and its bound, cheapest means first."""
    enough = limits.enough(bound)
    choice = by_pools(cost, use, capacity, choice, prices, bound, limits)
    if limits.seconds > 0 and total(cost, choice) - bound > enough:
        choice, bound = _tightened(cost, use, capacity, choice, prices, bound)
    if limits.seconds > 0 and total(cost, choice) - bound > enough:
        choice, bound = by_core(cost, use, capacity, choice, prices, bound, limits)
    return choice, bound


def by_core(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    choice: IntArray,
    prices: FloatArray,
    bound: float,
    limits: Limits,
) -> tuple[IntArray, float]:
    """Return the better of the choice and what the exact solver makes of the core, and the bound.

    Pools may share groups.
    """
    objective = total(cost, choice)
    better, proven = solve_core(cost, use, capacity, prices, bound, choice, limits)
    bound = max(bound, min(proven, objective))
    if better is not None:
        better = fill(cost, use, capacity, better, prices)
        if total(cost, better) < objective:
            choice = better
    return choice, bound


def by_pools(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    choice: IntArray,
    prices: FloatArray,
    bound: float,
    limits: Limits,
) -> IntArray:
    """Improve the choice inside one pool after another, until the gap is small or nothing helps.

    Pools may share groups.
    """
    enough = limits.enough(bound)
    passes = _STATES if limits.seconds > 0 else _STATES[:1]
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
        if not least_fits(cost[small], use[:, small], rest):
            continue
        part = solve_pool(cost[small], use[:, small], rest, Limits(gap=1e-6, seconds=0.0))
        if part.status == "infeasible":
            continue
        whole = choice.copy()
        whole[tight.large], whole[small] = large, part.choice
        whole = fill(cost, use, capacity, whole, prices)
        if total(cost, whole) < total(cost, choice):
            choice = whole
    return choice, max(bound, min(tight.lower_bound, total(cost, choice)))


def owners(cost: FloatArray, use: FloatArray) -> IntArray | None:
    """Return the only pool that each group uses, (G,), or None when a group uses several.

    `cost` is (G, J), +inf where an option is not allowed; `use` is (P, G, J).
    """
    touched = (np.where(np.isfinite(cost), use, 0.0) != 0).any(axis=2)
    if (touched.sum(axis=0) > 1).any():
        return None
    owner: IntArray = touched.argmax(axis=0).astype(np.int64)
    return owner


def separately(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    owner: IntArray,
    limits: Limits,
    level: int,
    cutoff: float = np.inf,
    memo: Memo | None = None,
) -> Solution:
    """Solve every pool on its own when no group uses two; the bounds add up.

    `use` is (P, G, J), `capacity` (P,), and `owner` (G,) the pool of each group, as of `owners`.
    Quickly first; then pools with the widest gaps thoroughly, until the sum is close enough.
    """
    n_pools = len(capacity)
    mine = [np.nonzero(owner == p)[0] for p in range(n_pools)]

    def solved(p: int, how: Limits) -> Solution:
        return _remembered(cost[mine[p]], use[[p]][:, mine[p]], capacity[[p]], how, memo)

    def together(parts: list[Solution]) -> Solution:
        return _joined(parts, mine, cost, use, level)

    if np.isfinite(cutoff):
        rough = together([solved(p, ROUGH) for p in range(n_pools)])
        if rough.status == "infeasible" or rough.lower_bound >= cutoff:
            return rough
    quick = replace(limits, seconds=0.0)
    parts = [solved(p, quick) for p in range(n_pools)]
    whole = together(parts)
    if whole.status == "infeasible" or limits.seconds == 0:
        return whole
    enough = limits.enough(whole.lower_bound) / 2
    for p in sorted(range(n_pools), key=lambda p: parts[p].lower_bound - parts[p].objective):
        gap = sum(s.objective - s.lower_bound for s in parts)
        if gap <= enough:
            break
        allowance = max(enough / n_pools, enough - gap + parts[p].objective - parts[p].lower_bound)
        each = replace(limits, seconds=limits.seconds / n_pools, absolute=allowance)
        thorough = solved(p, each)
        if thorough.objective <= parts[p].objective:
            parts[p] = replace(
                thorough, lower_bound=max(thorough.lower_bound, parts[p].lower_bound)
            )
    return together(parts)


def _remembered(
    cost: FloatArray, use: FloatArray, capacity: FloatArray, limits: Limits, memo: Memo | None
) -> Solution:
    """Solve one pool, or return what it gave before."""
    if len(cost) == 0:
        nothing = np.zeros(0, dtype=np.int64)
        short = np.maximum(0.0, -capacity)
        status = "infeasible" if short.any() else "feasible"
        return Solution(status, nothing, 0.0, 0.0, np.zeros(1), np.zeros(1), 0, short)
    if memo is None:
        return solve_pool(cost, use, capacity, limits)
    digest = blake2b(repr(cost.shape).encode(), digest_size=20)
    for array in (capacity, cost, use):
        digest.update(np.ascontiguousarray(array).data)
    key = digest.digest()
    if key not in memo or not _suffices(*memo[key], limits):
        memo[key] = limits, solve_pool(cost, use, capacity, limits)
    return memo[key][1]


def _suffices(had: Limits, found: Solution, limits: Limits) -> bool:
    """Whether an answer found under `had` is as good as `limits` would give."""
    enough = limits.enough(found.lower_bound)
    if found.status == "infeasible" or found.objective - found.lower_bound <= enough:
        return True
    tolerance = had.enough(found.lower_bound)
    return had.seconds >= limits.seconds and tolerance <= 2 * enough


def _joined(
    parts: list[Solution], mine: list[IntArray], cost: FloatArray, use: FloatArray, level: int
) -> Solution:
    """Put the answers of separate pools together."""
    prices = np.array([p.prices[0] for p in parts])
    if any(p.status == "infeasible" for p in parts):
        short = np.array([p.shortfall[0] if p.status == "infeasible" else 0.0 for p in parts])
        nothing, none = np.zeros(0, dtype=np.int64), np.zeros(len(parts))
        return Solution("infeasible", nothing, np.inf, np.inf, prices, none, level, short)
    choice = np.zeros(len(cost), dtype=np.int64)
    for part, here in zip(parts, mine, strict=True):
        choice[here] = part.choice
    bound = float(sum(p.lower_bound for p in parts))
    return Solution(
        "feasible", choice, total(cost, choice), bound, prices, usage(use, choice), level
    )


def least_fits(cost: FloatArray, use: FloatArray, capacity: FloatArray) -> bool:
    """Whether every pool alone could be satisfied by the options that use least of it."""
    least = np.where(np.isfinite(cost), use, np.inf).min(axis=2).sum(axis=1)
    return bool((least <= capacity).all())


def infeasible(cost: FloatArray, use: FloatArray, capacity: FloatArray, level: int) -> Solution:
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
