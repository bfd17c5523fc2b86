"""MODEL + budget -> Recipe. The composition; every step is a function of another module."""

from __future__ import annotations

import math
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from quantmix.assemble import assemble, device_use, header_allowance
from quantmix.budget import Budget
from quantmix.emit.flags import offload
from quantmix.errors import CheckFailed, InfeasibleBudget, UsageError
from quantmix.loss.model import LossModel
from quantmix.loss.quality import Quality
from quantmix.memory.head import EMBEDDING
from quantmix.memory.homes import planned
from quantmix.memory.model import HOST, Placement
from quantmix.models.model import Model
from quantmix.mtp import with_mtp
from quantmix.palette import Palette, TypeLimits, build, require_types
from quantmix.recipe import (
    DeviceUse,
    Optimality,
    PlannedTensor,
    Recipe,
)
from quantmix.rig import machine
from quantmix.rig.device import Rig
from quantmix.search.base import Goals
from quantmix.search.filesize import plan_in_file
from quantmix.search.planner import Plan, Shortage, plan_on_rig, price_per_gib
from quantmix.solve.problem import Problem, Solution
from quantmix.speed.prediction import Speed
from quantmix.units import GIB

if TYPE_CHECKING:
    from quantmix.memory.settings import Settings
    from quantmix.store import Measurement


_NO_DAMAGE = 1e-15  # nats


@dataclass(frozen=True, slots=True)
class Options:
    """What a design may use and what it aims for, besides the budget."""

    limits: TypeLimits = field(default_factory=TypeLimits)
    goals: Goals = field(default_factory=Goals)
    measurements: Path | None = None
    own: tuple[Measurement, ...] = ()
    min_tps: float | None = None
    name: str = ""


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
    if budget.rig is None:
        return _for_file(model, budget, options, loss, palette)
    return _for_rig(model, budget, budget.rig, options, loss, palette, explained)


def _require_speed_known(budget: Budget, options: Options) -> None:
    """Refuse a speed to reach on what has no speed.

    Raises:
        UsageError: a bare file, or one idealised device.
    """
    if options.min_tps is None or (budget.rig is not None and not budget.rig.ideal):
        return
    what = "a file" if budget.rig is None else "an idealised device"
    raise UsageError(
        f"--min-tps {options.min_tps:g} cannot be judged: {budget.label} is {what} without a "
        "speed; name the machine with --gpus (and --ram, --cpu) or --rig"
    )


def _for_rig(
    model: Model,
    budget: Budget,
    rig: Rig,
    options: Options,
    loss: LossModel,
    palette: Palette,
    explained: bool,
) -> Design:
    from quantmix.search import timing

    times = timing.of(model, palette, rig, budget.settings, options.min_tps)
    plan = plan_on_rig(model, palette, rig, budget.settings, times, options.goals)
    if isinstance(plan, Shortage):
        if not explained:
            raise InfeasibleBudget(f"{model.id} does not fit {budget.label}")
        from quantmix.feasible import explain

        raise InfeasibleBudget(explain(model, budget, options, palette, plan))
    mix = palette.mix(plan.columns)
    devices = _devices(model, rig, plan, palette.sizes(plan.columns))
    speed = times.predict(plan, mix)
    return _assemble(
        model,
        budget,
        options,
        loss,
        palette,
        _Answer(
            plan.columns,
            plan.homes,
            plan.stage1,
            plan.problem,
            plan.constraints,
            plan.cpu_expert_bytes,
            plan.least_damage,
            plan.lower_bound,
            options.goals.limits.gap,
        ),
        devices,
        speed,
        plan.placement,
    )


