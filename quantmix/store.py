"""The measurements store: every PPL and KLD ever measured, in one SQLite file.

Where it is and what every column means: docs/interface.md, measurements store.

Rows are only added. What makes two of them comparable is in the row: fingerprints of model, mix,
file and corpus, n_ctx, chunks, engine and build, KV types. Several processes may write at once
(WAL, busy timeout); a committed row survives a kill.
"""

from __future__ import annotations

import json
import os
import socket
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from quantmix.errors import BadFile

_VERSION: Final = 2
_BUSY_SECONDS: Final = 60.0


@dataclass(frozen=True, slots=True)
class Measurement:
    """One measured file.

    Attributes:
        model, mix, data: fingerprints of the model, of its types, and of the file's bytes.
        model_name, file: for people.
        corpus: SHA-256 of the text's bytes.
        engine, build, ctk, ctv: what computed it.
        tensor_bytes, bpw: size of the mix.
        kld, ln_ratio, base: only when measured against a base; `base` is its data fingerprint.
        predicted: what was predicted, as in `verify --json`, or empty.
        types: tensor → type.
        imatrix: 1 when the file says that it was made with an importance matrix, 0 when it does
            not, None in rows that did not ask.
    """

    model: str
    mix: str
    data: str
    model_name: str
    file: str
    corpus: str
    n_ctx: int
    chunks: int
    tokens: int
    engine: str
    build: str
    ctk: str
    ctv: str
    tensor_bytes: int
    bpw: float
    ppl: float
    ppl_err: float
    seconds: float
    kld: float | None = None
    kld_err: float | None = None
    ln_ratio: float | None = None
    ln_ratio_err: float | None = None
    base: str | None = None
    same_top: float | None = None
    predicted: Mapping[str, Any] = field(default_factory=dict)
    types: Mapping[str, str] = field(default_factory=dict)
    imatrix: int | None = None
    host: str = field(default_factory=socket.gethostname)
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))


_JSON: Final = ("predicted", "types")
_NAMES: Final = tuple(f.name for f in fields(Measurement))


def default_path() -> Path:
    """Return `QUANTMIX_DB`, else ~/.local/share/quantmix/measurements.db (XDG_DATA_HOME)."""
    chosen = os.environ.get("QUANTMIX_DB")
    if chosen:
        return Path(chosen)
    root = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(root) / "quantmix" / "measurements.db"


class Store:
    """An open store.

    Raises:
        BadFile: the file is no store, is damaged, or cannot be made.
    """

    def __init__(self, path: str | Path | None = None) -> None:
        self.path = Path(path) if path else default_path()
        with self._errors():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.path, timeout=_BUSY_SECONDS, isolation_level=None)
            try:
                self._db.execute("PRAGMA synchronous = FULL")
                self._create()
                self._use_wal()
            except (sqlite3.Error, BadFile):
                self._db.close()  # ends the transaction; the file may be another's by now
                raise

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def add(self, measurement: Measurement) -> int:
        """Add a row, durable on return; return its number."""
        row = asdict(measurement)
        for name in _JSON:
            row[name] = json.dumps(row[name], allow_nan=False, sort_keys=True)
        marks = ", ".join(f":{name}" for name in _NAMES)
        with self._errors():
            done = self._db.execute(
                f"INSERT INTO measurement ({', '.join(_NAMES)}) VALUES ({marks})", row
            )
        assert done.lastrowid is not None
        return done.lastrowid

    def find(self, **conditions: Any) -> list[Measurement]:
        """Return rows whose columns equal `conditions`, oldest first.

        Raises:
            TypeError: a condition names no column.
        """
        unknown = set(conditions) - set(_NAMES)
        if unknown:
            raise TypeError(f"no such column: {', '.join(sorted(unknown))}")
        where = " AND ".join(f"{name} IS :{name}" for name in conditions) or "1"
        with self._errors():
            found = self._db.execute(
                f"SELECT {', '.join(_NAMES)} FROM measurement WHERE {where} ORDER BY id", conditions
            ).fetchall()
        return [_measurement(row) for row in found]

    def _create(self) -> None:
        """Make the table in a new file; refuse files of another kind or a newer version.

        One transaction: another process that makes the same file is either done or waits.
        """
        self._db.execute("BEGIN IMMEDIATE")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        tables = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if version > _VERSION or (version == 0 and tables):
            raise BadFile(f"{self.path} is not a measurements store of version {_VERSION}")
        kinds = {"str": "TEXT", "int": "INTEGER", "float": "REAL"}
        columns = []
        for f in fields(Measurement):
            text = str(f.type)
            kind = kinds.get(text.removesuffix(" | None"), "TEXT")
            columns.append(f"{f.name} {kind}" + ("" if "None" in text else " NOT NULL"))
        self._db.execute(
            f"CREATE TABLE IF NOT EXISTS measurement (id INTEGER PRIMARY KEY, {', '.join(columns)})"
        )
        if version == 1:
            self._db.execute("ALTER TABLE measurement ADD COLUMN imatrix INTEGER")
        self._db.execute("CREATE INDEX IF NOT EXISTS by_model ON measurement (model, mix)")
        self._db.execute(f"PRAGMA user_version = {_VERSION}")
        self._db.execute("COMMIT")

    def _use_wal(self) -> None:
        """Change a new file to WAL; SQLite's own busy timeout does not cover this."""
        deadline = time.monotonic() + _BUSY_SECONDS
        while True:
            try:
                self._db.execute("PRAGMA journal_mode = WAL")
                return
            except sqlite3.OperationalError as err:
                is_busy = err.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY
                if not is_busy or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        """Turn SQLite's and the system's errors into BadFile."""
        try:
            yield
        except (sqlite3.Error, OSError) as err:
            raise BadFile(
                f"the measurements store {self.path} cannot be used: {err}; "
                "name another with --db or QUANTMIX_DB"
            ) from err


def _measurement(row: tuple[Any, ...]) -> Measurement:
    values = dict(zip(_NAMES, row, strict=True))
    for name in _JSON:
        values[name] = json.loads(values[name])
    return Measurement(**values)
