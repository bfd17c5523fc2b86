"""Weights that were trained in four bits: q4_0 holds them, with an importance matrix."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from mixes import mix_of, recipe_of
from tiny import write_tiny

from quantmix.engine.imatrix import collect
from quantmix.engine.mainline_find import Mainline
from quantmix.engine.quantize import preflight, quantize
from quantmix.ggml.weights import open_weights
from quantmix.models.sources import load_model
from quantmix.recipe import EngineInfo, Recipe

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four experts on a grid of 15 levels, all else random."""
    folder = tmp_path_factory.mktemp("grid")
    return write_tiny(folder / "grid.gguf", experts=4, four_bits=True)


@pytest.fixture(scope="module")
def matrix(source: Path, text: Path) -> Path:
    """Its importance matrix."""
    out = source.with_suffix(".dat")
    collect(source, text, out, threads=1)
    return out


def _recipe(source: Path, engine: str) -> Recipe:
    kinds = {"ffn_gate_exps": "q4_0", "ffn_up_exps": "q4_0", "ffn_down_exps": "q4_0"}
    recipe = recipe_of(source, mix_of(open_weights(source), lambda r, _: kinds.get(r, "q8_0")))
    if engine == "mainline":
        return replace(recipe, engine=EngineInfo("mainline", "test", "Q4_0"))
    return recipe


def _errors(source: Path, made: Path) -> dict[str, float]:
    """Relative squared error of every tensor of experts, decoded by the gguf package."""
    before = {t.name: t for t in gguf.GGUFReader(source).tensors}
    out = {}
    for t in gguf.GGUFReader(made).tensors:
        if "_exps" in t.name:
            x = before[t.name].data.astype(np.float64)
            back = gguf.dequantize(t.data, t.tensor_type).astype(np.float64)
            out[t.name] = float(((x - back) ** 2).sum() / (x**2).sum())
    return out


def test_the_data_says_which_weights_lie_on_the_grid(source: Path, tiny_moe: Path) -> None:
    """Experts of the one file and nothing else; of a random file none."""
    model = load_model(str(source))
    exact = {t.role for t in model.tensors if t.exact_type}
    assert exact == {"ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"}
    assert {t.exact_type for t in model.tensors if t.role in exact} == {"q4_0"}
    assert any("trained in 4 bits" in note for note in model.notes)
    assert not any(t.exact_type for t in load_model(str(tiny_moe)).tensors)


def test_ik_finds_the_grid_with_a_matrix_only(source: Path, matrix: Path, tmp_path: Path) -> None:
    """Error 1e-6 with one (the scale has 16 bits), a thousand times that without."""
    found = []
    for name, imatrix in (("with", matrix), ("without", None)):
        plan = preflight(_recipe(source, "ik"), source, tmp_path / f"{name}.gguf", imatrix=imatrix)
        assert any("trained in 4 bits" in w for w in plan.warnings) is (imatrix is None)
        found.append(_errors(source, quantize(plan, threads=1).path))
    assert max(found[0].values()) < 3e-6
    assert min(found[1].values()) > 3e-3


def test_mainline_finds_the_grid_with_a_matrix_only(
    source: Path,
    matrix: Path,
    mainline: Mainline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same of mainline's library."""
    monkeypatch.delenv("QUANTMIX_LLAMA_BIN", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("QUANTMIX_LIBLLAMA", str(mainline.library))
    found = []
    for name, imatrix in (("with", matrix), ("without", None)):
        recipe = _recipe(source, "mainline")
        plan = preflight(recipe, source, tmp_path / f"{name}.gguf", imatrix=imatrix)
        found.append(_errors(source, quantize(plan, threads=1).path))
    assert max(found[0].values()) < 3e-6
    assert min(found[1].values()) > 3e-3
