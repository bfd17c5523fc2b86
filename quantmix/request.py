"""A design as it is asked for on the command line or in a pipeline, and its fulfilment."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmix import budget_flags
from quantmix.budget import ANY_VRAM_BYTES, Budget
from quantmix.design import Design, run
from quantmix.emit.folder import write_folder
from quantmix.engine.ghost import CheckResult, dry_run
from quantmix.errors import CheckFailed, EngineError, UsageError
from quantmix.files import require_name, write_text
from quantmix.flag_texts import parse_ctx, parse_percent, type_limits
from quantmix.loss.model import LossModel
from quantmix.models import trained
from quantmix.models.model import Model
from quantmix.options import Options, require_speed
from quantmix.recipe import Recipe
from quantmix.search.base import Goals
from quantmix.solve.solver import Limits
from quantmix.units import gib

if TYPE_CHECKING:
    from quantmix.store import Measurement

_DEFAULT_UBATCH = 512
PROFILES = {"generate": 512, "prompt": 4096}
"""ubatch per profile: speed-model §3, prompt speed grows nearly linearly up to 4096."""


@dataclass(frozen=True, slots=True)
class Request:
    """The flags of `quantmix design`, as text where the command line has text."""

    model: str
    vram: str | None = None
    gpus: str | None = None
    rig: str | None = None
    size: str | None = None
    ram: str | None = None
    ram_reserve: str | None = None
    reserve: str | None = None
    desktop: bool = False
    cpu: str | None = None
    cpu_cores: int | None = None
    engine: str = "ik"
    engine_build: str | None = None
    ctx: str = "32768"
    ctk: str = "f16"
    ctv: str | None = None
    ubatch: int | None = None
    batch: int | None = None
    profile: str | None = None
    parallel: int = 1
    mla: int = 3
    amb: int = 256
    nkvo: bool = False
    mtp: bool = False
    cram: int = 0
    types: str | None = None
    pin: Sequence[str] | None = None
    floor: Sequence[str] | None = None
    no_imatrix: bool = False
    allow_slow_cpu: bool = False
    max_loss: str | None = None
    min_tps: float | None = None
    quality_slack: float | None = None
    measurements: Path | None = None
    own: bool = False
    layout: str | None = None
    out: Path = Path("recipes")
    name: str | None = None
    no_check: bool = False
    time_limit: float | None = None
    dump_problem: Path | None = None


@dataclass(frozen=True)
class Answer:
    """A fulfilled request: the design, its check, where it was written, how long it took."""

    design: Design
    model: Model
    check: CheckResult | None
    folder: Path
    seconds: float
    solve_seconds: float
    notes: tuple[str, ...] = ()

    @property
    def published(self) -> list[dict[str, Any]]:
        """Published mixes of this model nearest in size: label, size, measured PPL, source."""
        from quantmix.loss.evidence import nearest

        rows = nearest(self.model, self.recipe.size.tensor_bytes)
        return [
            {"label": p.label, "bpw": round(bits, 4), "ppl": p.ppl, "source": p.source}
            for p, bits in rows
        ]

    @property
    def recipe(self) -> Recipe:
        """The recipe that was written."""
        return self.design.recipe

    def to_json(self) -> dict[str, Any]:
        """Return the JSON of `design` (docs/interface.md, design)."""
        doc = self.recipe.to_json()
        del doc["tensors"]
        doc["optimality"]["seconds"] = round(self.solve_seconds, 4)
        doc["seconds"] = round(self.seconds, 4)
        doc["recipe"] = str(self.folder)
        doc["notes"] = list(self.notes)
        doc["published"] = self.published
        return doc


def fulfil(
    request: Request,
    *,
    model: Model | None = None,
    loss: LossModel | None = None,
    db: str | Path | None = None,
) -> Answer:
    """Design, write, and have the engine walk the recipe.

    Args:
        model, loss: what the request names, when they are loaded already: many budgets of one
            model share them.

    Raises:
        UsageError: flags that make no sense together.
        InfeasibleBudget: nothing fits.
        CheckFailed: the engine disagrees with the recipe; nothing is written.
    """
    from quantmix.models.sources import load_model

    started = time.perf_counter()
    model = model or load_model(request.model, layout=request.layout)
    budget, notes = budget_of(request, is_mla=model.hparams.is_mla)
    options = replace(_options(request), own=own_measurements(model, db) if request.own else ())
    before = time.perf_counter()
    budget, found, more = _answer_inverse(request, model, budget, options, loss)
    solved = time.perf_counter() - before
    recipe = found.recipe
    check: CheckResult | None = None
    if not request.no_check:
        with dry_run(recipe, model) as engine:
            _prepare_figures()
            try:
                check = engine.check(recipe, model)
            except EngineError as err:
                raise EngineError(f"{err}: {_other_ways(recipe, model)}") from err
        if not check.ok:
            raise CheckFailed(f"the check of {recipe.name} found {check.complaint}")
    recipe = replace(recipe, check=check.to_json() if check else None)
    written = write_folder(recipe, request.out / recipe.name)
    if request.dump_problem is not None:
        dump_problem(found, request.dump_problem)
    return Answer(
        design=replace(found, recipe=recipe),
        model=model,
        check=check,
        folder=written.folder,
        seconds=time.perf_counter() - started,
        solve_seconds=solved,
        notes=(
            *notes,
            *more,
            *trained.notes(model),
            *_profile_note(request, model, found),
            *_speed_note(request, found),
            *_own_note(request, model, options),
            *written.notes,
        ),
    )


def _other_ways(recipe: Recipe, model: Model) -> str:
    """What to do where an engine fails on a ghost, as on an architecture that it does not know."""
    other = "mainline" if recipe.engine.name == "ik" else "ik"
    return (
        f"if it does not know {model.arch}, use --engine {other}; "
        "--no-check writes the recipe without asking it"
    )


def _profile_note(request: Request, model: Model, found: Design) -> tuple[str, ...]:
    """Say what the ubatch of a profile costs on each GPU, against the default of 512."""
    settings = found.recipe.settings
    if request.profile is None or found.rig is None or found.placement is None:
        return ()
    if settings.ubatch == _DEFAULT_UBATCH:
        return ()
    from quantmix.memory.plan import device_memory

    largest = found.cpu_expert_bytes
    prices = []
    for ours, theirs in zip(
        device_memory(model, settings, found.rig, found.placement),
        device_memory(model, replace(settings, ubatch=_DEFAULT_UBATCH), found.rig, found.placement),
        strict=True,
    ):
        more = ours.fixed_bytes(largest) - theirs.fixed_bytes(largest)
        if more and ours.name != found.rig.host.name:
            prices.append(f"{gib(more)} on {ours.name}")
    what = f"profile {request.profile}: ubatch {settings.ubatch}"
    return (f"{what} costs {', '.join(prices)} more than {_DEFAULT_UBATCH}",) if prices else (what,)


def _speed_note(request: Request, found: Design) -> tuple[str, ...]:
    """Say on what assumed bandwidths a speed to reach was judged."""
    from quantmix.search.timing import assumed

    guess = assumed(found.rig) if request.min_tps is not None and found.rig is not None else ""
    return (f"--min-tps {request.min_tps:g} was judged with assumed {guess}",) if guess else ()


def _own_note(request: Request, model: Model, options: Options) -> tuple[str, ...]:
    """Say when --own found too little to go by."""
    from quantmix.loss.predictor import FittedModel

    if not request.own:
        return ()
    if request.measurements is not None:
        return ("--own changed nothing: --measurements goes before it",)
    if FittedModel.of_own(model, options.own, imatrix=options.limits.imatrix) is not None:
        return ()
    n = len({m.mix for m in options.own if m.ln_ratio is not None})
    return (
        "--own changed nothing: it needs three mixes of this model that were verified with --base "
        f"on the same text and chunks, and the store has {n} in all",
    )


def own_measurements(model: Model, db: str | Path | None = None) -> tuple[Measurement, ...]:
    """Return what `quantmix verify` stored of files of this model in `db` (default: QUANTMIX_DB).

    Raises:
        UsageError: the model is not a GGUF here, so its measurements cannot be told from others.
    """
    from quantmix.ggml.weights import open_weights
    from quantmix.store import Store

    if not Path(model.source).exists():
        raise UsageError(f"--own needs a GGUF file of the model: {model.id} is from {model.source}")
    fingerprint = open_weights(model.source).model_fingerprint
    with Store(db) as store:
        return tuple(store.find(model=fingerprint))


def dump_problem(found: Design, path: Path) -> None:
    """Write the knapsack of stage 1 with its bound and prices (`--dump-problem`)."""
    solution = found.solution
    document = {
        **found.problem.dump(),
        "objective": solution.objective,
        "lower_bound": solution.lower_bound,
        "prices_per_byte": dict(
            zip(found.problem.pools, (float(p) for p in solution.prices), strict=True)
        ),
        "choice": [int(j) for j in solution.choice],
    }
    write_text(path, json.dumps(document, indent=1, allow_nan=False) + "\n")


def _prepare_figures() -> None:
    """Load what draws the figures while the engine is busy."""
    from matplotlib.backends import backend_agg  # noqa: F401


def budget_of(request: Request, *, is_mla: bool) -> tuple[Budget, tuple[str, ...]]:
    """Return the budget of a request, and notes; exactly one kind must be named.

    `--max-loss` alone gets one ideal device that nothing is too large for.

    Raises:
        UsageError: none or several kinds, a flag that the kind cannot honour, or a value that
            makes no sense.
    """
    ctx = parse_ctx(request.ctx)
    profile = _profile(request.profile)
    settings: dict[str, Any] = {
        "engine": request.engine,
        "build": request.engine_build,
        "ctx": ctx if ctx is not None else 4096,
        "ctk": request.ctk,
        "ctv": request.ctv or (request.ctk if is_mla else None),
        "ubatch": profile if request.ubatch is None else request.ubatch,
        "batch": request.batch,
        "parallel": request.parallel,
        "mla": request.mla,
        "amb": request.amb,
        "nkvo": request.nkvo or None,
        "mtp": request.mtp or None,
        "cram_mib": request.cram,
    }
    kind = budget_flags.require_sense(request)
    require_speed(request.min_tps)
    set_aside: dict[str, Any] = {"reserve": request.reserve, "desktop": request.desktop}
    if kind in ("", "vram"):
        budget = Budget.from_vram(request.vram or ANY_VRAM_BYTES, **set_aside, **settings)
        return budget if kind else replace(budget, label="any device"), ()
    if kind == "size":
        assert request.size is not None
        return Budget.from_size(request.size, **settings), ()
    host: dict[str, Any] = {
        "ram": request.ram,
        "ram_reserve": request.ram_reserve,
        "cpu": request.cpu,
        "cpu_cores": request.cpu_cores,
    }
    if request.gpus is not None:
        budget = Budget.from_gpus(request.gpus, **host, **set_aside, **settings)
    else:
        assert request.rig is not None
        budget = Budget.from_rig(request.rig, **host, **set_aside, **settings)
    assert budget.rig is not None
    budget_flags.require_sense_on(request, budget.rig)
    return budget, ()


def _profile(profile: str | None) -> int | None:
    if profile is None:
        return None
    if profile not in PROFILES:
        raise UsageError(f"--profile {profile!r} is neither prompt nor generate")
    return PROFILES[profile]


def _options(request: Request) -> Options:
    limits = Limits()
    if request.time_limit is not None:
        if not request.time_limit >= 0:
            raise UsageError("--time-limit must be a number, not negative")
        limits = replace(limits, seconds=request.time_limit)
    if request.quality_slack is not None and not request.quality_slack >= 0:
        raise UsageError("--quality-slack must be a number, not negative")
    if request.name is not None:
        require_name(request.name)
    return Options(
        limits=type_limits(
            request.types,
            request.pin,
            request.floor,
            imatrix=not request.no_imatrix,
            allow_slow_cpu=request.allow_slow_cpu,
        ),
        goals=Goals(quality_slack=request.quality_slack, limits=limits),
        measurements=request.measurements,
        min_tps=request.min_tps,
        name=request.name or "",
    )


def _answer_inverse(
    request: Request, model: Model, budget: Budget, options: Options, loss: LossModel | None
) -> tuple[Budget, Design, tuple[str, ...]]:
    """Run the design, or the search that an inverse question asks for."""
    from quantmix import inverse

    if parse_ctx(request.ctx) is None:
        return inverse.longest_context(model, budget, options, loss)
    if request.max_loss is not None:
        share = parse_percent(request.max_loss)
        return inverse.smallest_budget(model, budget, options, share, loss)
    return budget, run(model, budget, options, loss), ()
