"""What a batch remembers: one SQLite file in `<out>/.quantmix/`, written by the batch alone.

    step     per recipe and step: the key of its inputs, how it ended, what it wrote
    intent   outputs that lie complete in the stage and are about to get their names
    event    every start and end, in order: the record of what ran, never rewritten
    digest   content hashes of files, by path, size and time
    fact     what is known of models, by what they were read from

A step is finished once its intent is committed: from then on every restart only moves files.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from quantmix.errors import BadFile, UsageError

FOLDER: Final = ".quantmix"
"""Folder of a batch's state, stage and logs, inside `out`."""

Status = Literal["done", "failed"]

_VERSION: Final = 1
_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS step (
    recipe TEXT, step TEXT, key TEXT NOT NULL, status TEXT NOT NULL, seconds REAL NOT NULL,
    result TEXT NOT NULL, reason TEXT NOT NULL, lasting INTEGER NOT NULL, code INTEGER NOT NULL,
    outputs TEXT NOT NULL, PRIMARY KEY (recipe, step));
CREATE TABLE IF NOT EXISTS intent (
    recipe TEXT, step TEXT, key TEXT NOT NULL, seconds REAL NOT NULL, result TEXT NOT NULL,
    outputs TEXT NOT NULL, moves TEXT NOT NULL, PRIMARY KEY (recipe, step));
