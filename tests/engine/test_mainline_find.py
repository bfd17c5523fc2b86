"""Where mainline is looked for, in which order, and what is said when it is not there."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from quantmix.engine import mainline_fetch, mainline_find
from quantmix.engine.health import examine
from quantmix.engine.mainline_find import Mainline, candidates, find_mainline, flavour
from quantmix.errors import EngineError, EngineMissing, UsageError


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine without any mainline: empty PATH, cache, working folder and no xllamacpp."""
    for name in ("QUANTMIX_LIBLLAMA", "QUANTMIX_LLAMA_BIN", "QUANTMIX_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mainline_find, "_xllamacpp", lambda: None)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def folder_of(mainline: Mainline) -> Path:
    """The folder of the library that the tests use."""
    assert mainline.library is not None
    return mainline.library.parent


def test_nothing_found_says_what_to_install(bare: Path) -> None:
    """Without any engine the message names the fetch command and both variables."""
    with pytest.raises(EngineMissing, match=r"mainline_fetch.*QUANTMIX_LLAMA_BIN.*QUANTMIX_LIBLL"):
        find_mainline("quantize")


@pytest.mark.parametrize("name", ["QUANTMIX_LIBLLAMA", "QUANTMIX_LLAMA_BIN"])
def test_variable_that_names_nothing(
    name: str, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A variable that points at nothing is an error of use, not a reason to look elsewhere."""
    monkeypatch.setenv(name, str(bare / "nowhere"))
    with pytest.raises(UsageError, match=name):
        find_mainline("memory")


def test_variable_that_names_no_library(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is no libllama is refused with the loader's words."""
    file = bare / "libllama.so"
    file.write_text("not a library")
    monkeypatch.setenv("QUANTMIX_LIBLLAMA", str(bare))
    with pytest.raises(EngineError, match=r"libllama\.so"):
        find_mainline("memory")


@pytest.mark.engine
def test_variable_wins_over_packages(
    mainline: Mainline, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QUANTMIX_LIBLLAMA comes before node_modules, as a folder or as a file."""
    package = bare / "node_modules" / "@node-llama-cpp" / "linux-x64" / "bins"
    package.mkdir(parents=True)
    (package / "linux-x64").symlink_to(folder_of(mainline))
    assert find_mainline("quantize").origin.startswith("@node-llama-cpp")
    for value in (folder_of(mainline), mainline.library):
        monkeypatch.setenv("QUANTMIX_LIBLLAMA", str(value))
        found = find_mainline("quantize")
        assert found.origin == "QUANTMIX_LIBLLAMA"
        assert found.version.startswith(("llama ", "ggml "))


@pytest.mark.engine
def test_fetched_package_is_found(mainline: Mainline, bare: Path) -> None:
    """What the fetch command left in the cache is found without a variable."""
    target = bare / "cache" / "quantmix" / "node-llama-cpp" / mainline_fetch.VERSION / "bins"
    target.mkdir(parents=True)
    (target / mainline_fetch.platform_folder()).symlink_to(folder_of(mainline))
    assert find_mainline("memory").library is not None
    assert [c.origin.split()[0] for c in candidates()] == ["@node-llama-cpp"]


@pytest.mark.engine
def test_ik_program_is_not_mainline(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ik_llama.cpp's llama-quantize on PATH is told apart by its help and passed over."""
    spec = importlib.util.find_spec("ik_llama_cpp")
    assert spec is not None
    assert spec.origin is not None
    program = Path(spec.origin).parent / "bin" / "llama-quantize"
    assert flavour(program) == "ik"
    monkeypatch.setenv("PATH", str(program.parent))
    assert shutil.which("llama-quantize") is not None
    with pytest.raises(EngineMissing):
        find_mainline("quantize")


def test_program_of_no_flavour(bare: Path) -> None:
    """A program without either help text, or that cannot run, is neither engine."""
    program = bare / "llama-quantize"
    program.write_text("#!/bin/sh\necho hello\n")
    assert flavour(program) == ""
    program.chmod(0o755)
    assert flavour(program) == ""


def test_doctor_says_what_a_program_without_library_can_do(
    bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It checks and quantizes; what counts memory is still to be installed."""
    program = bare / "llama-quantize"
    program.write_text("#!/bin/sh\necho --tensor-type-file --dry-run\n")
    program.chmod(0o755)
    monkeypatch.setenv("QUANTMIX_LLAMA_BIN", str(bare))
    (found,) = (f for f in examine() if f.name == "mainline llama.cpp")
    assert found.ok
    assert found.detail == "QUANTMIX_LLAMA_BIN checks and quantizes recipes"
    assert "a mainline libllama is needed" in found.mend
