"""What a loss model says of a mix."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Quality:
    """Predicted damage (nats) and what follows; `basis` is prior, calibrated or measured."""

    damage: float
    ln_ppl_ratio: float
    ppl: float | None
    ppl_low: float | None
    ppl_high: float | None
    ppl_base: float | None
    basis: str
    interval: float = 0.9
    warnings: tuple[str, ...] = ()
    ln_ppl_ratio_low: float | None = None
    ln_ppl_ratio_high: float | None = None
