"""Send one request to `mainline_child` and return what it said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from quantmix.errors import EngineError

_SECONDS: Final = 300
_SHOWN_LINES: Final = 3
_TELLING: Final = ("error", "fail", "assert", "abort", "does not support", "not supported")
_CHATTER: Final = ("create_tensor: loading tensor", "llama_kv_cache: layer")


@dataclass(frozen=True, slots=True)
class Answer:
    """What the child printed: its JSON document, and the engine's log."""

    document: Any
    log: str


@dataclass(frozen=True, slots=True)
class About:
    """What a library is: its version as it states it, and whether it quantizes."""

    version: str
    quantizes: bool


def ask(library: Path, request: dict[str, Any], timeout: float = _SECONDS) -> Answer:
    """Do `request` with `library` in a child process.

    Raises:
        EngineError: the engine refused, died or took too long; its last lines are shown.
    """
    body = json.dumps({**request, "library": str(library)})
    try:
        done = subprocess.run(
            [sys.executable, "-m", "quantmix.engine.mainline_child"],
            input=body,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
            env=child_environment(),
        )
    except subprocess.TimeoutExpired:
        raise EngineError(f"mainline ({library.name}) took over {timeout:.0f} s") from None
    if done.returncode != 0:
        how = f"died of signal {-done.returncode}" if done.returncode < 0 else "refused"
        raise EngineError(f"mainline ({library.name}) {how}: {last_words(done.stderr)}")
    document = json.loads(done.stdout) if done.stdout.strip() else None
    return Answer(document, done.stderr)


@cache
def about(library: Path) -> About:
    """Return version and abilities of a libllama.

    Raises:
        EngineError: it cannot be loaded, or its structures are not known.
    """
    document = ask(library, {"do": "about"}).document
    return About(str(document["version"]), bool(document["quantizes"]))


def child_environment() -> dict[str, str]:
    """Environment of a child: no debugger on an abort, no colours, no user's llama settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LLAMA_ARG_", "GGML_"))}
    kept["GGML_NO_BACKTRACE"] = "1"
    kept["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    return kept


def last_words(log: str) -> str:
    """Return the lines of a log that say why it ended, on one line."""
    lines = [
        line.strip()
        for line in log.splitlines()
        if line.strip() and not line.startswith(_CHATTER) and " buffer size = " not in line
    ]
    telling = [line for line in lines if any(word in line.lower() for word in _TELLING)]
    shown = (telling or lines)[-_SHOWN_LINES:]
    return " | ".join(shown) if shown else "it said nothing"
