"""The memory plan against what a real mainline libllama counts, for many architectures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from quantmix.cli.check import check
from quantmix.engine.mainline_find import Mainline
from quantmix.engine.oracle import LIMITS, Comparison, OracleReport, check_memory, check_recipe
from quantmix.errors import CheckFailed, UsageError
from quantmix.ggml import types
from quantmix.loss.quality import Quality
from quantmix.memory import kv
from quantmix.memory.settings import NEWEST_BUILD, Settings
from quantmix.models.model import Model
from quantmix.models.sources import load_model
from quantmix.recipe import (
    DeviceUse,
    EngineInfo,
    ModelInfo,
    Optimality,
    PlannedTensor,
    Recipe,
    Size,
)
from quantmix.request import Request, fulfil
from quantmix.speed.prediction import Speed

ARCHITECTURES = (
    "deepseek-r1",
    "qwen3-235b-a22b",
    "glm-4.5-air",
    "llama-3.1-70b",
    "gemma-3-27b-it",
    "gpt-oss-120b",
    "qwen3-next-80b-a3b-instruct",
    "qwen3.5-397b-a17b",
    "mixtral-8x7b",
    "llama-4-scout",
    "minimax-m2",
    "gemma-4-31b-it",
)
BASE = Settings(engine="mainline", build=NEWEST_BUILD["mainline"])
LAUNCHES = (
    BASE,
    replace(BASE, ctx=8192, ctk="q8_0", ctv="q8_0", ubatch=1024, parallel=2),
)
MIX = ("q4_K", "iq2_xs", "q6_K", "iq4_xs", "q8_0")


def mixed_types(model: Model) -> dict[str, str]:
    """A type for every tensor, five kinds by turns, with mainline's fallback applied."""
    return {
        t.name: types.resolve(MIX[i % 5], t.name, t.shape, "mainline").name
        if t.quantizable
        else "f32"
        for i, t in enumerate(model.tensors)
    }


def recipe_of(model: Model, type_of: dict[str, str], kv_bytes: int) -> Recipe:
    """A recipe that holds what the oracle reads: settings, types, and one device's cache."""
    table = types.table("mainline")
    return Recipe(
        model=ModelInfo(model.id, model.arch, model.layout, len(model.tensors), 0, "catalog"),
        engine=EngineInfo("mainline", BASE.build, "Q4_K_M"),
        settings=BASE,
        size=Size(0, 0, False, 0, 0.0),
        devices=(DeviceUse("GPU0", "gpu", None, 0, 0, kv_bytes, 0, 0, None),),
        quality=Quality(0.0, 0.0, None, None, None, None, "prior"),
        optimality=Optimality("feasible", 0.0, 0.0, 0.0),
        speed=Speed(),
        types={},
        rules=(),
        commands={},
        offload={},
        tensors=tuple(
            PlannedTensor(
                t.name,
                t.shape,
                t.role,
                t.layer,
                type_of[t.name],
                table[type_of[t.name]].tensor_bytes(t.shape),
                "GPU0",
                0.0,
            )
            for t in model.tensors
        ),
    )


@pytest.mark.engine
@pytest.mark.parametrize("settings", LAUNCHES, ids=("f16", "q8_0-ub1024-2slots"))
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_plan_holds(name: str, settings: Settings, mainline: Mainline) -> None:
    """Weights and cache equal the engine's to 0.01 MiB, and the compute bound is above its own."""
    model = load_model(name)
    report = check_memory(model, mixed_types(model), settings, engine=mainline)
    for found in report.comparisons:
        assert found.ok, (found, found.difference_bytes)
    assert [c.what for c in report.comparisons] == ["weights", "kv", "compute"]
    assert all(c.engine_bytes > 0 for c in report.comparisons)


@pytest.mark.engine
@pytest.mark.parametrize("name", ["deepseek-v3.2", "glm-5.1", "glm-5.2"])
def test_sparse_attention_is_counted_exactly(name: str, mainline: Mainline) -> None:
    """The cache of models with a DSA indexer, and their weights, equal the engine's."""
    model = load_model(name)
    found = check_memory(model, mixed_types(model), BASE, engine=mainline).comparisons
    assert all(c.ok for c in found if c.equal), found


