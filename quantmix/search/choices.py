"""From a palette and a placement to a knapsack, and from its answer back to types and homes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantmix.errors import UsageError
from quantmix.memory.head import EMBEDDING, is_tied, multiplied_at
from quantmix.memory.homes import Homes, default_home, is_movable
from quantmix.memory.model import HOST, DeviceMemory, Placement
from quantmix.models.model import Model
from quantmix.palette import Palette
from quantmix.solve.problem import FloatArray, IntArray, Problem

# Pairs that the engines fuse when both have one type. Splitting experts costs several times the
# speed, so they are always tied; the others only where speed matters (a rig, not a bare file size).
_TIED_EXPERTS = {"ffn_gate_exps": "ffn_up_exps"}
_TIED = {**_TIED_EXPERTS, "ffn_gate_shexp": "ffn_up_shexp", "ffn_gate": "ffn_up"}
SECONDS, DAMAGE = "seconds", "damage"
"""Pools that are no memory: what a stage may spend of the other's objective."""

_EXPERTS = ("ffn_up_exps", "ffn_gate_exps", "ffn_down_exps", "ffn_gate_up_exps")
_DENSE_FFN = ("ffn_up", "ffn_gate", "ffn_down")


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors decided together.

    Attributes:
        label: what it is, for the dump.
        members: tensor indices. parts: which part of the option each member takes its type from.
        homes: (J,) device index of each option (HOST for RAM).
        columns: (J, parts) palette column of each part.
    """

    label: str
    members: tuple[int, ...]
    parts: tuple[int, ...]
    homes: NDArray[np.int64]
    columns: NDArray[np.int64]


@dataclass(frozen=True)
class Choices:
    """Groups of a model under one placement, with what each option costs and uses.

    `damage`, `seconds` are (G, J), +inf padded; `use` is (D, G, J) bytes on each device (GPUs in
    order, then the host); `level` is the largest single expert tensor an option puts into RAM.
    """

    model: Model
    palette: Palette
    groups: tuple[Group, ...]
    damage: FloatArray
    seconds: FloatArray
    use: FloatArray
    level: IntArray
    pools: tuple[str, ...]

    def mix(self, choice: IntArray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return per tensor the palette column (-1 = kept) and the home device of a choice."""
        columns = np.full(len(self.model.tensors), -1, dtype=np.int64)
        homes = np.full(len(self.model.tensors), HOST, dtype=np.int64)
        for group, j in zip(self.groups, choice, strict=True):
            for member, part in zip(group.members, group.parts, strict=True):
                homes[member] = group.homes[j]
                if self.palette.kept_bytes[member] == 0:
                    columns[member] = group.columns[j, part]
        return columns, homes

    def option_label(self, g: int, j: int) -> str:
        """Return an option in words: `iq2_kt@GPU0`, `iq2_ks+iq3_k@CPU`."""
        group = self.groups[g]
        home = self.pools[group.homes[j]]
        if all(self.palette.kept_bytes[m] for m in group.members):
            return f"kept@{home}"
        names = dict.fromkeys(self.palette.types[c].name for c in group.columns[j])
        return f"{'+'.join(names)}@{home}"


def movable_roles(model: Model) -> tuple[str, ...]:
    """Return the roles that may lie in RAM while their layer stays on a GPU."""
    return _EXPERTS if model.hparams.is_moe else _DENSE_FFN


