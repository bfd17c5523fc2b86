"""What probes say of the loss model: measured over predicted change, shrunk by their own noise.

    change(t: q → q') = factor(part, way) · (damage(t, q') − damage(t, q))

A factor is the mean of all, moved towards what its own probe says by as much as the probes differ
beyond their noise (empirical Bayes). A solver picks what was under-measured, so a gain counts with
less than its mean and a loss with more; beyond the type that was probed, more so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from quantmix.refine.frame import Frame
from quantmix.refine.probes import DOWN, UP, Part, step
from quantmix.solve.problem import FloatArray, IntArray

CAUTION: Final = 0.5
"""Posterior standard errors by which gains are lowered and losses raised."""
BEYOND: Final = 0.15
"""Past the probed type, gains count for so much less and losses for so much more.

Why: docs/architecture.md, fact 10.
"""
_LEAST: Final = 0.05  # of the mean factor
_TINY: Final = 1e-12


@dataclass(frozen=True, slots=True)
class Measured:
    """One probe: the part, the way, and its change of KLD in nats, predicted and measured ± err."""

    part: int
    way: int
    predicted: float
    change: float
    err: float


@dataclass(frozen=True, slots=True)
class Factor:
    """Measured over predicted change: posterior mean and standard error."""

    mean: float
    err: float

    def cautious(self, way: int) -> float:
        """Return the factor to solve with."""
        return max(self.mean - way * CAUTION * self.err, _LEAST * self.mean)


def fit(probes: Sequence[Measured], n_parts: int) -> dict[tuple[int, int], Factor]:
    """Return the factor of every part and way; one without a probe gets the mean of its way."""
    found: dict[tuple[int, int], Factor] = {}
    whole = _pooled([p for p in probes if abs(p.predicted) > _TINY])
    for way in (UP, DOWN):
        mine = [p for p in probes if p.way == way and abs(p.predicted) > _TINY]
        mean, spread = _pooled(mine) if len(mine) > 2 else whole
        for part in range(n_parts):
            found[part, way] = Factor(mean, spread)
        for p in mine:
            ratio, err = p.change / p.predicted, max(p.err / abs(p.predicted), _TINY)
            sure = spread**2 / (spread**2 + err**2)
            value = mean + sure * (ratio - mean)
            found[p.part, way] = Factor(max(value, _LEAST * mean), math.sqrt(sure) * err)
    return found


def _pooled(probes: Sequence[Measured]) -> tuple[float, float]:
    """Return mean and spread of the true factors (DerSimonian and Laird's moments)."""
    if not probes:
        return 1.0, 0.5
    ratio = np.array([p.change / p.predicted for p in probes])
    var = np.array([max(p.err / abs(p.predicted), _TINY) ** 2 for p in probes])
    weight = 1.0 / (var + float(np.median(var)))
    mean = float((weight * ratio).sum() / weight.sum())
    over = float((weight * ((ratio - mean) ** 2 - var)).sum() / weight.sum())
    # The ratio of sums is what counts where single ones are noise.
    total = sum(p.change for p in probes) / sum(p.predicted for p in probes)
    mean = mean if mean > 0.0 else max(total, _LEAST)
    return mean, math.sqrt(max(over, 0.0))


def changes(
    frame: Frame,
    parts: Sequence[Part],
    now: IntArray,
    factors: Mapping[tuple[int, int], Factor],
) -> FloatArray:
    """Return (G, J) nats that each option changes the KLD by, from the mix `now`; +inf padded."""
    rows = np.arange(len(now))
    delta = frame.damage - frame.damage[rows, now][:, None]
    finite = np.isfinite(frame.damage)
    result = np.where(finite, 0.0, np.inf)
    for index, part in enumerate(parts):
        up = factors[index, UP].cautious(UP)
        down = factors[index, DOWN].cautious(DOWN)
        for g in part.groups:
            ends = [step(frame.damage[g], frame.sizes[g], int(now[g]), w) for w in (UP, DOWN)]
            best, worst = (float(delta[g, j]) for j in ends)
            mine = delta[g, finite[g]]
            gain = np.maximum(mine, best) + (1.0 - BEYOND) * np.minimum(mine - best, 0.0)
            loss = np.minimum(mine, worst) + (1.0 + BEYOND) * np.maximum(mine - worst, 0.0)
            result[g, finite[g]] = np.where(mine < 0.0, up * gain, down * loss)
    return result
