"""Numbers of leading layers in RAM, one at a time: relaxed, and rounded to whole layers.

relaxed    an LP with movable experts says how many layers' experts each GPU keeps
rounding   whole layers, rounded down and to the nearest sum; then single ones more or fewer

What all numbers promise at once is `leading`'s; which to look at is `hybrid`'s.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from quantmix.errors import UsageError
from quantmix.memory.head import host_slots
from quantmix.memory.model import HOST, DeviceMemory, Placement
from quantmix.memory.plan import device_memory
from quantmix.search.base import QUICK, Search, Tried, better
from quantmix.search.choices import Choices, movable_roles, to_problem
from quantmix.search.leading import Bounds, Count, Layers
from quantmix.search.least import Least, Packed
from quantmix.solve.bound import lagrangian
from quantmix.solve.problem import FloatArray, IntArray, Problem
from quantmix.solve.solver import Relaxed, relax

_PACKED_TRIES = 6
_NEAR_RELAXED = 5e-3  # of damage: what whole layers may cost without a further look
_NEAR_COUPLED = 2e-2  # the same where a further look is slow
_ROUNDING_TRIES, _HOPELESS_TRIES = 12, 4
_ROUNDING_TRIES_PER_LEVEL = 7  # where every try solves many levels
NEAR = 2e-3
"""Of damage: bounds that close are not told apart."""

COUPLED_TRIES = 3
"""Placements tried where every try couples all pools, which costs ten times as much."""


@dataclass(frozen=True)
class Frame:
    """One number of leading layers in RAM: its placement, its problem with movable experts.

    `relaxed` is the LP of least damage at its best level `at`; `kept` how many expert layers each
    GPU keeps there.
    """

    slots: int
    placement: Placement
    movable: frozenset[int]
    choices: Choices
    capacities: FloatArray
    levels: IntArray
    at: int
    relaxed: Relaxed
    kept: list[float]


@dataclass(frozen=True)
class FrameSearch(Search):
    """Placements with a given number of leading layers in RAM."""

    frames: dict[int, Frame | None] = field(default_factory=dict)

    def _host_counts(self) -> range:
        """Return how many of the first slots may lie in RAM; without GPUs all do."""
        return host_slots(self.settings, self._n_blocks()) if self.rig.gpus else range(1)

    def _layers(self) -> Layers:
        """Return what bounds every number of leading layers in RAM.

        Raises:
            UsageError: a tensor has no type that its device can run.
        """
        even = self._even_weights()
        counts: list[Count] = []
        outside: dict[tuple[int, bool], Choices] = {}
        for slots in self._host_counts():
            none = self._placement(even, slots)
            every = replace(none, cpu_experts=self._movable(none.layer_device))
            memory = self._device_memory(none), self._device_memory(every)
            n_layers = none.layer_device.count(HOST)
            fixed, in_use = self.timing.fixed(none), self.timing.in_use(none)
            # As soon as experts are in RAM a GPU holds a copy of one, and RAM may hold a tied head
            # twice; more experts there need no more. What none of them leaves is a case of its own.
            apart = _beside_weights(memory[0]) != _beside_weights(memory[1])
            for at in ([0], [1]) if apart else ([0, 1],):
                key = none.output_device, memory[at[0]][-1].duplicate_embedding
                try:
                    if key not in outside:
                        outside[key] = self._choices((none, every)[at[0]], memory[at[0]])
                except UsageError:
                    if not counts:
                        raise
                    continue
                ends = memory[at[0]], memory[at[-1]]
                counts.append(
                    Count(slots, n_layers, ends, outside[key], fixed, in_use, moves=1 in at)
                )
        return Layers.of(counts, self.rig, self.timing, self._n_blocks())

    def _device_memory(self, placement: Placement) -> tuple[DeviceMemory, ...]:
        return device_memory(self.model, self.settings, self.rig, placement)

    def _unmoved(self, host_layers: int) -> Tried | None:
        """Return the placement without experts in RAM where those make RAM hold the head twice."""
        none = self._placement(self._even_weights(), host_layers)
        every = replace(none, cpu_experts=self._movable(none.layer_device))
        one, two = (self._device_memory(p)[-1].duplicate_embedding for p in (none, every))
        if one == two:
            return None
        tried = self._solve(none, QUICK, level=None)
        return tried if tried.fits else None

    def _gentle(self, host_layers: int, bounds: Bounds, best: Tried | None) -> Tried | None:
        """Return the least damage with so many layers wholly in RAM, None when nothing fits."""
        packed = self._packed(host_layers)
        unmoved = self._unmoved(host_layers)
        if packed.missing and host_layers:
            return unmoved
        frame = self._frame(host_layers)
        if frame is None:
            return unmoved
        bounds.learn(*self._pooled(frame.relaxed.prices))
        if best is not None and frame.relaxed.objective >= best.solution.objective * (1 - NEAR):
            return best
        found = self._rounded(frame)
        if found is None and not packed.missing:
            found = self._solve(replace(frame.placement, cpu_experts=packed.spilled), QUICK)
        if found is None or (unmoved is not None and better(unmoved.solution, found.solution)):
            found = unmoved
        return found if found is not None and found.fits else None

    def fewest(self) -> int | None:
        """Return the fewest first slots in RAM that hold the smallest types; None: none does.

        More layers in RAM make room on the GPUs: the fewest that do are bisected, then a few more.
        Without RAM it is 0 for all that the full search knows better.
        """
        if not self.rig.has_ram:
            return 0
        counts = self._host_counts()
        low, high = 0, len(counts) - 1
        while low < high:
            middle = (low + high) // 2
            missing = self._packed(counts[middle]).missing
            if any(g.name in missing for g in self.rig.gpus):
                low = middle + 1
            else:
                high = middle
        near = counts[low : low + _PACKED_TRIES]
        return next((n for n in near if not self._packed(n).missing), None)

    def _pooled(self, prices: FloatArray) -> tuple[float, float, float]:
        """Return the prices of GPU memory, of RAM and of the third limit."""
        n_gpus = len(self.rig.gpus)
        gpu = float(prices[:n_gpus].mean()) if n_gpus else 0.0
        return gpu, float(prices[n_gpus]), float(prices[n_gpus + 1 :].sum())

    def _packed(self, host_layers: int) -> Packed:
        """Return how the smallest types lie with so many layers wholly in RAM."""
        return self._packed_at(self._placement(self._even_weights(), host_layers))

    def _packed_at(self, placement: Placement) -> Packed:
        """Return how the smallest types lie on a split of the layers."""
        return Least.of(self.model, self.palette).packed(self.rig, self.settings, placement)

    def _packed_mix(self) -> Tried | None:
        """Return a mix on the first placement that holds the smallest types, None if none does."""
        for host_layers in self._host_counts():
            packed = self._packed(host_layers)
            if not packed.missing:
                there = self._placement(self._even_weights(), host_layers)
                tried = self._solve(replace(there, cpu_experts=packed.spilled), QUICK)
                if tried.fits:
                    return tried
        return None

    def _possible(self, layers: Layers) -> NDArray[np.bool_]:
        """Return (K,) whether the speed asked for can be reached at any damage."""
        wanted = self.timing.wanted
        if wanted is None:
            return np.ones(len(layers.slots), dtype=np.bool_)
        seconds = layers.least_seconds(None).lower + layers.fixed_seconds
        return np.asarray(seconds <= wanted)

    def _frame(self, host_layers: int) -> Frame | None:
        """Return the relaxed problem of least damage, None when it has no answer."""
        if host_layers not in self.frames:
            self.frames[host_layers] = self._new_frame(host_layers)
        return self.frames[host_layers]

    def _new_frame(self, host_layers: int) -> Frame | None:
        placement = self._placement(self._even_weights(), host_layers)
        movable = self._movable(placement.layer_device)
        all_moved = replace(placement, cpu_experts=movable)
        memory = self._memory(all_moved)
        choices = self._waiting(self._choices(all_moved, memory, movable=True))
        capacities, levels = self._capacities(memory, choices)
        allowed = self.timing.allowed(placement)
        found = _relaxed_level(to_problem(choices, capacities, levels, (), budget=allowed))
        if found is None:
            return None
        relaxed, at = found
        kept = self._kept_by(choices, relaxed.x)
        return Frame(
            host_layers, placement, movable, choices, capacities, levels, at, relaxed, kept
        )

    def _waiting(self, choices: Choices) -> Choices:
        """Return choices whose experts cost more seconds in RAM: the GPU waits for them."""
        each = self.timing.waiting(self._n_blocks())
        seconds = choices.seconds.copy()
        for g, group in enumerate(choices.groups):
            if len(set(group.homes.tolist())) > 1:
                layer = self.model.tensors[group.members[0]].layer
                assert layer is not None, "only layers have movable experts"
                seconds[g, : len(group.homes)] += np.where(group.homes == HOST, each[layer], 0.0)
        return replace(choices, seconds=seconds)

    def _rounded(self, frame: Frame) -> Tried | None:
        """Return the best placement of whole layers near the relaxed one, None when none fits."""
        coupled = self.timing.min_tps is not None
        near = _NEAR_COUPLED if self._slow() else _NEAR_RELAXED
        enough = frame.relaxed.objective * (1 + near)
        level = self._one_level(frame)
        # With a speed to reach, layers left in RAM cost speed that rounding down does not give.
        starts = (
            [nearest(frame.kept)] if coupled else [rounded_down(frame.kept), nearest(frame.kept)]
        )
        waiting = starts
        best: Tried | None = None
        seen: set[tuple[int, ...]] = set()
        tries = _ROUNDING_TRIES if len(frame.levels) == 1 else _ROUNDING_TRIES_PER_LEVEL
        while len(seen) <= (COUPLED_TRIES if coupled else tries):
            keep = next((k for k in waiting if tuple(k) not in seen), None)
            if keep is None:
                break
            seen.add(tuple(keep))
            placement = self._keeping(frame.placement, frame.movable, keep)
            tried = self._solve(placement, QUICK, level=level)
            if best is None or better(tried.solution, best.solution):
                best, waiting = tried, [*starts, *_neighbours(keep, frame.kept)]
            if best.fits and best.solution.objective <= enough:
                break
            if not best.fits and len(seen) == _HOPELESS_TRIES:
                break
        return best if best is not None and best.fits else None

    def _slow(self) -> bool:
        """Whether every try costs a large part of a second: a speed to reach couples many pools."""
        return self.timing.min_tps is not None and len(self.rig.gpus) > 2

    def _one_level(self, frame: Frame) -> int | None:
        """Return the level to solve at: with a speed to reach, pools are coupled and all slow."""
        return None if self.timing.min_tps is None else int(frame.levels[frame.at])

    def _kept_by(self, choices: Choices, x: FloatArray) -> list[float]:
        """Return how many expert layers each GPU keeps in a relaxed answer."""
        counts = [0.0] * len(self.rig.gpus)
        for g, group in enumerate(choices.groups):
            if len(set(group.homes.tolist())) > 1:
                for home in range(len(counts)):
                    counts[home] += float(x[g, : len(group.homes)][group.homes == home].sum())
        return counts

    def _keeping(
        self, placement: Placement, movable: frozenset[int], keep: Sequence[int]
    ) -> Placement:
        """Return the placement in which each GPU keeps the experts of its first layers."""
        moved: set[int] = set()
        for gpu, n in enumerate(keep):
            mine = sorted(i for i in movable if placement.layer_device[i] == gpu)
            moved.update(mine[n:])
        return replace(placement, cpu_experts=frozenset(moved))

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


def _beside_weights(memory: Sequence[DeviceMemory]) -> tuple[bool, bool]:
    """Return whether a GPU copies experts from RAM, and whether RAM holds a tied head twice."""
    copies = any(r.coefficient for m in memory for r in m.compute)
    return copies, memory[-1].duplicate_embedding


def rounded_down(counts: Sequence[float]) -> list[int]:
    """Return whole numbers, rounded down."""
    return [int(n + 1e-6) for n in counts]


def nearest(counts: Sequence[float]) -> list[int]:
    """Return whole numbers with the nearest sum; the largest remainders go up."""
    down = rounded_down(counts)
    more = round(sum(counts)) - sum(down)
    up = sorted(range(len(down)), key=lambda g: down[g] - counts[g])[:more]
    return [n + (g in up) for g, n in enumerate(down)]


def _neighbours(keep: list[int], wanted: Sequence[float]) -> list[list[int]]:
    """Return `keep` with one layer more or less on a GPU, the nearest to `wanted` first."""
    steps = [(g, 1) for g in range(len(keep))] + [(g, -1) for g in range(len(keep)) if keep[g]]
    steps.sort(key=lambda s: abs(keep[s[0]] + s[1] - wanted[s[0]]))
    return [[k + by * (h == g) for h, k in enumerate(keep)] for g, by in steps]


def _relaxed_level(problem: Problem) -> tuple[Relaxed, int] | None:
    """Return the relaxation at the level of z that promises least, and that level's index."""
    for start in range(len(problem.levels) - 1, -1, -1):
        found = relax(problem, start)
        if found is not None:
            break
    else:
        return None
    bounds = [
        lagrangian(
            np.where(problem.level <= z, problem.cost, np.inf), problem.use, room, found.prices
        )
        for z, room in zip(problem.levels, problem.capacities, strict=True)
    ]
    at = int(np.argmin(bounds[: start + 1]))
    better = relax(problem, at) if at != start else None
    if better is None or better.objective >= found.objective:
        return found, start
    return better, at
