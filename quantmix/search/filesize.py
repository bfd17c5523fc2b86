"""The search without devices: least damage in a file of a given size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from quantmix.ggml.header import DEFAULT_ALIGNMENT
from quantmix.memory.model import DeviceMemory, Placement
from quantmix.models.model import Model
from quantmix.palette import Palette
from quantmix.search.base import Goals
from quantmix.search.choices import Choices, build_choices
from quantmix.search.planner import Shortage
from quantmix.solve.problem import FloatArray, Problem, Solution
from quantmix.solve.solver import solve


def plan_in_file(
    model: Model, palette: Palette, capacity_bytes: float, goals: Goals, *, padded: bool
) -> tuple[NDArray[np.int64], Solution, Problem] | Shortage:
    """Return the best mix whose tensors take at most `capacity_bytes`, without devices.

    `padded` counts each tensor up to where the next may start in a file.

    Raises:
        UsageError: a tensor has no type left.
    """
    choices = choices_in_file(model, palette)
    rows = file_use(choices, padded=padded)
    problem = Problem(
        groups=tuple(g.label for g in choices.groups),
        option=choices.option_label,
        cost=choices.damage,
        use=rows[None],
        pools=("file",),
        capacities=np.array([[float(capacity_bytes)]]),
        levels=np.array([choices.level.max()], dtype=np.int64),
        level=choices.level,
        constraints=palette.constraints,
    )
    found = solve(problem, goals.limits)
    if found.status == "infeasible":
        return Shortage({"file": int(np.ceil(found.shortfall.sum()))})
    return choices.mix(found.choice)[0], found, problem


def choices_in_file(model: Model, palette: Palette) -> Choices:
    """Return groups and options when only the size of the file matters; experts stay tied.

    Raises:
        UsageError: a tensor has no type left.
    """
    n = max((t.layer for t in model.tensors if t.layer is not None), default=-1) + 1
    placement = Placement((0,) * n, 0)
    memory = (
        DeviceMemory("file", 0, 0, 0, ()),
        DeviceMemory("CPU", 0, 0, 0, ()),
    )
    seconds = np.zeros((2, len(model.tensors), len(palette.types)))
    return build_choices(model, palette, placement, memory, seconds, tie_dense=False)


def file_use(choices: Choices, *, padded: bool = False) -> FloatArray:
    """Return (G, J) bytes in the file, whatever the home and whether loaded or not."""
    align = DEFAULT_ALIGNMENT if padded else 1
    use = np.zeros(choices.damage.shape)
    for g, group in enumerate(choices.groups):
        n = len(group.homes)
        for member, part in zip(group.members, group.parts, strict=True):
            kept = choices.palette.kept_bytes[member]
            n_bytes = kept or choices.palette.bytes[member, group.columns[:, part]]
            use[g, :n] += -(-n_bytes // align) * align
    return use
