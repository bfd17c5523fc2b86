"""What a pipeline comes to: one item per recipe, and for each of its steps whether it must run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import quantmix
from quantmix import budget_flags
from quantmix.batch import identity
from quantmix.batch.pipeline import Job, Pipeline, Step
from quantmix.batch.publish import STAGE
from quantmix.batch.state import FOLDER, Done, State
from quantmix.errors import QuantmixError, UsageError
from quantmix.files import name_part
from quantmix.request import Request, budget_of

Verdict = Literal["done", "run", "later", "failed", "blocked"]
"""done: nothing to do; run: must run now; later: after one that must run (and only if that changes
something); failed: failed, and the same inputs fail again; blocked: behind a failure."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What a plan needs to know of a model without loading it again."""

    id: str
    is_mla: bool
    n_tensors: int
    n_elements: int


@dataclass(frozen=True, slots=True)
class Item:
    """One recipe of a pipeline.

    Attributes:
        job, number: whose it is; its place in the pipeline.
        name: of its folder in `out`.
        budget: as written.
        request: the design asked for. source: what is quantized, base: what KLD is against.
        model_digest: what the model is. facts: None when it cannot be loaded, then `problem` says
            why, with exit `code`.
    """

    job: Job
    number: int
    name: str
    budget: str
    request: Request
    source: str | None
    base: str | None
    model_digest: str
    facts: Facts | None
    problem: str = ""
    code: int = 0

    @property
    def steps(self) -> tuple[Step, ...]:
        """Steps in running order."""
        return self.job.steps


@dataclass(frozen=True, slots=True)
class Judged:
    """A step and whether it must run; `key` is "" where inputs are not known yet."""

    step: Step
    verdict: Verdict
    key: str = ""
    last: Done | None = None
    reason: str = ""


@dataclass
class Inputs:
    """Hashes of input files and engines, taken once per run."""

    state: State
    folder: Path
    _known: dict[str, str] = field(default_factory=dict)

    def file(self, path: str | None) -> str:
        """Return the hash of a file or model named in a job, "" for none."""
        if path is None:
            return ""
        if path not in self._known:
            place = self.folder / Path(path).expanduser()
            self._known[path] = (
                identity.of_model(self.state, self.folder, path)
                if identity.model_files(place)
                else identity.of_input(self.state, place)
            )
        return self._known[path]

    def engine(self, name: str) -> str:
        """Return the hash of an engine."""
        key = f"engine {name}"
        if key not in self._known:
            self._known[key] = identity.of_engine(self.state, name)
        return self._known[key]


def expand(pipeline: Pipeline, state: State) -> tuple[Item, ...]:
    """Return the items of a pipeline; models are read where they are not known yet.

    A model that cannot be read makes items that fail, not an error.

    Raises:
        UsageError: two budgets of the same recipe name.
    """
    items: list[Item] = []
    for job in pipeline.jobs:
        for budget, request in zip(job.budgets, job.requests, strict=True):
            items.append(_item(pipeline, state, job, len(items), budget, request))
    return _named_apart(pipeline, items)


def _item(
    pipeline: Pipeline, state: State, job: Job, number: int, budget: str, request: Request
) -> Item:
    name, digest, problem, code = "", "", "", 0
    facts: Facts | None = None
    try:
        digest = identity.of_model(state, pipeline.folder, job.model)
        facts = Facts(
            **state.fact(
                f"model {job.model} {request.layout} {digest}",
                lambda: _facts(pipeline.folder, job.model, request.layout),
            )
        )
        made, _ = budget_of(request, is_mla=facts.is_mla)
        name = request.name or _name(facts.id, request, made.label)
    except QuantmixError as err:
        problem, code = str(err), err.exit_code
        name = request.name or f"{_slug(Path(job.model).name)}-{_slug(budget)}"
    local = identity.model_files(pipeline.folder / Path(job.model).expanduser())
    is_gguf = bool(local) and local[0].suffix == ".gguf"
    source = job.source or (str(local_name(job.model, local[0])) if is_gguf else None)
    base = (job.base or source) if job.kld else None
    if "quantize" in job.steps and source is None and not problem:
        problem, code = "to quantize, name the unquantized GGUF: source = 'model-bf16.gguf'", 2
    return Item(job, number, name, budget, request, source, base, digest, facts, problem, code)


