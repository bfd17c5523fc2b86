"""Choices of a placement put together from choices with all layers in one place.

What a tensor of a layer may be and what that costs depends on the device that it lies on, whatever
the others do. So one set of rows per device gives the choices of every placement in a millisecond.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quantmix.emit.flags import is_movable
from quantmix.memory.model import HOST, Placement
from quantmix.search.choices import Choices, Group
from quantmix.solve.problem import FloatArray, IntArray


@dataclass(frozen=True)
class Rows:
    """Choices with all layers on one device, a row per group: as in `Choices`, bytes there."""

    groups: tuple[Group, ...]
    damage: FloatArray
    seconds: FloatArray
    n_bytes: FloatArray
    level: IntArray

    @classmethod
    def of(cls, choices: Choices, home: int) -> Rows:
        """Return the rows of choices whose layers all lie at `home`."""
        return cls(
            choices.groups, choices.damage, choices.seconds, choices.use[home], choices.level
        )


def together(beside: Choices, placement: Placement, rows: Mapping[int, Rows]) -> Choices:
    """Return the choices of a placement.

    Args:
        beside: of a placement with the same home of the head, for what lies outside the layers.
        rows: by device (HOST for RAM), for all that hold layers or experts.
    """
    model, device = beside.model, placement.layer_device
    home = np.full(len(beside.groups), HOST, dtype=np.int64)
    inside = np.zeros(len(beside.groups), dtype=np.bool_)
    for g, group in enumerate(beside.groups):
        t = model.tensors[group.members[0]]
        if t.layer is not None and t.layer < len(device):
            inside[g] = True
            away = t.layer in placement.cpu_experts and is_movable(model, t)
            home[g] = HOST if away else device[t.layer]
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
        for g in here.tolist():
            groups[g] = replace(row.groups[g], homes=np.full_like(row.groups[g].homes, there))
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
