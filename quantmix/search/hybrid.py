"""The search with RAM behind the GPUs: layers wholly in RAM, and layers whose experts are.

bounds     how little damage, and how few seconds, any number of leading layers in RAM allows
           (`leading`, sharper where it matters in `splits`): what to look at, and proof of the rest
placement  the split of the layers that has the bound (`whole`); where none fits, whole layers near
           the relaxed answer of an even split (`frame`)
stage 1    least damage: the numbers that promise most, until none can be better
stage 2    least seconds per token within the slack of that damage, over all numbers again
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quantmix.memory.model import HOST, Placement
from quantmix.search.base import QUICK, Tried
from quantmix.search.choices import to_problem
from quantmix.search.frame import COUPLED_TRIES, NEAR, Frame, nearest, rounded_down
from quantmix.search.leading import Bounds, Layers
from quantmix.search.splits import Splits
from quantmix.search.whole import SPLITS_EACH, SplitSearch
from quantmix.solve.bound import total
from quantmix.solve.problem import FloatArray, Problem, Solution
from quantmix.solve.solver import Limits, relax, relaxed_at_price, solve

_MOST_COUNTS, _MOST_MISSES = 4, 8
_FAR, _NEIGHBOURS = 1.25, 2  # times the relaxed damage; numbers of layers
_FAST_COUNTS, _FAST_MISSES = 3, 4
_WORTH_A_LOOK = 5e-3  # of seconds
_EQUALLY_FAST = 1.02  # of predicted seconds; then fewer layers in RAM are better
_SAME = 1e-9  # of damage: the same but for the order of sums
_PART_OF_THE_GAP = 0.5
_PRICE_RANGE = (1.0, 1.5, 2.5, 5.0)  # of the price of damage, to compare placements
_FAST_LEVELS = 2  # levels of z that stage 2 solves: the most promising
_WORTH_ROUNDING_UP = 0.2  # of a layer; below it one more layer will not fit
_SPEED = Limits(gap=5e-3, seconds=0.0)  # of seconds per token, far below what is predictable


@dataclass(frozen=True)
class HybridSearch(SplitSearch):
    """Placements that leave layers, or the experts of layers, in RAM."""

    def _least_damage(self, bounds: Bounds, possible: NDArray[np.bool_]) -> Tried:
        """Return the placement of least damage, solved quickly; the numbers that promise most.

        Only `possible` (K,) numbers are looked at, and `bounds` get sharper on the way.
        """
        best: Tried | None = None
        if not self._hopeless(bounds):
            best = self._of_splits(bounds, possible) or self._of_numbers(bounds, possible)
            best = best or self._packed_mix()
        return best or self._solve(self._placement(self._even_weights(), 0), QUICK)

    def _of_numbers(self, bounds: Bounds, possible: NDArray[np.bool_]) -> Tried | None:
        """Return the least damage of the numbers of layers that promise most, by their frames.

        What whole layers cost is much the same for all numbers: one whose bound has used up a part
        of the gap is not going to win. Where they cost far more than that, neighbours will not do
        better.
        """
        best: Tried | None = None
        waiting = {int(k) for k in np.nonzero(possible)[0]}
        looked = missed = 0
        while waiting and looked < _MOST_COUNTS and missed < _MOST_MISSES:
            lower = bounds.lower
            least = min(lower[k] for k in waiting)
            same = [k for k in waiting if lower[k] <= least + _SAME * abs(least)]
            at = max(same) if looked or missed else min(same)  # RAM alone may hold the best types
            if not np.isfinite(lower[at]):
                break
            if best is not None:
                objective, lowest = best.solution.objective, float(lower.min())
                hopeless = lowest + _PART_OF_THE_GAP * (objective - lowest)
                if lower[at] >= min(hopeless, objective * (1 - NEAR)):
                    break
            waiting.remove(at)
            slots = int(bounds.layers.slots[at])
            tried = self._gentle(slots, bounds, best)
            frame = self.frames.get(slots)
            damage = np.inf if tried is None else tried.solution.objective
            if frame is not None and damage > frame.relaxed.objective * _FAR:
                missed += 1
                waiting -= set(range(at - _NEIGHBOURS, at + _NEIGHBOURS + 1))
            elif tried is not None:
                looked += 1
            if tried is None:
                continue
            if best is None or tried.solution.objective < best.solution.objective:
                best = tried
        return best

    def _fastest_mixes(self) -> list[Tried]:
        """Return placements for the most speed at any damage, solved for damage."""
        layers = self._layers()
        seconds = layers.least_seconds(None).lower + layers.fixed_seconds
        found = []
        for at in np.argsort(seconds, kind="stable").tolist():
            frame = self._frame(int(layers.slots[at]))
            if frame is None:
                continue
            where = slice(frame.at, frame.at + 1)
            relaxed = relax(
                to_problem(
                    frame.choices,
                    frame.capacities[where],
                    frame.levels[where],
                    (),
                    objective="seconds",
                )
            )
            kept = frame.kept if relaxed is None else self._kept_by(frame.choices, relaxed.x)
            for keep in (rounded_down(kept), nearest(kept)):
                placement = self._keeping(frame.placement, frame.movable, keep)
                found.append(self._solve(placement, QUICK))
            if sum(t.fits for t in found) >= _FAST_COUNTS:
                break
        return found

    def _fastest_placement(
        self, least: Tried, layers: Layers, bounds: FloatArray, alone: Tried | None
    ) -> Tried:
        """Return the placement that promises most speed within the slack of the least damage.

        `bounds` are of damage, (K,); `alone` is a placement with nothing but the embedding in RAM.
        """
        allowed = self._allowed(least) * (1 + _SAME)
        prices = self._prices(least)
        possible = bounds <= allowed
        if not prices or not possible.any():
            return least
        best, cost = least, self._cost(least, prices)
        looked = missed = 0
        in_ram = sum(d == HOST for d in least.placement.layer_device)
        away = np.abs(np.asarray(layers.slots) - in_ram)
        if alone is not None and alone.solution.objective <= allowed:
            alone = alone.beside(least)
            if (less := self._cost(alone, prices)) < cost:
                best, cost = alone, less
        seconds = layers.least_seconds(allowed)
        splits = Splits(seconds, self.model, self.rig, self.settings)
        most = 1 if self._slow() else _FAST_COUNTS
        while looked < most and missed < _FAST_MISSES and possible.any():
            lower = np.where(possible, seconds.lower + layers.in_use_seconds, np.inf)
            at = int(np.nonzero(lower <= float(lower.min()) * _EQUALLY_FAST)[0][0])
            if lower[at] >= cost * (1 - _WORTH_A_LOOK):
                break
            possible[at] = False
            host_layers = int(layers.slots[at])
            found = list(self._fast_mixes(host_layers, least, allowed, prices, splits))
            looked += bool(found) or self._slow()
            if not found:  # whole layers cost too much there: most of the way to where they did not
                missed += 1
                possible &= away <= away[at] // 4
            for tried in found:
                less = self._cost(tried, prices)
                if less < cost:
                    best, cost = tried, less
        return best

    def _fast_mixes(
        self,
        host_layers: int,
        least: Tried,
        allowed: float,
        prices: Sequence[float],
        splits: Splits,
    ) -> Iterator[Tried]:
        """Yield placements for speed with so many layers wholly in RAM, none above `allowed`."""
        unmoved = self._unmoved(host_layers)
        if unmoved is not None and unmoved.solution.objective <= allowed:
            yield unmoved.beside(least)
        if host_layers and self._packed(host_layers).missing:
            return
        found = (
            list(self._fast_splits(host_layers, least, allowed, splits)) if self.rig.gpus else []
        )
        yield from found
        frame = None if found else self._frame(host_layers)
        if frame is not None and frame.relaxed.objective <= allowed:
            yield from self._fast_rounded(frame, least, allowed, prices, splits.bounds)

    def _fast_rounded(
        self,
        frame: Frame,
        least: Tried,
        allowed: float,
        prices: Sequence[float],
        seconds: Bounds,
    ) -> Iterator[Tried]:
        """Yield placements of whole layers near the relaxed one of most speed, better ones last.

        `seconds` learn from it.
        """
        at = slice(frame.at, frame.at + 1)
        second = to_problem(
            frame.choices,
            frame.capacities[at],
            frame.levels[at],
            (),
            objective="seconds",
            budget=allowed,
        )
        fastest = relax(second)
        wanted = frame.kept
        if fastest is not None:
            seconds.learn(*self._pooled(fastest.prices))
            wanted = self._kept_by(frame.choices, fastest.x)
        keep = rounded_down(wanted)
        level = self._one_level(frame)
        best = self._within(frame, keep, least, allowed, level)
        if best is None and nearest(frame.kept) != keep:
            wanted, keep = frame.kept, nearest(frame.kept)
            best = self._within(frame, keep, least, allowed, level)
        if best is None:
            return
        yield best
        cost = self._cost(best, prices)
        order = sorted(range(len(wanted)), key=lambda g: keep[g] - wanted[g])
        # With a speed to reach every try couples all pools and costs ten times as much.
        for gpu in order if self.timing.min_tps is None else order[:COUPLED_TRIES]:
            if wanted[gpu] - keep[gpu] < _WORTH_ROUNDING_UP:
                break
            more = [k + (g == gpu) for g, k in enumerate(keep)]
            tried = self._within(frame, more, least, allowed, best.solution.level)
            if tried is not None and (less := self._cost(tried, prices)) < cost:
                best, keep, cost = tried, more, less
                yield best

    def _fast_splits(
        self, host_layers: int, least: Tried, allowed: float, splits: Splits
    ) -> Iterator[Tried]:
        """Yield the splits that the bounds of whole layers promise most speed of."""
        bounds = splits.bounds
        here = [c.slots == host_layers for c in bounds.layers.counts]
        lower = np.where(here, bounds.best, np.inf)
        z, c = (int(i) for i in np.unravel_index(int(lower.argmin()), lower.shape))
        for split in splits.look(z, c)[:SPLITS_EACH]:
            level = None if self.timing.min_tps is None else split.level
            placement = self._laid_out(split, host_layers)
            tried = self._allowed_at(placement, least, allowed, level)
            if tried is not None:
                yield tried

    def _within(
        self,
        frame: Frame,
        keep: Sequence[int],
        least: Tried,
        allowed: float,
        level: int | None,
    ) -> Tried | None:
        """Solve whole layers near a frame; None when they cost more damage than allowed."""
        placement = self._keeping(frame.placement, frame.movable, keep)
        return self._allowed_at(placement, least, allowed, level)

    def _allowed_at(
        self, placement: Placement, least: Tried, allowed: float, level: int | None
    ) -> Tried | None:
        """Solve a placement quickly; None when it costs more damage than allowed."""
        tried = self._solve(placement, QUICK, level=level, capped=False)
        if not tried.fits or tried.solution.objective > allowed:
            return None
        return tried.beside(least)

    def _prices(self, tried: Tried) -> list[float]:
        """Return what damage may cost in seconds, to compare placements by."""
        relaxed = relax(self._at_level(self._second_stage(tried), tried.solution.level))
        return [] if relaxed is None else [float(relaxed.prices[-1]) * x for x in _PRICE_RANGE]

    def _cost(self, tried: Tried, prices: Sequence[float]) -> float:
        """What a placement is judged by: least seconds at the allowed damage, with a cache in use.

        What whole layers add to the damage beyond the relaxed figure of stage 1, they will add in
        stage 2.
        """
        second = self._at_level(self._second_stage(tried), tried.solution.level)
        lost = tried.solution.objective - tried.solution.lower_bound
        seconds = max(relaxed_at_price(second, p, self.memo) + p * lost for p in prices)
        if not np.isfinite(seconds):  # a tied head lies on a GPU and in RAM: pools are not separate
            relaxed = relax(second)
            seconds = np.inf if relaxed is None else relaxed.objective + prices[0] * lost
        return seconds + self.timing.in_use(tried.placement)

    def _fastest(self, best: Tried) -> Solution:
        """Stage 2: least seconds per token with damage within the slack of stage 1."""
        second = self._second_stage(best)
        prices = self._prices(best)
        if prices:
            most = set(self._promising(second, prices))
            most.add(int(np.searchsorted(second.levels, best.solution.level)))
            which = sorted(most)
            second = replace(
                second, levels=second.levels[which], capacities=second.capacities[which]
            )
        found = solve(second, _SPEED, self.memo)
        before = total(best.choices.seconds, best.solution.choice)
        if found.status == "infeasible" or found.objective > before:
            return best.solution
        return found

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
