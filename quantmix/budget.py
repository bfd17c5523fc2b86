"""What may be used: a rig or a file size, and how the model will be run on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import date
from typing import Any, Final

from quantmix.errors import UsageError
from quantmix.memory.plan import DESKTOP_BYTES
from quantmix.memory.settings import NEWEST_BUILD, OLDEST_BUILD, Settings
from quantmix.rig.device import Rig
from quantmix.units import GIB, gib, pad, parse_bpw, parse_memory, parse_size

ANY_VRAM_BYTES: Final = 1 << 50
"""An ideal device that no model is too large for."""

_INT32_MAX: Final = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Budget:
    """A budget: exactly one of a rig, a file size or bits per weight, with the launch settings.

    Attributes:
        label: short text for names and titles (`192G`, `2xrtx-pro-6000`).
        rig: devices, or None for a bare file size.
        file_bytes: cap on the file. bpw: cap on bits per weight over all tensors.
    """

    label: str
    settings: Settings
    rig: Rig | None = None
    file_bytes: int | None = None
    bpw: float | None = None

    @classmethod
    def from_vram(
        cls,
        size: str | int,
        *,
        reserve: str | None = None,
        desktop: bool = False,
        **settings: Any,
    ) -> Budget:
        """One idealised device of exactly that many bytes (`--vram`)."""
        from quantmix.rig.rigs import ideal_rig

        n_bytes = parse_memory(size, "--vram") if isinstance(size, str) else size
        label = size.strip() if isinstance(size, str) else f"{n_bytes}B"
        rig = with_ram(ideal_rig(n_bytes), None, None, reserve, desktop)
        return cls(label, make_settings(**settings), rig=rig)

    @classmethod
    def from_gpus(
        cls,
        gpus: str,
        *,
        ram: str | None = None,
        ram_reserve: str | None = None,
        reserve: str | None = None,
        desktop: bool = False,
        cpu: str | None = None,
        cpu_cores: int | None = None,
        **settings: Any,
    ) -> Budget:
        """Cards by name or size (`2xrtx-5090,2x24G`), in CUDA order, with RAM behind them."""
        from quantmix.rig.rigs import parse_gpus

        rig = with_ram(parse_gpus(gpus), ram, ram_reserve, reserve, desktop)
        rig = with_cpu(rig, cpu, cpu_cores)
        cards = gpus.replace(",", "+").replace(" ", "") if rig.gpus else "cpu"
        label = cards + (f"-{ram.strip()}" if ram else "")
        return cls(label, make_settings(**settings), rig=rig)

    @classmethod
    def from_rig(
        cls,
        name: str,
        *,
        ram: str | None = None,
        ram_reserve: str | None = None,
        reserve: str | None = None,
        desktop: bool = False,
        cpu: str | None = None,
        cpu_cores: int | None = None,
        **settings: Any,
    ) -> Budget:
        """A rig of the field by name, or one described in a TOML file."""
        from quantmix.rig.rigs import load_rig

        rig = with_ram(load_rig(name), ram, ram_reserve, reserve, desktop)
        rig = with_cpu(rig, cpu, cpu_cores)
        return cls(rig.name or name, make_settings(**settings), rig=rig)

    @classmethod
    def from_size(cls, size: str, **settings: Any) -> Budget:
        """A file of a given size (`240G`) or density (`3.5bpw`), no device model."""
        made = make_settings(**settings)
        bpw = parse_bpw(size, "--size")
        if bpw is not None:
            return cls("".join(size.lower().split()), made, bpw=bpw)
        return cls(size.strip(), made, file_bytes=parse_memory(size, "--size"))


def make_settings(engine: str = "ik", build: str | None = None, **values: Any) -> Settings:
    """Return checked launch settings; the context is padded to 256 as the engines do.

    Raises:
        UsageError: a value makes no sense.
    """
    if engine not in NEWEST_BUILD:
        raise UsageError(f"unknown engine {engine!r}: one of {', '.join(NEWEST_BUILD)}")
    known = {k: v for k, v in values.items() if v is not None}
    settings = Settings(engine=engine, build=build or NEWEST_BUILD[engine], **known)
    _check_numbers(settings)
    if known.get("batch", settings.ubatch) < settings.ubatch:
        raise UsageError(
            f"--batch {settings.batch} is smaller than --ubatch {settings.ubatch}, and the engines "
            f"use the smaller: write --batch {settings.ubatch}, or leave it out"
        )
    _check_build(settings)
    _check_cache_types(settings)
    return replace(
        settings,
        ctx=pad(settings.ctx, 256),
        batch=max(settings.batch, settings.ubatch),
    )


def _check_build(settings: Settings) -> None:
    """Refuse what is no date, and dates of which nothing can be known."""
    flag = f"--engine-build {settings.build[:40]!r}"
    try:
        wrong = date.fromisoformat(settings.build).isoformat() != settings.build
    except ValueError:
        wrong = True
    newest = NEWEST_BUILD[settings.engine]
    if wrong:
        raise UsageError(f"{flag} is not a date like {newest}")
    if settings.build < OLDEST_BUILD:
        raise UsageError(
            f"{flag} is older than what is known of the engines, from {OLDEST_BUILD} on"
        )
    if settings.build > max(newest, date.today().isoformat()):
        raise UsageError(
            f"{flag} is in the future: leave it out for the newest known build, {newest}"
        )


def _check_numbers(settings: Settings) -> None:
    """Refuse numbers that no budget can hold, such as the engines' -1 for "no limit"."""
    for flag in ("ctx", "ubatch", "batch", "parallel"):
        _check_number(flag, getattr(settings, flag), 1, "must be above zero")
    for flag, n_mib in (("amb", settings.amb), ("cram", settings.cram_mib)):
        _check_number(flag, n_mib, 0, "must not be negative: give MiB, 0 turns it off")
    if settings.mla not in (0, 1, 2, 3):
        raise UsageError(f"--mla {settings.mla} is not one of 0, 1, 2, 3")


