"""What the speed model says of a plan."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Speed:
    """Predicted tokens per second; None when the rig's bandwidth is unknown.

    Attributes:
        tg_tps, tg_low, tg_high: generating with an empty cache, and its 90 % band.
        pp_tps: reading a prompt, rough.
        tg_filled_tps: generating with `filled_tokens` in the cache.
    """

    tg_tps: float | None = None
    tg_low: float | None = None
    tg_high: float | None = None
    pp_tps: float | None = None
    tg_filled_tps: float | None = None
    filled_tokens: int | None = None

    def __str__(self) -> str:
        """Say it in one line; empty when nothing is known."""
        if self.tg_tps is None:
            return ""
        parts = [f"{self.tg_tps:.1f} t/s generating [{self.tg_low:.1f}, {self.tg_high:.1f}]"]
        if self.tg_filled_tps is not None and self.filled_tokens:
            parts.append(f"{self.tg_filled_tps:.1f} with {self.filled_tokens} tokens in the cache")
        if self.pp_tps is not None:
            parts.append(f"prompts roughly {self.pp_tps:.0f}")
        return ", ".join(parts)
