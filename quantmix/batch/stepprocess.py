"""A process that does steps, one after another, with its models kept loaded.

The parent writes payloads as JSON lines; the child answers with events and one outcome each.
While a step runs, all that it and its engines print goes to the step's log. The child dies with
its parent, and its engines with it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import FrameType
from typing import Any, Final, TextIO

from quantmix.batch.steps import Emit, Workshop, failed, perform

_PR_SET_PDEATHSIG: Final = 1
_STOP_SECONDS: Final = 10.0


class StepProcess:
    """A child that does steps in `folder`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._child: subprocess.Popen[str] | None = None
        self._stopped = False

    def run(self, payload: Mapping[str, Any], on_event: Emit) -> dict[str, Any]:
        """Do one step and return its outcome; a child that dies is an outcome too."""
        started = time.perf_counter()
        child = self._child
        if self._stopped:
            return failed("the process of the step was stopped", 4)
        if child is None or child.poll() is not None:
            child = self._child = self._start()
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(json.dumps(payload, allow_nan=False) + "\n")
            child.stdin.flush()
            for line in child.stdout:
                message = json.loads(line)
                if "outcome" in message:
                    outcome: dict[str, Any] = message["outcome"]
                    return outcome
                on_event(message)
        except BrokenPipeError:
            pass
        code = child.wait()
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"exited with {code}"
        return failed(f"the process of the step {how}", 4, started)

    def stop(self) -> None:
        """End the child and whatever it runs."""
        self._stopped = True
        child = self._child
        if child is None or child.poll() is not None:
            return
        child.send_signal(signal.SIGINT)
        try:
            child.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()

    def _start(self) -> subprocess.Popen[str]:
        # One BLAS thread: several of these run at once, and sums must not depend on how many.
        environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "-m", "quantmix.batch.stepprocess", str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=self._folder,
            env=environment,
        )


def main() -> int:
    """Entry point of the child."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):
        return 0  # the parent was gone before its death could be noticed
    signal.signal(signal.SIGINT, _interrupt_once)
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    workshop = Workshop()
    try:
        for line in sys.stdin:
            _answer(json.loads(line), workshop, answers)
    except (KeyboardInterrupt, BrokenPipeError):
        os._exit(130)
    return 0


def _interrupt_once(number: int, frame: FrameType | None) -> None:
    """Raise KeyboardInterrupt; a second signal must not disturb the cleaning up."""
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _answer(payload: Mapping[str, Any], workshop: Workshop, answers: TextIO) -> None:
    """Do one step with its output in its log, and send the outcome."""

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message, allow_nan=False) + "\n")

    def emit(event: dict[str, Any]) -> None:
        print(json.dumps(event), flush=True)
        send(event)

    with _logging_to(Path(payload["log"])):
        now = datetime.now(UTC).isoformat(timespec="seconds")
        print(f"{now} {payload['step']} {payload['recipe']} key {payload['key']}", flush=True)
        started = time.perf_counter()
        try:
            outcome = perform(payload, workshop, emit)
        except KeyboardInterrupt:
            print("interrupted", flush=True)
            raise
        except Exception as err:
            traceback.print_exc()
            outcome = failed(f"a bug in quantmix: {err!r}", 1, started)
        print(json.dumps(outcome), flush=True)
    send({"outcome": outcome})


class _logging_to:
    """Send this process's output, and its children's, to a file for a while."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        log = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._saved = (os.dup(1), os.dup(2))
        for target in (1, 2):
            os.dup2(log, target)
        os.close(log)

    def __exit__(self, *_: object) -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        for target, saved in zip((1, 2), self._saved, strict=True):
            os.dup2(saved, target)
            os.close(saved)


if __name__ == "__main__":
    sys.exit(main())
