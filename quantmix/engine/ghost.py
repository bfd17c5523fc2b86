"""Prove a recipe: rules matched back, sizes, fit, and the real engine's dry run on a ghost."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmix.emit.rules import first_match, split_rule
from quantmix.errors import EngineMissing
from quantmix.ggml import types as ggml
from quantmix.models.model import Model

if TYPE_CHECKING:
    from quantmix.engine.dry_run import DryTensor
    from quantmix.engine.ik_dry_run import Running
    from quantmix.recipe import Recipe


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that does not hold, and where."""

    tensor: str
    problem: str


@dataclass(frozen=True, slots=True)
class CheckResult:
    """The outcome of a check; `engine` is None when no engine was there to ask.

    `types_differing` and `bytes_differing` count tensors for which the engine says something else
    than the recipe; `print_mismatches` those whose printed size disagrees beyond its rounding.
    """

    rules_matched_back: bool
    engine: str | None
    tensors_compared: int = 0
    types_differing: int = 0
    bytes_differing: int = 0
    print_mismatches: int = 0
    note: str = ""
    problems: tuple[Problem, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether everything that could be checked holds."""
        return not self.problems and self.rules_matched_back

    @property
    def complaint(self) -> str:
        """How many problems there are, and the first."""
        first = self.problems[0]
        where = first.tensor or "the sums"
        return f"{len(self.problems)} problems, the first at {where}: {first.problem}"

    def to_json(self) -> dict[str, Any]:
        """Return the Check of docs/interface.md."""
        doc: dict[str, Any] = {
            "ok": self.ok,
            "rules_matched_back": self.rules_matched_back,
            "engine": self.engine,
            "tensors_compared": self.tensors_compared,
            "types_differing": self.types_differing,
            "bytes_differing": self.bytes_differing,
            "print_mismatches": self.print_mismatches,
        }
        return {**doc, "note": self.note} if self.note else doc


def check(recipe: Recipe, model: Model | None = None) -> CheckResult:
    """Check a recipe with everything at hand; no engine is no failure, but is said.

    Raises:
        EngineError: the engine is there and failed.
        UnknownName: the model of the recipe is not known any more.
    """
    if model is None:
        model = model_of(recipe)
    with dry_run(recipe, model) as running:
        return running.check(recipe, model)


def model_of(recipe: Recipe) -> Model:
    """Load the model that a recipe was made for, in the recipe's layout."""
    from quantmix.models.sources import load_model

    if recipe.model.source == "catalog":
        layout = None if recipe.model.layout == "plain" else recipe.model.layout
        return load_model(recipe.model.id, layout=layout)
    return load_model(recipe.model.source)


def static_problems(recipe: Recipe, model: Model) -> tuple[Problem, ...]:
    """Return what is wrong without asking an engine: tensors, rules, sizes, fit."""
    engine = model_engine(recipe)
    planned = {t.name: t for t in recipe.tensors}
    problems = [
        Problem(t.name, "missing in the recipe") for t in model.tensors if t.name not in planned
    ]
    known = model.by_name
    problems += [Problem(n, "not a tensor of the model") for n in planned if n not in known]
    rules = [split_rule(r) for r in recipe.rules]
    from quantmix.palette import is_kept

    free = [t for t in model.tensors if t.name in planned and not is_kept(t, engine)]
    applied = first_match([t.name for t in free], rules, engine)
    for t in free:
        wanted = planned[t.name].type
        given = applied[t.name]
        written = None if given is None else ggml.resolve(given, t.name, t.shape, engine).name
        if written != wanted:
            problems.append(Problem(t.name, f"rule gives {written}, the recipe says {wanted}"))
    for p in recipe.tensors:
        size = ggml.get(p.type, engine).tensor_bytes(p.shape)
        if size != p.bytes:
            problems.append(Problem(p.name, f"{p.type} takes {size} bytes, recipe says {p.bytes}"))
    total = sum(p.bytes for p in recipe.tensors)
    if total != recipe.size.tensor_bytes:
        problems.append(Problem("", f"tensors sum to {total}, not {recipe.size.tensor_bytes}"))
    for d in recipe.devices:
        if d.capacity_bytes is not None and d.used_bytes > d.capacity_bytes:
            over = d.used_bytes - d.capacity_bytes
            problems.append(Problem("", f"{d.name} is over capacity by {over} bytes"))
    return tuple(problems)


def model_engine(recipe: Recipe) -> ggml.Engine:
    """Return the engine of a recipe as a literal."""
    return "mainline" if recipe.engine.name == "mainline" else "ik"


@dataclass(frozen=True, slots=True)
class DryCheck:
    """A dry run under way (ik), or still to be done (mainline), or impossible (`missing`)."""

    running: Running | None
    ghost: Path | None
    missing: str = ""

    def check(self, recipe: Recipe, model: Model) -> CheckResult:
        """Check what needs no engine, then wait for it and compare it tensor by tensor."""
        problems = static_problems(recipe, model)
        matched = not any(p.problem.startswith("rule") for p in problems)
        found = self._compare(recipe)
        return replace(found, rules_matched_back=matched, problems=(*problems, *found.problems))

    def _compare(self, recipe: Recipe) -> CheckResult:
        if self.missing or self.ghost is None:
            return CheckResult(True, None, note=self.missing)
        if self.running is not None:
            ik = self.running.finish()
            return _compare(recipe, ik.tensors, "llama-quantize dry-run", ik.sizes_by)
        from quantmix.engine import mainline

        rules = [split_rule(r) for r in recipe.rules]
        found = mainline.dry_run(self.ghost, rules, recipe.engine.ftype)
        how = "mainline's quantizer"
        return _compare(recipe, found.tensors, "llama_model_quantize dry-run", how)


@contextmanager
def dry_run(recipe: Recipe, model: Model) -> Iterator[DryCheck]:
    """Write a ghost of the source and start the engine's dry run on it; clean up afterwards."""
    from quantmix.models.ghost import write_ghost

    engine = model_engine(recipe)
    with tempfile.TemporaryDirectory(prefix="quantmix-", dir=_scratch()) as folder:
        ghost = Path(folder) / "ghost.gguf"
        write_ghost(ghost, model, engine=engine)
        if engine == "mainline":
            from quantmix.engine.mainline_find import find_mainline

            try:
                find_mainline("quantize")
            except EngineMissing as err:
                yield DryCheck(None, None, str(err))
                return
            yield DryCheck(None, ghost)
            return
        from quantmix.engine import ik_dry_run

        try:
            running = ik_dry_run.start(ghost, recipe.rules, recipe.engine.ftype)
        except EngineMissing as err:
            yield DryCheck(None, None, str(err))
            return
        try:
            yield DryCheck(running, ghost)
        finally:
            if running.process.poll() is None:
                running.process.kill()
                running.process.wait()


def _scratch() -> str | None:
    """Return a memory file system for the ghost when there is one: mapping its holes is faster."""
    shm = "/dev/shm"
    return shm if os.path.isdir(shm) and os.access(shm, os.W_OK) else None


def _compare(
    recipe: Recipe, tensors: Mapping[str, DryTensor], engine: str, note: str
) -> CheckResult:
    """Compare planned tensors with what the engine would write."""
    problems = []
    types = sizes = prints = compared = 0
    for p in recipe.tensors:
        t = tensors.get(p.name)
        if t is None:
            problems.append(Problem(p.name, "the engine does not know this tensor"))
            continue
        compared += 1
        if t.type != p.type:
            types += 1
            problems.append(Problem(p.name, f"the engine writes {t.type}, not {p.type}"))
        if t.bytes != p.bytes:
            sizes += 1
            problems.append(Problem(p.name, f"the engine takes {t.bytes} bytes, not {p.bytes}"))
        if not t.print_agrees:
            prints += 1
            problems.append(
                Problem(p.name, f"the engine prints {t.printed_mib} MiB for {t.bytes} bytes")
            )
    known = {p.name for p in recipe.tensors}
    problems += [Problem(n, "only the engine knows this tensor") for n in tensors if n not in known]
    return CheckResult(
        True, engine, compared, types, sizes, prints, f"sizes by {note}", tuple(problems)
    )
