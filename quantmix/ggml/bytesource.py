"""Where header bytes come from: a local file here, a server in models/remote.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantmix.errors import BadFile


class ByteSource(Protocol):
    """Where header bytes come from: a file, or a server. Reads ascend without gaps."""

    @property
    def name(self) -> str:
        """For messages."""

    @property
    def size(self) -> int | None:
        """Total bytes, None when nobody says."""

    def read(self, offset: int, count: int) -> bytes:
        """Return up to `count` bytes at `offset`; fewer only at the end."""


@dataclass(frozen=True, slots=True)
class FileSource:
    """A local file as a ByteSource."""

    path: Path
    size: int

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    def read(self, offset: int, count: int) -> bytes:
        """Read by opening anew: headers take one or two reads."""
        try:
            with self.path.open("rb") as f:
                f.seek(offset)
                return f.read(count)
        except OSError as err:
            raise BadFile(f"{self.path} cannot be read: {err.strerror or err}") from err


def open_file(path: str | Path) -> FileSource:
    """Return the source of a local file.

    Raises:
        BadFile: there is no such regular file.
    """
    file = Path(path)
    try:
        size = file.stat().st_size if file.is_file() else None
    except (OSError, ValueError) as err:
        raise BadFile(f"{file} cannot be opened: {err}") from err
    if size is None:
        raise BadFile(f"{file} is not a file: give a GGUF file, a folder or a model name")
    return FileSource(file, size)
