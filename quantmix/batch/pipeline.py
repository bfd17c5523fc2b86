"""The pipeline file (docs/batch.md): jobs × budgets × steps, read and checked before anything runs.

    [defaults]            # keys of every job; all flags of `design` too, `-` written as `_`
    out = "recipes"       # where recipes go, with the batch's state in `.quantmix/`
    keep = "all"          # big files: all, last, best
    disk = "500G"         # most that the big files may take together

    [[job]]
    model = "models/smollm2-f16.gguf"
    budgets = ["--size 4.5bpw", "--size 3.0bpw --pin output=q8_0"]
    steps = ["design", "check", "quantize", "verify", "report"]
    source = "…"          # what to quantize, when `model` is no GGUF
    imatrix = "…"         # without one, designs use only types that need none
    corpus = "…"          # what to verify on (default: the shipped text)
    base = "…"            # what KLD is measured against (default: the source)
    kld = true            # false: PPL only
    chunks = 20           # at most so many chunks of verify_ctx = 512 tokens
    threads = 8           # of quantize and verify (default: all)
    db = "…"              # measurements store (default: QUANTMIX_DB)
    resources = { verify = { GPU = 1 } }    # per step, on a cluster

Paths are relative to the pipeline file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

from quantmix import budget_flags
from quantmix.batch import flags
from quantmix.errors import BadFile, UnknownName, UsageError
from quantmix.request import Request
from quantmix.units import parse_size

Step = Literal["design", "check", "quantize", "verify", "report"]
STEPS: Final[tuple[Step, ...]] = get_args(Step)
"""In the order in which they run."""

Keep = Literal["all", "last", "best"]
KEEPS: Final[tuple[Keep, ...]] = get_args(Keep)

_NEEDS: Final[Mapping[Step, Step]] = {
    "check": "design",
    "quantize": "design",
    "verify": "quantize",
    "report": "design",
}
_OURS: Final = ("model", "budgets", "steps", "resources")
_TEXTS: Final = ("source", "imatrix", "corpus", "base", "db")
_NUMBERS: Final = ("chunks", "threads", "verify_ctx")
_SWITCHES: Final = ("kld",)
_WHOLE: Final = ("out", "keep", "disk")  # of the pipeline, not of a job


@dataclass(frozen=True, slots=True)
class Job:
    """One job: a model, its budgets, its steps, what the steps need.

    Attributes:
        number: from 1, for messages.
        model: as written. budgets: as written.
        requests: one per budget.
        steps: in running order.
        resources: step → resource → amount.
    """

    number: int
    model: str
    budgets: tuple[str, ...]
    requests: tuple[Request, ...]
    steps: tuple[Step, ...]
    source: str | None = None
    imatrix: str | None = None
    corpus: str | None = None
    base: str | None = None
    db: str | None = None
    chunks: int | None = None
    threads: int | None = None
    verify_ctx: int = 512
    kld: bool = True
    resources: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline file: its folder, to which all paths are relative, and its jobs."""

    file: Path
    folder: Path
    out: Path
    keep: Keep
    disk_bytes: int | None
    jobs: tuple[Job, ...]


def load(file: str | Path) -> Pipeline:
    """Read a pipeline file.

    Raises:
        BadFile: missing, or no TOML.
        UsageError: a key or value that makes no sense; the message names job and key.
    """
    path = Path(file)
    try:
        with path.open("rb") as handle:
            document = tomllib.load(handle)
    except OSError as err:
        raise BadFile(f"{path} cannot be read: {err.strerror}") from err
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise BadFile(f"{path} is not TOML: {err}") from err
    unknown = sorted(set(document) - {"defaults", "job"})
    if unknown:
        raise UsageError(f"{path}: unknown table {unknown[0]!r}: use [defaults] and [[job]]")
    defaults, jobs = document.get("defaults", {}), document.get("job", [])
    if not isinstance(defaults, dict):
        raise UsageError(f"{path}: defaults is not a table: write [defaults]")
    if not isinstance(jobs, list) or not jobs or not all(isinstance(j, dict) for j in jobs):
        raise UsageError(f"{path}: there is no job: write [[job]] with model, budgets and steps")
    whole = _whole(path, defaults)
    made = []
    for number, table in enumerate(jobs, 1):
        name = table.get("model", defaults.get("model"))
        where = f"{path}: job {number}" + (f" ({name})" if isinstance(name, str) else "")
        for key in _WHOLE:
            if key in table:
                raise UsageError(f"{where}: {key} is for the whole pipeline: write it in defaults")
        made.append(_job(where, number, {**defaults, **table}, f"{path}: defaults", set(table)))
    folder = path.resolve().parent
    return Pipeline(path, folder, Path(whole["out"]), whole["keep"], whole["disk"], tuple(made))


