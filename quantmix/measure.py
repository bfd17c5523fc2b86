"""Measure how much a model minds: one group of tensors quantized at a time, KLD against the base.

The groups (probes) are roles, roles in depth bands, or single tensors. They run in a child process
by hot swap; each finished one is saved before the next starts, so a kill loses at most one, and a
native crash costs only the probe that caused it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from quantmix import measurements
from quantmix.engine import child, native
from quantmix.engine.perplexity import read_corpus
from quantmix.engine.quantize import require_same_tensors
from quantmix.errors import BadFile, EngineError, UnknownName, UsageError
from quantmix.files import require_creatable
from quantmix.ggml import imatrix as imatrices
from quantmix.ggml import types
from quantmix.ggml.weights import WeightsFile, open_weights
from quantmix.measurements import Failed, Measurements, Probe, Scope, TensorError
from quantmix.models.roles import is_quantizable, split_name
from quantmix.recipe import Recipe

SCOPES: Final[tuple[Scope, ...]] = ("role", "band", "tensor")
_SAMPLE_ROWS = 4096  # of each matrix whose error is sampled


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors that are changed together, and the type they get."""

    scope: Scope
    role: str
    layers: tuple[int, ...]
    type: str
    tensors: tuple[str, ...]

    @property
    def key(self) -> measurements.Key:
        """Identity of the probe."""
        return (self.scope, self.role, self.layers, self.type)


@dataclass(frozen=True)
class Run:
    """What to measure and under which conditions.

    Attributes:
        groups: the probes, in order.
        around: tensor → type of the mix that everything else has; empty for the source itself.
        chunks: text chunks of n_ctx tokens.
    """

    source: Path
    corpus: Path
    imatrix: Path | None
    groups: tuple[Group, ...]
    around: Mapping[str, str]
    n_ctx: int = 512
    chunks: int = 8
    threads: int | None = None


def groups_of(
    weights: WeightsFile,
    scope: Scope,
    asked: Sequence[str],
    *,
    roles: Sequence[str] = (),
    bands: int = 3,
) -> tuple[Group, ...]:
    """Return the probes of a scope: every role (or those named) at every type asked for, each once.

    Args:
        bands: depth bands of equal size, for scope `band`.

    Raises:
        UnknownName: a type or role that does not exist.
        UsageError: nothing to measure, or a type that ik cannot write.
    """
    require_writable(asked)
    members: dict[str, list[tuple[int | None, str]]] = {}
    for name, (info, _, _) in weights.tensors.items():
        if is_quantizable(name, info.shape):
            role, layer = split_name(name)
            members.setdefault(role, []).append((layer, name))
    for role in roles:
        if role not in members:
            hint = f"it has {', '.join(members)}"
            raise UnknownName.of("role of this model", role, members, hint)
    found = []
    for role in dict.fromkeys(roles or members):
        for layers, tensors in _parts(scope, members[role], bands):
            found += [Group(scope, role, layers, kind, tensors) for kind in dict.fromkeys(asked)]
    if not found:
        raise UsageError("nothing to measure: give --types and a model with matrices")
    return tuple(found)


def require_writable(names: Iterable[str]) -> None:
    """Refuse types that the packaged engine, ik, knows but cannot quantize to.

    Raises:
        UnknownName: it does not know one.
        UsageError: it cannot write one.
    """
    for name in names:
        if not types.get(name).writable:
            raise UsageError(f"{name} cannot be measured: ik cannot write it (`quantmix types`)")


def _parts(
    scope: Scope, members: Sequence[tuple[int | None, str]], bands: int
) -> list[tuple[tuple[int, ...], tuple[str, ...]]]:
    """Cut one role's tensors into (layers, tensors): whole, in bands, or singly."""
    layered = sorted((layer, name) for layer, name in members if layer is not None)
    if scope == "role" or not layered:
        return [((), tuple(name for _, name in members))]
    if scope == "tensor":
        return [((layer,), (name,)) for layer, name in layered]
    n = len(layered)
    cuts = [round(i * n / min(bands, n)) for i in range(min(bands, n) + 1)]
    parts = [layered[a:b] for a, b in pairwise(cuts)]
    return [(tuple(la for la, _ in p), tuple(n for _, n in p)) for p in parts]


