"""All answers of a one-pool knapsack at once: the sweep of its price from infinity down to zero.

At a price λ every group takes the option that minimises cost + λ · use (Everett 1963). As λ falls,
a group walks along the lower convex hull of its own options, one step at each slope; putting the
steps of all groups in the order of their slopes gives every Lagrangian optimum there is, each of
them proven best for exactly what it uses, and the dual bound for every capacity in between.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from quantmix.solve.bound import lagrangian
from quantmix.solve.problem import FloatArray, IntArray
from quantmix.solve.solver import fill


@dataclass(frozen=True)
class Hull:
    """The sweep: `start`, then S steps of falling price, each giving one group a larger option.

    Attributes:
        cost, use: (G, J), as given; cost +inf where an option is not allowed.
        start: (G,) the least use of every group.
        group, option: (S,) which group moves and where to.
        price: (S,) cost saved per unit of use by the step, falling.
        used, total: (S + 1,) use and cost before the first step and after each.
    """

    cost: FloatArray
    use: FloatArray
    start: IntArray
    group: IntArray
    option: IntArray
    price: FloatArray
    used: FloatArray
    total: FloatArray

    @classmethod
    def of(cls, cost: FloatArray, use: FloatArray) -> Hull:
        """Sweep the price over `cost` and `use`, both (G, J), one pool.

        Raises:
            ValueError: a group has no option.
        """
        start = np.empty(len(cost), dtype=np.int64)
        steps: list[tuple[float, int, int, int]] = []
        for g in range(len(cost)):
            corners = lower_hull(use[g], cost[g])
            start[g] = corners[0]
            for rank, (a, b) in enumerate(pairwise(corners)):
                price = (cost[g, a] - cost[g, b]) / (use[g, b] - use[g, a])
                steps.append((-float(price), g, rank, b))
        steps.sort()
        group = np.array([s[1] for s in steps], dtype=np.int64)
        option = np.array([s[3] for s in steps], dtype=np.int64)
        before = _before(start, group, option)
        rows = np.arange(len(cost))
        more = use[group, option] - use[group, before]
        less = cost[group, option] - cost[group, before]
        return cls(
            cost=cost,
            use=use,
            start=start,
            group=group,
            option=option,
            price=np.array([-s[0] for s in steps]),
            used=use[rows, start].sum() + np.concatenate([[0.0], np.cumsum(more)]),
            total=cost[rows, start].sum() + np.concatenate([[0.0], np.cumsum(less)]),
        )

    def choice(self, step: int) -> IntArray:
        """Return the option of every group after `step` steps, shape (G,)."""
        chosen = self.start.copy()
        chosen[self.group[:step]] = self.option[:step]  # the last of a group's steps stays
        return chosen

    def last_below(self, capacity: float) -> int | None:
        """Return the most steps that fit into `capacity`, None when not even the start does."""
        step = int(np.searchsorted(self.used, capacity, side="right")) - 1
        return step if step >= 0 else None

    def bound(self, capacity: float) -> float:
        """Return a cost that no choice within `capacity` undercuts; +inf when nothing fits."""
        step = self.last_below(capacity)
        if step is None:
            return float("inf")
        if step == len(self.price):
            return float(self.total[-1])
        price = self.price[step : step + 1]
        return lagrangian(self.cost, self.use[None], np.array([capacity]), price)

    def filled(self, capacity: float) -> IntArray | None:
        """Return a choice within `capacity` that no single upgrade improves, None if none fits."""
        step = self.last_below(capacity)
        if step is None:
            return None
        price = self.price[min(step, len(self.price) - 1) :][:1] if len(self.price) else np.zeros(1)
        return fill(self.cost, self.use[None], np.array([capacity]), self.choice(step), price)

    def spread(self, low: float, high: float, n: int) -> list[int]:
        """Return up to `n` step counts whose uses lie in [low, high], even in ln(use)."""
        inside = np.nonzero((self.used >= low) & (self.used <= high))[0]
        if not len(inside):
            return []
        marks = np.geomspace(self.used[inside[0]], self.used[inside[-1]], n)
        after = np.searchsorted(self.used[inside], marks).clip(0, len(inside) - 1)
        before = (after - 1).clip(0)
        nearer = marks - self.used[inside[before]] < self.used[inside[after]] - marks
        return sorted({int(inside[k]) for k in np.where(nearer, before, after)})


def lower_hull(use: FloatArray, cost: FloatArray) -> list[int]:
    """Return the corners of the lower convex hull, from the least use to the least cost.

    Raises:
        ValueError: no cost is finite.
    """
    allowed = np.nonzero(np.isfinite(cost))[0]
    if not len(allowed):
        raise ValueError("a group has no option: every cost is infinite")
    corners: list[int] = []
    for j in allowed[np.lexsort((cost[allowed], use[allowed]))]:
        if corners and cost[j] >= cost[corners[-1]]:
            continue
        while len(corners) > 1:
            a, b = corners[-2], corners[-1]
            first = (cost[a] - cost[b]) * (use[j] - use[b])
            if first > (cost[b] - cost[j]) * (use[b] - use[a]):
                break
            corners.pop()
        corners.append(int(j))
    return corners


def knee(x: FloatArray, y: FloatArray) -> int:
    """Return the point of a falling curve that lies farthest below the chord of its two ends.

    Both axes are scaled to their range (Satopää et al. 2011, "Finding a kneedle in a haystack"),
    so the answer belongs to the range that is shown.
    """
    if len(x) < 3 or x[-1] == x[0] or y[-1] == y[0]:
        return 0
    across = (x - x[0]) / (x[-1] - x[0])
    down = (y - y[-1]) / (y[0] - y[-1])
    return int(np.argmax(1.0 - across - down))


def _before(start: IntArray, group: IntArray, option: IntArray) -> IntArray:
    """Return the option that each step leaves, shape (S,)."""
    now = start.copy()
    before = np.empty(len(group), dtype=np.int64)
    for i, (g, j) in enumerate(zip(group, option, strict=True)):
        before[i] = now[g]
        now[g] = j
    return before


__all__ = ["Hull", "knee", "lower_hull"]
