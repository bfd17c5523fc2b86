"""How numbers are written on a page, by kind; pages, hovers and their tests share it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from quantmix.units import GIB, gib

_MOST_LN: Final = math.log(10.0)  # beyond it a figure would only look exact


def percent(ln_ratio: float) -> str:
    """Return a ratio given as its logarithm, as a rise in percent."""
    if ln_ratio > _MOST_LN:
        return "> +999 %"
    value = 100 * math.expm1(ln_ratio)
    digits = 2 if abs(value) < 9.995 else 1 if abs(value) < 99.95 else 0
    return f"{value:+.{digits}f} %"


def _nats(value: float) -> str:
    return f"{value:.5f}" if value < 1 else f"{value:.4f}"


FORMATS: Final[dict[str, Callable[[Any], str]]] = {
    "gib": gib,
    "gib1": lambda v: f"{v / GIB:.1f}",
    "bpw": lambda v: f"{v:.3f}",
    "bpw2": lambda v: f"{v:.2f}",
    "ppl": lambda v: f"{v:.4f}",
    "rise": percent,
    "nats": _nats,
    "share": lambda v: f"{100 * v:.1f} %",
    "level": lambda v: f"{100 * v:.0f} %",
    "error": lambda v: f"{100 * v:.2f} %",
    "gap": lambda v: f"{100 * v:.4f} %",
    "tps": lambda v: f"{v:.1f}",
    "price": lambda v: f"{v:.6f}",
    "int": lambda v: f"{v:,}",
    "plain": str,
}
"""Kind → text. `rise`: ln ratio as percent; `gib1`: GiB without its unit."""


def say(value: Any, kind: str) -> str:
    """Return a value as text; a dash when there is none."""
    return "–" if value is None else FORMATS[kind](value)
