"""The command lines of ik_llama.cpp discussion 532 are explained, and better ones proposed."""

from __future__ import annotations

import shlex
from dataclasses import replace

import pytest

from quantmix.budget import with_ram
from quantmix.emit.simulate import replay
from quantmix.errors import UsageError
from quantmix.explain import Explanation, explain, guessed, type_in_name
from quantmix.memory.settings import Settings
from quantmix.models.sources import load_model
from quantmix.offload import StoredModel, stored
from quantmix.rig.device import Rig
from quantmix.rig.rigs import load_rig, parse_gpus

# mtcl's lines, paths shortened; CUDA numbers his cards 4090, 4090, 5090, 5090.
QWEN = r"""
CUDA_VISIBLE_DEVICES="2,1,0,3" ./build/bin/llama-server \
--model models/Qwen3-235B-A22B-128K-Q4_K_M-00001-of-00003.gguf \
--alias unsloth/Qwen3-235B-A22B-128K-Q4_K_M \
--ctx-size 65536 \
-ctk q8_0 -ctv q8_0 \
-fa \
-b 4096 -ub 4096 \
-fmoe \
--n-gpu-layers 100 \
-ot "blk\.([0-9]|1[0-5])\.ffn=CUDA0" \
-ot "blk\.(1[6-9]|2[0-7])\.ffn=CUDA1" \
-ot "blk\.(2[8-9]|3[0-9])\.ffn=CUDA2" \
-ot "blk\.(4[0-9]|5[0-5])\.ffn=CUDA3" \
--override-tensor exps=CPU \
--parallel 1 --threads 56 --host 0.0.0.0 --port 10002
"""
R1 = r"""
CUDA_VISIBLE_DEVICES="2,1,0,3" ./build/bin/llama-server \
--model models/DeepSeek-R1-0528-IQ4_KS_R4-00001-of-00009.gguf \
--ctx-size 40960 \
-ctk q8_0 \
-mla 3 -fa \
-b 4096 -ub 4096 \
-amb 512 \
-fmoe \
-ngl 63 \
-ot "blk\.[3-4]\.ffn_.*=CUDA0" \
-ot "blk\.[5-6]\.ffn_.*=CUDA1" \
-ot "blk\.[7-8]\.ffn_.*=CUDA2" \
-ot "blk\.[9]\.ffn=CUDA3,blk\.1[0-1]\.ffn=CUDA3" \
-ot exps=CPU \
--parallel 1 --threads 56 --host 0.0.0.0 --port 10002
"""
THEN = Settings(build="2025-06-16")


def his_rig() -> Rig:
    """2x4090 and 2x5090 in CUDA's order, 512 GB of DDR5 in eight channels."""
    host = load_rig("2x5090-2x4090-512g")
    base = with_ram(parse_gpus("2xrtx-4090,2xrtx-5090"), None, None, None, False)
    return replace(base, host=host.host, cpu_cores=host.cpu_cores, cpu_class=host.cpu_class)


def qwen() -> StoredModel:
    """The Qwen file of the thread, by its name."""
    return stored(load_model("qwen3-235b-a22b"), "ik", type_in_name("Qwen3-235B-Q4_K_M", "ik"))


def r1() -> StoredModel:
    """The R1 file of the thread, by its name."""
    return stored(load_model("deepseek-r1-0528"), "ik", type_in_name("R1-0528-IQ4_KS_R4", "ik"))


def said(found: Explanation, *words: str) -> bool:
    """Whether one finding holds all the words."""
    return any(all(w in f.text for w in words) for f in found.findings)


def test_the_qwen_line_is_explained_layer_by_layer() -> None:
    """Experts of 0-55 on four GPUs, 56-93 in RAM by a rule the others shadow in part."""
    found = explain(QWEN, qwen(), his_rig(), THEN)
    assert [r.layers for r in found.rules] == ["0-15", "16-27", "28-39", "40-55", "56-93"]
    last = found.rules[-1]
    assert (last.matched, last.won, last.taken_by) == (282, 114, {1: 48, 2: 36, 3: 36, 4: 48})
    assert said(found, "rule 5 (exps=CPU) is shadowed in part")
    assert "experts of layers 0-15" in found.holds["GPU2"]
    assert "experts of layers 56-93" in found.holds["CPU"]


