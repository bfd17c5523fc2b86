"""`clone`, `import` and `diff`: recipes from what exists, and two mixes side by side."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from quantmix import check
from quantmix import clone as cloning
from quantmix import recipe as recipes
from quantmix.cli import clone, diff
from quantmix.emit.rules import first_match, split_rule
from quantmix.engine.mainline_find import Mainline
from quantmix.errors import UsageError
from quantmix.ggml.header import read_header
from quantmix.ggml.types import Engine, get, resolve, table
from quantmix.models.ghost import write_ghost
from quantmix.models.model import Tensor
from quantmix.models.sources import load_model
from quantmix.report import build, pages

app = typer.Typer()
clone.register(app)
diff.register(app)
run = CliRunner()


def doc(*args: str) -> Any:
    """Run with --json and parse stdout."""
    result = run.invoke(app, [*args, "--json"])
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def mixed(t: Tensor) -> str:
    """A mix as people publish it: types by role, norms f32."""
    if not t.quantizable:
        return "f32"
    if t.ncols % 256:
        return "q8_0"
    if "exps" in t.role:
        return "iq2_kt" if (t.layer or 0) % 2 else "iq3_k"
    return {"output": "q6_K", "token_embd": "q4_K"}.get(t.role, "iq5_ks")


@pytest.mark.parametrize("model_id", ["deepseek-v2-lite", "glm-4.5-air", "qwen3.5-35b-a3b"])
def test_cloned_recipe_asks_for_the_types_of_the_file(model_id: str, tmp_path: Path) -> None:
    """Rules of a clone, matched back, give every tensor the type and bytes the file has."""
    model = load_model(model_id)
    path = tmp_path / "m.gguf"
    write_ghost(path, model, mixed)
    out = doc("clone", str(path), "--out", str(tmp_path / "r"))
    recipe = recipes.load(out["recipe"])
    rules = [split_rule(r) for r in recipe.rules]
    names = [t.name for t in model.tensors if t.quantizable]
    asked = first_match(names, rules, "ik")
    header = read_header(path)
    assert {t.name: t.type.name for t in header.tensors if t.name in asked} == asked
    assert [(t.name, t.type, t.bytes) for t in recipe.tensors] == [
        (t.name, t.type.name, t.n_bytes) for t in header.tensors
    ]
    assert out["model"]["id"] == model_id
    assert out["size"]["tensor_bytes"] == sum(t.n_bytes for t in header.tensors)
    assert out["quality"]["damage"] > 0
    assert "tensors" not in out


@pytest.mark.engine
@pytest.mark.parametrize("engine", ["ik", "mainline"])
@pytest.mark.parametrize("model_id", ["deepseek-v2-lite", "gpt-oss-20b", "qwen3.5-35b-a3b"])
def test_cloned_mix_is_what_the_real_quantizer_would_write(
    model_id: str, engine: Engine, mainline: Mainline, tmp_path: Path
) -> None:
    """Any mix of types, cloned: the engine's dry run gives every tensor the type of the file."""
    model = load_model(model_id)
    draw = random.Random(model_id)
    pool = [
        name
        for name, kind in table(engine).items()
        if kind.writable and kind.is_quantized and name != "mxfp4_r8"  # newer than the package
    ]

    def any_type(t: Tensor) -> str:
        if not t.quantizable:
            return t.source_type
        fits = [q for q in pool if t.ncols % get(q, engine).ncols_multiple == 0]
        return resolve(draw.choice(fits), t.name, t.shape, engine).name

    path = tmp_path / "m.gguf"
    write_ghost(path, model, any_type, engine=engine)
    stored = load_model(str(path))
    recipe = cloning.clone(stored, engine)
    header = read_header(path)
    assert [t.bytes for t in recipe.tensors] == [t.n_bytes for t in header.tensors]
    ids = {t.name: t.type.id for t in header.tensors}
    assert {t.name: get(t.type, engine).id for t in recipe.tensors} == ids
    assert len(set(ids.values())) > 15
    found = check(recipe, cloning.as_source(stored))
    assert found.ok
    assert found.engine, found.note
    assert found.tensors_compared == len(header.tensors)


