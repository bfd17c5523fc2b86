"""One knapsack with fixed capacities: the steps of `solver`, and how pools are taken apart.

Where every group uses one pool only (layers on their GPU, experts in RAM), each pool is a knapsack
of its own and the bounds add up. A last pool that all groups use (damage while seconds are
minimised, seconds while damage is) couples them: for a price on it they are separate again, and
the price is searched (Everett 1963).
"""

from __future__ import annotations

from dataclasses import replace
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from quantmix.solve.bound import lagrangian, prices_by_lp, prices_one_pool, total, usage
from quantmix.solve.core import improve_pool
from quantmix.solve.exact import Limits, solve_core
from quantmix.solve.problem import FloatArray, IntArray, Solution
from quantmix.solve.rounding import fill, round_lp
from quantmix.solve.tighten import tighten

_STATES = (150, 600)
"""States kept by the dynamic programme in its passes: a quick one, then a thorough one."""

_ROUGH = Limits(gap=1.0, seconds=0.0)  # the bound and some choice, nothing more
_BETTER = Limits(gap=1e-3, seconds=0.0)

_PRICE_TRIES = 6
_PRICE_STEPS = (1.05, 1.2, 2.0, 10.0, 1e3)
"""Factors by which the price of the coupling pool grows until the choice keeps to it."""
_PRICE_NEAR = 1.02
_LITTLE_OVER = 1.05

_CORE_GROUPS = 300
"""Most groups of coupled pools that HiGHS gets: beyond, it takes seconds to gain nothing."""

Memo = dict[bytes, tuple[Limits, Solution]]
"""Best answers of single pools and their limits, by a digest of what decides them; shared by
related problems."""


def solve_level(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    limits: Limits,
    level: int,
    cutoff: float = np.inf,
    memo: Memo | None = None,
    hint: FloatArray | None = None,
) -> Solution:
    """Solve for one value of z.

    Once the bound reaches `cutoff` any choice will do, or none: status `cut`, with its bound.
    `hint` are prices of a related problem; they spare the LP where they prove enough.
    """
    if not np.isfinite(cost).any(axis=1).all():
        return _infeasible(cost, use, capacity, level)
    limited = np.isfinite(capacity)
    if limited.any() and not limited.all():
        there = None if hint is None else hint[limited]
        part = solve_level(
            cost, use[limited], capacity[limited], limits, level, cutoff, memo, there
        )
        return _with_free_pools(part, use, limited)
    owner = _owners(cost, use)
    if owner is not None and len(np.unique(owner)) > 1:
        return _separately(cost, use, capacity, owner, limits, level, cutoff, memo)
    if not _least_fits(cost, use, capacity):
        return _infeasible(cost, use, capacity, level)
    choice: IntArray | None
    if len(capacity) == 1:
        price, choice = prices_one_pool(cost, use, float(capacity[0]))
        prices = np.array([price])
        bound = lagrangian(cost, use, capacity, prices)
    else:
        if hint is not None and np.isfinite(cutoff):
            bound = bound_at_price(cost, use, capacity, float(hint[-1]), memo)
            if bound >= cutoff:
                return _cut(bound, hint, level)
        lp = prices_by_lp(cost, use, capacity)
        if lp is None:
            return _infeasible(cost, use, capacity, level)
        prices = lp[0]
        bound = lagrangian(cost, use, capacity, prices)
        if bound >= cutoff:
            return _cut(bound, prices, level)
        choice = _by_price(cost, use, capacity, prices, bound, limits, memo)
        if choice is None:
            choice = round_lp(cost, use, capacity, *lp)
        if choice is None:
            choice, _ = solve_core(cost, use, capacity, prices, bound, None, limits)
        if choice is None:
            return _infeasible(cost, use, capacity, level)
    choice = fill(cost, use, capacity, choice, prices)
    if bound < cutoff:
        choice, bound = _closer(cost, use, capacity, choice, prices, bound, limits, memo)
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
    memo: Memo | None,
) -> tuple[IntArray, float]:
    """Close the gap between a choice and its bound, cheapest means first."""
    enough = max(limits.gap * max(bound, 0.0), limits.absolute)
    passes = _STATES if limits.seconds > 0 else _STATES[:1]
    choice = _by_pools(cost, use, capacity, choice, prices, bound, enough, passes)
    objective = total(cost, choice)
    if limits.seconds > 0 and len(capacity) == 1 and objective - bound > enough:
        choice, bound = _tightened(cost, use, capacity, choice, prices, bound)
        objective = total(cost, choice)
    if limits.seconds > 0 and objective - bound > enough:
        if len(capacity) > 1 and len(cost) > _CORE_GROUPS:
            return _thorough_at_price(cost, use, capacity, choice, prices, bound, limits, memo)
        better, proven = solve_core(cost, use, capacity, prices, bound, choice, limits)
        bound = max(bound, min(proven, objective))
        if better is not None:
            better = fill(cost, use, capacity, better, prices)
            if total(cost, better) < objective:
                choice = better
    return choice, bound


