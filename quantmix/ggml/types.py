"""Every ggml type of both engines: exact sizes, fallbacks, what it may be used for.

The facts are rows of `types.csv` beside this module, one per (engine, type) with their source;
a test compares every row with the engine's own library.

    row_bytes    = row_meta + type_size * ncols / block_size     (ncols must divide)
    tensor_bytes = row_bytes * ne1 * ne2 * ne3                   (ggml_row_size, ggml_nbytes)
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from math import prod
from typing import Final, Literal

from quantmix.errors import UnknownName, UsageError

Engine = Literal["ik", "mainline"]
ImatrixNeed = Literal["no", "advised", "required", "asserted"]
FLOATS: Final = frozenset({"f32", "f16", "bf16"})
"""Types of weights, and of a KV cache, that nobody quantized."""
ENGINES: Final[tuple[Engine, ...]] = ("ik", "mainline")

# The interleaved types that have CUDA kernels and no better non-interleaved twin
# (docs/architecture.md, fact 9).
_DEFAULT_INTERLEAVED: Final = frozenset({"iq1_s_r4", "iq1_m_r4"})
# mainline writes f16 where even blocks of this size do not divide (tensor_type_fallback).
_F16_BLOCK: Final = 32


@dataclass(frozen=True, slots=True)
class GgmlType:
    """One ggml type as one engine knows it.

    Attributes:
        name: exactly as the engine spells it (case matters to ik's `--custom-q`).
        id: enum value; the same number may mean another type in the other engine.
        block_size, type_size, row_meta: weights per block, bytes per block, extra bytes per row.
        interleave: rows packed together; `ne1` must be a multiple, else `base` is written.
        ncols_multiple: row lengths must be a multiple of it, else `fallback` is written.
        fallback: type that the engine silently writes instead; empty when it does not check.
        base: the non-interleaved form (itself when not interleaved).
        imatrix: `no`, `advised`, `required` (llama-quantize refuses without one, embedding and head
            exempt) or `asserted` (ggml itself aborts without one).
        writable: whether a real quantization run can write it.
        cuda, mmq: has a CUDA matmul kernel; has the fast prompt kernel (MMQ).
        slow_cpu: decoding it on a CPU is bound by compute, not by memory bandwidth.
        cpu_gparams: weights that one Zen 4 core decodes, 1e9 per second; None: bandwidth decides.
        family: `float`, `legacy`, `k`, `iq`, `iqk`, `trellis`, `ternary` or `internal`.
    """

    name: str
    id: int
    engine: Engine
    block_size: int
    type_size: int
    row_meta: int
    interleave: int
    ncols_multiple: int
    fallback: str
    base: str
    imatrix: ImatrixNeed
    writable: bool
    cuda: bool
    mmq: bool
    slow_cpu: bool
    cpu_gparams: float | None
    family: str
    source: str

    @property
    def is_quantized(self) -> bool:
        """Whether it is not a plain float or integer."""
        return self.family not in ("float", "internal")

    @property
    def bpw(self) -> float:
        """Nominal bits per weight, row metadata left out."""
        return 8 * self.type_size / self.block_size

    def row_bytes(self, ncols: int) -> int:
        """Bytes of one row of `ncols` weights.

        Raises:
            UsageError: `ncols` is not a multiple of the block.
        """
        if ncols % self.block_size:
            raise UsageError(
                f"{self.name} packs {self.block_size} weights per block: "
                f"a row of {ncols} does not divide"
            )
        return self.row_meta + self.type_size * (ncols // self.block_size)

    def tensor_bytes(self, shape: Iterable[int]) -> int:
        """Bytes of a tensor of `shape` (ggml order, row length first), without file padding."""
        ncols, *rest = shape
        return self.row_bytes(ncols) * prod(rest)


@cache
def table(engine: Engine = "ik") -> dict[str, GgmlType]:
    """Return the types of `engine` by name, in enum order."""
    text = (files("quantmix.ggml") / "types.csv").read_text(encoding="utf-8")
    rows = [r for r in csv.DictReader(text.splitlines()) if r["engine"] == engine]
    parsed = [
        GgmlType(
            name=r["name"],
            id=int(r["id"]),
            engine=engine,
            block_size=int(r["block_size"]),
            type_size=int(r["type_size"]),
            row_meta=int(r["row_meta"]),
            interleave=int(r["interleave"]),
            ncols_multiple=int(r["ncols_multiple"]),
            fallback=r["fallback"],
            base=r["base"],
            imatrix=r["imatrix"],  # type: ignore[arg-type]
            writable=r["writable"] == "yes",
            cuda=r["cuda"] == "yes",
            mmq=r["mmq"] == "yes",
            slow_cpu=r["cpu_decode"] == "slow",
            cpu_gparams=float(r["cpu_gparams"]) if r["cpu_gparams"] else None,
            family=r["family"],
            source=r["source"],
        )
        for r in rows
    ]
    return {t.name: t for t in sorted(parsed, key=lambda t: t.id)}


@cache
def by_id(engine: Engine = "ik") -> dict[int, GgmlType]:
    """Return the types of `engine` by enum value."""
    return {t.id: t for t in table(engine).values()}


def get(name: str, engine: Engine = "ik") -> GgmlType:
    """Return one type by its exact name.

    Raises:
        UnknownName: no such type; the message suggests the exact spelling.
    """
    known = table(engine)
    if name not in known:
        other: Engine = "mainline" if engine == "ik" else "ik"
        if name in table(other):
            raise UnknownName(
                f"{name} is a type of {other} only: see `quantmix types` for {engine}'s"
            )
        raise UnknownName.of(f"type for {engine}", name, known, "see `quantmix types`")
    return known[name]


def drop_ones(shape: Iterable[int]) -> tuple[int, ...]:
    """Return a shape in ggml order without trailing ones; at least one dimension stays."""
    dims = list(shape)
    while len(dims) > 1 and dims[-1] == 1:
        dims.pop()
    return tuple(dims)


def spelled(name: str, engine: Engine = "ik") -> str:
    """Return a type's name as the engine spells it when it is given in another case, else as is."""
    known = table(engine)
    if name in known:
        return name
    return next((k for k in known if k.lower() == name.lower()), name)


def resolve(name: str, tensor: str, shape: tuple[int, ...], engine: Engine = "ik") -> GgmlType:
    """Return the type that `engine` really writes when asked for `name` on a tensor.

    The column check comes first, then the replacement of interleaved types (embedding, or rows
    that do not divide), without a second column check, as in the engines
    (ik: change_type_if_necessary, interleaved_properties; mainline: tensor_type_fallback).

    Raises:
        UsageError: the engine would abort, or write a malformed tensor.
    """
    qtype = get(name, engine)
    ncols = shape[0]
    nrows = shape[1] if len(shape) > 1 else 1
    if ncols % qtype.ncols_multiple and qtype.fallback:
        qtype = get(qtype.fallback, engine)
    if engine == "mainline" and ncols % qtype.block_size and qtype.block_size <= _F16_BLOCK:
        qtype = get("f16", engine)
    if qtype.interleave > 1 and (tensor == "token_embd.weight" or nrows % qtype.interleave):
        qtype = get(qtype.base, engine)
    if ncols % qtype.ncols_multiple:
        raise UsageError(
            f"{name} cannot be written to {tensor}: rows of {ncols} are not a multiple of "
            f"{qtype.ncols_multiple} and {engine} has no fallback for it"
        )
    return qtype


def default_palette(engine: Engine = "ik", *, imatrix: bool = True) -> tuple[GgmlType, ...]:
    """Return the types a design may use unless told otherwise, in enum order.

    Left out: floats, ternary and bitnet types (useless on ordinary weights), types that cannot
    be written, types without a CUDA kernel, interleaved ones but for iq1_s_r4 and iq1_m_r4, and
    without an imatrix those that need one.
    """
    return tuple(
        t
        for t in table(engine).values()
        if t.is_quantized
        and t.writable
        and t.cuda
        and t.family != "ternary"
        and (t.interleave == 1 or t.name in _DEFAULT_INTERLEAVED)
        and (imatrix or t.imatrix in ("no", "advised"))
    )