def build_choices(
    model: Model,
    palette: Palette,
    placement: Placement,
    memory: Sequence[DeviceMemory],
    seconds: FloatArray,
    *,
    movable: bool = False,
    tie_dense: bool = True,
    kept_seconds: FloatArray | None = None,
) -> Choices:
    """Return all groups with their options.

    Args:
        placement: where layers live, and which layers' experts lie in RAM.
        movable: those layers' experts may lie in RAM, or stay on the layer's GPU.
        tie_dense: up and gate share a type outside the experts too.
        memory: from the memory model, GPUs in order, then the host.
        seconds: (D, T, Q) time per token of a tensor at a type on a device.
        kept_seconds: (D, T) the same for tensors that stay as in the source; none means 0.

    Raises:
        UsageError: a tensor has no type that its device can run.
    """
    homes = tensor_homes(model, placement)
    head = placement.output_device
    ties = _TIED if tie_dense else _TIED_EXPERTS
    if movable:
        groups = _groups(model, palette, homes, head, placement.cpu_experts, ties)
    else:
        homes[in_ram(model, placement)] = HOST
        groups = _groups(model, palette, homes, head, frozenset(), ties)
    width = max(len(g.homes) for g in groups)
    n_devices = len(memory)
    shape = (len(groups), width)
    damage = np.full(shape, np.inf)
    time = np.full(shape, np.inf)
    use = np.zeros((n_devices, *shape))
    level = np.zeros(shape, dtype=np.int64)
    doubled = [d for d, m in enumerate(memory) if m.duplicate_embedding]
    for g, group in enumerate(groups):
        n = len(group.homes)
        options = np.arange(n)
        rows_damage = np.zeros(n)
        rows_time = np.zeros(n)
        for member, part in zip(group.members, group.parts, strict=True):
            kept = palette.kept_bytes[member]
            columns = group.columns[:, part]
            n_bytes = np.full(n, kept) if kept else palette.bytes[member, columns]
            tensor = model.tensors[member]
            readers = multiplied_at(model, tensor, group.homes, np.full(n, head))
            if not kept:
                rows_damage += palette.damage[member, columns]
                rows_time += seconds[readers, member, columns]
            elif kept_seconds is not None:
                rows_time += kept_seconds[readers, member]
            if tensor.loaded:
                use[group.homes, g, options] += n_bytes
                if tensor.name == EMBEDDING:
                    for d in doubled:
                        use[d, g, options] += n_bytes
            if tensor.role in _EXPERTS:
                n_here = np.where(group.homes == HOST, n_bytes, 0)
                level[g, :n] = np.maximum(level[g, :n], n_here)
        damage[g, :n] = rows_damage
        time[g, :n] = rows_time
    pools = tuple(m.name for m in memory)
    return Choices(model, palette, tuple(groups), damage, time, use, level, pools)


def tensor_homes(model: Model, placement: Placement) -> NDArray[np.int64]:
    """Return the device of every tensor before any expert is moved to RAM.

    The input embedding stays in RAM; what lies outside the blocks otherwise goes with the output
    (docs/architecture.md, fact 5).
    """
    homes = Homes(placement.layer_device, placement.output_device)
    return np.array([default_home(t, homes) for t in model.tensors], dtype=np.int64)


def in_ram(model: Model, placement: Placement) -> NDArray[np.bool_]:
    """Return (T,) whether a tensor is among the experts that the placement puts into RAM."""
    return np.array(
        [t.layer in placement.cpu_experts and is_movable(model, t) for t in model.tensors]
    )


def to_problem(
    choices: Choices,
    capacities: FloatArray,
    levels: IntArray,
    constraints: tuple[str, ...],
    *,
    objective: str = DAMAGE,
    budget: float | None = None,
) -> Problem:
    """Return the knapsack of a stage.

    Args:
        capacities: (L, D) bytes left for weights on every device at every level.
        objective: `damage` (then `budget` caps seconds) or `seconds` (then it caps damage).
    """
    cost, other = choices.damage, choices.seconds
    if objective == SECONDS:
        cost, other = other, cost
    use, pools = choices.use, choices.pools
    if budget is not None:
        extra = np.where(np.isfinite(other), other, 0.0)
        use = np.concatenate([use, extra[None]])
        pools = (*pools, SECONDS if objective == DAMAGE else DAMAGE)
        capacities = np.concatenate([capacities, np.full((len(capacities), 1), budget)], axis=1)
    return Problem(
        groups=tuple(g.label for g in choices.groups),
        option=choices.option_label,
        cost=cost,
        use=use,
        pools=pools,
        capacities=capacities,
        levels=levels,
        level=choices.level,
        constraints=constraints,
    )


def _groups(
    model: Model,
    palette: Palette,
    homes: NDArray[np.int64],
    head: int,
    movable_layers: frozenset[int],
    ties: Mapping[str, str],
) -> list[Group]:
    """Split the tensors into groups: tied pairs, and whole expert layers where they may move.

    `homes` are where tensors lie, `head` is where the output is multiplied.
    """
    by_place = {(t.layer, t.role): i for i, t in enumerate(model.tensors)}
    roles = movable_roles(model)
    done: set[int] = set()
    groups: list[Group] = []
    for i, t in enumerate(model.tensors):
        if i in done:
            continue
        if t.role in roles and t.layer in movable_layers and homes[i] != HOST:
            members = [by_place[t.layer, r] for r in roles if (t.layer, r) in by_place]
            group = _movable_group(model, palette, members, int(homes[i]))
        else:
            partner = _partner(by_place, t.layer, t.role, ties)
            members = [i] if partner is None else [i, partner]
            group = _fixed_group(model, palette, members, int(homes[i]), head)
        done.update(members)
        groups.append(group)
    return groups


