"""When nothing fits: the smallest budgets that do, found by solving, and what else would help."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from quantmix.budget import Budget
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.palette import Palette
from quantmix.planner import Goals, Shortage, plan_on_rig
from quantmix.rig.device import Device, Rig
from quantmix.solve.solver import Limits
from quantmix.units import GIB, gib

if TYPE_CHECKING:
    from quantmix.design import Options

_HUNDREDTH = GIB // 100
_MOST_GIB = 1 << 14

Fits = Callable[[Rig, Settings], bool]


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

    def fits(some: Rig, settings: Settings) -> bool:
        return _fits(model, palette, options, some, settings)

    parts = [f"{model.id} does not fit {budget.label}"]
    if shortage.missing_bytes:
        short = ", ".join(f"{d} {gib(b)}" for d, b in shortage.missing_bytes.items())
        parts[0] += f": short by {short} at the smallest types"
    if options.min_tps is not None:
        parts.append(f"at --min-tps {options.min_tps:g}")
    mends = [m for m in (_smallest_gpus(rig, budget, fits), _smallest_ram(rig, budget, fits)) if m]
    if mends:
        parts.append("the smallest that works is " + " or ".join(mends))
    easier = _relaxations(model, budget, options, rig, fits)
    if easier:
        parts.append(f"with the same rig: {' or '.join(easier)}")
    return "; ".join(parts)


def _fits(model: Model, palette: Palette, options: Options, rig: Rig, settings: Settings) -> bool:
    """Whether any mix fits a rig; the search stops at the first that does."""
    from quantmix import timing
    from quantmix.errors import UsageError

    times = timing.of(model, palette, rig, settings, options.min_tps)
    goals = Goals(limits=Limits(gap=0.5, seconds=0.0))
    try:
        found = plan_on_rig(model, palette, rig, settings, times, goals)
    except UsageError:
        return False
    return not isinstance(found, Shortage)


def _smallest_gpus(rig: Rig, budget: Budget, fits: Fits) -> str | None:
    """Return the `--gpus` line of as many equal cards with the least whole GiB each."""
    n = len(rig.gpus)

    def of(size_gib: int) -> Rig:
        cards = tuple(
            Device(g.name, "gpu", size_gib * GIB, bandwidth_gbs=g.bandwidth_gbs) for g in rig.gpus
        )
        return replace(rig, gpus=cards)

    least = _least(lambda size: fits(of(size), budget.settings), 1)
    return None if least is None else f"--gpus {n}x{least}GiB"


def _smallest_ram(rig: Rig, budget: Budget, fits: Fits) -> str | None:
    """Return the least whole GiB of RAM that works behind the same GPUs."""

    def of(size_gib: int) -> Rig:
        return replace(rig, host=replace(rig.host, capacity_bytes=size_gib * GIB))

    least = _least(lambda size: fits(of(size), budget.settings), 8)
    return None if least is None else f"--ram {least}G"


def _least(works: Callable[[int], bool], start: int) -> int | None:
    """Return the least whole number at which `works` holds, by doubling and bisection."""
    high = start
    while not works(high):
        high *= 2
        if high > _MOST_GIB:
            return None
    low = high // 2 if high > start else 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high


def _relaxations(model: Model, budget: Budget, options: Options, rig: Rig, fits: Fits) -> list[str]:
    """Return single flags that make the same rig work."""
    settings = budget.settings
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
        loss = load(model, engine=settings.engine, imatrix=limits.imatrix)
        wider = build(model, loss, settings.engine, limits)
        if _fits(model, wider, replace(options, limits=limits), rig, settings):
            found.append("--allow-slow-cpu")
    return found


def _up(n_bytes: int) -> str:
    """Return GiB with two decimals, rounded up, so that feeding it back works."""
    return f"{math.ceil(n_bytes / _HUNDREDTH + 1e-9) / 100:.2f}"