def test_clone_spells_a_type_as_the_engine_asked_for_does(tmp_path: Path) -> None:
    """Type 41 has two names: a file with it can be cloned for either engine."""
    path = tmp_path / "m.gguf"
    model = load_model("qwen3-0.6b")
    write_ghost(path, model, lambda t: "q1_0" if t.quantizable else "f32", engine="mainline")
    stored = load_model(str(path))
    for engine, name in (("ik", "q1_0_g128"), ("mainline", "q1_0")):
        recipe = cloning.clone(stored, engine)  # type: ignore[arg-type]
        assert {t.type for t in recipe.tensors} == {name, "f32"}


def test_clone_refuses_what_the_engine_cannot_write(tmp_path: Path) -> None:
    """A file with ik's types has no recipe for mainline."""
    path = tmp_path / "m.gguf"
    write_ghost(path, load_model("deepseek-v2-lite"), mixed)
    result = run.invoke(app, ["clone", str(path), "--engine", "mainline", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


RULES = """
# Model name: SmolLM2-135M-Instruct
blk\\.(0|29)\\.ffn_.*=q8_0   # first and last
ffn_down=q5_0
ffn|attn=iq4_nl

^token_embd\\.weight$=q6_0
.*norm.*=f32
"""


def test_import_resolves_first_match_and_fallbacks(tmp_path: Path) -> None:
    """The model is read from the file, earlier rules win, rows that do not fit fall back."""
    path = tmp_path / "mix.recipe"
    path.write_text(RULES.replace("iq4_nl", "iq4_xs"))
    out = doc("import", str(path), "--out", str(tmp_path / "r"))
    kinds = {t.name: t.type for t in recipes.load(out["recipe"]).tensors}
    assert kinds["blk.29.ffn_down.weight"] == "q8_0"
    assert kinds["blk.3.ffn_down.weight"] == "q5_0"
    assert kinds["blk.3.ffn_up.weight"] == "iq4_nl"  # rows of 576 do not divide by 256
    assert kinds["token_embd.weight"] == "q6_0"
    assert kinds["blk.3.ffn_norm.weight"] == "f32"
    assert out["model"]["id"] == "smollm2-135m"


def test_a_mix_taken_over_claims_no_proof(tmp_path: Path) -> None:
    """Neither its page nor its report speaks of a bound: nothing was searched."""
    path = tmp_path / "mix.recipe"
    path.write_text(RULES)
    folder = Path(doc("import", str(path), "--out", str(tmp_path / "r"))["recipe"])
    page = (folder / "README.md").read_text()
    assert "nothing was searched, no bound is proven" in page
    assert "within" not in page
    report = pages.design_page(build.design(folder, db=None))
    assert "No bound was proven" in report
    assert "No mix under these constraints" not in report


def test_import_needs_every_tensor_or_a_default(tmp_path: Path) -> None:
    """Unmatched tensors are counted and named; --default types them."""
    path = tmp_path / "mix.txt"
    path.write_text("attn=q8_0\n")
    args = ["import", str(path), "--model", "smollm2", "--out", str(tmp_path / "r")]
    result = run.invoke(app, args)
    assert result.exit_code == 2
    assert "91 of 272" in result.stderr
    out = doc(*args, "--default", "q4_0")
    assert out["types"]["q4_0"]["n_tensors"] == 91


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("absent.txt", None, "cannot be read"),
        ("binary.txt", b"\xff\xfe\x00", "not text"),
        ("no-such-model.txt", b"a=q8_0", "names no model that is known"),
        ("smollm2.txt", b"a=q9_9", "no type"),
        ("smollm2.txt", b".*=q8_K", "cannot write"),
    ],
)
def test_bad_rules_files_are_one_line_and_exit_2(
    name: str, content: bytes | None, words: str, tmp_path: Path
) -> None:
    """Files that are missing, not text, for no model or with unusable types are refused."""
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    result = run.invoke(app, ["import", str(path), "--out", str(tmp_path / "r")])
    assert result.exit_code == 2, result.stderr
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_diff_of_a_file_with_its_clone_is_empty(tmp_path: Path) -> None:
    """A recipe and the file that it was cloned from differ in nothing."""
    path = tmp_path / "m.gguf"
    write_ghost(path, load_model("glm-4.5-air"), mixed)
    folder = doc("clone", str(path), "--out", str(tmp_path / "r"))["recipe"]
    out = doc("diff", str(path), folder)
    assert out["changed"] == out["only_a"] == out["only_b"] == []
    assert out["a"]["tensor_bytes"] == out["b"]["tensor_bytes"]
    assert out["a"]["damage"] == pytest.approx(out["b"]["damage"])


