"""MODEL + budget -> Recipe. The composition; every step is a function of another module."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, replace
from types import ModuleType
from typing import Any

import numpy as np

from quantmix.answer import Answer, Question, devices_of, recipe_of
from quantmix.assemble import header_allowance
from quantmix.budget import Budget
from quantmix.errors import InfeasibleBudget, UsageError
from quantmix.loss.model import LossModel
from quantmix.memory.model import HOST, Placement
from quantmix.models.model import Model
from quantmix.mtp import with_mtp
from quantmix.options import Options, require_speed
from quantmix.palette import Palette, build, require_types
from quantmix.recipe import Recipe
from quantmix.rig.device import Rig
from quantmix.search.filesize import plan_in_file
from quantmix.search.planner import Shortage, plan_on_rig
from quantmix.solve.problem import Problem, Solution
from quantmix.units import GIB


@dataclass(frozen=True)
class Design:
    """A recipe with what only the run that made it knows: its knapsack and its solution."""

    recipe: Recipe
    problem: Problem
    solution: Solution
    palette: Palette
    placement: Placement | None
    rig: Rig | None = None
    cpu_expert_bytes: int = 0


def design(
    model: Model, budget: Budget, *, options: Options | None = None, engine: str | None = None
) -> Recipe:
    """Return the recipe of least predicted damage that fits the budget.

    Args:
        engine: `ik` or `mainline`, at its newest build; overrides the budget's, whose other
            launch settings stay.

    Raises:
        InfeasibleBudget: nothing fits; the message names the smallest budget that works.
        UsageError: types, pins or floors that make no sense for this model; settings that the
            other engine does not take.
    """
    if engine is not None and engine != budget.settings.engine:
        from quantmix.budget import make_settings

        other = {**asdict(budget.settings), "engine": engine, "build": None}
        budget = replace(budget, settings=make_settings(**other))
    return run(model, budget, options or Options()).recipe


def run(
    model: Model,
    budget: Budget,
    options: Options,
    loss: LossModel | None = None,
    *,
    explained: bool = True,
) -> Design:
    """Design with everything that the command line wants to know besides the recipe.

    Raises:
        InfeasibleBudget, UsageError: as `design`; without `explained` the former names no budget
            that works, which takes many searches to find.
    """
    from quantmix.loss import load as load_loss

    _require_speed_known(budget, options)
    settings = budget.settings
    model = with_mtp(model, settings)
    loss = loss or load_loss(
        model,
        engine=settings.engine,
        imatrix=options.limits.imatrix,
        measurements=options.measurements,
        own=options.own,
    )
    palette = build(model, loss, settings.engine, options.limits)
    require_types(model, palette)
    question = Question(model, budget, options, loss, palette)
    answer = _on_rig(question, budget.rig, explained) if budget.rig else _in_file(question)
    return Design(
        recipe_of(question, answer),
        answer.problem,
        answer.solution,
        palette,
        answer.placement,
        budget.rig,
        answer.cpu_expert_bytes,
    )


def _require_speed_known(budget: Budget, options: Options) -> None:
    """Refuse a speed that is none, or to reach one on what has no speed.

    Raises:
        UsageError: not above zero; a bare file, or one idealised device.
    """
    require_speed(options.min_tps)
    if options.min_tps is None or (budget.rig is not None and not budget.rig.ideal):
        return
    what = "a file" if budget.rig is None else "an idealised device"
    raise UsageError(
        f"--min-tps {options.min_tps:g} cannot be judged: {budget.label} is {what} without a "
        "speed; name the machine with --gpus (and --ram, --cpu) or --rig"
    )


def _on_rig(question: Question, rig: Rig, explained: bool) -> Answer:
    """Search types and homes on devices.

    Raises:
        InfeasibleBudget: nothing fits.
    """
    from quantmix.search import timing

    model, budget, palette = question.model, question.budget, question.palette
    options = question.options
    times = timing.of(model, palette, rig, budget.settings, options.min_tps)
    plan = plan_on_rig(model, palette, rig, budget.settings, times, options.goals)
    if isinstance(plan, Shortage):
        if not explained:
            raise InfeasibleBudget(f"{model.id} does not fit {budget.label}")
        from quantmix.feasible import explain

        raise InfeasibleBudget(explain(model, budget, options, palette, plan))
    return Answer(
        columns=plan.columns,
        homes=plan.homes,
        solution=plan.stage1,
        problem=plan.problem,
        constraints=plan.constraints,
        devices=devices_of(model, rig, plan, palette.sizes(plan.columns)),
        speed=times.predict(plan, palette.mix(plan.columns)),
        placement=plan.placement,
        cpu_expert_bytes=plan.cpu_expert_bytes,
        least_damage=plan.least_damage,
        lower_bound=plan.lower_bound,
    )


def _in_file(question: Question) -> Answer:
    """Search types for a file of a given size.

    Raises:
        InfeasibleBudget: no mix is as small.
    """
    model, budget = question.model, question.budget
    by_file = budget.file_bytes is not None
    if budget.bpw is not None:
        capacity = math.floor(budget.bpw * model.n_elements / 8)
    else:
        assert budget.file_bytes is not None
        capacity = budget.file_bytes - header_allowance(model)
    found = plan_in_file(model, question.palette, capacity, question.options.goals, padded=by_file)
    if isinstance(found, Shortage):
        need = capacity + found.missing_bytes["file"]
        floor = (
            f"{(need + header_allowance(model)) / GIB + 5e-3:.2f}G"
            if by_file
            else f"{8 * need / model.n_elements + 5e-4:.3f}bpw"
        )
        raise InfeasibleBudget(
            f"{model.id} cannot be made as small as {budget.label}: "
            f"the smallest that works is --size {floor}"
        )
    columns, solution, problem = found
    homes = np.full(len(model.tensors), HOST, dtype=np.int64)
    return Answer(columns, homes, solution, problem, problem.constraints)


class _CallableModule(ModuleType):
    """Lets `quantmix.design(...)` be the function although `quantmix.design` is also this module.

    Importing a submodule binds its name in the package, over any function of the same name; the
    public call (docs/interface.md, Python) and the module of that name are both wanted.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Recipe:
        return design(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
