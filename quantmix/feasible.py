"""When nothing fits: the smallest budgets that do, found by solving, and what else would help."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from quantmix.budget import Budget
from quantmix.least import Least
from quantmix.memory.head import head_device, host_slots
from quantmix.memory.model import Placement
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.palette import Palette
from quantmix.placement import layer_weights, split_layers
from quantmix.planner import Shortage, fits_at_all
from quantmix.rig.device import Rig
from quantmix.units import GIB, gib

if TYPE_CHECKING:
    from quantmix.design import Options

_HUNDREDTH = GIB // 100
_MOST_GIB = 1 << 14

_CONFIRMATIONS = 5


def explain(
    model: Model, budget: Budget, options: Options, palette: Palette, shortage: Shortage
) -> str:
    """Return one line: by how much it does not fit, and the smallest budgets that work."""
    rig = budget.rig
    assert rig is not None
    if rig.ideal and options.min_tps is None:
        need = (rig.gpus[0].capacity_bytes or 0) + shortage.missing_bytes.get("GPU0", 0)
        return (
            f"{model.id} does not fit {budget.label}: short by "
            f"{gib(shortage.missing_bytes.get('GPU0', 0))} at the smallest types; "
            f"the smallest that works is --vram {_up(need)}G"
        )

    judge = _Judge(model, palette, options)
    parts = [f"{model.id} does not fit {budget.label}"]
    if shortage.missing_bytes:
        short = ", ".join(f"{d} {gib(b)}" for d, b in shortage.missing_bytes.items())
        parts[0] += f": short by {short} at the smallest types"
    if options.min_tps is not None:
        parts[0] += f" at --min-tps {options.min_tps:g}"
    mends = [
        m
        for m in (
            _smallest_gpus(rig, budget.settings, judge),
            _smallest_ram(rig, budget.settings, judge),
        )
        if m
    ]
    if mends:
        parts.append("the smallest that works is " + " or ".join(mends))
    easier = _relaxations(budget, rig, judge)
    if easier:
        parts.append(f"with the same rig: {' or '.join(easier)}")
    if options.min_tps is not None and not (mends or easier):
        slower = _Judge(model, palette, replace(options, min_tps=None))
        if slower.does(rig, budget.settings):
            parts.append("it fits without that speed: lower --min-tps")
    return "; ".join(parts)


@dataclass(frozen=True)
class _Judge:
    """Says whether a rig can hold the model: quickly, or by searching."""

    model: Model
    palette: Palette
    options: Options

    def may(self, rig: Rig, settings: Settings) -> bool:
        """Whether the smallest types fit, some of the first layers wholly in RAM or GPUs unused."""
        return any(self._may(rig.only(cards), settings) for cards in rig.card_sets())

    def _may(self, rig: Rig, settings: Settings) -> bool:
        least = Least.of(self.model, self.palette)
        n = self.model.hparams.n_layer
        most = host_slots(settings, n)[-1]
        shares = (0, n // 8, n // 4, n // 2, 3 * n // 4, most) if rig.has_ram else (0,)
        weights = layer_weights(self.model, n)
        capacities = [float(g.capacity_bytes or 0) for g in rig.gpus]
        last = len(rig.gpus) - 1

        def with_leading(k: int) -> Placement:
            head = head_device(self.model, settings, k, n, last)
            return Placement(split_layers(weights, capacities, host_layers=min(k, n)), head)

        return any(
            least.spilled(rig, settings, with_leading(k)) is not None for k in dict.fromkeys(shares)
        )

    def does(self, rig: Rig, settings: Settings) -> bool:
        """Whether the search finds a mix that fits, at the speed asked for."""
        from quantmix import timing
        from quantmix.errors import UsageError

        times = timing.of(self.model, self.palette, rig, settings, self.options.min_tps)
        try:
            return fits_at_all(self.model, self.palette, rig, settings, times)
        except UsageError:
            return False


def _smallest_gpus(rig: Rig, settings: Settings, judge: _Judge) -> str | None:
    """Return the `--gpus` line of as many equal cards with the least whole GiB each."""
    if not rig.gpus:
        return None

    def of(size_gib: int) -> Rig:
        cards = tuple(replace(g, capacity_bytes=size_gib * GIB) for g in rig.gpus)
        return replace(rig, gpus=cards)

    least = _least(of, settings, judge, 1)
    return None if least is None else f"--gpus {len(rig.gpus)}x{least}GiB"


def _smallest_ram(rig: Rig, settings: Settings, judge: _Judge) -> str | None:
    """Return the least whole GiB of RAM that works behind the same GPUs."""

    def of(size_gib: int) -> Rig:
        return replace(rig, host=replace(rig.host, capacity_bytes=size_gib * GIB))

    least = _least(of, settings, judge, 8)
    return None if least is None else f"--ram {least}G"


def _least(of: Callable[[int], Rig], settings: Settings, judge: _Judge, start: int) -> int | None:
    """Return the least whole GiB that works: bisected quickly, then confirmed by the search."""
    high = start
    while not judge.may(of(high), settings):
        high *= 2
        if high > _MOST_GIB:
            return None
    low = high // 2 if high > start else 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if judge.may(of(middle), settings) else (middle, high)
    for _ in range(_CONFIRMATIONS):
        if judge.does(of(high), settings):
            return high
        high += max(1, high // 50)
    return None


def _relaxations(budget: Budget, rig: Rig, judge: _Judge) -> list[str]:
    """Return single flags that make the same rig work."""
    settings, options = budget.settings, judge.options

    def fits(some: Rig, other: Settings) -> bool:
        return judge.may(some, other) and judge.does(some, other)

    found = []
    if settings.ctk == "f16" and fits(rig, replace(settings, ctk="q8_0", ctv="q8_0")):
        found.append("--ctk q8_0 --ctv q8_0")
    smaller = settings.ctx // 4
    if smaller >= 4096 and fits(rig, replace(settings, ctx=smaller)):
        found.append(f"--ctx {smaller}")
    if rig.has_ram and not options.limits.allow_slow_cpu:
        from quantmix.loss import load
        from quantmix.palette import build

        limits = replace(options.limits, allow_slow_cpu=True)
        loss = load(judge.model, engine=settings.engine, imatrix=limits.imatrix)
        wider = build(judge.model, loss, settings.engine, limits)
        other = _Judge(judge.model, wider, replace(options, limits=limits))
        if other.may(rig, settings) and other.does(rig, settings):
            found.append("--allow-slow-cpu")
    return found


def _up(n_bytes: int) -> str:
    """Return GiB with two decimals, rounded up, so that feeding it back works."""
    return f"{math.ceil(n_bytes / _HUNDREDTH + 1e-9) / 100:.2f}"
