"""Safety margins: from the best estimate of a regime to the bound that "fits" rests on.

    bound = factor · estimate + add        per regime, from `margins.csv`

Refit with `python -m quantmix.memory.fit`, from the shipped logs or `--logs FILE`.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import ceil

from quantmix.memory.model import Regime
from quantmix.units import MIB


@dataclass(frozen=True, slots=True)
class Margin:
    """Margin of one regime; `regime` is `*` for those without a row of their own."""

    regime: str
    factor: float
    add_bytes: int

    def bound(self, estimate: Regime) -> Regime:
        """Return the regime with this margin on its constant and on its coefficient."""
        return Regime(
            estimate.name,
            ceil(self.factor * estimate.constant_bytes) + self.add_bytes,
            self.factor * estimate.coefficient,
        )


@cache
def margins() -> dict[str, Margin]:
    """Return the shipped margins by regime name."""
    text = (files("quantmix.memory") / "margins.csv").read_text(encoding="utf-8")
    return {
        r["regime"]: Margin(r["regime"], float(r["factor"]), round(float(r["add_mib"]) * MIB))
        for r in csv.DictReader(text.splitlines())
    }


def safe(estimates: tuple[Regime, ...]) -> tuple[Regime, ...]:
    """Return the regimes with their safety margins: upper bounds instead of best estimates."""
    table = margins()
    return tuple(table.get(r.name, table["*"]).bound(r) for r in estimates)
