"""What is asked of a design besides the budget."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from quantmix.errors import UsageError
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


def require_speed(min_tps: float | None) -> None:
    """Refuse tokens per second that no mix can be asked for; None asks for none.

    Raises:
        UsageError: not a number above zero.
    """
    if min_tps is not None and not 0 < min_tps < math.inf:
        raise UsageError(f"--min-tps {min_tps:g} must be a number above zero")
