"""The ghost check: the real llama-quantize walks the recipe."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

import quantmix as qm
from quantmix.budget import Budget
from quantmix.engine.find import Program, find_program
from quantmix.engine.ghost import check, static_problems
from quantmix.engine.ik_dry_run import parse
from quantmix.errors import EngineError, EngineMissing
from quantmix.models.ghost import write_ghost
from quantmix.recipe import Recipe

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    """The recipe of the mission."""
    return qm.design(qm.load_model("deepseek-r1"), Budget.from_vram("192G"))


def test_the_engine_agrees_on_every_tensor(recipe: Recipe) -> None:
    """1086 tensors: no type, no byte and no printed size differs."""
    result = check(recipe)
    assert result.ok
    assert result.engine == "llama-quantize dry-run"
    assert result.tensors_compared == 1086
    assert result.types_differing == result.bytes_differing == result.print_mismatches == 0


@pytest.mark.parametrize("layout", ["legacy", "ik"])
def test_other_layouts_are_walked_too(layout: str) -> None:
    """The 1025- and 1147-tensor files of R1 agree as well."""
    model = qm.load_model("deepseek-r1", layout=layout)
    result = check(qm.design(model, Budget.from_vram("220G")), model)
    assert result.ok, result.problems[:3]
    assert result.tensors_compared == len(model.tensors)


def test_a_wrong_recipe_is_caught_by_engine_and_rules(recipe: Recipe) -> None:
    """A recipe whose tensors say something else than its rules fails, tensor by tensor."""
    first = next(t for t in recipe.tensors if t.type == "iq2_kt")
    wrong = replace(
        recipe,
        tensors=tuple(replace(t, type="iq3_kt") if t is first else t for t in recipe.tensors),
    )
    result = check(wrong)
    assert not result.ok
    assert not result.rules_matched_back
    assert result.types_differing == 1
    assert {p.tensor for p in result.problems} == {first.name}


def test_an_overfull_device_is_a_problem(recipe: Recipe) -> None:
    """A device that holds more than it has is named."""
    gpu = replace(recipe.devices[0], capacity_bytes=1)
    broken = replace(recipe, devices=(gpu, *recipe.devices[1:]))
    problems = static_problems(broken, qm.load_model("deepseek-r1"))
    assert any("over capacity" in p.problem for p in problems)


def test_quantize_sh_gives_the_same_sizes(recipe: Recipe, tmp_path: Path) -> None:
    """The published script, run by hand with --dry-run, prints the recipe's total."""
    model = qm.load_model("deepseek-r1")
    folder = recipe.save(tmp_path / "r", figures=False)
    ghost = tmp_path / "ghost.gguf"
    write_ghost(ghost, model)
    program = find_program("llama-quantize")
    done = subprocess.run(
        [
            str(folder / "quantize.sh"),
            *("--dry-run", "--ignore-imatrix-rules"),
            *(str(ghost), str(tmp_path / "out.gguf")),
        ],
        env={"QUANTIZE": str(program.path), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-500:]
    dry = parse(done.stderr, program)
    assert {n: (t.type, t.bytes) for n, t in dry.tensors.items()} == {
        t.name: (t.type, t.bytes) for t in recipe.tensors
    }
    assert dry.printed_total_mib == pytest.approx(recipe.size.tensor_bytes / 2**20, abs=0.01)


def test_a_missing_engine_says_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A folder without the program is named."""
    monkeypatch.setenv("QUANTMIX_LLAMA_BIN", str(tmp_path))
    with pytest.raises(EngineMissing, match="QUANTMIX_LLAMA_BIN"):
        find_program("llama-quantize")


def mainline_like(folder: Path) -> Path:
    """Put a program with the help of mainline's llama-quantize into a folder."""
    folder.mkdir()
    program = folder / "llama-quantize"
    program.write_text("#!/bin/sh\necho 'usage: --tensor-type-file --dry-run'\n")
    program.chmod(0o755)
    return program


def test_a_program_of_the_other_engine_on_path_is_passed_over(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With mainline's llama-quantize first on PATH, ik's is still found, there or packaged."""
    ours = find_program("llama-quantize", engine="ik").path
    mainline_like(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    assert find_program("llama-quantize").path == tmp_path / "bin" / "llama-quantize"
    assert find_program("llama-quantize", engine="ik").path == ours
    assert find_program("llama-quantize", engine="mainline").origin == "PATH"
    small = qm.design(qm.load_model("qwen3-0.6b"), Budget.from_vram("6G"))
    assert check(small).engine == "llama-quantize dry-run"
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{ours.parent}")
    found = find_program("llama-quantize", engine="ik")
    assert (found.path, found.origin) == (ours, "PATH")


def test_a_named_program_of_the_other_engine_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The message says whose program was named, and by what."""
    program = mainline_like(tmp_path / "bin")
    with pytest.raises(EngineMissing, match=r"--llama-bin .* mainline's llama-quantize"):
        find_program("llama-quantize", program, engine="ik")
    monkeypatch.setenv("QUANTMIX_LLAMA_BIN", str(program.parent))
    with pytest.raises(EngineMissing, match=r"QUANTMIX_LLAMA_BIN .* mainline's llama-quantize"):
        find_program("llama-quantize", engine="ik")


def test_a_log_without_tensors_is_an_engine_error() -> None:
    """Recorded words of an engine that stopped early are shown (replayed, no engine runs)."""
    program = Program(Path("llama-quantize"), "PATH")
    with pytest.raises(EngineError, match="out of luck"):
        parse("llama_model_loader: nothing\nout of luck\n", program)