def _check_number(flag: str, number: int, least: int, wrong: str) -> None:
    if number < least:
        raise UsageError(f"--{flag} {number} {wrong}")
    if number > _INT32_MAX:
        raise UsageError(f"--{flag} is more than the engines take, {_INT32_MAX}")


def with_ram(
    rig: Rig, ram: str | None, ram_reserve: str | None, reserve: str | None, desktop: bool
) -> Rig:
    """Return `rig` with installed RAM, reserves and a desktop's use set from flags.

    A desktop takes its share of the first GPU on top of a stated reserve, as it does of the
    automatic one.

    Raises:
        UsageError: no memory at all, or memory that CPU and GPU share counted twice.
    """
    host = rig.host
    if ram is not None:
        host = replace(host, capacity_bytes=parse_memory(ram, "--ram"))
    _check_shared(rig, host.capacity_bytes)
    gpus = rig.gpus
    if not gpus and host.capacity_bytes is None:
        raise UsageError("without GPUs there is only RAM: add --ram")
    if reserve is not None:
        each = parse_size(reserve, "--reserve")
        gpus = tuple(replace(g, reserve_bytes=each) for g in gpus)
    if desktop and gpus and gpus[0].reserve_bytes is not None:
        first = replace(gpus[0], reserve_bytes=gpus[0].reserve_bytes + DESKTOP_BYTES)
        gpus = (first, *gpus[1:])
    set_aside = rig.ram_reserve_bytes
    if ram_reserve is not None:
        set_aside = parse_size(ram_reserve, "--ram-reserve")
    return replace(
        rig, gpus=gpus, host=host, desktop=rig.desktop or desktop, ram_reserve_bytes=set_aside
    )


def _check_shared(rig: Rig, ram_bytes: int | None) -> None:
    """Refuse RAM that is the memory of the GPU as well, as on a Mac."""
    from quantmix.rig.cards import cards

    shared = [c for g in rig.gpus if (c := cards().get(g.card)) and c.kind == "uma"]
    left = sum((c.memory_gib or 0) * GIB - (c.usable_bytes or 0) for c in shared)
    if not shared or ram_bytes is None or ram_bytes <= left or len(shared) < len(rig.gpus):
        return
    card = shared[0]
    raise UsageError(
        f"--ram counts memory of {card.key} twice: CPU and GPU share its {card.memory_gib} GiB, of "
        f"which {gib(card.usable_bytes or 0)} are the GPU's: leave --ram out, or give at most "
        f"{left // GIB}G"
    )


def with_cpu(rig: Rig, cpu: str | None, cores: int | None) -> Rig:
    """Return `rig` with the memory of a known CPU platform, which the speed model needs.

    Raises:
        UnknownName: no such platform; `quantmix rigs` lists them.
        UsageError: not a number of cores.
    """
    from quantmix.rig.cards import find_card

    if cores is not None and cores <= 0:
        raise UsageError(f"--cpu-cores {cores} must be above zero")
    if cpu is None:
        return rig if cores is None else replace(rig, cpu_cores=cores)
    card = find_card(cpu, "cpu")
    host = replace(
        rig.host, card=card.key, bandwidth_gbs=card.bandwidth_gbs, efficiency=card.efficiency
    )
    return replace(rig, host=host, cpu_cores=cores or rig.cpu_cores, cpu_class=card.arch)


_CACHE_TYPES = (
    "f32",
    "f16",
    "bf16",
    "q8_0",
    "q8_KV",
    "q6_0",
    "q5_1",
    "q5_0",
    "q4_1",
    "q4_0",
    "iq4_nl",
)


def _check_cache_types(settings: Settings) -> None:
    """Refuse KV cache types that the engine does not take."""
    from quantmix.errors import UnknownName

    only_ik = ("q8_KV", "q6_0")
    known = [t for t in _CACHE_TYPES if settings.engine == "ik" or t not in only_ik]
    for flag, name in (("--ctk", settings.ctk), ("--ctv", settings.ctv)):
        if name not in known:
            raise UnknownName.of(
                f"{flag} cache type for {settings.engine}",
                name,
                known,
                f"one of {', '.join(known)}",
            )
