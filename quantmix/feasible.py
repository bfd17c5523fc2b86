"""When nothing fits: the smallest budgets that do, found by solving, and what else would help."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from quantmix.budget import Budget
from quantmix.errors import UsageError
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.options import Options
from quantmix.palette import Palette
from quantmix.rig.cards import sold_sizes, usable_of_size
from quantmix.rig.device import Rig
from quantmix.search import timing
from quantmix.search.planner import Shortage, fastest_at_all, fits_at_all, may_fit
from quantmix.search.timing import Timing
from quantmix.units import GIB, gib, round_down

_HUNDREDTH = GIB // 100
_MOST_GIB = 1 << 14

_CONFIRMATIONS = 8
_SPEED_SHARES = (1.0, 0.99, 0.98, 0.95, 0.9, 0.8)


def explain(
    model: Model, budget: Budget, options: Options, palette: Palette, shortage: Shortage
) -> str:
    """Return one line: by how much it does not fit, and the smallest budgets that work."""
    rig = budget.rig
    assert rig is not None
    if rig.ideal:
        need = (rig.gpus[0].capacity_bytes or 0) + shortage.missing_bytes.get("GPU0", 0)
        return (
            f"{model.id} does not fit {budget.label}: short by "
            f"{gib(shortage.missing_bytes.get('GPU0', 0))} at the smallest types; "
            f"the smallest that works is --vram {_up(need)}G"
        )
    judge = _Judge(model, palette, options)
    if options.min_tps is not None and not shortage.missing_bytes:
        return _too_slow(model, budget, options.min_tps, rig, judge)
    if options.min_tps is not None:
        judge = replace(judge, options=replace(options, min_tps=None))
    parts = [f"{model.id} does not fit {budget.label}"]
    ways = [_amounts(m) for m in (shortage.missing_bytes, shortage.instead) if m]
    if ways:
        parts[0] += f": short by {', or by '.join(ways)}, at the smallest types"
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
    return "; ".join(parts)


def _amounts(missing: dict[str, int]) -> str:
    """Return bytes by device in words: `GPU0 1.20 GiB, GPU1 800 MiB`."""
    return ", ".join(f"{device} {gib(n)}" for device, n in missing.items())


def _too_slow(model: Model, budget: Budget, asked: float, rig: Rig, judge: _Judge) -> str:
    """Return one line: the mix fits but not at that speed, and the speed that can be asked for."""
    reached = judge.speed(rig, budget.settings)
    mend = f" to {reached:g}, the most found to work" if reached else ""
    what = f"{model.id} fits {budget.label}, but no mix was found for {asked:g} t/s"
    parts = [f"{what}: lower --min-tps{mend}"]
    guess = timing.assumed(rig)
    if guess:
        parts.append(f"assumed: {guess}")
    easier = _relaxations(budget, rig, judge)
    if easier:
        parts.append(f"with the same rig: {' or '.join(easier)}")
    return "; ".join(parts)


@dataclass(frozen=True)
class _Judge:
    """Says whether a rig can hold the model: quickly, or by searching."""

    model: Model
    palette: Palette
    options: Options

    def may(self, rig: Rig, settings: Settings) -> bool:
        """Whether the smallest types fit, as far as closed forms and bounds can say."""
        return self._ask(may_fit, rig, settings)

    def does(self, rig: Rig, settings: Settings) -> bool:
        """Whether the search finds a mix that fits, at the speed asked for."""
        return self._ask(fits_at_all, rig, settings)

    def speed(self, rig: Rig, settings: Settings) -> float | None:
        """Return a speed that can be asked for, near the most there is; None when none is found."""
        times = timing.of(self.model, self.palette, rig, settings)
        most = fastest_at_all(self.model, self.palette, rig, settings, times)
        for share in _SPEED_SHARES:
            asked = round_down(most * share)
            options = replace(self.options, min_tps=asked)
            if asked > 0 and replace(self, options=options).does(rig, settings):
                return asked
        return None

    def _ask(
        self,
        question: Callable[[Model, Palette, Rig, Settings, Timing], bool],
        rig: Rig,
        settings: Settings,
    ) -> bool:
        times = timing.of(self.model, self.palette, rig, settings, self.options.min_tps)
        try:
            return question(self.model, self.palette, rig, settings, times)
        except UsageError:
            return False


def _smallest_gpus(rig: Rig, settings: Settings, judge: _Judge) -> str | None:
    """Return the `--gpus` line of as many equal cards with the least whole GiB each."""
    if not rig.gpus:
        return None

    def of(size_gib: int) -> Rig:
        return replace(rig, gpus=tuple(replace(g, capacity_bytes=size_gib * GIB) for g in rig.gpus))

    least = _least(of, settings, judge, 1)
    if least is None:
        return None
    line = f"--gpus {len(rig.gpus)}x{least}GiB"
    sold = next((n for n in sold_sizes() if usable_of_size(n) >= least * GIB), None)
    # A card sold as 24G shows less than 24 GiB, which reads as a contradiction otherwise.
    return line if sold is None else f"{line} (of those sold: {sold}G)"


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
    for tries in range(_CONFIRMATIONS):
        if judge.does(of(high), settings):
            break
        high += 1 if tries < _CONFIRMATIONS // 2 else max(1, high // 50)
    else:
        return None
    while high > 1 and judge.does(of(high - 1), settings):
        high -= 1
    return high


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
