"""What this machine has: cards from nvidia-smi when there is one, RAM from the system."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantmix.units import MIB

_QUERY: Final = (
    "nvidia-smi",
    "--query-gpu=name,memory.total,pci.bus_id",
    "--format=csv,noheader,nounits",
)
_TIMEOUT_SECONDS: Final = 10


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found; empty or zero where the system does not tell.

    Attributes:
        gpus: (name, bytes in total) of each card in PCI bus order. gpu_note: why there is none.
        ram_bytes: installed, or less where a container is limited to less.
    """

    gpus: tuple[tuple[str, int], ...]
    gpu_note: str
    ram_bytes: int


def read_machine() -> Machine:
    """Return this machine; nothing that is missing is an error."""
    gpus, note = _nvidia()
    limit = _text("/sys/fs/cgroup/memory.max") or _text(
        "/sys/fs/cgroup/memory/memory.limit_in_bytes"
    )
    return Machine(gpus, note, parse_ram(_text("/proc/meminfo"), limit))


def parse_smi(text: str) -> tuple[tuple[str, int], ...]:
    """Return the cards of nvidia-smi's CSV answer; lines it cannot read are left out."""
    rows = [[c.strip() for c in line.split(",")] for line in text.splitlines()]
    good = sorted((r for r in rows if len(r) == 3 and r[1].isdigit()), key=lambda r: r[2])
    return tuple((name, int(mib) * MIB) for name, mib, _ in good)


def parse_ram(meminfo: str, limit: str) -> int:
    """Return the bytes of /proc/meminfo, or a container's limit below them; 0 when unknown."""
    match = re.search(r"^MemTotal:\s+(\d+) kB$", meminfo, re.MULTILINE)
    ram = int(match.group(1)) * 1024 if match else 0
    return min(ram, int(limit) or ram) if limit.strip().isdigit() else ram


def _nvidia() -> tuple[tuple[tuple[str, int], ...], str]:
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
    gpus = parse_smi(done.stdout)
    return gpus, "" if gpus else "nvidia-smi lists none here"


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
