"""Inverse questions: how long a context fits, how little memory a quality needs."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from quantmix.budget import ANY_VRAM_BYTES, Budget
from quantmix.design import Design, run
from quantmix.errors import InfeasibleBudget, UsageError
from quantmix.loss.model import LossModel
from quantmix.models.model import Model
from quantmix.options import Options
from quantmix.rig.device import Rig
from quantmix.units import GIB, gib, parse_size

_CTX_STEP: Final = 256
_CTX_LEAST: Final = 4096
_CTX_TRAINED_UNKNOWN: Final = 131072
_MOST_BPW: Final = 33  # above f32
_MOST_SHARE: Final = 100  # times the memory of the GPUs that were named


def longest_context(
    model: Model, budget: Budget, options: Options, loss: LossModel | None = None
) -> tuple[Budget, Design, tuple[str, ...]]:
    """Return the design with the longest context that fits, up to what the model was trained on.

    Raises:
        InfeasibleBudget: not even 4096 fits, or all it was trained on where that is less.
        UsageError: the budget is a bare file size.
    """
    if budget.rig is None:
        raise UsageError("--ctx max needs devices: use --vram, --gpus or --rig")
    trained = model.hparams.ctx_train
    top = max(1, (trained or _CTX_TRAINED_UNKNOWN) // _CTX_STEP)
    low = min(_CTX_LEAST // _CTX_STEP, top)

    def at(steps: int, *, explained: bool = False) -> tuple[Budget, Design]:
        there = replace(budget, settings=replace(budget.settings, ctx=steps * _CTX_STEP))
        return there, run(model, there, options, loss, explained=explained)

    best = at(low, explained=True)
    high, middle = top + 1, top
    while high - low > 1:
        try:
            best = at(middle)
            low = middle
        except InfeasibleBudget:
            high = middle
        middle = (low + high) // 2
    why = "the smallest types are used"
    if low == top:
        why = "all it was trained on" if trained else "what it was trained on is not known"
    return *best, (f"longest context that fits: {low * _CTX_STEP} ({why})",)


def smallest_budget(
    model: Model,
    budget: Budget,
    options: Options,
    max_loss: float,
    loss: LossModel | None = None,
) -> tuple[Budget, Design, tuple[str, ...]]:
    """Return the design on the smallest part of `budget` with a PPL rise of at most `max_loss`.

    The part is of the budget's own kind: a `--vram` to a tenth of a GiB, a `--size` to a hundredth
    of a GiB or bpw, of a rig the share of its GPUs' memory to a percent, its RAM as it is. Found by
    bisection, since predicted damage falls with the budget. A rig has GPUs.

    Raises:
        InfeasibleBudget: the whole budget does not reach it; names the smallest that does.
    """
    scale = _scale(model, budget)
    search = _Search(model, options, loss, scale, math.log1p(max_loss))
    rise = f"a predicted PPL rise of at most {max_loss:.2%}"
    whole = search.at(scale.top)
    if whole is None or not search.does(whole):
        raise InfeasibleBudget(
            f"{model.id} on {budget.label} has no mix with {rise}: {search.way_out(whole)}"
        )
    there, found = search.least(0, scale.top, whole)
    return there, found, (f"smallest budget with {rise}: {scale.words(there)}",)


@dataclass(frozen=True)
class _Scale:
    """Budgets of one kind in steps of size.

    Attributes:
        top: the step of the budget that was named. most: how far beyond it to look for one that
            works.
        make: the budget of a step. words: what to call it, as a flag where there is one.
        needed: the least step in which a design still fits as it is.
    """

    top: int
    most: int
    make: Callable[[int], Budget]
    words: Callable[[Budget], str]
    needed: Callable[[Design], int]


@dataclass(frozen=True)
class _Search:
    """Looks for the least step whose predicted rise, ln of PPL over the base's, is allowed."""

    model: Model
    options: Options
    loss: LossModel | None
    scale: _Scale
    allowed: float

    def at(self, step: int) -> tuple[Budget, Design] | None:
        """Return the design at a step, None where nothing fits."""
        there = self.scale.make(step)
        try:
            return there, run(self.model, there, self.options, self.loss, explained=False)
        except InfeasibleBudget:
            return None

    def does(self, answer: tuple[Budget, Design] | None) -> bool:
        """Whether the rise is allowed."""
        return answer is not None and answer[1].recipe.quality.ln_ppl_ratio <= self.allowed

    def least(self, low: int, high: int, best: tuple[Budget, Design]) -> tuple[Budget, Design]:
        """Return the least answer above `low` up to `high`, where `best` is."""
        middle = min(high - 1, max(low + 1, self.scale.needed(best[1])))
        while high - low > 1:
            answer = self.at(middle)
            if answer is not None and self.does(answer):
                best, high = answer, middle
            else:
                low = middle
            middle = (low + high) // 2
        return best

    def way_out(self, whole: tuple[Budget, Design] | None) -> str:
        """Say what the whole budget comes to, and the smallest beyond it that works."""
        said = "nothing fits"
        if self.options.min_tps is not None:
            said += f" at --min-tps {self.options.min_tps:g}"
        if whole is not None:
            said = f"the best there has {math.expm1(whole[1].recipe.quality.ln_ppl_ratio):.2%}"
        far = self.at(self.scale.most) if self.scale.most > self.scale.top else None
        if far is None or not self.does(far):
            return f"{said}, and more memory alone does not help"
        there, _ = self.least(self.scale.top, self.scale.most, far)
        return f"{said}; the smallest that works is {self.scale.words(there)}"


