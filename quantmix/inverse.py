"""Inverse questions: how long a context fits, how little memory a quality needs."""

from __future__ import annotations

import math
from dataclasses import replace

from quantmix.budget import Budget
from quantmix.design import Design, Options, run
from quantmix.errors import InfeasibleBudget, UsageError
from quantmix.loss.model import LossModel
from quantmix.models.model import Model
from quantmix.units import GIB, gib

_CTX_STEP = 256
_TENTH = GIB // 10


def longest_context(
    model: Model, budget: Budget, options: Options, loss: LossModel | None = None
) -> tuple[Budget, Design, tuple[str, ...]]:
    """Return the design with the longest context that fits, up to what the model was trained on.

    Raises:
        InfeasibleBudget: not even 4096 fits.
        UsageError: the budget is a bare file size.
    """
    if budget.rig is None:
        raise UsageError("--ctx max needs devices: use --vram, --gpus or --rig")
    top = max(4096, model.hparams.ctx_train or 131072)

    def at(ctx: int) -> tuple[Budget, Design]:
        there = replace(budget, settings=replace(budget.settings, ctx=ctx))
        return there, run(model, there, options, loss)

    low, best = 4096, at(4096)
    steps_low, steps_high = low // _CTX_STEP, top // _CTX_STEP
    try:
        best = at(steps_high * _CTX_STEP)
        steps_low = steps_high
    except InfeasibleBudget:
        while steps_high - steps_low > 1:
            middle = (steps_low + steps_high) // 2
            try:
                best = at(middle * _CTX_STEP)
                steps_low = middle
            except InfeasibleBudget:
                steps_high = middle
    why = "all it was trained on" if steps_low * _CTX_STEP == top else "the smallest types are used"
    return *best, (f"longest context that fits: {steps_low * _CTX_STEP} ({why})",)


def smallest_budget(
    model: Model,
    budget: Budget,
    options: Options,
    max_loss: float,
    loss: LossModel | None = None,
) -> tuple[Budget, Design, tuple[str, ...]]:
    """Return the design on the smallest `--vram` whose predicted PPL rise stays below `max_loss`.

    With a rig, the answer is the least share of its GPUs' memory instead; found to a tenth of a GiB
    by bisection, since predicted damage falls with the budget.

    Raises:
        InfeasibleBudget: no budget reaches it.
    """
    allowed = math.log1p(max_loss)

    def at(tenths: int) -> tuple[Budget, Design] | None:
        there = Budget.from_vram(tenths * _TENTH)
        label = f"{tenths / 10:.1f}G"
        there = replace(there, settings=budget.settings, label=label)
        try:
            found = run(model, there, options, loss)
        except InfeasibleBudget:
            return None
        return there, found

    def good(answer: tuple[Budget, Design] | None) -> bool:
        return answer is not None and answer[1].recipe.quality.ln_ppl_ratio <= allowed

    high = math.ceil(model.n_elements * 9 / 8 / _TENTH) + 640
    best = at(high)
    if best is None or not good(best):
        raise InfeasibleBudget(
            f"no mix of {model.id} stays below {max_loss:.2%} even at {gib(high * _TENTH)}"
        )
    low = 0
    while high - low > 1:
        middle = (low + high) // 2
        answer = at(middle)
        if answer is not None and good(answer):
            best, high = answer, middle
        else:
            low = middle
    there, found = best
    note = f"smallest budget with a predicted PPL rise of at most {max_loss:.2%}: --vram"
    return there, found, (f"{note} {there.label}",)
