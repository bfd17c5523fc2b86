"""The steps themselves: each writes its outputs complete into a stage, nothing anywhere else.

A step gets a payload and returns an outcome, both JSON, so that it runs the same here, in another
process, and on another machine. Paths are relative to the pipeline's folder, which is the working
directory; `stage` and `out` lie on one file system.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from quantmix.batch import flags, identity
from quantmix.batch.state import FOLDER
from quantmix.emit.folder import OURS, kept_note, next_earlier, outdated_files
from quantmix.errors import (
    CheckFailed,
    InfeasibleBudget,
    QuantmixError,
    UnknownName,
)

if TYPE_CHECKING:
    from quantmix.loss.model import LossModel
    from quantmix.models.model import Model
    from quantmix.recipe import Recipe
    from quantmix.request import Request

T = TypeVar("T")
Emit = Callable[[dict[str, Any]], None]

_CACHED: Final = 4  # models kept loaded
_MADE: Final = {"quantize": "{}.gguf", "verify": "verify.json", "report": "report.html"}
"""Step → the file that it adds to the folder of a recipe of this name."""
_LASTING: Final = (InfeasibleBudget, CheckFailed, UnknownName)
"""Failures that depend on a step's inputs alone: the same inputs fail again."""


@dataclass(frozen=True, slots=True)
class Made:
    """What a step made: facts for later steps and the summary, and what to move where.

    `moves` are (path inside the stage, path inside `out`); a folder moves as a whole. `carried`
    are files of an old folder that were linked into the new one: they are not this step's.
    """

    result: Mapping[str, Any]
    moves: tuple[tuple[str, str], ...]
    carried: frozenset[str] = frozenset()


@dataclass
class Workshop:
    """Models and loss models that stay loaded between the steps of one process."""

    _models: OrderedDict[str, Model] = field(default_factory=OrderedDict)
    _losses: OrderedDict[str, LossModel] = field(default_factory=OrderedDict)

    def model(self, request: Request, digest: str) -> Model:
        """Return the model of a request; `digest` says which content is meant."""
        from quantmix.models.sources import load_model

        key = identity.of_value([digest, request.model, request.layout])
        if key not in self._models:
            self._models[key] = load_model(request.model, layout=request.layout)
        return _used(self._models, key)

    def loss(self, request: Request, digest: str) -> LossModel | None:
        """Return the loss model of a request, None where it cannot be shared."""
        from quantmix.loss import load

        if request.mtp or request.own or request.measurements is not None:
            return None
        imatrix = not request.no_imatrix
        key = identity.of_value([digest, request.model, request.layout, request.engine, imatrix])
        if key not in self._losses:
            engine: Any = request.engine
            model = self.model(request, digest)
            self._losses[key] = load(model, engine=engine, imatrix=imatrix)
        return _used(self._losses, key)


def _used(cache: OrderedDict[str, T], key: str) -> T:
    """Return a value that is now the newest, and let go of the oldest."""
    cache.move_to_end(key)
    while len(cache) > _CACHED:
        cache.popitem(last=False)
    return cache[key]


def perform(payload: Mapping[str, Any], workshop: Workshop, emit: Emit) -> dict[str, Any]:
    """Do one step; an expected failure is an outcome, not an exception."""
    started = time.perf_counter()
    stage = Path(payload["stage"])
    try:
        stage.mkdir(parents=True)
        made = _STEPS[payload["step"]](_Order(payload, stage, workshop, emit))
        files = {
            inside: identity.of_file(path)
            for path, inside in _files(stage, made.moves)
            if inside not in made.carried
        }
        _sync(stage)
    except (QuantmixError, OSError) as err:
        code = err.exit_code if isinstance(err, QuantmixError) else 2
        return failed(str(err), code, started, lasting=isinstance(err, _LASTING))
    return {
        "ok": True,
        "result": dict(made.result),
        "moves": [[f"{payload['stage_in_out']}/{a}", b] for a, b in made.moves],
        "outputs": files,
        "seconds": time.perf_counter() - started,
    }


def failed(
    message: str, code: int, started: float | None = None, *, lasting: bool = False
) -> dict[str, Any]:
    """Return the outcome of a step that failed; `started` is its `perf_counter`, if it began."""
    seconds = 0.0 if started is None else time.perf_counter() - started
    return {"ok": False, "message": message, "code": code, "lasting": lasting, "seconds": seconds}


