"""Measured against predicted."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "engine"))

from mixes import mix_of, recipe_of
from tiny import write_tiny

from quantmix import verify
from quantmix.engine.quantize import preflight, quantize
from quantmix.errors import BadFile, CheckFailed
from quantmix.ggml.weights import open_weights
from quantmix.recipe import Recipe
from quantmix.store import Store
from quantmix.texts import text, wikitext

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Recipe, Path]:
    """Source, recipe folder with its quantized file, the recipe, a text."""
    root = tmp_path_factory.mktemp("v")
    source = write_tiny(root / "tiny.gguf")
    recipe = recipe_of(source, mix_of(open_weights(source), lambda role, _: "q3_K"))
    recipe = replace(
        recipe,
        quality=replace(
            recipe.quality, damage=0.1, ln_ppl_ratio=0.1, ln_ppl_ratio_low=-5.0,
            ln_ppl_ratio_high=5.0,
        ),
    )  # fmt: skip
    folder = root / "recipe"
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(recipe.to_json()))
    quantize(preflight(recipe, source, folder / "q.gguf"), threads=1)
    words = root / "t.txt"
    words.write_text(text("probe").read_text()[3000:6000])
    return source, folder, recipe, words


def _verify(made: Any, target: verify.Target, tmp_path: Path, **more: Any) -> verify.Verified:
    return verify.verify(target, made[3], chunks=2, threads=1, db=tmp_path / "s.db", **more)


def test_a_recipe_folder_finds_its_file_and_prediction(made: Any, tmp_path: Path) -> None:
    """The prediction is the measured base PPL times exp(predicted ratio), and is judged."""
    found = _verify(made, verify.find_target(made[1]), tmp_path, base=made[0])
    ratio = found.evaluation.log_ratio
    assert ratio is not None
    base = found.evaluation.perplexity.ppl / math.exp(ratio.mean)
    assert found.predicted is not None
    assert found.predicted.ppl == pytest.approx(base * math.exp(0.1))
    assert found.predicted.ppl_low == pytest.approx(base * math.exp(-5))
    assert found.predicted.holds is True
    document = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert set(document) >= {
        "ppl", "ppl_err", "nll", "n_ctx", "chunks", "tokens", "corpus", "kld", "ln_ppl_ratio",
        "predicted", "engine", "seconds",
    }  # fmt: skip
    assert set(document["kld"]) >= {"mean", "err", "median", "p99", "max", "same_top"}


def test_other_files_in_the_folder_are_passed_over(made: Any, tmp_path: Path) -> None:
    """The source beside the quantized file, first by name, is not what the recipe promised."""
    folder = tmp_path / "recipe"
    shutil.copytree(made[1], folder)
    shutil.copy(made[0], folder / "a-source.gguf")
    (folder / "b-broken.gguf").write_bytes(b"GGUF")
    assert verify.find_target(folder).file == folder / "q.gguf"


def test_a_recipe_that_is_named_comes_before_the_one_in_the_folder(
    made: Any, tmp_path: Path
) -> None:
    """`--recipe` counts for a folder as it does for a file."""
    other = tmp_path / "recipe.json"
    other.write_text(json.dumps(replace(made[2], name="other").to_json()))
    found = verify.find_target(made[1], other)
    assert found.recipe is not None
    assert found.recipe.name == "other"


def test_the_measurement_is_stored(made: Any, tmp_path: Path) -> None:
    """The store gets a row keyed by model, mix, file, corpus and engine."""
    found = _verify(made, verify.find_target(made[1]), tmp_path, base=made[0])
    with Store(tmp_path / "s.db") as store:
        (row,) = store.find()
    assert row.ppl == found.evaluation.perplexity.ppl
    assert row.kld is not None
    assert row.model == open_weights(made[0]).model_fingerprint
    assert row.base == open_weights(made[0]).data_fingerprint
    assert row.types["blk.0.ffn_up.weight"] == "q3_K"
    assert row.corpus == found.evaluation.corpus_sha256


def test_a_missed_prediction_is_said(made: Any, tmp_path: Path) -> None:
    """A measured value outside the interval makes `holds` False."""
    recipe = made[2]
    tight = replace(recipe.quality, ln_ppl_ratio_low=4.0, ln_ppl_ratio_high=5.0)
    target = verify.Target(made[1] / "q.gguf", replace(recipe, quality=tight))
    found = _verify(made, target, tmp_path, base=made[0])
    assert found.predicted is not None
    assert found.predicted.holds is False


def test_a_file_that_is_not_the_recipes_is_refused(made: Any, tmp_path: Path) -> None:
    """Verifying compares types first; a wrong file is exit 5 and stores nothing."""
    with pytest.raises(CheckFailed, match="differs from the recipe"):
        _verify(made, verify.Target(made[0], made[2]), tmp_path)
    assert not (tmp_path / "s.db").exists()


def test_a_recipe_without_file_names_the_command(made: Any, tmp_path: Path) -> None:
    """A folder that was never quantized says what to run."""
    (tmp_path / "recipe.json").write_text((made[1] / "recipe.json").read_text())
    with pytest.raises(BadFile, match="quantmix quantize"):
        verify.find_target(tmp_path)


def _cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "quantmix.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_commands_print_one_document(made: Any, tmp_path: Path) -> None:
    """quantize, imatrix and verify each print exactly one JSON document on stdout."""
    source, folder, _, words = made
    matrix = tmp_path / "i.dat"
    done = _cli("imatrix", str(source), "--corpus", str(words), "--out", str(matrix),
                "--threads", "1", "--json", "--quiet")  # fmt: skip
    assert json.loads(done.stdout)["entries"] == 15, done.stderr
    done = _cli("quantize", str(folder), str(source), "--imatrix", str(matrix), "--out",
                str(tmp_path / "q.gguf"), "--threads", "1", "--json", "--quiet")  # fmt: skip
    document = json.loads(done.stdout)
    assert (document["types_differing"], document["bytes_differing"]) == (0, 0)
    done = _cli("verify", str(tmp_path / "q.gguf"), "--recipe", str(folder), "--corpus",
                str(words), "--base", str(source), "--threads", "1", "--db",
                str(tmp_path / "s.db"), "--json")  # fmt: skip
    assert json.loads(done.stdout)["predicted"]["holds"] is True
    assert "predicted" in done.stderr
    assert "measured" in done.stderr


def test_bad_input_ends_with_one_line_and_its_code(made: Any, tmp_path: Path) -> None:
    """Missing files and short texts exit 2 with one line on stderr, none on stdout."""
    source, _, _, words = made
    short = tmp_path / "short.txt"
    short.write_text("few words")
    for arguments in (
        ("verify", str(source), "--corpus", str(short)),
        ("verify", str(tmp_path / "none.gguf"), "--corpus", str(words)),
        ("imatrix", str(words), "--corpus", str(words)),
    ):
        done = _cli(*arguments, "--json")
        assert done.returncode == 2, done.stderr
        assert done.stdout == ""
        assert len(done.stderr.strip().splitlines()) == 1


def test_without_a_base_only_the_published_text_is_compared(made: Any, tmp_path: Path) -> None:
    """Another text has another perplexity: nothing is judged, and the command says why."""
    recipe = made[2]
    tight = replace(recipe.quality, ppl=6.4, ppl_low=6.4, ppl_high=6.5, ln_ppl_ratio_low=0.0)
    target = verify.Target(made[1] / "q.gguf", replace(recipe, quality=tight))
    found = _verify(made, target, tmp_path)
    assert found.predicted is not None
    assert found.predicted.holds is None
    same = replace(found.evaluation, corpus_sha256=wikitext.SHA256)
    recipe = replace(target.recipe, quality=replace(tight, basis="calibrated"))
    assert verify.predict(recipe, same).holds is False
    assert verify.predict(recipe, same, whole_text=False).holds is None
    probes = replace(recipe, quality=replace(tight, basis="measured"))
    assert verify.predict(probes, same).holds is None
    for ppl_base, holds in ((18.61, False), (25.0, None)):  # published: 18.6076; own files: any
        quality = replace(tight, basis="calibrated", ppl_base=ppl_base)
        known = replace(recipe, model=replace(recipe.model, id="qwen3.5-0.8b"), quality=quality)
        assert verify.predict(known, same).holds is holds


def test_the_error_of_the_measurement_is_granted(made: Any, tmp_path: Path) -> None:
    """A ratio just outside the interval, by less than its own error, does not miss."""
    found = _verify(made, verify.find_target(made[1]), tmp_path, base=made[0]).evaluation
    assert found.log_ratio is not None
    low = found.log_ratio.mean + found.log_ratio.err
    recipe = made[2]
    for err, holds in ((found.log_ratio.err, True), (0.1 * found.log_ratio.err, False)):
        quality = replace(recipe.quality, ln_ppl_ratio_low=low, ln_ppl_ratio_high=low + 0.1)
        sure = replace(found, log_ratio=replace(found.log_ratio, err=err))
        assert verify.predict(replace(recipe, quality=quality), sure).holds is holds


def test_the_store_knows_whether_there_was_a_matrix(made: Any, tmp_path: Path) -> None:
    """The file of the fixture was made without one, and says so."""
    _verify(made, verify.find_target(made[1]), tmp_path)
    with Store(tmp_path / "s.db") as store:
        assert [row.imatrix for row in store.find()] == [0]


def test_a_base_that_is_quantized_itself_is_told(made: Any, tmp_path: Path) -> None:
    """KLD against it is not KLD against the model; an unquantized base says nothing."""
    source, folder = made[:2]
    target = verify.find_target(folder)
    (note,) = _verify(made, target, tmp_path, base=target.file).notes
    assert "q.gguf, is quantized itself (mostly" in note
    assert _verify(made, target, tmp_path, base=source).notes == ()
