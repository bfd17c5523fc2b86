"""What this machine and its engines can do, finding by finding."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

from quantmix.engine.find import find_program
from quantmix.errors import QuantmixError
from quantmix.ggml.types import Engine
from quantmix.units import gib


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked for: whether it is there, what it is, how to get it."""

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
        from quantmix.engine.native import engine_id

        return Finding(name, True, f"{engine_id().build}: perplexity, KLD, imatrix in process")
    except QuantmixError as err:
        return Finding(name, False, "perplexity and KLD without binaries", str(err))


def _mainline() -> Finding:
    name = "mainline llama.cpp"
    try:
        from quantmix.engine.mainline_find import find_mainline

        found = find_mainline("memory")
        return Finding(name, True, f"{found.origin}")
    except QuantmixError as err:
        return Finding(name, False, "checks mainline recipes, memory oracle", str(err))


def _machine() -> tuple[Finding, ...]:
    from quantmix.rig.machine import read_machine

    machine = read_machine()
    gpus = ", ".join(f"{g.name} {gib(g.total_bytes)}" for g in machine.gpus)
    return (
        Finding("GPUs", bool(machine.gpus), gpus or "none seen", "nvidia-smi lists none here"),
        Finding("RAM", machine.ram_bytes > 0, gib(machine.ram_bytes)),
    )
