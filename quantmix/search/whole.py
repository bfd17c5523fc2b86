"""Whole layers on GPUs: the splits that bounds promise most of, solved and polished."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quantmix.memory.model import Placement
from quantmix.search.base import QUICK, Tried, better
from quantmix.search.frame import COUPLED_TRIES, NEAR, FrameSearch
from quantmix.search.leading import Bounds
from quantmix.search.placement import move_boundary
from quantmix.search.splits import Split, Splits

SPLITS_EACH = 2
"""Splits solved of a level and a number of layers in RAM."""

_MOST_SPLITS = (12, 8)  # with one GPU, with several
_MOST_COUPLED = 4
_ENOUGH = 5e-3  # of damage: not worth further tries where each of them is slow
_IN_VAIN = 5  # looks that found nothing better
_FEW, _POLISH = 2, 8  # placements tried around a split, and around the best


@dataclass(frozen=True)
class SplitSearch(FrameSearch):
    """Placements that `splits` promises much of."""

    def _of_splits(self, bounds: Bounds, possible: NDArray[np.bool_]) -> Tried | None:
        """Return the best of the splits that the bounds of whole layers promise most of.

        Levels and numbers of layers are looked at in the order of their bounds, while any is below
        the best. None where nothing fits, or memory is no limit.
        """
        if not self.rig.gpus:
            return None
        splits = Splits(bounds, self.model, self.rig, self.settings)
        counts = bounds.layers.counts
        wanted = possible[np.searchsorted(bounds.layers.slots, [c.slots for c in counts])]
        waiting = np.broadcast_to(wanted, bounds.best.shape).copy()
        coupled, slow, n_solved = self.timing.min_tps is not None, self._slow(), 0
        best: Tried | None = None
        in_vain = 0
        for _ in range(_MOST_SPLITS[coupled or len(self.rig.gpus) > 1]):
            if in_vain == _IN_VAIN:
                break
            lower = np.where(waiting, bounds.best, np.inf)
            z, c = (int(i) for i in np.unravel_index(int(lower.argmin()), lower.shape))
            enough = np.inf if best is None else best.solution.objective * (1 - NEAR)
            if not lower[z, c] < enough:
                break
            waiting[z, c] = False
            before = np.inf if best is None else best.solution.objective
            if coupled and not splits.known and (frame := self._frame(counts[c].slots)) is not None:
                bounds.learn(*self._pooled(frame.relaxed.prices))
            promising = splits.look(z, c)[: 1 if slow else SPLITS_EACH]
            if not promising and (tried := self._gentle(counts[c].slots, bounds, best)) is not None:
                best = tried if best is None or better(tried.solution, best.solution) else best
            for split in promising:
                if coupled and n_solved >= (COUPLED_TRIES if slow else _MOST_COUPLED):
                    break
                placement = self._laid_out(split, counts[c].slots)
                tried = self._solve(placement, QUICK, level=split.level)
                n_solved += 1
                if tried.fits and not coupled:
                    tried = self._polished(tried, split.level, _FEW, whole_layers=False)
                if tried.fits and (best is None or better(tried.solution, best.solution)):
                    best = tried
            now = np.inf if best is None else best.solution.objective
            in_vain = in_vain + 1 if before <= now else 0
        near = best is not None and best.solution.objective * (1 - _ENOUGH) <= bounds.best.min()
        if best is None or slow or (coupled and near):
            return best
        if coupled:
            return self._polished(best, best.solution.level, _FEW)
        return self._polished(self._solve(best.placement, QUICK), None, _POLISH)

    def _hopeless(self, bounds: Bounds) -> bool:
        """Whether nothing fits: no mix does as much damage as the least bound."""
        allowed = self.palette.allowed
        most = np.where(allowed, self.palette.damage, 0.0).max(axis=1, initial=0.0).sum()
        return bool(bounds.best.min() > 2 * most)

    def _promising_splits(self, bounds: Bounds) -> Iterator[Placement]:
        """Yield the splits of the least bounds, one for each of a few numbers of layers in RAM."""
        if not self.rig.gpus:
            return
        splits = Splits(bounds, self.model, self.rig, self.settings)
        counts = bounds.layers.counts
        for i in np.argsort(bounds.best, axis=None, kind="stable")[: _MOST_SPLITS[1]].tolist():
            z, c = (int(x) for x in np.unravel_index(i, bounds.best.shape))
            for split in splits.look(z, c)[:1]:
                yield self._laid_out(split, counts[c].slots)

    def _polished(
        self, best: Tried, level: int | None, most: int, *, whole_layers: bool = True
    ) -> Tried:
        """Move experts to RAM and back, and `whole_layers` between GPUs, while that helps."""
        seen = {(best.placement.layer_device, best.placement.cpu_experts)}
        while len(seen) <= most:
            for placement in self._near(best, whole_layers):
                key = placement.layer_device, placement.cpu_experts
                if key in seen:
                    continue
                seen.add(key)
                tried = self._solve(placement, QUICK, level=level)
                if tried.fits and better(tried.solution, best.solution):
                    best = tried
                    break
            else:
                break
        return best

    def _near(self, tried: Tried, whole_layers: bool) -> Iterator[Placement]:
        """Yield placements that relieve the GPU whose bytes cost most, or fill the cheapest one."""
        prices = tried.solution.prices[: len(self.rig.gpus)]
        device = tried.placement.layer_device
        movable = self._movable(device)
        keep = [
            sum(device[i] == g and i not in tried.placement.cpu_experts for i in movable)
            for g in range(len(prices))
        ]
        dear, cheap = int(prices.argmax()), int(prices.argmin())
        steps = np.abs(np.diff(prices))
        for left in np.argsort(-steps, kind="stable")[: 2 * whole_layers].tolist():
            moved = move_boundary(device, left, towards_left=bool(prices[left + 1] > prices[left]))
            if moved != device:
                there = replace(tried.placement, layer_device=moved)
                yield self._keeping(there, self._movable(moved), keep)
        for gpu, by in ((dear, -1), (cheap, 1)):
            other = [n + by * (g == gpu) for g, n in enumerate(keep)]
            if other[gpu] >= 0:
                yield self._keeping(tried.placement, movable, other)

    def _laid_out(self, split: Split, host_layers: int) -> Placement:
        """Return the placement of a split, with so many first slots in RAM."""
        none = self._placement(self._even_weights(), host_layers)
        on_gpu = [g for g, n in enumerate(split.layers) for _ in range(n)]
        device = (*none.layer_device[: len(none.layer_device) - len(on_gpu)], *on_gpu)
        placement = replace(none, layer_device=device)
        return self._keeping(placement, self._movable(device), split.kept)
