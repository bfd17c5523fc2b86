"""Predicted perplexity against size: every Pareto point of a model from one sweep of the price.

A sweep answers any number of sizes; a design per size would solve the same knapsack again and
again. Sizes are bytes of tensors in the file, without a device model; what one device of the
smallest sufficient memory must have is said beside them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from quantmix.assemble import header_allowance
from quantmix.errors import InfeasibleBudget, UsageError
from quantmix.ggml.header import DEFAULT_ALIGNMENT
from quantmix.loss.evidence import Published, of_model
from quantmix.loss.model import LossModel
from quantmix.loss.quality import Quality
from quantmix.memory.head import is_tied
from quantmix.memory.kv import n_blocks
from quantmix.memory.model import Placement
from quantmix.memory.plan import device_memory
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.palette import Palette, TypeLimits
from quantmix.search.choices import Choices
from quantmix.search.filesize import choices_in_file, file_use
from quantmix.solve.frontier import Hull, knee
from quantmix.solve.problem import IntArray
from quantmix.units import GIB, gib, pad, parse_bpw, parse_size

DEFAULT_POINTS = 40
_WORST_NATS = 0.7  # perplexity doubled: below such sizes a model is of no use


@dataclass(frozen=True, slots=True)
class Point:
    """One mix on the frontier, or the best one found below a given size.

    Attributes:
        tensor_bytes, file_bytes, bpw: as in a recipe.
        vram_bytes: the memory of one device that holds it with cache and buffers; the input
            embedding stays in RAM.
        price: damage saved per further GiB, nats; 0 at the end.
        lower_bound: damage that no mix of this size undercuts.
        types: bytes by type.
    """

    tensor_bytes: int
    file_bytes: int
    bpw: float
    vram_bytes: int
    quality: Quality
    price: float
    lower_bound: float
    types: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        q = asdict(self.quality)
        keys = ("damage", "ln_ppl_ratio", "ln_ppl_ratio_low", "ln_ppl_ratio_high")
        return {
            "tensor_bytes": self.tensor_bytes,
            "file_bytes": self.file_bytes,
            "bpw": self.bpw,
            "vram_bytes": self.vram_bytes,
            **{k: q[k] for k in (*keys, "ppl", "ppl_low", "ppl_high")},
            "warnings": list(self.quality.warnings),
            "price_per_gib": self.price,
            "lower_bound": self.lower_bound,
            "types": self.types,
        }


@dataclass(frozen=True, slots=True)
class Mark:
    """A published mix of the model with its size and, when the base is known, its rise.

    `predicted_here` is what the frontier promises at that size; None below its start.
    """

    row: Published
    tensor_bytes: int
    ln_ppl_ratio: float | None
    predicted_here: Point | None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        here = self.predicted_here
        return {
            "label": self.row.label,
            "tensor_bytes": self.tensor_bytes,
            "bpw": self.row.bpw,
            "ppl": self.row.ppl,
            "ln_ppl_ratio": self.ln_ppl_ratio,
            "source": self.row.source,
            "frontier_there": None
            if here is None
            else {
                "ln_ppl_ratio": here.quality.ln_ppl_ratio,
                "ppl": here.quality.ppl,
                "ppl_low": here.quality.ppl_low,
                "ppl_high": here.quality.ppl_high,
            },
        }


@dataclass(frozen=True)
class Sweep:
    """A model's knapsack swept over all prices; answers any size at once."""

    model: Model
    palette: Palette
    choices: Choices
    hull: Hull
    loss: LossModel
    settings: Settings
    fixed_bytes: int

    @property
    def smallest_bytes(self) -> int:
        """Bytes of the smallest mix."""
        return int(self.hull.used[0])

    @property
    def largest_bytes(self) -> int:
        """Bytes of the mix of least damage."""
        return int(self.hull.used[-1])

    @property
    def useful_bytes(self) -> int:
        """Bytes of the smallest mix that may still make sense, where a curve starts by default."""
        useful = np.nonzero(self.hull.total <= _WORST_NATS)[0]
        return int(self.hull.used[useful[0]]) if len(useful) else self.smallest_bytes

    def on_hull(self, step: int) -> Point:
        """Return the Pareto point after `step` steps: proven best for its size."""
        total = float(self.hull.total[step])
        return self._point(self.hull.choice(step), step, total)

    def at(self, tensor_bytes: int) -> Point | None:
        """Return the best mix found of at most that many bytes, None below the smallest."""
        choice = self.hull.filled(tensor_bytes)
        step = self.hull.last_below(tensor_bytes)
        if choice is None or step is None:
            return None
        return self._point(choice, step, self.hull.bound(tensor_bytes))

    def _point(self, choice: IntArray, step: int, bound: float) -> Point:
        columns, _ = self.choices.mix(choice)
        sizes = self.palette.sizes(columns)
        types: dict[str, int] = defaultdict(int)
        padded = sum(pad(int(n), DEFAULT_ALIGNMENT) for n in sizes)
        mix = self.palette.mix(columns)
        vram = self.fixed_bytes
        tied = is_tied(self.model)
        for t, qtype, n in zip(self.model.tensors, mix, sizes, strict=True):
            types[t.source_type if qtype is None else qtype.name] += int(n)
            if t.loaded and (t.role != "token_embd" or tied):
                vram += int(n)
        total = int(sizes.sum())
        quality = self.loss.quality(self.model, mix)
        price = float(self.hull.price[step]) * GIB if step < len(self.hull.price) else 0.0
        return Point(
            tensor_bytes=total,
            file_bytes=padded + header_allowance(self.model),
            bpw=8 * total / self.model.n_elements,
            vram_bytes=vram,
            quality=quality,
            price=price,
            lower_bound=min(bound, quality.damage),
            types=dict(sorted(types.items(), key=lambda kv: (-kv[1], kv[0]))),
        )


