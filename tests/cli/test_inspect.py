"""`inspect`, `models` and `types`: what people and programs read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from quantmix.cli import inspect, models, types
from quantmix.ggml.types import get, table
from quantmix.models.ghost import write_ghost
from quantmix.models.sources import load_model

app = typer.Typer()
for module in (inspect, models, types):
    module.register(app)
run = CliRunner()


def doc(*args: str) -> Any:
    """Run with --json and parse stdout, which must be one document."""
    result = run.invoke(app, [*args, "--json"])
    assert result.exit_code == 0, result.stderr
    assert result.stderr == ""
    return json.loads(result.stdout)


def test_inspect_json_is_what_the_contract_says() -> None:
    """Every tensor with shape, type, role, layer, elements, bytes and active share."""
    out = doc("inspect", "deepseek-r1")
    assert out["model"]["n_tensors"] == len(out["tensors"]) == 1086
    assert out["model"]["n_elements"] == 671_026_419_200
    by_name = {t["name"]: t for t in out["tensors"]}
    down = by_name["blk.3.ffn_down_exps.weight"]
    assert down == {
        "name": "blk.3.ffn_down_exps.weight",
        "shape": [2048, 7168, 256],
        "type": "bf16",
        "role": "ffn_down_exps",
        "layer": 3,
        "n_elements": 3_758_096_384,
        "bytes": 7_516_192_768,
        "active_fraction": 8 / 256,
        "quantizable": True,
        "loaded": True,
    }
    assert sum(g["bytes"] for g in out["groups"]) == out["total"]["bytes"]
    assert out["total"]["bytes"] == sum(t["bytes"] for t in out["tensors"])


def test_inspect_at_a_type_applies_fallbacks() -> None:
    """Rows of 128 become what the engine really writes, per engine; norms stay f32."""
    for engine, fallback in (("ik", "iq4_nl"), ("mainline", "iq4_nl")):
        out = doc("inspect", "deepseek-r1", "--at", "iq3_xxs", "--engine", engine)
        kinds = {t["name"]: (t["type"], t["bytes"]) for t in out["tensors"]}
        assert kinds["blk.0.attn_k_b.weight"][0] == fallback
        assert kinds["blk.0.attn_norm.weight"][0] == "f32"
        q = kinds["blk.0.attn_q_b.weight"]
        assert q == ("iq3_xxs", get("iq3_xxs").tensor_bytes((1536, 24576)))


def test_inspect_groups_and_orders() -> None:
    """Per layer, sorted by bytes: the largest first, all tensors counted once."""
    out = doc("inspect", "glm-4.5-air", "--by", "layer", "--sort", "bytes")
    sizes = [g["bytes"] for g in out["groups"]]
    assert sizes == sorted(sizes, reverse=True)
    assert sum(g["n_tensors"] for g in out["groups"]) == 803
    names = doc("inspect", "smollm2-135m", "--by", "layer", "--sort", "name")["groups"]
    assert [g["name"] for g in names][:4] == ["0", "1", "2", "3"]


def test_inspect_reads_files(tmp_path: Path) -> None:
    """A GGUF file shows its own types, ik's included."""
    path = tmp_path / "mine.gguf"
    write_ghost(path, load_model("deepseek-v2-lite"), lambda t: "iq4_ks" if _wide(t) else "f32")
    out = doc("inspect", str(path))
    kinds = {t["type"] for t in out["tensors"]}
    assert kinds == {"iq4_ks", "f32"}
    assert out["model"]["header_bytes"] > 0


def _wide(t: Any) -> bool:
    return bool(t.quantizable and t.ncols % 256 == 0)


def test_tables_go_to_stderr_and_quiet_silences_them() -> None:
    """Without --json stdout stays empty; --quiet silences stderr too."""
    for args in (["inspect", "smollm2"], ["models", "qwen3.5"], ["types"]):
        loud, quiet = run.invoke(app, args), run.invoke(app, [*args, "--quiet"])
        assert loud.exit_code == quiet.exit_code == 0
        assert loud.stdout == quiet.stdout == quiet.stderr == ""
        assert loud.stderr.count("\n") > 5


def test_notes_are_shown() -> None:
    """What is assumed about a model is printed with it."""
    assert "note: " in run.invoke(app, ["inspect", "glm-4.5-air"]).stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["inspect", "deepsek-r1"], "deepseek-r1"),
        (["inspect", "./absent.gguf"], "not a file"),
        (["inspect", "r1", "--at", "q6_k"], "q6_K"),
        (["inspect", "r1", "--by", "laier"], "layer"),
        (["inspect", "r1", "--sort", "size"], "bytes"),
        (["inspect", "r1", "--engine", "IK"], "ik"),
        (["inspect", "llama-3.1-8b", "--layout", "ik"], "MLA"),
        (["types", "--engine", "ollama"], "mainline"),
    ],
)
def test_wrong_input_is_one_line_and_exit_2(args: list[str], words: str) -> None:
    """Wrong names and files: exit 2, one line, with the mend."""
    result = run.invoke(app, args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.count("\n") == 1
    assert words in result.stderr


def test_lying_file_is_one_line_and_exit_2(tmp_path: Path) -> None:
    """A header that claims 2^60 tensors is refused in one line."""
    path = tmp_path / "lie.gguf"
    path.write_bytes(b"GGUF\3\0\0\0" + b"\xff" * 7 + b"\x0f" + b"\1" + b"\0" * 7)
    result = run.invoke(app, ["inspect", str(path)])
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)


def test_models_lists_and_filters() -> None:
    """All models with their facts; words narrow the list, aliases count."""
    everything = doc("models")["models"]
    assert len(everything) == 99
    assert {"id", "aliases", "arch", "hparams", "n_tensors", "source"} <= set(everything[0])
    found = {m["id"] for m in doc("models", "llama", "70b")["models"]}
    assert found == {"llama-2-70b", "llama-3-70b", "llama-3.1-70b", "llama-3.3-70b-instruct"}
    assert doc("models", "no-such-thing")["models"] == []
    assert (
        "no known model is named 'no-such-thing'"
        in run.invoke(app, ["models", "no-such-thing"]).stderr
    )


def test_types_lists_every_usable_type() -> None:
    """The JSON has exact names and sizes of the engine's types; --all adds internal ones."""
    shown = {t["name"]: t for t in doc("types")["types"]}
    assert shown["iq4_ks"]["row_meta"] == 4
    assert shown["iq4_ks"]["default"] is True
    assert shown["iq2_bn"]["default"] is False
    assert {t["name"] for t in doc("types", "--all")["types"]} == set(table("ik"))
    assert "iq4_ks" not in {t["name"] for t in doc("types", "--engine", "mainline")["types"]}
