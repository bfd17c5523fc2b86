"""Which weights were trained on a grid, told from numbers and from names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from quantmix.models import trained
from quantmix.models.ghost import write_ghost
from quantmix.models.sources import load_model


def _grid(levels: int, groups: int = 64) -> np.ndarray:
    rng = np.random.default_rng(levels)
    q = rng.integers(-levels, levels + 1, (groups, 32))
    q[:, 0] = levels
    return (q * rng.uniform(0.001, 0.1, (groups, 1))).astype(np.float32).ravel()


def test_a_grid_of_fifteen_levels_is_told_from_others() -> None:
    """Seven levels each way are the grid, also rounded to bf16; six, eight or noise are not."""
    grid = _grid(7)
    rounded = ((grid.view(np.uint32) + 0x8000) & 0xFFFF0000).view(np.float32)
    assert trained.on_grid(grid) is True
    assert trained.on_grid(rounded) is True
    assert trained.on_grid(_grid(6)) is False
    assert trained.on_grid(_grid(8)) is False
    noise = np.random.default_rng(0).standard_normal(2048).astype(np.float32)
    assert trained.on_grid(noise) is False
    grid[5] = np.nan
    assert trained.on_grid(grid) is False


def test_too_little_data_says_nothing() -> None:
    """Zeros, as a ghost has them, and a handful of groups decide nothing."""
    assert trained.on_grid(np.zeros(2048, np.float32)) is None
    assert trained.on_grid(_grid(7, groups=8)) is None


@pytest.mark.parametrize("name", ["kimi-k2-thinking", "kimi-k2.5", "kimi-k2.6", "kimi-k2.7-code"])
def test_the_catalog_knows_models_with_experts_in_four_bits(name: str, tmp_path: Path) -> None:
    """Their routed experts and nothing else; a header alone (a remote file, a ghost) keeps that."""
    model = load_model(name)
    marked = {t.role for t in model.tensors if t.exact_type == "q4_0"}
    assert marked == {"ffn_down_exps", "ffn_gate_exps", "ffn_up_exps"}
    file = tmp_path / f"{name}-bf16.gguf"
    write_ghost(file, model, lambda t: t.source_type)
    assert load_model(str(file)).tensors == model.tensors


def test_older_kimi_models_were_not() -> None:
    """Kimi-K2-Instruct is bf16 throughout (fp8 in its checkpoint)."""
    assert not any(t.exact_type for t in load_model("kimi-k2-instruct").tensors)


def test_gpt_oss_was_trained_in_mxfp4() -> None:
    """Its experts are kept as the source has them."""
    exact = {t.role: t.exact_type for t in load_model("gpt-oss-20b").tensors if t.exact_type}
    assert set(exact.values()) == {"mxfp4"}
    assert all(role.endswith("_exps") for role in exact)
