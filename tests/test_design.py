"""The main job: designs that fit, are proven, and keep their hard rules."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import quantmix as qm
from quantmix.budget import Budget
from quantmix.design import run
from quantmix.emit.readme import readme
from quantmix.errors import EngineError, InfeasibleBudget, UnknownName, UsageError
from quantmix.models.ghost import write_ghost
from quantmix.models.model import Model
from quantmix.options import Options
from quantmix.palette import TypeLimits
from quantmix.recipe import Recipe
from quantmix.request import Request, fulfil
from quantmix.units import GIB, parse_size


@pytest.fixture(scope="module")
def r1() -> Model:
    """DeepSeek-R1 from the catalog."""
    return qm.load_model("deepseek-r1")


@pytest.fixture(scope="module")
def small() -> Model:
    """A model that designs in no time."""
    return qm.load_model("qwen3-0.6b")


@pytest.fixture(scope="module")
def recipe(r1: Model) -> Recipe:
    """The recipe of the mission."""
    return qm.design(r1, Budget.from_vram("192G"))


def test_it_fits_and_uses_what_there_is(recipe: Recipe) -> None:
    """192 GiB hold everything, and nearly all of it is used."""
    gpu = recipe.devices[0]
    assert gpu.capacity_bytes == 192 * GIB
    assert 0.998 * 192 * GIB < gpu.used_bytes <= 192 * GIB
    assert gpu.free_bytes == gpu.capacity_bytes - gpu.used_bytes


def test_every_tensor_is_planned_and_sums_agree(recipe: Recipe, r1: Model) -> None:
    """Tensors, types and sizes of the recipe add up to each other."""
    assert [t.name for t in recipe.tensors] == [t.name for t in r1.tensors]
    total = sum(t.bytes for t in recipe.tensors)
    assert total == recipe.size.tensor_bytes == sum(r["bytes"] for r in recipe.types.values())
    assert recipe.size.bpw == pytest.approx(8 * total / r1.n_elements)
    on_gpu = sum(t.bytes for t in recipe.tensors if t.device == "GPU0")
    assert on_gpu == recipe.devices[0].weights_bytes


def test_the_gap_is_proven(recipe: Recipe) -> None:
    """The objective is the damage, and no mix is better by more than one part in 10,000."""
    o = recipe.optimality
    assert o.objective == recipe.quality.damage
    assert 0 <= o.gap <= 1e-4
    assert o.lower_bound <= o.objective
    assert o.prices["GPU0"] > 0


def test_a_prediction_is_never_a_bare_number(recipe: Recipe) -> None:
    """PPL comes with its base, an interval and its basis."""
    q = recipe.quality
    assert q.ppl is not None
    assert q.ppl_low is not None
    assert q.ppl_high is not None
    assert q.ppl_low < q.ppl < q.ppl_high
    assert q.basis in ("prior", "calibrated", "measured")


def test_up_and_gate_share_a_type(recipe: Recipe) -> None:
    """Fused experts need one type per layer."""
    types = {t.name: t.type for t in recipe.tensors}
    for name, qtype in types.items():
        if "ffn_up" in name:
            assert types[name.replace("ffn_up", "ffn_gate")] == qtype


def test_the_embedding_stays_in_ram(recipe: Recipe) -> None:
    """token_embd lies on the host and takes the best type for free."""
    embedding = next(t for t in recipe.tensors if t.name == "token_embd.weight")
    assert embedding.device == "CPU"
    assert embedding.type == "q8_0"


def test_no_single_upgrade_still_fits(r1: Model) -> None:
    """The design is maximal: every option that lowers damage needs more than what is free."""
    found = run(r1, Budget.from_vram("192G"), Options())
    p, s = found.problem, found.solution
    rows = np.arange(len(p.groups))
    left = p.capacities[0] - p.use[:, rows, s.choice].sum(axis=1)
    better = p.cost < p.cost[rows, s.choice][:, None]
    extra = p.use - p.use[:, rows, s.choice][:, :, None]
    fits = (extra <= left[:, None, None]).all(axis=0)
    assert not (better & fits).any()


def test_only_the_types_asked_for_are_used(r1: Model) -> None:
    """--types limits the mix; fallbacks on rows of 128 are named."""
    names = ("iq1_s_r4", "iq2_kt", "iq4_ks", "q8_0")
    limits = TypeLimits(types=names)
    made = run(r1, Budget.from_vram("192G"), Options(limits=limits)).recipe
    used = {t.type for t in made.tensors} - {"f32"}
    outside = used - set(names)
    assert outside <= {"iq4_nl"}
    assert {t.role for t in made.tensors if t.type in outside} <= {"attn_k_b"}
    if outside:
        assert any("iq4_nl" in w for w in made.quality.warnings)


def test_a_pin_below_a_floor_is_refused(small: Model) -> None:
    """Both cannot hold; a pin at the floor or above it can."""
    floors = (("ffn_down", "q6_K"),)
    below = TypeLimits(pins=(("ffn_down", "q4_K"),), floors=floors)
    with pytest.raises(UsageError, match="--pin ffn_down=q4_K is below --floor ffn_down=q6_K"):
        run(small, Budget.from_size("5bpw"), Options(limits=below))
    for name in ("q6_K", "q8_0"):
        above = TypeLimits(pins=(("ffn_down", name),), floors=floors)
        made = run(small, Budget.from_size("6.8bpw"), Options(limits=above)).recipe
        assert {t.type for t in made.tensors if t.role == "ffn_down"} == {name}


def test_commands_name_an_imatrix_where_one_is_planned(small: Model) -> None:
    """With --no-imatrix neither the command nor the page asks for a file that there is not."""
    for imatrix in (True, False):
        options = Options(limits=TypeLimits(imatrix=imatrix))
        made = run(small, Budget.from_size("5bpw"), options).recipe
        assert ("--imatrix" in made.commands["quantize"]) == imatrix
        assert ("IMATRIX.dat" in readme(made)) == imatrix
        assert made.with_imatrix == imatrix


def test_damage_never_rises_with_the_budget(r1: Model) -> None:
    """More memory never predicts a worse model, and at last everything is at its best type."""
    last = np.inf
    recipe = None
    for size in (130, 160, 200, 280, 400, 560, 690, 900):
        recipe = qm.design(r1, Budget.from_vram(f"{size}G"))
        assert recipe.quality.damage <= last * (1 + 1e-4)
        last = recipe.quality.damage
    assert recipe is not None
    assert set(recipe.types) == {"q8_0", "f32"}
    assert (recipe.devices[0].free_bytes or 0) > 100 * GIB


def test_an_impossible_budget_names_the_smallest_that_works(r1: Model) -> None:
    """100 GiB cannot hold R1; the suggestion works, one percent less does not."""
    with pytest.raises(InfeasibleBudget, match="--vram") as caught:
        qm.design(r1, Budget.from_vram("100G"))
    size = float(str(caught.value).rsplit("--vram ", 1)[1].removesuffix("G"))
    assert qm.design(r1, Budget.from_vram(f"{size}G")).devices[0].used_bytes <= size * GIB
    with pytest.raises(InfeasibleBudget):
        qm.design(r1, Budget.from_vram(f"{size * 0.99:.2f}G"))


def test_another_engine_keeps_the_launch_settings(small: Model) -> None:
    """design(…, engine=…) changes the engine and its build, nothing else."""
    from quantmix.memory.settings import NEWEST_BUILD

    asked: dict[str, Any] = {
        "ctx": 8192,
        "ctk": "q8_0",
        "ctv": "q8_0",
        "ubatch": 1024,
        "batch": 4096,
        "parallel": 4,
        "mla": 1,
        "amb": 512,
        "nkvo": True,
        "cram_mib": 1024,
    }
    budget = Budget.from_gpus("1x24G", build="2026-01-01", **asked)
    made = qm.design(small, budget, engine="mainline").settings
    assert made == replace(budget.settings, engine="mainline", build=NEWEST_BUILD["mainline"])
    assert qm.design(small, budget, engine="ik").settings == budget.settings
    with pytest.raises(UnknownName, match="q8_KV"):
        qm.design(small, Budget.from_vram("9G", ctk="q8_KV"), engine="mainline")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ctx": -5}, "--ctx -5 must be above zero"),
        ({"ubatch": 0}, "--ubatch 0 must be above zero"),
        ({"batch": -5}, "--batch -5 must be above zero"),
        ({"parallel": 0}, "--parallel 0 must be above zero"),
        ({"amb": -7}, "--amb -7 must not be negative"),
        ({"cram_mib": -1}, "--cram -1 must not be negative"),
        ({"mla": 7}, "--mla 7"),
        ({"ubatch": 4096, "batch": 512}, "--batch 512 is smaller than --ubatch 4096"),
        ({"build": "2020-01-01"}, "older than what is known"),
        ({"build": "2099-01-01"}, "in the future"),
        ({"build": "2026-02-30"}, "is not a date"),
        ({"engine": "foo"}, "unknown engine 'foo': one of ik, mainline"),
    ],
)
def test_launch_numbers_that_no_budget_can_hold_are_refused(
    settings: dict[str, Any], words: str
) -> None:
    """A negative cache would give memory back; each number is refused by its flag's name."""
    with pytest.raises(UsageError, match=words):
        Budget.from_vram("9G", **settings)


