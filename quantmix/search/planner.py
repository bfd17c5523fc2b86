"""Types and homes together: the search on a rig.

    placement  which layer on which GPU: a contiguous split, balanced by what the solver wants there
    stage 1    least damage that fits every device
    stage 2    with experts in RAM: most generation speed, damage within the slack

The layer split is found by solving once with the GPUs pooled, then moving single layers from GPUs
where memory is dear to neighbours where it is cheap. Everything else is the knapsack.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from quantmix.memory.model import HOST, DeviceMemory, Placement
from quantmix.memory.plan import device_memory
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.palette import Palette
from quantmix.rig.device import Rig
from quantmix.search.base import QUICK, Goals, Tried, better
from quantmix.search.choices import DAMAGE, SECONDS, to_problem
from quantmix.search.hybrid import HybridSearch
from quantmix.search.leading import Bounds
from quantmix.search.placement import move_boundary
from quantmix.search.timing import Timing
from quantmix.solve.bound import total
from quantmix.solve.problem import Problem, Solution
from quantmix.solve.solver import Limits, solve
from quantmix.units import GIB

_BOUNDARY_TRIES = 8
_PRICE_RATIO = 1.25
_SLACK_FOR_THE_GAP = 0.2  # share of the quality slack
_NEAR = 1e-9
_PART_OF_THE_GAP = 0.1
_PART_OF_THE_SLACK = 0.1
_FEW_MOVED = 0.1  # share of the layers


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
        damage, seconds: of the mix, and per token.
        least_damage, lower_bound: with RAM, of stage 1 over all placements; else None, and those
            of `stage1` are meant, for this split of the layers.
    """

    placement: Placement
    columns: NDArray[np.int64]
    homes: NDArray[np.int64]
    memory: tuple[DeviceMemory, ...]
    stage1: Solution
    problem: Problem
    cpu_expert_bytes: int
    constraints: tuple[str, ...]
    damage: float = 0.0
    seconds: float = 0.0
    least_damage: float | None = None
    lower_bound: float | None = None


@dataclass(frozen=True)
class Shortage:
    """Nothing fits: what is missing at least on every device, using the smallest types.

    `instead` is another way to see it: with so much more there, nothing would be missing either.
    With neither, everything fits but for the speed asked for.
    """

    missing_bytes: dict[str, int]
    instead: dict[str, int] = field(default_factory=dict)


def plan_on_rig(
    model: Model,
    palette: Palette,
    rig: Rig,
    settings: Settings,
    timing: Timing,
    goals: Goals,
) -> Plan | Shortage:
    """Return the best plan found on `rig`, or what is missing.

    Small GPUs are left out when that makes room: where the plan does not fit with them, or only
    with more layers in RAM. Of several plans the fastest within the slack of the least damage.
    """
    (_, whole), *fewer = _searches(model, palette, rig, settings, timing, goals)
    first = whole.run()
    plans = [first] if isinstance(first, Plan) else []
    for cards, search in fewer:
        if plans and not rig.has_ram:
            break
        found = search.run()
        if isinstance(found, Plan):
            plans.append(_on_rig(found, search, rig, cards))
    if isinstance(first, Shortage) and not plans:
        return first
    return _fastest_of(plans, whole)


def _fastest_of(plans: Sequence[Plan], search: _Search) -> Plan:
    """Return the fastest plan within the slack of the least damage, with what holds for all."""
    if len(plans) == 1:
        return plans[0]
    damage = min(p.least_damage for p in plans if p.least_damage is not None)
    allowed = damage + search._slack(damage)
    near = [p for p in plans if p.damage <= allowed * (1 + _NEAR)]
    best = min(near, key=lambda p: p.seconds)
    bound = min(p.lower_bound for p in plans if p.lower_bound is not None)
    return replace(best, least_damage=damage, lower_bound=min(bound, damage))


