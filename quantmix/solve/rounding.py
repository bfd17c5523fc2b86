"""From prices to a choice that fits: round an LP answer, mend it, fill what is left."""

from __future__ import annotations

import numpy as np

from quantmix.solve.bound import priced_cost, usage
from quantmix.solve.problem import FloatArray, IntArray


def round_lp(
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
