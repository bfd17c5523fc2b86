"""Real quantization for mainline when only its library is there."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from mixes import mix_of, recipe_of

from quantmix.engine import mainline_quantize
from quantmix.engine.mainline_find import Mainline
from quantmix.engine.quantize import preflight, quantize
from quantmix.errors import BadFile, EngineMissing
from quantmix.ggml import imatrix, types
from quantmix.ggml.weights import open_weights
from quantmix.recipe import EngineInfo, Recipe


@pytest.fixture
def recipe(tiny: Path) -> Recipe:
    """A mainline recipe of the tiny model in four types."""
    kinds = ("q4_K", "q6_K", "iq4_nl", "q5_0")
    mix = mix_of(open_weights(tiny), lambda role, layer: kinds[len(role) % 4])
    made = recipe_of(tiny, mix)
    assert {t.type for t in made.tensors} <= set(types.table("mainline"))
    return replace(made, engine=EngineInfo("mainline", "test", "Q4_K_M"))


@pytest.fixture
def no_program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No llama-quantize of any engine on PATH or named by a variable."""
    monkeypatch.delenv("QUANTMIX_LLAMA_BIN", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.mark.engine
def test_recipe_is_written_through_the_library(
    recipe: Recipe,
    tiny: Path,
    mainline: Mainline,
    no_program: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a mainline program its library writes the file, which equals the recipe."""
    monkeypatch.setenv("QUANTMIX_LIBLLAMA", str(mainline.library))
    plan = preflight(recipe, tiny, tmp_path / "out.gguf")
    assert plan.binary.engine == "mainline"
    assert plan.binary.program.origin == "libllama"
    seen: list[dict[str, object]] = []
    done = quantize(plan, threads=1, on_event=seen.append)
    assert open_weights(done.path).types() == {t.name: t.type for t in recipe.tensors}
    assert done.tensor_bytes == recipe.size.tensor_bytes
    assert len(seen) == len(recipe.tensors)


@pytest.mark.engine
def test_an_entry_of_another_tensor_does_not_serve(
    tiny: Path, tiny_imatrix: Path, mainline: Mainline, no_program: None, tmp_path: Path
) -> None:
    """Without entries of its gates a matrix is refused before the run; mainline borrows none."""
    mix = mix_of(open_weights(tiny), lambda role, _: "iq2_xs" if role == "ffn_gate" else "q8_0")
    made = replace(recipe_of(tiny, mix), engine=EngineInfo("mainline", "test", "IQ2_XS"))
    whole = imatrix.read(tiny_imatrix)
    kept = {n: e for n, e in whole.entries.items() if "ffn_gate" not in n}
    imatrix.write(replace(whole, entries=kept), tmp_path / "i.gguf")
    with pytest.raises(BadFile, match=r"ffn_gate\.weight as iq2_xs needs an entry"):
        preflight(made, tiny, tmp_path / "out.gguf", imatrix=tmp_path / "i.gguf")


@pytest.mark.engine
def test_named_program_is_not_replaced(
    recipe: Recipe, tiny: Path, no_program: None, tmp_path: Path
) -> None:
    """A folder given with --llama-bin that holds no program is an error, library or not."""
    with pytest.raises(EngineMissing, match="--llama-bin"):
        preflight(recipe, tiny, tmp_path / "out.gguf", llama_bin=tmp_path)


@pytest.mark.engine
def test_refusals_of_the_program(
    tiny: Path,
    mainline: Mainline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """A preset, a rule, a type or a target that cannot be is one line on stderr and exit code 1."""
    monkeypatch.setenv("QUANTMIX_LIBLLAMA", str(mainline.library))
    rules = tmp_path / "rules.args"
    out = str(tmp_path / "out.gguf")
    for content, arguments, words in (
        ("a=q4_K", [str(tiny), out, "Q9"], "unknown mainline preset 'Q9'"),
        ("attn_q", [str(tiny), out, "Q4_K_M"], "'attn_q' is not of the form pattern=type"),
        ("attn_q=iq9", [str(tiny), out, "Q4_K_M"], "unknown mainline type 'iq9'"),
        ("a=q4_K", [str(tiny), str(tiny), "Q4_K_M"], "is the source itself"),
    ):
        rules.write_text(content)
        assert mainline_quantize.main(["--tensor-type-file", str(rules), *arguments]) == 1
        assert words in capfd.readouterr().err
    assert not Path(out).exists()