def test_the_qwen_line_wastes_memory_and_bus() -> None:
    """Attention stays behind when FFN is moved, and each 5090 has room for more layers."""
    found = explain(QWEN, qwen(), his_rig(), THEN)
    assert said(found, "have attention and KV cache on one GPU and FFN on another", "free memory")
    assert said(found, "GPU2 wastes", "more layers")
    assert said(found, "CUDA_DEVICE_ORDER")
    assert said(found, "CUDA0 = GPU2 (rtx-5090)")
    assert not said(found, "unknown argument")


def test_the_qwen_line_does_not_start_on_a_new_build() -> None:
    """-fmoe and bare -fa are refused since the end of 2025."""
    found = explain(QWEN, qwen(), his_rig(), Settings())
    assert said(found, "-fmoe is an unknown argument")
    assert said(found, "bare -fa")


def test_the_r1_line_is_explained_layer_by_layer() -> None:
    """Nine layers of experts on the GPUs, 49 in RAM; a comma makes two rules of one -ot."""
    found = explain(R1, r1(), his_rig(), THEN)
    assert [r.layers for r in found.rules] == ["3-4", "5-6", "7-8", "9", "10-11", "12-60"]
    assert "experts of layers 12-60" in found.holds["CPU"]
    assert said(found, "rule 6 (exps=CPU) is shadowed in part")
    assert said(found, "layers 5-6 GPU2 → GPU1")


@pytest.mark.parametrize("build", ["2025-06-16", "2026-08-15"])
@pytest.mark.parametrize(("line", "file"), [(QWEN, qwen), (R1, r1)], ids=["qwen", "r1"])
def test_the_better_line_fits_and_is_not_slower(line: str, file: object, build: str) -> None:
    """Its flags, replayed, are its plan; no device is full; predicted at least as fast."""
    stored_file = file()  # type: ignore[operator]
    found = explain(line, stored_file, his_rig(), Settings(build=build))
    assert found.better is not None
    assert found.gain is not None
    assert found.gain >= 1.0
    assert all((u.free_bytes or 0) >= 0 for u in found.better.devices)
    where = replay(
        found.better.flags, stored_file.model, found.settings, his_rig(), stored_file.sizes
    )
    n_now = sum("exps" in n and d != "CPU" for n, d in found.homes.items())
    assert sum("exps" in n and d != "CPU" for n, d in where.items()) >= n_now
    tokens = shlex.split(found.better_line)
    assert tokens[0] == "CUDA_DEVICE_ORDER=PCI_BUS_ID"
    assert "./build/bin/llama-server" in tokens
    assert tokens[tokens.index("--threads") + 1] == "56"
    assert "-ts" in tokens
    assert ("-fmoe" in tokens) == (build < "2025-10-25")


def test_a_measured_speed_calibrates_both_lines() -> None:
    """A measured speed is what the line gets; the better one moves in proportion."""
    plain = explain(R1, r1(), his_rig(), THEN)
    scaled = explain(R1, r1(), his_rig(), THEN, measured_tps=12.0)
    assert plain.better is not None
    assert scaled.better is not None
    assert scaled.speed.tg_tps == pytest.approx(12.0)
    ratio = 12.0 / (plain.speed.tg_tps or 1)
    assert scaled.better.speed.tg_tps == pytest.approx((plain.better.speed.tg_tps or 0) * ratio)
    with pytest.raises(UsageError, match="calibrate"):
        explain(R1, r1(), None, THEN, measured_tps=12.0)


@pytest.mark.parametrize("speed", [0.0, -4.0, float("nan"), float("inf")])
def test_a_speed_that_nobody_measures_is_refused(speed: float) -> None:
    """Not a number, negative and zero are named, not blamed on the rig."""
    with pytest.raises(UsageError, match="give tokens/s, above zero"):
        explain(R1, r1(), his_rig(), THEN, measured_tps=speed)


