"""Which of several files to take: what fits a machine, how good it is, how fast.

Every file is placed as `offload` would place it and its quality is predicted as `predict` would,
unless its publisher measured it. The pick is the best of those that fit and are fast enough; what a
design for the same machine would be stands next to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from quantmix import predict
from quantmix.budget import Budget
from quantmix.clone import as_source
from quantmix.design import run
from quantmix.errors import InfeasibleBudget, UnknownName, UsageError
from quantmix.ggml.types import Engine
from quantmix.loss import evidence
from quantmix.loss import load as load_loss
from quantmix.loss.model import LossModel
from quantmix.loss.quality import Quality
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.offers import Offer, Offers
from quantmix.offload import OffloadPlan, needed_bytes, place, place_longest, stored
from quantmix.options import Options, require_speed
from quantmix.recipe import Recipe, Size
from quantmix.rig.device import Rig
from quantmix.units import gib, round_down


@dataclass(frozen=True)
class Judged:
    """One file on one machine.

    Attributes:
        size, quality: predicted; None where the engine does not know a type.
        plan: where it goes; None where it does not fit.
        why: what keeps it from being taken, in a few words; empty when nothing does.
        settings: as it would be launched.
    """

    offer: Offer
    size: Size | None
    quality: Quality | None
    plan: OffloadPlan | None
    settings: Settings
    why: str = ""

    @property
    def ppl(self) -> float | None:
        """What the publisher measured."""
        return self.offer.published.ppl if self.offer.published else None

    @property
    def ln_rise(self) -> float:
        """ln(PPL / PPL of the unquantized model), measured where it was, infinite if unknown."""
        base = evidence.base_ppl(self.offer.model.id)
        if self.ppl is not None and base is not None:
            return math.log(self.ppl / base)
        return self.quality.ln_ppl_ratio if self.quality else math.inf

    @property
    def tps(self) -> float | None:
        """Predicted tokens per second when generating."""
        return self.plan.speed.tg_tps if self.plan else None

    def to_json(self) -> dict[str, Any]:
        """Return the row of `choose --json`."""
        published = self.offer.published
        return {
            "name": self.offer.name,
            "source": self.offer.source,
            "size": asdict(self.size) if self.size else None,
            "quality": asdict(self.quality) if self.quality else None,
            "measured": {"ppl": published.ppl, "source": published.source} if published else None,
            "fits": self.plan is not None,
            "can_be_taken": not self.why,
            "why": self.why,
            "devices": [asdict(d) for d in self.plan.devices] if self.plan else [],
            "speed": asdict(self.plan.speed) if self.plan else None,
            "offload": {"flags": self.plan.flags.flags, "env": self.plan.flags.env}
            if self.plan
            else None,
            "ctx": self.settings.ctx,
        }


@dataclass(frozen=True)
class Choice:
    """All files judged, best first; `design` is what quantmix would make for the same machine."""

    offers: Offers
    files: tuple[Judged, ...]
    design: Recipe | None

    @property
    def pick(self) -> Judged | None:
        """The best file that can be taken."""
        return next((j for j in self.files if not j.why), None)

    def to_json(self) -> dict[str, Any]:
        """Return the document of `choose --json`."""
        model, design = self.offers.model, None
        if self.design is not None:
            doc = self.design.to_json()
            design = {k: doc[k] for k in ("size", "quality", "speed", "devices")}
        return {
            "model": {"id": model.id, "arch": model.arch},
            "files": [j.to_json() for j in self.files],
            "pick": self.pick.offer.name if self.pick else None,
            "design": design,
            "left_out": [{"name": n, "why": w} for n, w in self.offers.left_out],
        }


def choose(
    offers: Offers,
    budget: Budget,
    *,
    longest: bool = False,
    min_tps: float | None = None,
    design: bool = True,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Choice:
    """Judge every file on the devices of `budget`.

    Args:
        longest: with the longest context that fits, each its own.
        min_tps: tokens per second that the pick must reach.
        design: also design for the same machine.
        on_event: progress, `{"file": i, "of": n}`.

    Raises:
        UsageError: the budget has no devices, or no bandwidth where a speed is asked for; a speed
            that is not above zero.
    """
    require_speed(min_tps)
    rig = budget.rig
    if rig is None:
        raise UsageError("which file fits can be told of devices only: use --gpus, --rig or --vram")
    judged, known = [], _LossModels(budget.settings.engine)
    for i, offer in enumerate(offers.files, 1):
        judged.append(_judge(offer, rig, budget.settings, known, longest, min_tps))
        if on_event:
            on_event({"file": i, "of": len(offers.files)})
    judged.sort(key=_order)
    made = _design(offers, budget, min_tps) if design and not longest else None
    return Choice(offers, tuple(judged), made)


def _order(judged: Judged) -> tuple[int, float, str]:
    """Sort key: what can be taken by quality, then what is slow, then what does not fit by size."""
    name = judged.offer.name
    if judged.plan is not None:
        return int(bool(judged.why)), judged.ln_rise, name
    return 2, judged.size.tensor_bytes if judged.size else math.inf, name


def require_one(choice: Choice) -> Judged:
    """Return the pick.

    Raises:
        InfeasibleBudget: no file can be taken; names the one that misses least.
    """
    if choice.pick is not None:
        return choice.pick
    if any(j.tps for j in choice.files):
        fastest = max(choice.files, key=lambda j: j.tps or 0.0)
        least = f"the fastest, {fastest.offer.name}: {fastest.why}"
        mend = f"lower --min-tps to {round_down(fastest.tps or 0.0):g}"
    else:
        smallest = min(choice.files, key=lambda j: j.size.tensor_bytes if j.size else math.inf)
        least = f"the smallest, {smallest.offer.name}: {smallest.why}"
        mend = "give more --gpus or --ram, or a smaller --ctx"
    if choice.design is not None:
        n_bytes = choice.design.size.tensor_bytes
        mend = f"a mix of {gib(n_bytes)} would do: see `quantmix design`"
    count = len(choice.files)
    what = "the file cannot" if count == 1 else f"none of the {count} files can"
    raise InfeasibleBudget(f"{what} be taken; {least}; {mend}")


class _LossModels:
    """Loss models by what they depend on: files of one model mostly share one."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._known: dict[tuple[object, ...], LossModel] = {}

    def of(self, model: Model) -> LossModel:
        """Return the loss model of an unquantized model."""
        key = (model.id, *((t.name, t.shape) for t in model.tensors))
        if key not in self._known:
            self._known[key] = load_loss(model, engine=self._engine)
        return self._known[key]


