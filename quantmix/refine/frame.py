"""A finished recipe as a knapsack: groups with options, and what it uses on every device.

Homes stay as they are; a new mix may use no more bytes anywhere than the recipe does, so that
every budget that the recipe keeps is kept.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from quantmix.engine.ghost import model_engine
from quantmix.errors import BadFile, UsageError
from quantmix.ggml import imatrix as imatrices
from quantmix.ggml.types import default_palette, get, table
from quantmix.loss.model import LossModel
from quantmix.memory.head import EMBEDDING, held_twice
from quantmix.memory.homes import is_movable
from quantmix.memory.model import HOST, DeviceMemory, Placement
from quantmix.models.model import Model
from quantmix.options import require_speed
from quantmix.palette import Palette, TypeLimits, build
from quantmix.recipe import PlannedTensor, Recipe
from quantmix.rig.device import Device, Rig
from quantmix.rig.machine import with_machine
from quantmix.search import timing
from quantmix.search.choices import SECONDS, Choices, build_choices, in_ram, tensor_homes
from quantmix.search.filesize import choices_in_file, file_use
from quantmix.solve.problem import FloatArray, IntArray

_RULE = re.compile(r"(pin|floor) (.+)=([^=]+)", re.DOTALL)


@dataclass(frozen=True)
class Frame:
    """What stays the same while a recipe is refined.

    Attributes:
        choices: groups of tensors and their options; damage is the loss model's.
        start: (G,) the option that the recipe has.
        sizes: (G, J) bytes of the group in the file.
        use: (P, G, J) bytes on each device, and seconds per token where a speed was asked for.
        capacity: (P,) what the recipe uses there, or may take.
        pools: name of each device or other pool, shape (P,).
        placement: homes of layers and experts; None for a bare file.
        rig: the devices; None for a bare file.
        held: tensors that keep the type of the recipe, since no score tells of them.
    """

    model: Model
    choices: Choices
    start: IntArray
    sizes: FloatArray
    use: FloatArray
    capacity: FloatArray
    pools: tuple[str, ...]
    placement: Placement | None = None
    rig: Rig | None = None
    held: frozenset[str] = frozenset()

    def holding(self, unread: Iterable[str]) -> Frame:
        """Return the frame with the types of the recipe for what the engine never reads."""
        held = frozenset(unread)
        damage = self.choices.damage.copy()
        for g, group in enumerate(self.choices.groups):
            if any(self.model.tensors[m].name in held for m in group.members):
                kept = damage[g, self.start[g]]
                damage[g] = np.inf
                damage[g, self.start[g]] = kept
        return replace(self, choices=replace(self.choices, damage=damage), held=held)

    @property
    def damage(self) -> FloatArray:
        """(G, J) predicted nats, +inf padded."""
        return self.choices.damage

    @property
    def level(self) -> int:
        """Bytes of the largest expert tensor in RAM, which the compute buffers depend on."""
        return int(self.choices.level[np.arange(len(self.start)), self.start].max())

    def mix(self, choice: IntArray) -> dict[str, str]:
        """Return tensor → type of a choice, for what is not kept as in the source."""
        columns, _ = self.choices.mix(choice)
        kinds = self.choices.palette.types
        return {
            t.name: kinds[c].name
            for t, c in zip(self.model.tensors, columns, strict=True)
            if c >= 0 and kinds[c].name != t.source_type
        }


def limits_of(recipe: Recipe, types: Sequence[str], *, imatrix: bool) -> TypeLimits:
    """Return the limits that a recipe was designed under.

    Pins and floors are among its constraints, other limits with its budget where they are not the
    usual ones. A recipe with types outside the usual palette that tells nothing of them keeps to
    the types it has.

    Args:
        types: the palette instead, when not empty.

    Raises:
        UnknownName: a type of the recipe that its engine does not have.
        UsageError: a type that is asked for or pinned needs an imatrix, and there is none.
    """
    told = recipe.budget.get("limits") or {}
    engine = model_engine(recipe)
    known = table(engine)
    names = tuple(types) or tuple(
        n
        for n in told.get("types") or ()
        if imatrix or n not in known or known[n].imatrix in ("no", "advised")
    )
    used = sorted({t.type for t in recipe.tensors if get(t.type, engine).is_quantized})
    if not names and not set(used) <= {t.name for t in default_palette(engine)}:
        names = tuple(used)
    rules = [m.groups() for c in recipe.optimality.constraints if (m := _RULE.fullmatch(c))]
    for name in () if imatrix else (*types, *(q for _, _, q in rules)):
        if name in known and known[name].imatrix in ("required", "asserted"):
            raise UsageError(
                f"{name} needs an imatrix: give the --imatrix that the recipe was made for, or "
                "leave the type out of --types"
            )
    return TypeLimits(
        types=names,
        pins=tuple((p, q) for kind, p, q in rules if kind == "pin"),
        floors=tuple((p, q) for kind, p, q in rules if kind == "floor"),
        imatrix=imatrix,
        allow_slow_cpu=bool(told.get("allow_slow_cpu")),
    )


def frame_of(
    recipe: Recipe, model: Model, loss: LossModel, limits: TypeLimits, imatrix: Path | None = None
) -> Frame:
    """Return the knapsack that `recipe` is an answer of.

    Raises:
        UsageError: a type of the recipe is not among its options (other types, pins or ties).
        BadFile: devices that no placement explains, a speed that is none.
    """
    engine = model_engine(recipe)
    palette = _possible(build(model, loss, engine, limits), model, imatrix)
    planned = {t.name: t for t in recipe.tensors}
    if not recipe.devices:
        choices = choices_in_file(model, palette)
        start = _start(choices, planned)
        use, pools = _file_pools(choices)
        return Frame(model, choices, start, file_use(choices), use, _used(use, start), pools)
    rig = _rig(recipe)
    placement = _placement(model, planned, rig)
    memory = tuple(
        DeviceMemory(d.name, 0, 0, 0, (), held_twice(model, recipe.settings, placement, i))
        for i, d in zip((*range(len(rig.gpus)), HOST), rig.devices, strict=True)
    )
    times = timing.of(model, palette, rig, recipe.settings, _min_tps(recipe))
    choices = build_choices(model, palette, placement, memory, times.cells, kept_seconds=times.kept)
    start = _start(choices, planned)
    use, capacity, pools = choices.use, _used(choices.use, start), choices.pools
    if [int(c) for c in capacity] != [d.weights_bytes for d in recipe.devices]:
        raise BadFile("the devices of this recipe do not hold what its tensors take: design again")
    allowed = times.allowed(placement)
    if allowed is not None:
        seconds = np.where(np.isfinite(choices.seconds), choices.seconds, 0.0)[None]
        most = np.maximum(allowed, _used(seconds, start))
        use, capacity = np.concatenate([use, seconds]), np.concatenate([capacity, most])
        pools = (*pools, SECONDS)
    return Frame(model, choices, start, file_use(choices), use, capacity, pools, placement, rig)


def _used(use: FloatArray, choice: IntArray) -> FloatArray:
    """Return (P,) what a choice uses of every pool."""
    return np.asarray(use[:, np.arange(len(choice)), choice].sum(axis=1))


def _rig(recipe: Recipe) -> Rig:
    """Return the rig of a recipe, as far as it tells of it.

    Raises:
        BadFile: what it tells of the machine is not about its devices.
    """
    devices = [
        Device(d.name, "gpu" if d.kind == "gpu" else "host", d.capacity_bytes)
        for d in recipe.devices
    ]
    rig = Rig(tuple(devices[:-1]), devices[-1], ideal=bool(recipe.budget.get("ideal")))
    told = recipe.budget.get("machine")
    return with_machine(rig, told) if told else rig


def _min_tps(recipe: Recipe) -> float | None:
    """Return the speed that a recipe is to keep, None for none.

    Raises:
        BadFile: it is no number above zero.
    """
    told: float | None = recipe.budget.get("min_tps")
    try:
        require_speed(told)
    except (TypeError, ValueError) as err:
        raise BadFile(f"the recipe's `budget.min_tps` is no speed: {told!r}") from err
    return told


def _possible(palette: Palette, model: Model, imatrix: Path | None) -> Palette:
    """Leave out what the packaged engine cannot try: foreign types, and those without an entry."""
    matrix = imatrices.read(imatrix) if imatrix else None
    known = np.array([q.name in table("ik") for q in palette.types])
    needy = np.array([q.imatrix in ("required", "asserted") for q in palette.types])
    bare = np.array([matrix is None or not imatrices.lookup(matrix, t.name) for t in model.tensors])
    return replace(palette, allowed=palette.allowed & known & ~(bare[:, None] & needy))


def _placement(model: Model, planned: Mapping[str, PlannedTensor], rig: Rig) -> Placement:
    """Read the placement off where the recipe's tensors lie.

    Raises:
        BadFile: they lie as no placement puts them.
    """
    where = {rig.host.name: HOST, **{g.name: i for i, g in enumerate(rig.gpus)}}
    try:
        homes = [where[planned[t.name].device] for t in model.tensors]
    except KeyError as err:
        raise BadFile(f"the recipe has a tensor on a device it does not list: {err}") from None
    layers: dict[int, int] = {}
    moved: set[int] = set()
    head = HOST
    for t, home in zip(model.tensors, homes, strict=True):
        if t.layer is None:
            head = home if t.name != EMBEDDING else head
        elif not is_movable(model, t):
            layers.setdefault(t.layer, home)
        elif home == HOST:
            moved.add(t.layer)
    n = max(layers, default=-1) + 1
    blocks = tuple(layers.get(i, HOST) for i in range(n))
    experts = frozenset(i for i in moved if blocks[i] != HOST)
    found = Placement(blocks, head, experts)
    wanted = tensor_homes(model, found)
    wanted[in_ram(model, found)] = HOST
    for t, home, other in zip(model.tensors, homes, wanted, strict=True):
        if home != other:
            raise BadFile(f"{t.name} lies on {planned[t.name].device}, apart from its layer")
    return found


def _file_pools(choices: Choices) -> tuple[FloatArray, tuple[str, ...]]:
    """Return the bytes in a file, and counted up to where the next tensor may start if that
    differs: a budget may have meant either."""
    bare, padded = file_use(choices), file_use(choices, padded=True)
    if np.array_equal(bare, padded):
        return bare[None], ("file",)
    return np.stack([bare, padded]), ("file", "file, padded")


def _start(choices: Choices, planned: Mapping[str, PlannedTensor]) -> NDArray[np.int64]:
    """Return the option of every group that gives its tensors the types of the recipe."""
    tensors, palette = choices.model.tensors, choices.palette
    start = np.zeros(len(choices.groups), dtype=np.int64)
    for g, group in enumerate(choices.groups):
        free = [m for m in group.members if not palette.kept_bytes[m]]
        if not free:
            continue
        now = {planned[tensors[m].name].type for m in free}
        kinds = [palette.types[c].name for c in group.columns[:, 0]]
        if len(now) > 1 or not now <= set(kinds):
            raise UsageError(
                f"{group.label} is {' and '.join(sorted(now))} in the recipe, which is not among "
                f"its options ({', '.join(kinds)}): name the types by --types, and give the "
                "--imatrix that the recipe was made for"
            )
        start[g] = kinds.index(now.pop())
    return start