def test_an_engine_that_fails_on_a_recipe_names_other_ways(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An architecture that one engine does not know: the other engine, or no check."""
    from quantmix import request

    def failed(*_: object) -> None:
        raise EngineError("llama-quantize --dry-run ended with -6: GGML_ASSERT")

    monkeypatch.setattr("quantmix.engine.ghost.DryCheck.check", failed)
    asked = request.Request("qwen3-0.6b", vram="9G", out=tmp_path)
    with pytest.raises(EngineError, match=r"GGML_ASSERT: .* qwen3, use --engine mainline; --no-ch"):
        request.fulfil(asked)


def test_pins_and_floors_hold(small: Model) -> None:
    """A pin fixes a type, a floor forbids worse ones, both are listed."""
    limits = TypeLimits(
        pins=((r"attn_v\.weight$", "q8_0"),), floors=((r"ffn_down\.weight$", "iq4_k"),)
    )
    made = run(small, Budget.from_size("3.2bpw"), Options(limits=limits)).recipe
    assert {t.type for t in made.tensors if t.role == "attn_v"} == {"q8_0"}
    from quantmix.ggml.types import get

    assert all(get(t.type).bpw >= 4 for t in made.tensors if t.role == "ffn_down")
    assert any("pin" in c for c in made.optimality.constraints)
    assert any("floor" in c for c in made.optimality.constraints)


@pytest.mark.parametrize(
    ("limits", "error", "words"),
    [
        (TypeLimits(types=("q6_k",)), UnknownName, "q6_K"),
        (TypeLimits(types=("q8_1",)), UsageError, "q8_1"),
        (TypeLimits(pins=(("nosuch", "q8_0"),)), UsageError, "matches no"),
        (TypeLimits(pins=(("(", "q8_0"),)), UsageError, "regular expression"),
        (TypeLimits(pins=(("ffn_down", "nope"),)), UnknownName, "nope"),
        (TypeLimits(types=("iq2_xxs",), imatrix=False), UsageError, "imatrix"),
        (
            TypeLimits(pins=(("attn_q", "iq1_s"),), imatrix=False),
            UsageError,
            "--pin: iq1_s needs an imatrix",
        ),
        (
            TypeLimits(floors=(("attn_q", "iq2_xs"),), imatrix=False),
            UsageError,
            "--floor: iq2_xs needs an imatrix",
        ),
        (TypeLimits(pins=(("attn_q", "q8_1"),)), UsageError, "--pin: q8_1"),
        (TypeLimits(floors=(("attn_q", "q8_1"),)), UsageError, "--floor: q8_1"),
    ],
)
def test_limits_that_make_no_sense_are_answered(
    small: Model, limits: TypeLimits, error: type[Exception], words: str
) -> None:
    """Each wrong type, pin or regex gets a message that names it."""
    with pytest.raises(error, match=words):
        run(small, Budget.from_size("4bpw"), Options(limits=limits))


def test_a_size_is_a_hard_cap(small: Model) -> None:
    """--size never gives a larger file, in bits per weight or in bytes."""
    made = qm.design(small, Budget.from_size("4.25bpw"))
    assert 4.2 < made.size.bpw <= 4.25
    made = qm.design(small, Budget.from_size("400M"))
    assert made.size.file_bytes <= 400 * 2**20
    with pytest.raises(InfeasibleBudget, match="--size"):
        qm.design(small, Budget.from_size("0.5bpw"))


def test_the_padding_between_tensors_counts_in_a_size(small: Model) -> None:
    """Tensors start at multiples of 32 bytes: norms of an odd length do not break the cap."""
    tensors = tuple(
        replace(t, shape=(t.shape[0] + 1,)) if len(t.shape) == 1 else t for t in small.tensors
    )
    odd = replace(small, tensors=tensors)
    for cap in range(400_000_000, 400_000_100, 20):
        made = qm.design(odd, Budget.from_size(str(cap)))
        assert cap - 4096 <= made.size.file_bytes <= cap
    with pytest.raises(InfeasibleBudget, match="--size") as caught:
        qm.design(odd, Budget.from_size("100M"))
    least = str(caught.value).split("--size ")[1]
    assert qm.design(odd, Budget.from_size(least)).size.file_bytes <= parse_size(least)


def test_two_cards_hold_the_model_without_overrides(r1: Model) -> None:
    """2x RTX PRO 6000: fully resident, split by -ts alone, each card within its real bytes."""
    made = qm.design(r1, Budget.from_gpus("2xrtx-pro-6000"))
    assert "-ot" not in made.offload["flags"]
    assert "-ts" in made.offload["flags"]
    for gpu in made.devices[:2]:
        assert gpu.capacity_bytes == 97887 * 2**20
        assert gpu.used_bytes <= gpu.capacity_bytes
    assert {t.device for t in made.tensors if t.layer is not None} == {"GPU0", "GPU1"}
    assert made.speed.tg_tps is not None


@pytest.mark.parametrize("engine", ["ik", "mainline"])
def test_ram_behind_a_card_takes_cpu_friendly_types(r1: Model, engine: str) -> None:
    """Experts in RAM decode fast there; what lives on the GPU has a CUDA kernel."""
    from quantmix.ggml.types import get

    made = qm.design(r1, Budget.from_gpus("1x24G", ram="256G", engine=engine))
    for t in made.tensors:
        qtype = get(t.type, made.engine.name)  # type: ignore[arg-type]
        if t.device == "GPU0":
            assert qtype.cuda
        elif "_exps" in t.role:
            assert not qtype.slow_cpu
    assert any(t.device == "CPU" and "_exps" in t.role for t in made.tensors)
    for d in made.devices:
        assert d.capacity_bytes is not None
        assert d.used_bytes <= d.capacity_bytes


def test_a_recipe_survives_its_own_json(recipe: Recipe) -> None:
    """Written and read again, a recipe is the same."""
    again = Recipe.from_json(json.loads(json.dumps(recipe.to_json())))
    assert again.to_json() == recipe.to_json()


def test_two_runs_write_the_same_files(small: Model, tmp_path: Path) -> None:
    """Everything but `created` is equal to the byte."""
    budget = Budget.from_vram("6G")
    for folder in ("a", "b"):
        made = replace(qm.design(small, budget), created="then")
        made.save(tmp_path / folder / "x")
    files = sorted(p.name for p in (tmp_path / "a" / "x").iterdir())
    assert "recipe.json" in files
    assert "memory.png" in files
    for name in files:
        assert (tmp_path / "a" / "x" / name).read_bytes() == (
            tmp_path / "b" / "x" / name
        ).read_bytes(), name


def test_experts_trained_in_four_bits_get_no_more_than_four(tmp_path: Path) -> None:
    """Kimi-K2.6 takes 543.6 GiB and loses nothing, however much more there is; without an
    importance matrix q4_0 misses the grid, and larger types are worth their room."""
    model = qm.load_model("kimi-k2.6")
    made = qm.design(model, Budget.from_vram("700G"))
    types = {t.role: t.type for t in made.tensors if t.role.endswith("_exps")}
    assert set(types.values()) == {"q4_0"}
    assert made.size.tensor_bytes / GIB == pytest.approx(543.617, abs=0.001)
    assert made.quality.ln_ppl_ratio < 0.0005
    blind = qm.design(
        model, Budget.from_vram("700G"), options=Options(limits=TypeLimits(imatrix=False))
    )
    assert blind.size.tensor_bytes > 600 * GIB


@pytest.mark.parametrize("engine", ["ik", "mainline"])
@pytest.mark.parametrize(
    ("name", "gpus"),
    [
        ("qwen2.5-7b-instruct", "1x1GiB"),
        ("gemma-3-4b-it", "1x1800MiB"),
        ("qwen2.5-3b-instruct", "2x1000MiB"),
    ],
)
def test_layers_in_ram_leave_the_head_where_flags_can_put_it(
    name: str, gpus: str, engine: str
) -> None:
    """With few or no layers on a GPU the flags still are the plan, tied head and all."""
    from quantmix.emit.cmdline import parse
    from quantmix.emit.simulate import layer_homes, visible

    model, budget = qm.load_model(name), Budget.from_gpus(gpus, ram="64G", engine=engine)
    assert budget.rig is not None
    made = run(model, budget, Options())
    assert made.placement is not None
    tied = "output.weight" not in model.by_name
    if tied:
        offload = made.recipe.offload
        sizes = {t.name: t.bytes for t in made.recipe.tensors}
        seen = visible(budget.rig, offload["env"])
        homes = layer_homes(
            parse(offload["flags"]), model, budget.settings, budget.rig, sizes, seen
        )
        there = homes.output if homes.output < 0 else seen[homes.output]
        assert there == made.placement.output_device


@pytest.mark.parametrize(
    "budget", [Budget.from_size("3.5bpw"), Budget.from_vram("4G")], ids=["size", "vram"]
)
def test_a_tied_head_takes_the_types_of_its_device(budget: Budget) -> None:
    """On a GPU it may have types that are slow on a CPU, but none without a CUDA kernel."""
    model = qm.load_model("qwen2.5-1.5b-instruct")
    limits = TypeLimits(types=("iq2_kt", "iq3_kt", "iq4_kt"))
    made = run(model, budget, Options(limits=limits)).recipe
    head = next(t for t in made.tensors if t.name == "token_embd.weight")
    assert head.type.endswith("_kt")
    no_kernel = TypeLimits(pins=(("token_embd", "q8_KV"),))
    with pytest.raises(UsageError, match=r"token_embd\.weight in a GPU"):
        run(model, budget, Options(limits=no_kernel))


def test_a_tied_head_on_a_gpu_is_timed_there() -> None:
    """A speed that the plain design reaches changes nothing; RAM is not waited for."""
    model = qm.load_model("gemma-3-4b-it")
    budget = Budget.from_gpus("1xrtx-4090", ctx=8192, cpu="desktop-ddr4-3200-2ch")
    plain = run(model, budget, Options()).recipe
    assert plain.speed.tg_tps is not None
    asked = run(model, budget, Options(min_tps=0.98 * plain.speed.tg_tps)).recipe
    assert asked.quality.damage == pytest.approx(plain.quality.damage, rel=1e-3)
    assert asked.speed.tg_tps == pytest.approx(plain.speed.tg_tps, rel=1e-2)


def test_the_quick_judgement_knows_where_a_tied_head_runs() -> None:
    """A head in RAM needs a type that a CPU decodes well, one on a GPU does not."""
    from quantmix.loss import load
    from quantmix.memory.model import HOST, Placement
    from quantmix.palette import build
    from quantmix.search.least import Least

    model, budget = qm.load_model("qwen2.5-1.5b-instruct"), Budget.from_gpus("1x8G", ram="64G")
    assert budget.rig is not None
    limits = TypeLimits(types=("iq2_kt", "iq4_ks"), pins=(("token_embd", "iq2_kt"),))
    least = Least.of(model, build(model, load(model, engine="ik"), "ik", limits))
    homes = (HOST, *[0] * (model.hparams.n_layer - 1))
    assert least.spilled(budget.rig, budget.settings, Placement(homes, HOST)) is None
    assert least.spilled(budget.rig, budget.settings, Placement(homes, 0)) == frozenset()


@pytest.mark.parametrize("engine", ["ik", "mainline"])
def test_a_rig_without_gpus_is_designed_for_its_ram(engine: str, tmp_path: Path) -> None:
    """All lies on the host with `-ngl 0`; too little RAM names the RAM that works."""
    rig = tmp_path / "ram.toml"
    rig.write_text('ram = "64G"\n')
    made = qm.design(qm.load_model("qwen2.5-7b-instruct"), Budget.from_rig(rig, engine=engine))
    assert {t.device for t in made.tensors} == {"CPU"}
    assert made.offload["flags"][:2] == ["-ngl", "0"]
    rig.write_text('ram = "4G"\n')
    with pytest.raises(InfeasibleBudget, match=r"that works is --ram \d+G"):
        qm.design(qm.load_model("qwen2.5-7b-instruct"), Budget.from_rig(rig, engine=engine))


def test_the_smallest_cards_that_work_keep_the_reserve() -> None:
    """What the message names works when it is asked for, with the same --reserve."""
    model = qm.load_model("qwen2.5-7b-instruct")
    with pytest.raises(InfeasibleBudget, match=r"--gpus 1x\d+GiB") as caught:
        qm.design(model, Budget.from_gpus("1x4GiB", reserve="3G"))
    named = str(caught.value).split("--gpus ", 1)[1].split()[0].strip(";")
    assert qm.design(model, Budget.from_gpus(named, reserve="3G")).devices[0].used_bytes > 0


def test_a_loaded_mtp_block_is_a_block_like_others() -> None:
    """With --mtp it is guarded against low bits and its reads are timed, experts by their share."""
    from quantmix.ggml.types import get

    model, budget = qm.load_model("glm-4.5-air"), Budget.from_vram("48G", ctx=8192, mtp=True)
    last = model.hparams.n_layer
    made = run(model, budget, Options()).recipe
    mine = [t for t in made.tensors if t.layer == last and get(t.type).is_quantized]
    assert mine
    assert all(get(t.type).bpw >= 3.0 for t in mine if "exps" not in t.role)

    def speed(mtp: bool) -> float:
        rig = Budget.from_gpus("1xrtx-pro-6000", ctx=8192, mtp=mtp)
        found = run(model, rig, Options(limits=TypeLimits(types=("q4_0",)))).recipe
        return found.speed.tg_tps or 0.0

    assert 0.9 * speed(False) < speed(True) < speed(False)


def test_prices_are_those_of_memory() -> None:
    """A speed to reach limits the design too, but has no price per GiB."""
    model = qm.load_model("llama-3.1-8b-instruct")
    budget = Budget.from_gpus("1xrtx-4090", ctx=8192)
    plain = run(model, budget, Options()).recipe
    assert plain.speed.tg_tps is not None
    made = run(model, budget, Options(min_tps=1.3 * plain.speed.tg_tps))
    pools = dict(zip(made.problem.pools, made.solution.prices, strict=True))
    assert pools["seconds"] > 0
    assert set(made.recipe.optimality.prices) <= {"GPU0", "CPU"}


@pytest.mark.parametrize("engine", ["ik", "mainline"])
def test_a_gpu_without_weights_is_hidden(engine: str) -> None:
    """400 MiB hold no context: all goes to RAM, and the engine is not shown the GPU."""
    from quantmix.emit.simulate import visible

    budget = Budget.from_gpus("2x400MiB", ram="64G", engine=engine)
    assert budget.rig is not None
    made = qm.design(qm.load_model("qwen2.5-0.5b-instruct"), budget)
    assert {t.device for t in made.tensors} == {"CPU"}
    assert made.devices[0].used_bytes == made.devices[1].used_bytes == 0
    assert made.offload["env"]["CUDA_VISIBLE_DEVICES"] == ""
    assert visible(budget.rig, made.offload["env"]) == []


def test_own_measurements_that_are_too_few_are_told(tmp_path: Path) -> None:
    """--own with an empty store, or behind --measurements, says that it changed nothing."""
    file = tmp_path / "m.gguf"
    write_ghost(file, qm.load_model("smollm2-135m"))
    asked = Request(model=str(file), size="4bpw", own=True, no_check=True, out=tmp_path / "r")
    (note,) = fulfil(asked, db=tmp_path / "m.db").notes
    assert "the store has 0 in all" in note
