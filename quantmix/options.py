"""What is asked of a design besides the budget."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantmix.palette import TypeLimits
from quantmix.search.base import Goals

if TYPE_CHECKING:
    from quantmix.store import Measurement


@dataclass(frozen=True, slots=True)
class Options:
    """What a design may use and what it aims for, besides the budget."""

    limits: TypeLimits = field(default_factory=TypeLimits)
    goals: Goals = field(default_factory=Goals)
    measurements: Path | None = None
    own: tuple[Measurement, ...] = ()
    min_tps: float | None = None
    name: str = ""