def _scale(model: Model, budget: Budget) -> _Scale:
    if budget.bpw is not None:
        return _bpw_scale(budget, budget.bpw)
    if budget.file_bytes is not None:
        return _file_scale(model, budget, budget.file_bytes)
    assert budget.rig is not None
    return _vram_scale(budget, budget.rig) if budget.rig.ideal else _rig_scale(budget, budget.rig)


def _vram_scale(budget: Budget, rig: Rig) -> _Scale:
    step, capacity = GIB / 10, rig.gpus[0].capacity_bytes or 0
    top = math.ceil(capacity / step)

    def make(steps: int) -> Budget:
        if steps == top:
            return budget
        label = f"{steps / 10:.1f}G"
        gpu = replace(rig.gpus[0], capacity_bytes=parse_size(label))
        return replace(budget, label=label, rig=replace(rig, gpus=(gpu,)))

    return _Scale(
        top,
        math.ceil(ANY_VRAM_BYTES / step),
        make,
        lambda there: f"--vram {there.label}",
        lambda found: math.ceil(found.recipe.devices[0].used_bytes / step),
    )


def _file_scale(model: Model, budget: Budget, file_bytes: int) -> _Scale:
    step = GIB / 100
    top = math.ceil(file_bytes / step)

    def make(steps: int) -> Budget:
        if steps == top:
            return budget
        label = f"{steps / 100:.2f}G"
        return replace(budget, label=label, file_bytes=parse_size(label))

    return _Scale(
        top,
        top + math.ceil(model.n_elements * _MOST_BPW / 8 / step),
        make,
        lambda there: f"--size {there.label}",
        lambda found: math.ceil(found.recipe.size.file_bytes / step),
    )


def _bpw_scale(budget: Budget, bpw: float) -> _Scale:
    top = math.ceil(100 * bpw)

    def make(steps: int) -> Budget:
        label = f"{steps / 100:.2f}bpw"
        return budget if steps == top else replace(budget, label=label, bpw=steps / 100)

    return _Scale(
        top,
        100 * _MOST_BPW,
        make,
        lambda there: f"--size {there.label}",
        lambda found: math.ceil(100 * found.recipe.size.bpw),
    )


def _rig_scale(budget: Budget, rig: Rig) -> _Scale:
    def make(percent: int) -> Budget:
        if percent == 100:
            return budget
        gpus = tuple(
            replace(g, capacity_bytes=(g.capacity_bytes or 0) * percent // 100) for g in rig.gpus
        )
        label = f"{budget.label}-x{percent / 100:.2f}"
        return replace(budget, label=label, rig=replace(rig, gpus=gpus))

    def words(there: Budget) -> str:
        gpus = there.rig.gpus if there.rig else ()
        whole = sum(g.capacity_bytes or 0 for g in rig.gpus)
        percent = round(100 * sum(g.capacity_bytes or 0 for g in gpus) / whole)
        each = ", ".join(f"{g.name} {gib(g.capacity_bytes or 0)}" for g in gpus)
        return f"{percent}% of {budget.label}, {each}"

    def needed(found: Design) -> int:
        shares = [
            d.used_bytes / d.capacity_bytes for d in found.recipe.devices[:-1] if d.capacity_bytes
        ]
        capacity = [g.capacity_bytes or 0 for g in (found.rig or rig).gpus]
        percent = 100 * sum(capacity) / sum(g.capacity_bytes or 0 for g in rig.gpus)
        return math.ceil(percent * max(shares))

    return _Scale(100, 100 * _MOST_SHARE, make, words, needed)
