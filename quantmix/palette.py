"""Which types a tensor may take, what each costs in bytes, and what each does to the model.

Everything that an engine would do silently (fallbacks, kept tensors) or refuse (imatrix, missing
kernels) is applied here, before the solver sees anything.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from quantmix.errors import UsageError
from quantmix.ggml import types as ggml
from quantmix.ggml.types import Engine, GgmlType
from quantmix.loss.model import LossModel
from quantmix.models.model import Model, Tensor

GUARD_BPW = 3.0
"""Low-bit guard: tensors read for every token of an expert model stay at or above it."""

MTP_BPW = 4.5
"""MTP blocks that are not loaded get the type nearest to it: useful later, not precious."""


@dataclass(frozen=True, slots=True)
class TypeLimits:
    """What the user asked for: a type list, pins and floors as (regex, type), imatrix at hand."""

    types: tuple[str, ...] = ()
    pins: tuple[tuple[str, str], ...] = ()
    floors: tuple[tuple[str, str], ...] = ()
    imatrix: bool = True
    allow_slow_cpu: bool = False


@dataclass(frozen=True)
class Palette:
    """Options of every tensor.

    Attributes:
        types: the columns: types that can really be written, in enum order.
        allowed: (T, Q) bool; all False for a tensor that is kept as it is.
        bytes: (T, Q) int64, 0 where the type does not fit the shape.
        damage: (T, Q) nats.
        kept_bytes: (T,) bytes of a kept tensor at its source type, else 0.
        gpu, cpu: (Q,) bool, whether a type may live there.
        constraints: hard constraints applied, in words.
        fallbacks: types that stand in for an asked-for one on short rows.
    """

    types: tuple[GgmlType, ...]
    allowed: NDArray[np.bool_]
    bytes: NDArray[np.int64]
    damage: NDArray[np.float64]
    kept_bytes: NDArray[np.int64]
    gpu: NDArray[np.bool_]
    cpu: NDArray[np.bool_]
    constraints: tuple[str, ...]
    fallbacks: tuple[str, ...]

    def mix(self, columns: NDArray[np.int64]) -> list[GgmlType | None]:
        """Return the type of every tensor by its column, None (-1) where it stays as it is."""
        return [None if c < 0 else self.types[c] for c in columns]

    def sizes(self, columns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the bytes of every tensor in the file, (T,)."""
        rows = np.arange(len(columns))
        sizes: NDArray[np.int64] = np.where(
            columns < 0, self.kept_bytes, self.bytes[rows, np.maximum(columns, 0)]
        )
        return sizes


def build(model: Model, loss: LossModel, engine: Engine, limits: TypeLimits) -> Palette:
    """Return the options of every tensor of `model` on `engine` under `limits`.

    Raises:
        UnknownName: a type that the engine does not have.
        UsageError: a type that cannot be written, or not without an imatrix; a bad regex, a rule
            that matches nothing, a pin below a floor.
    """
    asked = _asked(engine, limits)
    pins = [_rule(text, name, engine, limits, "--pin") for text, name in limits.pins]
    floors = [_rule(text, name, engine, limits, "--floor") for text, name in limits.floors]
    names = {t.name for t in asked} | {q for _, q in pins} | {q for _, q in floors}
    written = _written(model, engine, tuple(sorted(names)))
    columns = sorted({t for per in written.values() for t in per.values()}, key=lambda t: t.id)
    index = {t.name: i for i, t in enumerate(columns)}
    n_tensors = len(model.tensors)
    allowed = np.zeros((n_tensors, len(columns)), dtype=np.bool_)
    n_bytes = np.zeros((n_tensors, len(columns)), dtype=np.int64)
    kept_bytes = np.zeros(n_tensors, dtype=np.int64)
    asked_names = {t.name for t in asked}
    sizes: dict[tuple[int, ...], NDArray[np.int64]] = {}
    for i, t in enumerate(model.tensors):
        if t.shape not in sizes:
            sizes[t.shape] = _sizes(columns, t.shape)
        n_bytes[i] = sizes[t.shape]
        if is_kept(t, engine):
            kept_bytes[i] = _source_bytes(t, engine)
            continue
        mine = written[_row_key(t)]
        for name in asked_names:
            if name in mine and not _silent(ggml.get(name, engine), mine[name]):
                allowed[i, index[mine[name].name]] = True
    damage = np.asarray(loss.damage(model, columns), dtype=np.float64)
    constraints = list(_guard(model, columns, allowed))
    worst = _floor(model, floors, written, index, damage, allowed, n_bytes)
    constraints += [f"floor {pattern.pattern}={name}" for pattern, name in floors]
    targets = _pin(model, pins, written, index, allowed)
    _require_floors(model, pins, floors, targets, damage, worst)
    constraints += [f"pin {pattern.pattern}={name}" for pattern, name in pins]
    fallbacks = sorted(
        {columns[q].name for q in np.nonzero(allowed.any(axis=0))[0]}
        - asked_names
        - {q for _, q in pins}
    )
    return Palette(
        types=tuple(columns),
        allowed=allowed,
        bytes=n_bytes,
        damage=np.where(n_bytes > 0, damage, np.inf),
        kept_bytes=kept_bytes,
        gpu=np.array([t.cuda for t in columns]),
        cpu=np.array([limits.allow_slow_cpu or not t.slow_cpu for t in columns]),
        constraints=tuple(constraints),
        fallbacks=tuple(fallbacks),
    )