def test_diff_counts_types_sizes_and_damage(tmp_path: Path) -> None:
    """What differs is listed per tensor and summed per role and layer, and the sums agree."""
    model = load_model("smollm2-135m")
    for name, kind in (("a", "q4_0"), ("b", "q8_0")):
        write_ghost(
            tmp_path / f"{name}.gguf",
            model,
            lambda t, kind=kind: (  # type: ignore[misc]
                "f32" if not t.quantizable else kind if t.role == "ffn_down" else "q6_0"
            ),
        )
    out = doc("diff", str(tmp_path / "a.gguf"), str(tmp_path / "b.gguf"))
    assert len(out["changed"]) == 30
    assert {c["role"] for c in out["changed"]} == {"ffn_down"}
    more = 30 * (get("q8_0").tensor_bytes((1536, 576)) - get("q4_0").tensor_bytes((1536, 576)))
    assert out["b"]["tensor_bytes"] - out["a"]["tensor_bytes"] == more
    for lines in (out["roles"], out["layers"]):
        assert sum(x["b"]["bytes"] - x["a"]["bytes"] for x in lines) == more
        assert sum(x["a"]["damage"] for x in lines) == pytest.approx(out["a"]["damage"])
        assert sum(x["n_changed"] for x in lines) == 30
    assert out["a"]["damage"] > out["b"]["damage"]
    assert [x["name"] for x in out["layers"]] == ["-", *map(str, range(30))]
    for by in ("role", "layer", "tensor"):
        shown = run.invoke(
            app, ["diff", str(tmp_path / "a.gguf"), str(tmp_path / "b.gguf"), "--by", by]
        )
        assert "30 tensors differ" in shown.stderr
        assert shown.stdout == ""


def test_diff_takes_the_model_that_a_rules_file_names(tmp_path: Path) -> None:
    """As import does: by the file's own name, else --model is asked for."""
    for name in ("qwen3-0.6b.mine", "theirs"):
        (tmp_path / name).write_text("ffn_down=q6_K\n.*=q8_0\n")
    mine = str(tmp_path / "qwen3-0.6b.mine")
    assert len(doc("diff", mine, mine)["changed"]) == 0
    refused = run.invoke(app, ["diff", mine, str(tmp_path / "theirs")])
    assert refused.exit_code == 2
    assert "--model" in refused.stderr
    assert len(doc("diff", mine, "qwen3-0.6b")["changed"]) > 0


def test_diff_of_different_models_is_refused(tmp_path: Path) -> None:
    """Mixes of different models are not compared."""
    result = run.invoke(app, ["diff", "qwen3-4b", "qwen3-8b"])
    assert result.exit_code == 2
    assert "not the same model" in result.stderr


def test_diff_lists_tensors_of_one_side_only() -> None:
    """Two layouts of one model share most tensors; the others are listed."""
    from quantmix.compare import Side, diff, load_side

    a, b = load_side("smollm2-135m"), load_side("llama-3.2-1b")
    with pytest.raises(UsageError):
        diff(a, b)
    found = diff(a, Side("half", a.tensors[:100]))
    assert len(found.only_a) == 172
    assert found.only_b == ()