def test_calibration_names_what_is_not_known_of_the_rig() -> None:
    """RAM of an unknown platform, cards given by size, or both."""
    line = "-ngl 99 -ot exps=CPU"
    with pytest.raises(UsageError, match=r"bandwidth of CPU is not known; name the CPU by --cpu"):
        explain(line, r1(), load_rig("1x3090-128g"), THEN, measured_tps=4.0)
    sizes = with_ram(parse_gpus("2x24G"), "512G", None, None, False)
    with pytest.raises(UsageError, match=r"GPU0, GPU1, CPU is not known; name the cards by --gpus"):
        explain(line, r1(), sizes, THEN, measured_tps=4.0)


@pytest.mark.parametrize(
    ("start", "kept"),
    [
        (
            "numactl --interleave=all ./llama-server",
            "{env} numactl --interleave=all ./llama-server",
        ),
        ("cd /opt && ./llama-server", "cd /opt && {env} ./llama-server"),
        ("sudo nice -n -5 ./llama-server", "sudo nice -n -5 env {env} ./llama-server"),
        (
            "docker run -e CUDA_VISIBLE_DEVICES=1 -p 80:80 ggml-org/llama.cpp:server-cuda",
            "docker run -p 80:80 -e {env} ggml-org/llama.cpp:server-cuda",
        ),
    ],
)
def test_the_better_line_is_started_as_the_pasted_one_was(start: str, kept: str) -> None:
    """Wrappers and containers stay before the program, which gets to see the environment."""
    found = explain(f"{start} -m x.gguf -ngl 99 -ot exps=CPU", r1(), his_rig(), Settings())
    env = ["CUDA_DEVICE_ORDER=PCI_BUS_ID", "CUDA_VISIBLE_DEVICES=0,1,2,3"]
    joined = (" -e " if "docker" in start else " ").join(env)
    assert found.better_line.startswith(f"{kept.format(env=joined)} -m x.gguf -ngl 999 ")


def test_paths_that_the_shell_completes_stay_so() -> None:
    """A home folder and a variable are quoted so that the shell still sees them."""
    line = '~/ik/llama-server -m "$MODELS/a b.gguf" --alias "x y" -ngl 99 -ot exps=CPU -c 4096'
    better = explain(line, r1(), his_rig(), Settings()).better_line
    assert " ~/ik/llama-server -m \"$MODELS/a b.gguf\" --alias 'x y' -ngl " in better


def test_a_line_of_windows_is_told_what_to_write_there() -> None:
    """cmd.exe knows neither single quotes nor variables in front of a program."""
    for program, told in (("llama-server.exe", True), ("./llama-server", False)):
        found = explain(f"{program} -m x.gguf -ngl 99 -c 4096", r1(), his_rig(), Settings())
        assert said(found, "on Windows") == told


def test_devices_that_are_named_are_the_ones_that_count() -> None:
    """-dev hides the other cards and is not kept; what the engine does not have is told."""
    line = "./llama-server -m x.gguf -ngl 99 -ot exps=CPU -c 4096 -dev "
    found = explain(line + "CUDA2,CUDA1", qwen(), his_rig(), Settings())
    used = [d.name for d in found.devices if d.kv_bytes]
    assert used == ["GPU1", "GPU2"]
    assert " -dev " not in found.better_line
    assert said(explain(line + "Vulkan0", qwen(), his_rig(), Settings()), "-dev Vulkan0")


def test_on_a_machine_without_gpus_no_layer_is_missed_on_one() -> None:
    """Layers in RAM are no fault where there is no GPU to put them on, nor is -rtr."""
    rig = with_ram(parse_gpus("none"), "512G", None, None, False)
    found = explain("./llama-server -m x.gguf -c 4096 -rtr", qwen(), rig, Settings())
    assert not said(found, "in RAM, KV cache included")
    assert found.better is not None
    assert " -rtr -ngl 0 " in found.better_line
    assert " -rtr" not in explain("-rtr -c 4096", qwen(), his_rig(), Settings()).better_line


