"""The knapsack solved again: swaps that the probes promise to help, at no byte more anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from quantmix.refine.frame import Frame
from quantmix.refine.probes import DOWN, UP, step
from quantmix.solve.problem import FloatArray, IntArray, Problem, Solution
from quantmix.solve.solver import solve

REACHES: Final = (1, 2, 4)
"""Steps that a group may move in one round; each gives a candidate."""
_MORE: Final = 1.05  # a bolder candidate promises so many times what the one before does


def problem_of(frame: Frame, change: FloatArray, now: IntArray, reach: int) -> Problem:
    """Return the knapsack of the best mix at most `reach` steps from `now`, group by group.

    Args:
        change: (G, J) nats that an option changes the KLD by, from `now`.
    """
    cost = np.full(change.shape, np.inf)
    for g in range(len(now)):
        low, high = _ends(frame, g, int(now[g]), reach)
        within = (frame.sizes[g] >= low) & (frame.sizes[g] <= high) & np.isfinite(change[g])
        cost[g, within] = change[g, within]
    # Costs from zero: what could be gained in each group is still there.
    cost -= np.where(np.isfinite(cost), cost, 0.0).min(axis=1)[:, None]
    return Problem(
        groups=tuple(group.label for group in frame.choices.groups),
        option=frame.choices.option_label,
        cost=cost,
        use=frame.use,
        pools=frame.pools,
        capacities=frame.capacity[None],
        levels=np.array([frame.level], dtype=np.int64),
        level=frame.choices.level,
        constraints=frame.choices.palette.constraints,
    )


def candidates(
    frame: Frame, change: FloatArray, now: IntArray, reaches: Sequence[int] = REACHES
) -> list[tuple[IntArray, float, Solution]]:
    """Return mixes worth trying, each with the change of KLD that is expected, most cautious first.

    None costs a byte more on any device than the recipe does; each promises a gain, and clearly
    more than the one before it.
    """
    found: list[tuple[IntArray, float, Solution]] = []
    rows = np.arange(len(now))
    for reach in reaches:
        solution = solve(problem_of(frame, change, now, reach))
        if solution.status == "infeasible":
            continue
        choice = solution.choice
        gain = float(change[rows, choice].sum())
        if gain < _MORE * (found[-1][1] if found else 0.0):
            found.append((choice, gain, solution))
    return found


def _ends(frame: Frame, g: int, now: int, reach: int) -> tuple[float, float]:
    """Return the least and most bytes that a group may take."""
    ends = {UP: now, DOWN: now}
    for way in ends:
        for _ in range(reach):
            ends[way] = step(frame.damage[g], frame.sizes[g], ends[way], way)
    return float(frame.sizes[g, ends[DOWN]]), float(frame.sizes[g, ends[UP]])
