"""`quantmix design` and `check` as people call them: one line, right code, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def quantmix(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder of its own."""
    env = {**os.environ, "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "quantmix.cli.main", *args],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("args", "code", "words"),
    [
        (("deepsek-r1", "--vram", "192G"), 2, "deepseek-r1"),
        (("deepseek-r1", "--vram", "192X"), 2, "192X"),
        (("deepseek-r1", "--vram", "-5G"), 2, "-5G"),
        (("deepseek-r1",), 2, "budget"),
        (("deepseek-r1", "--vram", "1G", "--size", "2G"), 2, "--vram and --size"),
        (("deepseek-r1", "--vram", "192G", "--ram-reserve", "4G"), 2, "use --gpus with --ram"),
        (("deepseek-r1", "--size", "4bpw", "--reserve", "1G"), 2, "--reserve means nothing"),
        (("deepseek-r1", "--max-loss", "1%", "--ctx", "max"), 2, "--ctx max and --max-loss"),
        (("deepseek-r1", "--vram", "192G", "--types", "q6_k"), 2, "q6_K"),
        (("deepseek-r1", "--vram", "192G", "--pin", "nosuch=q8_0"), 2, "nosuch"),
        (("deepseek-r1", "--vram", "192G", "--pin", "(=q8_0"), 2, "regular expression"),
        (("deepseek-r1", "--vram", "192G", "--pin", "nothing"), 2, "REGEX=TYPE"),
        (("deepseek-r1", "--vram", "192G", "--ctx", "soon"), 2, "soon"),
        (("deepseek-r1", "--vram", "192G", "--ctk", "q3_K"), 2, "q3_K"),
        (("deepseek-r1", "--vram", "192G", "--engine", "vllm"), 2, "vllm"),
        (("deepseek-r1", "--gpus", "2xrtx-5099"), 2, "rtx-5090"),
        (("deepseek-r1", "--vram", "100G"), 3, "--vram"),
        (
            ("qwen3-30b-a3b", "--gpus", "1xrtx-4090", "--ram", "64G", "--min-tps", "9000"),
            3,
            "lower --min-tps",
        ),
        (("./absent.gguf", "--vram", "24G"), 2, "absent.gguf"),
    ],
)
def test_wrong_input_gets_one_line(
    args: tuple[str, ...], code: int, words: str, tmp_path: Path
) -> None:
    """One clear line on stderr that names the thing, and the documented exit code."""
    done = quantmix("design", *args, "--out", "out", cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    """A file in the place of the output folder is one line and code 2."""
    (tmp_path / "out").write_text("a file")
    done = quantmix(
        "design", "qwen3-0.6b", "--vram", "6G", "--no-check", "--out", "out", cwd=tmp_path
    )
    assert done.returncode == 2
    assert "out" in done.stderr
    assert "Traceback" not in done.stderr
    assert (tmp_path / "out").read_text() == "a file"


def test_design_writes_a_whole_folder_and_one_document(tmp_path: Path) -> None:
    """stdout is one JSON document; the folder holds every documented file."""
    done = quantmix("design", "qwen3-0.6b", "--vram", "6G", "--json", "--out", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    doc = json.loads(done.stdout)
    folder = tmp_path / doc["recipe"]
    assert {p.name for p in folder.iterdir()} == {
        *("recipe.json", "rules.txt", "rules.args", "quantize.sh", "serve.sh", "verify.sh"),
        *("README.md", "memory.png", "types.png"),
    }
    assert [p.name for p in (tmp_path / "out").iterdir()] == [folder.name]
    assert doc["check"]["types_differing"] == 0
    stored = json.loads((folder / "recipe.json").read_text())
    assert stored["quality"] == doc["quality"]
    assert "seconds" not in stored["optimality"]


def test_check_proves_what_design_wrote(tmp_path: Path) -> None:
    """A written recipe checks; one edited by hand does not (code 5)."""
    made = quantmix("design", "qwen3-0.6b", "--vram", "6G", "--json", "--out", "out", cwd=tmp_path)
    folder = tmp_path / json.loads(made.stdout)["recipe"]
    done = quantmix("check", str(folder), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
    path = folder / "recipe.json"
    doc = json.loads(path.read_text())
    doc["tensors"][5]["bytes"] += 1
    path.write_text(json.dumps(doc))
    done = quantmix("check", str(folder), "--json", cwd=tmp_path)
    assert done.returncode == 5
    assert json.loads(done.stdout)["problems"]


def test_check_of_nothing_is_bad_input(tmp_path: Path) -> None:
    """A folder without a recipe is code 2."""
    done = quantmix("check", "./no-such-recipe", cwd=tmp_path)
    assert done.returncode == 2
    assert "no-such-recipe" in done.stderr


def test_dump_problem_lets_anyone_recompute_the_bound(tmp_path: Path) -> None:
    """The Lagrangian bound follows from the dump alone, and the dumped choice fits."""
    quantmix(
        *("design", "qwen3-0.6b", "--vram", "6G", "--no-check", "--out", "out"),
        *("--dump-problem", "p.json"),
        cwd=tmp_path,
    )
    p = json.loads((tmp_path / "p.json").read_text())
    prices = p["prices_per_byte"]
    bound = -sum(prices[k] * v for k, v in p["capacities"][0].items() if k in prices)
    cost = 0.0
    used: dict[str, float] = {}
    for group, j in zip(p["groups"], p["choice"], strict=True):
        options = group["options"]
        bound += min(
            o["damage"] + sum(prices[k] * b for k, b in o["bytes"].items()) for o in options
        )
        cost += options[j]["damage"]
        for k, b in options[j]["bytes"].items():
            used[k] = used.get(k, 0) + b
    assert cost == pytest.approx(p["objective"])
    assert p["lower_bound"] >= bound - 1e-12
    assert p["lower_bound"] <= p["objective"]
    for pool, capacity in p["capacities"][0].items():
        if pool != "level_bytes":
            assert used.get(pool, 0) <= capacity


def test_help_ends_with_a_worked_example(tmp_path: Path) -> None:
    """Every command's help shows how it is used."""
    for command in ("design", "check", "doctor"):
        done = quantmix(command, "--help", cwd=tmp_path)
        assert done.returncode == 0
        assert "Example: quantmix" in done.stdout


def test_doctor_finds_the_packaged_engine(tmp_path: Path) -> None:
    """llama-quantize of the package is found and named."""
    done = quantmix("doctor", "--json", cwd=tmp_path)
    findings = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    assert findings["llama-quantize"]["ok"]
    assert findings["RAM"]["ok"]


def test_doctor_does_not_advise_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package ships llama-quantize alone: other programs are built, not installed with it."""
    monkeypatch.setenv("PATH", str(tmp_path))
    done = quantmix("doctor", "--json", cwd=tmp_path)
    findings = {f["name"]: f for f in json.loads(done.stdout)["findings"]}
    for name in ("llama-perplexity", "llama-imatrix"):
        assert "ik-llama-cpp-python" not in findings[name]["mend"]
        assert "build ik_llama.cpp" in findings[name]["mend"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("verify", "m.gguf", "--engine", "foo"), "unknown engine 'foo': one of ik, mainline"),
        (
            ("measure", "m.gguf", "--types", "q4_K", "--out", "o", "--by", "foo"),
            "one of role, band, tensor",
        ),
        (("design", "qwen3-0.6b", "--vram", "12"), "--vram 12 means 12 bytes: write 12G"),
        (("design", "qwen3-0.6b", "--size", "nanbpw"), "write it like 3.5bpw"),
        (("design", "qwen3-0.6b", "--gpus", "24G", "--ram", "9G", "--cpu", "24G"), "CPU platform"),
    ],
)
def test_unknown_words_name_the_mend(args: tuple[str, ...], words: str, tmp_path: Path) -> None:
    """What may be written instead stands in the same line."""
    done = quantmix(*args, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert words in done.stderr


def test_brackets_are_printed_as_they_are(tmp_path: Path) -> None:
    """A class in a regex and a folder in brackets are no markup, and end no summary."""
    pins = ("--pin", r"attn_[qk]\.weight=q8_0", "--floor", "[/o]utput=q8_0")
    line = ("smollm2-135m", "--vram", "2G", "--no-check", *pins, "--out", "[bold]")
    done = quantmix("design", *line, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for text in (r"pin attn_[qk]\.weight=q8_0", "floor [/o]utput=q8_0", "[bold]/smollm2-135m-2G/"):
        assert text in done.stderr