@pytest.mark.engine
@pytest.mark.slow
def test_clone_of_a_really_quantized_file_makes_the_same_file(tmp_path: Path) -> None:
    """A preset's file, cloned and quantized again by the rules, has the same types and sizes."""
    from quantmix import demo

    package = pytest.importorskip("ik_llama_cpp")
    binary = str(Path(package.__file__).parent / "bin" / "llama-quantize")
    source = str(demo.build("plain").path)
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "timeout": 300}
    subprocess.run([binary, source, str(first), "Q4_K_S", "2"], check=True, **quiet)  # type: ignore[call-overload]
    out = doc("clone", str(first), "--out", str(tmp_path / "r"))
    command = [binary, "--custom-q", ",".join(out["rules"]), source, str(second), "Q5_0", "2"]
    subprocess.run(command, check=True, **quiet)  # type: ignore[call-overload]
    a, b = read_header(first), read_header(second)
    assert [(t.name, t.type.name, t.n_bytes) for t in a.tensors] == [
        (t.name, t.type.name, t.n_bytes) for t in b.tensors
    ]
    assert out["size"]["tensor_bytes"] == sum(t.n_bytes for t in b.tensors)


@pytest.mark.parametrize("name", ["f16", "bf16", "f32"])
def test_a_file_without_quantized_tensors_is_cloned(name: str, tmp_path: Path) -> None:
    """The recipe asks for the float type everywhere, and its figure shows the matrices."""
    model = load_model("qwen3-0.6b")
    path = tmp_path / "m.gguf"
    write_ghost(path, model, lambda t: name if t.quantizable else "f32")
    out = doc("clone", str(path), "--out", str(tmp_path / "r"))
    assert (Path(out["recipe"]) / "types.png").stat().st_size > 0
    assert out["quality"]["damage"] == 0.0
    assert {split_rule(r)[1] for r in out["rules"]} == {name}


@pytest.mark.parametrize("name", ["../evil", "a b;c", "..", "-x", ".hidden", "a/b"])
def test_a_name_that_is_no_folder_name_is_refused(name: str, tmp_path: Path) -> None:
    """As design does, instead of being renamed in silence; letters of any script are taken."""
    file = tmp_path / "m.recipe"
    file.write_text(".*=q8_0\n")
    args = ["import", str(file), "--model", "qwen3-0.6b", "--out", str(tmp_path / "r")]
    refused = run.invoke(app, [*args, f"--name={name}"])
    assert refused.exit_code == 2
    assert f"--name {name!r} may hold letters" in refused.stderr
    assert not (tmp_path / "r").exists()
    assert Path(doc(*args, "--name", "日本-1")["recipe"]).name == "日本-1"


def test_errors_of_a_rules_file_name_it(tmp_path: Path) -> None:
    """The file and the line; a pasted command is a rules file too."""
    file = tmp_path / "mine.recipe"
    file.write_text(".*=q8_0\nblk.(=q4_K\n")
    result = run.invoke(app, ["import", str(file), "--model", "qwen3-0.6b"])
    assert result.exit_code == 2
    assert "mine.recipe, line 2: regex" in result.stderr
    file.write_text("--custom-q 'token_embd=q8_0,.*=IQ4_KS' \\\n")
    out = doc("import", str(file), "--model", "qwen3-0.6b", "--out", str(tmp_path / "r"))
    assert set(out["types"]) == {"q8_0", "iq4_ks", "f32"}


def test_the_script_of_a_model_card_is_imported_with_the_model_it_names(tmp_path: Path) -> None:
    """Rules in `custom="…"` are taken, and the model of the source that the command quantizes."""
    file = tmp_path / "cook.sh"
    file.write_text(
        'custom="\n# experts\nexps=iq3_k\n.*=q8_0\n"\n./llama-quantize --custom-q "$custom" \\\n'
        " /m/Qwen3-30B-A3B-BF16-00001-of-00002.gguf /m/Qwen3-30B-A3B-IQ3_K.gguf IQ3_K 24\n"
    )
    got = doc("import", str(file), "--out", str(tmp_path / "r"))
    assert got["model"]["id"] == "qwen3-30b-a3b"
    assert set(got["types"]) == {"iq3_k", "q8_0", "f32"}
    assert got["recipe"].endswith("/qwen3-30b-a3b-cook")


def test_a_file_without_rules_says_so(tmp_path: Path) -> None:
    """An empty rules file is told as such, not as a model with unmatched tensors."""
    file = tmp_path / "empty.txt"
    file.write_text("# nothing\n")
    result = run.invoke(app, ["import", str(file), "--model", "qwen3-0.6b"])
    assert result.exit_code == 2
    assert "holds no regex=type rule" in result.stderr
