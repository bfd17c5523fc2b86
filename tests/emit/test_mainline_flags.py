"""Flags for mainline that its own launch would otherwise refuse."""

from __future__ import annotations

from quantmix.emit.mainline import offload_flags
from quantmix.memory import kv
from quantmix.memory.model import Placement
from quantmix.memory.settings import NEWEST_BUILD, Settings
from quantmix.models.sources import load_model
from quantmix.rig.device import Device, Rig


def cache_flags(name: str) -> list[str]:
    """The cache types that a launch with q8_0 keys and f16 values names."""
    model = load_model(name)
    settings = Settings(engine="mainline", build=NEWEST_BUILD["mainline"], ctk="q8_0")
    rig = Rig((Device("GPU0", "gpu", None),), Device("CPU", "host", None))
    placement = Placement((0,) * kv.n_blocks(model), 0)
    flags = list(offload_flags(model, settings, rig, placement, sizes={}).flags)
    return [flags[flags.index("-ctk") + 1], flags[flags.index("-ctv") + 1]]


def test_latent_cache_has_one_type() -> None:
    """mainline refuses two cache types for MLA, where only K is cached: both flags name K's."""
    assert cache_flags("deepseek-r1") == ["q8_0", "q8_0"]


def test_other_caches_keep_both_types() -> None:
    """Where V is cached its own type is emitted."""
    assert cache_flags("qwen3-32b") == ["q8_0", "f16"]
