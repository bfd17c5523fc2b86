"""Dry runs and memory questions to a real mainline: rules, presets, fallbacks, refusals."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantmix.engine.dry_run import DryTensor
from quantmix.engine.mainline import (
    DryRun,
    context_fields,
    dry_run,
    measure_memory,
    parse_dry_run,
    rules_of,
)
from quantmix.engine.mainline_find import Mainline
from quantmix.errors import EngineError, UnknownName, UsageError
from quantmix.ggml import types
from quantmix.memory.settings import Settings
from quantmix.models.ghost import write_ghost
from quantmix.models.sources import load_model

NOBODY = Mainline(None, None, "a test", "", False)
PALETTE = ("q4_K", "iq2_xs", "q6_K", "mxfp4", "iq1_m", "q5_0")
LOG = """
llama_model_quantize_impl: n_tensors = 3
warning: blk.0.b.weight                       - ncols    576 not divisible by 256 (required \
for type    q4_K) -> falling back to    q5_0
0.00.123.456 I [   1/   3] a.weight                             - [ 7168, 4, 1, 1], type = \
  bf16, size =     0.05 MiB ->     0.02 MiB (q4_K)
[   2/   3] blk.0.b.weight                       - [  576,   128,   2,     1], type =   \
bf16, size =     0.28 MiB ->     0.10 MiB (q5_0)
[   3/   3] n_norm.weight                        - [ 7168,     1,     1,     1], type =    \
f32, size =    0.027 MiB
llama_model_quantize_impl: model size  =     0.36 MiB (16.44 BPW)
llama_model_quantize_impl: quant size  =     0.14 MiB (6.41 BPW)
"""


@pytest.fixture
def smollm(tmp_path: Path) -> Path:
    """A ghost of SmolLM2-135M."""
    path = tmp_path / "smollm.gguf"
    write_ghost(path, load_model("smollm2-135m"), engine="mainline")
    return path


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A ghost of Llama 3.2 1B: tied embeddings, every row divisible by 256."""
    path = tmp_path / "llama.gguf"
    write_ghost(path, load_model("llama-3.2-1b"), engine="mainline")
    return path


def test_log_is_read() -> None:
    """Names, shapes, types, fallbacks and totals come out of a log, with or without a prefix."""
    run = parse_dry_run(LOG, NOBODY)
    assert run.tensors["a.weight"] == DryTensor("a.weight", (7168, 4), "q4_K", 16128, 0.02, 2)
    fallen = run.tensors["blk.0.b.weight"]
    assert (fallen.shape, fallen.type, fallen.fell_back) == ((576, 128, 2), "q5_0", True)
    norm = run.tensors["n_norm.weight"]
    assert (norm.type, norm.bytes, norm.digits) == ("f32", 28672, 3)
    assert all(t.print_agrees for t in run.tensors.values())
    assert (run.printed_total_mib, run.printed_bpw, run.needs_imatrix) == (0.14, 6.41, False)
    assert run.total_bytes == 16128 + 576 // 32 * 22 * 256 + 28672


def test_print_that_disagrees_is_seen() -> None:
    """A printed size beyond its rounding does not agree with the bytes."""
    wrong = replace(parse_dry_run(LOG, NOBODY).tensors["a.weight"], printed_mib=0.03)
    assert not wrong.print_agrees


@given(st.integers(0, len(LOG) - 30))
@settings(max_examples=60, deadline=None)
def test_cut_log_is_refused(length: int) -> None:
    """A log that stops before its totals is never taken for a whole one."""
    with pytest.raises(EngineError, match="tensors"):
        parse_dry_run(LOG[:length], NOBODY)


@pytest.mark.parametrize(
    ("rules", "ftype", "error", "words"),
    [
        ([("a", "q4_K")], "F16", UsageError, "ignores rules"),
        ([("a b", "q4_K")], "Q4_K_M", UsageError, "blanks"),
        ([("a=b", "q4_K")], "Q4_K_M", UsageError, "'='"),
        ([("", "q4_K")], "Q4_K_M", UsageError, "blanks"),
        ([("a", "iq4_ks")], "Q4_K_M", UnknownName, "type of ik only"),
        ([("a", "q4_k")], "Q4_K_M", UnknownName, "q4_K"),
        ([], "IQ2_KT", UnknownName, "preset"),
    ],
)
def test_rules_that_mainline_would_misread(
    rules: list[tuple[str, str]], ftype: str, error: type[Exception], words: str
) -> None:
    """Rules and presets that mainline ignores, splits or does not know are refused first."""
    with pytest.raises(error, match=words):
        dry_run(Path("none.gguf"), rules, ftype, engine=NOBODY)


def test_cache_type_of_ik_is_refused() -> None:
    """A cache type that mainline does not have is named as such."""
    with pytest.raises(UnknownName, match="ik only"):
        context_fields(Settings(engine="mainline", ctk="q8_KV"))


