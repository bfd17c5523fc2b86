"""Reading the machine."""

from __future__ import annotations

from quantmix.rig.machine import (
    Machine,
    parse_cpu_name,
    parse_limit,
    parse_meminfo,
    parse_smi,
    read_machine,
)
from quantmix.units import GIB, MIB

SMI = """\
1, NVIDIA GeForce RTX 4090, 24564, 10, 00000000:41:00.0
0, NVIDIA RTX PRO 6000 Blackwell Workstation Edition, 97887, 812, 00000000:01:00.0
2, Some New Card, 65536, 0, 00000000:81:00.0
3, Broken, [N/A], 0, 00000000:91:00.0
"""


def machine(limit: int | None = None) -> Machine:
    """A machine with the three readable cards above and 256 GiB."""
    return Machine(parse_smi(SMI), 256 * GIB, 250 * GIB, limit, 16, "cpu", "")


def test_cards_become_devices_in_pci_order() -> None:
    """Known cards bring their bandwidth, unknown ones their size; unreadable lines are left out."""
    rig = machine().rig
    assert [g.card for g in rig.gpus] == ["rtx-pro-6000", "rtx-4090", "Some New Card"]
    assert [(g.capacity_bytes or 0) // MIB for g in rig.gpus] == [97887, 24564, 65536]
    assert [g.bandwidth_gbs for g in rig.gpus] == [1792, 1008, None]
    assert rig.desktop  # the first card is in use
    assert rig.cpu_cores == 16


def test_a_container_limit_counts_as_ram() -> None:
    """The smaller of installed RAM and the container's limit is what there is."""
    assert machine().rig.host.capacity_bytes == 256 * GIB
    assert machine(64 * GIB).rig.host.capacity_bytes == 64 * GIB


def test_proc_files() -> None:
    """MemTotal and MemAvailable are KiB; what is missing is 0, None or empty."""
    text = "MemTotal:       65536 kB\nMemFree: 1 kB\nMemAvailable:   1024 kB\n"
    assert parse_meminfo(text) == (64 * MIB, MIB)
    assert parse_meminfo("") == (0, 0)
    assert parse_limit("max\n", GIB) is None
    assert parse_limit(str(2 * GIB), GIB) is None
    assert parse_limit(f"{MIB}\n", GIB) == MIB
    assert parse_cpu_name("model name\t: A CPU\n") == "A CPU"
    assert parse_cpu_name("") == ""


def test_this_machine_can_be_read() -> None:
    """Reading never fails, cards or not, and says why there is none."""
    found = read_machine()
    assert found.cores >= 1
    assert bool(found.gpus) != bool(found.gpu_note)