def is_kept(tensor: Tensor, engine: Engine) -> bool:
    """Whether the tensor goes into the file as it is: never quantized, or quantized already."""
    if not tensor.quantizable:
        return True
    return ggml.get(tensor.source_type, engine).is_quantized


def _source_bytes(tensor: Tensor, engine: Engine) -> int:
    return ggml.get(tensor.source_type, engine).tensor_bytes(tensor.shape)


def _asked(engine: Engine, limits: TypeLimits) -> tuple[GgmlType, ...]:
    """Return the types that may be chosen freely."""
    if not limits.types:
        return ggml.default_palette(engine, imatrix=limits.imatrix)
    asked = tuple(ggml.get(name, engine) for name in dict.fromkeys(limits.types))
    for t in asked:
        _require_writable(t, limits, "--types")
    return asked


def _require_writable(t: GgmlType, limits: TypeLimits, flag: str) -> None:
    """Refuse a type that llama-quantize cannot write, or not without a missing imatrix."""
    if not t.writable:
        raise UsageError(f"{flag}: {t.name} is not a type that llama-quantize can write")
    if not limits.imatrix and t.imatrix in ("required", "asserted"):
        raise UsageError(f"{flag}: {t.name} needs an imatrix, but --no-imatrix was given")


def _silent(asked: GgmlType, written: GgmlType) -> bool:
    """Whether an interleaved type would silently become another: such an option is left out."""
    return asked.interleave > 1 and written.name != asked.name


def _row_key(tensor: Tensor) -> tuple[int, int, bool]:
    """What decides the fallback of a tensor: row length, rows, being the embedding."""
    rows = tensor.shape[1] if len(tensor.shape) > 1 else 1
    return tensor.shape[0], rows, tensor.name == "token_embd.weight"


def _written(
    model: Model, engine: Engine, names: tuple[str, ...]
) -> dict[tuple[int, int, bool], dict[str, GgmlType]]:
    """Return per row shape what the engine really writes for each asked-for type."""
    result: dict[tuple[int, int, bool], dict[str, GgmlType]] = {}
    for t in model.tensors:
        key = _row_key(t)
        if not t.quantizable or key in result:
            continue
        result[key] = {}
        for name in names:
            try:
                result[key][name] = ggml.resolve(name, t.name, t.shape, engine)
            except UsageError:
                continue
    return result


