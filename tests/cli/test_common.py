"""What every command does with stdout that cannot take what it prints."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from quantmix.cli.common import print_table
from quantmix.models.catalog import catalog
from quantmix.models.ghost import write_ghost
from quantmix.models.sources import load_model


def run(*args: str, stdout: int = subprocess.PIPE, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a shell does."""
    return subprocess.run(
        [sys.executable, "-m", "quantmix.cli.main", *args],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **env},
        check=False,
    )


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "args", [("models", "--json"), ("offload", "smollm2-135m", "--gpus", "24G", "--quiet")]
)
def test_a_full_disk_is_one_line_and_exit_2(args: tuple[str, ...]) -> None:
    """`quantmix … > file` on a full disk names standard output; nothing fails again at exit."""
    with Path("/dev/full").open("w") as full:
        result = run(*args, stdout=full.fileno())
    assert result.returncode == 2
    assert result.stderr.startswith("quantmix: standard output cannot be written: ")
    assert result.stderr.count("\n") == 1


def test_names_that_stdout_has_no_characters_for_are_escaped(tmp_path: Path) -> None:
    """JSON stays one document on a terminal without Unicode, and with a name that is no UTF-8."""
    for name, encoding in (("é", "ascii"), (os.fsdecode(b"\xff"), "utf-8")):
        file = tmp_path / f"{name}.gguf"
        write_ghost(file, load_model("smollm2-135m"))
        result = run("inspect", str(file), "--json", PYTHONIOENCODING=encoding)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["model"]["source"] == str(file)
        line = run("offload", str(file), "--gpus", "24G", "--quiet", PYTHONIOENCODING=encoding)
        assert line.returncode == 0, line.stderr


def test_nothing_of_a_table_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names to copy are whole, in files as on a terminal of 60 columns."""
    monkeypatch.setenv("COLUMNS", "60")
    names = {line.split()[1] for line in run("models").stderr.splitlines() if line[:1] == "│"}
    assert {e.id for e in catalog().values()} <= names
    out = Console(width=60, file=io.StringIO())
    table = Table("role", "weights", "size", "read", "types", "more")
    table.add_row("ffn_gate_exps", "9,663,676,416", "18.00 GiB", "1.12 GiB", "bf16 ×48", "x" * 20)
    print_table(out, table)
    shown = out.file.getvalue()
    assert "ffn_gate_exps" in shown
    assert "…" not in shown