def local_name(spec: str, first: Path) -> Path:
    """Return the first file of a model as the job would write it."""
    path = Path(spec)
    return path if path.suffix == ".gguf" else path / first.name


def _facts(folder: Path, spec: str, layout: str | None) -> dict[str, Any]:
    """Read a model for what a plan needs to know."""
    from quantmix.models.sources import load_model

    here = folder / Path(spec).expanduser()
    model = load_model(str(here) if identity.model_files(here) else spec, layout=layout)
    facts = Facts(model.id, model.hparams.is_mla, len(model.tensors), model.n_elements)
    return asdict(facts)


def _name(model_id: str, request: Request, label: str) -> str:
    """Return the name that `quantmix design` gives; an inverse question names itself."""
    if request.max_loss is not None:
        question = f"max-loss-{request.max_loss}"
        label = f"{label}-{question}" if budget_flags.named(request) else question
    return f"{model_id}-{_slug(label)}"


def _slug(text: str) -> str:
    return name_part(text.replace("--", "").strip("./"))


def _named_apart(pipeline: Pipeline, items: Sequence[Item]) -> tuple[Item, ...]:
    """Give budgets that differ in further flags names that differ.

    Raises:
        UsageError: two are still the same.
    """
    count = Counter(item.name for item in items)
    result: dict[str, Item] = {}
    for item in items:
        name = item.name
        if count[name] > 1 and item.request.name is None and item.facts is not None:
            name = f"{item.facts.id}-{_slug(' '.join(item.budget.split()))}"
            if name in result and item.request.engine != "ik":
                name += f"-{item.request.engine}"
        if name in result:
            other = result[name]
            raise UsageError(
                f"{pipeline.file}: job {item.job.number} ({item.job.model}): budgets: "
                f"{item.budget!r} makes the same recipe name as {other.budget!r} of job "
                f"{other.job.number}, {name}: add --name to one of them"
            )
        result[name] = replace(item, name=name)
    return tuple(result.values())


def judge(item: Item, state: State, inputs: Inputs, out: Path) -> list[Judged]:
    """Return for every step of an item whether it must run, from what is recorded and there."""
    if item.problem:
        first, *rest = item.steps
        failed = Judged(first, "failed", last=_problem(item), reason=item.problem)
        return [failed, *(Judged(s, "blocked", reason=f"{first} failed") for s in rest)]
    lasts = {step: state.step(item.name, step) for step in item.steps}
    judged: list[Judged] = []
    results: dict[str, Mapping[str, Any]] = {}
    stopped = ""
    waiting = False
    for step in item.steps:
        last = lasts[step]
        if stopped:
            judged.append(Judged(step, "blocked", reason=f"{stopped} failed", last=last))
            continue
        if waiting:
            judged.append(Judged(step, "later", last=last))
            continue
        try:
            key = key_of(item, step, results, inputs)
        except QuantmixError as err:
            stopped = step
            bad = Done("", "failed", 0.0, {}, str(err), True, err.exit_code)
            judged.append(Judged(step, "failed", last=bad, reason=str(err)))
            continue
        same = last is not None and last.key == key
        if same and last is not None and last.status == "failed" and last.lasting:
            stopped = step
            judged.append(Judged(step, "failed", key, last, last.reason))
        elif same and last is not None and last.status == "done":
            lost = _lost(last, [x for x in lasts.values() if x], step == "design", state, out)
            if lost:
                waiting = True
                judged.append(Judged(step, "run", key, last, f"{lost} is gone or was changed"))
            else:
                results[step] = last.result
                judged.append(Judged(step, "done", key, last))
        else:
            waiting = True
            judged.append(Judged(step, "run", key, last, _why(last, key)))
    return _with_big_file(item, judged)