@dataclass(frozen=True, slots=True)
class _Order:
    """A payload with what it takes to do it."""

    payload: Mapping[str, Any]
    stage: Path
    workshop: Workshop
    emit: Emit

    @property
    def name(self) -> str:
        """Name of the recipe."""
        return str(self.payload["recipe"])

    @property
    def folder(self) -> Path:
        """Folder of the recipe."""
        return Path(self.payload["out"]) / self.name

    @property
    def request(self) -> Request:
        """The design asked for."""
        from quantmix.request import Request

        values = dict(self.payload["request"])
        for key in flags.paths():
            if values.get(key) is not None:
                values[key] = Path(values[key])
        return Request(**{**values, "out": self.stage, "name": self.name, "no_check": True})

    def option(self, name: str) -> Any:
        """Return a key of the job."""
        return self.payload["options"].get(name)


def design(order: _Order) -> Made:
    """Search the mix and write its folder; what still holds of an older folder moves along."""
    from quantmix.request import fulfil

    request, digest = order.request, order.payload["model_digest"]
    answer = fulfil(
        request,
        model=order.workshop.model(request, digest),
        loss=order.workshop.loss(request, digest),
        db=order.option("db"),
    )
    recipe = answer.recipe
    document = json.loads(json.dumps(recipe.to_json(), allow_nan=False))
    carried, notes = _carry_over(order, recipe, document)
    quality = recipe.quality
    result = {
        "recipe": identity.of_recipe(document),
        "mix": identity.of_mix(document),
        "tensor_bytes": recipe.size.tensor_bytes,
        "file_bytes": recipe.size.file_bytes,
        "bpw": recipe.size.bpw,
        "damage": quality.damage,
        "ln_ppl_ratio": quality.ln_ppl_ratio,
        "ppl": quality.ppl,
        "ppl_low": quality.ppl_low,
        "ppl_high": quality.ppl_high,
        "gap": recipe.optimality.gap,
        "notes": [*answer.notes, *notes],
    }
    return Made(result, ((order.name, order.name),), carried)


def _carry_over(
    order: _Order, recipe: Recipe, document: Mapping[str, Any]
) -> tuple[frozenset[str], tuple[str, ...]]:
    """Link into the new folder what an older one holds of others and what is still true of it.

    The same recipe: everything, its check and date too. The same mix: the quantized file. Files
    that batch did not make always; a GGUF among them that does not fit the new mix moves into
    `earlier-N` with its recipe. Return the files, relative to the stage, and notes.
    """
    old, new = order.folder, order.stage / order.name
    if not old.is_dir():
        return frozenset(), ()
    made = {_MADE[step].format(order.name) for step in order.payload["made"] if step in _MADE}
    before, same_mix = _before(old, document)
    if before is not None:
        kept = replace(recipe, created=before["created"], check=before.get("check"))
        _rewrite_texts(kept, order.stage / "texts", new)
    outdated = outdated_files(recipe, old) - made
    earlier = next_earlier(old).name
    for path in sorted(old.iterdir()):
        target = (new / earlier if path.name in outdated else new) / path.name
        if target.exists():
            continue
        if path.name not in OURS | made:
            _link(path, target)
        elif before is not None or (same_mix and path.suffix == ".gguf"):
            with suppress(OSError):  # a file system without links: the step that made it runs again
                os.link(path, target)
    for name in OURS if outdated else ():
        if (old / name).exists():
            _link(old / name, new / earlier / name)
    carried = {str(p.relative_to(order.stage)) for p in new.rglob("*")} - {
        f"{order.name}/{name}" for name in OURS
    }
    return frozenset(carried), (kept_note(old / earlier, outdated),) if outdated else ()


def _before(old: Path, document: Mapping[str, Any]) -> tuple[Mapping[str, Any] | None, bool]:
    """Return the document in a folder when it says the same, and whether its mix is the same."""
    try:
        before = json.loads((old / "recipe.json").read_text(encoding="utf-8"))
        same_recipe = identity.of_recipe(before) == identity.of_recipe(document)
        return before if same_recipe else None, identity.of_mix(before) == identity.of_mix(document)
    except (OSError, ValueError, KeyError, TypeError):
        return None, False


