"""`search` with the real engine behind it, in a child process that a native crash may end.

The child loads the source once and answers every question of the search itself, so quantized
tensors stay at hand; each score is told to the parent, which saves it. A child that starts again
gets the scores so far and asks the engine for the others only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantmix.engine import child
from quantmix.engine.child import Emit
from quantmix.engine.ghost import model_engine
from quantmix.errors import EngineError, UsageError
from quantmix.refine import results
from quantmix.refine.frame import Frame, frame_of, limits_of
from quantmix.refine.results import Results
from quantmix.refine.search import Found, Place, Score, Settings, search

if TYPE_CHECKING:
    from quantmix.engine.variants import MixScorer


@dataclass(frozen=True)
class Job:
    """What to refine, with what, and how much to measure.

    Attributes:
        types: the palette instead of the recipe's, when not empty.
        measurements: results of `measure` on the source, for a better loss model than the prior.
    """

    recipe: Path
    source: Path
    corpus: Path
    imatrix: Path | None
    measurements: Path | None
    types: tuple[str, ...]
    settings: Settings
    n_ctx: int = 512
    threads: int | None = None


def frame_for(job: Job) -> Frame:
    """Return the frame of a job.

    Raises:
        UsageError, BadFile: as `frame_of`, or files that do not belong together.
    """
    from quantmix.loss import load as load_loss
    from quantmix.models.sources import load_model
    from quantmix.mtp import with_mtp
    from quantmix.recipe import load

    recipe = load(job.recipe)
    model = with_mtp(load_model(str(job.source)), recipe.settings)
    limits = limits_of(recipe, job.types, imatrix=job.imatrix is not None)
    loss = load_loss(
        model,
        engine=model_engine(recipe),
        imatrix=limits.imatrix,
        measurements=job.measurements,
    )
    return frame_of(recipe, model, loss, limits, job.imatrix)


def run(
    job: Job,
    known: Results,
    out: Path,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> None:
    """Measure in child processes until every score that the search asks for is in `known`.

    Args:
        known: grows; saved to `out` after each score.
        on_event: progress, `{"mix": i, "of": n, "name": "…"}`.

    Raises:
        EngineError: the engine fails before any mix.
    """
    asked = ""

    def take(event: dict[str, Any]) -> None:
        nonlocal asked
        if "starts" in event:
            asked = event["starts"]
        else:
            known.take(event)
            known.save(out)
        if on_event and "unread" not in event:
            on_event(event)

    while True:
        asked = ""
        try:
            child.run("quantmix.refine.worker:task", {**_plain(job), **known.to_json()}, take)
            return
        except EngineError as err:
            if not asked or asked.partition("@")[0] in known.failed:
                raise
            take({"key": asked, "why": str(err)})


def task(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child task of `run`: the search, with the engine asked for what is not known."""
    job = _job(request)
    known = results.from_json(request, "the request")
    with ExitStack() as stack:
        answer(job, known, emit, lambda: stack.enter_context(_scorer(job)))
    return {}


def answer(
    job: Job, known: Results, emit: Emit, open_scorer: Callable[[], MixScorer]
) -> Found | None:
    """Run the search; scores that are not known come from the engine, which is opened once."""
    engine: list[MixScorer] = []
    if known.unread is None:
        engine.append(open_scorer())
        said = {"unread": engine[0].unread}
        known.take(said)
        emit(said)
    unread = known.unread or ()

    def evaluate(mix: Mapping[str, str], place: Place, what: str) -> Score | None:
        found = known.score(mix, place)
        if found or results.mix_key(mix) in known.failed:
            return found
        name = results.key(mix, place)
        if not engine:
            engine.append(open_scorer())
        emit({"starts": name, "name": what})
        try:
            score = engine[0].score(dict(mix), place.first, place.count)
        except UsageError as err:
            event: dict[str, Any] = {"key": name, "why": str(err), "name": what}
        else:
            event = {"key": name, "score": score, "name": what}
        known.take(event)
        emit(event)
        return known.score(mix, place)

    return search(frame_for(job).holding(unread), job.settings, evaluate)


def replay(job: Job, frame: Frame, known: Results) -> Found | None:
    """Return the answer from known scores alone."""

    def evaluate(mix: Mapping[str, str], place: Place, _: str) -> Score | None:
        return known.score(mix, place)

    return search(frame, job.settings, evaluate)


def _scorer(job: Job) -> MixScorer:
    from quantmix.engine.variants import MixScorer

    need = job.settings.judged.first + job.settings.judged.count
    return MixScorer(
        job.source, job.corpus, job.imatrix, n_ctx=job.n_ctx, need=need, threads=job.threads
    )


def _plain(job: Job) -> dict[str, Any]:
    return {
        "job": {
            k: str(v) if isinstance(v, Path) else v
            for k, v in {**asdict(job), "settings": asdict(job.settings)}.items()
        }
    }


def _job(request: Mapping[str, Any]) -> Job:
    doc = dict(request["job"])
    for name in ("recipe", "source", "corpus", "imatrix", "measurements"):
        doc[name] = Path(doc[name]) if doc[name] else None
    doc["types"] = tuple(doc["types"])
    doc["settings"] = Settings(**doc["settings"])
    return Job(**doc)
