"""Seconds per token for the search and for the summary, whatever is known about the rig."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from quantmix.ggml.types import GgmlType
from quantmix.loss.model import FloatArray
from quantmix.models.model import Model
from quantmix.palette import Palette
from quantmix.recipe import Speed
from quantmix.rig.device import Rig
from quantmix.speed import proxy

if TYPE_CHECKING:
    from quantmix.memory.settings import Settings
    from quantmix.planner import Plan


@dataclass(frozen=True)
class Timing:
    """The speed model bound to a model, palette and rig."""

    model: Model
    rig: Rig
    settings: Settings

    def cells(self, palette: Palette) -> FloatArray:
        """Return (D, T, Q) seconds per token of each tensor at each type on each device."""
        return proxy.cell_seconds(self.model, palette.types, self.rig)

    def budget(self, min_tps: float | None) -> float | None:
        """Return the seconds per token left for weights when `min_tps` must be reached."""
        return None if min_tps is None else 1.0 / min_tps

    def predict(self, plan: Plan, mix: Sequence[GgmlType | None]) -> Speed:
        """Return tokens per second of a plan with its band; unknown rigs give None."""
        return Speed()


def of(model: Model, palette: Palette, rig: Rig, settings: Settings) -> Timing:
    """Return the timing of a rig."""
    return Timing(model, rig, settings)
