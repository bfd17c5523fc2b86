"""Pasted flags are judged: dead and shadowed rules, traps, refusals, odd landings."""

from __future__ import annotations

import pytest

from quantmix.emit.cmdline import parse_text
from quantmix.emit.lint import (
    landing_findings,
    rule_findings,
    rule_reports,
    wrong_devices,
)
from quantmix.emit.lint_flags import clean, engine_findings, readable, settings_of
from quantmix.emit.simulate import layer_homes, override_rules, replay
from quantmix.ggml import types
from quantmix.memory.settings import Settings
from quantmix.units import ranges

from .conftest import make_rig, model_of, sizes_of


def texts(flags: str, name: str = "deepseek-r1", build: str = "2025-06-16") -> list[str]:
    """Everything the linter says about these flags on one 96G card."""
    model, rig = model_of(name), make_rig(96, 96)
    pasted, unread = readable(parse_text(flags), "ik")
    setup = settings_of(pasted, Settings(build=build), model.hparams.ctx_train)
    command, found = clean(pasted, 2)
    found += unread
    homes = layer_homes(command, model, setup, rig, sizes_of(name), [0, 1])
    rules = override_rules(command, model, setup, homes, 2)
    reports = rule_reports(rules, ["CUDA0", "CUDA1"], model.tensors)
    tokens = [t for o in command.options for t in (o.spelling, o.value) if t is not None]
    where = replay(tokens, model, setup, rig, sizes_of(name))
    kinds = [types.get("q8_0")] * len(model.tensors)
    found += rule_findings(reports, model.tensors)
    found += engine_findings(pasted, model, setup)
    found += landing_findings(command, model, kinds, homes, where, ["GPU0", "GPU1"])
    return [f.text for f in found]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (r'-ot exps=CPU -ot "blk.*[02468].ffn_up_exps=CUDA0"', "never takes effect"),
        (r'-ot "blk\.([0-9]|\.ffn_nothing)x=CPU"', "never matches"),
        (r'-ot "blk\.[0-10]\.ffn=CUDA0"', "class of single digits"),
        (r'-ot "blk\.(3|4|)\.ffn_.*_exps.=CUDA0"', "empty branch"),
        (r'-ot "blk\.\d{1,2}\.ffn=CPU"', "cannot hold one"),
        ('-ot "exps=CUDA7"', "CUDA7"),
        ('-ot "exps=CUDA_Host"', "CUDA_Host"),
        ('-ot "blk.(3=CPU"', "not a regex"),
        (r'-ot "(?i)exps=CPU"', "std::regex"),
        (r'-ot "blk\.[3-9]\.ffn.*=CPU"', "router and norm"),
        (r'-ot "ffn_up_exps=CPU"', "different devices"),
        ("-ngl 40 -ot exps=CPU", "leaves layers 0-20 in RAM"),
        ("-rtr -ot exps=CPU", "-rtr repacks"),
        ("-ngl", "needs a value"),
        ("-sm none -mg 5 -ngl 99", "-mg 5: the engine sees CUDA0 to CUDA1"),
        ("-sm none -mg -1", "-mg -1 with -sm none uses no GPU"),
        ("-ncmoe abc -ngl 99", "-ncmoe abc is not a whole number"),
        ("-ncmoe -4", "-ncmoe -4 must be 0 or more"),
        ("-ngl 9" + "9" * 5000, "too large"),
        ("-ts 1,-1", "-ts 1,-1 is no list of shares"),
        ("-ts nan,1", "-ts nan,1 is no list of shares"),
        ("-ts 60,x", "-ts 60,x is no list of shares"),
        ("-c -5", "-c -5 must be 0 or more"),
        ("--ctx-size 32k", "--ctx-size 32k is not a whole number"),
        ("-ub -1", "-ub -1 must be 0 or more"),
        ("-b 0", "-b 0 must be 1 or more"),
        ("-np 0", "-np 0 must be 1 or more"),
        ("-mla 9", "-mla 9 must be 3 or less"),
        ("-amb -7", "-amb -7 must be 0 or more"),
        ("-cram -1", "no limit"),
        ("-ot exps=CUDA" + "9" * 5000, "the engine knows"),
        ("-ts 1,1,1", "-ts 1,1,1 has 3 shares, and the engine sees 2 GPUs"),
        ("-sm graph", "-sm graph spreads each layer over the GPUs"),
        ("-sm tensor", "ik does not know -sm tensor: it takes none, layer, row, attn, graph"),
        ("--frobnicate 3 --temp 0.6", "not known here, so not judged"),
        ("-fa off -ctv q8_0", "-ctv q8_0 needs flash attention, which is off"),
        ("-ctv q8_0", "write -fa on, or -ctv f16"),
        ("-ngl 99", "no -c: the engine opens the trained context, 163840 tokens"),
        ("-c 0", "-c 0: the engine opens the trained context, 163840 tokens"),
        ("-ub 4096", "-ub 4096 is more than -b 2048, and the engine uses 2048"),
        ("-c 64k", "is read as 64: write 65536"),
        ("-c 200000", "more than the 163840 that deepseek-r1 was trained on"),
    ],
)
def test_what_users_get_wrong_is_said(flags: str, said: str) -> None:
    """Each mistake of the field is named in one sentence."""
    assert any(said in t for t in texts(flags)), texts(flags)


