"""A mix as a multiple-choice knapsack: one option per group, least cost, byte pools not overfull.

    minimise    Σ_g cost[g, j_g]
    subject to  Σ_g use[p, g, j_g] ≤ capacity(z)[p]    for every pool p
                z ≥ level[g, j_g]                      for every group g

A group is a set of tensors that share a choice; an option is a type (or several) and a home.
The variable z carries what depends on the largest item of a kind (the op-offload copy of the
largest expert tensor in RAM); pools without such a term have one capacity for every z.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]


@dataclass(frozen=True)
class Problem:
    """One knapsack.

    Attributes:
        groups: a label per group, shape (G,).
        option: the label of option j of group g.
        cost: (G, J), +inf where padded or not allowed. Any unit; nats for damage.
        use: (P, G, J), bytes (or nats for a damage pool); 0 where padded.
        pools: a name per pool, shape (P,).
        capacities: (L, P), capacity of every pool when z = `levels[l]`.
        levels: (L,), ascending values of z worth trying.
        level: (G, J), what z must reach for an option.
        constraints: hard constraints already applied, in words.
    """

    groups: tuple[str, ...]
    option: Callable[[int, int], str]
    cost: FloatArray
    use: FloatArray
    pools: tuple[str, ...]
    capacities: FloatArray
    levels: IntArray
    level: IntArray
    constraints: tuple[str, ...] = ()

    @classmethod
    def simple(
        cls,
        cost: FloatArray,
        use: FloatArray,
        capacity: FloatArray,
        pools: tuple[str, ...] | None = None,
    ) -> Problem:
        """Build a problem without levels: `cost` (G, J), `use` (P, G, J), `capacity` (P,)."""
        n_groups = len(cost)
        return cls(
            groups=tuple(f"g{g}" for g in range(n_groups)),
            option=lambda g, j: f"o{j}",
            cost=cost,
            use=use,
            pools=pools or tuple(f"pool{p}" for p in range(use.shape[0])),
            capacities=np.asarray(capacity, dtype=np.float64)[None, :],
            levels=np.zeros(1, dtype=np.int64),
            level=np.zeros(cost.shape, dtype=np.int64),
        )

    def dump(self) -> dict[str, Any]:
        """Return everything needed to recompute the bound, as plain JSON values."""
        groups = []
        for g, label in enumerate(self.groups):
            rows = []
            for j in range(self.cost.shape[1]):
                if np.isfinite(self.cost[g, j]):
                    uses = {
                        p: int(self.use[i, g, j])
                        if float(self.use[i, g, j]).is_integer()
                        else float(self.use[i, g, j])
                        for i, p in enumerate(self.pools)
                        if self.use[i, g, j]
                    }
                    row: dict[str, Any] = {
                        "option": self.option(g, j),
                        "damage": float(self.cost[g, j]),
                        "bytes": uses,
                    }
                    if self.level[g, j]:
                        row["level_bytes"] = int(self.level[g, j])
                    rows.append(row)
            groups.append({"group": label, "options": rows})
        return {
            "pools": list(self.pools),
            "capacities": [
                {
                    "level_bytes": int(z),
                    **{p: float(c) for p, c in zip(self.pools, row, strict=True) if np.isfinite(c)},
                }
                for z, row in zip(self.levels, self.capacities, strict=True)
            ],
            "constraints": list(self.constraints),
            "groups": groups,
        }


@dataclass(frozen=True)
class Solution:
    """An answer and its proof.

    Attributes:
        status: `optimal` (gap closed to the tolerance), `feasible`, or `infeasible`.
        choice: (G,) option index per group; empty when infeasible.
        objective: Σ cost of the choice.
        lower_bound: no choice can cost less (Lagrangian bound over all levels).
        prices: (P,) multipliers that give the bound: cost saved per unit of each pool.
        used: (P,) what the choice uses.
        level: the z of the answer.
        shortfall: (P,) when infeasible: what is missing at least, by pool, using the least.
    """

    status: str
    choice: IntArray
    objective: float
    lower_bound: float
    prices: FloatArray
    used: FloatArray
    level: int = 0
    shortfall: FloatArray = field(default_factory=lambda: np.zeros(0))

    @property
    def gap(self) -> float:
        """(objective - lower_bound) / objective; 0 when the objective is 0."""
        if self.objective <= 0:
            return 0.0
        return max(0.0, (self.objective - self.lower_bound) / self.objective)
