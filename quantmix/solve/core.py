"""Close the gap of one pool by dynamic programming over the undecided groups.

Changes against the priced optimum are states (use, cost). Only options whose reduced cost is within
the gap to the best choice known can matter (Pisinger 1995, "A minimal algorithm for the
multiple-choice knapsack problem"). Groups come in the order of their step, largest first, so that
large moves are settled while many small ones remain to spend the rest exactly; states that lie
close together in use compete, and a state that the remaining groups cannot bring back into the
pool is dropped. The uses kept are exact, so every answer fits; optimality is not claimed here.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantmix.solve.problem import FloatArray, IntArray


@dataclass(frozen=True, slots=True)
class _Step:
    """One group of the programme: per new state its parent state and the option taken."""

    group: int
    parent: NDArray[np.int64]
    option: NDArray[np.int64]


def improve_pool(
    cost: FloatArray,
    use: FloatArray,
    left: float,
    choice: IntArray,
    price: float,
    most_states: int,
) -> IntArray:
    """Return a choice at least as good as `choice` whose use grows by at most `left`.

    Args:
        cost, use: (G, J), cost +inf for options that must not be taken.
        left: what the pool has left at `choice`.
        price: the pool's price; reduced costs are cost + price · use.
        most_states: states kept after every group.
    """
    rows = np.arange(len(choice))
    priced = cost + price * use
    start = priced.argmin(axis=1).astype(np.int64)
    reduced = priced - priced[rows, start][:, None]
    # States are relative to `start`; `slack` is what the pool has left there.
    best = float(cost[rows, choice].sum() - cost[rows, start].sum())
    slack = left - float((use[rows, start] - use[rows, choice]).sum())
    # A better answer costs less and fits: its reduced cost is below best + price · slack.
    is_open = (reduced <= best + price * slack) & np.isfinite(cost)
    is_open[rows, start] = False
    groups = np.nonzero(is_open.any(axis=1))[0]
    steps_use = np.where(is_open, use - use[rows, start][:, None], 0.0)
    groups = groups[np.argsort(-np.abs(steps_use[groups]).max(axis=1), kind="stable")]
    # What the groups still to come can take away from the use of a state at most.
    relief = np.minimum(steps_use[groups].min(axis=1), 0.0)
    relief = np.concatenate([np.cumsum(relief[::-1])[::-1][1:], [0.0]]) if len(groups) else relief
    found: tuple[int, int] | None = (-1, 0) if slack >= 0 and best > 0 else None
    best = min(best, 0.0) if found else best
    u, c = np.zeros(1), np.zeros(1)
    trail: list[_Step] = []
    for g, later in zip(groups, relief, strict=True):
        options = np.concatenate([[start[g]], np.nonzero(is_open[g])[0]])
        new_u = (u[:, None] + (use[g, options] - use[g, start[g]])[None, :]).ravel()
        new_c = (c[:, None] + (cost[g, options] - cost[g, start[g]])[None, :]).ravel()
        new_r = new_c + price * new_u
        alive = np.nonzero((new_r <= best + price * slack) & (new_u + later <= slack))[0]
        if len(alive) == 0:
            break
        kept = alive[_spread(new_u[alive], new_r[alive], most_states)]
        trail.append(_Step(int(g), kept // len(options), options[kept % len(options)]))
        u, c = new_u[kept], new_c[kept]
        fits = np.where(u <= slack, c, np.inf)
        k = int(fits.argmin())
        if fits[k] < best:
            best, found = float(fits[k]), (len(trail) - 1, k)
    return choice if found is None else _trace(start, trail, found)


def _spread(u: FloatArray, r: FloatArray, most: int) -> NDArray[np.int64]:
    """Return the states to keep: the least reduced cost of each of `most` equal ranges of use."""
    if len(u) <= most:
        return np.arange(len(u))
    low, high = float(u.min()), float(u.max())
    width = (high - low) / most or 1.0
    bucket = ((u - low) / width).astype(np.int64)
    order = np.lexsort((r, bucket))
    first = np.concatenate([[True], np.diff(bucket[order]) > 0])
    kept: NDArray[np.int64] = order[first]
    return kept


def _trace(start: IntArray, trail: list[_Step], found: tuple[int, int]) -> IntArray:
    """Follow parents back from a state and return its choice."""
    result = start.copy()
    at, k = found
    for step in reversed(trail[: at + 1]):
        result[step.group] = step.option[k]
        k = int(step.parent[k])
    return result
