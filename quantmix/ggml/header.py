"""GGUF headers: every value type, versions 2 and 3, the types of both engines, no tensor data.

Files come from anywhere, so nothing in them is believed: every count is checked against the bytes
that are there before anything is allocated, and a header may hold at most
`cursor.MAX_HEADER_BYTES`. Arrays are walked, not decoded (a vocabulary of 150,000 words costs a few
hundredths of a second); `RawArray.tolist` decodes one on demand.

Layout (ggml docs/gguf.md): magic, version u32, n_tensors u64, n_kv u64, then per key: name,
value type u32, value; then per tensor: name, n_dims u32, dims u64 each, type u32, offset u64;
padding to `general.alignment`; data.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, Final

from quantmix.errors import BadFile, UsageError
from quantmix.ggml.bytesource import ByteSource, open_file
from quantmix.ggml.cursor import Cursor
from quantmix.ggml.types import GgmlType, by_id
from quantmix.units import pad

MAGIC: Final = b"GGUF"
DEFAULT_ALIGNMENT: Final = 32
MAX_STRING_BYTES: Final = 8 << 20  # chat templates are the longest strings, below 0.2 MB
MAX_TENSORS: Final = 131_072
MAX_KEYS: Final = 65_536
MAX_NAME_BYTES: Final = 63  # ggml.h GGML_MAX_NAME is 64, the zero at the end included
MAX_DIMS: Final = 4  # ggml.h GGML_MAX_DIMS
_MAX_KEY_BYTES: Final = 65_535  # docs/gguf.md

STRING: Final = 8
ARRAY: Final = 9
BOOL: Final = 7
# Value type → struct code (docs/gguf.md, gguf_metadata_value_type).
SCALARS: Final = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_U32: Final = struct.Struct("<I")
_U64: Final = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class RawArray:
    """An array value left undecoded: item type, count, its bytes after the count."""

    item_type: int
    count: int
    data: bytes = field(repr=False)

    def __len__(self) -> int:
        return self.count

    def tolist(self) -> list[Any]:
        """Decode; strings that are not UTF-8 keep a replacement mark. Nested arrays nest."""
        return self._decode(0)[0]

    def _decode(self, at: int) -> tuple[list[Any], int]:
        if self.item_type in SCALARS:
            form = f"<{self.count}{SCALARS[self.item_type]}"
            return list(struct.unpack_from(form, self.data, at)), at + struct.calcsize(form)
        items: list[Any] = []
        for _ in range(self.count):
            if self.item_type == STRING:
                (n,) = _U64.unpack_from(self.data, at)
                items.append(self.data[at + 8 : at + 8 + n].decode("utf-8", "replace"))
                at += 8 + n
            else:
                (kind,) = _U32.unpack_from(self.data, at)
                (n,) = _U64.unpack_from(self.data, at + 4)
                inner, at = RawArray(kind, n, self.data)._decode(at + 12)
                items.append(inner)
        return items, at


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a header; `shape` in ggml order as stored, `offset` from the data start."""

    name: str
    shape: tuple[int, ...]
    type: GgmlType
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """A parsed header.

    Attributes:
        metadata: key → scalar, str or RawArray, in file order.
        spans: key → (start, stop) of its bytes in `kv_bytes`, name included.
        data_offset: bytes of header and padding before the first tensor.
        file_bytes: size of the file, None when unknown.
    """

    name: str
    version: int
    metadata: dict[str, Any]
    tensors: tuple[TensorInfo, ...]
    alignment: int
    data_offset: int
    file_bytes: int | None
    kv_bytes: bytes = field(repr=False)
    spans: dict[str, tuple[int, int]] = field(repr=False)

    def list_of(self, key: str) -> list[Any]:
        """Return the decoded array at `key`, empty when it is absent or not an array."""
        value = self.metadata.get(key)
        return value.tolist() if isinstance(value, RawArray) else []

    def int_of(self, key: str) -> int | None:
        """Return the whole number at `key`, None when it is absent.

        Raises:
            BadFile: something else is there.
        """
        value = self.metadata.get(key)
        if value is None or type(value) is int:
            return value
        shown = "an array" if isinstance(value, RawArray) else f"{value!r:.40}"
        raise BadFile(f"{self.name}: {key} is {shown}, no whole number")