CREATE TABLE IF NOT EXISTS event (
    id INTEGER PRIMARY KEY, time TEXT NOT NULL, recipe TEXT NOT NULL, step TEXT NOT NULL,
    key TEXT NOT NULL, what TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS digest (
    path TEXT PRIMARY KEY, size INTEGER NOT NULL, mtime_ns INTEGER NOT NULL, digest TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS fact (name TEXT PRIMARY KEY, value TEXT NOT NULL);
"""


@dataclass(frozen=True, slots=True)
class Done:
    """How a step ended last.

    Attributes:
        key: hash of its inputs.
        result: what later steps and the summary need to know of it.
        reason: why it failed. code: the exit code of that failure.
        lasting: the same inputs will fail again: not worth another try.
        outputs: file relative to `out` → digest.
    """

    key: str
    status: Status
    seconds: float
    result: Mapping[str, Any]
    reason: str = ""
    lasting: bool = False
    code: int = 0
    outputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Intent:
    """A finished step whose outputs are being moved to their names.

    `moves` are (from, to) relative to `out`.
    """

    recipe: str
    step: str
    key: str
    seconds: float
    result: Mapping[str, Any]
    outputs: Mapping[str, str]
    moves: tuple[tuple[str, str], ...]


class State:
    """An open state; a second batch on the same folder is refused.

    Raises:
        UsageError: another batch works there, or the folder cannot be written.
        BadFile: the file is no state of this version, or damaged.
    """

    def __init__(self, out: str | Path, *, readonly: bool = False) -> None:
        self.out = Path(out)
        self.folder = self.out / FOLDER
        self.path = self.folder / "batch.db"
        self._lock: int | None = None
        if readonly and not self.path.exists():
            self._db = sqlite3.connect(":memory:", isolation_level=None)
        else:
            self._db = self._open(readonly)
        try:
            self._guarded(lambda: self._create(readonly))
        except BadFile:
            self.close()
            raise

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and let others in."""
        self._db.close()
        self._unlock()

    # -- steps ------------------------------------------------------------------------------

    def step(self, recipe: str, step: str) -> Done | None:
        """Return how a step ended last, None when it never did."""
        row = self._one(
            "SELECT key, status, seconds, result, reason, lasting, code, outputs FROM step "
            "WHERE recipe = ? AND step = ?",
            (recipe, step),
        )
        if row is None:
            return None
        key, status, seconds, result, reason, lasting, code, outputs = row
        return Done(
            *(key, status, seconds, json.loads(result), reason, bool(lasting), code),
            outputs=json.loads(outputs),
        )

    def started(self, recipe: str, step: str, key: str) -> None:
        """Note that a step was started."""
        self._event(recipe, step, key, "started")

    def intend(self, intent: Intent) -> None:
        """Commit that a step is finished and its outputs are to be moved; durable on return."""
        with self._transaction():
            self._run(
                "INSERT OR REPLACE INTO intent VALUES (?, ?, ?, ?, ?, ?, ?)",
                (
                    *(intent.recipe, intent.step, intent.key, intent.seconds),
                    *(_text(intent.result), _text(intent.outputs), _text(intent.moves)),
                ),
            )
            self._event(intent.recipe, intent.step, intent.key, "finished")

    def intents(self) -> list[Intent]:
        """Return what was finished and not yet recorded as done."""
        rows = self._all(
            "SELECT recipe, step, key, seconds, result, outputs, moves FROM intent ORDER BY rowid"
        )
        return [
            Intent(
                *(recipe, step, key, seconds, json.loads(result), json.loads(outputs)),
                moves=tuple((a, b) for a, b in json.loads(moves)),
            )
            for recipe, step, key, seconds, result, outputs, moves in rows
        ]

    def done(self, intent: Intent) -> None:
        """Record that the outputs of an intent have their names."""
        with self._transaction():
            self._run(
                "INSERT OR REPLACE INTO step VALUES (?, ?, ?, 'done', ?, ?, '', 0, 0, ?)",
                (
                    *(intent.recipe, intent.step, intent.key, intent.seconds),
                    *(_text(intent.result), _text(intent.outputs)),
                ),
            )
            self.forget(intent)

    def forget(self, intent: Intent) -> None:
        """Take back an intent."""
        self._run("DELETE FROM intent WHERE recipe = ? AND step = ?", (intent.recipe, intent.step))

    def failed(
        self,
        recipe: str,
        step: str,
        key: str,
        seconds: float,
        reason: str,
        code: int,
        lasting: bool,
    ) -> None:
        """Record a failure with its reason; an intent of the step is taken back."""
        with self._transaction():
            self._run("DELETE FROM intent WHERE recipe = ? AND step = ?", (recipe, step))
            self._run(
                "INSERT OR REPLACE INTO step VALUES (?, ?, ?, 'failed', ?, '{}', ?, ?, ?, '{}')",
                (recipe, step, key, seconds, reason, int(lasting), code),
            )
            self._event(recipe, step, key, "failed")

    def rewritten(self, recipe: str, step: str, outputs: Mapping[str, str]) -> None:
        """Record that files of a finished step were rewritten or removed by a later one."""
        self._run(
            "UPDATE step SET outputs = ? WHERE recipe = ? AND step = ?",
            (_text(outputs), recipe, step),
        )

    def events(self) -> list[tuple[str, str, str, str]]:
        """Return all (recipe, step, key, what), oldest first."""
        return self._all("SELECT recipe, step, key, what FROM event ORDER BY id")

    def made(self, recipe: str) -> list[str]:
        """Return the steps that this batch ever finished for a recipe."""
        rows = self._all(
            "SELECT DISTINCT step FROM event WHERE recipe = ? AND what = 'finished' ORDER BY step",
            recipe,
        )
        return [step for (step,) in rows]

    def pace(self, step: str) -> list[tuple[float, str]]:
        """Return (seconds, recipe) of all finished steps of a kind."""
        return self._all(
            "SELECT seconds, recipe FROM step WHERE step = ? AND status = 'done'", step
        )

    # -- files and models -------------------------------------------------------------------

    def digest(self, path: str | Path, make: Callable[[Path], str]) -> str:
        """Return the digest of a file, made anew only when its size or time changed.

        Raises:
            OSError: it is not there.
        """
        file = Path(path).absolute()
        stat = file.stat()
        row = self._one("SELECT size, mtime_ns, digest FROM digest WHERE path = ?", (str(file),))
        if row is not None and row[:2] == (stat.st_size, stat.st_mtime_ns):
            return str(row[2])
        made = make(file)
        self.remember_digest(file, made)
        return made

    def remember_digest(self, path: Path, digest: str) -> None:
        """Store the digest of a file as it is now."""
        stat = path.stat()
        self._run(
            "INSERT OR REPLACE INTO digest VALUES (?, ?, ?, ?)",
            (str(path.absolute()), stat.st_size, stat.st_mtime_ns, digest),
        )

    def fact(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what is known under `name`, a JSON value; made and stored at first sight."""
        row = self._one("SELECT value FROM fact WHERE name = ?", (name,))
        if row is not None:
            return json.loads(row[0])
        made = make()
        self._run("INSERT OR REPLACE INTO fact VALUES (?, ?)", (name, _text(made)))
        return made

    # -- SQLite -----------------------------------------------------------------------------

    def _open(self, readonly: bool) -> sqlite3.Connection:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not readonly:
                self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._unlock()
            raise UsageError(
                f"another batch is working in {self.out}: wait for it, or use another out"
            ) from None
        except OSError as err:
            raise UsageError(f"cannot write to {self.out}: {err.strerror}") from err
        return sqlite3.connect(self.path, timeout=30, isolation_level=None)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _create(self, readonly: bool) -> None:
        """Make the tables in a new file, in one transaction; a look makes them in memory."""
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("BEGIN" if readonly else "BEGIN IMMEDIATE")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if version > _VERSION or (version == 0 and tables):
            raise BadFile(f"{self.path} is not a batch state of version {_VERSION}: move it away")
        if readonly and version == 0:
            self._db.close()
            self._db = sqlite3.connect(":memory:", isolation_level=None)
            self._create(readonly=False)
            return
        if not readonly:
            for statement in _SCHEMA.split(";"):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {_VERSION}")
        self._db.execute("COMMIT")

    def _event(self, recipe: str, step: str, key: str, what: str) -> None:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._run(
            "INSERT INTO event (time, recipe, step, key, what) VALUES (?, ?, ?, ?, ?)",
            (now, recipe, step, key, what),
        )

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing."""
        self._run("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._run("ROLLBACK")
            raise
        self._run("COMMIT")

    def _run(self, sql: str, values: tuple[Any, ...] = ()) -> sqlite3.Cursor:
        done: sqlite3.Cursor = self._guarded(lambda: self._db.execute(sql, values))
        return done

    def _one(self, sql: str, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
        row: tuple[Any, ...] | None = self._run(sql, values).fetchone()
        return row

    def _all(self, sql: str, *values: Any) -> list[Any]:
        return self._run(sql, values).fetchall()

    def _guarded(self, work: Callable[[], Any]) -> Any:
        try:
            return work()
        except sqlite3.Error as err:
            raise BadFile(f"the batch state {self.path} cannot be used: {err}") from err


def _text(value: Any) -> str:
    return json.dumps(value, allow_nan=False, sort_keys=True)
