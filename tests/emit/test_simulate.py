"""Flags replayed with the engines' precedence give the plan they were made for."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantmix.emit.flags import OffloadFlags, offload
from quantmix.emit.simulate import prove, replay
from quantmix.errors import CheckFailed, UsageError
from quantmix.memory import kv
from quantmix.memory.homes import planned
from quantmix.memory.model import HOST, Placement
from quantmix.memory.settings import NEWEST_BUILD, Settings

from .conftest import make_rig, model_of, sizes_of

ENGINES = [
    ("ik", NEWEST_BUILD["ik"]),
    ("ik", "2025-06-16"),
    ("mainline", NEWEST_BUILD["mainline"]),
]
RIGS = {
    "1x24": (24,),
    "2x24": (24, 24),
    "1x96": (96,),
    "2x96": (96, 96),
    "4 mixed": (32, 32, 24, 24),
    "7 mixed": (32, 32, 24, 24, 24, 24, 48),
    "16x24": (24,) * 16,
}
MODELS = ["deepseek-r1", "qwen3-235b-a22b", "llama-3.1-70b-instruct", "glm-4.5-air", "gpt-oss-120b"]


def even_placement(name: str, sizes: tuple[int, ...], cpu_every: int = 0) -> Placement:
    """Layers over GPUs in proportion to their sizes; every n-th layer's experts in RAM."""
    n = model_of(name).hparams.n_layer
    total = sum(sizes)
    ends = [round(n * sum(sizes[: i + 1]) / total) for i in range(len(sizes))]
    homes = tuple(next(g for g, e in enumerate(ends) if i < e) for i in range(n))
    cpu = frozenset(i for i in range(n) if cpu_every and i % cpu_every)
    return Placement(homes, len(sizes) - 1, cpu)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: "-".join(e))
@pytest.mark.parametrize("rig", RIGS)
@pytest.mark.parametrize("name", MODELS)
def test_replayed_flags_are_the_plan(name: str, rig: str, engine: tuple[str, str]) -> None:
    """On every rig and engine the flags put every tensor, and KV, where the plan has it."""
    setup = Settings(engine=engine[0], build=engine[1])  # type: ignore[arg-type]
    for cpu_every in (0, 1, 3):
        placement = even_placement(name, RIGS[rig], cpu_every)
        machine = make_rig(*RIGS[rig])
        model, sizes = model_of(name), sizes_of(name, "q4_0")
        flags = offload(model, setup, machine, placement, sizes)
        assert replay(flags, model, setup, machine, sizes) == planned(model, placement, machine)
        if not placement.cpu_experts:
            assert "-ot" not in flags.flags


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: "-".join(e))
def test_dense_layers_leave_their_feed_forward_in_ram(engine: tuple[str, str]) -> None:
    """In a model without experts `cpu_experts` means the FFN matrices, and nothing else moves."""
    model = model_of("llama-3.1-70b-instruct")
    placement = Placement((0,) * 80, 0, frozenset(range(70, 80)))
    setup = Settings(engine=engine[0], build=engine[1])  # type: ignore[arg-type]
    sizes = sizes_of("llama-3.1-70b-instruct", "q4_0")
    machine = make_rig(24)
    where = replay(offload(model, setup, machine, placement, sizes), model, setup, machine, sizes)
    moved = {t.name for t in model.tensors if t.layer is not None and where[t.name] == "CPU"}
    assert moved == {
        f"blk.{i}.ffn_{w}.weight" for i in range(70, 80) for w in ("up", "gate", "down")
    }


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 20), min_size=1, max_size=6),
    st.sets(st.integers(0, 60)),
    st.integers(0, 12),
    st.sampled_from(ENGINES),
    st.booleans(),
)
def test_any_contiguous_placement_is_expressed_exactly(
    counts: list[int], cpu: set[int], in_ram: int, engine: tuple[str, str], head_in_ram: bool
) -> None:
    """Random runs per GPU, unused GPUs, leading layers in RAM, scattered expert layers."""
    model, sizes = model_of("deepseek-r1"), sizes_of("deepseek-r1", "q4_0")
    homes = ([HOST] * in_ram + [g for g, n in enumerate(counts) for _ in range(n)])[:61]
    homes += [len(counts)] * (61 - len(homes))
    output = HOST if head_in_ram else len(counts)
    placement = Placement(tuple(homes), output, frozenset(cpu))
    setup = Settings(engine=engine[0], build=engine[1])  # type: ignore[arg-type]
    offload(model, setup, make_rig(*[32] * (len(counts) + 1)), placement, sizes)


def test_old_ik_flags_are_spelled_for_their_build() -> None:
    """A build of 2025-06 gets bare -fa and -fmoe; a new one gets `-fa on` and no -fmoe."""
    model, sizes, rig = model_of("deepseek-r1"), sizes_of("deepseek-r1"), make_rig(96, 96)
    placement = even_placement("deepseek-r1", (96, 96))
    old = offload(model, Settings(build="2025-06-16"), rig, placement, sizes).flags
    new = offload(model, Settings(), rig, placement, sizes).flags
    assert "-fmoe" in old
    assert old[old.index("-fa") + 1].startswith("-")
    assert "-fmoe" not in new
    assert new[new.index("-fa") + 1] == "on"
    assert "-cram" in new
    assert "-cram" not in old


