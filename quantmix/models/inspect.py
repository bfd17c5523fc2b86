"""What a model is made of: bytes per tensor, role and layer, as stored or at any type."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Final, Literal

from quantmix.errors import UnknownName
from quantmix.ggml.header import tensor_bytes
from quantmix.ggml.types import Engine, GgmlType, get, resolve, table
from quantmix.models.model import Model, Tensor

Grouping = Literal["role", "layer", "tensor"]
GROUPINGS: Final[tuple[Grouping, ...]] = ("role", "layer", "tensor")
SORTS: Final = ("file", "name", "bytes", "elements", "active")


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor with the type it has, or would get, and its bytes."""

    tensor: Tensor
    type: str
    n_bytes: int

    def to_json(self) -> dict[str, Any]:
        """Return the object of `inspect --json`."""
        t = self.tensor
        return {
            "name": t.name,
            "shape": list(t.shape),
            "type": self.type,
            "role": t.role,
            "layer": t.layer,
            "n_elements": t.n_elements,
            "bytes": self.n_bytes,
            "active_fraction": t.active_fraction,
            "quantizable": t.quantizable,
            "loaded": t.loaded,
        }


@dataclass(frozen=True, slots=True)
class Group:
    """Sums over tensors; `types` counts them per type; `active_bytes` is read per token."""

    name: str
    n_tensors: int
    n_elements: int
    n_bytes: int
    active_bytes: int
    types: dict[str, int]
    first: int

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.n_bytes / self.n_elements

    def to_json(self) -> dict[str, Any]:
        """Return the object of `inspect --json`."""
        return {
            "name": self.name,
            "n_tensors": self.n_tensors,
            "n_elements": self.n_elements,
            "bytes": self.n_bytes,
            "active_bytes": self.active_bytes,
            "bpw": self.bpw,
            "types": self.types,
        }


def rows_of(model: Model, at: str | None = None, engine: Engine = "ik") -> tuple[Row, ...]:
    """Return every tensor with its stored type, or with what `engine` writes when asked for `at`.

    Raises:
        UnknownName: `at` is no type of the engine.
        UsageError: the engine has no way to write `at` to some tensor.
    """
    return tuple(_row(t, at, engine) for t in model.tensors)


def stored_type(name: str) -> GgmlType:
    """Return a type by name whichever engine knows it.

    Raises:
        UnknownName: neither does.
    """
    for engine in ("ik", "mainline"):
        if name in table(engine):
            return get(name, engine)
    raise UnknownName.of("type", name, table("ik"))


def group(rows: Iterable[Row], by: Grouping) -> tuple[Group, ...]:
    """Sum rows by role or layer (tensors outside the blocks as `-`), or one group per tensor."""
    found: dict[str, list[Row]] = {}
    first: dict[str, int] = {}
    for i, row in enumerate(rows):
        key = _key(row.tensor, by)
        found.setdefault(key, []).append(row)
        first.setdefault(key, i)
    return tuple(_sum(key, members, first[key]) for key, members in found.items())


def total(rows: Iterable[Row]) -> Group:
    """Sum all rows."""
    return _sum("total", list(rows), 0)


def sort_groups(groups: Iterable[Group], by: str) -> tuple[Group, ...]:
    """Order groups: as in the file, by name, or largest first.

    Raises:
        UnknownName: `by` is no order.
    """
    keys: dict[str, Any] = {
        "file": lambda g: g.first,
        "name": lambda g: _natural(g.name),
        "bytes": lambda g: (-g.n_bytes, g.first),
        "elements": lambda g: (-g.n_elements, g.first),
        "active": lambda g: (-g.active_bytes, g.first),
    }
    if by not in keys:
        raise UnknownName.of("order", by, SORTS, "one of " + ", ".join(SORTS))
    return tuple(sorted(groups, key=keys[by]))


def _row(t: Tensor, at: str | None, engine: Engine) -> Row:
    if at is None or not t.quantizable:
        kind = stored_type(t.source_type)
    else:
        kind = resolve(at, t.name, t.shape, engine)
    return Row(t, kind.name, tensor_bytes(kind, t.shape))


def _key(t: Tensor, by: Grouping) -> str:
    if by == "tensor":
        return t.name
    if by == "role":
        return t.role
    return "-" if t.layer is None else str(t.layer)


def _sum(name: str, members: list[Row], first: int) -> Group:
    types: dict[str, int] = {}
    for row in members:
        types[row.type] = types.get(row.type, 0) + 1
    return Group(
        name=name,
        n_tensors=len(members),
        n_elements=sum(r.tensor.n_elements for r in members),
        n_bytes=sum(r.n_bytes for r in members),
        active_bytes=round(sum(r.n_bytes * r.tensor.active_fraction for r in members)),
        types=types,
        first=first,
    )


def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Order `blk.2.x` before `blk.10.x`."""
    return tuple((0, int(p)) if p.isdecimal() else (1, p) for p in name.split("."))
