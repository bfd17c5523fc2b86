"""A budget as text, the flags of `quantmix design`, read into the fields of a Request."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Final

from quantmix.errors import UnknownName, UsageError
from quantmix.request import Request

_KINDS: Final[Mapping[str, str]] = {
    f.name: str(f.type).removesuffix(" | None") for f in fields(Request) if f.name != "model"
}
"""Field of a Request → how its value is written: str, int, float, bool, Path, Sequence[str]."""

_READ: Final[Mapping[str, Callable[[str], Any]]] = {
    "str": str,
    "int": int,
    "float": float,
    "Path": Path,
}


def parse(text: str) -> dict[str, Any]:
    """Return the Request fields that a budget like `--vram 192G --ctx 64k` sets.

    Raises:
        UsageError: an unknown flag, a missing value, one of the wrong kind; quotes that do not end.
    """
    try:
        words = shlex.split(text)
    except ValueError as err:
        raise UsageError(f"{text!r} cannot be split into flags: {err}") from None
    found: dict[str, Any] = {}
    while words:
        flag, sign, value = words.pop(0).partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--"):
            raise UsageError(f"{flag!r} is not a flag of `quantmix design`: write --vram 192G")
        if name not in _KINDS:
            known = ["--" + k.replace("_", "-") for k in _KINDS]
            raise UnknownName.of("flag", flag, known, "see `quantmix design --help`")
        if _KINDS[name] == "bool":
            if sign:
                raise UsageError(f"{flag} takes no value")
            found[name] = True
            continue
        if not sign:
            if not words:
                raise UsageError(f"{flag} needs a value")
            value = words.pop(0)
        _set(found, name, flag, value)
    return found


def _set(found: dict[str, Any], name: str, flag: str, value: str) -> None:
    kind = _KINDS[name]
    if kind == "Sequence[str]":
        found[name] = (*found.get(name, ()), value)
        return
    try:
        found[name] = _READ[kind](value)
    except ValueError:
        raise UsageError(f"{flag} {value!r} is not {_a(kind)}") from None


def from_toml(name: str, value: Any) -> Any:
    """Return a TOML value of a Request field in the form that Request takes.

    Numbers may stand where the flag is text (`ctx = 32768`), a single string for a list.

    Raises:
        UsageError: a value of another kind.
    """
    kind = _KINDS[name]
    if kind == "bool" and isinstance(value, bool):
        return value
    if not isinstance(value, bool):
        if kind == "Sequence[str]":
            many = [value] if isinstance(value, str) else value
            if isinstance(many, list) and all(isinstance(v, str) for v in many):
                return tuple(many)
        elif kind in ("str", "Path") and isinstance(value, str):
            return _READ[kind](value)
        elif kind == "str" and isinstance(value, int | float):
            return str(value)
        elif kind == "int" and isinstance(value, int):
            return value
        elif kind == "float" and isinstance(value, int | float):
            return float(value)
    raise UsageError(f"{value!r} is not {_a(kind)}")


def is_field(name: str) -> bool:
    """Whether a key is a flag of `design`."""
    return name in _KINDS


def names() -> tuple[str, ...]:
    """Return all flags of `design` as keys."""
    return tuple(_KINDS)


def paths() -> tuple[str, ...]:
    """Return the flags that are paths."""
    return tuple(name for name, kind in _KINDS.items() if kind == "Path")


def _a(kind: str) -> str:
    return {
        "str": "a text",
        "Path": "a path",
        "int": "a whole number",
        "float": "a number",
        "bool": "true or false",
        "Sequence[str]": "a list of texts",
    }[kind]