def test_mainline_gets_no_flag_of_ik() -> None:
    """No -mla, -amb or -fmoe for mainline, and `-fit off` so that it keeps the layout."""
    model, sizes = model_of("deepseek-r1"), sizes_of("deepseek-r1")
    setup = Settings(engine="mainline", build="2026-10-01")
    flags = offload(
        model, setup, make_rig(96, 96), even_placement("deepseek-r1", (96, 96)), sizes
    ).flags
    assert not {"-mla", "-amb", "-fmoe", "-rtr"} & set(flags)
    assert flags[flags.index("-fit") + 1] == "off"


def test_the_byte_rule_is_named_unverified() -> None:
    """A build that splits by bytes says so, with the slack its boundaries have."""
    flags = offload(
        model_of("deepseek-r1"),
        Settings(),
        make_rig(96, 96),
        even_placement("deepseek-r1", (96, 96)),
        sizes_of("deepseek-r1"),
    )
    assert any("unverified" in n for n in flags.notes)


def test_a_single_expert_pattern_reads_like_a_person_wrote_it() -> None:
    """Layers 34-60 in RAM become one short anchored override."""
    model, sizes = model_of("deepseek-r1"), sizes_of("deepseek-r1")
    placement = Placement((0,) * 61, 0, frozenset(range(34, 61)))
    flags = offload(model, Settings(), make_rig(96), placement, sizes).flags
    assert flags[flags.index("-ot") + 1] == (
        r"blk\.(3[4-9]|[4-9][0-9])\.ffn_(up|down|gate)_exps\.weight=CPU"
    )


def test_wrong_flags_are_caught() -> None:
    """Proof fails when an override is dropped, and names the tensor."""
    model, sizes, rig = model_of("deepseek-r1"), sizes_of("deepseek-r1"), make_rig(96)
    placement = Placement((0,) * 61, 0, frozenset(range(34, 61)))
    flags = offload(model, Settings(), rig, placement, sizes)
    cut = flags.flags.index("-ot")
    broken = OffloadFlags(flags.flags[:cut] + flags.flags[cut + 2 :], flags.env)
    with pytest.raises(CheckFailed, match=r"blk\.34\.ffn"):
        prove(broken, model, Settings(), rig, placement, sizes)


def test_scattered_layers_are_refused() -> None:
    """A GPU must hold one run of layers: no engine flag can say anything else."""
    model, sizes = model_of("deepseek-r1"), sizes_of("deepseek-r1")
    homes = tuple(i % 2 for i in range(61))
    with pytest.raises(UsageError, match="one run of layers"):
        offload(model, Settings(), make_rig(96, 96), Placement(homes, 1), sizes)


@pytest.mark.parametrize(
    ("build", "engine", "expected"),
    [
        ("2026-10-01", "mainline", {0, 1, 2, 3, 4}),
        ("2026-04-01", "ik", {0, 1, 2, 3, 4}),
        ("2026-08-15", "ik", {56, 57, 58, 59, 60}),
    ],
)
def test_ncmoe_counts_from_the_end_that_the_engine_counts_from(
    build: str, engine: str, expected: set[int]
) -> None:
    """-ncmoe 5 takes the first blocks in mainline, the last MoE blocks in new ik."""
    model, sizes = model_of("deepseek-r1"), sizes_of("deepseek-r1")
    setup = Settings(engine=engine, build=build)  # type: ignore[arg-type]
    got = replay(["-ngl", "999", "-ncmoe", "5"], model, setup, make_rig(96), sizes)
    experts = {t.layer for t in model.tensors if "exps" in t.role and got[t.name] == "CPU"}
    assert experts == {i for i in expected if i >= model.hparams.n_dense_lead}


def test_ncmoe_is_shared_out_over_gpus_by_new_ik() -> None:
    """-ncmoe 10 on two GPUs takes the last layers of each, ten in all."""
    model, sizes = model_of("qwen3-235b-a22b"), sizes_of("qwen3-235b-a22b")
    flags = ["-ngl", "999", "-ts", "50,50", "-ncmoe", "10"]
    got = replay(flags, model, Settings(), make_rig(48, 48), sizes)
    experts = {t.layer for t in model.tensors if "exps" in t.role and got[t.name] == "CPU"}
    assert len(experts) == 10
    assert 93 in experts
    assert len({e for e in experts if e is not None and e > 80}) == 5


def test_overrides_beat_ncmoe_in_ik_whatever_the_order() -> None:
    """ik looks at every -ot before -ncmoe; mainline goes by the command line."""
    model, sizes, rig = model_of("deepseek-r1"), sizes_of("deepseek-r1"), make_rig(96)
    flags = ["-ngl", "999", "-cmoe", "-ot", r"blk\.3\.ffn_.*_exps=CUDA0"]
    name = "blk.3.ffn_up_exps.weight"
    assert replay(flags, model, Settings(), rig, sizes)[name] == "GPU0"
    ml = Settings(engine="mainline", build="2026-10-01")
    assert replay(flags, model, ml, rig, sizes)[name] == "CPU"


