"""Where a mainline llama.cpp is: the user's binaries, `QUANTMIX_LIBLLAMA`, an installed package.

In this order, the first that can do what is asked:

1. `llama-quantize` in `QUANTMIX_LLAMA_BIN` (file or folder) or on PATH, when its `--help` is that
   of mainline (ik_llama.cpp's program has the same name); and the libllama that lies beside it.
2. `QUANTMIX_LIBLLAMA`, a file or a folder that holds libllama.
3. A package: `node_modules/@node-llama-cpp/*` here or above, what `mainline_fetch` brought, or the
   Python package xllamacpp (it loads models, but cannot quantize).
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, Literal

from quantmix.engine import mainline_ask, mainline_fetch
from quantmix.engine.find import flavour, in_place, named_places, on_path
from quantmix.errors import EngineError, EngineMissing, UsageError

Need = Literal["quantize", "memory"]
_INSTALL: Final = (
    "run `python -m quantmix.engine.mainline_fetch` (needs npm), or set QUANTMIX_LLAMA_BIN to the "
    "folder of mainline's programs or QUANTMIX_LIBLLAMA to libllama"
)


@dataclass(frozen=True, slots=True)
class Mainline:
    """One mainline engine found.

    Attributes:
        program: llama-quantize, or None when only a library was found.
        library: libllama (or a Python extension that exports it), or None.
        origin: where it was found, for people.
        version: as the library states it; empty for a program without its library.
        quantizes: whether it can do a quantization dry run.
    """

    program: Path | None
    library: Path | None
    origin: str
    version: str
    quantizes: bool


@dataclass(frozen=True, slots=True)
class Candidate:
    """A place where an engine may be; what it can do is not yet known."""

    program: Path | None
    library: Path | None
    origin: str


def find_mainline(need: Need, *, libraries_only: bool = False) -> Mainline:
    """Return the first mainline engine that can do what is asked.

    `quantize` takes a program or a library that quantizes; `memory` takes a library. A library
    that cannot be used is passed over, but not one that QUANTMIX_LIBLLAMA names. With
    `libraries_only` the library beside a program counts, the program does not.

    Raises:
        EngineMissing: none found; the message says what to install.
        EngineError: QUANTMIX_LIBLLAMA names a library that cannot be used.
        UsageError: QUANTMIX_LIBLLAMA or QUANTMIX_LLAMA_BIN names nothing usable.
    """
    passed: list[str] = []
    for found in candidates():
        candidate = replace(found, program=None) if libraries_only else found
        if candidate.program is None and candidate.library is None:
            continue
        try:
            engine = examine(candidate)
        except EngineError as err:
            if candidate.origin == "QUANTMIX_LIBLLAMA":
                raise
            passed.append(f"{candidate.origin}: {err}")
            continue
        if engine.quantizes if need == "quantize" else engine.library is not None:
            return engine
        lacks = "cannot quantize" if need == "quantize" else "has no shared libllama beside it"
        passed.append(f"{candidate.origin} {lacks}")
    what = "a mainline llama-quantize or libllama" if need == "quantize" else "a mainline libllama"
    seen = f" (passed over: {'; '.join(passed)})" if passed else ""
    raise EngineMissing(f"{what} is needed, and none was found{seen}: {_INSTALL}")


def examine(candidate: Candidate) -> Mainline:
    """Load a candidate's library in a child and return what it can do.

    Raises:
        EngineError: the library cannot be loaded, or its structures are not known.
    """
    if candidate.library is None:
        return Mainline(candidate.program, None, candidate.origin, "", True)
    try:
        known = mainline_ask.about(candidate.library)
    except EngineError:
        if candidate.program is None:
            raise
        return Mainline(candidate.program, None, candidate.origin, "", True)
    quantizes = candidate.program is not None or known.quantizes
    return Mainline(
        candidate.program, candidate.library, candidate.origin, known.version, quantizes
    )


def candidates() -> Iterator[Candidate]:
    """Yield every place where a mainline engine is, in the order of preference.

    Raises:
        UsageError: QUANTMIX_LIBLLAMA or QUANTMIX_LLAMA_BIN names nothing usable.
    """
    yield from _programs()
    named = os.environ.get("QUANTMIX_LIBLLAMA")
    if named:
        library = _library_at(Path(named))
        if library is None:
            raise UsageError(f"QUANTMIX_LIBLLAMA={named} is no libllama and no folder with one")
        yield Candidate(None, library, "QUANTMIX_LIBLLAMA")
    for folder in _package_folders():
        library = _library_at(folder)
        if library is not None:
            release = mainline_fetch.release(folder)
            yield Candidate(None, library, f"@node-llama-cpp {release}".strip())
    library = _xllamacpp()
    if library is not None:
        yield Candidate(None, library, "xllamacpp")


def _programs() -> Iterator[Candidate]:
    """Yield mainline's llama-quantize where the user's binaries are, with its library."""
    found: list[tuple[Path | None, str]] = []
    for origin, place in named_places():
        if not place.exists():
            raise UsageError(f"{origin}={place} does not exist")
        found.append((in_place(place, "llama-quantize"), origin))
    found += [(program, "PATH") for program in on_path("llama-quantize")]
    for program, where in found:
        if program is not None and flavour(program) == "mainline":
            yield Candidate(program, _library_beside(program), where)


def _library_beside(program: Path) -> Path | None:
    """Return the libllama that was built with a program: its own folder, then ../lib."""
    folder = program.resolve().parent
    for place in (folder, folder.parent / "lib", folder.parent / "lib64"):
        library = _library_at(place)
        if library is not None:
            return library
    return None


def _library_at(path: Path) -> Path | None:
    """Return libllama from a file name or a folder; the shortest name wins (the plain link)."""
    if path.is_file():
        return path.absolute()
    if not path.is_dir():
        return None
    names = [
        f for f in path.iterdir() if re.fullmatch(r"libllama(\.[\w.]+)?\.(so|dylib)[\d.]*", f.name)
    ]
    return min(names, key=lambda f: (len(f.name), f.name)).absolute() if names else None


def _package_folders() -> Iterator[Path]:
    """Yield folders of npm's build: node_modules here or above, then our cache."""
    here = Path.cwd()
    for parent in (here, *here.parents):
        for package in sorted((parent / "node_modules" / "@node-llama-cpp").glob("linux-*")):
            yield package / "bins" / package.name
    fetched = mainline_fetch.fetched_folder()
    if fetched is not None:
        yield fetched


def _xllamacpp() -> Path | None:
    """Return xllamacpp's extension module, which exports libllama, without importing it."""
    spec = importlib.util.find_spec("xllamacpp")
    if spec is None or spec.origin is None:
        return None
    return next(iter(sorted(Path(spec.origin).parent.glob("xllamacpp*.so"))), None)