@pytest.mark.engine
def test_latent_cache_takes_the_type_of_k(mainline: Mainline) -> None:
    """An MLA design with two cache types is launched with that of K, which the engine accepts."""
    model = load_model("deepseek-v2-lite")
    report = check_memory(model, mixed_types(model), replace(BASE, ctk="q8_0"), engine=mainline)
    assert report.ok


@pytest.mark.engine
def test_layers_of_two_widths_without_flash_attention(mainline: Mainline) -> None:
    """Without flash attention mainline pads V of every layer to the widest (Gemma 4)."""
    model = load_model("gemma-4-31b-it")
    without = check_memory(model, mixed_types(model), replace(BASE, fa=False), engine=mainline)
    assert without.ok
    assert without.comparisons[1].engine_bytes > sum(kv.kv_bytes(model, BASE))


@pytest.mark.engine
def test_mtp_weights_are_counted_when_loaded(mainline: Mainline) -> None:
    """With `mtp` the engine's weights grow by the MTP block, and so does the plan."""
    model = load_model("glm-4.5-air")
    type_of = mixed_types(model)
    with_mtp = check_memory(model, type_of, replace(BASE, mtp=True), engine=mainline)
    without = check_memory(model, type_of, BASE, engine=mainline)
    assert with_mtp.ok
    assert with_mtp.comparisons[0].engine_bytes > without.comparisons[0].engine_bytes


@pytest.mark.engine
def test_a_wrong_type_is_noticed(mainline: Mainline) -> None:
    """Were one tensor planned at another size than the file has, the oracle would say so."""
    model = load_model("smollm2-135m")
    type_of = mixed_types(model)
    true = check_memory(model, type_of, BASE, engine=mainline).comparisons[0]
    larger = {**type_of, "blk.0.ffn_down.weight": "f16"}
    other = check_memory(model, larger, BASE, engine=mainline).comparisons[0]
    assert not Comparison("weights", true.planned_bytes, other.engine_bytes, True).ok


@pytest.mark.engine
def test_recipe_cache_is_compared_over_devices(mainline: Mainline) -> None:
    """A recipe whose devices hold another cache than the engine allocates fails the oracle."""
    model = load_model("smollm2-135m")
    type_of = mixed_types(model)
    right = sum(kv.kv_bytes(model, BASE))
    good = check_recipe(recipe_of(model, type_of, right), model, engine=mainline)
    bad = check_recipe(recipe_of(model, type_of, right // 2), model, engine=mainline)
    assert good.ok
    assert not bad.ok


def test_types_of_ik_are_refused() -> None:
    """A design with types that mainline lacks cannot be asked about, and the message says why."""
    model = load_model("smollm2-135m")
    type_of = {**mixed_types(model), "blk.0.ffn_down.weight": "iq4_ks"}
    with pytest.raises(UsageError, match=r"iq4_ks.*--engine mainline"):
        check_memory(model, type_of, BASE)


def test_report_states_its_limits() -> None:
    """Every report says that it proves nothing about ik on CUDA, and holds only if all rows do."""
    engine = Mainline(None, None, "here", "llama 1", True)
    rows = (Comparison("kv", 10, 10, True), Comparison("compute", 9, 10, False))
    report = OracleReport(rows, engine)
    assert not report.ok
    assert report.to_json()["limits"] == LIMITS
    assert str(report).splitlines()[-1] == LIMITS
    assert "compute: planned 0.00 MiB (bound), engine 0.00 MiB: DOES NOT HOLD" in str(report)
    assert "nothing about the compute buffers of ik_llama.cpp on CUDA" in LIMITS


def test_check_names_the_oracle_when_only_that_disagrees(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A recipe without problems whose memory is counted otherwise has failed for that."""
    folder = fulfil(Request("qwen3-0.6b", vram="9G", no_check=True, out=tmp_path)).folder
    engine = Mainline(None, tmp_path, "nowhere", "llama 0", False)
    wrong = OracleReport((Comparison("kv", 1 << 20, 1 << 30, True),), engine)
    monkeypatch.setattr("quantmix.engine.oracle.check_recipe", lambda *_: wrong)
    with pytest.raises(CheckFailed, match="the oracle counts other memory than planned"):
        check(folder, oracle=True, quiet=True)