def is_gguf(path: str | Path) -> bool:
    """Whether a file is a GGUF, by its first bytes."""
    with Path(path).open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def read_header(path: str | Path) -> Header:
    """Read the header of one local GGUF file (of one shard only, when it is split).

    Raises:
        BadFile: missing, truncated, lying or not GGUF; the message says what and where.
    """
    return parse(open_file(path))


def parse(source: ByteSource, *, check_data: bool = True) -> Header:
    """Parse a header from any source.

    Args:
        check_data: also require that the tensor data lies inside the file.

    Raises:
        BadFile: truncated, lying or not GGUF.
    """
    reader = Cursor(source)
    version, n_tensors, n_kv = _preamble(reader)
    start = reader.pos
    values, spans = _metadata(reader, n_kv)
    kv_bytes = reader.slice(start, reader.pos)
    spans = {k: (a - start, b - start) for k, (a, b) in spans.items()}
    metadata = {
        k: RawArray(v.item_type, v.count, kv_bytes[v.at - start : v.end - start])
        if isinstance(v, _Span)
        else v
        for k, v in values.items()
    }
    alignment = _alignment(source.name, metadata)
    tensors = _tensors(reader, n_tensors, alignment)
    data_offset = pad(reader.pos, alignment)
    if check_data:
        _check_data(source, tensors, data_offset)
    return Header(
        name=source.name,
        version=version,
        metadata=metadata,
        tensors=tensors,
        alignment=alignment,
        data_offset=data_offset,
        file_bytes=source.size,
        kv_bytes=kv_bytes,
        spans=spans,
    )


@cache
def type_of_id(type_id: int) -> GgmlType | None:
    """Return the type with this enum value: ik's table first, then mainline's; no id collides."""
    return by_id("ik").get(type_id) or by_id("mainline").get(type_id)


