"""What the speed model says of a plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Speed:
    """Predicted tokens per second with its band; None when the rig's bandwidth is unknown."""

    tg_tps: float | None = None
    tg_low: float | None = None
    tg_high: float | None = None
    pp_tps: float | None = None
