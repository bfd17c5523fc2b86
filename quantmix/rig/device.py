"""Devices and rigs: what there is to put weights on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True, slots=True)
class Device:
    """One memory: a GPU, or the host's RAM.

    Attributes:
        name: `GPU0`, `GPU1`, … in CUDA order, or `CPU`.
        capacity_bytes: what may be used; None for a host whose RAM was not given.
        card: key in the device table, or a size such as `24G`.
        bandwidth_gbs: theoretical memory bandwidth in 1e9 bytes per second, None when unknown.
        efficiency: share of the bandwidth reached when generating tokens (fitted), None unknown.
        int8_tops: dense int8 operations, 1e12 per second, None unknown.
        reserve_bytes: overrides the automatic reserve.
    """

    name: str
    kind: Literal["gpu", "host"]
    capacity_bytes: int | None
    card: str = ""
    bandwidth_gbs: float | None = None
    efficiency: float | None = None
    int8_tops: float | None = None
    reserve_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Rig:
    """GPUs in CUDA order and the host.

    `ideal` marks the single literal pool of `--vram`. `cpu_cores` and `pcie_gbs` feed the speed
    model; the latter is what a copy to a GPU reaches, in 1e9 bytes per second, None: as fitted
    for its card. `desktop` adds a desktop's own use to the first GPU's reserve.
    """

    gpus: tuple[Device, ...]
    host: Device
    name: str = ""
    ideal: bool = False
    cpu_cores: int | None = None
    cpu_class: str = ""
    pcie_gbs: float | None = None
    desktop: bool = False
    ram_reserve_bytes: int | None = None

    @property
    def devices(self) -> tuple[Device, ...]:
        """GPUs, then the host."""
        return (*self.gpus, self.host)

    @property
    def total_bytes(self) -> int:
        """What all devices hold together, as far as it is stated."""
        return sum(d.capacity_bytes or 0 for d in self.devices)

    @property
    def has_ram(self) -> bool:
        """Whether repeating-layer weights may go to RAM."""
        return self.host.capacity_bytes is not None

    def only(self, cards: Sequence[int]) -> Rig:
        """Return the rig with these GPUs, in this order and under their names, and the host."""
        return replace(
            self,
            gpus=tuple(self.gpus[i] for i in cards),
            desktop=self.desktop and 0 in cards,
        )

    def card_sets(self) -> tuple[tuple[int, ...], ...]:
        """Return the sets of GPUs worth planning with: all, then without the smallest, and so on.

        Every GPU in use costs a reserve and buffers, so that a small one may take more than it
        holds. One as large as the largest is never left out.
        """
        sizes = [g.capacity_bytes or 0 for g in self.gpus]
        order = sorted(range(len(sizes)), key=lambda i: sizes[i])
        small = [i for i in order if sizes[i] < max(sizes)]
        everything = range(len(sizes))
        return tuple(
            tuple(i for i in everything if i not in small[:n]) for n in range(len(small) + 1)
        )
