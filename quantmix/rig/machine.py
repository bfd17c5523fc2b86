"""This machine as a rig: cards from nvidia-smi when there is one, RAM and cores from the system."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantmix.errors import UnknownName
from quantmix.rig.cards import Card, find_card
from quantmix.rig.device import Device, Rig
from quantmix.units import MIB

_QUERY: Final = (
    "nvidia-smi",
    "--query-gpu=index,name,memory.total,memory.used,pci.bus_id",
    "--format=csv,noheader,nounits",
)
_TIMEOUT_SECONDS: Final = 10


@dataclass(frozen=True, slots=True)
class FoundGpu:
    """One card as nvidia-smi lists it (PCI bus order)."""

    index: int
    name: str
    total_bytes: int
    used_bytes: int
    pci_bus_id: str


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found; zero or empty where the system does not tell.

    `cgroup_bytes` is a container's memory limit, None without one. `gpu_note` says why no card was
    found, or is empty.
    """

    gpus: tuple[FoundGpu, ...]
    ram_bytes: int
    ram_available_bytes: int
    cgroup_bytes: int | None
    cores: int
    cpu_name: str
    gpu_note: str

    @property
    def rig(self) -> Rig:
        """The machine as a rig in PCI bus order (`CUDA_DEVICE_ORDER=PCI_BUS_ID`)."""
        ram = min(self.ram_bytes, self.cgroup_bytes or self.ram_bytes)
        return Rig(
            gpus=tuple(_device(g, i) for i, g in enumerate(self.gpus)),
            host=Device(name="CPU", kind="host", capacity_bytes=ram or None),
            name="this machine",
            cpu_cores=self.cores or None,
            desktop=bool(self.gpus) and self.gpus[0].used_bytes > 256 * MIB,
        )


def read_machine() -> Machine:
    """Return this machine; nothing that is missing is an error."""
    gpus, note = _nvidia()
    ram, available = parse_meminfo(_text("/proc/meminfo"))
    return Machine(
        gpus=gpus,
        ram_bytes=ram,
        ram_available_bytes=available,
        cgroup_bytes=parse_limit(
            _text("/sys/fs/cgroup/memory.max")
            or _text("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
            ram,
        ),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _cores(),
        cpu_name=parse_cpu_name(_text("/proc/cpuinfo")),
        gpu_note=note,
    )


def parse_smi(text: str) -> tuple[FoundGpu, ...]:
    """Return the cards of nvidia-smi's CSV answer; lines it cannot read are left out."""
    found = []
    for line in text.splitlines():
        cells = [c.strip() for c in line.split(",")]
        if len(cells) != 5 or not all(c.isdigit() for c in (cells[0], cells[2], cells[3])):
            continue
        found.append(
            FoundGpu(
                index=int(cells[0]),
                name=cells[1],
                total_bytes=int(cells[2]) * MIB,
                used_bytes=int(cells[3]) * MIB,
                pci_bus_id=cells[4],
            )
        )
    return tuple(sorted(found, key=lambda g: g.pci_bus_id))


def parse_meminfo(text: str) -> tuple[int, int]:
    """Return (installed, available) bytes of /proc/meminfo; 0 where it does not say."""

    def value(key: str) -> int:
        match = re.search(rf"^{key}:\s+(\d+) kB$", text, re.MULTILINE)
        return int(match.group(1)) * 1024 if match else 0

    return value("MemTotal"), value("MemAvailable")


def parse_limit(text: str, ram_bytes: int) -> int | None:
    """Return a container's memory limit in bytes, None for none (or one above the RAM)."""
    limit = int(text) if text.strip().isdigit() else None
    return limit if limit is not None and 0 < limit < ram_bytes else None


def parse_cpu_name(text: str) -> str:
    """Return the CPU's name from /proc/cpuinfo, empty when it has none."""
    match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return match.group(1).strip() if match else ""


def _device(gpu: FoundGpu, index: int) -> Device:
    card = _card(gpu.name) or _card(gpu.name.removeprefix("NVIDIA "))
    if card is None:
        return Device(f"GPU{index}", "gpu", gpu.total_bytes, card=gpu.name)
    return Device(
        name=f"GPU{index}",
        kind="gpu",
        capacity_bytes=gpu.total_bytes,
        card=card.key,
        bandwidth_gbs=card.bandwidth_gbs,
        efficiency=card.efficiency,
        int8_tops=card.int8_tops,
    )


def _card(name: str) -> Card | None:
    try:
        return find_card(name, "gpu", "uma")
    except UnknownName:
        return None


def _nvidia() -> tuple[tuple[FoundGpu, ...], str]:
    try:
        done = subprocess.run(
            _QUERY, capture_output=True, text=True, timeout=_TIMEOUT_SECONDS, check=False
        )
    except FileNotFoundError:
        return (), "nvidia-smi not found"
    except (OSError, subprocess.TimeoutExpired) as err:
        return (), f"nvidia-smi failed: {err}"
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()
        return (), f"nvidia-smi failed: {last[-1] if last else done.returncode}"
    return parse_smi(done.stdout), ""


def _cores() -> int:
    return os.cpu_count() or 0


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
