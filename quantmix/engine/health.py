"""What this machine and its engines can do, finding by finding."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any, Final

from quantmix.engine.find import find_program
from quantmix.engine.machine import read_machine
from quantmix.engine.mainline_find import Need, find_mainline
from quantmix.engine.native import engine_id
from quantmix.errors import QuantmixError
from quantmix.ggml.types import Engine
from quantmix.units import gib

_MAINLINE: Final[dict[Need, str]] = {
    "quantize": "checks and quantizes recipes",
    "memory": "counts memory, measures perplexity",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked for: whether it is there, what it is, how to get what is missing of it."""

    name: str
    ok: bool
    detail: str
    mend: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"name": self.name, "ok": self.ok, "detail": self.detail, "mend": self.mend}


def examine() -> tuple[Finding, ...]:
    """Look for programs, libraries, devices and memory; nothing missing is an error."""
    return (
        Finding(
            "platform",
            True,
            f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        ),
        _program("llama-quantize", "quantizes and dry-runs ik recipes", "ik"),
        _program("llama-perplexity", "verifies on GPUs (the embedded engine verifies on CPU)"),
        _program("llama-imatrix", "makes importance matrices on GPUs"),
        _embedded(),
        _mainline(),
        *_machine(),
    )


def _program(name: str, what: str, engine: Engine | None = None) -> Finding:
    try:
        found = find_program(name, engine=engine)
    except QuantmixError as err:
        return Finding(name, False, what, str(err))
    return Finding(name, True, f"{found.path} (from {found.origin}); {what}")


def _embedded() -> Finding:
    name = "embedded ik_llama.cpp"
    try:
        return Finding(name, True, f"{engine_id().build}: perplexity, KLD, imatrix in process")
    except QuantmixError as err:
        return Finding(name, False, "perplexity and KLD without binaries", str(err))


def _mainline() -> Finding:
    able, mend = [], ""
    for need, what in _MAINLINE.items():
        try:
            able.append(f"{find_mainline(need).origin} {what}")
        except QuantmixError as err:
            mend = str(err)
    detail = "; ".join(able or _MAINLINE.values())
    return Finding("mainline llama.cpp", bool(able), detail, mend)


def _machine() -> tuple[Finding, ...]:
    machine = read_machine()
    gpus = ", ".join(f"{name} {gib(total)}" for name, total in machine.gpus)
    return (
        Finding("GPUs", bool(gpus), gpus or "none seen", machine.gpu_note),
        Finding("RAM", machine.ram_bytes > 0, gib(machine.ram_bytes)),
    )
