"""Base log-probability files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from quantmix.engine import scores
from quantmix.engine.logprobs import BaseInfo, BaseReader, create
from quantmix.errors import BadFile, UsageError

INFO = BaseInfo("m", "d", "ik 1", "c", "t", n_ctx=16, n_chunk=2, n_vocab=50)


def _write(path: Path) -> list[scores.BaseRows]:
    rng = np.random.default_rng(0)
    made = []
    with create(path, INFO) as writer:
        for _ in range(2):
            logits = rng.standard_normal((INFO.n_scored, 50)).astype(np.float32)
            targets = rng.integers(0, 50, INFO.n_scored).astype(np.int32)
            made.append(scores.encode(logits, targets))
            writer.append(made[-1])
    return made


def test_rows_come_back_as_written(tmp_path: Path) -> None:
    """Codes, scales, offsets and nll of every chunk survive the file."""
    made = _write(tmp_path / "b.lp")
    reader = BaseReader(tmp_path / "b.lp")
    assert reader.info == INFO
    for i, rows in enumerate(made):
        found = reader.rows(i)
        for name in ("code", "scale", "offset", "nll"):
            np.testing.assert_array_equal(getattr(found, name), getattr(rows, name))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "x"}, "another model"),
        ({"engine": "ik 2"}, "another engine"),
        ({"corpus": "x"}, "another text"),
        ({"n_vocab": 51}, "another vocabulary"),
        ({"n_chunk": 3}, "holds 2 chunks"),
    ],
)
def test_a_foreign_base_is_refused(tmp_path: Path, change: dict[str, object], said: str) -> None:
    """A base of another model, engine, text or length is refused, saying which."""
    _write(tmp_path / "b.lp")
    with pytest.raises(BadFile, match=said):
        BaseReader(tmp_path / "b.lp").require(replace(INFO, **change))


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    """Truncated files, other formats and noise are refused."""
    _write(tmp_path / "b.lp")
    raw = (tmp_path / "b.lp").read_bytes()
    for content in (raw[:-1], raw[:40], b"_logits_" + bytes(100), b"noise", b""):
        (tmp_path / "bad.lp").write_bytes(content)
        with pytest.raises(BadFile):
            BaseReader(tmp_path / "bad.lp")


def test_a_failure_leaves_no_debris(tmp_path: Path) -> None:
    """A run that fails in the middle leaves nothing behind."""
    with pytest.raises(RuntimeError), create(tmp_path / "b.lp", INFO):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_noticed_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Too little disk is an error that says how much is needed."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 10))
    with pytest.raises(UsageError, match="need"), create(tmp_path / "b.lp", INFO):
        pass
    assert list(tmp_path.iterdir()) == []
