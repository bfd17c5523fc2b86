"""Ghosts of models: a true header, no data, for dry runs of the real engines.

Why, and how they are used: docs/architecture.md, the ghost check.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from quantmix.errors import UsageError
from quantmix.ggml.header import Header
from quantmix.ggml.types import Engine, get
from quantmix.ggml.writer import (
    KeyValues,
    NewTensor,
    copy_metadata,
    encode_header,
    encode_metadata,
    write_sparse,
)
from quantmix.models.metadata import gguf_metadata
from quantmix.models.model import Model, Tensor

# ik validates float data (it would read the whole hole) and newer builds skip integer types; for
# this bitnet type there is nothing to validate and both quantize it. mainline reads no data at all.
GHOST_TYPE: Final[dict[Engine, str]] = {"ik": "iq2_bn", "mainline": "bf16"}


def write_ghost(
    path: str | Path,
    model: Model,
    type_of: Mapping[str, str] | Callable[[Tensor], str] | None = None,
    *,
    engine: Engine = "ik",
    header: Header | None = None,
) -> int:
    """Write a ghost of `model` and return the size of the (sparse) file in bytes.

    Args:
        type_of: type of each tensor, by name or by function; None gives a dry-run source: every
            quantizable tensor in the engine's ghost type, all others f32.
        header: a real header whose metadata is copied (vocabulary and all), else it is made from
            the hyper-parameters.

    Raises:
        UsageError: a tensor has no type, or its rows do not fit the type.
    """
    kv = copy_metadata(header) if header else encode_metadata(gguf_metadata(model))
    head, data_bytes = ghost_header(model, type_of, engine=engine, kv=kv)
    return write_sparse(path, head, data_bytes)


def ghost_header(
    model: Model,
    type_of: Mapping[str, str] | Callable[[Tensor], str] | None,
    *,
    engine: Engine,
    kv: KeyValues,
) -> tuple[bytes, int]:
    """Return (header bytes, data bytes) of a ghost, without writing it.

    Raises:
        UsageError: a tensor has no type, or its rows do not fit the type.
    """
    tensors = [
        NewTensor(t.name, t.shape, get(_type_name(t, type_of, engine), engine))
        for t in model.tensors
    ]
    return encode_header(kv, tensors)


def _type_name(
    t: Tensor, type_of: Mapping[str, str] | Callable[[Tensor], str] | None, engine: Engine
) -> str:
    if type_of is None:
        return GHOST_TYPE[engine] if t.quantizable else "f32"
    if callable(type_of):
        return type_of(t)
    if t.name not in type_of:
        raise UsageError(f"no type is given for {t.name} of the ghost: name every tensor")
    return type_of[t.name]