def _partner(
    by_place: dict[tuple[int | None, str], int],
    layer: int | None,
    role: str,
    ties: Mapping[str, str],
) -> int | None:
    other = ties.get(role) or next((a for a, b in ties.items() if b == role), None)
    return by_place.get((layer, other)) if other else None


def _fixed_group(model: Model, palette: Palette, members: list[int], home: int, head: int) -> Group:
    """Tensors with one type on one device."""
    label = " + ".join(model.tensors[m].name for m in members)
    if all(palette.kept_bytes[m] for m in members):
        return Group(
            label,
            tuple(members),
            (0,) * len(members),
            np.array([home]),
            np.zeros((1, 1), dtype=np.int64),
        )
    reader = multiplied_at(model, model.tensors[members[0]], home, head)
    columns = _columns(model, palette, members, reader)
    return Group(
        label,
        tuple(members),
        (0,) * len(members),
        np.full(len(columns), home, dtype=np.int64),
        columns[:, None],
    )


def _columns(model: Model, palette: Palette, members: list[int], reader: int) -> NDArray[np.int64]:
    """Return the palette columns that all members may take where `reader` multiplies them."""
    free = [m for m in members if not palette.kept_bytes[m]]
    allowed = palette.allowed[free].all(axis=0)
    # Rows of an untied embedding are looked up, not multiplied: free of kernel limits.
    lookup = not is_tied(model) and all(model.tensors[m].name == EMBEDDING for m in members)
    if not lookup:
        allowed = allowed & (palette.cpu if reader == HOST else palette.gpu)
    if not allowed.any():
        where = "RAM (see --allow-slow-cpu)" if reader == HOST else "a GPU"
        names = " and ".join(model.tensors[m].name for m in members)
        raise UsageError(f"no type is left for {names} in {where}: widen --types or change the pin")
    columns: NDArray[np.int64] = np.nonzero(allowed)[0].astype(np.int64)
    return columns


def _movable_group(model: Model, palette: Palette, members: list[int], gpu: int) -> Group:
    """A layer's experts: up+gate one type, down another, all on the GPU or all in RAM."""
    is_down = [model.tensors[m].role.startswith("ffn_down") for m in members]
    pair = [m for m, down in zip(members, is_down, strict=True) if not down]
    down = [m for m, d in zip(members, is_down, strict=True) if d]
    label = " + ".join(model.tensors[m].name for m in members)
    homes: list[NDArray[np.int64]] = []
    columns: list[NDArray[np.int64]] = []
    for home in (gpu, HOST):
        try:
            first = _columns(model, palette, pair, home) if pair else np.zeros(1, dtype=np.int64)
            second = _columns(model, palette, down, home) if down else np.zeros(1, dtype=np.int64)
        except UsageError:
            if home == HOST and homes:
                continue
            if home == gpu:
                continue
            raise
        grid = np.stack([np.repeat(first, len(second)), np.tile(second, len(first))], axis=1)
        keep = _hull(palette, pair, down, grid)
        homes.append(np.full(len(keep), home, dtype=np.int64))
        columns.append(grid[keep])
    return Group(
        label,
        tuple(members),
        tuple(1 if d else 0 for d in is_down),
        np.concatenate(homes),
        np.concatenate(columns),
    )


def _hull(
    palette: Palette, pair: list[int], down: list[int], grid: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Return the rows of `grid` on the lower convex hull of (bytes, damage).

    Movable groups serve the relaxed problem only, whose optimum lies on the hull.
    """
    n_bytes = np.zeros(len(grid))
    damage = np.zeros(len(grid))
    for members, part in ((pair, 0), (down, 1)):
        for m in members:
            if palette.kept_bytes[m]:
                continue
            n_bytes += palette.bytes[m, grid[:, part]]
            damage += palette.damage[m, grid[:, part]]
    hull: list[int] = []
    for i in np.lexsort((damage, n_bytes)):
        if hull and damage[i] >= damage[hull[-1]]:
            continue
        while len(hull) > 1 and _above(n_bytes, damage, hull[-2], hull[-1], int(i)):
            hull.pop()
        hull.append(int(i))
    return np.array(hull, dtype=np.int64)


def _above(x: FloatArray, y: FloatArray, a: int, b: int, c: int) -> bool:
    """Whether point b lies on or above the line from a to c."""
    left = (y[b] - y[a]) * (x[c] - x[a])
    right = (y[c] - y[a]) * (x[b] - x[a])
    return bool(left >= right)
