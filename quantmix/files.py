"""Where files go, and how: whole or not at all (beside, fsync, rename)."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path

from quantmix.errors import UsageError


def cache_folder() -> Path:
    """Return the folder of fetched and built files: `QUANTMIX_CACHE`, else ~/.cache/quantmix."""
    named = os.environ.get("QUANTMIX_CACHE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "quantmix"


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, all or nothing.

    Raises:
        UsageError: the place cannot be written.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, target)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as err:
        raise UsageError(f"cannot write {target}: {err.strerror}") from err


def require_creatable(path: str | Path) -> None:
    """Refuse a place that cannot be written, before the work whose result goes there.

    Missing folders are made.

    Raises:
        UsageError: it cannot be written, or is a folder.
    """
    target = Path(path)
    if target.is_dir():
        raise UsageError(f"cannot write {target}: it is a folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
        os.close(handle)
        os.unlink(name)
    except OSError as err:
        raise UsageError(f"cannot write {target}: {err.strerror}") from err


def write_text(path: str | Path, text: str) -> None:
    """Write `text` as UTF-8 to `path`, all or nothing; names that are no UTF-8 are escaped."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def name_part(label: str) -> str:
    """Return a label as part of a recipe's name: letters, digits and . _ + - only."""
    return "".join(c if c.isalnum() or c in "._+-" else "-" for c in label)


def require_name(name: str) -> None:
    """Refuse a recipe's name that could be another folder than its own, or trouble a shell.

    Raises:
        UsageError: it holds more than letters, digits and . _ + -, or begins with . or -.
    """
    if not re.fullmatch(r"[\w+][\w.+-]*", name):
        raise UsageError(
            f"--name {name!r} may hold letters, digits, . _ + - only, and not begin with . or -"
        )
