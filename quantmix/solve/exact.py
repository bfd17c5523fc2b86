"""The undecided core of a knapsack, solved exactly by HiGHS within limits."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from quantmix.solve.bound import priced_cost, total, usage
from quantmix.solve.problem import FloatArray, IntArray

_CORE_LIMIT = 6000
"""Most 0/1 variables handed to HiGHS; beyond it the core keeps those of least reduced cost."""


@dataclass(frozen=True, slots=True)
class Limits:
    """When to stop: relative gap, nodes and seconds of the exact step (0 seconds: skip it).

    `absolute` is a gap that is small enough whatever the objective is: of a part of a problem.
    """

    gap: float = 8e-5
    nodes: int = 150
    seconds: float = 20.0
    absolute: float = 0.0

    def enough(self, bound: float) -> float:
        """Return the gap, in units of cost, that is small enough above a lower `bound`."""
        return max(self.gap * max(bound, 0.0), self.absolute)


def solve_core(
    cost: FloatArray,
    use: FloatArray,
    capacity: FloatArray,
    prices: FloatArray,
    bound: float,
    incumbent: IntArray | None,
    limits: Limits,
) -> tuple[IntArray | None, float]:
    """Solve the core with HiGHS: a choice (None when it finds none) and a bound on any better one.

    An option left out by reduced cost cannot be part of an answer better than `incumbent`, so the
    core's bound holds for all answers better than it; a core that was cut short proves nothing.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_matrix

    reduced = priced_cost(cost, use, prices)
    reduced = reduced - reduced.min(axis=1, keepdims=True)
    room = np.inf if incumbent is None else total(cost, incumbent) - bound
    keep = np.isfinite(cost) & (reduced <= room * (1 + 1e-9) + 1e-15)
    whole = bool(keep.sum() <= _CORE_LIMIT + len(cost))
    if not whole:
        keep &= reduced <= np.partition(reduced[keep], _CORE_LIMIT)[_CORE_LIMIT]
    keep[np.arange(len(cost)), reduced.argmin(axis=1)] = True
    if incumbent is not None:
        keep[np.arange(len(cost)), incumbent] = True
    fixed = keep.sum(axis=1) == 1
    choice = keep.argmax(axis=1).astype(np.int64)
    if fixed.all():
        return (choice if (usage(use, choice) <= capacity).all() else None), bound
    left = capacity - use[:, fixed, choice[fixed]].sum(axis=1)
    open_groups = np.nonzero(~fixed)[0]
    g_index, j_index = np.nonzero(keep[open_groups])
    groups = open_groups[g_index]
    c = cost[groups, j_index]
    scale_c = float(np.abs(c).max()) or 1.0
    bounded = np.nonzero(np.isfinite(left))[0]
    scale = np.maximum(np.abs(left[bounded]), 1.0)
    one_each = csr_matrix((np.ones(len(groups)), (g_index, np.arange(len(groups)))))
    pool_rows = csr_matrix(use[bounded][:, groups, j_index] / scale[:, None])
    constraints = [LinearConstraint(one_each, 1, 1)]
    if len(bounded):
        constraints.append(LinearConstraint(pool_rows, -np.inf, left[bounded] / scale))
    fixed_cost = float(cost[fixed, choice[fixed]].sum())
    absolute = max(limits.gap * max(bound, 0.0), limits.absolute) / 2
    with quiet_stdout():
        result = milp(
            c / scale_c,
            integrality=np.ones(len(groups)),
            bounds=Bounds(0, 1),
            constraints=constraints,
            options={
                "time_limit": limits.seconds,
                "node_limit": limits.nodes,
                "mip_rel_gap": min(1.0, absolute / max(bound - fixed_cost, absolute, 1e-300)),
            },
        )
    proven = bound
    if whole and result.mip_dual_bound is not None and np.isfinite(result.mip_dual_bound):
        proven = fixed_cost + float(result.mip_dual_bound) * scale_c * (1 - 1e-9)
    if result.x is None:
        return None, proven
    picked = np.nonzero(result.x > 0.5)[0]
    if len(picked) != len(open_groups):
        return None, proven
    choice[groups[picked]] = j_index[picked]
    return (choice if (usage(use, choice) <= capacity).all() else None), proven


@contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send file descriptor 1 to nowhere: HiGHS prints debug lines that no option turns off."""
    sys.stdout.flush()
    saved = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
