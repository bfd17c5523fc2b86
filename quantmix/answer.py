"""What a search decided, and the recipe that says it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from quantmix.assemble import assemble, device_use
from quantmix.budget import Budget
from quantmix.emit.flags import offload
from quantmix.errors import CheckFailed
from quantmix.files import name_part
from quantmix.loss.model import LossModel
from quantmix.loss.quality import Quality
from quantmix.memory.head import EMBEDDING
from quantmix.memory.homes import planned
from quantmix.memory.model import HOST, Placement
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.options import Options
from quantmix.palette import Palette
from quantmix.recipe import DeviceUse, Optimality, PlannedTensor, Recipe
from quantmix.rig import machine
from quantmix.rig.device import Rig
from quantmix.search.planner import Plan, price_per_gib
from quantmix.solve.problem import Problem, Solution
from quantmix.speed.prediction import Speed

_NO_DAMAGE: Final = 1e-15  # nats


@dataclass(frozen=True)
class Question:
    """What is to be designed: the model, what it may use, and how its damage is told."""

    model: Model
    budget: Budget
    options: Options
    loss: LossModel
    palette: Palette


@dataclass(frozen=True)
class Answer:
    """What the search decided, in the form that the recipe is built from.

    Attributes:
        columns: (T,) palette column of each tensor. homes: (T,) its device.
        solution, problem: of stage 1.
        devices, speed, placement: empty for a bare file.
        cpu_expert_bytes: the largest expert tensor in RAM.
        least_damage, lower_bound: of stage 1 over all placements, where those were searched.
    """

    columns: NDArray[np.int64]
    homes: NDArray[np.int64]
    solution: Solution
    problem: Problem
    constraints: tuple[str, ...]
    devices: tuple[DeviceUse, ...] = ()
    speed: Speed = field(default_factory=Speed)
    placement: Placement | None = None
    cpu_expert_bytes: int = 0
    least_damage: float | None = None
    lower_bound: float | None = None


def recipe_of(question: Question, answer: Answer) -> Recipe:
    """Write down the answer as a recipe.

    Raises:
        CheckFailed: the flags put a tensor on another device than it was counted on.
    """
    model, budget, options = question.model, question.budget, question.options
    settings, placement = budget.settings, answer.placement
    tensors = _planned(question, answer)
    quality = question.loss.quality(model, question.palette.mix(answer.columns))
    quality = replace(quality, damage=float(sum(t.damage for t in tensors)))
    quality = _warn_fallbacks(quality, question.palette, options)
    flags = None
    if budget.rig is not None and placement is not None:
        by_name = {t.name: t.bytes for t in tensors}
        flags = offload(model, settings, budget.rig, placement, by_name)
        _require_same_homes(model, settings, budget.rig, placement, tensors)
    return assemble(
        model,
        settings,
        tensors,
        name=options.name or f"{model.id}-{name_part(budget.label)}",
        budget=_told(budget, options),
        devices=answer.devices,
        quality=quality,
        optimality=_optimality(answer, quality.damage, options.goals.limits.gap),
        speed=answer.speed,
        flags=flags,
        imatrix=options.limits.imatrix,
    )


def devices_of(
    model: Model, rig: Rig, plan: Plan, sizes: NDArray[np.int64]
) -> tuple[DeviceUse, ...]:
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


def _planned(question: Question, answer: Answer) -> tuple[PlannedTensor, ...]:
    """Return every tensor with its type, bytes, home and damage."""
    palette, rig = question.palette, question.budget.rig
    sizes = palette.sizes(answer.columns)
    names = [d.name for d in rig.devices] if rig else ["file"]
    planned = []
    for i, t in enumerate(question.model.tensors):
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


def _optimality(answer: Answer, objective: float, enough_gap: float) -> Optimality:
    """Return the proof; stage 2, where there is one, spends of the slack, the proof is of stage 1.

    Over all placements the answer is optimal only when their bound says so.
    """
    solution = answer.solution
    status, least, bound = solution.status, solution.objective, solution.lower_bound
    holds_for = "this split of the layers" if len(answer.problem.pools) > 2 else "any mix"
    if answer.least_damage is not None and answer.lower_bound is not None:
        least, bound = answer.least_damage, answer.lower_bound
        done = least - bound <= enough_gap * least + _NO_DAMAGE
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