def _thorough_at_price(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    choice: IntArray,
    prices: FloatArray,
    bound: float,
    limits: Limits,
    memo: Memo | None,
) -> tuple[IntArray, float]:
    """Solve the separate pools thoroughly at prices of the last: a bound of whole options."""
    owner = _owners(cost, use[:-1])
    if owner is None:
        return choice, bound
    each = replace(limits, gap=max(limits.gap, _BETTER.gap))
    for step in (1.0, *_PRICE_STEPS[:2]):
        price = float(prices[-1]) * step
        priced = cost + price * use[-1]
        found = _separately(priced, use[:-1], capacity[:-1], owner, each, 0, memo=memo)
        bound = max(bound, found.lower_bound - price * float(capacity[-1]))
        if found.status != "infeasible" and total(use[-1], found.choice) <= capacity[-1]:
            full = fill(cost, use, capacity, found.choice, prices)
            choice = min((choice, full), key=lambda c: total(cost, c))
            break
    return choice, min(bound, total(cost, choice))


def _by_price(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    prices: FloatArray,
    bound: float,
    limits: Limits,
    memo: Memo | None,
) -> IntArray | None:
    """Return a choice by searching the price of the last pool, the others being separate.

    None when the others are not separate, or when no price keeps the choice within the pool.
    """
    owner = _owners(cost, use[:-1])
    if owner is None:
        return None
    enough = max(limits.gap * max(bound, 0.0), limits.absolute)
    low, high, price = 0.0, np.inf, _on_grid(float(prices[-1]))
    steps = list(_PRICE_STEPS)
    best: IntArray | None = None
    for _ in range(_PRICE_TRIES):
        found = _within(cost, use, capacity, owner, price, memo)
        if found is not None:
            high = price
            full = fill(cost, use, capacity, found, prices)
            best = full if best is None or total(cost, full) < total(cost, best) else best
            if total(cost, best) - bound <= enough:
                break
        else:
            low = price
        if high <= low * _PRICE_NEAR or high == 0.0:
            break
        if np.isfinite(high):
            price = _on_grid(np.sqrt(low * high) if low > 0 else high / _PRICE_STEPS[1])
        elif steps and low > 0:
            price = _on_grid(low * steps.pop(0))
        else:
            break
        if price in (low, high):
            break
    return best


def _within(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    owner: IntArray,
    price: float,
    memo: Memo | None,
) -> IntArray | None:
    """Return the choice at a price of the last pool when it keeps to it, or None.

    One that is over by little is looked at more thoroughly.
    """
    for limits in (_ROUGH, _BETTER):
        priced = cost + price * use[-1]
        found = _separately(priced, use[:-1], capacity[:-1], owner, limits, 0, memo=memo)
        if found.status == "infeasible":
            return None
        used = total(use[-1], found.choice)
        if used <= capacity[-1]:
            return found.choice
        if used > _LITTLE_OVER * capacity[-1]:
            return None
    return None


def _on_grid(price: float) -> float:
    """Return the price to half a percent, so that related problems ask the same of their pools."""
    return float(np.exp(np.round(np.log(price) / 0.005) * 0.005)) if price > 0 else price