def tensor_bytes(kind: GgmlType, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor; `i2_s` has one scale for the whole tensor (ggml_nbytes).

    Raises:
        UsageError: rows do not divide into blocks.
    """
    if kind.name == "i2_s":
        return prod(shape) // 4 + 32
    return kind.tensor_bytes(shape)


@dataclass(frozen=True, slots=True)
class _Span:
    """An array found while reading: item type, count and where its bytes lie."""

    item_type: int
    count: int
    at: int
    end: int


def _preamble(r: Cursor) -> tuple[int, int, int]:
    """Read magic, version and the two counts."""
    if r.source.size == 0:
        raise BadFile(f"{r.source.name} is empty")
    if r.source.size is not None and r.source.size < 24:
        raise BadFile(f"{r.source.name} is too short for a GGUF file ({r.source.size} bytes)")
    r.need(24)
    if r.buf[:4] != MAGIC:
        raise BadFile(f"{r.source.name} is not a GGUF file: it begins with {bytes(r.buf[:4])!r}")
    r.pos = 4
    version = r.scalar("I")
    if version in (0x02000000, 0x03000000):
        raise BadFile(f"{r.source.name} is a big-endian GGUF file: convert it to little-endian")
    if version not in (2, 3):
        raise BadFile(f"{r.source.name} is GGUF version {version}: only 2 and 3 are read")
    n_tensors, n_kv = r.scalar("Q"), r.scalar("Q")
    counts = ((8, n_tensors, "tensors", MAX_TENSORS), (16, n_kv, "metadata keys", MAX_KEYS))
    for at, n, what, limit in counts:
        if n > limit:
            raise BadFile(f"{r.source.name}: it claims {n} {what} at byte {at} (at most {limit})")
    return version, n_tensors, n_kv


def _metadata(r: Cursor, n_kv: int) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Read all keys; arrays stay `_Span`s."""
    r.what = "the metadata"
    r.need(r.pos + 12 * n_kv)
    values: dict[str, Any] = {}
    spans: dict[str, tuple[int, int]] = {}
    for i in range(n_kv):
        r.what = f"metadata key {i + 1} of {n_kv}"
        start = r.pos
        key = _text(r, r.string(_MAX_KEY_BYTES), "key")
        if key in values:
            raise r.fail(f"the key {key!r} twice")
        r.what = f"metadata key {key[:80]!r}"
        values[key] = _value(r, r.scalar("I"))
        spans[key] = (start, r.pos)
    return values, spans


def _value(r: Cursor, kind: int) -> Any:
    """Read one value of type `kind`."""
    if kind in SCALARS:
        return r.scalar(SCALARS[kind])
    if kind == STRING:
        return r.string(MAX_STRING_BYTES).decode("utf-8", "replace")
    if kind == ARRAY:
        item, count = r.scalar("I"), r.scalar("Q")
        at = r.pos
        _skip_array(r, item, count, depth=1)
        return _Span(item, count, at, r.pos)
    raise r.fail(f"unknown value type {kind}")


def _skip_array(r: Cursor, item: int, count: int, depth: int) -> None:
    """Step over the items of an array."""
    if item in SCALARS:
        r.skip(count, struct.calcsize("<" + SCALARS[item]))
    elif item == STRING:
        r.skip_strings(count)
    elif item == ARRAY and depth < 3:
        r.need(r.pos + 12 * count)
        for _ in range(count):
            _skip_array(r, r.scalar("I"), r.scalar("Q"), depth + 1)
    else:
        raise r.fail(f"an array of unknown type {item}" if item != ARRAY else "nested arrays")


def _text(r: Cursor, raw: bytes, what: str) -> str:
    """Decode a name, which must be UTF-8 and printable enough to show."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise r.fail(f"a {what} that is not UTF-8 ({raw[:40]!r})") from None
    if not text or "\0" in text:
        raise r.fail(f"an empty or zero-holding {what} ({raw[:40]!r})")
    return text


def _alignment(name: str, metadata: dict[str, Any]) -> int:
    """Return `general.alignment`, checked."""
    value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(value) is not int or not 8 <= value <= 1 << 20 or value & (value - 1):
        raise BadFile(f"{name}: general.alignment is {value!r}, not a power of two from 8 to 2^20")
    return value


def _tensors(r: Cursor, n_tensors: int, alignment: int) -> tuple[TensorInfo, ...]:
    """Read all tensor infos."""
    r.what = "the tensor list"
    r.need(r.pos + 32 * n_tensors)
    infos: list[TensorInfo] = []
    seen: set[str] = set()
    for i in range(n_tensors):
        r.what = f"tensor {i + 1} of {n_tensors}"
        name = _text(r, r.string(MAX_NAME_BYTES), "tensor name")
        if name in seen:
            raise r.fail(f"the tensor {name!r} twice")
        seen.add(name)
        r.what = f"tensor {name!r}"
        n_dims = r.scalar("I")
        if not 1 <= n_dims <= MAX_DIMS:
            raise r.fail(f"{n_dims} dimensions (1 to {MAX_DIMS} are allowed)")
        shape = tuple(r.scalar("Q") for _ in range(n_dims))
        kind, offset = type_of_id(r.scalar("I")), r.scalar("Q")
        if kind is None:
            (type_id,) = _U32.unpack_from(r.buf, r.pos - 12)
            raise r.fail(f"ggml type {type_id}, which no engine knows")
        infos.append(TensorInfo(name, shape, kind, offset, _size(r, kind, shape)))
        if offset % alignment:
            raise r.fail(f"an offset of {offset}, not a multiple of {alignment}")
    return tuple(infos)


def _size(r: Cursor, kind: GgmlType, shape: tuple[int, ...]) -> int:
    """Return the bytes of a tensor whose shape is believable."""
    if 0 in shape or prod(shape) >= 1 << 62:
        raise r.fail(f"an impossible shape {'x'.join(map(str, shape))}")
    try:
        return tensor_bytes(kind, shape)
    except UsageError as err:
        raise r.fail(str(err)) from None


def _check_data(source: ByteSource, tensors: tuple[TensorInfo, ...], data_offset: int) -> None:
    """Require that tensor data neither overlaps nor leaves the file."""
    end, before = 0, ""
    for t in sorted(tensors, key=lambda t: t.offset):
        if t.offset < end:
            raise BadFile(
                f"{source.name}: tensor {t.name!r} at offset {t.offset} overlaps {before!r}, "
                f"which ends at {end}"
            )
        end, before = t.offset + t.n_bytes, t.name
    if tensors and source.size is not None and data_offset + end > source.size:
        raise BadFile(
            f"{source.name}: tensor {before!r} ends at byte {data_offset + end}, the file at "
            f"{source.size}: truncated, or the header lies"
        )
