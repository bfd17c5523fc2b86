"""Rigs from what people type: `2xrtx-5090,2x24G`, a named rig of the field, a TOML file."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files
from math import ceil
from pathlib import Path
from typing import Any, Final

from quantmix.errors import BadFile, QuantmixError, UnknownName, UsageError
from quantmix.rig.cards import Card, cards, find_card, sold_sizes, usable_of_size
from quantmix.rig.device import Device, Rig
from quantmix.units import GIB, parse_memory, parse_size

_ITEM: Final = re.compile(r"^(?:(\d{1,9})\s*[x*×]\s*)?(.+)$", re.IGNORECASE)
_MARKETING: Final = re.compile(r"^(\d{1,9})g$", re.IGNORECASE)
_SIZE_LIKE: Final = re.compile(r"^[\d.]+\s*[kmgt](i?b)?$", re.IGNORECASE)
_MAX_GPUS: Final = 64
_MAX_REAL_CARDS: Final = 8
_KEYS: Final = {
    *("name", "gpus", "ram", "ram_reserve", "reserve", "cpu", "cpu_cores", "pcie_gbs"),
    *("desktop", "source", "note"),
}


@dataclass(frozen=True, slots=True)
class RealCards:
    """What a total of VRAM means on real cards.

    Attributes:
        count, label: e.g. 2 and `RTX PRO 6000 Blackwell`, or 4 and `48G`.
        usable_bytes: of all of them together; shortfall_bytes: missing to the total (0 = fits).
        gpus: the `--gpus` argument that describes them.
    """

    count: int
    label: str
    usable_bytes: int
    shortfall_bytes: int
    gpus: str


@dataclass(frozen=True, slots=True)
class RigFile:
    """A rig described in a TOML file: the rig, where it is from, and its text for people."""

    rig: Rig
    gpus: str
    ram: str
    cpu: str
    source: str
    note: str


def parse_gpus(text: str) -> Rig:
    """Return the rig of a `--gpus` list, in CUDA order, with no RAM stated.

    An item is a card of the device table or a size, with an optional count: `2xrtx-5090`, `32G`,
    `2x96G`, `96GiB`. A plain size that cards are sold with (`96G`) is capped at what the least
    such card of the table shows as usable; `96GiB` and `96GB` are literal. `none` is a machine
    without GPUs.

    Raises:
        UnknownName: an item is neither a size nor a known card.
        UsageError: the list is empty, a count is zero, or a size makes no sense.
    """
    gpus: list[Device] = []
    for item in () if _tidy(text) == "none" else text.split(","):
        match = _ITEM.match(item.strip())
        if match is None:
            raise UsageError(f"--gpus {text!r}: an item is empty; write e.g. 2xrtx-5090,1x24G")
        count = int(match.group(1) or 1)
        if not 1 <= count <= _MAX_GPUS or len(gpus) + count > _MAX_GPUS:
            raise UsageError(f"--gpus {text!r}: between 1 and {_MAX_GPUS} GPUs, please")
        for _ in range(count):
            gpus.append(_gpu(match.group(2).strip(), len(gpus)))
    return Rig(gpus=tuple(gpus), host=_host(None, None), name=_tidy(text))


def ideal_rig(vram_bytes: int) -> Rig:
    """Return the rig of `--vram`: one idealised device of exactly that many bytes, no RAM stated.

    Raises:
        UsageError: not above zero.
    """
    if vram_bytes <= 0:
        raise UsageError(f"--vram {vram_bytes} must be above zero")
    gpu = Device(name="GPU0", kind="gpu", capacity_bytes=vram_bytes, card="ideal")
    return Rig(gpus=(gpu,), host=_host(None, None), ideal=True)


def load_rig(name: str | Path) -> Rig:
    """Return a rig by the name of a shipped target, or from a TOML file.

    Raises:
        UnknownName: no such target, and no such file.
        BadFile: a file that is not a rig; the message names the key.
    """
    return load_rig_file(name).rig


def load_rig_file(name: str | Path) -> RigFile:
    """As `load_rig`, with the text that describes the rig.

    Raises:
        UnknownName, BadFile: as `load_rig`.
    """
    path = Path(name)
    if path.suffix == ".toml" or path.is_file():
        if not path.is_file():
            raise BadFile(f"no rig file at {path}")
        return _read(path)
    known = rig_names()
    if str(name).lower() not in known:
        raise UnknownName.of("rig", str(name), known, "see `quantmix rigs`, or give a FILE.toml")
    return _read(targets_dir() / f"{str(name).lower()}.toml")


def rig_names() -> tuple[str, ...]:
    """Return the names of the shipped rigs, sorted."""
    folder = targets_dir()
    return tuple(sorted(p.stem for p in folder.glob("*.toml"))) if folder.is_dir() else ()


def describe_rigs() -> list[dict[str, Any]]:
    """Return the shipped rigs as plain values for lists and JSON."""
    found = []
    for name in rig_names():
        file = load_rig_file(name)
        found.append(
            {
                "name": name,
                "gpus": file.gpus,
                "vram_bytes": sum(g.capacity_bytes or 0 for g in file.rig.gpus),
                "ram": file.ram,
                "ram_bytes": file.rig.host.capacity_bytes,
                "cpu": file.cpu,
                "cpu_cores": file.rig.cpu_cores,
                "source": file.source,
                "note": file.note,
            }
        )
    return found


@cache
def targets_dir() -> Path:
    """Return the folder of shipped rigs: inside the wheel, or at the root of a checkout."""
    packaged = Path(str(files("quantmix.rig") / "targets"))
    return packaged if packaged.is_dir() else Path(__file__).resolve().parents[2] / "targets"


def real_cards_for(total_bytes: int) -> tuple[RealCards, ...]:
    """Return what `total_bytes` of VRAM means on cards one can buy, fewest cards first.

    For every size that GPUs of the device table are sold with: how many make up the total by
    their marketing size (at most 8; only sizes that divide it, if any does), what those really
    offer, and what is then missing.
    """
    counts = [(size, ceil(total_bytes / (size * GIB))) for size in reversed(sold_sizes())]
    few = [(size, n) for size, n in counts if n <= _MAX_REAL_CARDS]
    exact = [(size, n) for size, n in few if n * size * GIB == total_bytes]
    return tuple(_real(total_bytes, size, n) for size, n in exact or few)


def _real(total_bytes: int, size: int, count: int) -> RealCards:
    """`count` cards of `size` GiB, by name when only one card of the table has that size."""
    same = [c for c in cards().values() if c.kind == "gpu" and c.memory_gib == size]
    usable = count * usable_of_size(size)
    return RealCards(
        count=count,
        label=same[0].name if len(same) == 1 else f"{size}G",
        usable_bytes=usable,
        shortfall_bytes=max(0, total_bytes - usable),
        gpus=f"{count}x{same[0].key}" if len(same) == 1 else f"{count}x{size}G",
    )


def _tidy(text: str) -> str:
    return re.sub(r"\s+", "", text).lower()


def _gpu(item: str, index: int) -> Device:
    """One GPU from a size or a card name."""
    name = f"GPU{index}"
    marketing = _MARKETING.match(item)
    if marketing:
        capacity = usable_of_size(int(marketing.group(1)))
        if capacity <= 0:
            raise UsageError(f"GPU size {item!r} must be above zero")
        return Device(name=name, kind="gpu", capacity_bytes=capacity, card=item.upper())
    if _SIZE_LIKE.match(item):
        return Device(name=name, kind="gpu", capacity_bytes=parse_size(item, "GPU size"), card=item)
    card = find_card(item, "gpu", "uma")
    return Device(
        name=name,
        kind="gpu",
        capacity_bytes=card.usable_bytes,
        card=card.key,
        bandwidth_gbs=card.bandwidth_gbs,
        efficiency=card.efficiency,
        int8_tops=card.int8_tops,
    )


def _host(ram_bytes: int | None, cpu: Card | None) -> Device:
    return Device(
        name="CPU",
        kind="host",
        capacity_bytes=ram_bytes,
        card=cpu.key if cpu else "",
        bandwidth_gbs=cpu.bandwidth_gbs if cpu else None,
        efficiency=cpu.efficiency if cpu else None,
    )


def _read(path: Path) -> RigFile:
    """Parse one rig file.

    Raises:
        BadFile: not TOML, an unknown key, or a value that makes no sense.
    """
    try:
        doc = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as err:
        raise BadFile(f"{path} cannot be read as a rig: {err}") from err
    unknown = sorted(set(doc) - _KEYS)
    if unknown:
        mend = f"use {', '.join(sorted(_KEYS))}"
        raise BadFile(f"rig {path.name}: unknown key {unknown[0]!r}; {mend}")
    try:
        return _build(doc, path.stem)
    except (QuantmixError, TypeError, ValueError, AttributeError) as err:
        raise BadFile(f"rig {path.name}: {err}") from err


def _build(doc: dict[str, Any], stem: str) -> RigFile:
    gpus = doc.get("gpus", "")
    if not isinstance(gpus, str):
        raise UsageError(f"gpus = {gpus!r} must be text such as '2xrtx-5090'")
    base = parse_gpus(gpus) if gpus else Rig(gpus=(), host=_host(None, None))
    cpu = find_card(doc["cpu"], "cpu", "uma") if doc.get("cpu") else None
    ram = parse_memory(doc["ram"], "ram") if doc.get("ram") else None
    desktop = doc.get("desktop", False)
    if not isinstance(desktop, bool):
        raise UsageError(f"desktop = {desktop!r} must be true or false")
    if not gpus and ram is None:
        raise UsageError("neither `gpus` nor `ram` is given")
    if doc.get("reserve"):
        each = parse_size(doc["reserve"], "reserve")
        base = replace(base, gpus=tuple(replace(g, reserve_bytes=each) for g in base.gpus))
    rig = replace(
        base,
        host=_host(ram, cpu),
        name=str(doc.get("name", stem)),
        cpu_cores=_number(doc, "cpu_cores", int),
        cpu_class=cpu.arch if cpu else "",
        pcie_gbs=_number(doc, "pcie_gbs", float),
        desktop=desktop,
        ram_reserve_bytes=(
            parse_size(doc["ram_reserve"], "ram_reserve") if doc.get("ram_reserve") else None
        ),
    )
    return RigFile(
        rig=rig,
        gpus=gpus,
        ram=str(doc.get("ram", "")),
        cpu=str(doc.get("cpu", "")),
        source=str(doc.get("source", "")),
        note=str(doc.get("note", "")),
    )


def _number(doc: dict[str, Any], key: str, kind: Any) -> Any:
    """Value of `key` as a positive number, None when absent."""
    if key not in doc:
        return None
    value = doc[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise UsageError(f"{key} = {value!r} must be a number above zero")
    return kind(value)
