"""A GGUF on disk with its data: all shards, tensor bytes, fingerprints that say what it is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from quantmix.ggml.header import Header, TensorInfo, read_header
from quantmix.ggml.shards import merge, prefix_of, shard_paths
from quantmix.ggml.types import drop_ones

_NORM_BYTES: Final = 4 << 20  # norms hashed into a fingerprint
_SAMPLES: Final = 64  # places of 64 KiB hashed into the fingerprint of the data


@dataclass(frozen=True)
class WeightsFile:
    """One GGUF model on disk.

    Attributes:
        path: the file, or the first shard.
        shards: (path, header) of every shard, in order.
    """

    path: Path
    shards: tuple[tuple[Path, Header], ...]

    @cached_property
    def tensors(self) -> dict[str, tuple[TensorInfo, Path, int]]:
        """Tensor name → (info, file, absolute offset of its data), in file order."""
        return {
            info.name: (info, path, header.data_offset + info.offset)
            for path, header in self.shards
            for info in header.tensors
        }

    @property
    def metadata(self) -> dict[str, Any]:
        """Key-value pairs of the first shard."""
        return self.shards[0][1].metadata

    @property
    def n_bytes(self) -> int:
        """Size of all shards."""
        return sum(header.file_bytes or 0 for _, header in self.shards)

    def types(self) -> dict[str, str]:
        """Return the ggml type name of every tensor."""
        return {name: info.type.name for name, (info, _, _) in self.tensors.items()}

    def read(self, name: str) -> bytes:
        """Return the raw bytes of a tensor."""
        info, path, offset = self.tensors[name]
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(info.n_bytes)

    @cached_property
    def model_fingerprint(self) -> str:
        """Hash that a model keeps through quantization: architecture, name, shapes, F32 norms.

        llama-quantize changes neither names, shapes, `general.name` nor one-dimensional tensors.
        """
        digest = hashlib.sha256()
        for key in ("general.architecture", "general.name", "general.finetune"):
            digest.update(f"{key}={self.metadata.get(key, '')}\n".encode())
        budget = _NORM_BYTES
        for name in sorted(self.tensors):
            info, path, offset = self.tensors[name]
            digest.update(f"{name}{drop_ones(info.shape)}\n".encode())
            if info.type.name == "f32" and len(drop_ones(info.shape)) == 1 and budget > 0:
                budget -= info.n_bytes
                digest.update(_read_at(path, offset, info.n_bytes))
        return digest.hexdigest()[:32]

    @cached_property
    def mix_fingerprint(self) -> str:
        """Hash of every tensor's type."""
        text = "\n".join(f"{name}={kind}" for name, kind in sorted(self.types().items()))
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @cached_property
    def data_fingerprint(self) -> str:
        """Hash of size and samples of the data: same mix, other imatrix gives another one."""
        digest = hashlib.sha256()
        for path, header in self.shards:
            size = header.file_bytes or 0
            digest.update(f"{size}\n".encode())
            step = max(1, size // _SAMPLES)
            for offset in range(0, size, max(step, 65536)):
                digest.update(_read_at(path, offset, 65536))
        return digest.hexdigest()[:32]


def open_weights(path: str | Path) -> WeightsFile:
    """Open a GGUF by any of its shards, headers read and checked against the file sizes.

    Raises:
        BadFile: missing, malformed or truncated; a shard is missing.
    """
    file = Path(path)
    paths = shard_paths(file)
    headers = tuple(read_header(p) for p in paths)
    merge(headers, prefix_of(file.name))
    return WeightsFile(paths[0], tuple(zip(paths, headers, strict=True)))


def _read_at(path: Path, offset: int, count: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(count)
