"""The measurements store: durable, shared, honest about what it cannot read."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantmix.errors import BadFile
from quantmix.store import Measurement, Store, default_path


def _row(**changes: object) -> Measurement:
    values: dict[str, object] = {
        "model": "m", "mix": "x", "data": "d", "model_name": "n", "file": "f", "corpus": "c",
        "n_ctx": 512, "chunks": 2, "tokens": 510, "engine": "ik", "build": "1", "ctk": "f16",
        "ctv": "f16", "tensor_bytes": 10, "bpw": 4.5, "ppl": 7.25, "ppl_err": 0.1, "seconds": 1.0,
    }  # fmt: skip
    return Measurement(**{**values, **changes})  # type: ignore[arg-type]


def test_rows_come_back_with_every_field(tmp_path: Path) -> None:
    """A row read equals the row written, dictionaries and missing values included."""
    row = _row(kld=0.5, kld_err=0.01, types={"t": "q4_K"}, predicted={"ppl": 7.0}, base="b")
    with Store(tmp_path / "s.db") as store:
        store.add(row)
        store.add(_row(mix="y"))
    with Store(tmp_path / "s.db") as store:
        assert store.find(mix="x") == [row]
        assert store.find(kld=None)[0].mix == "y"
        assert len(store.find()) == 2


_WRITER = """
import sys
sys.path.insert(0, {here!r})
from test_store import _row
from quantmix.store import Store
with Store({path!r}) as store:
    for i in range({n}):
        store.add(_row(file="{tag}", chunks=i))
        print(i, flush=True)
"""


def _writer(path: Path, tag: str, n: int) -> subprocess.Popen[str]:
    code = _WRITER.format(here=str(Path(__file__).parent), path=str(path), n=n, tag=tag)
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def test_several_processes_lose_nothing(tmp_path: Path) -> None:
    """Three processes that write at once, into a store none of them found, keep all rows."""
    writers = [_writer(tmp_path / "s.db", tag, 30) for tag in "abc"]
    assert [w.wait(60) for w in writers] == [0, 0, 0]
    with Store(tmp_path / "s.db") as store:
        assert len(store.find()) == 90


def test_a_kill_loses_no_committed_row(tmp_path: Path) -> None:
    """Every row announced before kill -9 is there afterwards, and the store still works."""
    writer = _writer(tmp_path / "s.db", "a", 100_000)
    assert writer.stdout is not None
    seen = [writer.stdout.readline() for _ in range(20)]
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    with Store(tmp_path / "s.db") as store:
        assert len(store.find()) >= len(seen)
        store.add(_row())


def test_a_busy_store_is_waited_for(tmp_path: Path) -> None:
    """A writer waits for another one's transaction instead of failing."""
    Store(tmp_path / "s.db").close()
    other = sqlite3.connect(tmp_path / "s.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    writer = _writer(tmp_path / "s.db", "a", 1)
    time.sleep(0.7)
    assert writer.poll() is None
    other.execute("COMMIT")
    assert writer.wait(30) == 0


def test_other_files_are_refused(tmp_path: Path) -> None:
    """Noise, another program's database and a newer store are refused, untouched."""
    noise = tmp_path / "noise.db"
    noise.write_bytes(b"no database" * 200)
    with pytest.raises(BadFile, match="--db"):
        Store(noise)
    foreign = tmp_path / "foreign.db"
    with sqlite3.connect(foreign) as db:
        db.execute("CREATE TABLE theirs (x)")
    before = foreign.read_bytes()
    with pytest.raises(BadFile, match="not a measurements store"):
        Store(foreign)
    assert foreign.read_bytes() == before


def test_where_it_lives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """QUANTMIX_DB overrides ~/.local/share/quantmix/measurements.db."""
    monkeypatch.setenv("QUANTMIX_DB", str(tmp_path / "mine.db"))
    assert default_path() == tmp_path / "mine.db"
    monkeypatch.delenv("QUANTMIX_DB")
    monkeypatch.delenv("XDG_DATA_HOME", raising=False)
    assert default_path().parts[-4:] == (".local", "share", "quantmix", "measurements.db")


def test_unknown_columns_are_a_bug(tmp_path: Path) -> None:
    """Conditions are column names; anything else raises."""
    with Store(tmp_path / "s.db") as store, pytest.raises(TypeError, match="no such column"):
        store.find(colour="red")


def test_a_store_that_cannot_be_made_is_made_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the table cannot be written (disk full), no file is removed, and later it can."""
    full = sqlite3.OperationalError("database or disk is full")

    def fail(store: Store) -> None:
        raise full

    old = tmp_path / "old.db"
    with Store(old) as store:
        store.add(_row())
    with monkeypatch.context() as patch:
        patch.setattr(Store, "_create", fail)
        for path in (tmp_path / "new.db", old):
            with pytest.raises(BadFile, match="disk is full"):
                Store(path)
    for path, rows in ((tmp_path / "new.db", 1), (old, 2)):
        with Store(path) as store:
            store.add(_row())
            assert len(store.find()) == rows


def _when(monkeypatch: pytest.MonkeyPatch, statement: str, event: Callable[[], None]) -> None:
    """Let `event` happen just before a store first runs a statement that begins so."""
    real, due = sqlite3.connect, [event]

    class Hooked(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if sql.startswith(statement) and due:
                due.pop()()
            return super().execute(sql, *values)

    def connect(*args: Any, **options: Any) -> sqlite3.Connection:
        return real(*args, factory=Hooked, **options)

    monkeypatch.setattr(sqlite3, "connect", connect)


def test_two_that_make_the_same_store_lose_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that opens while another is between its first statements waits; both keep their rows."""

    def write(tag: str) -> None:
        with Store(tmp_path / "s.db") as store:
            store.add(_row(file=tag))

    other = threading.Thread(target=write, args=("b",))

    def meanwhile() -> None:
        other.start()
        other.join(0.5)

    _when(monkeypatch, "SELECT count", meanwhile)
    write("a")
    other.join()
    with Store(tmp_path / "s.db") as store:
        assert {m.file for m in store.find()} == {"a", "b"}


def test_the_change_to_wal_waits_for_a_writer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock that another holds just then delays the opening and is no error."""
    path = tmp_path / "s.db"

    def hold() -> None:
        with sqlite3.connect(path, isolation_level=None) as held:
            held.execute("BEGIN IMMEDIATE")
            locked.set()
            time.sleep(0.4)

    locked = threading.Event()
    holder = threading.Thread(target=hold)

    def meanwhile() -> None:
        holder.start()
        locked.wait(9)

    _when(monkeypatch, "PRAGMA journal_mode", meanwhile)
    with Store(path) as store:
        store.add(_row())
    holder.join()


def test_a_store_of_the_first_version_is_kept(tmp_path: Path) -> None:
    """Its rows come back, with nothing known of an importance matrix; new ones have it."""
    path = tmp_path / "s.db"
    with Store(path) as store:
        store.add(_row())
    old = sqlite3.connect(path)
    old.execute("ALTER TABLE measurement DROP COLUMN imatrix")
    old.execute("PRAGMA user_version = 1")
    old.close()
    with Store(path) as store:
        store.add(_row(mix="y", imatrix=1))
        assert [(r.mix, r.imatrix) for r in store.find()] == [("x", None), ("y", 1)]
    with Store(path) as store:
        assert len(store.find()) == 2
