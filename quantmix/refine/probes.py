"""What is probed: a part of a role one step up or down from the types that a recipe gives it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from quantmix.measurements import Scope
from quantmix.refine.frame import Frame
from quantmix.solve.problem import FloatArray, IntArray

STEP: Final = 1.15
"""A step changes the bytes by this factor at least: smaller ones drown in the noise."""
UP, DOWN = 1, -1


@dataclass(frozen=True, slots=True)
class Part:
    """Groups that are probed together: a role, a band of its layers, or one group."""

    role: str
    layers: tuple[int, ...]
    groups: tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """One change around a mix.

    Attributes:
        part: index of the part. way: UP or DOWN.
        choice: (G,) the whole mix with the change in it.
        predicted: what the loss model says of the change, nats.
    """

    part: int
    way: int
    choice: IntArray
    predicted: float


def parts_of(frame: Frame, by: Scope, bands: int = 3) -> tuple[Part, ...]:
    """Cut the groups that have a choice into parts, each of one role (tied roles count as one)."""
    members: dict[str, list[tuple[int, int]]] = {}
    for g, group in enumerate(frame.choices.groups):
        if np.isfinite(frame.damage[g]).sum() < 2:
            continue
        tensors = [frame.model.tensors[m] for m in group.members]
        role = "+".join(dict.fromkeys(t.role for t in tensors))
        layer = tensors[0].layer
        members.setdefault(role, []).append((-1 if layer is None else layer, g))
    parts = []
    for role, found in members.items():
        found.sort()
        n = {"role": 1, "band": min(bands, len(found)), "tensor": len(found)}[by]
        cuts = [round(i * len(found) / n) for i in range(n + 1)]
        for a, b in pairwise(cuts):
            layers = tuple(layer for layer, _ in found[a:b] if layer >= 0)
            parts.append(Part(role, layers, tuple(g for _, g in found[a:b])))
    return tuple(parts)


def probes_of(frame: Frame, parts: Sequence[Part], now: IntArray) -> tuple[Probe, ...]:
    """Return the changes to try around the mix `now`: every part up and down, where it can."""
    found = []
    for index, part in enumerate(parts):
        for way in (UP, DOWN):
            choice = now.copy()
            for g in part.groups:
                choice[g] = step(frame.damage[g], frame.sizes[g], int(now[g]), way)
            rows = np.flatnonzero(choice != now)
            if len(rows):
                change = frame.damage[rows, choice[rows]] - frame.damage[rows, now[rows]]
                found.append(Probe(index, way, choice, float(change.sum())))
    return tuple(found)


def step(damage: FloatArray, sizes: FloatArray, now: int, way: int) -> int:
    """Return the option one step larger and better than `now`, or smaller and worse.

    Options that another one beats in both are passed over; without any that is left, `now`.

    Args:
        damage, sizes: (J,) nats (+inf: not allowed) and bytes of each option.
    """
    if way == UP:
        good = (sizes >= STEP * sizes[now]) & (damage < damage[now])
    else:
        good = (sizes <= sizes[now] / STEP) & (damage > damage[now])
    good &= np.isfinite(damage)
    best = [
        j
        for j in np.flatnonzero(good)
        if not np.any((sizes <= sizes[j]) & (damage < damage[j]) & good)
    ]
    if not best:
        return now
    return int(min(best, key=lambda j: (abs(sizes[j] - sizes[now]), damage[j])))
