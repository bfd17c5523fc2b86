"""What a backtest produces: single predictions, and pairs of mixes of one size."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """One prediction and what was measured, all in ln PPL; controls are None where not run.

    `n_known` is the number of other mixes of the model that the prediction could use.
    """

    id: str
    model: str
    bpw: float
    measured: float
    predicted: float
    low: float
    high: float
    n_known: int = 0
    bpw_only: float | None = None
    by_size: float | None = None

    @property
    def covered(self) -> bool:
        """Whether the measured value lies in the interval."""
        return self.low <= self.measured <= self.high


@dataclass(frozen=True, slots=True)
class Pair:
    """Two mixes of one model and one size: who put them in the order that was measured.

    A control that sees no difference counts half.
    """

    model: str
    ours: float
    bpw_only: float
    by_size: float
