"""The device table: graphics cards, unified-memory machines and CPU memory systems.

Facts are rows of `devices.csv` beside this module with their source. `usable_mib` is what
nvidia-smi (or rocm-smi) shows as total, not the marketing size.
"""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal

from quantmix.errors import UnknownName
from quantmix.units import GIB, MIB

Kind = Literal["gpu", "uma", "cpu"]


@dataclass(frozen=True, slots=True)
class Card:
    """One row of the device table.

    Attributes:
        key: slug that people type. name, aliases: as vendors and tools write it.
        kind: `gpu`, `uma` (one memory for CPU and GPU) or `cpu` (a memory system of CPUs).
        memory_gib: marketing size, None for `cpu`. usable_mib: what tools show, None unknown.
        bandwidth_gbs: theoretical, 1e9 bytes per second.
        fp16_tflops, int8_tops: dense, None unknown. arch: compute capability or CPU class.
        efficiency: share of the bandwidth reached when generating tokens (fitted).
    """

    key: str
    name: str
    aliases: tuple[str, ...]
    kind: Kind
    memory_gib: int | None
    usable_mib: int | None
    usable_basis: str
    bandwidth_gbs: float | None
    fp16_tflops: float | None
    int8_tops: float | None
    arch: str
    efficiency: float | None
    source: str

    @property
    def compute_capability(self) -> float | None:
        """CUDA compute capability, None for what is no NVIDIA card."""
        return float(self.arch) if re.fullmatch(r"\d+\.\d", self.arch) else None

    @property
    def usable_bytes(self) -> int | None:
        """Usable bytes; where only the marketing size is known, the least of its size class."""
        if self.usable_mib is not None:
            return self.usable_mib * MIB
        if self.memory_gib is None:
            return None
        return usable_of_size(self.memory_gib)


def slug(text: str) -> str:
    """Return `text` in the form of a key: lower case, runs of other characters as one dash."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


@cache
def cards() -> dict[str, Card]:
    """Return every row of the device table by key, in table order."""
    text = (files("quantmix.rig") / "devices.csv").read_text(encoding="utf-8")
    found = [_parse(row) for row in csv.DictReader(text.splitlines())]
    return {card.key: card for card in found}


def find_card(name: str, *kinds: Kind) -> Card:
    """Return the card that `name` means: its key, its name or one of its aliases, in any spelling.

    Raises:
        UnknownName: no such card; the message suggests the nearest keys.
    """
    wanted = slug(name)
    known = {c.key: c for c in cards().values() if not kinds or c.kind in kinds}
    if wanted in known:
        return known[wanted]
    bare = wanted.replace("-", "")
    for card in known.values():
        spellings = {slug(s) for s in (card.key, card.name, *card.aliases)}
        if wanted in spellings or bare in {s.replace("-", "") for s in spellings}:
            return card
    if kinds and "gpu" not in kinds:
        hint = f"`quantmix rigs` lists them, e.g. {next(iter(known))}"
        raise UnknownName.of("CPU platform", name, known, hint)
    hint = "see `quantmix rigs`, or give its size, e.g. 24G"
    raise UnknownName.of("device", name, known, hint)


@cache
def sold_sizes() -> tuple[int, ...]:
    """Return the GiB that GPUs of the table are sold with, ascending."""
    return tuple(
        sorted({c.memory_gib for c in cards().values() if c.kind == "gpu" and c.memory_gib})
    )


@cache
def usable_of_size(gib: int) -> int:
    """Return the bytes that a card sold as `gib` GiB surely has: the least such card of the table.

    A size that no card of the table has is taken literally.
    """
    found = [
        c.usable_mib
        for c in cards().values()
        if c.kind == "gpu" and c.memory_gib == gib and c.usable_mib is not None
    ]
    return min(found) * MIB if found else gib * GIB


def _parse(row: dict[str, str]) -> Card:
    def number(name: str) -> float | None:
        return float(row[name]) if row[name] else None

    return Card(
        key=row["key"],
        name=row["name"],
        aliases=tuple(a for a in row["aliases"].split(";") if a),
        kind=row["kind"],  # type: ignore[arg-type]
        memory_gib=int(row["memory_gib"]) if row["memory_gib"] else None,
        usable_mib=int(row["usable_mib"]) if row["usable_mib"] else None,
        usable_basis=row["usable_basis"],
        bandwidth_gbs=number("bandwidth_gbs"),
        fp16_tflops=number("fp16_tflops"),
        int8_tops=number("int8_tops"),
        arch=row["arch"],
        efficiency=number("efficiency"),
        source=row["source"],
    )
