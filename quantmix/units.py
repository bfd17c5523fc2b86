"""Sizes and lists of numbers as people write them. Inside quantmix a size is an int of bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Final

from quantmix.errors import UsageError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

# "192G" is what people write for what tools print as GiB; "192GB" is decimal (docs/interface.md).
_FACTORS: Final = {
    "": 1,
    "b": 1,
    "k": KIB,
    "kib": KIB,
    "kb": 10**3,
    "m": MIB,
    "mib": MIB,
    "mb": 10**6,
    "g": GIB,
    "gib": GIB,
    "gb": 10**9,
    "t": 1 << 40,
    "tib": 1 << 40,
    "tb": 10**12,
}
_SIZE: Final = re.compile(r"^\s*(\d*)(?:\.(\d+))?\s*([A-Za-z]*)\s*$")
_BPW: Final = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*bpw\s*$", re.IGNORECASE)
_MOST_BYTES: Final = 1 << 60
_MOST_BPW: Final = 1000
_DECIMALS: Final = 30  # more decide no byte


def parse_size(text: str, what: str = "size") -> int:
    """Return the bytes of `192G`, `192GiB` (2^30), `192GB` (10^9), `800M` or a plain number.

    Raises:
        UsageError: `text` is not a size, is not above zero, or is beyond any machine.
    """
    match = _SIZE.match(text)
    factor = _FACTORS.get(match.group(3).lower()) if match else None
    if match is None or factor is None or not (match.group(1) or match.group(2)):
        raise UsageError(
            f"{what} {_short(text)} is not a size: write it like 192G, 192GiB, 192GB or 800M"
        )
    whole, part = match.group(1).lstrip("0"), (match.group(2) or "")[:_DECIMALS]
    too_long = len(whole) > len(str(_MOST_BYTES))
    digits = 0 if too_long else int((whole or "0") + part)
    n_bytes: int = digits * factor // 10 ** len(part)
    if too_long or n_bytes > _MOST_BYTES:
        raise UsageError(f"{what} {_short(text)} is larger than any memory")
    if n_bytes <= 0:
        raise UsageError(f"{what} {_short(text)} must be above zero")
    return n_bytes


def parse_memory(text: str, what: str) -> int:
    """As `parse_size`, for what no machine has less of than 1 MiB: `12` lacks its unit.

    Raises:
        UsageError: as `parse_size`, or a plain number below 1 MiB.
    """
    n_bytes = parse_size(text, what)
    plain = text.strip()
    if n_bytes < MIB and plain.isdigit():
        raise UsageError(f"{what} {plain} means {plain} bytes: write {plain}G for GiB")
    return n_bytes


def parse_bpw(text: str, what: str = "size") -> float | None:
    """Return the bits per weight of `3.5bpw`, None for a text of another form.

    Raises:
        UsageError: it ends in bpw and is no number, not above zero, or more than any type has.
    """
    match = _BPW.match(text)
    if match is None and text.strip().lower().endswith("bpw"):
        raise UsageError(f"{what} {_short(text)} is not a density: write it like 3.5bpw")
    if match is None:
        return None
    bpw = float(match.group(1))
    if not 0 < bpw <= _MOST_BPW:
        raise UsageError(f"{what} {_short(text)} must be above zero and at most {_MOST_BPW}bpw")
    return bpw


def _short(text: str) -> str:
    """Quote a text, cut where it is long."""
    return repr(text if len(text) <= 40 else text[:40] + "…")


def gib(n_bytes: float, digits: int = 2) -> str:
    """Return `n_bytes` as text in GiB, or in MiB when below one GiB."""
    if abs(n_bytes) < GIB:
        return (
            f"{n_bytes / MIB:.0f} MiB"
            if abs(n_bytes) >= MIB or n_bytes == 0
            else f"{n_bytes:.0f} B"
        )
    return f"{n_bytes / GIB:.{digits}f} GiB"


def round_down(value: float) -> float:
    """Return a value with three digits, rounded down; 0 for what is not above it."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - 2)
    return float(f"{math.floor(value / unit) * unit:.6g}")


def pad(n: int, multiple: int) -> int:
    """Return `n` rounded up to a multiple of `multiple`."""
    return -(-n // multiple) * multiple


def ranges(numbers: Iterable[int], joint: str = ", ") -> str:
    """Return `3-5, 9` for {3, 4, 5, 9}."""
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and n == parts[-1][1] + 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return joint.join(f"{a}" if a == b else f"{a}-{b}" for a, b in parts)
