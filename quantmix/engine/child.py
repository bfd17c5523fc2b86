"""Native work in a child process, so that a native crash cannot take the user's process along.

The parent sends one JSON request; the child answers with JSON lines (events, then a result or an
error) on what was its stdout. Everything the native library prints goes to a log that is shown
only when something fails. The child dies with its parent (PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any, BinaryIO, Final

from quantmix import errors
from quantmix.errors import EngineError, QuantmixError

Emit = Callable[[dict[str, Any]], None]
Task = Callable[[dict[str, Any], Emit], dict[str, Any]]

_LOG_LINES: Final = 6
_COMPLAINT: Final = re.compile(r"assert|error|fail|abort|missing|cannot|invalid", re.IGNORECASE)
_PR_SET_PDEATHSIG: Final = 1


def run(task: str, request: dict[str, Any], on_event: Emit | None = None) -> dict[str, Any]:
    """Run `task` (`package.module:function`) in a child; return its result.

    Args:
        task: a function `(request, emit) -> result`, all three JSON objects.
        request: handed to the task.
        on_event: called with each object that the task emits.

    Raises:
        QuantmixError: the very error the task raised, the native log's reason added.
        EngineError: the child died (native assert, out of memory, kill); last log lines included.
    """
    command = [sys.executable, "-m", "quantmix.engine.child", task]
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        try:
            return _converse(child, request, on_event, log)
        finally:
            if child.poll() is None:
                child.kill()
            child.wait()
            for pipe in (child.stdin, child.stdout):
                if pipe is not None:
                    pipe.close()


def _converse(
    child: subprocess.Popen[str], request: dict[str, Any], on_event: Emit | None, log: BinaryIO
) -> dict[str, Any]:
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        json.dump(request, child.stdin)
        child.stdin.close()
    except BrokenPipeError:
        pass
    for line in child.stdout:
        message = json.loads(line)
        if "result" in message:
            result: dict[str, Any] = message["result"]
            return result
        if "error" in message:
            raise _rebuilt(message["error"], _tail(log))
        if on_event is not None:
            on_event(message)
    code = child.wait()
    how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
    raise EngineError(f"the native engine {how}{_reason(_tail(log))}")


def _reason(log: list[str]) -> str:
    """Return what the last lines say of a death: those that complain, else the very last."""
    lines = [line for line in log if _COMPLAINT.search(line)] or log[-1:]
    return f": {' | '.join(lines)}" if lines else ", it printed nothing"


def _rebuilt(error: dict[str, str], log: list[str]) -> QuantmixError:
    """Return the child's error as an object of its own class."""
    kind = getattr(errors, error["kind"], EngineError)
    reasons = [line for line in log if "error" in line.lower() or "fail" in line.lower()]
    native = (
        f" ({reasons[0]})" if reasons and issubclass(kind, EngineError | errors.BadFile) else ""
    )
    made: QuantmixError = kind(error["message"] + native)
    return made


def _tail(log: BinaryIO) -> list[str]:
    """Return the last lines of the log that say something."""
    log.seek(0)
    text = log.read()[-8192:].decode("utf-8", "replace")
    return [line.strip() for line in text.splitlines() if line.strip()][-_LOG_LINES:]


def main() -> int:
    """Entry point of the child: read the request, call the task, answer in JSON lines."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    request = json.load(sys.stdin)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def emit(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message, allow_nan=False) + "\n")

    module, _, name = sys.argv[1].partition(":")
    task: Task = getattr(importlib.import_module(module), name)
    try:
        emit({"result": task(request, emit)})
    except QuantmixError as err:
        emit({"error": {"kind": type(err).__name__, "message": str(err)}})
    except KeyboardInterrupt:
        return 130
    answers.flush()
    # Native destructors have aborted at exit; nothing is left to clean up.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
