"""Types and homes together: the search on a rig.

    placement  which layer on which GPU: a contiguous split, balanced by what the solver wants there
    stage 1    least damage that fits every device
    stage 2    with experts in RAM: most generation speed, damage within the slack

The layer split is found by solving once with the GPUs pooled, then moving single layers from GPUs
where memory is dear to neighbours where it is cheap. Everything else is the knapsack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quantmix.choices import DAMAGE, SECONDS, to_problem
from quantmix.hybrid import HybridSearch
from quantmix.memory.model import HOST, DeviceMemory, Placement
from quantmix.memory.plan import device_memory
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.palette import Palette
from quantmix.placement import move_boundary
from quantmix.rig.device import Rig
from quantmix.search import QUICK, Goals, Tried
from quantmix.solve.problem import Problem, Solution
from quantmix.solve.solver import solve
from quantmix.timing import Timing
from quantmix.units import GIB

_BOUNDARY_TRIES = 8
_PRICE_RATIO = 1.25


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
    """Return the best plan found on `rig`, or what is missing.

    Small GPUs are left out when the plan does not fit with them, or only with more layers in RAM.
    """
    shortage: Shortage | None = None
    for cards, search in _searches(model, palette, rig, settings, timing, goals):
        found = search.run()
        if isinstance(found, Plan):
            return found if len(cards) == len(rig.gpus) else _on_rig(found, search, rig, cards)
        if shortage is None or len(cards) == len(rig.gpus):
            shortage = found
    assert shortage is not None, "all GPUs together are a set of GPUs"
    return shortage


def _searches(
    model: Model,
    palette: Palette,
    rig: Rig,
    settings: Settings,
    timing: Timing,
    goals: Goals,
) -> Iterator[tuple[tuple[int, ...], _Search]]:
    """Yield searches with all GPUs or fewer, as far as they may be of use.

    All GPUs alone where the smallest types fit without layers in RAM: what fails then is a speed.
    Else those first that leave the fewest layers in RAM; without RAM, those with the most GPUs.
    """
    whole, *fewer = rig.card_sets()
    search = _Search(model, palette, rig, settings, timing, goals)
    leading = search.leading()
    if leading == 0 or not fewer:
        yield whole, search
        return
    tried = [(np.inf if leading is None else leading, whole, search)]
    for cards in fewer:
        other = replace(search, rig=rig.only(cards), timing=timing.only(cards), memo={})
        leading = other.leading()
        if leading is not None or not rig.has_ram:
            tried.append((np.inf if leading is None else leading, cards, other))
    for _, cards, other in sorted(tried, key=lambda t: t[0]) if rig.has_ram else tried:
        yield cards, other


def _on_rig(plan: Plan, search: _Search, rig: Rig, cards: Sequence[int]) -> Plan:
    """Return a plan made on some GPUs of a rig as a plan of the whole rig."""
    placement = plan.placement.on(cards)
    homes = np.array([*cards, HOST])[plan.homes]  # HOST is -1, the last
    memory = device_memory(search.model, search.settings, rig, placement)
    return replace(plan, placement=placement, homes=homes, memory=memory)


@dataclass(frozen=True)
class _Search(HybridSearch):
    """All placements: everything on the GPUs, or with RAM behind them."""

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
        least = best.least_damage
        best = replace(self._solve(best.placement), least_damage=least)
        return self._finish(best, self._fastest(best))

    def feasible(self) -> bool:
        """Whether any mix fits; one quick solve for each way of packing the smallest types."""
        if not self.rig.has_ram:
            return self._resident(0).fits
        even = self._even_weights()
        for host_layers, spilled in self._packed():
            placement = replace(self._placement(even, host_layers), cpu_experts=spilled)
            if self._solve(placement, QUICK).fits:
                return True
        return False

    def _resident(self, host_layers: int) -> Tried:
        """Split the layers over the GPUs, solve, and shift single layers while that helps."""
        placement = self._placement(self._even_weights(), host_layers)
        if len(self.rig.gpus) > 1:
            placement = self._placement(self._pooled_weights(placement), host_layers)
        best = self._solve(placement, QUICK)
        tried = {placement.layer_device}
        for _ in range(_BOUNDARY_TRIES if len(self.rig.gpus) > 1 else 0):
            moved = self._next_split(best, tried)
            if moved is None:
                break
            tried.add(moved.layer_device)
            other = self._solve(moved, QUICK)
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

    def _next_split(self, best: Tried, tried: set[tuple[int, ...]]) -> Placement | None:
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

    def _finish(self, best: Tried, solution: Solution) -> Plan:
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
    searches = _searches(model, palette, rig, settings, timing, Goals())
    return any(search.feasible() for _, search in searches)


def _shortage(tried: Tried) -> Shortage:
    short = zip(tried.choices.pools, tried.solution.shortfall, strict=False)
    return Shortage({pool: int(np.ceil(x)) for pool, x in short if x > 0})


def _better(a: Solution, b: Solution) -> bool:
    if a.status == "infeasible":
        return b.status == "infeasible" and a.shortfall.sum() < b.shortfall.sum()
    return b.status == "infeasible" or a.objective < b.objective


def price_per_gib(solution: Solution, pools: Sequence[str]) -> dict[str, float]:
    """Return nats saved per extra GiB on each device with a limit (or in the file)."""
    return {
        pool: float(price) * GIB
        for pool, price in zip(pools, solution.prices, strict=False)
        if price > 0 and pool not in (SECONDS, DAMAGE)
    }
