"""What every search on a rig needs: placements, their knapsacks, and both stages as problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from quantmix.errors import UsageError
from quantmix.memory.head import head_device, head_name
from quantmix.memory.model import HOST, DeviceMemory, Placement
from quantmix.memory.plan import device_memory
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.palette import Palette
from quantmix.rig.device import Rig
from quantmix.search.choices import Choices, build_choices, to_problem
from quantmix.search.placement import (
    layer_weights,
    number_ranges,
    ranges,
    split_layers,
)
from quantmix.search.timing import Timing
from quantmix.solve.pools import Memo
from quantmix.solve.problem import FloatArray, IntArray, Problem, Solution
from quantmix.solve.solver import Limits, solve

QUICK = Limits(gap=2e-3, seconds=0.0)
"""To compare placements."""

_SLACK_NATS, _SLACK_SHARE = 0.003, 0.02  # CONTRACT §2: quality slack of stage 2


@dataclass(frozen=True, slots=True)
class Goals:
    """What is wanted besides least damage, and when the search stops."""

    quality_slack: float | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Tried:
    """One placement with its knapsack and the answer; the least damage of all tried with it."""

    placement: Placement
    choices: Choices
    problem: Problem
    solution: Solution
    least_damage: float = np.inf

    @property
    def fits(self) -> bool:
        return self.solution.status != "infeasible"


@dataclass(frozen=True)
class Search:
    """What stays the same during one search."""

    model: Model
    palette: Palette
    rig: Rig
    settings: Settings
    timing: Timing
    goals: Goals
    memo: Memo = field(default_factory=dict)
    ends: dict[tuple[tuple[int, ...], int], tuple[Choices, Choices] | None] = field(
        default_factory=dict
    )

    def _placement(self, weights: Sequence[float], host_layers: int) -> Placement:
        """Return the placement of a contiguous split by weight, no experts in RAM.

        `host_layers` first slots stay in RAM (`head.host_slots`).
        """
        n_gpus = len(self.rig.gpus)
        last = n_gpus - 1
        probe = Placement((last,) * self._n_blocks(), last)
        memory = device_memory(self.model, self.settings, self.rig, probe, visible=range(n_gpus))
        net = [
            float((g.capacity_bytes or 0) - m.reserve_bytes)
            for g, m in zip(self.rig.gpus, memory, strict=False)
        ]
        out = self.model.by_name.get(head_name(self.model))
        head = head_device(self.model, self.settings, host_layers, self._n_blocks(), last)
        tail = 0.75 * out.n_elements if out and head != HOST else 0.0
        blocks = min(host_layers, self._n_blocks())
        return Placement(split_layers(weights, net, tail=tail, host_layers=blocks), head)

    def _n_blocks(self) -> int:
        h = self.model.hparams
        return h.n_layer + (h.nextn_layers if self.settings.mtp and h.nextn_in_gguf else 0)

    def _even_weights(self) -> list[float]:
        return layer_weights(self.model, self._n_blocks())

    def _memory(self, placement: Placement) -> tuple[DeviceMemory, ...]:
        """Return device memory that bounds every subset of `cpu_experts` moving to RAM."""
        none = device_memory(
            self.model, self.settings, self.rig, replace(placement, cpu_experts=frozenset())
        )
        if not placement.cpu_experts:
            return none
        moved = device_memory(self.model, self.settings, self.rig, placement)
        return tuple(
            replace(a, compute=tuple(dict.fromkeys((*a.compute, *b.compute))))
            for a, b in zip(none, moved, strict=True)
        )

    def _choices(
        self, placement: Placement, memory: Sequence[DeviceMemory], *, movable: bool = False
    ) -> Choices:
        return build_choices(
            self.model,
            self.palette,
            placement,
            memory,
            self.timing.cells,
            movable=movable,
            kept_seconds=self.timing.kept,
        )

    def _fixed_choices(self, placement: Placement, memory: Sequence[DeviceMemory]) -> Choices:
        """Return the choices of a placement, from those with no experts in RAM and with all.

        Placements that differ in their experts only are many, and building choices is slow.
        """
        key = placement.layer_device, placement.output_device
        if key not in self.ends:
            self.ends[key] = self._both_ends(placement)
        ends = self.ends[key]
        if ends is None:
            return self._choices(placement, memory)
        return _between(*ends, placement)

    def _both_ends(self, placement: Placement) -> tuple[Choices, Choices] | None:
        """Return the choices with no experts in RAM and with all; None when one is impossible."""
        every = frozenset(i for i, d in enumerate(placement.layer_device) if d != HOST)
        ends = []
        for layers in (frozenset[int](), every):
            there = replace(placement, cpu_experts=layers)
            memory = device_memory(self.model, self.settings, self.rig, there)
            try:
                ends.append(self._choices(there, memory))
            except UsageError:
                return None
        return ends[0], ends[1]

    def _capacities(
        self, memory: Sequence[DeviceMemory], choices: Choices
    ) -> tuple[FloatArray, IntArray]:
        """Return (L, D) bytes left for weights, and the levels S of the largest RAM expert."""
        depends = any(r.coefficient for m in memory for r in m.compute)
        levels = np.unique(choices.level) if depends else np.array([choices.level.max()])
        capacities = np.array(
            [
                [
                    np.inf
                    if d.capacity_bytes is None
                    else float(d.capacity_bytes - m.fixed_bytes(int(z)))
                    for d, m in zip(self.rig.devices, memory, strict=True)
                ]
                for z in levels
            ]
        )
        return capacities, levels.astype(np.int64)

    def _solve(
        self,
        placement: Placement,
        limits: Limits | None = None,
        *,
        level: int | None = None,
        capped: bool = True,
    ) -> Tried:
        """Stage 1 for one placement, at one level of z when it is given.

        Without `capped` a speed to reach is left out: quick, and stage 2 makes the mix fast anyway.
        """
        memory = device_memory(self.model, self.settings, self.rig, placement)
        choices = self._fixed_choices(placement, memory)
        capacities, levels = self._capacities(memory, choices)
        constraints = self.palette.constraints
        if len(self.rig.gpus) > 1 or self.rig.has_ram:
            names = [d.name for d in self.rig.devices]
            constraints = (*constraints, f"layers: {ranges(placement.layer_device, names)}")
        if placement.cpu_experts:
            layers = number_ranges(placement.cpu_experts)
            constraints = (*constraints, f"experts in RAM: layers {layers}")
        allowed = self.timing.allowed(placement) if capped else None
        problem = to_problem(choices, capacities, levels, constraints, budget=allowed)
        if level is not None:
            problem = self._at_level(problem, level)
        found = solve(problem, limits or self.goals.limits, self.memo)
        return Tried(placement, choices, problem, found)

    def _at_level(self, problem: Problem, level: int) -> Problem:
        """Return a problem with only the least level that reaches `level`."""
        at = min(int(np.searchsorted(problem.levels, level)), len(problem.levels) - 1)
        return replace(
            problem,
            levels=problem.levels[at : at + 1],
            capacities=problem.capacities[at : at + 1],
        )

    def _second_stage(self, best: Tried) -> Problem:
        """Return the knapsack of seconds, with damage as one more pool."""
        return to_problem(
            best.choices,
            best.problem.capacities[:, : len(best.choices.pools)],
            best.problem.levels,
            best.problem.constraints,
            objective="seconds",
            budget=self._allowed(best),
        )

    def _allowed(self, best: Tried) -> float:
        """Return the damage that stage 2 may do: the least known with its slack."""
        least = min(best.least_damage, best.solution.objective)
        return least + self._slack(least)

    def _slack(self, damage: float) -> float:
        if self.goals.quality_slack is not None:
            return self.goals.quality_slack
        return max(_SLACK_NATS, _SLACK_SHARE * damage)


def better(a: Solution, b: Solution) -> bool:
    """Whether `a` does less damage than `b`, or is short of less where neither fits."""
    if a.status == "infeasible":
        return b.status == "infeasible" and a.shortfall.sum() < b.shortfall.sum()
    return b.status == "infeasible" or a.objective < b.objective


def _between(none: Choices, every: Choices, placement: Placement) -> Choices:
    """Return the choices of a placement: rows of layers whose experts are in RAM from `every`."""
    layers = placement.cpu_experts
    if not layers:
        return none
    first = [none.model.tensors[g.members[0]] for g in none.groups]
    moved = np.array([t.layer is None or t.layer in layers for t in first])
    width = max(none.damage.shape[1], every.damage.shape[1])

    def joined(
        a: NDArray[np.generic], b: NDArray[np.generic], filler: float
    ) -> NDArray[np.float64]:
        a, b = (_widened(x, width, filler) for x in (a, b))
        return np.where(moved[:, None], b, a)

    pairs = zip(none.groups, every.groups, moved, strict=True)
    return replace(
        none,
        groups=tuple(b if there else a for a, b, there in pairs),
        damage=joined(none.damage, every.damage, np.inf),
        seconds=joined(none.seconds, every.seconds, np.inf),
        use=joined(none.use, every.use, 0.0),
        level=joined(none.level, every.level, 0).astype(np.int64),
    )


def _widened(values: NDArray[np.generic], width: int, filler: float) -> NDArray[np.generic]:
    """Return values with their last axis filled up to `width`."""
    missing = width - values.shape[-1]
    edges = [(0, 0)] * (values.ndim - 1) + [(0, missing)]
    return np.pad(values, edges, constant_values=filler) if missing else values