@pytest.mark.engine
@pytest.mark.parametrize(
    "name",
    ["deepseek-r1", "glm-4.5-air", "gpt-oss-20b", "qwen3-next-80b-a3b-instruct", "gemma-4-31b-it"],
)
def test_every_tensor_gets_the_type_asked_for(
    name: str, mainline: Mainline, tmp_path: Path
) -> None:
    """With one rule per quantizable tensor the engine takes what `types.resolve` says, all over."""
    model = load_model(name)
    ghost = tmp_path / "ghost.gguf"
    write_ghost(ghost, model, engine="mainline")
    asked = {t.name: PALETTE[i % 6] for i, t in enumerate(model.tensors) if t.quantizable}
    run = dry_run(ghost, rules_of(asked), engine=mainline)
    wanted = {
        t.name: types.resolve(asked[t.name], t.name, t.shape, "mainline").name
        if t.quantizable
        else "f32"
        for t in model.tensors
    }
    assert {n: t.type for n, t in run.tensors.items()} == wanted
    assert {n: t.shape for n, t in run.tensors.items()} == {t.name: t.shape for t in model.tensors}
    assert all(t.print_agrees for t in run.tensors.values())
    assert abs(run.total_bytes / 2**20 - run.printed_total_mib) <= 0.005 + 1e-6


@pytest.mark.engine
def test_first_match_wins_and_patterns_are_lowercased(llama: Path, mainline: Mainline) -> None:
    """The first of two matching rules decides; an upper-case pattern matches lower-case names."""
    rules = [(r"BLK\.0\.ATTN_Q", "q8_0"), ("attn_q", "q5_K"), (r"blk\.0\.", "q3_K")]
    got = {n: t.type for n, t in dry_run(llama, rules, engine=mainline).tensors.items()}
    assert got["blk.0.attn_q.weight"] == "q8_0"
    assert got["blk.1.attn_q.weight"] == "q5_K"
    assert got["blk.0.attn_k.weight"] == "q3_K"


@pytest.mark.engine
def test_partial_rules_shift_what_they_do_not_name(llama: Path, mainline: Mainline) -> None:
    """A rule for one block changes the built-in type of other blocks: rules must name all."""

    def down(run: DryRun) -> dict[str, str]:
        return {
            n: t.type
            for n, t in run.tensors.items()
            if n.endswith("ffn_down.weight") and not n.startswith("blk.0.")
        }

    plain = dry_run(llama, [], "Q4_K_M", engine=mainline)
    partial = dry_run(llama, [(r"blk\.0\.ffn_down", "q8_0")], "Q4_K_M", engine=mainline)
    assert down(plain) != down(partial)


@pytest.mark.engine
def test_need_of_an_imatrix_is_reported(llama: Path, mainline: Mainline) -> None:
    """A low-bit type in a block needs an imatrix; in the embedding it does not."""
    assert dry_run(llama, [("attn_q", "iq2_xs")], engine=mainline).needs_imatrix
    assert not dry_run(llama, [("token_embd", "iq2_xs")], engine=mainline).needs_imatrix


@pytest.mark.engine
@pytest.mark.parametrize(
    ("rules", "words"), [([("(", "q4_K")], "arenthesis"), ([("ffn_up", "q1_0")], "fallback")]
)
def test_refusals_carry_the_engines_words(
    rules: list[tuple[str, str]], words: str, smollm: Path, mainline: Mainline
) -> None:
    """A malformed pattern, and a type of 128 a block for rows of 576, stop with the reason."""
    with pytest.raises(EngineError, match=words):
        dry_run(smollm, rules, engine=mainline)


@pytest.mark.engine
def test_two_cache_types_for_a_latent_cache(mainline: Mainline, tmp_path: Path) -> None:
    """What mainline refuses it refuses with its own reason, free of its chatter."""
    ghost = tmp_path / "ghost.gguf"
    write_ghost(ghost, load_model("deepseek-v2-lite"), engine="mainline")
    with pytest.raises(EngineError, match=r"refused: llama_init_from_model: model does not supp"):
        measure_memory(ghost, Settings(engine="mainline", ctk="q8_0"), engine=mainline)


@pytest.mark.engine
def test_no_file_and_no_gguf(tmp_path: Path, mainline: Mainline) -> None:
    """A file that is missing or is no GGUF fails with the engine's words, for both questions."""
    noise = tmp_path / "noise.gguf"
    noise.write_bytes(b"GGUF" + b"\xff" * 64)
    for file in (tmp_path / "none.gguf", noise):
        with pytest.raises(EngineError, match="fail"):
            dry_run(file, [], engine=mainline)
        with pytest.raises(EngineError, match="fail"):
            measure_memory(file, Settings(engine="mainline"), engine=mainline)


@pytest.mark.engine
def test_memory_follows_the_settings(smollm: Path, mainline: Mainline) -> None:
    """Twice the context doubles the cache, q8_0 takes 34/64 of f16, and ubatch moves compute."""
    base = Settings(engine="mainline", ctx=8192)
    plain = measure_memory(smollm, base, engine=mainline)
    long = measure_memory(smollm, replace(base, ctx=16384), engine=mainline)
    small = measure_memory(smollm, replace(base, ctk="q8_0", ctv="q8_0"), engine=mainline)
    wide = measure_memory(smollm, replace(base, ubatch=2048), engine=mainline)
    assert set(plain.devices) == {"CPU"}
    assert long.total.context_bytes == 2 * plain.total.context_bytes
    assert small.total.context_bytes * 64 == 34 * plain.total.context_bytes
    assert wide.total.compute_bytes > 3 * plain.total.compute_bytes
    assert wide.total.weights_bytes == plain.total.weights_bytes
