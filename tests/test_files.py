"""Where files go."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from quantmix.errors import UsageError
from quantmix.files import require_creatable


def test_a_place_is_tried_before_the_work(tmp_path: Path) -> None:
    """Folders are made, nothing is left behind, and what is there stays as it is."""
    out = tmp_path / "new" / "results.json"
    require_creatable(out)
    assert list(out.parent.iterdir()) == []
    out.write_text("kept")
    require_creatable(out)
    assert [p.read_text() for p in out.parent.iterdir()] == ["kept"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    """A folder, something below a file, and a folder without permission."""
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "x.json"):
        with pytest.raises(UsageError, match=f"cannot write {out}"):
            require_creatable(out)
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0o500)
    if os.access(locked, os.W_OK):
        return  # root writes anywhere
    with pytest.raises(UsageError, match="cannot write"):
        require_creatable(locked / "x.json")
