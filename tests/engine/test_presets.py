"""Presets as the real llama-quantize applies them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from quantmix import predict
from quantmix.engine import presets
from quantmix.engine.find import Program, find_program
from quantmix.errors import EngineError, UnknownName
from quantmix.ggml.weights import open_weights
from quantmix.models.sources import load_model
from quantmix.offload import stored

pytestmark = pytest.mark.engine


def written(source: Path, preset: str, imatrix: Path | None, out: Path) -> dict[str, str]:
    """The types of a file that llama-quantize really wrote."""
    program = find_program("llama-quantize", engine="ik").path
    matrix = ["--imatrix", str(imatrix)] if imatrix else []
    command = [str(program), *matrix, str(source), str(out), preset, "2"]
    subprocess.run(command, check=True, capture_output=True, timeout=300)
    return open_weights(out).types()


@pytest.mark.parametrize(
    ("preset", "with_matrix"),
    [("Q4_K_M", False), ("Q3_K_L", True), ("IQ4_KS", False), ("IQ4_KS", True), ("IQ2_XXS", True)],
)
@pytest.mark.parametrize("experts", [False, True])
def test_types_are_those_of_a_file_really_written(
    tiny: Path,
    tiny_moe: Path,
    tiny_imatrix: Path,
    tmp_path: Path,
    preset: str,
    with_matrix: bool,
    experts: bool,
) -> None:
    """Tensor by tensor, dense and sparse, with and without an importance matrix."""
    source = tiny_moe if experts else tiny
    if experts and with_matrix:
        pytest.skip("the matrix is of the dense model")
    matrix = tiny_imatrix if with_matrix else None
    model = load_model(str(source))
    told = presets.types_of(model, preset, "ik", imatrix=with_matrix)
    types = written(source, preset, matrix, tmp_path / "q.gguf")
    assert told == {n: q for n, q in types.items() if n in told}
    assert len(told) == sum(t.quantizable for t in model.tensors)
    assert len(set(told.values())) > 1


def test_what_takes_a_type_takes_a_preset() -> None:
    """Sizes, quality and placement of a preset are those of its mix."""
    model = load_model("llama-3.1-8b")
    types = presets.types_of(model, "Q4_K_M", "ik")
    assert predict.uniform(model, "Q4_K_M") == types
    assert predict.uniform(model, "q4_K") != types
    file = stored(model, "ik", "Q4_K_M")
    assert {t.name: t.source_type for t in file.model.tensors if t.quantizable} == types
    assert file.tensor_bytes == predict.predict(model, types).size.tensor_bytes


def test_experts_that_come_as_mxfp4_stay_so() -> None:
    """What a preset decides of gpt-oss-20b is the rest, under a fifth of its bytes."""
    model = load_model("gpt-oss-20b")
    for preset in ("Q2_K", "Q4_K_M", "Q8_0"):
        types = presets.types_of(model, preset, "ik")
        assert {q for n, q in types.items() if "_exps" in n} == {"mxfp4"}
        file = stored(model, "ik", preset)
        experts = sum(n for name, n in file.sizes.items() if "_exps" in name)
        assert experts > 0.8 * file.tensor_bytes


def test_presets_are_told_from_types() -> None:
    """Capitals mean a preset; what is neither is named with the nearest type."""
    assert presets.is_preset("Q8_0", "ik")
    assert presets.is_preset("Q4_K_M", "mainline")
    assert not presets.is_preset("q8_0", "ik")
    assert not presets.is_preset("BF16", "ik")
    assert not presets.is_preset("IQ4_KS", "mainline")
    with pytest.raises(UnknownName, match="q4_K"):
        predict.uniform(load_model("llama-3.1-8b"), "Q4_K_X")


def test_an_engine_that_does_not_know_a_model_is_told() -> None:
    """Its failed assertion comes last, after what to do."""
    model = load_model("gemma-4-31b-it")
    with pytest.raises(EngineError, match="ik engine here does not make Q4_K_M of gemma4"):
        predict.uniform(model, "Q4_K_M")


def test_a_program_that_does_not_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where the packaged engine is not for this system."""
    program = tmp_path / "llama-quantize"
    program.write_text("no program")
    program.chmod(0o755)
    found = Program(program, "ik-llama-cpp-python")
    monkeypatch.setattr(presets, "find_program", lambda *_, **__: found)
    with pytest.raises(EngineError, match="does not run"):
        presets.names.__wrapped__("ik")
