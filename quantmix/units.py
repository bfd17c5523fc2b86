"""Sizes as people write them, and back. Inside quantmix a size is always an int of bytes."""

from __future__ import annotations

import re
from typing import Final

from quantmix.errors import UsageError

KIB: Final = 1 << 10
MIB: Final = 1 << 20
GIB: Final = 1 << 30

# "192G" is what people write for what tools print as GiB; "192GB" is decimal (CONTRACT §1).
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
_SIZE: Final = re.compile(r"^\s*(\d+(?:\.\d+)?|\.\d+)\s*([A-Za-z]*)\s*$")


def parse_size(text: str, what: str = "size") -> int:
    """Return the bytes of `192G`, `192GiB` (2^30), `192GB` (10^9), `800M` or a plain number.

    Raises:
        UsageError: `text` is not a size, or is not above zero.
    """
    match = _SIZE.match(text)
    factor = _FACTORS.get(match.group(2).lower()) if match else None
    if match is None or factor is None:
        raise UsageError(
            f"{what} {text!r} is not a size: write it like 192G, 192GiB, 192GB or 800M"
        )
    n_bytes = (
        int(float(match.group(1)) * factor)
        if "." in match.group(1)
        else int(match.group(1)) * factor
    )
    if n_bytes <= 0:
        raise UsageError(f"{what} {text!r} must be above zero")
    return n_bytes


def gib(n_bytes: float, digits: int = 2) -> str:
    """Return `n_bytes` as text in GiB, or in MiB when below one GiB."""
    if abs(n_bytes) < GIB:
        return (
            f"{n_bytes / MIB:.0f} MiB"
            if abs(n_bytes) >= MIB or n_bytes == 0
            else f"{n_bytes:.0f} B"
        )
    return f"{n_bytes / GIB:.{digits}f} GiB"


def pad(n: int, multiple: int) -> int:
    """Return `n` rounded up to a multiple of `multiple`."""
    return -(-n // multiple) * multiple
