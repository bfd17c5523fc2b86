"""Writing GGUF version 3 headers, and ghosts: files with a true header and no data.

A ghost is truncated to its full size without writing the data (a sparse file): a model of 1 TB
takes some kilobytes of disk, and an engine that only looks at names, shapes and types works on it.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quantmix.errors import UsageError
from quantmix.ggml.header import ARRAY, BOOL, DEFAULT_ALIGNMENT, MAGIC, SCALARS, STRING, Header
from quantmix.ggml.header import tensor_bytes as bytes_of
from quantmix.ggml.types import GgmlType
from quantmix.units import pad

_INT32: Final = 5
_UINT32: Final = 4
_UINT64: Final = 10
_INT64: Final = 11
_FLOAT32: Final = 6


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be described in a header; `shape` in ggml order."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType


@dataclass(frozen=True, slots=True)
class KeyValues:
    """Encoded metadata: how many keys, and their bytes."""

    count: int
    data: bytes


def encode_metadata(metadata: Mapping[str, Any]) -> KeyValues:
    """Encode a mapping: int → u32 (u64 when larger, i64 when negative), float → f32, bool, str.

    Sequences become arrays of i32, f32, bool or strings.

    Raises:
        UsageError: a value of another kind.
    """
    parts = [_string(key) + _value(key, value) for key, value in metadata.items()]
    return KeyValues(len(parts), b"".join(parts))


def copy_metadata(header: Header, drop_prefixes: Sequence[str] = ("split.",)) -> KeyValues:
    """Return the metadata of a header byte for byte, but for keys with these prefixes."""
    kept = [
        header.kv_bytes[start:stop]
        for key, (start, stop) in header.spans.items()
        if not key.startswith(tuple(drop_prefixes))
    ]
    return KeyValues(len(kept), b"".join(kept))


def encode_header(
    kv: KeyValues, tensors: Iterable[NewTensor], alignment: int = DEFAULT_ALIGNMENT
) -> tuple[bytes, int]:
    """Return (header with its padding, bytes of the data that must follow).

    Data lies in the order of `tensors`, each padded to `alignment`, as both engines write it.
    """
    infos, offset, count = [], 0, 0
    for t in tensors:
        dims = struct.pack(f"<I{len(t.shape)}Q", len(t.shape), *t.shape)
        infos.append(_string(t.name) + dims + struct.pack("<IQ", t.type.id, offset))
        offset += pad(bytes_of(t.type, t.shape), alignment)
        count += 1
    head = MAGIC + struct.pack("<IQQ", 3, count, kv.count) + kv.data + b"".join(infos)
    return head.ljust(pad(len(head), alignment), b"\0"), offset


def write_sparse(path: str | Path, head: bytes, data_bytes: int) -> int:
    """Write `head` and a hole of `data_bytes`; return the size of the file.

    Raises:
        UsageError: the disk or file system refuses, for instance sparse files of that size.
    """
    size = len(head) + data_bytes
    try:
        with Path(path).open("wb") as f:
            f.write(head)
            f.flush()
            os.truncate(f.fileno(), size)
    except OSError as err:
        raise UsageError(
            f"cannot write a sparse file of {size} bytes at {path}: {err.strerror or err}; "
            "choose another temporary folder (TMPDIR)"
        ) from err
    return size


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Any) -> bytes:
    """Encode type and value."""
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _string(value)
    if isinstance(value, list | tuple):
        return struct.pack("<I", ARRAY) + _array(key, value)
    kind = _scalar_kind(key, value)
    return struct.pack("<I" + SCALARS[kind], kind, value)


def _array(key: str, items: Sequence[Any]) -> bytes:
    if items and all(isinstance(v, str) for v in items):
        return struct.pack("<IQ", STRING, len(items)) + b"".join(map(_string, items))
    kinds = {_scalar_kind(key, v) for v in items}
    kind = kinds.pop() if len(kinds) == 1 else _INT32
    if kinds or kind in (_UINT32, _INT32):
        kind = _INT32
    try:
        return struct.pack(f"<IQ{len(items)}{SCALARS[kind]}", kind, len(items), *items)
    except struct.error as err:
        raise UsageError(f"metadata {key!r}: the array mixes kinds of values ({err})") from err


def _scalar_kind(key: str, value: Any) -> int:
    if isinstance(value, bool):
        return BOOL
    if isinstance(value, int):
        if value < 0:
            return _INT64
        return _UINT32 if value < 1 << 32 else _UINT64
    if isinstance(value, float):
        return _FLOAT32
    raise UsageError(f"metadata {key!r}: a value of type {type(value).__name__} has no GGUF form")
