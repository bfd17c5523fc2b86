"""Weights that were trained on a coarse grid, which a quant type can store as they are.

The routed experts of Kimi-K2-Thinking and its successors are trained in 4 bits: one scale per 32
weights, levels -7 to 7 (llama.cpp PR 17064). Such a block fits q4_0, and with an importance matrix
both engines find it: the search over scales of `quantize_q4_0` hits the grid, and what remains is
the rounding of the scale to 16 bits, 1e-6 of the square of the weights (tests quantize such weights
with the real libraries). Without a matrix the largest weight is put at -8, the levels are missed,
and q4_0 loses what it loses elsewhere; people patch that line of ggml to get the same file.

Every larger type holds the same weights less well, so a design never needs one for these tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from quantmix.ggml.header import TensorInfo
from quantmix.models.model import Model, Tensor

GRID_TYPE: Final = "q4_0"
"""The type whose blocks are such groups: 32 weights, one scale, levels up to 7."""

_GROUP: Final = 32
_TOP_LEVEL: Final = 7
# A bf16 weight over a bf16 largest one is off by 2 · 2⁻⁹ at most, at level 7 by 0.027.
_TOLERANCE: Final = 0.04
_SAMPLE: Final = 2048
_ENOUGH_GROUPS: Final = 16
_FLOATS: Final = {"f32": 4, "f16": 2, "bf16": 2}


class StoredData(NamedTuple):
    """Where the data of a tensor lies: file, absolute offset in bytes, header entry."""

    file: Path
    offset: int
    info: TensorInfo


def mark(model: Model, exact: Mapping[str, str]) -> Model:
    """Return the model with `exact_type` set by role (role → type), and a note for people."""
    if not exact:
        return model
    tensors = tuple(
        replace(t, exact_type=exact[t.role]) if t.quantizable and t.role in exact else t
        for t in model.tensors
    )
    marked = replace(model, tensors=tensors)
    return replace(marked, notes=(*model.notes, *notes(marked)))


def notes(model: Model) -> tuple[str, ...]:
    """Return what a design should say of weights that a smaller type holds as they are."""
    exact = {t.role: t.exact_type for t in model.tensors if t.exact_type not in ("", t.source_type)}
    if not exact:
        return ()
    return (
        f"{', '.join(sorted(exact))} were trained in 4 bits: "
        f"{', '.join(sorted(set(exact.values())))} made with an importance matrix holds them as "
        "they are, larger types only take more room",
    )


def expert_roles(model: Model, exact_type: str) -> dict[str, str]:
    """Return `exact_type` for every role of routed experts, nothing when it is empty."""
    roles = sorted({t.role for t in model.tensors if t.role.endswith("_exps") and t.quantizable})
    return dict.fromkeys(roles, exact_type) if exact_type else {}


def on_grid(weights: NDArray[np.float32]) -> bool | None:
    """Whether groups of 32 weights are multiples of their largest over 7; None when too few tell.

    Args:
        weights: shape (n,), n a multiple of 32; groups of zeros say nothing.
    """
    groups = weights.reshape(-1, _GROUP).astype(np.float64)
    top = np.abs(groups).max(axis=1)
    if not np.isfinite(top).all():
        return False
    groups, top = groups[top > 0.0], top[top > 0.0]
    if len(groups) < _ENOUGH_GROUPS:
        return None
    levels = groups * (_TOP_LEVEL / top[:, None])
    return bool((np.abs(levels - np.rint(levels)) < _TOLERANCE).all())


def roles_on_grid(tensors: Iterable[Tensor], stored: Mapping[str, StoredData]) -> dict[str, bool]:
    """Say by role whether the weights of a file lie on the grid, from samples of its data.

    Of each role the first, the middle and the last tensor are looked at, at two places each. Roles
    whose data says nothing (quantized, zeros as in a ghost, unreadable) are left out.
    """
    by_role: dict[str, list[str]] = {}
    for t in tensors:
        if (
            t.quantizable
            and t.source_type in _FLOATS
            and t.ncols % _GROUP == 0
            and t.name in stored
        ):
            by_role.setdefault(t.role, []).append(t.name)
    found: dict[str, bool] = {}
    for role, names in by_role.items():
        said = [
            on_grid(sample)
            for name in dict.fromkeys((names[0], names[len(names) // 2], names[-1]))
            for sample in _samples(stored[name])
        ]
        if any(s is not None for s in said):
            found[role] = all(s is not False for s in said)
    return found


def _samples(data: StoredData) -> list[NDArray[np.float32]]:
    """Return weights from the beginning and the middle of a tensor, none when unreadable."""
    file, offset, info = data
    size = _FLOATS[info.type.name]
    n = info.n_bytes // size
    take = min(_SAMPLE, n) // _GROUP * _GROUP
    out = []
    try:
        with file.open("rb") as f:
            for start in dict.fromkeys((0, n // 2 // _GROUP * _GROUP)):
                f.seek(offset + start * size)
                raw = np.frombuffer(f.read(min(take, n - start) * size), np.uint8)
                whole = raw[: len(raw) // (size * _GROUP) * size * _GROUP]
                out.append(decode_floats(whole, info.type.name))
    except OSError:
        return []
    return out


def decode_floats(raw: NDArray[np.uint8], kind: str) -> NDArray[np.float32]:
    """Return f32, f16 or bf16 bytes as float32, shape (n,)."""
    if kind == "bf16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(np.float16 if kind == "f16" else np.float32).astype(np.float32, copy=False)