def _for_file(
    model: Model, budget: Budget, options: Options, loss: LossModel, palette: Palette
) -> Design:
    if budget.bpw is not None:
        capacity = math.floor(budget.bpw * model.n_elements / 8)
    else:
        assert budget.file_bytes is not None
        capacity = budget.file_bytes - header_allowance(model)
    by_file = budget.bpw is None
    found = plan_in_file(model, palette, capacity, options.goals, padded=by_file)
    if isinstance(found, Shortage):
        need = capacity + found.missing_bytes["file"]
        floor = (
            f"{8 * need / model.n_elements + 5e-4:.3f}bpw"
            if budget.bpw is not None
            else f"{(need + header_allowance(model)) / GIB + 5e-3:.2f}G"
        )
        raise InfeasibleBudget(
            f"{model.id} cannot be made as small as {budget.label}: "
            f"the smallest that works is --size {floor}"
        )
    columns, solution, problem = found
    homes = np.full(len(model.tensors), HOST, dtype=np.int64)
    answer = _Answer(columns, homes, solution, problem, problem.constraints)
    return _assemble(model, budget, options, loss, palette, answer, (), Speed(), None)


@dataclass(frozen=True)
class _Answer:
    """What the search decided, in the form that the recipe is built from.

    `least_damage` and `lower_bound` are of stage 1 over all placements, where those were searched.
    """

    columns: NDArray[np.int64]
    homes: NDArray[np.int64]
    solution: Solution
    problem: Problem
    constraints: tuple[str, ...]
    cpu_expert_bytes: int = 0
    least_damage: float | None = None
    lower_bound: float | None = None
    enough_gap: float = 0.0


def _assemble(
    model: Model,
    budget: Budget,
    options: Options,
    loss: LossModel,
    palette: Palette,
    answer: _Answer,
    devices: tuple[DeviceUse, ...],
    speed: Speed,
    placement: Placement | None,
) -> Design:
    """Write down the answer as a recipe."""
    settings = budget.settings
    mix = palette.mix(answer.columns)
    sizes = palette.sizes(answer.columns)
    tensors = _planned(model, budget.rig, palette, answer, sizes)
    quality = loss.quality(model, mix)
    quality = replace(quality, damage=float(sum(t.damage for t in tensors)))
    quality = _warn_fallbacks(quality, palette, options)
    flags = None
    if budget.rig is not None and placement is not None:
        by_name = {t.name: t.bytes for t in tensors}
        flags = offload(model, settings, budget.rig, placement, by_name)
        _require_same_homes(model, settings, budget.rig, placement, tensors)
    recipe = assemble(
        model,
        settings,
        tensors,
        name=options.name or f"{model.id}-{slug(budget.label)}",
        budget=_told(budget, options),
        devices=devices,
        quality=quality,
        optimality=_optimality(answer, quality.damage),
        speed=speed,
        flags=flags,
        imatrix=options.limits.imatrix,
    )
    return Design(
        recipe,
        answer.problem,
        answer.solution,
        palette,
        placement,
        budget.rig,
        answer.cpu_expert_bytes,
    )


def _require_same_homes(
    model: Model,
    settings: Settings,
    rig: Rig,
    placement: Placement,
    tensors: tuple[PlannedTensor, ...],
) -> None:
    """Require that every tensor's bytes were counted where the flags put it.

    Raises:
        CheckFailed: names the first tensor that differs.
    """
    wanted = planned(model, placement, rig, mtp=settings.mtp)
    for t in tensors:
        device = wanted.get(t.name, t.device)
        if device != t.device:
            raise CheckFailed(f"{t.name} was counted on {t.device}, the flags put it on {device}")


def _planned(
    model: Model, rig: Rig | None, palette: Palette, answer: _Answer, sizes: NDArray[np.int64]
) -> tuple[PlannedTensor, ...]:
    names = [d.name for d in rig.devices] if rig else ["file"]
    planned = []
    for i, t in enumerate(model.tensors):
        c = int(answer.columns[i])
        planned.append(
            PlannedTensor(
                name=t.name,
                shape=t.shape,
                role=t.role,
                layer=t.layer,
                type=t.source_type if c < 0 else palette.types[c].name,
                bytes=int(sizes[i]),
                device=names[answer.homes[i]],
                damage=0.0 if c < 0 else float(palette.damage[i, c]),
            )
        )
    return tuple(planned)


