"""Choices of a placement put together from choices with all layers in one place.

What a tensor of a layer may be and what that costs depends on the device that it lies on, whatever
the others do. So one set of rows per device gives the choices of every placement in a millisecond.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quantmix.memory.homes import is_movable
from quantmix.memory.model import HOST, Placement
from quantmix.search.choices import Choices, Group
from quantmix.solve.problem import FloatArray, IntArray


@dataclass(frozen=True)
class Rows:
    """Choices with all layers on one device, a row per group: as in `Choices`, bytes there.

    `layer` (G,) is -1 outside the layers; `movable` (G,) whether it may lie in RAM by itself.
    """

    groups: tuple[Group, ...]
    layer: IntArray
    movable: NDArray[np.bool_]
    damage: FloatArray
    seconds: FloatArray
    n_bytes: FloatArray
    level: IntArray

    @classmethod
    def of(cls, choices: Choices, home: int, n_blocks: int) -> Rows:
        """Return the rows of choices whose layers, `n_blocks`, all lie at `home`."""
        model = choices.model
        first = [model.tensors[g.members[0]] for g in choices.groups]
        inside = [t.layer is not None and t.layer < n_blocks for t in first]
        layer = [t.layer if here else -1 for t, here in zip(first, inside, strict=True)]
        return cls(
            choices.groups,
            np.array(layer, dtype=np.int64),
            np.array([is_movable(model, t) for t in first]),
            choices.damage,
            choices.seconds,
            choices.use[home],
            choices.level,
        )

    def groups_at(self, home: int, which: IntArray) -> Iterator[tuple[int, Group]]:
        """Yield groups with their numbers, at a device that is like this one."""
        for g in which.tolist():
            group = self.groups[g]
            if group.homes[0] != home:
                group = replace(group, homes=np.full_like(group.homes, home))
            yield g, group


def together(beside: Choices, placement: Placement, rows: Mapping[int, Rows]) -> Choices:
    """Return the choices of a placement.

    Args:
        beside: of a placement with the same home of the head, for what lies outside the layers.
        rows: by device (HOST for RAM), for all that hold layers or experts.
    """
    some = next(iter(rows.values()))
    inside = some.layer >= 0
    away = np.zeros(len(placement.layer_device), dtype=np.bool_)
    away[list(placement.cpu_experts)] = True
    home = np.where(inside, np.array(placement.layer_device)[some.layer], HOST)
    home[inside & some.movable & away[some.layer]] = HOST
    width = max(beside.damage.shape[1], *(r.damage.shape[1] for r in rows.values()))
    damage, seconds = (_widened(x, width, np.inf) for x in (beside.damage, beside.seconds))
    use, level = _widened(beside.use, width, 0.0), _widened(beside.level, width, 0)
    use[:, inside] = 0.0
    groups = list(beside.groups)
    for there, row in rows.items():
        here = np.nonzero(inside & (home == there))[0]
        n = row.damage.shape[1]
        for whole, part, filler in (
            (damage, row.damage, np.inf),
            (seconds, row.seconds, np.inf),
            (use[there], row.n_bytes, 0.0),
            (level, row.level, 0),
        ):
            whole[here, n:] = filler
            whole[here, :n] = part[here]
        for g, group in row.groups_at(there, here):
            groups[g] = group
    return replace(
        beside,
        groups=tuple(groups),
        damage=damage,
        seconds=seconds,
        use=use,
        level=level.astype(np.int64),
    )


def _widened(values: NDArray[np.generic], width: int, filler: float) -> NDArray[np.float64]:
    """Return a copy of values with their last axis filled up to `width`."""
    edges = [(0, 0)] * (values.ndim - 1) + [(0, width - values.shape[-1])]
    return np.pad(values, edges, constant_values=filler)
