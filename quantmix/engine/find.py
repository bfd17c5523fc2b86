"""Find the engine's programs: the user's own first, then those inside an installed package."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from quantmix.errors import EngineMissing
from quantmix.ggml.types import Engine

Origin = Literal["--llama-bin", "QUANTMIX_LLAMA_BIN", "PATH", "ik-llama-cpp-python", "libllama"]
_HELP_SECONDS: Final = 30


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


def find_program(
    name: str, llama_bin: str | Path | None = None, *, engine: Engine | None = None
) -> Program:
    """Return `llama-quantize` or another program of the engine.

    Looked for in `llama_bin`, the folder or file named by QUANTMIX_LLAMA_BIN, PATH, and the
    ik-llama-cpp-python package, in that order.

    Args:
        engine: whose llama-quantize it must be (both engines call it so): another one on PATH is
            passed over, one that is named is refused.

    Raises:
        EngineMissing: it is nowhere, or the named one is not the engine's.
    """
    for origin, place in named_places(llama_bin):
        at = in_place(place, name)
        if at is None:
            raise EngineMissing(f"{origin} {place} holds no executable {name}")
        _require_flavour(at, origin, engine)
        return Program(at, origin)
    passed = []
    for found in on_path(name):
        if engine is None or flavour(found) == engine:
            return Program(found, "PATH")
        passed.append(str(found))
    package = package_folder()
    if package is not None and engine != "mainline":
        packaged = in_place(package / "bin", name)
        if packaged is not None:
            return Program(packaged, "ik-llama-cpp-python")
    whose = f"{name} of {engine}" if engine else name
    seen = f" (passed over: {', '.join(passed)})" if passed else ""
    ours = "llama.cpp" if engine == "mainline" else "ik_llama.cpp"
    ships = name == "llama-quantize" and engine != "mainline"
    source = "install ik-llama-cpp-python (Linux x86-64)" if ships else f"build {ours}"
    raise EngineMissing(
        f"no {whose} found{seen}: {source}, put it on PATH, "
        "or name its folder with --llama-bin or QUANTMIX_LLAMA_BIN"
    )


def named_places(llama_bin: str | Path | None = None) -> Iterator[tuple[Origin, Path]]:
    """Yield the folders or files that the user named, those that count first."""
    if llama_bin:
        yield "--llama-bin", Path(llama_bin)
    variable = os.environ.get("QUANTMIX_LLAMA_BIN")
    if variable:
        yield "QUANTMIX_LLAMA_BIN", Path(variable)


def on_path(name: str) -> Iterator[Path]:
    """Yield every program of that name on PATH, in the order of its folders."""
    for folder in os.get_exec_path():
        found = shutil.which(name, path=folder)
        if found:
            yield Path(found)


def flavour(program: Path) -> Literal["mainline", "ik", ""]:
    """Tell whose llama-quantize this is by its `--help`; empty when it is neither."""
    try:
        done = subprocess.run(
            [str(program), "--help"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_HELP_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    text = done.stdout + done.stderr
    if "--custom-q" in text:
        return "ik"
    return "mainline" if "--tensor-type-file" in text and "--dry-run" in text else ""


def _require_flavour(program: Path, origin: Origin, engine: Engine | None) -> None:
    """Raise EngineMissing when a named llama-quantize is another engine's."""
    if engine is None:
        return
    whose = flavour(program)
    if whose != engine:
        what = f"{whose}'s {program.name}" if whose else f"a {program.name} of neither engine"
        raise EngineMissing(
            f"{origin} names {program}, {what}, where {engine}'s is needed: name the folder of "
            f"{engine}'s programs"
        )


def in_place(place: Path, name: str) -> Path | None:
    """Return the executable `name` at or in `place`."""
    candidate = place / name if place.is_dir() else place
    if candidate.name != name or not candidate.is_file() or not os.access(candidate, os.X_OK):
        return None
    return candidate
