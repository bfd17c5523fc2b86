"""Headers of safetensors files: names, dtypes and shapes, without the data.

Format: u64 length, then that many bytes of JSON: name → dtype, shape, data_offsets.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any, Final

from quantmix.errors import BadFile

# The reference reader refuses larger headers too (safetensors MAX_HEADER_SIZE).
_MAX_HEADER_BYTES: Final = 100_000_000

Shape = tuple[int, ...]


def read_shapes(path: Path) -> dict[str, tuple[str, Shape]]:
    """Return name → (dtype, shape) of one safetensors file.

    Raises:
        BadFile: unreadable, truncated, or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            head = f.read(8)
            if len(head) < 8:
                raise BadFile(f"{path} is too short for a safetensors file ({size} bytes)")
            (length,) = struct.unpack("<Q", head)
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise BadFile(f"{path}: a header of {length} bytes in a file of {size}")
            raw = f.read(length)
    except OSError as err:
        raise BadFile(f"{path} cannot be read: {err.strerror or err}") from err
    doc = parse_json(raw, str(path))
    return {
        name: _entry(path, name, entry) for name, entry in doc.items() if name != "__metadata__"
    }


def parse_json(raw: bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        BadFile: not JSON, nested beyond reason, or not an object.
    """
    try:
        doc = json.loads(raw)
    except (ValueError, RecursionError) as err:
        raise BadFile(f"{where} is not JSON: {str(err)[:120]}") from None
    if not isinstance(doc, dict):
        raise BadFile(f"{where} holds no JSON object")
    return doc


def _entry(path: Path, name: str, entry: Any) -> tuple[str, Shape]:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    dtype = entry.get("dtype") if isinstance(entry, dict) else None
    good = isinstance(shape, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in shape)
    if not good or not isinstance(dtype, str):
        raise BadFile(f"{path}: tensor {name[:80]!r} has no believable dtype and shape")
    return dtype, tuple(shape or ())