def _whole(path: Path, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return what belongs to the whole pipeline."""
    out = defaults.get("out", "recipes")
    if not isinstance(out, str) or not out:
        raise UsageError(f"{path}: defaults: out: {out!r} is not a path")
    keep = defaults.get("keep", "all")
    if keep not in KEEPS:
        raise UsageError(f"{path}: defaults: keep: {keep!r} is none of {', '.join(KEEPS)}")
    disk = defaults.get("disk")
    if disk is not None:
        try:
            disk = parse_size(disk, "disk") if isinstance(disk, str) else int(disk)
        except (UsageError, TypeError, ValueError) as err:
            raise UsageError(f"{path}: defaults: disk: {err}") from None
    return {"out": out, "keep": keep, "disk": disk}


def _job(where: str, number: int, table: Mapping[str, Any], shared: str, own: set[str]) -> Job:
    """Return a job from its table with the defaults filled in."""
    request: dict[str, Any] = {}
    rest: dict[str, Any] = {}
    for key, value in table.items():
        place = f"{where if key in own else shared}: {key}"
        if key in _WHOLE:
            continue
        if key == "name":
            raise UsageError(f"{place}: names belong to budgets: write --name there")
        try:
            _sort(key, value, request, rest)
        except UnknownName as err:
            raise UsageError(f"{where if key in own else shared}: {err}") from None
        except UsageError as err:
            raise UsageError(f"{place}: {err}") from None
    if not isinstance(rest.get("model"), str) or not rest["model"]:
        raise UsageError(f"{where}: model is missing: name one, like model = 'deepseek-r1'")
    steps = _steps(where, rest.pop("steps", None))
    budgets = rest.pop("budgets", None)
    if not isinstance(budgets, list) or not budgets:
        raise UsageError(f"{where}: budgets: write a list of flags, like ['--vram 192G']")
    made = []
    for i, text in enumerate(budgets, 1):
        try:
            made.append(_request(text, rest["model"], request))
        except UsageError as err:
            raise UsageError(f"{where}: budgets: number {i}: {err}") from None
    if "quantize" in steps and rest.get("imatrix") is None:
        made = [replace(r, no_imatrix=True) for r in made]
    return Job(number, rest.pop("model"), tuple(budgets), tuple(made), steps, **rest)


def _sort(key: str, value: Any, request: dict[str, Any], rest: dict[str, Any]) -> None:
    """Put one key where it belongs, its kind checked."""
    if key in _TEXTS:
        if not isinstance(value, str) or not value:
            raise UsageError(f"{value!r} is not a path")
        rest[key] = value
    elif key in _NUMBERS:
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UsageError(f"{value!r} is not a whole number above zero")
        rest[key] = value
    elif key in _SWITCHES:
        if not isinstance(value, bool):
            raise UsageError(f"{value!r} is not true or false")
        rest[key] = value
    elif key == "resources":
        rest[key] = _resources(value)
    elif key in _OURS:
        rest[key] = value
    elif flags.is_field(key):
        request[key] = flags.from_toml(key, value)
    else:
        known = (*_OURS, *_TEXTS, *_NUMBERS, *_SWITCHES, *flags.names())
        raise UnknownName.of("key", key, known, "a job's keys and all flags of design")


def _resources(value: Any) -> Mapping[str, Mapping[str, float]]:
    """Return what steps ask of a cluster's workers."""
    if not isinstance(value, dict) or not all(isinstance(v, dict) for v in value.values()):
        raise UsageError("write resources per step, like { verify = { GPU = 1 } }")
    for step, amounts in value.items():
        if step not in STEPS:
            raise UsageError(f"{step!r} is none of the steps {', '.join(STEPS)}")
        for name, amount in amounts.items():
            if isinstance(amount, bool) or not isinstance(amount, int | float) or amount < 0:
                raise UsageError(f"{step}.{name}: {amount!r} is not an amount")
    return value


def _steps(where: str, value: Any) -> tuple[Step, ...]:
    """Return the steps in running order; one that needs another must have it."""
    if value is None:
        return ("design", "check")
    if not isinstance(value, list) or not value:
        raise UsageError(f"{where}: steps: write a list out of {', '.join(STEPS)}")
    for name in value:
        if name not in STEPS:
            raise UsageError(f"{where}: steps: {name!r} is none of {', '.join(STEPS)}")
    steps = tuple(s for s in STEPS if s in value)
    for step in steps:
        if step in _NEEDS and _NEEDS[step] not in steps:
            raise UsageError(f"{where}: steps: {step} needs {_NEEDS[step]} before it")
    return steps


def _request(text: Any, model: str, common: Mapping[str, Any]) -> Request:
    """Return the request of one budget: the job's flags, overridden by the budget's own."""
    if not isinstance(text, str):
        raise UsageError(f"{text!r} is not a text of flags")
    own = flags.parse(text)
    if "out" in own:
        raise UsageError("--out belongs to the pipeline: write out in defaults")
    kinds = budget_flags.KINDS
    if any(k in own for k in kinds):
        common = {k: v for k, v in common.items() if k not in kinds}
    request = Request(model, **{**common, **own, "out": Path()})
    given = budget_flags.named(request)
    if len(given) != 1 and not (not given and request.max_loss is not None):
        raise UsageError(f"{text!r} must name one of --vram, --gpus, --rig, --size")
    budget_flags.require_sense(request)
    return request