def test_the_better_line_starts_where_the_pasted_one_does_not() -> None:
    """A quantized V cache gets the flash attention that it needs."""
    found = explain("-ngl 99 -fa off -ctv q8_0 -c 4096", qwen(), his_rig(), Settings())
    assert said(found, "-ctv q8_0 needs flash attention")
    assert "-fa on" in found.better_line


def test_without_a_rig_it_still_tells_what_lands_where() -> None:
    """GPUs are counted from the line; sizes and a better line are missing, and it says so."""
    found = explain(R1, r1(), None, THEN)
    assert [r.won for r in found.rules] == [16, 16, 16, 8, 16, 147]
    assert found.better is None
    assert said(found, "no better line", "--gpus")
    assert all(d.free_bytes is None for d in found.devices)


def test_rules_that_never_apply_are_errors_at_the_top() -> None:
    """exps=CPU first makes every later rule dead (discussion 258)."""
    line = '-ngl 63 -ot exps=CPU -ot "blk.*[02468].ffn_up_exps.=CUDA0"'
    found = explain(line, r1(), his_rig(), THEN)
    assert found.findings[0].severity == "error"
    assert said(found, "rule 2", "never takes effect", "rule 1")


WRONG_NUMBERS = ["-sm none -mg 5", "-ncmoe abc", "-ts 1,-1", "-ts nan,1", "-c -5", "-ub -1"]


@pytest.mark.parametrize("flags", [*WRONG_NUMBERS, "-c " + "9" * 5000])
def test_numbers_that_no_engine_takes_do_not_reach_the_better_line(flags: str) -> None:
    """They are errors, and the line proposed holds numbers that work."""
    found = explain(f"-ngl 99 {flags}", r1(), his_rig(), Settings())
    assert any("taken as not given here" in f.text for f in found.findings if f.severity == "error")
    tokens = shlex.split(found.better_line)
    for flag in ("-c", "-ub", "-b"):
        assert int(tokens[tokens.index(flag) + 1]) > 0
    explain(f"-ngl 99 {flags}", r1(), None, Settings())


def test_text_without_flags_is_refused() -> None:
    """There is nothing to explain in a sentence."""
    with pytest.raises(UsageError, match="no flags"):
        explain("how do I know which layer to offload", r1(), None, THEN)


def test_types_are_read_from_file_names() -> None:
    """The quant's name in the file name; nothing when it has none, or the engine lacks it."""
    assert type_in_name("a/b/R1-0528-IQ4_KS_R4-00001-of-00009.gguf", "ik") == "iq4_ks_r4"
    assert type_in_name("Qwen3-Q4_K_M.gguf", "mainline") == "q4_K"
    assert type_in_name("R1-IQ4_KS.gguf", "mainline") is None
    assert type_in_name("model.gguf", "ik") is None


@pytest.mark.engine
def test_a_preset_in_a_file_name_is_what_the_engine_makes_of_it() -> None:
    """Not one type throughout; publishers' own mixes and unknown names keep to what is said."""
    model = load_model("llama-3.1-8b")
    file, said = guessed(model, "x/Llama-3.1-8B-Instruct-Q4_K_M-00001-of-00002.gguf", "ik")
    assert said == "Q4_K_M"
    assert file.tensor_bytes == stored(model, "ik", "Q4_K_M").tensor_bytes
    assert file.tensor_bytes > 1.05 * stored(model, "ik", "q4_K").tensor_bytes
    for name, told in (("UD-Q4_K_XL", "q4_K"), ("IQ4_KS_R4", "iq4_ks_r4"), ("Q8_0", "Q8_0")):
        assert guessed(model, f"Llama-{name}.gguf", "ik")[1] == told
    assert guessed(model, "Llama.gguf", "ik")[1] is None
