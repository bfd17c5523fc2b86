"""Seconds per token for the search and for the summary: the speed model bound to one design."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from quantmix.ggml import types as ggml
from quantmix.ggml.types import GgmlType
from quantmix.loss.model import FloatArray
from quantmix.memory.model import HOST, Placement
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.palette import Palette
from quantmix.recipe import Speed
from quantmix.rig.device import Rig
from quantmix.speed import model as speed

if TYPE_CHECKING:
    from quantmix.planner import Plan


@dataclass(frozen=True)
class Timing:
    """The speed model bound to a model, a palette and a rig.

    Attributes:
        cells: (D, T, Q) seconds per token of each tensor at each type on each device.
        min_tps: tokens per second that must be reached, or None.
    """

    model: Model
    palette: Palette
    rig: Rig
    settings: Settings
    cells: FloatArray
    min_tps: float | None = None

    def allowed(self, placement: Placement) -> float | None:
        """Return the seconds per token that quantized weights may take to reach `min_tps`."""
        if self.min_tps is None:
            return None
        fixed = speed.fixed_seconds(self.model, self.settings, self.rig, placement)
        return 1.0 / self.min_tps - fixed - self._kept_seconds(placement)

    def predict(self, plan: Plan, mix: Sequence[GgmlType | None]) -> Speed:
        """Return tokens per second of a plan with its band; unknown rigs give None."""
        return speed.predict(self.model, self.settings, self.rig, plan.placement, mix)

    def _kept_seconds(self, placement: Placement) -> float:
        """Seconds for tensors that stay as they are in the source."""
        kept = [i for i, n in enumerate(self.palette.kept_bytes) if n]
        if not kept:
            return 0.0
        names = sorted({self.model.tensors[i].source_type for i in kept})
        sources = [ggml.get(n, self.settings.engine) for n in names]
        each = speed.cell_seconds(self.model, sources, self.rig)
        last = len(placement.layer_device) - 1
        total = 0.0
        for i in kept:
            t = self.model.tensors[i]
            home = placement.output_device
            if t.layer is not None:
                home = placement.layer_device[min(t.layer, last)]
            total += float(each[home if home != HOST else -1, i, names.index(t.source_type)])
        return total


def of(
    model: Model, palette: Palette, rig: Rig, settings: Settings, min_tps: float | None = None
) -> Timing:
    """Return the timing of a design on a rig."""
    cells = np.asarray(speed.cell_seconds(model, palette.types, rig))
    return Timing(model, palette, rig, settings, cells, min_tps)