def bound_at_price(
    cost: FloatArray, use: FloatArray, capacity: FloatArray, price: float, memo: Memo | None = None
) -> float:
    """Return the best bound at a given price of the last pool, -inf where it is of no use.

    The other pools must be separate; their prices are the best ones.
    """
    owner = _owners(cost, use[:-1])
    if owner is None:
        return -np.inf
    priced = cost + price * use[-1]
    found = _separately(priced, use[:-1], capacity[:-1], owner, _ROUGH, 0, memo=memo)
    return found.lower_bound - price * float(capacity[-1])


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
        part = solve_level(cost[small], use[:, small], rest, Limits(gap=1e-6, seconds=0.0), 0)
        if part.status == "infeasible":
            continue
        whole = choice.copy()
        whole[tight.large], whole[small] = large, part.choice
        whole = fill(cost, use, capacity, whole, prices)
        if total(cost, whole) < total(cost, choice):
            choice = whole
    return choice, max(bound, min(tight.lower_bound, total(cost, choice)))


def is_coupled(cost: FloatArray, use: FloatArray, capacity: FloatArray) -> bool:
    """Whether a large problem has groups that use several limited pools."""
    limited = np.isfinite(capacity)
    return len(cost) > _CORE_GROUPS and _owners(cost, use[limited]) is None


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
    cutoff: float = np.inf,
    memo: Memo | None = None,
) -> Solution:
    """Solve every pool on its own when no group uses two; the bounds add up.

    Quickly first; then pools with the widest gaps thoroughly, until the sum is close enough.
    """
    n_pools = len(capacity)
    mine = [np.nonzero(owner == p)[0] for p in range(n_pools)]

    def solved(p: int, how: Limits) -> Solution:
        return _remembered(cost[mine[p]], use[[p]][:, mine[p]], capacity[[p]], how, memo)

    def together(parts: list[Solution]) -> Solution:
        return _joined(parts, mine, cost, use, level)

    if np.isfinite(cutoff):
        rough = together([solved(p, _ROUGH) for p in range(n_pools)])
        if rough.status == "infeasible" or rough.lower_bound >= cutoff:
            return rough
    quick = replace(limits, seconds=0.0)
    parts = [solved(p, quick) for p in range(n_pools)]
    whole = together(parts)
    if whole.status == "infeasible" or limits.seconds == 0:
        return whole
    enough = max(limits.gap * max(whole.lower_bound, 0.0), limits.absolute) / 2
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
        return solve_level(cost, use, capacity, limits, 0)
    digest = blake2b(repr(cost.shape).encode(), digest_size=20)
    for array in (capacity, cost, use):
        digest.update(np.ascontiguousarray(array).data)
    key = digest.digest()
    if key not in memo or not _suffices(*memo[key], limits):
        memo[key] = limits, solve_level(cost, use, capacity, limits, 0)
    return memo[key][1]


def _suffices(had: Limits, found: Solution, limits: Limits) -> bool:
    """Whether an answer found under `had` is as good as `limits` would give."""
    enough = max(limits.gap * max(found.lower_bound, 0.0), limits.absolute)
    if found.status == "infeasible" or found.objective - found.lower_bound <= enough:
        return True
    tolerance = max(had.gap * max(found.lower_bound, 0.0), had.absolute)
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
    if part.status in ("infeasible", "cut"):
        return replace(part, prices=prices, used=np.zeros(len(limited)), shortfall=shortfall)
    return replace(part, prices=prices, used=usage(use, part.choice))


def _least_fits(cost: FloatArray, use: FloatArray, capacity: FloatArray) -> bool:
    """Whether every pool alone could be satisfied by the options that use least of it."""
    least = np.where(np.isfinite(cost), use, np.inf).min(axis=2).sum(axis=1)
    return bool((least <= capacity).all())


def _cut(bound: float, prices: FloatArray, level: int) -> Solution:
    """Return a bound without an answer."""
    nothing = np.zeros(0, dtype=np.int64)
    return Solution("cut", nothing, np.inf, bound, prices, np.zeros(len(prices)), level)


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