def test_ngl_counts_the_output_in_mainline_only() -> None:
    """-ngl n_layer leaves layer 0 in RAM with mainline, the output with ik."""
    model, sizes, rig = (
        model_of("llama-3.1-70b-instruct"),
        sizes_of("llama-3.1-70b-instruct"),
        make_rig(96),
    )
    ik = replay(["-ngl", "80"], model, Settings(), rig, sizes)
    ml = replay(["-ngl", "80"], model, Settings(engine="mainline"), rig, sizes)
    assert (ik["blk.0.attn_q.weight"], ik["output.weight"]) == ("GPU0", "CPU")
    assert (ml["blk.0.attn_q.weight"], ml["output.weight"]) == ("CPU", "GPU0")
    assert ik["token_embd.weight"] == ml["token_embd.weight"] == "CPU"


def test_a_buffer_that_does_not_exist_is_refused() -> None:
    """Naming CUDA3 on one GPU stops the engine; so it does here."""
    with pytest.raises(UsageError, match="CUDA3"):
        replay(["-ot", "exps=CUDA3"], model_of("deepseek-r1"), Settings(), make_rig(96), {})


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-sm", "none", "-mg", "5"], "-mg 5"),
        (["-ncmoe", "abc"], "-ncmoe abc"),
        (["-ncmoe", "-4"], "-ncmoe -4"),
        (["-ts", "1,-1"], "-ts 1,-1"),
        (["-ts", "nan,1"], "-ts nan,1"),
    ],
)
def test_numbers_that_no_engine_takes_are_refused(flags: list[str], said: str) -> None:
    """Replaying them would mean nothing; the flag is named."""
    name = "deepseek-r1"
    with pytest.raises(UsageError, match=said):
        replay(flags, model_of(name), Settings(), make_rig(96, 96), sizes_of(name))


def test_mtp_blocks_follow_the_output_and_count_as_slots() -> None:
    """An unloaded MTP block still counts in -ts, and its tensors are on no device."""
    model, sizes, rig = model_of("glm-4.5-air"), sizes_of("glm-4.5-air"), make_rig(48, 48)
    n = kv.n_blocks(model)
    placement = even_placement("glm-4.5-air", (48, 48))
    flags = offload(model, Settings(build="2025-10-01"), rig, placement, sizes).flags
    assert sum(int(w) for w in flags[flags.index("-ts") + 1].split(",")) == n + 1
    loaded = replay(flags, model, Settings(build="2025-10-01"), rig, sizes)
    assert not any(name.startswith(f"blk.{n - 1}.") for name in loaded)
    with_mtp = replace(Settings(), mtp=True)
    assert any(
        name.startswith(f"blk.{n - 1}.") for name in planned(model, placement, rig, mtp=True)
    )
    offload(model, with_mtp, rig, placement, sizes)


@pytest.mark.parametrize("engine", ENGINES, ids=lambda e: "-".join(e))
@pytest.mark.parametrize("in_ram", [False, True])
def test_a_tied_head_goes_where_the_plan_has_it(engine: tuple[str, str], in_ram: bool) -> None:
    """On the last GPU or in RAM: an override by the name `output` would miss a tied head."""
    model, sizes = model_of("gemma-3-12b-it"), sizes_of("gemma-3-12b-it", "q4_0")
    setup = Settings(engine=engine[0], build=engine[1])  # type: ignore[arg-type]
    placement = Placement((0,) * 24 + (1,) * 24, HOST if in_ram else 1)
    flags = offload(model, setup, make_rig(24, 24), placement, sizes)
    assert ("^(output|token_embd)=CPU" in flags.flags) == in_ram


def test_ik_keeps_a_tied_head_in_ram_when_layers_are() -> None:
    """`-ngl` below the number of layers leaves it there, and no override can fetch it alone."""
    model, sizes = model_of("gemma-3-12b-it"), sizes_of("gemma-3-12b-it", "q4_0")
    homes = (HOST,) * 42 + (0,) * 6
    flags = offload(model, Settings(), make_rig(24), Placement(homes, HOST), sizes)
    assert flags.flags[:2] == ["-ngl", "6"]
    with pytest.raises(UsageError, match="output"):
        offload(model, Settings(), make_rig(24), Placement(homes, 0), sizes)
    wrong = OffloadFlags(["-ngl", "6", "-ot", "^output=CUDA0"], {})
    with pytest.raises(CheckFailed, match="flags put the head on CPU, the plan on GPU0"):
        prove(wrong, model, Settings(), make_rig(24), Placement(homes, 0), sizes)


def test_mtp_blocks_follow_the_last_block_when_the_head_is_in_ram() -> None:
    """An unloaded MTP block does not break the run of layers of the last GPU."""
    model, sizes = model_of("glm-4.5-air"), sizes_of("glm-4.5-air")
    placement = Placement((HOST,) * 6 + (0,) * (model.hparams.n_layer - 6), HOST)
    offload(model, Settings(), make_rig(48), placement, sizes)
