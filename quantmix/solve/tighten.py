"""A tight bound for one pool: large groups exactly, small ones by their convex curve.

The LP relaxation splits one large group, and a mix of 600 GB cannot. Here the groups with the
largest steps are enumerated by dynamic programming without any loss (equal steps of equal layers
keep the states few), while the many small groups count with their LP value, a convex function of
what the large ones leave. The least sum is a bound, and nearly always an answer when the small
groups are then solved for what is left.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantmix.solve.problem import FloatArray, IntArray

_LARGE_SHARE = 1 / 6
"""A group is large when its step is at least this share of the largest step."""

_MOST_STATES = 40_000
"""Beyond it states are merged optimistically: the bound stays valid, only less tight."""


@dataclass(frozen=True)
class Curve:
    """Least cost of the small groups against what they may use, relative to the start: convex."""

    use: FloatArray
    cost: FloatArray

    def at(self, left: FloatArray) -> FloatArray:
        """Return the LP cost at each `left`, +inf below the least possible use."""
        value = np.interp(left, self.use, self.cost)
        return np.where(left >= self.use[0], value, np.inf)


@dataclass(frozen=True)
class Tightened:
    """A bound on every answer, and the choices of the large groups worth completing."""

    lower_bound: float
    large: IntArray
    candidates: tuple[IntArray, ...]


def tighten(
    cost: FloatArray,
    use: FloatArray,
    left: float,
    choice: IntArray,
    price: float,
    n_candidates: int = 4,
) -> Tightened | None:
    """Return a bound at least as good as the Lagrangian one, None when there is nothing to decide.

    Args:
        cost, use: (G, J), cost +inf where not allowed.
        left: what the pool has left at `choice`, a feasible choice.
        price: the pool's price.
    """
    rows = np.arange(len(choice))
    priced = cost + price * use
    start = priced.argmin(axis=1).astype(np.int64)
    reduced = priced - priced[rows, start][:, None]
    base = float(cost[rows, start].sum())
    best = float(cost[rows, choice].sum()) - base
    slack = left - float((use[rows, start] - use[rows, choice]).sum())
    room = best + price * slack
    is_open = (reduced <= room) & np.isfinite(cost)
    steps = np.where(is_open, np.abs(use - use[rows, start][:, None]), 0.0).max(axis=1)
    if not steps.max() > 0:
        return None
    is_large = steps >= _LARGE_SHARE * steps.max()
    large = np.nonzero(is_large)[0]
    large = large[np.argsort(-steps[large], kind="stable")]
    curve = _small_curve(cost, use, start, np.nonzero(~is_large)[0])
    u, c, trail = _enumerate(cost, use, start, is_open, large, price, room)
    value = c + curve.at(slack - u)
    order = np.argsort(value, kind="stable")[:n_candidates]
    bound = base + min(float(value[order[0]]), best)
    found = tuple(_trace(start[large], trail, int(k)) for k in order if np.isfinite(value[k]))
    return Tightened(bound, large, found)


def _enumerate(
    cost: FloatArray,
    use: FloatArray,
    start: IntArray,
    is_open: NDArray[np.bool_],
    large: IntArray,
    price: float,
    room: float,
) -> tuple[FloatArray, FloatArray, list[tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    """Return undominated (use, cost) of all choices of the large groups within `room`."""
    u, c = np.zeros(1), np.zeros(1)
    trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for g in large:
        options = np.union1d(np.nonzero(is_open[g])[0], [start[g]])
        new_u = (u[:, None] + (use[g, options] - use[g, start[g]])[None, :]).ravel()
        new_c = (c[:, None] + (cost[g, options] - cost[g, start[g]])[None, :]).ravel()
        alive = np.nonzero(new_c + price * new_u <= room)[0]
        order = alive[np.lexsort((new_c[alive], new_u[alive]))]
        order = order[_falling(new_c[order])]
        if len(order) > _MOST_STATES:
            width = (new_u[order[-1]] - new_u[order[0]]) / _MOST_STATES
            bucket = np.floor((new_u[order] - new_u[order[0]]) / width)
            last = np.concatenate([np.diff(bucket) > 0, [True]])
            first = np.concatenate([[True], np.diff(bucket) > 0])
            # Least use and least cost of a bucket, though of different states: optimistic.
            new_u[order[last]] = new_u[order[first]]
            order = order[last]
        trail.append((order // len(options), options[order % len(options)].astype(np.int64)))
        u, c = new_u[order], new_c[order]
    return u, c, trail


def _falling(cost: FloatArray) -> NDArray[np.bool_]:
    """Return which entries are below all before them."""
    if len(cost) == 0:
        return np.zeros(0, dtype=np.bool_)
    lowest = np.minimum.accumulate(cost)
    return np.concatenate([[True], cost[1:] < lowest[:-1]])


def _small_curve(cost: FloatArray, use: FloatArray, start: IntArray, small: IntArray) -> Curve:
    """Return the LP curve of groups that are not large: hull steps of all, steepest first."""
    use_0 = cost_0 = 0.0
    steps_use: list[float] = []
    steps_cost: list[float] = []
    for g in small:
        ok = np.isfinite(cost[g])
        u = use[g][ok] - use[g, start[g]]
        c = cost[g][ok] - cost[g, start[g]]
        hull = lower_hull(u, c)
        use_0 += u[hull[0]]
        cost_0 += c[hull[0]]
        steps_use.extend(np.diff(u[hull]))
        steps_cost.extend(np.diff(c[hull]))
    du, dc = np.array(steps_use), np.array(steps_cost)
    order = np.argsort(dc / du, kind="stable") if len(du) else np.zeros(0, dtype=np.int64)
    return Curve(
        use_0 + np.concatenate([[0.0], np.cumsum(du[order])]),
        cost_0 + np.concatenate([[0.0], np.cumsum(dc[order])]),
    )


def lower_hull(x: FloatArray, y: FloatArray) -> list[int]:
    """Return the indices of the falling lower convex hull of points, by ascending x."""
    hull: list[int] = []
    for i in np.lexsort((y, x)).tolist():
        if hull and y[i] >= y[hull[-1]]:
            continue
        while len(hull) > 1:
            a, b = hull[-2], hull[-1]
            if (y[b] - y[a]) * (x[i] - x[a]) >= (y[i] - y[a]) * (x[b] - x[a]):
                hull.pop()
            else:
                break
        hull.append(i)
    return hull


def _trace(
    start: IntArray, trail: list[tuple[NDArray[np.int64], NDArray[np.int64]]], k: int
) -> IntArray:
    """Return the options of the large groups that lead to final state k."""
    result = start.copy()
    for at in range(len(trail) - 1, -1, -1):
        parent, option = trail[at]
        result[at] = option[k]
        k = int(parent[k])
    return result
