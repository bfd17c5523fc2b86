"""Two mixes side by side: types, bytes and predicted damage, per tensor, role and layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantmix import recipe as recipes
from quantmix.clone import as_source, import_rules, layout_named_in, model_named_in, planned
from quantmix.errors import SourceMismatch, UsageError
from quantmix.ggml.header import is_gguf
from quantmix.ggml.types import Engine
from quantmix.models.inspect import stored_type
from quantmix.models.sources import load_model
from quantmix.recipe import PlannedTensor


@dataclass(frozen=True)
class Side:
    """One of the two mixes."""

    label: str
    tensors: tuple[PlannedTensor, ...]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(t.bytes for t in self.tensors)

    @property
    def damage(self) -> float:
        """Predicted damage in nats."""
        return sum(t.damage for t in self.tensors)


@dataclass(frozen=True, slots=True)
class Change:
    """A tensor whose type differs."""

    a: PlannedTensor
    b: PlannedTensor


@dataclass(frozen=True, slots=True)
class Line:
    """Sums of one role or layer on both sides; types count tensors."""

    name: str
    a_bytes: int
    b_bytes: int
    a_damage: float
    b_damage: float
    a_types: dict[str, int]
    b_types: dict[str, int]
    n_changed: int


@dataclass(frozen=True)
class Difference:
    """What differs between two mixes of one model."""

    a: Side
    b: Side
    changes: tuple[Change, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    roles: tuple[Line, ...]
    layers: tuple[Line, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the document of `diff --json`."""
        return {
            "a": _side_json(self.a),
            "b": _side_json(self.b),
            "changed": [
                {
                    "tensor": c.a.name,
                    "role": c.a.role,
                    "layer": c.a.layer,
                    "a_type": c.a.type,
                    "b_type": c.b.type,
                    "a_bytes": c.a.bytes,
                    "b_bytes": c.b.bytes,
                    "a_damage": c.a.damage,
                    "b_damage": c.b.damage,
                }
                for c in self.changes
            ],
            "only_a": list(self.only_a),
            "only_b": list(self.only_b),
            "roles": [_line_json(line) for line in self.roles],
            "layers": [_line_json(line) for line in self.layers],
        }


def load_side(spec: str, *, model: str | None = None, engine: Engine = "ik") -> Side:
    """Return a mix: a recipe (folder or recipe.json), a rules file of `model`, or a GGUF.

    A recipe keeps the damage it was designed with; the others get today's prediction.

    Raises:
        BadFile: it cannot be read.
        UsageError: a rules file without a model.
    """
    from quantmix.loss import load as load_loss

    path = Path(spec).expanduser()
    if path.suffix == ".json" or (path / "recipe.json").is_file():
        found = recipes.load(path)
        return Side(found.name or spec, found.tensors)
    if path.is_file() and path.suffix != ".gguf" and not is_gguf(path):
        named = model or model_named_in(path)
        if named is None:
            raise UsageError(f"{spec} is a rules file: say which model it is for with --model")
        layout = None if model else layout_named_in(path)
        return Side(path.name, import_rules(path, load_model(named, layout=layout), engine).tensors)
    stored = load_model(spec)
    written = {t.name: stored_type(t.source_type) for t in stored.tensors if t.quantizable}
    base = as_source(stored)
    return Side(spec, planned(base, written, load_loss(base, engine=engine)))


def diff(a: Side, b: Side) -> Difference:
    """Return what differs.

    Raises:
        SourceMismatch: the sides share no tensors, or one has another shape.
    """
    in_a, in_b = {t.name: t for t in a.tensors}, {t.name: t for t in b.tensors}
    shared = [n for n in in_a if n in in_b]
    if not shared:
        raise SourceMismatch(f"{a.label} and {b.label} share no tensor: not the same model")
    for n in shared:
        if in_a[n].shape != in_b[n].shape:
            raise SourceMismatch(
                f"{n} is {_shape(in_a[n])} in {a.label} and {_shape(in_b[n])} in {b.label}: "
                "not the same model"
            )
    pairs = (Change(in_a[n], in_b[n]) for n in shared)
    changes = tuple(c for c in pairs if c.a.type != c.b.type)
    return Difference(
        a=a,
        b=b,
        changes=changes,
        only_a=tuple(n for n in in_a if n not in in_b),
        only_b=tuple(n for n in in_b if n not in in_a),
        roles=_lines(a, b, changes, lambda t: t.role),
        layers=_lines(a, b, changes, lambda t: "-" if t.layer is None else str(t.layer)),
    )


def _lines(
    a: Side, b: Side, changes: Iterable[Change], key: Callable[[PlannedTensor], str]
) -> tuple[Line, ...]:
    names = list(dict.fromkeys(key(t) for t in (*a.tensors, *b.tensors)))
    names.sort(key=lambda n: int(n) if n.isdecimal() else -1)
    changed = [key(c.a) for c in changes]
    sums = {n: (_sum(a, key, n), _sum(b, key, n)) for n in names}
    return tuple(
        Line(
            name=n,
            a_bytes=sums[n][0][0],
            b_bytes=sums[n][1][0],
            a_damage=sums[n][0][1],
            b_damage=sums[n][1][1],
            a_types=sums[n][0][2],
            b_types=sums[n][1][2],
            n_changed=changed.count(n),
        )
        for n in names
    )


def _sum(
    side: Side, key: Callable[[PlannedTensor], str], name: str
) -> tuple[int, float, dict[str, int]]:
    mine = [t for t in side.tensors if key(t) == name]
    types: dict[str, int] = {}
    for t in mine:
        types[t.type] = types.get(t.type, 0) + 1
    return sum(t.bytes for t in mine), sum(t.damage for t in mine), types


def _side_json(side: Side) -> dict[str, Any]:
    n = sum(t.n_elements for t in side.tensors)
    return {
        "label": side.label,
        "n_tensors": len(side.tensors),
        "tensor_bytes": side.n_bytes,
        "bpw": 8 * side.n_bytes / n if n else 0.0,
        "damage": side.damage,
    }


def _line_json(line: Line) -> dict[str, Any]:
    return {
        "name": line.name,
        "n_changed": line.n_changed,
        "a": {"bytes": line.a_bytes, "damage": line.a_damage, "types": line.a_types},
        "b": {"bytes": line.b_bytes, "damage": line.b_damage, "types": line.b_types},
    }


def _shape(t: PlannedTensor) -> str:
    return "x".join(map(str, t.shape))
