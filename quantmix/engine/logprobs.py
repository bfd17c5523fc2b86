"""The base model's log-probabilities on disk: 16 bits each, with fingerprints of what made them.

File: 8 bytes magic, u32 length, JSON (`BaseInfo` fields), then per chunk: nll, scale, offset
(float32 [n_scored] each) and codes (uint16 [n_scored, n_vocab]); see `scores.BaseRows`. That is
about 510 · n_vocab bytes per chunk of 512 tokens.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final

import numpy as np

from quantmix.engine.scores import BaseRows
from quantmix.errors import BadFile, UsageError
from quantmix.units import gib

_MAGIC: Final = b"QMIXLP01"


@dataclass(frozen=True, slots=True)
class BaseInfo:
    """What the log-probabilities were computed from; two runs compare only when all agree."""

    model: str
    data: str
    engine: str
    corpus: str
    tokens: str
    n_ctx: int
    n_chunk: int
    n_vocab: int

    @property
    def n_scored(self) -> int:
        """Scored tokens of a chunk: the second half but for the last position."""
        return self.n_ctx - 1 - self.n_ctx // 2

    @property
    def chunk_bytes(self) -> int:
        """Bytes of one chunk in the file."""
        return self.n_scored * (12 + 2 * self.n_vocab)


class BaseReader:
    """An open base file; rows of a chunk come as views of the mapped file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info, self._start = _read_info(path)
        self._map = np.memmap(path, np.uint8, "r")

    def require(self, other: BaseInfo) -> None:
        """Raise BadFile unless this base belongs to the run described by `other`.

        `other.data` is ignored (it is the candidate's) and this file may hold more chunks.
        """
        for field, what in (
            ("model", "another model"),
            ("n_vocab", "another vocabulary"),
            ("engine", "another engine or build"),
            ("corpus", "another text"),
            ("n_ctx", "another n_ctx"),
        ):
            mine, theirs = getattr(self.info, field), getattr(other, field)
            if mine != theirs:
                raise BadFile(
                    f"{self.path} was made with {what} ({mine}, not {theirs}): delete it, or give "
                    "another --logits-base"
                )
        if self.info.n_chunk < other.n_chunk:
            raise BadFile(
                f"{self.path} holds {self.info.n_chunk} chunks, {other.n_chunk} are wanted: "
                f"use --chunks {self.info.n_chunk} or delete it"
            )

    def rows(self, chunk: int) -> BaseRows:
        """Return the rows of one chunk, [n_scored, n_vocab]."""
        info, n = self.info, self.info.n_scored
        at = self._start + chunk * info.chunk_bytes
        raw = self._map[at : at + info.chunk_bytes]
        nll, scale, offset = raw[: 12 * n].view(np.float32).reshape(3, n)
        code = raw[12 * n :].view(np.uint16).reshape(n, info.n_vocab)
        return BaseRows(code, scale, offset, nll)


class BaseWriter:
    """Appends chunks; made by `create`."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def append(self, rows: BaseRows) -> None:
        """Write the rows of the next chunk."""
        for part in (rows.nll, rows.scale, rows.offset, rows.code):
            self._file.write(np.ascontiguousarray(part).data)


@contextmanager
def create(path: Path, info: BaseInfo) -> Iterator[BaseWriter]:
    """Write a base file; it appears under its name only when the block ends without error.

    Raises:
        UsageError: not enough disk.
    """
    need = info.n_chunk * info.chunk_bytes
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < need + (64 << 20):
        raise UsageError(
            f"{path.parent} has {gib(free)} free, the base log-probabilities need {gib(need)}: "
            "free some, use fewer --chunks, or name another place by --logits-base"
        )
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    head = json.dumps(asdict(info)).encode()
    head += b" " * (-(12 + len(head)) % 64)
    try:
        with partial.open("wb") as file:
            file.write(_MAGIC + struct.pack("<I", len(head)) + head)
            yield BaseWriter(file)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _read_info(path: Path) -> tuple[BaseInfo, int]:
    """Read the head of a base file and check the file's size."""
    try:
        with path.open("rb") as file:
            magic, length = struct.unpack("<8sI", file.read(12).ljust(12, b"\0"))
            if magic == b"_logits_":
                raise BadFile(f"{path} is a llama-perplexity base file, not one of quantmix")
            if magic != _MAGIC or length > 1 << 16:
                raise BadFile(f"{path} is not a base log-probability file of quantmix")
            doc: dict[str, Any] = json.loads(file.read(length))
            info = BaseInfo(**doc)
    except OSError as err:
        raise BadFile(f"{path} cannot be read: {err.strerror}") from err
    except (ValueError, TypeError) as err:
        raise BadFile(f"{path} has a damaged head: {err}") from err
    start = 12 + length
    if path.stat().st_size != start + info.n_chunk * info.chunk_bytes:
        raise BadFile(f"{path} is truncated: delete it and run again")
    return info, start
