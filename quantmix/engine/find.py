"""Find the engine's programs: the user's own first, then those inside an installed package."""

from __future__ import annotations

import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from quantmix.errors import EngineMissing

Origin = Literal["--llama-bin", "QUANTMIX_LLAMA_BIN", "PATH", "ik-llama-cpp-python", "libllama"]


@dataclass(frozen=True, slots=True)
class Program:
    """A program of an engine: its path, where it was found, and what comes before its arguments."""

    path: Path
    origin: Origin
    prefix: tuple[str, ...] = ()


def package_folder() -> Path | None:
    """Return the folder of the installed ik-llama-cpp-python, without importing it."""
    spec = importlib.util.find_spec("ik_llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def find_program(name: str, llama_bin: str | Path | None = None) -> Program:
    """Return `llama-quantize` or another program of the engine.

    Looked for in `llama_bin`, the folder or file named by QUANTMIX_LLAMA_BIN, PATH, and the
    ik-llama-cpp-python package, in that order.

    Raises:
        EngineMissing: it is nowhere.
    """
    named: list[tuple[Origin, str | Path | None]] = [
        ("--llama-bin", llama_bin),
        ("QUANTMIX_LLAMA_BIN", os.environ.get("QUANTMIX_LLAMA_BIN")),
    ]
    for origin, place in named:
        if place:
            found = _in_place(Path(place), name)
            if found is None:
                raise EngineMissing(f"{origin} {place} holds no executable {name}")
            return Program(found, origin)
    on_path = shutil.which(name)
    if on_path:
        return Program(Path(on_path), "PATH")
    package = package_folder()
    if package is not None:
        found = _in_place(package / "bin", name)
        if found is not None:
            return Program(found, "ik-llama-cpp-python")
    raise EngineMissing(
        f"no {name} found: install ik-llama-cpp-python (Linux x86-64), put it on PATH, "
        "or name its folder with --llama-bin or QUANTMIX_LLAMA_BIN"
    )


def _in_place(place: Path, name: str) -> Path | None:
    """Return the executable `name` at or in `place`."""
    candidate = place / name if place.is_dir() else place
    if candidate.name != name or not candidate.is_file() or not os.access(candidate, os.X_OK):
        return None
    return candidate
