"""What every search on a rig needs: placements, their knapsacks, and both stages as problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

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
from quantmix.search.rows import Rows, together
from quantmix.search.timing import Timing
from quantmix.solve.pools import Memo
from quantmix.solve.problem import FloatArray, IntArray, Problem, Solution
from quantmix.solve.solver import Limits, solve

QUICK = Limits(gap=2e-3, seconds=0.0)
"""To compare placements."""

_SLACK_NATS, _SLACK_SHARE = 0.003, 0.02  # default of --quality-slack: the larger


@dataclass(frozen=True, slots=True)
class Goals:
    """What is wanted besides least damage, and when the search stops."""

    quality_slack: float | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Tried:
    """One placement with its knapsack and the answer; the least damage of all tried with it.

    `ceiling` is what damage stage 2 may do at most, where a speed was asked for.
    """

    placement: Placement
    choices: Choices
    problem: Problem
    solution: Solution
    least_damage: float = np.inf
    ceiling: float = np.inf

    def beside(self, least: Tried) -> Tried:
        """Return the same, held to what is allowed beside the placement of least damage."""
        return replace(self, least_damage=least.least_damage, ceiling=least.ceiling)

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
    rows: dict[int, Rows | None] = field(default_factory=dict)
    beside: dict[tuple[int, int, tuple[bool, ...]], Choices] = field(default_factory=dict)

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
        """Return the choices of a placement, put together from those with all layers in one place.

        Placements are many, and building choices is slow.
        """
        experts = placement.cpu_experts
        homes = sorted({*placement.layer_device, *([HOST] if experts else [])})
        rows = [self._rows(home) for home in homes]
        if any(r is None for r in rows):
            return self._choices(placement, memory)
        twice = tuple(m.duplicate_embedding for m in memory)
        key = placement.layer_device[0], placement.output_device, twice
        if key not in self.beside:
            self.beside[key] = self._choices(placement, memory)
        return together(
            self.beside[key], placement, dict(zip(homes, (r for r in rows if r), strict=True))
        )

    def _rows(self, home: int) -> Rows | None:
        """Return the choices with all layers on one device, None when one cannot lie there.

        GPUs that are alike share theirs.
        """
        cells, kept = self.timing.cells, self.timing.kept
        same = [
            g
            for g in range(home)
            if np.array_equal(cells[g], cells[home]) and np.array_equal(kept[g], kept[home])
        ]
        at = same[0] if same else home
        if at not in self.rows:
            placement = Placement((at,) * self._n_blocks(), at)
            memory = device_memory(self.model, self.settings, self.rig, placement)
            try:
                self.rows[at] = Rows.of(self._choices(placement, memory), at, self._n_blocks())
            except UsageError:
                self.rows[at] = None
        return self.rows[at]

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
        """Return the damage that stage 2 may do: the least known with its slack.

        A speed that was asked for has its price in that least; the slack is not spent on top of it.
        """
        least = min(best.least_damage, best.solution.objective)
        return min(best.ceiling, least + self._slack(least))

    def _slack(self, damage: float) -> float:
        if self.goals.quality_slack is not None:
            return self.goals.quality_slack
        return max(_SLACK_NATS, _SLACK_SHARE * damage)


def better(a: Solution, b: Solution) -> bool:
    """Whether `a` does less damage than `b`, or is short of less where neither fits."""
    if a.status == "infeasible":
        return b.status == "infeasible" and a.shortfall.sum() < b.shortfall.sum()
    return b.status == "infeasible" or a.objective < b.objective