def _sizes(columns: Sequence[GgmlType], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Return the bytes of a tensor at every column, 0 where the rows do not divide."""
    return np.array(
        [0 if shape[0] % q.ncols_multiple else q.tensor_bytes(shape) for q in columns],
        dtype=np.int64,
    )


def _rule(
    pattern: str, name: str, engine: Engine, limits: TypeLimits, flag: str
) -> tuple[re.Pattern[str], str]:
    """Compile one `REGEX=TYPE` of the user."""
    _require_writable(ggml.get(name, engine), limits, flag)
    try:
        return re.compile(pattern), name
    except re.error as err:
        raise UsageError(f"{flag} {pattern!r} is not a regular expression: {err}") from None


def _matching(
    model: Model, rule: tuple[re.Pattern[str], str], flag: str, allowed: NDArray[np.bool_]
) -> list[int]:
    """Return the quantizable tensors that a rule matches; none at all is an error."""
    pattern, name = rule
    hits = [
        i
        for i, t in enumerate(model.tensors)
        if allowed[i].any() and pattern.search(t.name) is not None
    ]
    if not hits:
        raise UsageError(
            f"{flag} {pattern.pattern}={name} matches no quantizable tensor of {model.id}: "
            f"see `quantmix inspect {model.id}`"
        )
    return hits


def _pin(
    model: Model,
    pins: Sequence[tuple[re.Pattern[str], str]],
    written: dict[tuple[int, int, bool], dict[str, GgmlType]],
    index: dict[str, int],
    allowed: NDArray[np.bool_],
) -> dict[int, tuple[int, int]]:
    """Leave pinned tensors one option; the first pin that matches wins, as in the engines.

    Returns (pin, column) by tensor.
    """
    done: dict[int, tuple[int, int]] = {}
    for number, (pattern, name) in enumerate(pins):
        hits = [i for i in _matching(model, (pattern, name), "--pin", allowed) if i not in done]
        for i in hits:
            t = model.tensors[i]
            target = written[_row_key(t)].get(name)
            if target is None:
                raise UsageError(f"--pin {name} cannot be written to {t.name}: rows of {t.ncols}")
            allowed[i] = False
            allowed[i, index[target.name]] = True
            done[i] = number, index[target.name]
    return done


def _floor(
    model: Model,
    floors: Sequence[tuple[re.Pattern[str], str]],
    written: dict[tuple[int, int, bool], dict[str, GgmlType]],
    index: dict[str, int],
    damage: NDArray[np.float64],
    allowed: NDArray[np.bool_],
    n_bytes: NDArray[np.int64],
) -> dict[int, list[tuple[int, float]]]:
    """Take away the options of floored tensors that do more damage than the floor type.

    Returns (floor, most damage in nats) by tensor.
    """
    most: dict[int, list[tuple[int, float]]] = {}
    for number, (pattern, name) in enumerate(floors):
        for i in _matching(model, (pattern, name), "--floor", allowed):
            target = written[_row_key(model.tensors[i])].get(name)
            if target is None:
                continue
            worst = damage[i, index[target.name]]
            keep = allowed[i] & (damage[i] <= worst) & (n_bytes[i] > 0)
            if not keep.any():
                keep[index[target.name]] = True
            allowed[i] = keep
            most.setdefault(i, []).append((number, float(worst)))
    return most


def _require_floors(
    model: Model,
    pins: Sequence[tuple[re.Pattern[str], str]],
    floors: Sequence[tuple[re.Pattern[str], str]],
    targets: Mapping[int, tuple[int, int]],
    damage: NDArray[np.float64],
    most: Mapping[int, Sequence[tuple[int, float]]],
) -> None:
    """Refuse a pin that does more damage than a floor on the same tensor lets it."""
    for i, (pin, column) in targets.items():
        for floor, worst in most.get(i, ()):
            if damage[i, column] > worst:
                (one, name), (other, least) = pins[pin], floors[floor]
                raise UsageError(
                    f"--pin {one.pattern}={name} is below --floor {other.pattern}={least} on "
                    f"{model.tensors[i].name}: both cannot hold, drop one"
                )


def _guard(model: Model, columns: Sequence[GgmlType], allowed: NDArray[np.bool_]) -> list[str]:
    """Keep always-active tensors of expert models out of the lowest bits; fix unloaded MTP blocks.

    Single-tensor damage under-measures small tensors that every token passes; where nothing at or
    above the guard is allowed, the best option stays.
    """
    bpw = np.array([t.bpw for t in columns])
    said = []
    if model.hparams.is_moe:
        for i, t in enumerate(model.tensors):
            always = t.role == "token_embd" or (t.loaded and t.active_fraction >= 1.0 - 1e-9)
            if not always or not allowed[i].any():
                continue
            high = allowed[i] & (bpw >= GUARD_BPW)
            allowed[i] = high if high.any() else allowed[i] & (bpw == bpw[allowed[i]].max())
        said.append(f"guard: tensors read for every token at >= {GUARD_BPW:g} bpw")
    unloaded = [i for i, t in enumerate(model.tensors) if not t.loaded and allowed[i].any()]
    for i in unloaded:
        options = np.nonzero(allowed[i])[0]
        best = options[np.argmin(np.abs(bpw[options] - MTP_BPW))]
        allowed[i] = False
        allowed[i, best] = True
    if unloaded:
        said.append(f"MTP block, not loaded: the type nearest to {MTP_BPW:g} bpw")
    return said


def require_types(model: Model, palette: Palette) -> None:
    """Refuse a palette that leaves a tensor without any type.

    Raises:
        UsageError: names the tensor.
    """
    for i, t in enumerate(model.tensors):
        if palette.kept_bytes[i] == 0 and not palette.allowed[i].any():
            raise UsageError(
                f"none of the types fits {t.name} (rows of {t.ncols}): add q8_0 to --types"
            )