def _devices(model: Model, rig: Rig, plan: Plan, sizes: NDArray[np.int64]) -> tuple[DeviceUse, ...]:
    """Return what every device holds; the sums must fit, whatever the search believed."""
    uses = []
    for d, (device, memory) in enumerate(zip(rig.devices, plan.memory, strict=True)):
        here = d if device.kind == "gpu" else HOST
        weights = sum(
            int(n)
            for t, n, home in zip(model.tensors, sizes, plan.homes, strict=True)
            if t.loaded and home == here
        )
        if memory.duplicate_embedding:
            weights += sum(
                int(n) for t, n in zip(model.tensors, sizes, strict=True) if t.name == EMBEDDING
            )
        use = device_use(device, memory, weights, plan.cpu_expert_bytes)
        over = -(use.free_bytes or 0)
        assert over <= 0, f"{device.name} is over capacity by {over} bytes: the bound was no bound"
        uses.append(use)
    return tuple(uses)


def _optimality(answer: _Answer, objective: float) -> Optimality:
    """Return the proof; stage 2, where there is one, spends of the slack, the proof is of stage 1.

    Over all placements the answer is optimal only when their bound says so.
    """
    solution = answer.solution
    status, least, bound = solution.status, solution.objective, solution.lower_bound
    holds_for = "this split of the layers" if len(answer.problem.pools) > 2 else "any mix"
    if answer.least_damage is not None and answer.lower_bound is not None:
        least, bound = answer.least_damage, answer.lower_bound
        done = least - bound <= answer.enough_gap * least + _NO_DAMAGE
        status, holds_for = "optimal" if done else "feasible", "any placement"
    least, bound = min(least, objective), min(bound, objective)
    return Optimality(
        status=status,
        objective=objective,
        lower_bound=bound,
        gap=(least - bound) / least if least > 0 else 0.0,
        constraints=answer.constraints,
        prices=price_per_gib(solution, answer.problem.pools),
        given_for_speed=objective - least if objective - least > 1e-9 * objective else 0.0,
        holds_for=holds_for,
    )


def _told(budget: Budget, options: Options) -> dict[str, Any]:
    """Return what a recipe tells of the request, for people and for `refine`, which keeps to it.

    Limits that no constraint names and that are not the usual ones, the speed that was asked for,
    and what the machine reads and computes with.
    """
    rig = budget.rig
    told: dict[str, Any] = {"label": budget.label, "ideal": bool(rig and rig.ideal)}
    limits = {"types": list(options.limits.types), "allow_slow_cpu": options.limits.allow_slow_cpu}
    unusual = {k: v for k, v in limits.items() if v}
    if unusual:
        told["limits"] = unusual
    if options.min_tps is not None:
        told["min_tps"] = options.min_tps
    if rig is not None and not rig.ideal:
        told["machine"] = machine.to_json(rig)
    return told


def _warn_fallbacks(quality: Quality, palette: Palette, options: Options) -> Quality:
    """Name types outside --types that stand in on rows too short for them."""
    if not options.limits.types or not palette.fallbacks:
        return quality
    text = f"fallback on short rows: {', '.join(palette.fallbacks)} (not in --types)"
    return replace(quality, warnings=(*quality.warnings, text))


def slug(label: str) -> str:
    """Return a label as part of a recipe's name: letters, digits and . _ + - only."""
    return "".join(c if c.isalnum() or c in "._+-" else "-" for c in label)


class _CallableModule(ModuleType):
    """Lets `quantmix.design(...)` be the function although `quantmix.design` is also this module.

    Importing a submodule binds its name in the package, over any function of the same name; the
    public call (CONTRACT §3) and the module's name (DESIGN §2) are both promised.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Recipe:
        return design(*args, **kwargs)


sys.modules[__name__].__class__ = _CallableModule
