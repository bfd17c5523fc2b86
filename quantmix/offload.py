"""Placement and flags for a file that already exists: types are given, only homes are sought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Final

from quantmix.assemble import device_use
from quantmix.emit.flags import OffloadFlags, offload
from quantmix.emit.lint import wrong_devices
from quantmix.engine import presets
from quantmix.errors import InfeasibleBudget
from quantmix.ggml import types
from quantmix.ggml.types import Engine, GgmlType
from quantmix.memory import kv
from quantmix.memory.head import EMBEDDING, head_device, head_name, host_slots
from quantmix.memory.homes import is_expert, planned
from quantmix.memory.model import HOST, DeviceMemory, Placement
from quantmix.memory.plan import device_memory
from quantmix.memory.settings import Settings
from quantmix.models.model import Model, Tensor
from quantmix.mtp import with_mtp
from quantmix.recipe import DeviceUse
from quantmix.rig.device import Rig
from quantmix.search.placement import split_layers
from quantmix.speed.model import plan_seconds, predict, usual_fill
from quantmix.speed.prediction import Speed
from quantmix.units import gib, ranges

_BOUNDARY_ROUNDS: Final = 2
_CTX_STEP: Final = 256


@dataclass(frozen=True)
class StoredModel:
    """A model with the type and the bytes of every tensor of its file, in file order."""

    model: Model
    types: tuple[GgmlType, ...]
    sizes: dict[str, int]

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.sizes.values())


@dataclass(frozen=True)
class OffloadPlan:
    """Where an existing file goes, the flags that put it there, and what it is worth."""

    placement: Placement
    flags: OffloadFlags
    devices: tuple[DeviceUse, ...]
    holds: dict[str, str]
    speed: Speed
    warnings: tuple[str, ...]


def stored(model: Model, engine: Engine, at: str | None = None) -> StoredModel:
    """Return the model with the types of its file, or with every matrix at type `at`.

    `at` may be a preset of llama-quantize.

    Raises:
        UnknownName: a type that the engine does not have.
        UsageError: `at` cannot be written to some tensor.
        EngineMissing, EngineError: a preset, and no engine that tells what it is.
    """
    if at and presets.is_preset(at, engine):
        return stored(presets.made(model, at, engine), engine)
    chosen = tuple(
        types.resolve(at, t.name, t.shape, engine)
        if at and t.quantizable
        else types.get(t.source_type, engine)
        for t in model.tensors
    )
    sizes = {t.name: q.tensor_bytes(t.shape) for t, q in zip(model.tensors, chosen, strict=True)}
    return StoredModel(model, chosen, sizes)


def place(
    file: StoredModel, rig: Rig, settings: Settings, *, scale: float | None = None
) -> OffloadPlan:
    """Return the fastest placement found for a file on a rig, with its proven flags.

    Everything on the GPUs when it fits. Else, for mixtures of experts, attention, dense parts and
    KV first, then whole layers' experts where they save most time per byte; for dense models (or
    when even that does not fit) the first layers go to RAM. Without RAM only the GPUs count.
    `scale` calibrates the speed (`quantmix.speed.model.calibration`).

    Raises:
        InfeasibleBudget: it does not fit; names what is missing.
    """
    file = replace(file, model=with_mtp(file.model, settings))
    search = _Search(file, rig, settings)
    placement = _best(file, rig, settings)
    if placement is None:
        raise InfeasibleBudget(search.shortage())
    flags = offload(file.model, settings, rig, placement, file.sizes)
    where = planned(file.model, placement, rig, mtp=settings.mtp)
    return OffloadPlan(
        placement,
        flags,
        search.devices(placement),
        holds(file.model, rig, placement, where),
        predict(file.model, settings, rig, placement, file.types, scale=scale),
        tuple(f.text for f in wrong_devices(file.model, file.types, where)),
    )


def place_longest(file: StoredModel, rig: Rig, settings: Settings) -> tuple[Settings, OffloadPlan]:
    """Return the placement with the longest context that fits, up to the trained one.

    Raises:
        InfeasibleBudget: not even 256 tokens fit.
    """
    fits, top = 1, max(1, (file.model.hparams.ctx_train or 131072) // _CTX_STEP)
    while fits < top:
        middle = (fits + top + 1) // 2
        longer = replace(settings, ctx=middle * _CTX_STEP)
        if _best(file, rig, longer) is None:
            top = middle - 1
        else:
            fits = middle
    chosen = replace(settings, ctx=fits * _CTX_STEP)
    return chosen, place(file, rig, chosen)


def _best(file: StoredModel, rig: Rig, settings: Settings) -> Placement | None:
    """Return the placement to use, small GPUs left out where that spares layers in RAM."""
    found: Placement | None = None
    for cards in rig.card_sets():
        in_ram = None if found is None else found.layer_device.count(HOST)
        if in_ram == 0:
            break
        other = _Search(file, rig.only(cards), settings).best(in_ram)
        found = found if other is None else other.on(cards)
    return found


def needed_bytes(file: StoredModel, rig: Rig, settings: Settings) -> int:
    """Return about what a file needs on all devices together: weights, KV, buffers, reserves."""
    nowhere = Placement((HOST,) * kv.n_blocks(file.model), HOST)
    memory = device_memory(file.model, settings, rig, nowhere, visible=range(len(rig.gpus)))
    cache = sum(kv.kv_bytes(file.model, settings))
    return file.tensor_bytes + cache + sum(m.fixed_bytes() - m.kv_bytes for m in memory)


def device_uses(
    file: StoredModel,
    rig: Rig,
    settings: Settings,
    placement: Placement,
    where: dict[str, str] | None = None,
    visible: Sequence[int] | None = None,
) -> tuple[DeviceUse, ...]:
    """Return what every device of the rig holds; `where` overrides the placement's homes.

    `visible` are the GPUs that the engine sees when they are not those of the placement.
    """
    where = where or planned(file.model, placement, rig, mtp=settings.mtp)
    memory = device_memory(file.model, settings, rig, placement, visible=visible)
    weights, largest = (
        _weights_by_device(file, rig, memory, where),
        _largest_ram_expert(file, where),
    )
    return tuple(
        device_use(device, here, n_bytes, largest)
        for device, here, n_bytes in zip(rig.devices, memory, weights, strict=True)
    )


def holds(model: Model, rig: Rig, placement: Placement, where: Mapping[str, str]) -> dict[str, str]:
    """Return per device what it holds: `attention and KV of layers 0-16; experts of layers 3-4`."""
    blocks = placement.layer_device[: model.hparams.n_layer]
    found = {}
    for device in rig.devices:
        index = HOST if device.kind == "host" else int(rig.gpus.index(device))
        mine = [t for t in model.tensors if where.get(t.name) == device.name]
        layers: dict[str, set[int]] = {
            "attention and KV": {i for i, d in enumerate(blocks) if d == index},
            **_expert_layers(model, mine),
            "dense FFN": {t.layer for t in mine if t.role == "ffn_down" and t.layer is not None},
        }
        parts = [f"{label} of layers {ranges(some)}" for label, some in layers.items() if some]
        parts += [t.role for t in mine if t.role in ("output", "token_embd")]
        found[device.name] = "; ".join(parts) or "nothing"
    return found


def _expert_layers(model: Model, mine: Sequence[Tensor]) -> dict[str, set[int]]:
    """Layers by which of their expert tensors are here: `experts` when all of them are."""
    whole: dict[int, set[str]] = {}
    here: dict[int, set[str]] = {}
    for tensors, parts in ((model.tensors, whole), (mine, here)):
        for t in tensors:
            if t.role.endswith("_exps") and t.layer is not None:
                parts.setdefault(t.layer, set()).add(t.role)
    found: dict[str, set[int]] = {}
    for layer, roles in here.items():
        label = "experts" if roles == whole[layer] else " + ".join(sorted(roles))
        found.setdefault(label, set()).add(layer)
    return found


@dataclass(frozen=True)
class _Search:
    """Tries placements of one file on one rig."""

    file: StoredModel
    rig: Rig
    settings: Settings

    def best(self, below: int | None = None) -> Placement | None:
        """The placement to use, None when nothing fits with fewer than `below` layers in RAM."""
        n = kv.n_blocks(self.file.model)
        for in_ram in host_slots(self.settings, n)[:below] if self.rig.has_ram else (0,):
            if not self.rig.gpus and in_ram < n:
                continue
            found = self._with_leading(in_ram)
            if found is not None:
                return found
        return None

    def _with_leading(self, in_ram: int) -> Placement | None:
        """Best placement with so many first layers in RAM."""
        for split in self._splits(in_ram, 1.0):
            if self._fits(split):
                return split
        if not self.rig.has_ram or not self.file.model.hparams.is_moe:
            return None
        tried = [p for s in self._splits(in_ram, self._share(in_ram)) if (p := self._filled(s))]
        if not tried:
            return None
        return self._improved(min(tried, key=self._seconds))

    def _splits(self, in_ram: int, expert_share: float) -> list[Placement]:
        """Contiguous splits to try: in proportion to the room, and each GPU filled in turn."""
        weights = self._block_bytes(expert_share)
        n, last = len(weights), len(self.rig.gpus) - 1
        head = head_device(self.file.model, self.settings, in_ram, n, last)
        if in_ram >= n or not self.rig.gpus:
            return [Placement((HOST,) * n, head)]
        probe = Placement((HOST,) * in_ram + (last,) * (n - in_ram), head)
        memory = device_memory(
            self.file.model, self.settings, self.rig, probe, visible=range(last + 1)
        )
        room = [
            float((g.capacity_bytes or 0) - m.fixed_bytes() + m.kv_bytes + m.derived_bytes)
            for g, m in zip(self.rig.gpus, memory, strict=False)
        ]
        tail = float(self._head_bytes()) if head != HOST else 0.0
        even = split_layers(weights, room, tail=tail, host_layers=in_ram)
        return [Placement(even, head), Placement(_filled_in_turn(weights, room, in_ram), head)]

    def _filled(self, split: Placement) -> Placement | None:
        """Experts of as many layers as fit moved onto the GPUs of `split`; None: nothing fits."""
        groups, gains = self._expert_bytes, self._gains
        kept = {i for i in groups if split.layer_device[i] != HOST}
        for _ in range(2):  # a smaller largest expert in RAM frees room for another round
            free = self._room(replace(split, cpu_experts=frozenset(kept)))
            if any(f < 0 for f in free):
                break
            for i in sorted(kept, key=lambda i: (-gains[i], i)):
                gpu = split.layer_device[i]
                if gains[i] > 0 and groups[i] <= free[gpu]:
                    free[gpu] -= groups[i]
                    kept.discard(i)
        found = replace(split, cpu_experts=frozenset(kept))
        return found if self._fits(found) else None

    def _room(self, placement: Placement) -> list[int]:
        """Free bytes per GPU, with buffers that hold however many experts are moved later."""
        where = planned(self.file.model, placement, self.rig, mtp=self.settings.mtp)
        spare = _largest_ram_expert(self.file, where)
        with_experts = self._memory(replace(placement, cpu_experts=frozenset()))
        in_ram = self._memory(placement)
        weights = _weights_by_device(self.file, self.rig, in_ram, where)
        free = []
        for gpu, a, b, used in zip(self.rig.gpus, in_ram, with_experts, weights, strict=False):
            either = replace(a, compute=(*a.compute, *b.compute))
            free.append((gpu.capacity_bytes or 0) - either.fixed_bytes(spare) - used)
        return free

    def _improved(self, start: Placement) -> Placement:
        """Move single blocks across boundaries while that makes tokens faster."""
        best, time = start, self._seconds(start)
        for _ in range(_BOUNDARY_ROUNDS):
            moved = False
            for left in range(len(self.rig.gpus) - 1):
                for step in (-2, -1, 1, 2):
                    homes = _shifted(best.layer_device, left, step)
                    other = self._filled(Placement(homes, best.output_device)) if homes else None
                    if other is not None and self._seconds(other) < time * (1 - 1e-9):
                        best, time, moved = other, self._seconds(other), True
            if not moved:
                break
        return best

    def devices(self, placement: Placement) -> tuple[DeviceUse, ...]:
        """What every device would hold."""
        return device_uses(self.file, self.rig, self.settings, placement)

    def shortage(self) -> str:
        """One line: what is missing with everything that may be in RAM in RAM."""
        mend = "give more --gpus" if self.rig.has_ram else "give more --gpus, or state --ram"
        need = needed_bytes(self.file, self.rig, self.settings)
        return (
            f"{self.file.model.id} needs about {gib(need)} (weights "
            f"{gib(self.file.tensor_bytes)}, the rest KV cache, buffers and reserves) and no split "
            f"of it fits {gib(self.rig.total_bytes)} of "
            f"{'GPUs and RAM' if self.rig.has_ram else 'GPU memory'}: {mend}, or a smaller --ctx"
        )

    def _memory(self, placement: Placement) -> tuple[DeviceMemory, ...]:
        return device_memory(self.file.model, self.settings, self.rig, placement)

    def _fits(self, placement: Placement) -> bool:
        return all(u.free_bytes is None or u.free_bytes >= 0 for u in self.devices(placement))

    def _seconds(self, placement: Placement) -> float:
        """Seconds per token with a cache in use."""
        return plan_seconds(
            self.file.model,
            self.settings,
            self.rig,
            placement,
            self.file.types,
            n_kv=usual_fill(self.settings),
        )

    def _share(self, in_ram: int) -> float:
        """Share of the experts that the GPUs can hold besides everything else."""
        base, whole = sum(self._block_bytes(0.0)[in_ram:]), sum(self._block_bytes(1.0)[in_ram:])
        room = sum(g.capacity_bytes or 0 for g in self.rig.gpus) - self._head_bytes()
        return min(1.0, max(0.0, (room - base) / max(whole - base, 1.0)))

    def _block_bytes(self, expert_share: float) -> list[float]:
        """Bytes of each block with its KV cache, experts counted in part."""
        model = self.file.model
        weights = [float(b) for b in kv.kv_bytes(model, self.settings)]
        for t in model.tensors:
            if t.layer is not None and t.layer < len(weights) and (t.loaded or self.settings.mtp):
                weights[t.layer] += self.file.sizes[t.name] * (expert_share if is_expert(t) else 1)
        return weights

    @cached_property
    def _experts(self) -> dict[int, list[tuple[GgmlType, int]]]:
        """Type and bytes of the routed experts of each layer that has some."""
        groups: dict[int, list[tuple[GgmlType, int]]] = {}
        for t, kind in zip(self.file.model.tensors, self.file.types, strict=True):
            if is_expert(t) and t.layer is not None and (t.loaded or self.settings.mtp):
                groups.setdefault(t.layer, []).append((kind, self.file.sizes[t.name]))
        return groups

    @cached_property
    def _expert_bytes(self) -> dict[int, int]:
        """Bytes of the routed experts of each layer that has some."""
        return {layer: sum(n for _, n in mine) for layer, mine in self._experts.items()}

    @cached_property
    def _gains(self) -> dict[int, float]:
        """Whether moving a layer's experts to a GPU pays, per byte; -1 without a CUDA kernel.

        All bytes of a layer's experts are read alike, so the bits per byte read from RAM decide;
        types that decode slowly on a CPU come first.
        """
        gains = {}
        for layer, mine in self._experts.items():
            slow = sum(n for kind, n in mine if kind.slow_cpu)
            without_kernel = any(not kind.cuda for kind, _ in mine)
            gains[layer] = -1.0 if without_kernel else 1.0 + slow / self._expert_bytes[layer]
        return gains

    def _head_bytes(self) -> int:
        return self.file.sizes.get(head_name(self.file.model), 0)


def _filled_in_turn(
    weights: Sequence[float], room: Sequence[float], in_ram: int
) -> tuple[int, ...]:
    """Give each GPU blocks until the next would not fit; the last takes the rest."""
    homes, gpu, used = [HOST] * in_ram, 0, 0.0
    for weight in weights[in_ram:]:
        while gpu < len(room) - 1 and used + weight > room[gpu]:
            gpu, used = gpu + 1, 0.0
        homes.append(gpu)
        used += weight
    return tuple(homes)


def _shifted(homes: Sequence[int], left: int, step: int) -> tuple[int, ...] | None:
    """Move the boundary between GPU `left` and the next by `step` blocks; None when impossible."""
    mine = [i for i, d in enumerate(homes) if d in (left, left + 1)]
    first = sum(homes[i] == left for i in mine) + step
    if not mine or not 0 < first < len(mine):
        return None
    moved = list(homes)
    for rank, i in enumerate(mine):
        moved[i] = left if rank < first else left + 1
    assert all(a <= b for a, b in pairwise(moved))
    return tuple(moved)


def _weights_by_device(
    file: StoredModel, rig: Rig, memory: Sequence[DeviceMemory], where: dict[str, str]
) -> list[int]:
    totals = dict.fromkeys((d.name for d in rig.devices), 0)
    for name, device in where.items():
        totals[device] += file.sizes[name]
    for here in memory:
        if here.duplicate_embedding:
            totals[here.name] += file.sizes[EMBEDDING]
    return list(totals.values())


def _largest_ram_expert(file: StoredModel, where: dict[str, str]) -> int:
    found = [
        file.sizes[t.name]
        for t in file.model.tensors
        if is_expert(t) and where.get(t.name) == "CPU"
    ]
    return max(found, default=0)
