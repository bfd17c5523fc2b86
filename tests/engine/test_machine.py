"""Reading the machine."""

from __future__ import annotations

from quantmix.engine.machine import parse_ram, parse_smi, read_machine
from quantmix.units import GIB, MIB

SMI = """\
NVIDIA GeForce RTX 4090, 24564, 00000000:41:00.0
NVIDIA RTX PRO 6000 Blackwell Workstation Edition, 97887, 00000000:01:00.0
Broken, [N/A], 00000000:91:00.0
"""


def test_cards_come_in_pci_order() -> None:
    """With their total memory; unreadable lines are left out."""
    assert parse_smi(SMI) == (
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 97887 * MIB),
        ("NVIDIA GeForce RTX 4090", 24564 * MIB),
    )


def test_a_container_limit_counts_as_ram() -> None:
    """The smaller of installed RAM and the container's limit is what there is."""
    meminfo = "MemFree: 1 kB\nMemTotal:       65536 kB\n"
    assert parse_ram(meminfo, "max\n") == parse_ram(meminfo, "") == 64 * MIB
    assert parse_ram(meminfo, str(GIB)) == parse_ram(meminfo, "0") == 64 * MIB
    assert parse_ram(meminfo, f"{MIB}\n") == MIB
    assert parse_ram("", "max") == 0


def test_this_machine_can_be_read() -> None:
    """Reading never fails, cards or not, and says why there is none."""
    found = read_machine()
    assert bool(found.gpus) != bool(found.gpu_note)