def _link(path: Path, target: Path) -> None:
    """Put a file or folder at `target` too, without copying where the file system has links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() and not path.is_symlink():
        shutil.copytree(path, target, symlinks=True, copy_function=_link_file)
    else:
        _link_file(path, target)


def _link_file(path: str | Path, target: str | Path) -> None:
    try:
        os.link(path, target, follow_symlinks=False)
    except OSError:
        shutil.copy2(path, target, follow_symlinks=False)


def _rewrite_texts(recipe: Recipe, scratch: Path, folder: Path) -> None:
    """Put the texts that tell of the check into `folder`."""
    recipe.save(scratch, figures=False)
    for name in ("recipe.json", "README.md"):
        os.replace(scratch / name, folder / name)


def check(order: _Order) -> Made:
    """Prove the recipe, then write the proof into it."""
    from quantmix.engine.ghost import check as run_check
    from quantmix.recipe import load

    recipe = load(order.folder)
    model = order.workshop.model(order.request, order.payload["model_digest"])
    found = run_check(recipe, model)
    if not found.ok:
        raise CheckFailed(found.complaint)
    replace(recipe, check=found.to_json()).save(order.stage / "recipe", figures=False)
    names = ("recipe.json", "README.md")
    return Made(found.to_json(), tuple((f"recipe/{n}", f"{order.name}/{n}") for n in names))


def quantize(order: _Order) -> Made:
    """Make the file and compare it with the recipe byte by byte."""
    from quantmix.engine import quantize as work
    from quantmix.recipe import load

    out = order.stage / f"{order.name}.gguf"
    recipe = load(order.folder)
    imatrix = _imatrix_for(order, recipe.engine.name)
    plan = work.preflight(recipe, order.option("source"), out, imatrix=imatrix)
    made = work.quantize(plan, threads=order.option("threads"), on_event=order.emit)
    result = {
        "file_bytes": made.file_bytes,
        "tensor_bytes": made.tensor_bytes,
        "tensors": made.n_tensors,
        "warnings": list(made.warnings),
    }
    return Made(result, ((out.name, f"{order.name}/{out.name}"),))


def _imatrix_for(order: _Order, engine: str) -> Path | None:
    """Return the imatrix in the engine's format, under a path that every run has.

    The engine writes that path into the file: a temporary one would make two runs differ.
    """
    from quantmix.ggml import imatrix as imatrices
    from quantmix.ggml.header import is_gguf

    named = order.option("imatrix")
    if named is None or engine != "ik" or not is_gguf(Path(named)):
        return Path(named) if named else None
    stable = Path(order.payload["out"]) / FOLDER / f"{identity.of_file(Path(named))}.imatrix"
    if not stable.exists():
        fresh = order.stage / "imatrix.dat"
        imatrices.write_dat(imatrices.read(named), fresh)
        os.replace(fresh, stable)
    return stable


def verify(order: _Order) -> Made:
    """Measure the file, and hold it against the prediction."""
    from quantmix import verify as work
    from quantmix.recipe import load
    from quantmix.texts import text

    recipe = load(order.folder)
    engine: Any = recipe.engine.name
    found = work.verify(
        work.Target(order.folder / f"{order.name}.gguf", recipe),
        order.option("corpus") or text("test"),
        base=order.option("base"),
        n_ctx=order.option("verify_ctx"),
        chunks=order.option("chunks"),
        threads=order.option("threads"),
        engine=engine,
        db=order.option("db"),
        on_event=order.emit,
    )
    document = found.to_json()
    text_form = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (order.stage / "verify.json").write_text(text_form + "\n", "utf-8", "backslashreplace")
    kld = document["kld"]
    result = {
        "ppl": document["ppl"],
        "ppl_err": document["ppl_err"],
        "kld": kld["mean"] if kld else None,
        "predicted": document["predicted"],
        "data": found.weights.data_fingerprint,
        "corpus": document["corpus"]["sha256"],
    }
    return Made(result, (("verify.json", f"{order.name}/verify.json"),))


def report(order: _Order) -> Made:
    """Write the page of the design, with its own measurement and no others.

    What else the store holds depends on what was measured when; `quantmix report sweep` shows it.
    """
    from quantmix.report import build, pages
    from quantmix.store import Store

    private = order.stage / "measured.db"
    measured = order.payload["measured"]
    with Store(private) as store:
        if measured is not None:
            with Store(order.option("db")) as everything:
                for row in everything.find(data=measured["data"], corpus=measured["corpus"])[-1:]:
                    store.add(row)
    page = pages.design_page(build.design(order.folder, db=private))
    (order.stage / "report.html").write_text(page, "utf-8", "backslashreplace")
    return Made({}, (("report.html", f"{order.name}/report.html"),))


_STEPS: Final[Mapping[str, Callable[[_Order], Made]]] = {
    "design": design,
    "check": check,
    "quantize": quantize,
    "verify": verify,
    "report": report,
}


def _files(stage: Path, moves: tuple[tuple[str, str], ...]) -> list[tuple[Path, str]]:
    """Return (file in the stage, its name inside `out`) of all that moves."""
    found = []
    for inside_stage, inside_out in moves:
        path = stage / inside_stage
        if path.is_dir():
            for file in sorted(p for p in path.rglob("*") if p.is_file()):
                found.append((file, f"{inside_out}/{file.relative_to(path)}"))
        else:
            found.append((path, inside_out))
    return found


def _sync(stage: Path) -> None:
    """Make everything in the stage durable: files, then folders."""
    for path in sorted(stage.rglob("*"), reverse=True):
        if path.is_symlink():
            continue
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