def _problem(item: Item) -> Done:
    return Done("", "failed", 0.0, {}, item.problem, True, item.code)


def _why(last: Done | None, key: str) -> str:
    if last is None:
        return "never ran"
    if last.key != key:
        return "its inputs changed"
    return f"failed before: {last.reason}"


def _with_big_file(item: Item, judged: list[Judged]) -> list[Judged]:
    """Quantize again when the file was dropped (`keep`) and something needs it after all."""
    by_step = {j.step: j for j in judged}
    made, measured = by_step.get("quantize"), by_step.get("verify")
    if made is None or measured is None or made.verdict != "done" or measured.verdict != "run":
        return judged
    assert made.last is not None
    if made.last.outputs:
        return judged
    again = Judged("quantize", "run", made.key, made.last, "its file was dropped, verify needs it")
    place = item.steps.index("quantize")
    rest = (Judged(j.step, "later", last=j.last) for j in judged[place + 1 :])
    return [*judged[:place], again, *rest]


def _lost(last: Done, rows: Sequence[Done], shared: bool, state: State, out: Path) -> str:
    """Return an output that is not there as it was written; a later step may have rewritten it."""
    for path, digest in last.outputs.items():
        known = {digest, *(r.outputs[path] for r in rows if shared and path in r.outputs)}
        try:
            if state.digest(out / path, identity.of_file) not in known:
                return path
        except OSError:
            return path
    return ""


def key_of(item: Item, step: Step, results: Mapping[str, Mapping[str, Any]], inputs: Inputs) -> str:
    """Return the hash of all that a step's outputs depend on.

    `results` are those of the steps before it. A step that reads the recipe depends on what it
    says, not on how it came about: a design that comes out the same reruns nothing.
    """
    return identity.of_value([step, *_parts(item, step, results, inputs)])


def _parts(
    item: Item, step: Step, results: Mapping[str, Mapping[str, Any]], inputs: Inputs
) -> list[Any]:
    version, job, request = quantmix.__version__, item.job, item.request
    if step == "design":
        files = [inputs.file(str(request.measurements) if request.measurements else None)]
        if request.rig is not None and request.rig.endswith(".toml"):
            files.append(inputs.file(request.rig))
        asked = {**asdict(request), "out": "", "name": item.name, "no_check": True}
        return [version, item.model_digest, asked, files]
    recipe, mix = results["design"]["recipe"], results["design"]["mix"]
    if step == "check":
        return [version, recipe, inputs.engine(request.engine)]
    quantized = [
        mix,
        inputs.file(item.source),
        inputs.file(job.imatrix),
        inputs.engine(request.engine),
    ]
    if step == "quantize":
        return quantized
    if step == "verify":
        texts = [inputs.file(job.corpus), inputs.file(item.base)]
        return [version, recipe, quantized, texts, job.verify_ctx, job.chunks]
    return [version, recipe, results.get("check"), results.get("verify")]


def payload_of(item: Item, step: Step, key: str, pipeline: Pipeline) -> dict[str, Any]:
    """Return all that a step needs to know, as JSON; paths relative to the pipeline's folder."""
    job = item.job
    request = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(item.request).items()}
    stage = f"{STAGE}/{item.name}.{step}"
    return {
        "version": quantmix.__version__,
        "step": step,
        "recipe": item.name,
        "key": key,
        "request": request,
        "model_digest": item.model_digest,
        "out": str(pipeline.out),
        "stage": str(pipeline.out / stage),
        "stage_in_out": stage,
        "log": str(pipeline.out / FOLDER / "logs" / item.name / f"{step}.log"),
        "options": {
            "source": item.source,
            "imatrix": job.imatrix,
            "corpus": job.corpus,
            "base": item.base,
            "db": job.db,
            "chunks": job.chunks,
            "threads": job.threads,
            "verify_ctx": job.verify_ctx,
        },
        "asked_resources": dict(job.resources.get(step, {})),
    }
