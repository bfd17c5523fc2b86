"""The state of a batch: durable, for one batch at a time, refusing what it does not know."""

from __future__ import annotations

import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest

from quantmix.batch.state import Intent, State
from quantmix.errors import BadFile, UsageError

INTENT = Intent(
    "r", "design", "k", 1.5, {"bpw": 3.5}, {"r/a": "d"}, ((".quantmix/stage/x/r", "r"),)
)


def test_an_intent_is_there_until_it_is_done(tmp_path: Path) -> None:
    """What was finished is seen by the next one to open the state, then recorded as done."""
    with State(tmp_path) as state:
        state.started("r", "design", "k")
        state.intend(INTENT)
        assert state.step("r", "design") is None
    with State(tmp_path) as state:
        assert state.intents() == [INTENT]
        state.done(INTENT)
        assert state.intents() == []
        last = state.step("r", "design")
    assert last is not None
    assert (last.status, last.key, last.result, last.outputs) == (
        "done",
        "k",
        {"bpw": 3.5},
        {"r/a": "d"},
    )


def test_the_record_of_events(tmp_path: Path) -> None:
    """Starts and ends are written down in order."""
    with State(tmp_path) as state:
        state.started("r", "design", "k")
        state.failed("r", "design", "k", 0.1, "why", 3, True)
        state.started("r", "design", "l")
        state.intend(INTENT)
        assert [e[3] for e in state.events()] == ["started", "failed", "started", "finished"]
        last = state.step("r", "design")
    assert last is not None
    assert (last.status, last.reason, last.code, last.lasting) == ("failed", "why", 3, True)


def test_one_batch_at_a_time(tmp_path: Path) -> None:
    """A second batch in the same folder is refused; a look is not."""
    with State(tmp_path):
        with pytest.raises(UsageError, match="another batch"):
            State(tmp_path)
        State(tmp_path, readonly=True).close()
    State(tmp_path).close()


def test_a_look_writes_nothing(tmp_path: Path) -> None:
    """A plan for a fresh folder leaves no trace."""
    with State(tmp_path / "out", readonly=True) as state:
        assert state.fact("x", lambda: 1) == 1
    assert not (tmp_path / "out").exists()


def test_a_look_while_a_batch_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A look that begins before the tables are there, and a batch that makes them, both work."""
    (tmp_path / ".quantmix").mkdir()
    (tmp_path / ".quantmix" / "batch.db").touch()
    real, batch = sqlite3.connect, []

    class Hooked(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if sql.startswith("SELECT count") and not batch:
                batch.append(threading.Thread(target=lambda: State(tmp_path).close()))
                batch[0].start()
                batch[0].join(0.5)
            return super().execute(sql, *values)

    monkeypatch.setattr(sqlite3, "connect", lambda *a, **k: real(*a, factory=Hooked, **k))
    with State(tmp_path, readonly=True) as state:
        assert state.intents() == []
    batch[0].join()
    with State(tmp_path) as state:
        assert state.intents() == []


def test_digests_are_made_once_per_content(tmp_path: Path) -> None:
    """A file is hashed again only when its size or time changed."""
    path = tmp_path / "f"
    path.write_text("one")
    seen = []
    with State(tmp_path / "out") as state:
        for _ in range(2):
            state.digest(path, lambda p: seen.append(p) or "x")
        path.write_text("other")
        state.digest(path, lambda p: seen.append(p) or "y")
    assert len(seen) == 2


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    """A database of something else, or of a newer version, is left alone."""
    folder = tmp_path / ".quantmix"
    folder.mkdir()
    with sqlite3.connect(folder / "batch.db") as db:
        db.execute("CREATE TABLE t (x)")
    with pytest.raises(BadFile, match="not a batch state"):
        State(tmp_path)
    (folder / "batch.db").write_bytes(b"no database at all, but long enough to be looked at" * 9)
    with pytest.raises(BadFile):
        State(tmp_path)