@dataclass(frozen=True)
class Frontier:
    """The Pareto curve over a range of sizes.

    Attributes:
        points: ascending in size. knee: index of the point farthest below the chord of the
            shown range, in predicted rise against bytes.
        published: mixes that others measured, those in the range and those outside.
        unplaced: labels of those whose size nobody stated.
    """

    sweep: Sweep
    points: tuple[Point, ...]
    knee: int
    published: tuple[Mark, ...]
    unplaced: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the document of `frontier --json`."""
        model, settings = self.sweep.model, self.sweep.settings
        first = self.points[0].quality
        return {
            "model": {
                "id": model.id,
                "arch": model.arch,
                "layout": model.layout,
                "n_tensors": len(model.tensors),
                "n_elements": model.n_elements,
                "source": model.source,
            },
            "engine": {"name": settings.engine, "build": settings.build},
            "settings": {"ctx": settings.ctx, "ctk": settings.ctk, "ctv": settings.ctv},
            "basis": first.basis,
            "interval": first.interval,
            "ppl_base": first.ppl_base,
            "smallest_bytes": self.sweep.smallest_bytes,
            "largest_bytes": self.sweep.largest_bytes,
            "steps": len(self.sweep.hull.price),
            "constraints": list(self.sweep.palette.constraints),
            "knee": self.knee,
            "points": [p.to_json() for p in self.points],
            "published": [m.to_json() for m in self.published],
            "published_without_size": list(self.unplaced),
        }


def sweep(
    model: Model,
    settings: Settings | None = None,
    *,
    limits: TypeLimits | None = None,
    measurements: Path | None = None,
    loss: LossModel | None = None,
) -> Sweep:
    """Sweep the price over the model's knapsack.

    Raises:
        UsageError: types, pins or floors that make no sense for this model.
    """
    from quantmix.budget import make_settings
    from quantmix.loss import load as load_loss
    from quantmix.palette import build, require_types

    settings = settings or make_settings()
    limits = limits or TypeLimits()
    loss = loss or load_loss(
        model, engine=settings.engine, imatrix=limits.imatrix, measurements=measurements
    )
    palette = build(model, loss, settings.engine, limits)
    require_types(model, palette)
    choices = choices_in_file(model, palette)
    hull = Hull.of(choices.damage, file_use(choices))
    return Sweep(model, palette, choices, hull, loss, settings, _fixed_bytes(model, settings))


def frontier(
    swept: Sweep,
    low_bytes: int | None = None,
    high_bytes: int | None = None,
    n_points: int = DEFAULT_POINTS,
) -> Frontier:
    """Return up to `n_points` Pareto points between two sizes, with what others published.

    Without `low_bytes` the curve starts where damage falls below 0.7 nats.

    Raises:
        InfeasibleBudget: the range ends below the smallest mix.
        UsageError: an empty range, or too few points.
    """
    if n_points < 2:
        raise UsageError("a frontier needs at least 2 points")
    high = high_bytes if high_bytes is not None else swept.largest_bytes
    low = low_bytes if low_bytes is not None else min(swept.useful_bytes, high)
    if low > high:
        raise UsageError(f"--from {gib(low)} lies above --to {gib(high)}: swap them")
    if high < swept.smallest_bytes:
        raise InfeasibleBudget(
            f"{swept.model.id} cannot be made as small as {gib(high)}: "
            f"the smallest mix has {gib(swept.smallest_bytes)}"
        )
    low = min(low, swept.largest_bytes)
    steps = swept.hull.spread(low, high, n_points)
    if not steps:  # between two neighbouring points: show the lower one
        steps = [swept.hull.last_below(high) or 0]
    points = tuple(swept.on_hull(s) for s in steps)
    sizes = np.array([float(p.tensor_bytes) for p in points])
    rises = np.array([p.quality.ln_ppl_ratio for p in points])
    marks, unplaced = _published(swept)
    return Frontier(swept, points, knee(sizes, rises), marks, unplaced)


def parse_bound(text: str | None, flag: str, model: Model) -> int | None:
    """Return the bytes of `130G` or `2.5bpw` (over all tensors of the model); None stays None.

    Raises:
        UsageError: it is neither.
    """
    if text is None:
        return None
    bpw = parse_bpw(text, flag)
    if bpw is not None:
        return math.floor(bpw * model.n_elements / 8)
    return parse_size(text, flag)


def _fixed_bytes(model: Model, settings: Settings) -> int:
    """Return what one device holds besides weights: cache, tensors built at load, buffers."""
    from quantmix.budget import ANY_VRAM_BYTES
    from quantmix.rig.rigs import ideal_rig

    rig, everything = ideal_rig(ANY_VRAM_BYTES), Placement((0,) * n_blocks(model), 0)
    return device_memory(model, settings, rig, everything)[0].fixed_bytes()


def _published(swept: Sweep) -> tuple[tuple[Mark, ...], tuple[str, ...]]:
    """Return the published mixes of the model in order of size, and those without a size."""
    model = swept.model
    marks, unplaced = [], []
    base = swept.loss.quality(model, [None] * len(model.tensors)).ppl_base
    for row in of_model(model):
        if row.bpw:
            n_bytes = round(row.bpw * model.n_elements / 8)
        elif row.size_gib:
            n_bytes = round(row.size_gib * GIB)
        else:
            unplaced.append(row.label)
            continue
        rise = math.log(row.ppl / base) if base else None
        marks.append(Mark(row, n_bytes, rise, swept.at(n_bytes)))
    return tuple(sorted(marks, key=lambda m: (m.tensor_bytes, m.row.label))), tuple(unplaced)
