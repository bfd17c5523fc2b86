"""Whether anything fits at all: the smallest types, placed in closed form, in milliseconds.

Used to skip searches that cannot succeed and to find the smallest budgets by bisection. It says
"may fit" for a rig that only the full search can judge (speed limits, ties); the caller confirms.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from quantmix.memory.head import EMBEDDING, is_tied
from quantmix.memory.model import HOST, Placement
from quantmix.memory.plan import device_memory
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.palette import Palette
from quantmix.rig.device import Rig
from quantmix.search.choices import in_ram, movable_roles, tensor_homes


@dataclass(frozen=True)
class Packed:
    """The smallest types on a placement: layers whose experts are in RAM, bytes that are missing.

    `missing` is by device, +inf where no type may live there.
    """

    spilled: frozenset[int]
    missing: dict[str, float]


@dataclass(frozen=True)
class Least:
    """Smallest bytes of every tensor on a GPU and in RAM, +inf where no type may live.

    An embedding lies in RAM whatever multiplies it: one that is only looked up may take any type
    there; a tied one those of the head's device (`_in_ram`).
    """

    model: Model
    gpu: NDArray[np.float64]
    cpu: NDArray[np.float64]

    @classmethod
    def of(cls, model: Model, palette: Palette) -> Least:
        """Return the minima of a palette."""

        def smallest(columns: NDArray[np.bool_]) -> NDArray[np.float64]:
            allowed = palette.allowed & columns[None, :]
            least = np.where(allowed, palette.bytes, np.inf).min(axis=1, initial=np.inf)
            return np.where(palette.kept_bytes > 0, palette.kept_bytes, least)

        cpu = smallest(palette.cpu)
        anywhere = smallest(np.ones_like(palette.cpu))
        lookup = _embedding(model) & (not is_tied(model))
        return cls(model, smallest(palette.gpu), np.where(lookup, anywhere, cpu))

    def spilled(self, rig: Rig, settings: Settings, placement: Placement) -> frozenset[int] | None:
        """Return which layers' experts must go to RAM at the smallest types; None: does not fit."""
        packed = self.packed(rig, settings, placement)
        return None if packed.missing else packed.spilled

    def packed(self, rig: Rig, settings: Settings, placement: Placement) -> Packed:
        """Return how the smallest types lie on the devices, experts in RAM where they must."""
        roles = movable_roles(self.model)
        layers = range(len(placement.layer_device))
        movable = frozenset(i for i in layers if rig.has_ram and placement.layer_device[i] != HOST)
        movers = in_ram(self.model, replace(placement, cpu_experts=movable))
        movers &= np.array([t.role in roles for t in self.model.tensors])
        homes = tensor_homes(self.model, placement)
        loaded = np.array([t.loaded for t in self.model.tensors])
        memory = device_memory(self.model, settings, rig, replace(placement, cpu_experts=movable))
        level = int(np.max(np.where(movers, self.cpu, 0.0), initial=0.0)) if movable else 0
        fixed = [float(m.fixed_bytes(level)) for m in memory]
        out: set[int] = set()
        missing: dict[str, float] = {}
        in_ram_bytes = self._in_ram(placement)
        head = in_ram_bytes[_embedding(self.model)].sum()
        ram = fixed[-1] + in_ram_bytes[loaded & (homes == HOST)].sum()
        if memory[-1].duplicate_embedding:
            ram += head
        for gpu, device in enumerate(rig.gpus):
            here = loaded & (homes == gpu)
            free = (device.capacity_bytes or 0) - fixed[gpu] - self.gpu[here & ~movers].sum()
            if memory[gpu].duplicate_embedding:
                free -= head
            if free < 0:
                missing[device.name] = -float(free)
            layers_out, n_bytes = self._overflow(here & movers, float(free))
            ram += n_bytes
            out |= layers_out
        capacity = rig.host.capacity_bytes
        over = float(ram) - (np.inf if capacity is None else capacity)
        if over > 0 or np.isnan(over):
            missing[rig.host.name] = np.inf if np.isnan(over) else over
        return Packed(frozenset(out), missing)

    def _overflow(self, movers: NDArray[np.bool_], free: float) -> tuple[set[int], float]:
        """Return the layers whose experts a GPU with `free` bytes cannot hold, and their bytes."""
        by_layer: dict[int, tuple[float, float]] = {}
        for i in np.nonzero(movers)[0]:
            layer = self.model.tensors[i].layer or 0
            gpu, cpu = by_layer.get(layer, (0.0, 0.0))
            by_layer[layer] = (gpu + float(self.gpu[i]), cpu + float(self.cpu[i]))
        spilled = 0.0
        out: set[int] = set()
        for layer, (gpu, cpu) in sorted(by_layer.items()):
            if gpu <= free:
                free -= gpu
            else:
                spilled += cpu
                out.add(layer)
        return out, spilled

    def _in_ram(self, placement: Placement) -> NDArray[np.float64]:
        """Return (T,) smallest bytes of what lies in RAM; a tied head on a GPU must run there."""
        if not is_tied(self.model) or placement.output_device == HOST:
            return self.cpu
        return np.where(_embedding(self.model), self.gpu, self.cpu)


def _embedding(model: Model) -> NDArray[np.bool_]:
    """Return (T,) which tensor is the embedding."""
    return np.array([t.name == EMBEDDING for t in model.tensors])