def _searches(
    model: Model,
    palette: Palette,
    rig: Rig,
    settings: Settings,
    timing: Timing,
    goals: Goals,
) -> Iterator[tuple[tuple[int, ...], _Search]]:
    """Yield a search with all GPUs, then with fewer where those may be of use.

    With RAM they must make room; without, the smallest types do not fit on all GPUs.
    """
    every, *fewer = rig.card_sets()
    whole = _Search(model, palette, rig, settings, timing, goals)
    yield every, whole
    slots = whole.fewest() if fewer and rig.has_ram else None
    for cards in fewer:
        search = _Search(model, palette, rig.only(cards), settings, timing.only(cards), goals)
        if search.makes_room(whole, slots) if rig.has_ram else whole.is_short():
            yield cards, search


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
        layers = self._layers()
        bounds = layers.least_damage(self.timing.wanted)
        least = self._least_damage(bounds, self._possible(layers))
        alone = self._alone(least)
        if alone is not None and better(alone.solution, least.solution):
            least = alone
        if not least.fits:
            return self._short(bounds)
        lowest = float(bounds.lower.min())
        limits = self._worthwhile(least.solution.objective, lowest)
        least = self._known(self._closer(least, limits))
        if self.timing.wanted is not None:
            free = float(layers.least_damage(None).lower.min())
            spent = free + self._slack(free)
            least = replace(least, ceiling=max(least.solution.objective, spent))
        best = self._fastest_placement(least, layers, bounds.lower, alone)
        if best.placement == least.placement and self.timing.wanted is not None:
            best = least  # solved with the speed in mind, which others are not
        elif best.placement != least.placement:
            again = self._solve(best.placement, limits, level=self._level_of(best))
            again = again.beside(least)
            best = again if again.fits else least
        plan = self._finish(best, self._fastest(best))
        damage = least.solution.objective
        return replace(plan, least_damage=damage, lower_bound=min(lowest, damage))

    def _closer(self, tried: Tried, limits: Limits) -> Tried:
        """Solve a placement again, thoroughly where it is worth it; never worse than it was."""
        if tried.solution.gap <= limits.gap:
            return tried
        again = self._solve(tried.placement, limits, level=self._level_of(tried))
        return again if better(again.solution, tried.solution) else tried

    def _level_of(self, tried: Tried) -> int | None:
        """Return the level to solve a placement at again: with a speed to reach, where it was."""
        return None if self.timing.min_tps is None else tried.solution.level

    def _worthwhile(self, damage: float, lowest: float) -> Limits:
        """Return limits that close a part of the gap that other placements leave open anyway.

        Nor is it worth seconds to know the least damage to less than a tenth of what stage 2 may
        spend.
        """
        open_share = (damage - lowest) / damage if damage > 0 else 0.0
        spent = _PART_OF_THE_SLACK * self._slack(damage) / damage if damage > 0 else 0.0
        limits = self.goals.limits
        return replace(limits, gap=max(limits.gap, _PART_OF_THE_GAP * open_share, spent))

    def _known(self, least: Tried) -> Tried:
        """Return the placement of least damage with what that damage is, for the slack.

        What its solve leaves open may take a part of the slack, not the most of it.
        """
        damage = least.solution.objective
        open_part = _SLACK_FOR_THE_GAP * self._slack(damage)
        return replace(least, least_damage=max(least.solution.lower_bound, damage - open_part))

    def _alone(self, least: Tried) -> Tried | None:
        """Return everything on the GPUs, split anew, when hardly any experts need the RAM."""
        placement = least.placement
        movable = self._movable(placement.layer_device)
        few = len(placement.cpu_experts) <= _FEW_MOVED * len(movable)
        if len(self.rig.gpus) < 2 or HOST in placement.layer_device or not few:
            return None
        found = self._resident(0)
        return found if found.fits else None

    def feasible(self) -> bool:
        """Whether any mix fits: smallest types packed; a search when a speed is asked for."""
        if not self.rig.has_ram:
            return self._resident(0).fits
        if self.timing.min_tps is None and self._packed_mix() is not None:
            return True
        layers = self._layers()
        bounds, possible = layers.least_damage(self.timing.wanted), self._possible(layers)
        if self._hopeless(bounds):
            return False
        if self.timing.min_tps is not None:
            return self._least_damage(bounds, possible).fits
        if self._of_splits(bounds, possible) is not None:
            return True
        frame = self._frame(self._host_counts()[0])
        return frame is not None and self._rounded(frame) is not None

    def may_fit(self) -> bool:
        """Whether the smallest types fit, at a speed that no bound excludes; in milliseconds."""
        if not self.rig.has_ram:
            return not self.is_short()
        if self.fewest() is None:
            return False
        if self.timing.wanted is None:
            return True
        return bool(self._possible(self._layers()).any())

    def is_short(self) -> bool:
        """Whether the smallest types do not fit with no layers in RAM, split evenly."""
        return bool(self._packed(0).missing)

    def makes_room(self, whole: _Search, theirs: int | None) -> bool:
        """Whether fewer GPUs than `whole` has hold more, or more layers.

        `theirs` is the `fewest` of `whole`.
        """
        ours = self.fewest()
        if ours is None or theirs is None:
            return ours is not None
        return ours < theirs or self._room(ours) > whole._room(ours)

    def _room(self, host_layers: int) -> int:
        """Return the bytes that all GPUs have for weights with so many first slots in RAM."""
        placement = self._placement(self._even_weights(), host_layers)
        memory = device_memory(self.model, self.settings, self.rig, placement)
        pairs = zip(self.rig.gpus, memory, strict=False)
        return sum((g.capacity_bytes or 0) - m.fixed_bytes() for g, m in pairs)

    def fastest(self) -> float:
        """Return the most tokens per second that a mix was found to reach, 0 when nothing fits."""
        free = replace(
            self, timing=replace(self.timing, min_tps=None), frames={}, rows={}, beside={}, memo={}
        )
        tried = free._fastest_mixes() if self.rig.has_ram else [free._resident(0)]
        seconds = np.inf
        for some in tried:
            second = to_problem(
                some.choices,
                some.problem.capacities,
                some.problem.levels,
                (),
                objective="seconds",
            )
            found = solve(second, QUICK, self.memo) if some.fits else some.solution
            seconds = min(seconds, found.objective + self.timing.fixed(some.placement))
        return 1.0 / seconds

    def _short(self, bounds: Bounds) -> Shortage:
        """Return what is missing: RAM alone or GPU memory alone, whatever number of layers is best.

        Where every number of layers misses both, the least sum.
        """
        every = [self._packed(n).missing for n in self._host_counts()]
        every += [self._packed_at(p).missing for p in self._promising_splits(bounds)]
        if not all(every):
            return Shortage({})
        host = self.rig.host.name
        ram = [m for m in every if set(m) == {host} and np.isfinite(m[host])]
        gpus = [m for m in every if host not in m]
        ways = [min(some, key=lambda m: sum(m.values())) for some in (ram, gpus) if some]
        ways = ways or [min(every, key=lambda m: sum(m.values()))]
        rounded = [{d: int(np.ceil(x)) for d, x in way.items() if np.isfinite(x)} for way in ways]
        return Shortage(*rounded)

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
            best = other if better(other.solution, best.solution) else best
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
            total(best.choices.damage, solution.choice),
            total(best.choices.seconds, solution.choice) + self.timing.in_use(best.placement),
        )


