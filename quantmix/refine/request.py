"""From files and flags to a refined recipe folder: prepare, measure, decide, check, write."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from quantmix import measurements
from quantmix.emit.folder import require_place, write_folder
from quantmix.engine import native
from quantmix.engine.ghost import check
from quantmix.engine.perplexity import read_corpus
from quantmix.engine.session import default_threads
from quantmix.errors import CheckFailed, EngineError, UsageError
from quantmix.files import require_creatable, require_name
from quantmix.ggml.weights import WeightsFile, open_weights
from quantmix.measure import mix_of, read_imatrix, require_float
from quantmix.recipe import Recipe, load
from quantmix.refine import outcome, results, worker
from quantmix.refine.frame import Frame
from quantmix.refine.probes import parts_of, probes_of
from quantmix.refine.results import Results
from quantmix.refine.search import Found, n_passes
from quantmix.refine.swaps import REACHES
from quantmix.refine.worker import Job

# One thread on the demo model: seconds per weight and token of a pass, per weight quantized (types
# of 2 to 6 bits, trellis types take several times as long).
_PASS_SECONDS: Final = 2.1e-11
_QUANTIZE_SECONDS: Final = 6e-7


@dataclass(frozen=True)
class Prepared:
    """A run whose files belong together and whose cost is known; nothing is measured yet.

    Attributes:
        out: folder of the refined recipe. file: results so far and to come.
        mixes: how many are measured at most; some may be in `known` already.
        seconds: what all of it takes, roughly.
    """

    job: Job
    recipe: Recipe
    frame: Frame
    known: Results
    name: str
    out: Path
    file: Path
    mixes: int
    seconds: float

    @property
    def minutes(self) -> int:
        """`seconds` rounded up."""
        return math.ceil(self.seconds / 60)


@dataclass(frozen=True)
class Outcome:
    """What a run came to.

    Attributes:
        recipe, folder: the refined one; None when the recipe stays as it is.
    """

    prepared: Prepared
    found: Found
    recipe: Recipe | None
    folder: Path | None
    notes: tuple[str, ...]
    seconds: float

    @property
    def verdict(self) -> str:
        """The answer in one line."""
        name, d = self.prepared.recipe.name, self.found.difference
        if d is None:
            return f"{name} stays: no swap at equal bytes was better on the probed chunks"
        change = f"KLD {d.mean:+.5f} ± {d.err:.5f} nats on held-out chunks, paired"
        if self.recipe is None:
            return f"{name} stays: the best mix found is no better beyond doubt ({change})"
        assert self.found.before is not None
        share = d.mean / self.found.before.mean
        return f"{self.recipe.name} is better than {name}: {change}, {share:+.1%}"

    def to_json(self) -> dict[str, Any]:
        """Return the document of `refine --json`."""
        recipe = self.recipe or self.prepared.recipe
        return {
            "accepted": self.recipe is not None,
            "verdict": self.verdict,
            "held_out": outcome.judged(self.found),
            "rounds": outcome.rounds_json(self.found),
            "swaps": outcome.swaps_of(self.prepared.recipe, self.recipe.tensors)
            if self.recipe
            else [],
            "size": recipe.to_json()["size"],
            "quality": recipe.to_json()["quality"],
            "conditions": self.prepared.known.conditions,
            "failed": self.prepared.known.failed,
            "probes_file": str(self.prepared.file),
            "check": recipe.check,
            "recipe": str(self.folder) if self.folder else str(self.prepared.job.recipe),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 3),
        }


def prepare(
    job: Job, *, out: Path | None = None, name: str | None = None, file: Path | None = None
) -> Prepared:
    """Read everything, see that it belongs together, and count what there is to measure.

    Args:
        out: folder for recipes; default: beside the recipe.
        name: of the refined recipe; default: that of the recipe with `-refined`.
        file: results; default: `<name>.probes.json` in `out`.

    Raises:
        UsageError, BadFile, UnknownName: what is wrong with which file or flag.
        EngineMissing: the packaged engine is not installed.
    """
    recipe = load(job.recipe)
    folder = job.recipe if job.recipe.is_dir() else job.recipe.parent
    weights = open_weights(job.source)
    mix = mix_of(recipe, weights)
    require_float(weights, mix)
    if not mix:
        raise UsageError(
            f"{job.source} is already quantized as the recipe says: give the bf16 or f16 model"
        )
    if job.imatrix:
        read_imatrix(job.imatrix, weights)
    named = name or f"{recipe.name or folder.name}-refined"
    require_name(named)
    beside = folder.resolve().parent if folder.name in ("", "..") else folder.parent
    place = (out or beside) / named
    if place.resolve() == folder.resolve():
        raise UsageError(f"{place} is the recipe itself: give another --name or --out")
    require_place(place)
    if job.measurements:
        job = replace(job, settings=replace(job.settings, seen=_seen(job, job.measurements)))
    target = file or place.with_name(f"{named}.probes.json")
    require_creatable(target)
    known = results.load(target, _conditions(job, weights))
    frame = worker.frame_for(job).holding(known.unread or ())
    passes, judged = n_passes(frame, job.settings)
    return Prepared(
        job=job,
        recipe=recipe,
        frame=frame,
        known=known,
        name=named,
        out=place,
        file=target,
        mixes=passes - 1 + judged - 1,
        seconds=_seconds(job, frame, passes, judged),
    )


def refine(prepared: Prepared, on_event: Callable[[dict[str, Any]], None] | None = None) -> Outcome:
    """Measure what is not known yet, decide, and write the refined recipe if it is better.

    Args:
        on_event: progress, `{"mix": i, "of": n, "name": "…"}`.

    Raises:
        EngineError: the engine cannot have the recipe itself, or failed.
        CheckFailed: the engine would write other tensors than the refined recipe says.
    """
    started = time.perf_counter()
    done = 0

    def tick(event: dict[str, Any]) -> None:
        nonlocal done
        done += "key" in event
        if on_event:
            on_event({"mix": done, "of": prepared.mixes, **event})

    job = prepared.job
    worker.run(job, prepared.known, prepared.file, tick)
    frame = prepared.frame.holding(prepared.known.unread or ())
    prepared = replace(prepared, frame=frame)
    found = worker.replay(job, frame, prepared.known)
    if found is None or found.unjudged:
        raise EngineError(_failure(prepared, found))
    said = (*outcome.held_note(frame), *_failed_note(prepared))
    answer = Outcome(prepared, found, None, None, said, 0.0)
    if found.accepted:
        recipe, folder, notes = _write(prepared, found)
        notes = (*said, *outcome.speed_note(prepared.recipe.speed, recipe.speed), *notes)
        answer = replace(answer, recipe=recipe, folder=folder, notes=notes)
    return replace(answer, seconds=time.perf_counter() - started)


def _failed_note(prepared: Prepared) -> tuple[str, ...]:
    """Return a note on mixes that are left out since the engine failed on them, if there are."""
    failed = prepared.known.failed
    if not failed:
        return ()
    return (
        f"left out, since the engine failed on them: {len(failed)} mixes, the first by "
        f"{next(iter(failed.values()))!r}; to try them again, take them out of `failed` in "
        f"{prepared.file}",
    )


def _failure(prepared: Prepared, found: Found | None) -> str:
    """Return why the recipe could not be measured, or the best mix not be judged."""
    frame, failed = prepared.frame, prepared.known.failed
    choices = [frame.start, found.choice] if found else [frame.start]
    keys = [results.mix_key(frame.mix(c)) for c in choices]
    why = next((failed[k] for k in keys if k in failed), "no reason given")
    what = "judge the best mix on the held-out chunks" if found else f"have {prepared.recipe.name}"
    return (
        f"the engine cannot {what}: {why} (to try it again, take it out of `failed` in "
        f"{prepared.file})"
    )


def _write(prepared: Prepared, found: Found) -> tuple[Recipe, Path, tuple[str, ...]]:
    """Check the refined recipe and write its folder.

    Raises:
        CheckFailed: the check does not hold; nothing is written.
    """
    recipe = outcome.refined_recipe(
        prepared.recipe,
        prepared.frame,
        found,
        prepared.name,
        prepared.known.conditions,
        prepared.job.n_ctx,
    )
    result = check(recipe, prepared.frame.model)
    if not result.ok:
        first = result.problems[0]
        raise CheckFailed(
            f"the check of {recipe.name} found {len(result.problems)} problems, the first at "
            f"{first.tensor or 'the sums'}: {first.problem}"
        )
    recipe = replace(recipe, check=result.to_json())
    written = write_folder(recipe, prepared.out)
    return recipe, written.folder, written.notes


def _seen(job: Job, file: Path) -> int:
    """Return how many chunks of the text `measure` has seen; 0 where it saw another."""
    found = measurements.load(file)
    if found.corpus != read_corpus(job.corpus).sha256:
        return 0
    per_chunk = found.n_ctx - found.n_ctx // 2 - 1
    chunks = max(-(-p.tokens // per_chunk) for p in found.probes) if found.probes else 0
    return -(-max(chunks, found.chunks) * found.n_ctx // job.n_ctx)


def _conditions(job: Job, weights: WeightsFile) -> dict[str, Any]:
    engine = native.engine_id()
    matrix = hashlib.sha256(job.imatrix.read_bytes()).hexdigest() if job.imatrix else None
    return {
        "model": weights.model_fingerprint,
        "base": weights.data_fingerprint,
        "engine": f"{engine.name} {engine.build}",
        "corpus": read_corpus(job.corpus).sha256,
        "imatrix": matrix,
        "n_ctx": job.n_ctx,
    }


def _seconds(job: Job, frame: Frame, passes: int, judged: int) -> float:
    """Estimate a run: passes over the text, and tensors quantized for mixes and probes."""
    settings, model = job.settings, frame.model
    tokens = job.n_ctx * (passes * settings.chunks + judged * settings.held_out)
    weights = sum(t.n_elements for t in model.tensors if t.quantizable and t.loaded)
    active = sum(t.n_elements * t.active_fraction for t in model.tensors if t.loaded)
    parts = parts_of(frame, settings.by, settings.bands)
    changed = 0
    for probe in probes_of(frame, parts, frame.start):
        groups = np.flatnonzero(probe.choice != frame.start)
        members = [m for g in groups for m in frame.choices.groups[g].members]
        changed += sum(model.tensors[m].n_elements for m in members)
    # A candidate changes about half of all weights.
    quantized = weights + settings.rounds * (changed + weights * len(REACHES) / 2)
    work = tokens * active * _PASS_SECONDS + quantized * _QUANTIZE_SECONDS
    return math.ceil(work / (job.threads or default_threads()))
