"""What the real ik `llama-quantize` would make of a file: its dry run, parsed tensor by tensor."""

from __future__ import annotations

import ctypes
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final

from quantmix.engine.dry_run import DryTensor, read_tensor
from quantmix.engine.find import Program, find_program, package_folder
from quantmix.errors import EngineError
from quantmix.ggml import types as ggml

_SECONDS: Final = 600
_RECORD: Final = re.compile(
    r"\[\s*\d+/\s*\d+\]\s+(?P<name>\S+)\s+-\s+\[(?P<shape>[\d ,]+)\],\s+type\s*=\s*(?P<old>\w+),"
)
_CONVERTED: Final = re.compile(
    r"converting to (?P<type>\w+) \.\. size =\s*[\d.]+ MiB ->\s*(?P<after>[\d.]+) MiB"
)
_KEPT: Final = re.compile(r"size =\s*(?P<size>[\d.]+) MB")
_TOTAL: Final = re.compile(r"quant size\s*=\s*([\d.]+) MB")


Tensors = Mapping[str, DryTensor]


@dataclass(frozen=True, slots=True)
class DryRun:
    """A dry run over a whole file; `sizes_by` says whose row sizes the bytes rest on."""

    tensors: Tensors
    printed_total_mib: float
    program: Program
    sizes_by: str


def start(
    ghost: Path,
    rules: Sequence[str],
    ftype: str,
    llama_bin: str | Path | None = None,
    *,
    imatrix: Path | None = None,
) -> Running:
    """Start a dry run; `finish` waits for it. Without rules the preset `ftype` decides.

    Raises:
        EngineMissing: there is no llama-quantize of ik.
        EngineError: it cannot be started.
    """
    program = find_program("llama-quantize", llama_bin, engine="ik")
    command = [
        str(program.path),
        *("--dry-run", "--ignore-imatrix-rules"),
        *(("--imatrix", str(imatrix)) if imatrix else ()),
        *(("--custom-q", ",".join(rules)) if rules else ()),
        *(str(ghost), str(ghost.with_name("never-written.gguf")), ftype),
    ]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            encoding="utf-8",
            errors="replace",
        )
    except OSError as err:
        raise EngineError(f"{program.path} cannot be started: {err}") from err
    return Running(process, program)


@dataclass(frozen=True, slots=True)
class Running:
    """A dry run under way."""

    process: subprocess.Popen[str]
    program: Program

    def finish(self) -> DryRun:
        """Wait and parse.

        Raises:
            EngineError: it failed, took too long, or printed what this module cannot read.
        """
        try:
            _, log = self.process.communicate(timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise EngineError(f"{self.program.path} --dry-run took over {_SECONDS} s") from None
        if self.process.returncode != 0:
            raise EngineError(
                f"{self.program.path} --dry-run ended with {self.process.returncode}: "
                f"{_last_words(log)}"
            )
        return parse(log, self.program)


def parse(log: str, program: Program) -> DryRun:
    """Read the log of a dry run (stderr alone).

    The type is taken from `converting to`, never from `Using custom type`.

    Raises:
        EngineError: a record has neither a new type nor a kept size, or there is no record.
    """
    row_size = engine_row_size() if program.origin == "ik-llama-cpp-python" else None
    found: dict[str, DryTensor] = {}
    starts = list(_RECORD.finditer(log))
    ends = [*starts[1:], None][: len(starts)]
    for here, following in zip(starts, ends, strict=True):
        body = log[here.end() : following.start() if following else len(log)]
        found[here["name"]] = _tensor(here, body, row_size)
    total = _TOTAL.search(log)
    if not found or total is None:
        raise EngineError(f"{program.path} --dry-run printed no tensors: {_last_words(log)}")
    by = "ggml_row_size of the engine" if row_size else "quantmix's table of types"
    return DryRun(found, float(total[1]), program, by)


def _tensor(record: re.Match[str], body: str, row_size: Any) -> DryTensor:
    converted = _CONVERTED.search(body)
    kept = None if converted else _KEPT.search(body)
    if converted:
        name, printed = converted["type"], converted["after"]
    elif kept:
        name, printed = record["old"], kept["size"]
    else:
        raise EngineError(f"cannot read the engine's record of {record['name']}: {body[:120]!r}")
    kind = ggml.get(name, "ik")
    row_bytes = partial(row_size, kind.id) if row_size else kind.row_bytes
    return read_tensor(record["name"], record["shape"], name, printed, row_bytes)


@cache
def engine_row_size() -> Any:
    """Return `ggml_row_size(type id, columns)` of the packaged engine, or None without it."""
    folder = package_folder()
    library = folder / "lib" / "libggml.so" if folder else None
    if library is None or not library.is_file():
        return None
    try:
        lib = ctypes.CDLL(str(library))
        lib.ggml_row_size.restype = ctypes.c_size_t
        lib.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    except (OSError, AttributeError):
        return None
    return lib.ggml_row_size


def _last_words(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    # After an assert the engine lets gdb print a long backtrace: the assert is what it said.
    said = [line for line in lines if re.search(r"GGML_ASSERT|GGML_ABORT|failed to|error:", line)]
    return " | ".join((said or lines)[-3:]) or "it printed nothing"
