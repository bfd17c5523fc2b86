"""One knapsack with fixed capacities: the steps of `solver`, and how coupled pools are priced.

Where no group uses two pools, `pools` takes them apart. A last pool that all groups use (damage
while seconds are minimised, seconds while damage is) couples them: for a price on it they are
separate again, and the price is searched (Everett 1963).
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from quantmix.solve.bound import lagrangian, prices_by_lp, total, usage
from quantmix.solve.exact import Limits, solve_core
from quantmix.solve.pools import (
    ROUGH,
    Memo,
    by_core,
    by_pools,
    infeasible,
    least_fits,
    owners,
    separately,
    solve_pool,
)
from quantmix.solve.problem import FloatArray, IntArray, Solution
from quantmix.solve.rounding import fill, round_lp

_BETTER = Limits(gap=1e-3, seconds=0.0)

_ANY = Limits(gap=1.0, nodes=1000, seconds=5.0)
"""To find any choice where cheaper means did not, also in a solve that skips the exact step."""

_PRICE_TRIES = 6
_PRICE_STEPS = (1.05, 1.2, 2.0, 10.0, 1e3)
"""Factors by which the price of the coupling pool grows until the choice keeps to it."""
_PRICE_NEAR = 1.02
_LITTLE_OVER = 1.05

_CORE_GROUPS = 300
"""Most groups of coupled pools that HiGHS gets: beyond, it takes seconds to gain nothing."""


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
        return infeasible(cost, use, capacity, level)
    limited = np.isfinite(capacity)
    if limited.any() and not limited.all():
        there = None if hint is None else hint[limited]
        part = solve_level(
            cost, use[limited], capacity[limited], limits, level, cutoff, memo, there
        )
        return _with_free_pools(part, use, limited)
    if len(capacity) == 1:
        return solve_pool(cost, use, capacity, limits, level, cutoff)
    owner = owners(cost, use)
    if owner is not None and len(np.unique(owner)) > 1:
        return separately(cost, use, capacity, owner, limits, level, cutoff, memo)
    if not least_fits(cost, use, capacity):
        return infeasible(cost, use, capacity, level)
    if hint is not None and np.isfinite(cutoff):
        bound = bound_at_price(cost, use, capacity, float(hint[-1]), memo)
        if bound >= cutoff:
            return _cut(bound, hint, level)
    lp = prices_by_lp(cost, use, capacity)
    if lp is None:
        return infeasible(cost, use, capacity, level)
    prices = lp[0]
    bound = lagrangian(cost, use, capacity, prices)
    if bound >= cutoff:
        return _cut(bound, prices, level)
    choice = _by_price(cost, use, capacity, prices, bound, limits, memo)
    if choice is None:
        choice = round_lp(cost, use, capacity, *lp)
    if choice is None:
        how = _ANY if limits.seconds == 0 and len(cost) <= _CORE_GROUPS else limits
        choice, _ = solve_core(cost, use, capacity, prices, bound, None, how)
    if choice is None:
        return infeasible(cost, use, capacity, level)
    choice = fill(cost, use, capacity, choice, prices)
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
    """Close the gap between a choice of coupled pools and its bound, cheapest means first."""
    choice = by_pools(cost, use, capacity, choice, prices, bound, limits)
    if limits.seconds <= 0 or total(cost, choice) - bound <= limits.enough(bound):
        return choice, bound
    if len(cost) > _CORE_GROUPS:
        return _thorough_at_price(cost, use, capacity, choice, prices, bound, limits, memo)
    return by_core(cost, use, capacity, choice, prices, bound, limits)


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
    owner = owners(cost, use[:-1])
    if owner is None:
        return choice, bound
    each = replace(limits, gap=max(limits.gap, _BETTER.gap))
    for step in (1.0, *_PRICE_STEPS[:2]):
        price = float(prices[-1]) * step
        priced = cost + price * use[-1]
        found = separately(priced, use[:-1], capacity[:-1], owner, each, 0, memo=memo)
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
    owner = owners(cost, use[:-1])
    if owner is None:
        return None
    enough = limits.enough(bound)
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
    for limits in (ROUGH, _BETTER):
        priced = cost + price * use[-1]
        found = separately(priced, use[:-1], capacity[:-1], owner, limits, 0, memo=memo)
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
    owner = owners(cost, use[:-1])
    if owner is None:
        return -np.inf
    priced = cost + price * use[-1]
    found = separately(priced, use[:-1], capacity[:-1], owner, ROUGH, 0, memo=memo)
    return found.lower_bound - price * float(capacity[-1])


def is_coupled(cost: FloatArray, use: FloatArray, capacity: FloatArray) -> bool:
    """Whether a large problem has groups that use several limited pools."""
    limited = np.isfinite(capacity)
    if len(cost) <= _CORE_GROUPS or not limited.any():
        return False
    return owners(cost, use[limited]) is None


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


def _cut(bound: float, prices: FloatArray, level: int) -> Solution:
    """Return a bound without an answer."""
    nothing = np.zeros(0, dtype=np.int64)
    return Solution("cut", nothing, np.inf, bound, prices, np.zeros(len(prices)), level)