def measure(
    run: Run, out: Path, on_event: Callable[[dict[str, Any]], None] | None = None
) -> Measurements:
    """Run all probes that `out` does not have yet; return the complete results.

    Args:
        on_event: progress, `{"probe": i, "of": n, "role": …, "type": …, "kld": x, "seconds": s}`.

    Raises:
        BadFile: `out` was measured under other conditions; bad source, text or imatrix.
        UsageError: `out` cannot be written.
        EngineError: the engine fails even before the first probe.
    """
    weights = open_weights(run.source)
    require_float(weights, (name for group in run.groups for name in group.tensors))
    if run.imatrix:
        read_imatrix(run.imatrix, weights)
    wanted = {g.key for g in run.groups}
    require_creatable(out)
    log = _Log(_open_results(run, weights, out), out)
    while left := [g for g in run.groups if g.key not in log.state.done]:
        log.begin(left)

        def take(event: dict[str, Any]) -> None:
            log.take(event)
            if on_event and "index" in event:
                done = len(log.state.done & wanted)
                on_event({**event, "probe": done, "of": len(wanted), **log.current_text()})

        try:
            child.run("quantmix.engine.probing:task", _request(run, left), take)
        except EngineError as err:
            if not log.probing:
                raise
            log.fail(str(err))
    return log.state


class _Log:
    """Folds the child's events into the results file, which is saved after each probe."""

    def __init__(self, state: Measurements, out: Path) -> None:
        self.state = state
        self.probing = False
        self._out = out
        self._left: Sequence[Group] = ()
        self._at = 0

    def begin(self, left: Sequence[Group]) -> None:
        """A child starts on these groups."""
        self._left, self._at, self.probing = left, 0, False

    def current_text(self) -> dict[str, Any]:
        """Describe the group at hand for progress."""
        group = self._left[self._at]
        return {"role": group.role, "layers": list(group.layers), "type": group.type}

    def take(self, event: dict[str, Any]) -> None:
        """Take one event of `probing.task`."""
        if "base" in event:
            self.state = replace(self.state, **event["base"])
        elif "starts" in event:
            self._at, self.probing = event["starts"], True
        elif "why" in event:
            self.fail(event["why"])
        else:
            group = self._left[event["index"]]
            values = {k: event[k] for k in _PROBE_FIELDS}
            self.state = self.state.with_probe(
                Probe(group.scope, group.role, group.layers, group.type, **values)
            )
            measurements.save(self.state, self._out)

    def fail(self, why: str) -> None:
        """Note that the group at hand cannot be measured."""
        group = self._left[self._at]
        self.state = self.state.with_failed(
            Failed(group.scope, group.role, group.layers, group.type, why)
        )
        measurements.save(self.state, self._out)


_PROBE_FIELDS = (
    "kld",
    "kld_err",
    "ln_ratio",
    "ln_ratio_err",
    "err",
    "n_elements",
    "seconds",
    "fallbacks",
    "tokens",
)


def _open_results(run: Run, weights: WeightsFile, out: Path) -> Measurements:
    """Return the results so far, or empty ones."""
    corpus = read_corpus(run.corpus)
    engine = native.engine_id()
    matrix = hashlib.sha256(run.imatrix.read_bytes()).hexdigest() if run.imatrix else None
    fresh = Measurements(
        model=weights.model_fingerprint,
        model_name=str(weights.metadata.get("general.name", weights.path.stem)),
        base=weights.data_fingerprint,
        engine=f"{engine.name} {engine.build}",
        corpus=corpus.sha256,
        imatrix=matrix,
        n_ctx=run.n_ctx,
        chunks=run.chunks,
        tokens=0,
        ppl_base=0.0,
        noise_floor=0.0,
        around=dict(run.around),
    )
    if not out.exists():
        return fresh
    stored = measurements.load(out)
    different = stored.same_conditions(fresh)
    if different:
        raise BadFile(
            f"{out} was measured with another {', '.join(different)}: give another --out, "
            "or the same conditions to go on with it"
        )
    return replace(stored, chunks=run.chunks)


def require_float(weights: WeightsFile, names: Iterable[str]) -> None:
    """Refuse a source in which one of these tensors is quantized already.

    Raises:
        UsageError: names the first.
    """
    kinds = weights.types()
    for name in names:
        if types.get(kinds[name]).family != "float":
            raise UsageError(
                f"{weights.path.name} is already quantized ({name} is {kinds[name]}): measure "
                "on the bf16 or f16 model"
            )