def test_flags_in_order_are_not_complained_about() -> None:
    """Nothing is said of a quantized V with flash attention, known flags, or -sm layer."""
    found = texts("-fa -ctv q8_0 -ts 1,1 -sm layer -c 4096 --host 0.0.0.0", "qwen3-235b-a22b")
    for said in ("flash attention", "shares", "not known here", "-sm", "-c "):
        assert not any(said in t for t in found), found


@pytest.mark.parametrize("flags", ["--cpu-moe", "-ncmoe 5", "-ncmoe 61"])
@pytest.mark.parametrize("build", ["2025-06-16", "2026-08-15"])
def test_the_regex_that_an_engine_makes_of_a_flag_is_not_judged(flags: str, build: str) -> None:
    """-cmoe and -ncmoe are one rule each, named as typed, with none of the traps of patterns."""
    assert not any("rule" in t for t in texts(flags, build=build))
    found = texts(f"{flags} -ot exps=CUDA0", build=build)
    assert any(f"rule 2 ({flags}) never takes effect" in t for t in found), found


def test_a_flag_for_experts_does_nothing_where_there_are_none() -> None:
    """-ncmoe on a dense model, or on the dense first layers of R1, is told in its own words."""
    said = "rule 1 (-ncmoe 2) never matches: these layers have no experts"
    assert said in texts("-ncmoe 2", "llama-3.1-70b-instruct")
    assert said in texts("-ncmoe 2")
    assert not any("rule" in t for t in texts("-ncmoe 0"))


def test_a_dot_without_backslash_is_told_only_when_it_matters() -> None:
    """`blk.1.` also means layers 10 to 19; `blk.1.ffn`, `blk.3.ffn.` and `_exps.` do no harm."""
    trap = "stands for any character"
    assert any(trap in t for t in texts("-ot blk.1.=CPU"))
    assert not any(trap in t for t in texts("-ot blk.1.ffn_norm=CPU"))
    assert not any(trap in t for t in texts("-ot ffn_up_exps.=CPU"))
    assert not any(trap in t for t in texts('-ot "blk.(3|4).ffn.=CPU"'))


def test_a_number_that_is_not_closed_is_told() -> None:
    """`blk\\.1` and `blk.1.*` also take layers 10 to 19."""
    assert any("not closed" in t for t in texts(r"-ot blk\\.1=CPU"))
    assert any("not closed" in t for t in texts("-ot blk.(3|4).*exps=CPU"))
    assert not any("not closed" in t for t in texts(r"-ot blk\\.1\\.=CPU"))
    assert not any("not closed" in t for t in texts(r"-ot blk\\.[0-9]+.*exps=CPU"))
    assert not any("not closed" in t for t in texts(r"-ot 'blk.(3|4)\..*exps=CPU'"))


def test_attention_apart_from_its_ffn_is_counted() -> None:
    """Layers whose FFN was moved to another GPU than their attention are listed."""
    found = texts(r'-ts 50,50 -ot "blk\.(3|4)\.ffn_.*=CUDA1"')
    assert any("2 layers have attention" in t and "layers 3-4 GPU0 → GPU1" in t for t in found)


@pytest.mark.parametrize(
    ("flags", "build", "said"),
    [
        ("-fmoe", "2026-08-15", "unknown argument"),
        ("-fa -ngl 99", "2026-08-15", "bare -fa"),
        ("-ngl 99", "2026-08-15", "-cram is not given"),
        ("-ctv q8_0 -fa -mla 3", "2025-06-16", "-ctv does nothing"),
        ("-ser 6,1", "2025-06-16", "-ser drops experts"),
    ],
)
def test_flags_are_judged_by_the_build(flags: str, build: str, said: str) -> None:
    """What a build refuses, ignores or sets by itself is told for that build."""
    assert any(said in t for t in texts(flags, build=build))


def test_flags_that_an_old_build_takes_are_not_complained_about() -> None:
    """-fmoe and bare -fa are right in 2025-06."""
    found = texts("-fmoe -fa -mla 3 -ngl 99")
    assert not any("-fmoe" in t or "bare" in t for t in found)


def test_flags_of_latent_attention_do_nothing_elsewhere() -> None:
    """-amb and -mla on Qwen are noted as idle."""
    found = texts("-mla 3 -amb 512 -fa", "qwen3-235b-a22b")
    assert any("-mla does nothing" in t for t in found)
    assert any("-amb does nothing" in t for t in found)


def test_mainline_does_not_know_flags_of_ik() -> None:
    """-mla and friends stop mainline, and -fit is on unless turned off."""
    setup = Settings(engine="mainline", build="2026-10-01")
    found = engine_findings(parse_text("-mla 3 -amb 512"), model_of("deepseek-r1"), setup)
    assert any("mainline does not know -mla, -amb" in f.text for f in found)
    assert any("-fit off" in f.text for f in found)


