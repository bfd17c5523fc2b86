"""`quantmix offload` from the command line: one JSON document, exit codes, a line to copy."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from quantmix.cli import offload
from quantmix.models.ghost import write_ghost
from quantmix.models.sources import load_model


def run(*args: str) -> Result:
    """Run `offload` with these arguments."""
    app = typer.Typer()
    app.callback()(lambda: None)
    offload.register(app)
    return CliRunner().invoke(app, ["offload", *args])


def test_a_placement_as_json() -> None:
    """Devices, flags, environment and speed; nothing else on stdout."""
    result = run("qwen3-30b-a3b", "--at", "q4_K", "--gpus", "1xrtx-3060", "--ram", "64G", "--json")
    assert result.exit_code == 0, result.output
    doc = json.loads(result.stdout)
    assert {"model", "settings", "size", "devices", "speed", "offload", "line"} <= set(doc)
    assert [d["name"] for d in doc["devices"]] == ["GPU0", "CPU"]
    assert "-ot" in doc["offload"]["flags"]
    assert doc["offload"]["env"]["CUDA_VISIBLE_DEVICES"] == "0"


def test_the_longest_context_that_fits() -> None:
    """--ctx max opens as much as the card holds, a multiple of 256; 32k is read as 32768."""
    args = ("llama-3.1-8b", "--at", "q8_0", "--json", "--gpus")
    longest = json.loads(run(*args, "1x16G", "--ctx", "max").stdout)["settings"]["ctx"]
    assert longest % 256 == 0
    assert 16384 < longest < 131072
    assert run(*args, "1x16G", "--ctx", str(longest + 256)).exit_code == 3
    assert json.loads(run(*args, "1x24G", "--ctx", "32k").stdout)["settings"]["ctx"] == 32768


def test_the_line_to_copy_is_all_of_stdout() -> None:
    """Tables go to stderr, the command line to stdout."""
    result = run("llama-3.1-8b", "--at", "q8_0", "--gpus", "1x24G")
    assert result.exit_code == 0
    assert result.stdout.strip().startswith("CUDA_DEVICE_ORDER=PCI_BUS_ID")
    assert len(result.stdout.strip().splitlines()) == 1


def test_a_measured_speed_needs_the_cpu_and_takes_it() -> None:
    """A rig of unknown RAM is refused by name; --cpu is the mend, and calibrates."""
    args = ("qwen3-30b-a3b", "--at", "q4_K", "--rig", "1x3090-128g", "--json", "--lint")
    args = (*args, "-ngl 99 -c 4096 -ot exps=CPU", "--measured", "4")
    refused = run(*args)
    assert refused.exit_code == 2
    assert "--cpu" in refused.stderr
    taken = run(*args, "--cpu", "desktop-ddr5-6000-2ch")
    assert taken.exit_code == 0, taken.output
    assert json.loads(taken.stdout)["speed"]["tg_tps"] == pytest.approx(4.0)


def test_pasted_flags_as_json() -> None:
    """Findings, rules, devices and a better line."""
    result = run(
        *("deepseek-r1", "--at", "iq4_ks", "--gpus", "1x24G", "--ram", "512G", "--json"),
        *("--lint", r'-ngl 99 -ot "blk\.[0-10]\.ffn=CUDA0" -ot exps=CPU'),
    )
    assert result.exit_code == 0, result.output
    doc = json.loads(result.stdout)
    assert any("single digits" in f["text"] for f in doc["findings"])
    assert doc["rules"][0]["layers"] == "0-1"
    assert doc["better"]["line"].startswith("CUDA_DEVICE_ORDER")


def test_pasted_flags_as_text_name_the_assumed_type() -> None:
    """Without --at the type in the pasted file name is taken, and told."""
    result = run("deepseek-r1", "--lint", "-m R1-IQ4_KS.gguf -ot exps=CPU")
    assert result.exit_code == 0
    assert "IQ4_KS" in result.output


@pytest.mark.parametrize(
    ("args", "code", "said"),
    [
        (("deepseek-r1", "--at", "iq4_ks", "--gpus", "1x24G"), 3, "needs about"),
        (("deepseek-r1",), 2, "name the machine"),
        (("deepseek-r1", "--gpus", "1x24G", "--vram", "24G"), 2, "one budget"),
        (("deepseek-r1", "--gpus", "1x24G", "--measured", "9"), 2, "--lint"),
        (("nobody-knows", "--gpus", "1x24G"), 2, "unknown model"),
        (("deepseek-r1", "--lint", "hello"), 2, "no flags"),
        (("deepseek-r1", "--lint", "-ot exps=CPU", "--ram", "64G"), 2, "add --gpus"),
        (("deepseek-r1", "--at", "q9_9", "--gpus", "1x24G"), 2, "q9_9"),
    ],
)
def test_what_cannot_be_answered_is_one_line(args: tuple[str, ...], code: int, said: str) -> None:
    """Wrong usage is exit 2, too little memory exit 3; one line says why."""
    result = run(*args)
    assert result.exit_code == code
    assert said in result.output
    assert "Traceback" not in result.output


def test_the_line_names_the_file(tmp_path: Path) -> None:
    """`-m` is in the line: the file that was named, the first shard of a folder, else MODEL."""
    file = tmp_path / "a b.gguf"
    write_ghost(file, load_model("smollm2-135m"))
    named = f" llama-server -m '{file}' -ngl "
    assert named in run(str(file), "--gpus", "1x24G").stdout
    assert named in run(str(tmp_path), "--gpus", "1x24G").stdout
    catalog = run("smollm2-135m", "--gpus", "1x24G", "--json")
    assert " llama-server -m MODEL -ngl " in json.loads(catalog.stdout)["line"]


def test_an_unknown_speed_says_what_to_name() -> None:
    """Where the bandwidth of the RAM is not known, the mend is told: --cpu."""
    result = run("qwen3-30b-a3b", "--at", "q4_K", "--gpus", "1xrtx-3060", "--ram", "64G")
    assert "(--cpu) as `quantmix rigs` lists them" in result.stderr.replace("\n", " ")