def read_imatrix(path: Path, weights: WeightsFile) -> imatrices.Imatrix:
    """Return the imatrix at `path`, sure to be of the model of `weights`.

    Raises:
        BadFile: malformed, or of another model: an entry does not fit its tensor, or fewer than
            half of the matrices have one.
    """
    matrix = imatrices.read(path)
    shapes = {n: i.shape for n, (i, _, _) in weights.tensors.items() if is_quantizable(n, i.shape)}
    found = {name: imatrices.lookup(matrix, name) for name in shapes}
    for name, entry in found.items():
        if entry and imatrices.shaped(entry, shapes[name]) is None:
            raise BadFile(
                f"{path} belongs to another model: {name} has {entry.sums.size} values there, its "
                f"shape in {weights.path.name} is {'x'.join(map(str, shapes[name]))}"
            )
    have = sum(entry is not None for entry in found.values())
    if have * 2 < len(shapes):
        raise BadFile(
            f"{path} has entries for {have} of {len(shapes)} matrices of {weights.path.name}: it "
            "belongs to another model"
        )
    return matrix


def _request(run: Run, groups: Sequence[Group]) -> dict[str, Any]:
    return {
        "source": str(run.source),
        "corpus": str(run.corpus),
        "imatrix": str(run.imatrix) if run.imatrix else None,
        "n_ctx": run.n_ctx,
        "chunks": run.chunks,
        "threads": run.threads,
        "around": dict(run.around),
        "probes": [{"type": g.type, "tensors": list(g.tensors)} for g in groups],
    }


def tensor_errors(
    source: Path,
    imatrix: Path | None,
    asked: Sequence[str],
    *,
    layers: int | None = None,
    known: Collection[tuple[str, str]] = (),
    threads: int | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> tuple[TensorError, ...]:
    """Return the weighted quantization error of matrices in types: no model run.

    Types that abort without an entry are left out for tensors that have none.

    Args:
        layers: of every role only tensors of so many layers, and of these some thousand rows: the
            relations between types, which `design` uses, hardly differ within a role.
        known: (tensor, type) pairs to leave out.

    Raises:
        BadFile: bad source, or an imatrix of another model.
        UsageError: a type that ik cannot write.
    """
    require_writable(asked)
    weights = open_weights(source)
    matrix = read_imatrix(imatrix, weights) if imatrix else None
    wanted = _sample(weights, layers) if layers else set(weights.tensors)
    jobs = []
    for name, (info, _, _) in weights.tensors.items():
        if name not in wanted or not is_quantizable(name, info.shape):
            continue
        has = matrix is not None and imatrices.lookup(matrix, name) is not None
        fitting = [t for t in asked if has or types.get(t).imatrix != "asserted"]
        jobs += [[name, t] for t in fitting if (name, t) not in known]
    if not jobs:
        return ()
    request = {
        "source": str(source),
        "imatrix": str(imatrix) if imatrix else None,
        "threads": threads,
        "jobs": jobs,
        "max_rows": _SAMPLE_ROWS if layers else None,
    }
    result = child.run("quantmix.engine.probing:errors_task", request, on_event)
    return tuple(TensorError(*row) for row in result["errors"])


def add_errors(
    run: Run,
    results: Measurements,
    out: Path,
    asked: Sequence[str],
    *,
    layers: int | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> Measurements:
    """Return `results` with the errors of types that it lacks, and save them to `out`.

    `layers` as in `tensor_errors`.

    Raises:
        BadFile: bad source, or an imatrix of another model.
    """
    found = tensor_errors(
        run.source,
        run.imatrix,
        list(dict.fromkeys(asked)),
        layers=layers,
        known={(e.tensor, e.type) for e in results.errors},
        threads=run.threads,
        on_event=on_event,
    )
    if not found:
        return results
    grown = replace(results, errors=(*found, *results.errors))
    measurements.save(grown, out)
    return grown


def _sample(weights: WeightsFile, layers: int) -> set[str]:
    """Return the tensors of each role that lie at `layers` evenly spread depths."""
    by_role: dict[str, list[tuple[int, str]]] = {}
    for name in weights.tensors:
        role, layer = split_name(name)
        by_role.setdefault(role, []).append((layer or 0, name))
    found = set()
    for members in by_role.values():
        ordered = [name for _, name in sorted(members)]
        found |= {ordered[int((i + 0.5) * len(ordered) / layers)] for i in range(layers)}
    return found


def mix_of(recipe: Recipe, weights: WeightsFile) -> dict[str, str]:
    """Return tensor → type of a recipe, for those whose type the source does not have already.

    Raises:
        SourceMismatch: the recipe is for another model.
    """
    require_same_tensors(recipe, weights)
    kinds = weights.types()
    return {t.name: t.type for t in recipe.tensors if t.type != kinds[t.name]}
