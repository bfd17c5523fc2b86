"""The search with RAM behind the GPUs: which layers' experts each GPU keeps.

relaxed    an LP with movable experts says how many layers each GPU keeps: once for the least
           damage, once for the most speed within the quality slack
rounding   whole layers, rounded down; then one more on a GPU where that is faster, as long as
           the least damage known and its slack allow it
stage 2    least seconds per token for that placement
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from quantmix.choices import Choices, movable_roles, to_problem
from quantmix.least import Least
from quantmix.memory.head import host_slots
from quantmix.memory.model import HOST, Placement
from quantmix.search import QUICK, Search, Tried
from quantmix.solve.bound import lagrangian
from quantmix.solve.problem import FloatArray, Problem, Solution
from quantmix.solve.solver import Limits, Relaxed, relax, relaxed_at_price, solve

_HOST_LAYER_TRIES = 6
_PRICE_RANGE = (1.0, 1.5, 2.5, 5.0)  # of the price of damage, to compare placements
_FAST_LEVELS = 2  # levels of z that stage 2 solves: the most promising
_COUPLED_TRIES = 3
_SLACK_FOR_ROUNDING = 0.2  # share of the quality slack
_WORTH_ROUNDING_UP = 0.2  # of a layer; below it one more layer will not fit
_SPEED = Limits(gap=5e-3, seconds=0.0)  # of seconds per token, far below what is predictable


@dataclass(frozen=True)
class _Kept:
    """Expert layers per GPU for the least damage and for the most speed, and that damage."""

    gentle: list[float]
    fast: list[float]
    least_damage: float


@dataclass(frozen=True)
class HybridSearch(Search):
    """Placements that leave the experts of some layers in RAM."""

    def _least_host_layers(self) -> Tried:
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

    def leading(self) -> int | None:
        """Return how many first slots must lie in RAM at the smallest types; None: nothing fits.

        The layers are split evenly: without RAM another split may fit all the same.
        """
        packed = self._packed(1)
        return packed[0][0] if packed else None

    def _packed(self, most: int = _HOST_LAYER_TRIES) -> list[tuple[int, frozenset[int]]]:
        """Return (slots wholly in RAM, experts spilled to RAM) that hold the smallest types."""
        least = Least.of(self.model, self.palette)
        even = self._even_weights()
        found = []
        slots = host_slots(self.settings, self._n_blocks())
        for k in slots if self.rig.gpus and self.rig.has_ram else slots[:1]:
            spilled = least.spilled(self.rig, self.settings, self._placement(even, k))
            if spilled is not None:
                found.append((k, spilled))
                if len(found) == most:
                    break
        return found

    def _hybrid(self, host_layers: int, spilled: frozenset[int] | None) -> Tried:
        """Decide which layers' experts go to RAM, then solve for types with homes fixed.

        The relaxed problem with movable experts says how many layers each GPU keeps; the first
        layers of a GPU are the ones it keeps, so that the flags stay short.
        """
        placement = self._placement(self._even_weights(), host_layers)
        movable = self._movable(placement.layer_device)
        kept = self._experts_kept(replace(placement, cpu_experts=movable))
        best, wanted = self._less_damage(placement, movable, kept)
        if not best.fits:
            if spilled is None:
                return best
            return self._solve(replace(placement, cpu_experts=spilled), QUICK)
        keep = _whole(wanted)
        relaxed = relax(self._at_level(self._second_stage(best), best.solution.level))
        if relaxed is None:
            return best
        prices = [float(relaxed.prices[-1]) * x for x in _PRICE_RANGE]
        cost = self._cost(best, prices)
        order = sorted(range(len(wanted)), key=lambda g: keep[g] - wanted[g])
        # With a speed to reach every try couples all pools and costs ten times as much.
        for gpu in order if self.timing.min_tps is None else order[:_COUPLED_TRIES]:
            if wanted[gpu] - keep[gpu] < _WORTH_ROUNDING_UP:
                break
            more = [k + (g == gpu) for g, k in enumerate(keep)]
            tried = self._one_more(self._keeping(placement, movable, more), best)
            if tried is not None and (less := self._cost(tried, prices)) < cost:
                best, keep, cost = tried, more, less
        return best

    def _less_damage(
        self, placement: Placement, movable: frozenset[int], kept: _Kept
    ) -> tuple[Tried, Sequence[float]]:
        """Solve with the experts kept for speed if that is near the least damage, else for that."""
        best = self._solve(self._keeping(placement, movable, _whole(kept.fast)), QUICK)
        other = best
        if _whole(kept.gentle) != _whole(kept.fast):
            other = self._solve(self._keeping(placement, movable, _whole(kept.gentle)), QUICK)
        least = min(best.solution.objective, other.solution.objective)
        # No placement does less damage than the relaxed one; what whole layers and quick solves
        # add to it may take a part of the slack, not the most of it.
        least = max(kept.least_damage, least - _SLACK_FOR_ROUNDING * self._slack(least))
        best, other = replace(best, least_damage=least), replace(other, least_damage=least)
        if other.fits and best.solution.objective > self._allowed(best):
            return other, kept.gentle
        return best, kept.fast

    def _one_more(self, placement: Placement, best: Tried) -> Tried | None:
        """Return a placement near `best`, solved quickly; None when it costs too much damage."""
        tried = self._solve(placement, QUICK, level=best.solution.level)
        if not tried.fits or tried.solution.objective > self._allowed(best):
            return None
        return replace(tried, least_damage=best.least_damage)

    def _cost(self, tried: Tried, prices: Sequence[float]) -> float:
        """What a placement is judged by: least seconds at the allowed damage, relaxed.

        `prices` are what damage may cost in seconds. What whole layers add to the damage beyond
        the relaxed figure of stage 1, they will add in stage 2.
        """
        second = self._at_level(self._second_stage(tried), tried.solution.level)
        lost = tried.solution.objective - tried.solution.lower_bound
        return max(relaxed_at_price(second, p, self.memo) + p * lost for p in prices)

    def _experts_kept(self, placement: Placement) -> _Kept:
        """Return how many expert layers each GPU keeps in the relaxed problems of both stages."""
        memory = self._memory(placement)
        choices = self._choices(placement, memory, movable=True)
        capacities, levels = self._capacities(memory, choices)
        allowed = self.timing.allowed(placement)
        one = _relaxed_level(to_problem(choices, capacities, levels, (), budget=allowed))
        if one is None:
            nothing = [0.0] * len(self.rig.gpus)
            return _Kept(nothing, nothing, 0.0)
        least, at = one
        second = to_problem(
            choices,
            capacities[at : at + 1],
            levels[at : at + 1],
            (),
            objective="seconds",
            budget=least.objective + self._slack(least.objective),
        )
        fastest = relax(second) or least
        gentle, fast = (self._kept_by(choices, found.x) for found in (least, fastest))
        return _Kept(gentle, fast, least.objective)

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

    def _fastest(self, best: Tried) -> Solution:
        """Stage 2: least seconds per token with damage within the slack of stage 1."""
        second = self._second_stage(best)
        relaxed = relax(self._at_level(second, best.solution.level))
        if relaxed is not None:
            prices = [float(relaxed.prices[-1]) * x for x in _PRICE_RANGE]
            most = set(self._promising(second, prices))
            most.add(int(np.searchsorted(second.levels, best.solution.level)))
            which = sorted(most)
            second = replace(
                second, levels=second.levels[which], capacities=second.capacities[which]
            )
        found = solve(second, _SPEED, self.memo)
        return best.solution if found.status == "infeasible" else found

    def _promising(self, problem: Problem, prices: Sequence[float]) -> list[int]:
        """Return the levels with the least bounds, each bound the best over `prices`."""
        levels = [self._at_level(problem, int(z)) for z in problem.levels]
        rough = [relaxed_at_price(one, prices[0], self.memo) for one in levels]
        full: dict[int, float] = {}
        for i in np.argsort(rough, kind="stable").tolist():
            least = sorted(full.values())[:_FAST_LEVELS]
            if len(least) == _FAST_LEVELS and rough[i] >= least[-1]:
                break
            others = [relaxed_at_price(levels[i], p, self.memo) for p in prices[1:]]
            full[i] = max(rough[i], *others)
        return sorted(full, key=lambda i: (full[i], i))[:_FAST_LEVELS]

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


def _whole(counts: Sequence[float]) -> list[int]:
    return [int(n + 1e-6) for n in counts]


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
