"""Native work in a child: results, errors, crashes, and what happens when the parent dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from quantmix.engine import child
from quantmix.errors import BadFile, EngineError

HERE = str(Path(__file__).parent)


@pytest.fixture(autouse=True)
def _tasks_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    path = os.environ.get("PYTHONPATH")
    monkeypatch.setenv("PYTHONPATH", HERE + (os.pathsep + path if path else ""))


def test_result_and_events_come_back() -> None:
    """A task's events arrive in order, its result at the end; native prints do not disturb."""
    events: list[dict[str, Any]] = []
    assert child.run("child_tasks:count", {"n": 3}, events.append) == {"sum": 3}
    assert events == [{"i": 0}, {"i": 1}, {"i": 2}]


def test_an_error_keeps_its_class() -> None:
    """A QuantmixError raised in the child is raised by the parent, of the same class."""
    with pytest.raises(BadFile, match="no such thing"):
        child.run("child_tasks:refuse", {})


def test_a_native_crash_is_an_error_with_the_last_lines() -> None:
    """An abort in the child is an EngineError that names the signal and the native message."""
    with pytest.raises(EngineError, match=r"SIGABRT.*GGML_ASSERT of a kind"):
        child.run("child_tasks:crash", {})


def test_an_unexpected_exception_is_an_engine_error() -> None:
    """A bug in a task ends as an error with the traceback's last line, not as a hang."""
    with pytest.raises(EngineError, match="ZeroDivisionError"):
        child.run("child_tasks:bug", {})


def test_the_child_dies_with_its_parent(tmp_path: Path) -> None:
    """kill -9 of the parent takes the child along."""
    note = tmp_path / "pid"
    code = (
        "from quantmix.engine import child\n"
        f"child.run('child_tasks:sleep', {{'note': {str(note)!r}}})\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    _wait(lambda: note.exists() and note.read_text() != "")
    pid = int(note.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    _wait(lambda: not _alive(pid))


def _alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0]
    except OSError:
        return False


def _wait(done: Any) -> None:
    end = time.monotonic() + 20
    while not done():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.02)
