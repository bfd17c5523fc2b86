"""Split GGUF files: find all shards from any of them, check that they belong together, merge.

A shard is named `<prefix>-00003-of-00030.gguf` and says so in its metadata too: `split.no` (from
zero), `split.count`, `split.tensors.count` (llama.cpp src/llama-model-loader.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quantmix.errors import BadFile
from quantmix.ggml.header import Header, TensorInfo, read_header
from quantmix.ggml.writer import NewTensor, copy_metadata, encode_header

_SHARD: Final = re.compile(r"^(.+)-(\d{5})-of-(\d{5})\.gguf$")
_SIDE_FILES: Final = ("mmproj", "mtp-")  # vision projectors and separate MTP blocks


@dataclass(frozen=True)
class GgufSet:
    """All headers of one model, in shard order; `name` is the file name without shard and suffix.

    Attributes:
        tensors: of all shards, in order.
    """

    name: str
    headers: tuple[Header, ...]
    tensors: tuple[TensorInfo, ...]

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of the first shard, which carries the model's."""
        return self.headers[0].metadata

    @property
    def header_bytes(self) -> int:
        """Bytes of header and padding of the model as one file."""
        if len(self.headers) == 1:
            return self.headers[0].data_offset
        new = (NewTensor(t.name, t.shape, t.type) for t in self.tensors)
        head, _ = encode_header(copy_metadata(self.headers[0]), new, self.headers[0].alignment)
        return len(head)


def read_set(path: str | Path) -> GgufSet:
    """Read a GGUF file, or all shards from any one of them, or the only model of a folder.

    Raises:
        BadFile: nothing there, shards missing or mixed, or a header is malformed.
    """
    given = Path(path)
    file = _only_model(given) if given.is_dir() else given
    headers = tuple(read_header(p) for p in shard_paths(file))
    return merge(headers, prefix_of(file.name))


def numbers_of(file_name: str) -> tuple[str, int, int] | None:
    """Return prefix, number (from 1) and count in the name of a shard, None for another name."""
    match = _SHARD.match(file_name)
    return (match[1], int(match[2]), int(match[3])) if match else None


def prefix_of(file_name: str) -> str:
    """Return a file name without shard number and `.gguf`."""
    shard = numbers_of(file_name)
    return shard[0] if shard else file_name.removesuffix(".gguf")


def shard_paths(file: Path) -> list[Path]:
    """Return the paths of all shards that the name of one promises, or the file alone.

    Raises:
        BadFile: the number in the name is impossible, or shards are missing.
    """
    shard = numbers_of(file.name)
    if shard is None:
        return [file]
    prefix, no, count = shard
    if not 1 <= no <= count:
        raise BadFile(f"{file}: shard {no} of {count} cannot be: rename the file as it was made")
    names = shard_names(prefix, count)
    try:
        there = {p.name for p in file.parent.iterdir()}
    except OSError as err:
        raise BadFile(f"{file.parent} cannot be listed: {err.strerror or err}") from err
    missing = [n for n in names if n not in there]
    if missing:
        if file.name not in there:
            raise BadFile(f"{file} is not a file: give a GGUF file, a folder or a model name")
        some = ", ".join(missing[:3]) + (", …" if len(missing) > 3 else "")
        raise BadFile(f"{file.parent}: {len(missing)} of {count} shards are missing: {some}")
    return [file.parent / n for n in names]


def shard_names(prefix: str, count: int) -> list[str]:
    """Return the file names of `count` shards."""
    return [f"{prefix}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]


def merge(headers: tuple[Header, ...], name: str) -> GgufSet:
    """Check that headers are the shards of one model, in order, and merge them.

    Raises:
        BadFile: numbers are none or contradict the order, tensors appear twice or are missing.
    """
    tensors: list[TensorInfo] = []
    seen: dict[str, str] = {}
    for i, h in enumerate(headers):
        count = h.int_of("split.count")
        if count not in (None, 0, len(headers)):
            raise BadFile(
                f"{h.name} is one of {count} shards by its metadata, "
                f"but {len(headers)} by its name: restore the names the shards were made with"
            )
        no = h.int_of("split.no")
        if no is not None and no != i:
            raise BadFile(f"{h.name} is shard {no + 1} by its metadata, {i + 1} by its name")
        for t in h.tensors:
            if t.name in seen:
                raise BadFile(f"tensor {t.name!r} is in both {seen[t.name]} and {h.name}")
            seen[t.name] = h.name
            tensors.append(t)
    total = headers[0].int_of("split.tensors.count")
    if len(headers) > 1 and total not in (None, len(tensors)):
        raise BadFile(f"{name}: the shards hold {len(tensors)} tensors, their header says {total}")
    return GgufSet(name, headers, tuple(tensors))


def first_files(paths: Iterable[str]) -> list[str]:
    """Return the first file of every model among GGUF paths, sorted; side files are left out.

    Shards of one model have its folder and prefix in common.
    """
    models: dict[str, str] = {}
    for path in sorted(p for p in paths if p.endswith(".gguf")):
        folder, slash, name = path.rpartition("/")
        if not name.lower().startswith(_SIDE_FILES):
            models.setdefault(folder + slash + prefix_of(name), path)
    return list(models.values())


def _only_model(folder: Path) -> Path:
    """Return the first file of the only model in a folder."""
    try:
        models = first_files(p.name for p in folder.iterdir())
    except OSError as err:
        raise BadFile(f"{folder} cannot be listed: {err.strerror or err}") from err
    if not models:
        raise BadFile(f"{folder} holds no GGUF model")
    if len(models) > 1:
        names = [prefix_of(m) for m in models]
        some = ", ".join(names[:4]) + (", …" if len(names) > 4 else "")
        raise BadFile(f"{folder} holds {len(models)} models ({some}): name one file")
    return folder / models[0]
