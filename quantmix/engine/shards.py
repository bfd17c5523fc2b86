"""Cut a GGUF into shards, as gguf-split does: same metadata first, whole tensors per shard.

Shard files are `<stem>-00001-of-0000N.gguf` with keys `split.no`, `split.count` and
`split.tensors.count`; the first one carries all other metadata (llama.cpp tools/gguf-split).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Final

from quantmix.errors import BadFile, UsageError
from quantmix.ggml.header import DEFAULT_ALIGNMENT, TensorInfo
from quantmix.ggml.weights import WeightsFile
from quantmix.ggml.writer import KeyValues, NewTensor, copy_metadata, encode_header
from quantmix.units import gib, pad

_UINT16: Final = 2
_INT32: Final = 5


def split(weights: WeightsFile, max_bytes: int, folder: Path) -> list[Path]:
    """Write `weights` as shards of at most `max_bytes` of tensor data into `folder`.

    Raises:
        UsageError: one tensor alone is larger.
        BadFile: the source got shorter meanwhile.
    """
    infos = [info for info, _, _ in weights.tensors.values()]
    require_fitting_shards({t.name: t.n_bytes for t in infos}, max_bytes)
    groups = _groups(infos, max_bytes, weights.shards[0][1].alignment)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for number, group in enumerate(groups):
        name = f"{weights.path.stem}-{number + 1:05d}-of-{len(groups):05d}.gguf"
        paths.append(folder / name)
        _write(weights, group, number, len(groups), len(infos), paths[-1])
    return paths


def require_fitting_shards(sizes: Mapping[str, int], max_bytes: int) -> None:
    """Raise UsageError when one tensor alone is larger than a shard may be."""
    name = max(sizes, key=lambda n: sizes[n])
    if sizes[name] > max_bytes:
        raise UsageError(
            f"--split-max-size {gib(max_bytes)} is smaller than {name} alone ({sizes[name]} bytes)"
        )


def _groups(infos: list[TensorInfo], max_bytes: int, alignment: int) -> list[list[TensorInfo]]:
    groups: list[list[TensorInfo]] = [[]]
    size = 0
    for info in infos:
        n_bytes = pad(info.n_bytes, alignment)
        if groups[-1] and size + n_bytes > max_bytes:
            groups.append([])
            size = 0
        groups[-1].append(info)
        size += n_bytes
    return groups


def _write(
    weights: WeightsFile, group: list[TensorInfo], number: int, count: int, total: int, path: Path
) -> None:
    header = weights.shards[0][1]
    keys = copy_metadata(header) if number == 0 else KeyValues(0, b"")
    # Only the first shard says another alignment than the default.
    alignment = header.alignment if number == 0 else DEFAULT_ALIGNMENT
    extra = _key("split.no", _UINT16, "<H", number)
    extra += _key("split.count", _UINT16, "<H", count)
    extra += _key("split.tensors.count", _INT32, "<i", total)
    tensors = [NewTensor(t.name, t.shape, t.type) for t in group]
    head, _ = encode_header(KeyValues(keys.count + 3, keys.data + extra), tensors, alignment)
    with path.open("wb") as out:
        out.write(head)
        for info in group:
            _, source, offset = weights.tensors[info.name]
            with source.open("rb") as file:
                file.seek(offset)
                _copy(file, out, info.n_bytes)
            out.write(b"\0" * (pad(info.n_bytes, alignment) - info.n_bytes))


def _copy(source: BinaryIO, out: BinaryIO, count: int) -> None:
    """Copy `count` bytes between open files."""
    while count:
        piece = source.read(min(count, 1 << 20))
        if not piece:
            raise BadFile(f"{source.name} ends {count} bytes early: it was changed while read")
        out.write(piece)
        count -= len(piece)


def _key(name: str, kind: int, form: str, value: int) -> bytes:
    raw = name.encode()
    return struct.pack("<Q", len(raw)) + raw + struct.pack("<I", kind) + struct.pack(form, value)
