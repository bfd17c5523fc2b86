"""Types and homes together: the search on a rig.

    placement  which layer on which GPU: a contiguous split, balanced by what the solver wants there
    stage 1    least damage that fits every device
    stage 2    with experts in RAM: most generation speed, damage within the slack

The layer split is found by solving once with the GPUs pooled, then moving single layers from GPUs
where memory is dear to neighbours where it is cheap. Everything else is the knapsack.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from quantmix.choices import Choices, build_choices, movable_roles, to_problem
from quantmix.least import Least
from quantmix.memory.model import HOST, DeviceMemory, Placement
from quantmix.memory.plan import device_memory
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.palette import Palette
from quantmix.placement import (
    layer_weights,
    move_boundary,
    number_ranges,
    ranges,
    split_layers,
)
from quantmix.rig.device import Rig
from quantmix.solve.problem import FloatArray, IntArray, Problem, Solution
from quantmix.solve.solver import Limits, relax, solve
from quantmix.timing import Timing
from quantmix.units import GIB

_BOUNDARY_TRIES = 8
_PRICE_RATIO = 1.25
_HOST_LAYER_TRIES = 6
_WORTH_ROUNDING_UP = 0.2  # of a layer; below it one more layer will not fit
_QUICK = Limits(gap=2e-3, seconds=0.0)  # to compare placements
_SLACK_NATS, _SLACK_SHARE = 0.003, 0.02  # CONTRACT §2: quality slack of stage 2


@dataclass(frozen=True, slots=True)
class Goals:
    """What is wanted besides least damage, and when the search stops."""

    quality_slack: float | None = None
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Plan:
    """The answer of the search.

    Attributes:
        placement: homes of layers and which layers' experts are in RAM.
        columns: (T,) palette column per tensor, -1 = kept. homes: (T,) device, HOST = RAM.
        memory: per device, for exactly this placement and mix.
        stage1: the damage solve, whose bound is reported. problem: its knapsack.
        cpu_expert_bytes: largest single expert tensor in RAM.
        constraints: all hard constraints, in words.
    """

    placement: Placement
    columns: NDArray[np.int64]
    homes: NDArray[np.int64]
    memory: tuple[DeviceMemory, ...]
    stage1: Solution
    problem: Problem
    cpu_expert_bytes: int
    constraints: tuple[str, ...]


@dataclass(frozen=True)
class Shortage:
    """Nothing fits: what is missing at least on every device, using the smallest types."""

    missing_bytes: dict[str, int]
    reason: str = ""


def plan_on_rig(
    model: Model,
    palette: Palette,
    rig: Rig,
    settings: Settings,
    timing: Timing,
    goals: Goals,
) -> Plan | Shortage:
    """Return the best plan found on `rig`, or what is missing."""
    return _Search(model, palette, rig, settings, timing, goals).run()


@dataclass(frozen=True)
class _Tried:
    """One placement with its knapsack and the answer."""

    placement: Placement
    choices: Choices
    problem: Problem
    solution: Solution

    @property
    def fits(self) -> bool:
        return self.solution.status != "infeasible"


@dataclass(frozen=True)
class _Search:
    """What stays the same during one search."""

    model: Model
    palette: Palette
    rig: Rig
    settings: Settings
    timing: Timing
    goals: Goals

    def run(self) -> Plan | Shortage:
        """Search all placements: everything on the GPUs, or with RAM behind them."""
        if not self.rig.has_ram:
            best = self._resident(0)
            if not best.fits:
                return _shortage(best)
            best = self._solve(best.placement)
            return self._finish(best, best.solution)
        best = self._least_host_layers()
        if not best.fits:
            return _shortage(best)
        best = self._solve(best.placement)
        return self._finish(best, self._fastest(best))

    # -- everything on GPUs -----------------------------------------------------------------

    def _resident(self, host_layers: int) -> _Tried:
        """Split the layers over the GPUs, solve, and shift single layers while that helps."""
        placement = self._placement(self._even_weights(), host_layers)
        if len(self.rig.gpus) > 1:
            placement = self._placement(self._pooled_weights(placement), host_layers)
        best = self._solve(placement, _QUICK)
        tried = {placement.layer_device}
        for _ in range(_BOUNDARY_TRIES if len(self.rig.gpus) > 1 else 0):
            moved = self._next_split(best, tried)
            if moved is None:
                break
            tried.add(moved.layer_device)
            other = self._solve(moved, _QUICK)
            best = other if _better(other.solution, best.solution) else best
        return best

    def _pooled_weights(self, placement: Placement) -> list[float]:
        """Bytes that each block wants when all GPUs are one: the answer of a pooled solve."""
        memory = self._memory(placement)
        choices = self._choices(placement, memory)
        n_gpus = len(self.rig.gpus)
        capacities, levels = self._capacities(memory, choices)
        problem = replace(
            to_problem(choices, capacities, levels, ()),
            use=choices.use[:n_gpus].sum(axis=0)[None],
            pools=("GPUs",),
            capacities=capacities[:, :n_gpus].sum(axis=1)[:, None],
        )
        found = solve(problem, replace(self.goals.limits, gap=1e-3))
        if found.status == "infeasible":
            return self._even_weights()
        fixed = sum(m.kv_bytes + m.derived_bytes for m in memory[:n_gpus])
        weights = np.full(self._n_blocks(), fixed / max(1, self._n_blocks()))
        on_gpu = problem.use[0][np.arange(len(choices.groups)), found.choice]
        for group, n_bytes in zip(choices.groups, on_gpu, strict=True):
            layer = self.model.tensors[group.members[0]].layer
            if layer is not None and layer < len(weights):
                weights[layer] += n_bytes
        return [float(w) for w in weights]

    def _next_split(self, best: _Tried, tried: set[tuple[int, ...]]) -> Placement | None:
        """Move one layer across the boundary where memory prices (or overflows) differ most."""
        n_gpus = len(self.rig.gpus)
        solution = best.solution
        pressure = [float(p) for p in (solution.prices if best.fits else solution.shortfall)]
        order = sorted(range(n_gpus - 1), key=lambda g: -abs(pressure[g] - pressure[g + 1]))
        for left in order:
            high = max(pressure[left], pressure[left + 1])
            low = min(pressure[left], pressure[left + 1])
            if high <= low * _PRICE_RATIO:
                continue
            moved = move_boundary(
                best.placement.layer_device,
                left,
                towards_left=pressure[left + 1] > pressure[left],
            )
            if moved not in tried:
                return replace(best.placement, layer_device=moved)
        return None

    # -- with RAM behind the GPUs -----------------------------------------------------------

    def _least_host_layers(self) -> _Tried:
        """Leave as few first layers wholly in RAM as the rest needs to fit, usually none."""
        packed = self._packed()
        if not packed:
            return self._hybrid(0, None)
        best = self._hybrid(*packed[0])
        for host_layers, spilled in packed[1:_HOST_LAYER_TRIES]:
            if best.fits:
                break
            best = self._hybrid(host_layers, spilled)
        return best

    def feasible(self) -> bool:
        """Whether any mix fits; one quick solve for each way of packing the smallest types."""
        if not self.rig.has_ram:
            return self._resident(0).fits
        even = self._even_weights()
        for host_layers, spilled in self._packed()[:_HOST_LAYER_TRIES]:
            placement = replace(self._placement(even, host_layers), cpu_experts=spilled)
            if self._solve(placement, _QUICK).fits:
                return True
        return False

    def _packed(self) -> list[tuple[int, frozenset[int]]]:
        """Return (layers wholly in RAM, experts spilled to RAM) that hold the smallest types."""
        least = Least.of(self.model, self.palette)
        even = self._even_weights()
        found = []
        for k in range(self.model.hparams.n_layer + 1):
            spilled = least.spilled(self.rig, self.settings, self._placement(even, k))
            if spilled is not None:
                found.append((k, spilled))
                if len(found) == _HOST_LAYER_TRIES:
                    break
        return found

    def _hybrid(self, host_layers: int, spilled: frozenset[int] | None) -> _Tried:
        """Decide which layers' experts go to RAM, then solve for types with homes fixed.

        The relaxed problem with movable experts says how many layers each GPU keeps; the first
        layers of a GPU are the ones it keeps, so that the flags stay short.
        """
        placement = self._placement(self._even_weights(), host_layers)
        movable = self._movable(placement.layer_device)
        wanted = self._experts_kept(replace(placement, cpu_experts=movable))
        keep = [int(n + 1e-6) for n in wanted]
        best = self._solve(self._keeping(placement, movable, keep), _QUICK)
        if not best.fits:
            if spilled is None:
                return best
            return self._solve(replace(placement, cpu_experts=spilled), _QUICK)
        cost = self._cost(best)
        for gpu, n in enumerate(wanted):
            if n - keep[gpu] < _WORTH_ROUNDING_UP:
                continue
            more = [k + (g == gpu) for g, k in enumerate(keep)]
            tried = self._solve(self._keeping(placement, movable, more), _QUICK)
            if tried.fits and (less := self._cost(tried)) < cost:
                best, keep, cost = tried, more, less
        return best

    def _cost(self, tried: _Tried) -> float:
        """What a placement is judged by: least seconds at the allowed damage, relaxed."""
        second = self._second_stage(tried)
        one_level = replace(second, levels=second.levels[-1:], capacities=second.capacities[-1:])
        relaxed = relax(one_level)
        return np.inf if relaxed is None else relaxed.objective

    def _experts_kept(self, placement: Placement) -> list[float]:
        """Return how many expert layers each GPU keeps in the relaxed problem."""
        counts = [0.0] * len(self.rig.gpus)
        memory = self._memory(placement)
        choices = self._choices(placement, memory, movable=True)
        capacities, levels = self._capacities(memory, choices)
        x = self._relaxed(placement, choices, capacities[-1:], levels[-1:])
        if x is None:
            return counts
        for g, group in enumerate(choices.groups):
            if len(set(group.homes.tolist())) > 1:
                for home in range(len(counts)):
                    counts[home] += float(x[g, : len(group.homes)][group.homes == home].sum())
        return counts

    def _relaxed(
        self, placement: Placement, choices: Choices, capacities: FloatArray, levels: IntArray
    ) -> FloatArray | None:
        """Return the LP answer of stage 2, or of stage 1 where damage leaves no room."""
        first = to_problem(choices, capacities, levels, (), budget=self.timing.allowed(placement))
        one = relax(first)
        if one is None:
            return None
        budget = one.objective + self._slack(one.objective)
        second = to_problem(choices, capacities, levels, (), objective="seconds", budget=budget)
        two = relax(second)
        return (two or one).x

    def _keeping(
        self, placement: Placement, movable: frozenset[int], keep: Sequence[int]
    ) -> Placement:
        """Return the placement in which each GPU keeps the experts of its first layers."""
        moved: set[int] = set()
        for gpu, n in enumerate(keep):
            mine = sorted(i for i in movable if placement.layer_device[i] == gpu)
            moved.update(mine[n:])
        return replace(placement, cpu_experts=frozenset(moved))

    def _fastest(self, best: _Tried) -> Solution:
        """Stage 2: least seconds per token with damage within the slack of stage 1."""
        found = solve(self._second_stage(best), _QUICK)
        return best.solution if found.status == "infeasible" else found

    def _second_stage(self, best: _Tried) -> Problem:
        """Return the knapsack of seconds, with damage as one more pool."""
        return to_problem(
            best.choices,
            best.problem.capacities[:, : len(best.choices.pools)],
            best.problem.levels,
            best.problem.constraints,
            objective="seconds",
            budget=best.solution.objective + self._slack(best.solution.objective),
        )

    def _slack(self, damage: float) -> float:
        if self.goals.quality_slack is not None:
            return self.goals.quality_slack
        return max(_SLACK_NATS, _SLACK_SHARE * damage)

    # -- parts of both ----------------------------------------------------------------------

    def _placement(self, weights: Sequence[float], host_layers: int) -> Placement:
        """Return the placement of a contiguous split by weight, no experts in RAM."""
        n_gpus = len(self.rig.gpus)
        last = n_gpus - 1
        probe = Placement((last,) * self._n_blocks(), last)
        memory = device_memory(self.model, self.settings, self.rig, probe)
        net = [
            float((g.capacity_bytes or 0) - m.reserve_bytes)
            for g, m in zip(self.rig.gpus, memory, strict=False)
        ]
        out = self.model.by_name.get("output.weight", self.model.by_name.get("token_embd.weight"))
        tail = 0.75 * out.n_elements if out else 0.0
        return Placement(split_layers(weights, net, tail=tail, host_layers=host_layers), last)

    def _movable(self, devices: Sequence[int]) -> frozenset[int]:
        roles = movable_roles(self.model)
        return frozenset(
            t.layer
            for t in self.model.tensors
            if t.layer is not None
            and t.layer < len(devices)
            and t.role in roles
            and devices[t.layer] != HOST
        )

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
            self.model, self.palette, placement, memory, self.timing.cells, movable=movable
        )

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

    def _solve(self, placement: Placement, limits: Limits | None = None) -> _Tried:
        """Stage 1 for one placement."""
        memory = device_memory(self.model, self.settings, self.rig, placement)
        choices = self._choices(placement, memory)
        capacities, levels = self._capacities(memory, choices)
        constraints = self.palette.constraints
        if len(self.rig.gpus) > 1 or self.rig.has_ram:
            names = [d.name for d in self.rig.devices]
            constraints = (*constraints, f"layers: {ranges(placement.layer_device, names)}")
        if placement.cpu_experts:
            layers = number_ranges(placement.cpu_experts)
            constraints = (*constraints, f"experts in RAM: layers {layers}")
        allowed = self.timing.allowed(placement)
        problem = to_problem(choices, capacities, levels, constraints, budget=allowed)
        return _Tried(placement, choices, problem, solve(problem, limits or self.goals.limits))

    def _finish(self, best: _Tried, solution: Solution) -> Plan:
        """Return the plan of a choice, with the memory of exactly this placement."""
        columns, homes = best.choices.mix(solution.choice)
        memory = device_memory(self.model, self.settings, self.rig, best.placement)
        rows = np.arange(len(best.choices.groups))
        return Plan(
            best.placement,
            columns,
            homes,
            memory,
            best.solution,
            best.problem,
            int(best.choices.level[rows, solution.choice].max()),
            best.problem.constraints,
        )


def fits_at_all(
    model: Model, palette: Palette, rig: Rig, settings: Settings, timing: Timing
) -> bool:
    """Whether any mix fits `rig` at the speed asked for; much cheaper than a plan."""
    return _Search(model, palette, rig, settings, timing, Goals()).feasible()


def _shortage(tried: _Tried) -> Shortage:
    short = zip(tried.choices.pools, tried.solution.shortfall, strict=False)
    return Shortage({pool: int(np.ceil(x)) for pool, x in short if x > 0})


def _better(a: Solution, b: Solution) -> bool:
    if a.status == "infeasible":
        return b.status == "infeasible" and a.shortfall.sum() < b.shortfall.sum()
    return b.status == "infeasible" or a.objective < b.objective


def price_per_gib(solution: Solution, pools: Sequence[str]) -> dict[str, float]:
    """Return nats saved per extra GiB on each device with a limit."""
    return {
        pool: float(price) * GIB
        for pool, price in zip(pools, solution.prices, strict=False)
        if price > 0
    }
