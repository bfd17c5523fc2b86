"""Lower bounds and prices: the Lagrangian dual of the knapsack.

For any prices λ ≥ 0,  L(λ) = Σ_g min_j (cost[g,j] + Σ_p λ_p use[p,g,j]) - Σ_p λ_p capacity_p
is a lower bound on every feasible choice (Everett 1963); its maximum over λ equals the LP
relaxation. With one pool the maximum is found by steps on the price, with several by the LP
(HiGHS); either way the bound that is reported is L(λ) itself, so it holds whatever the search did.
"""

from __future__ import annotations

import numpy as np

from quantmix.solve.problem import FloatArray, IntArray

_STEPS = 300
_ROUNDING = 1e-12


def priced_cost(cost: FloatArray, use: FloatArray, prices: FloatArray) -> FloatArray:
    """Return cost + Σ_p λ_p use_p, shape (G, J); padding stays +inf."""
    priced = cost.copy()
    for price, pool in zip(prices, use, strict=True):
        if price:
            priced += price * pool
    return priced


def lagrangian(
    cost: FloatArray, use: FloatArray, capacity: FloatArray, prices: FloatArray
) -> float:
    """Return L(prices), a proven lower bound. `capacity` may hold +inf where the price is 0."""
    finite = np.isfinite(capacity)
    paid = float(prices[finite] @ capacity[finite])
    return float(priced_cost(cost, use, prices).min(axis=1).sum()) - paid


def cheapest(cost: FloatArray, use: FloatArray, prices: FloatArray) -> IntArray:
    """Return the option of least priced cost per group; ties go to the least use."""
    priced = priced_cost(cost, use, prices)
    least = priced.min(axis=1, keepdims=True)
    near = priced <= least + 1e-13 * np.abs(least)
    total = np.where(near, use.sum(axis=0), np.inf)
    choice: IntArray = total.argmin(axis=1).astype(np.int64)
    return choice


def usage(use: FloatArray, choice: IntArray) -> FloatArray:
    """Return Σ_g use[p, g, choice[g]], shape (P,)."""
    total: FloatArray = use[:, np.arange(len(choice)), choice].sum(axis=1)
    return total


def total(cost: FloatArray, choice: IntArray) -> float:
    """Return Σ_g cost[g, choice[g]]."""
    return float(cost[np.arange(len(choice)), choice].sum())


def prices_one_pool(cost: FloatArray, use: FloatArray, capacity: float) -> tuple[float, IntArray]:
    """Return the price that maximises the bound for one pool, and a choice that fits at it.

    The bound is concave in the price and usage at the cheapest options falls as the price rises:
    next is where the lines of the choices on both sides of the capacity meet (halving every third
    time, against slow progress), and when no choice is below their meeting point that is the
    maximum. The caller has made sure that the least use fits.
    """
    free = cheapest(cost, use, np.zeros(1))
    if usage(use, free)[0] <= capacity:
        return 0.0, free
    low, high, over = 0.0, _top_price(cost, use[0]), free
    fitting = cheapest(cost, use, np.array([high]))
    if usage(use, fitting)[0] > capacity:
        fitting = np.where(np.isfinite(cost), use[0], np.inf).argmin(axis=1).astype(np.int64)
    for step in range(_STEPS):
        used, spared = usage(use, over)[0], usage(use, fitting)[0]
        meet = (total(cost, fitting) - total(cost, over)) / (used - spared)
        price = 0.5 * (low + high) if step % 3 == 2 else meet
        choice = cheapest(cost, use, np.array([price]))
        now = usage(use, choice)[0]
        line = total(cost, fitting) + meet * spared
        if price == meet and total(cost, choice) + meet * now >= line - _ROUNDING * abs(line):
            return _least_price(cost, use, capacity, price, (high, fitting))
        if now <= capacity:
            high, fitting = price, choice
        else:
            low, over = price, choice
    return high, fitting


def _least_price(
    cost: FloatArray,
    use: FloatArray,
    capacity: float,
    price: float,
    above: tuple[float, IntArray],
) -> tuple[float, IntArray]:
    """Return the least price near `price` whose choice fits, to the last bit, and that choice."""
    low, (high, fitting) = price * (1 - 4 * _ROUNDING), above
    middle = price * (1 + 4 * _ROUNDING)
    while low < middle < high:
        choice = cheapest(cost, use, np.array([middle]))
        if usage(use, choice)[0] <= capacity:
            high, fitting = middle, choice
        else:
            low = middle
        middle = 0.5 * (low + high)
    return high, fitting


def prices_by_lp(
    cost: FloatArray, use: FloatArray, capacity: FloatArray
) -> tuple[FloatArray, FloatArray] | None:
    """Return (prices, x) of the LP relaxation, x of shape (G, J); None when it is infeasible.

    Every pool is scaled by its capacity and the cost by its spread, so that HiGHS sees numbers
    near one.
    """
    from scipy.optimize import linprog
    from scipy.sparse import csr_matrix, vstack

    n_groups, n_options = cost.shape
    g_index, j_index = np.nonzero(np.isfinite(cost))
    n = len(g_index)
    c = cost[g_index, j_index]
    scale_c = float(np.abs(c).max()) or 1.0
    bounded = np.nonzero(np.isfinite(capacity))[0]
    scale = np.maximum(np.abs(capacity[bounded]), use[bounded].max(axis=(1, 2)))
    scale = np.where(scale > 0, scale, 1.0)
    pool_rows = csr_matrix(use[bounded][:, g_index, j_index] / scale[:, None])
    one_each = csr_matrix((np.ones(n), (g_index, np.arange(n))), shape=(n_groups, n))
    result = linprog(
        c / scale_c,
        A_ub=vstack([pool_rows]) if len(bounded) else None,
        b_ub=capacity[bounded] / scale if len(bounded) else None,
        A_eq=one_each,
        b_eq=np.ones(n_groups),
        bounds=(0, None),
        method="highs",
    )
    if result.status != 0:
        return None
    prices = np.zeros(len(capacity))
    if len(bounded):
        prices[bounded] = np.maximum(0.0, -result.ineqlin.marginals) * scale_c / scale
    x = np.zeros((n_groups, n_options))
    x[g_index, j_index] = result.x
    return prices, x


def _top_price(cost: FloatArray, use: FloatArray) -> float:
    """Return a price at which every group takes its smallest option."""
    spread = np.where(np.isfinite(cost), cost, -np.inf).max() - cost.min()
    allowed = np.where(np.isfinite(cost), use, np.nan)
    ordered = np.sort(allowed, axis=1)
    steps = np.diff(ordered, axis=1)
    steps = steps[np.isfinite(steps) & (steps > 0)]
    step = float(steps.min()) if steps.size else 1.0
    return 2.0 * (float(spread) + 1e-300) / step
