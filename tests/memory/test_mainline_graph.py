"""Mainline's compute buffer: the estimate against what its own graph allocator reserves."""

from __future__ import annotations

from dataclasses import replace

import pytest

from quantmix.engine.mainline_find import Mainline
from quantmix.engine.mainline_sweep import LAUNCHES, Buffer, measure
from quantmix.memory import kv
from quantmix.memory.compute import DeviceRole
from quantmix.memory.mainline_graph import has_dense_layers, regimes
from quantmix.memory.margins import safe
from quantmix.memory.model import HOST, Placement
from quantmix.memory.plan import device_memory
from quantmix.memory.settings import NEWEST_BUILD, Settings
from quantmix.models.sources import load_model
from quantmix.rig.device import Device, Rig
from quantmix.units import MIB

BASE = Settings(engine="mainline", build=NEWEST_BUILD["mainline"])
ALL = DeviceRole(first=True, layers=True, experts=True, output=True)


def sizes(name: str, settings: Settings, role: DeviceRole = ALL) -> dict[str, float]:
    """MiB of every regime of a model."""
    return {r.name: r.constant_bytes / MIB for r in regimes(load_model(name), settings, role)}


@pytest.mark.parametrize(
    ("name", "settings", "regime", "mib"),
    [
        ("mistral-large-2411", BASE, "ml_ffn", 296.0),
        ("mixtral-8x7b", replace(BASE, ubatch=2048), "ml_moe", 928.0),
        ("deepseek-r1", BASE, "ml_attn", 440.0),
        ("deepseek-v3.2", replace(BASE, ctx=131072), "ml_attn", 1164.0),
    ],
)
def test_lines_that_are_exact(name: str, settings: Settings, regime: str, mib: float) -> None:
    """Where one line fills the buffer the estimate is release 0.5.0's own figure."""
    found = sizes(name, settings)
    assert found[regime] == pytest.approx(mib, abs=0.1)
    assert max(found, key=lambda n: found[n]) == regime


def test_roles_choose_the_lines() -> None:
    """A device without output, layers or experts has none of their lines."""
    none = DeviceRole(first=False, layers=False, experts=False, output=False)
    assert sizes("deepseek-r1", BASE, none) == {}
    assert set(sizes("deepseek-r1", BASE)) == {"ml_out", "ml_attn", "ml_ffn", "ml_moe"}
    assert set(sizes("deepseek-r1", replace(BASE, fa=False))) >= {"ml_attn_nofa"}
    assert not has_dense_layers(load_model("qwen3-235b-a22b").hparams)


def test_pipelined_masks_count_that_often() -> None:
    """Four copies of the graph inputs add three masks."""
    once, four = sizes("llama-3.1-8b", BASE), sizes("llama-3.1-8b", BASE, replace(ALL, copies=4))
    mask = 2 * BASE.ctx * BASE.ubatch / MIB
    assert four["ml_attn"] - once["ml_attn"] == pytest.approx(3 * mask)


def test_plan_uses_them() -> None:
    """The plan of a mainline launch is the bound over these lines, and that of ik is not."""
    model = load_model("mistral-large-2411")
    rig = Rig((Device("GPU0", "gpu", None),), Device("CPU", "host", None))
    placement = Placement((0,) * kv.n_blocks(model), 0)
    wanted = max(r.constant_bytes for r in safe(regimes(model, BASE, ALL)))
    assert device_memory(model, BASE, rig, placement)[0].compute_bytes() == wanted
    other = device_memory(model, Settings(), rig, placement)[0]
    assert not any(r.name.startswith("ml_") for r in other.compute)
    assert HOST not in placement.layer_device


def test_older_releases_cache_the_idle_mtp_block() -> None:
    """Up to release 0.4.0 GLM-4.5's MTP block had a cache that nobody used: one layer more."""
    model = load_model("glm-4.5-air")
    new, old = kv.kv_bytes(model, BASE), kv.kv_bytes(model, replace(BASE, build="2026-09-01"))
    assert new[-1] == 0
    assert old[-1] == old[-2] > 0
    assert old[:-1] == new[:-1]


@pytest.mark.engine
@pytest.mark.parametrize(
    "name",
    [
        "deepseek-v2-lite",
        "deepseek-v3.2",
        "glm-5.2",
        "llama-3.1-405b",
        "mixtral-8x22b",
        "gemma-4-31b-it",
        "gpt-oss-120b",
    ],
)
def test_bound_is_above_the_engine(name: str, mainline: Mainline) -> None:
    """Under nine launches each, the engine's buffer is at most 1.1 times the estimate."""

    def excess(found: Buffer) -> float:
        return found.ratio

    worst = max(measure(load_model(name), LAUNCHES, engine=mainline), key=excess)
    assert worst.ratio <= 1.1, worst