def _judge(
    offer: Offer,
    rig: Rig,
    settings: Settings,
    known: _LossModels,
    longest: bool,
    min_tps: float | None,
) -> Judged:
    """Place one file and predict its quality."""
    base = as_source(offer.model)
    types = {t.name: t.source_type for t in offer.model.tensors if t.quantizable}
    try:
        file = stored(offer.model, settings.engine)
        found = predict.predict(
            base, types, engine=settings.engine, loss=known.of(base), foreign=True
        )
    except UnknownName as err:
        return Judged(offer, None, None, None, settings, str(err).partition(":")[0])
    judged = Judged(offer, found.size, found.quality, None, settings)
    try:
        if longest:
            settings, plan = place_longest(file, rig, settings)
        else:
            plan = place(file, rig, settings)
    except InfeasibleBudget:
        need, have = needed_bytes(file, rig, settings), rig.total_bytes
        short = f"short by about {gib(need - have)}" if need > have else "no split of it fits"
        return replace(judged, why=short)
    return replace(judged, plan=plan, settings=settings, why=_too_slow(plan, min_tps))


def _too_slow(plan: OffloadPlan, min_tps: float | None) -> str:
    """Return why a plan is not fast enough, empty when it is."""
    if min_tps is None:
        return ""
    if plan.speed.tg_tps is None:
        raise UsageError(
            f"--min-tps {min_tps:g} cannot be judged: name the cards (and --cpu, where RAM is used)"
        )
    return "" if plan.speed.tg_tps >= min_tps else "too slow"


def _design(offers: Offers, budget: Budget, min_tps: float | None) -> Recipe | None:
    """Return what quantmix would make for the same machine, None where nothing fits."""
    try:
        options = Options(min_tps=min_tps)
        return run(as_source(offers.model), budget, options, explained=False).recipe
    except InfeasibleBudget:
        return None