def test_mainline_may_choose_the_context_itself() -> None:
    """Without a flag of layout -fit may shrink a context that was not given; -c 0 it keeps."""
    setup = Settings(engine="mainline", build="2026-10-01", ctx=163840)
    for flags, said in (
        ("-m a.gguf", "no -c: -fit chooses the context, at most the 163840 tokens"),
        ("-ngl 99", "no -c: the engine opens the trained context"),
        ("-fit off", "no -c: the engine opens the trained context"),
        ("-c 0", "-c 0: the engine opens the trained context"),
    ):
        found = engine_findings(parse_text(flags), model_of("deepseek-r1"), setup)
        assert any(said in f.text for f in found), flags


def test_settings_come_from_the_line() -> None:
    """Context is padded, ubatch is at most batch, and silence means the build's default."""
    line = "-c 40000 -b 4096 -ub 4096 -ctk q8_0 -fa"
    got = settings_of(parse_text(line), Settings(build="2025-06-16"))
    assert (got.ctx, got.ubatch, got.batch) == (40192, 4096, 4096)
    alone = settings_of(parse_text("-ub 4096"), Settings())
    assert (alone.ubatch, alone.batch) == (2048, 2048)
    assert (got.ctk, got.ctv, got.fa, got.cram_mib) == ("q8_0", "f16", True, 0)
    new = settings_of(parse_text(""), Settings())
    assert (new.mla, new.amb, new.fa, new.cram_mib) == (3, 256, True, 8192)
    assert settings_of(parse_text(""), Settings(build="2025-06-16")).fa is False


def test_a_silent_line_gets_the_defaults_of_its_own_engine() -> None:
    """Mainline turned flash attention and the prompt cache on earlier than ik."""
    for build, fa, cram_mib in (("2025-08-29", False, 0), ("2025-10-09", True, 8192)):
        got = settings_of(parse_text(""), Settings(engine="mainline", build=build))
        assert (got.fa, got.cram_mib) == (fa, cram_mib)
        old = settings_of(parse_text(""), Settings(build=build))
        assert (old.fa, old.cram_mib) == (False, 0)


def test_without_c_the_engine_opens_what_it_opens() -> None:
    """The trained context, of old mainline builds 4096; what is stated where nothing is known."""
    for flags in ("", "-c 0"):
        assert settings_of(parse_text(flags), Settings(), 40960).ctx == 40960
        assert settings_of(parse_text(flags), Settings(ctx=8192)).ctx == 8192
    old = Settings(engine="mainline", build="2025-11-01")
    assert settings_of(parse_text(""), old, 40960).ctx == 4096
    assert settings_of(parse_text("-c 0"), old, 40960).ctx == 40960
    assert settings_of(readable(parse_text("-c 64k"), "ik")[0], Settings(), 40960).ctx == 65536


def test_what_cannot_be_read_is_taken_as_not_given() -> None:
    """Settings fall back to the engine's own; -ub 0 is its way to say: as large as -b."""
    line = parse_text("-c -5 -ub -1 -np 0 -ts nan,1 -ncmoe x -ngl 99 -b 4096")
    command, found = readable(line, "ik")
    assert len(found) == 5
    assert [o.name for o in command.options] == ["ngl", "b"]
    assert settings_of(command, Settings(ctx=8192)).ctx == 8192
    got = settings_of(readable(parse_text("-b 1024 -ub 0"), "ik")[0], Settings())
    assert (got.ubatch, got.batch) == (1024, 1024)


def test_words_that_mainline_takes_for_numbers_are_left() -> None:
    """-ngl all and -np -1 mean something there, and nothing in ik."""
    line = parse_text("-ngl all -np -1")
    assert readable(line, "mainline") == (line, [])
    assert len(readable(line, "ik")[1]) == 2
    assert readable(parse_text("-ts 60,40,"), "ik")[1] == []


def test_types_without_a_kernel_and_slow_types_are_found() -> None:
    """q4_k_r4 on a GPU is an error, iq2_kt in RAM a warning, differing up and gate another."""
    model = model_of("deepseek-r1")
    kinds = [
        types.get("q4_k_r4") if t.role == "ffn_down_exps" else types.get("iq2_kt")
        for t in model.tensors
    ]
    gpu = wrong_devices(model, kinds, {t.name: "GPU0" for t in model.tensors})
    assert [f.severity for f in gpu] == ["error"]
    ram = wrong_devices(model, kinds, {t.name: "CPU" for t in model.tensors})
    assert any("iq2_kt" in f.text and f.severity == "warning" for f in ram)
    mixed = [types.get("q8_0" if t.role == "ffn_up_exps" else "iq2_ks") for t in model.tensors]
    assert any(
        "fused" in f.text
        for f in wrong_devices(model, mixed, {})
        + wrong_devices(model, mixed, {t.name: "GPU0" for t in model.tensors})
    )


def test_numbers_are_shown_as_ranges() -> None:
    """Runs get a dash, single numbers stand alone."""
    assert ranges([9, 3, 4, 5, 4]) == "3-5, 9"
    assert ranges([]) == ""
