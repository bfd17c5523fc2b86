"""Which flags of a request mean something with which kind of budget.

What a budget cannot honour is refused here by name, so that no flag is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from quantmix.errors import UsageError

if TYPE_CHECKING:
    from quantmix.request import Request
    from quantmix.rig.device import Rig

KINDS: Final = ("vram", "gpus", "rig", "size")


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a kind of budget is, in words, and what it has that a flag may need."""

    words: str
    has: frozenset[str] = frozenset()


_ALL: Final = frozenset({"devices", "RAM", "bandwidth"})
_WITH: Final[Mapping[str, _Kind]] = {
    "vram": _Kind("--vram, one ideal device", frozenset({"devices"})),
    "gpus": _Kind("--gpus", _ALL),
    "rig": _Kind("--rig", _ALL),
    "size": _Kind("--size, a file without devices"),
    "": _Kind("--max-loss alone, which seeks one ideal device", frozenset({"devices"})),
}
_NEEDS: Final[Mapping[str, str]] = {
    "ram": "RAM",
    "ram_reserve": "RAM",
    "cpu": "RAM",
    "cpu_cores": "RAM",
    "reserve": "devices",
    "desktop": "devices",
    "min_tps": "bandwidth",
}
_MENDS: Final[Mapping[str, str]] = {
    "RAM": "use --gpus with --ram",
    "devices": "use --vram, --gpus or --rig",
    "bandwidth": "use --gpus with the names of cards, or --rig",
}


def named(request: Request) -> tuple[str, ...]:
    """Return the kinds of budget that a request names."""
    return tuple(k for k in KINDS if getattr(request, k) is not None)


def require_sense(request: Request) -> str:
    """Return the kind of budget of a request, "" for `--max-loss` alone.

    Raises:
        UsageError: no kind or several, or a flag that means nothing with this kind.
    """
    kinds = named(request)
    if len(kinds) > 1 or not (kinds or request.max_loss is not None):
        got = " and ".join(f"--{k}" for k in kinds) or "none"
        got += "; for a CPU alone, --gpus none --ram SIZE" if request.ram and not kinds else ""
        raise UsageError(
            f"give one budget, --vram SIZE, --gpus LIST, --rig NAME or --size SIZE; got {got}"
        )
    longest = request.ctx.strip().lower() == "max"
    if longest and request.max_loss is not None:
        raise UsageError(
            "--ctx max and --max-loss each leave one thing open: "
            "give --ctx N with --max-loss, or --ctx max with a budget"
        )
    kind = kinds[0] if kinds else ""
    needs = [(f, need) for f, need in _NEEDS.items() if getattr(request, f) not in (None, False)]
    needs += [("ctx max", "devices")] if longest else []
    for flag, need in needs:
        if need not in _WITH[kind].has:
            name = flag.replace("_", "-")
            raise UsageError(f"--{name} means nothing with {_WITH[kind].words}: {_MENDS[need]}")
    return kind


def require_machine(request: Request) -> None:
    """Require devices, where a file is to be placed.

    Raises:
        UsageError: none are named.
    """
    if not any((request.gpus, request.rig, request.vram)):
        raise UsageError("name the machine: --gpus LIST, --rig NAME or --vram SIZE")


def names_a_machine(request: Request) -> bool:
    """Whether a request names GPUs, as pasted flags need not.

    Raises:
        UsageError: it names none, but sets aside memory there, or tells of the RAM behind them.
    """
    if any((request.gpus, request.rig, request.vram)):
        return True
    for flag in _NEEDS:
        if getattr(request, flag) not in (None, False):
            name = flag.replace("_", "-")
            raise UsageError(
                f"--{name} means nothing where no GPU is named: add --gpus LIST or none"
            )
    return False


def require_sense_on(request: Request, rig: Rig) -> None:
    """Refuse what this very rig cannot honour, though rigs of its kind can.

    Raises:
        UsageError: RAM set aside where none is given; a share of GPUs asked of a rig without any.
    """
    if request.ram_reserve is not None and not rig.has_ram:
        raise UsageError("--ram-reserve is set aside from RAM, and none is given: add --ram")
    if request.max_loss is not None and not rig.gpus:
        raise UsageError(
            f"--max-loss seeks the least GPU memory, and rig {rig.name} has no GPU: "
            "use --gpus, or --max-loss alone"
        )
