"""Seconds per token for the search and for the summary: the speed model bound to one design."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from quantmix.ggml import types as ggml
from quantmix.ggml.types import GgmlType
from quantmix.loss.model import FloatArray
from quantmix.memory.model import Placement
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.palette import Palette
from quantmix.rig.device import Rig
from quantmix.speed import model as speed
from quantmix.speed.constants import constants
from quantmix.speed.prediction import Speed

if TYPE_CHECKING:
    from quantmix.search.planner import Plan


@dataclass(frozen=True)
class Timing:
    """The speed model bound to a model, a palette and a rig.

    Attributes:
        cells: (D, T, Q) seconds per token of each tensor at each type on each device.
        kept: (D, T) the same for tensors that stay as they are in the source, 0 for the others.
        min_tps: tokens per second that must be reached, or None.
    """

    model: Model
    palette: Palette
    rig: Rig
    settings: Settings
    cells: FloatArray
    kept: FloatArray
    min_tps: float | None = None

    @property
    def wanted(self) -> float | None:
        """Seconds per token at the speed that must be reached."""
        return None if self.min_tps is None else 1.0 / self.min_tps

    def only(self, cards: Sequence[int]) -> Timing:
        """Return the timing of a rig with these GPUs only (`Rig.only`)."""
        rows = [*cards, len(self.rig.gpus)]
        return replace(self, rig=self.rig.only(cards), cells=self.cells[rows], kept=self.kept[rows])

    def allowed(self, placement: Placement) -> float | None:
        """Return the seconds per token that weights may take to reach `min_tps`."""
        wanted = self.wanted
        return None if wanted is None else wanted - self.fixed(placement)

    def fixed(self, placement: Placement) -> float:
        """Return the seconds per token that no choice of types changes, with an empty cache."""
        return speed.fixed_seconds(self.model, self.settings, self.rig, placement)

    def in_use(self, placement: Placement) -> float:
        """Return the same with as much in the cache as is usual, to compare placements by."""
        fill = speed.usual_fill(self.settings)
        return speed.fixed_seconds(self.model, self.settings, self.rig, placement, n_kv=fill)

    def waiting(self, n_blocks: int) -> FloatArray:
        """Return (n_blocks,) seconds per token that each layer's experts add by lying in RAM."""
        experts = {t.layer for t in self.model.tensors if t.loaded and t.role.endswith("_exps")}
        each = 1e-3 * constants()["oh_ms", "layer"]
        n_layer = self.model.hparams.n_layer
        return np.array([each * (i in experts and i < n_layer) for i in range(n_blocks)])

    def predict(self, plan: Plan, mix: Sequence[GgmlType | None]) -> Speed:
        """Return tokens per second of a plan with its band; unknown rigs give None."""
        return speed.predict(self.model, self.settings, self.rig, plan.placement, mix)


def of(
    model: Model, palette: Palette, rig: Rig, settings: Settings, min_tps: float | None = None
) -> Timing:
    """Return the timing of a design on a rig."""
    cells = np.asarray(speed.cell_seconds(model, palette.types, rig))
    return Timing(
        model, palette, rig, settings, cells, _kept_seconds(model, palette, rig, settings), min_tps
    )


def _kept_seconds(model: Model, palette: Palette, rig: Rig, settings: Settings) -> FloatArray:
    """Seconds per token on each device, (D, T), of tensors that stay as in the source."""
    seconds = np.zeros((len(rig.devices), len(model.tensors)))
    kept = [i for i, n in enumerate(palette.kept_bytes) if n]
    if kept:
        names = sorted({model.tensors[i].source_type for i in kept})
        each = speed.cell_seconds(model, [ggml.get(n, settings.engine) for n in names], rig)
        for i in kept:
            seconds[:, i] = each[:, i, names.index(model.tensors[i].source_type)]
    return seconds


def assumed(rig: Rig) -> str:
    """Return in words which bandwidths the times of a rig rest on without knowing them, or ''."""
    unknown = [g.name for g in rig.gpus if g.bandwidth_gbs is None]
    parts = []
    if unknown:
        parts.append(f"{speed.ASSUMED_GPU_GBS:.0f} GB/s for {', '.join(unknown)} (name the cards)")
    if rig.has_ram and rig.host.bandwidth_gbs is None:
        parts.append(f"{speed.ASSUMED_RAM_GBS:.0f} GB/s for RAM (name the CPU with --cpu)")
    return " and ".join(parts)