def fits_at_all(
    model: Model, palette: Palette, rig: Rig, settings: Settings, timing: Timing
) -> bool:
    """Whether any mix fits `rig` at the speed asked for; much cheaper than a plan."""
    searches = _searches(model, palette, rig, settings, timing, Goals())
    return any(search.feasible() for _, search in searches)


def may_fit(model: Model, palette: Palette, rig: Rig, settings: Settings, timing: Timing) -> bool:
    """Whether `fits_at_all` is worth asking; cheaper still."""
    searches = _searches(model, palette, rig, settings, timing, Goals())
    return any(search.may_fit() for _, search in searches)


def fastest_at_all(
    model: Model, palette: Palette, rig: Rig, settings: Settings, timing: Timing
) -> float:
    """Return the most tokens per second that a mix was found to reach, 0 when nothing fits."""
    searches = _searches(model, palette, rig, settings, timing, Goals())
    return max(search.fastest() for _, search in searches)


def _shortage(tried: Tried) -> Shortage:
    short = zip(tried.choices.pools, tried.solution.shortfall, strict=False)
    return Shortage({pool: int(np.ceil(x)) for pool, x in short if x > 0})


def price_per_gib(solution: Solution, pools: Sequence[str]) -> dict[str, float]:
    """Return nats saved per extra GiB on each device with a limit (or in the file)."""
    return {
        pool: float(price) * GIB
        for pool, price in zip(pools, solution.prices, strict=False)
        if price > 0 and pool not in (SECONDS, DAMAGE)
    }
