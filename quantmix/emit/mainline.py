"""Offload flags for mainline llama.cpp, by build date."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from quantmix.emit.flags import (
    OffloadFlags,
    environment,
    expert_override,
    output_override,
    split_plan,
)
from quantmix.errors import UsageError
from quantmix.memory.model import HOST, Placement
from quantmix.memory.settings import Settings
from quantmix.models.model import Model
from quantmix.rig.device import Rig

FA_NEEDS_VALUE: Final = "2025-08-30"  # PR 15434
CRAM: Final = "2025-10-09"  # PR 16391
FIT: Final = "2025-12-15"  # PR 16653: on by default in every tool


def offload_flags(
    model: Model,
    settings: Settings,
    rig: Rig,
    placement: Placement,
    *,
    sizes: Mapping[str, int],
) -> OffloadFlags:
    """Return the flags for mainline llama.cpp; it splits layers by count, so `sizes` go unused.

    Raises:
        UsageError: the placement cannot be expressed in flags, or asks for MTP.
    """
    if settings.mtp:
        raise UsageError("mainline flags for running the MTP block are not known: use --engine ik")
    plan = split_plan(model, placement, with_output=True)
    in_ram_output = plan.output == HOST and bool(plan.gpus)
    ngl = plan.n_blocks + 1 - plan.first if plan.gpus else 0
    flags = ["-ngl", str(ngl if plan.first else 999)]
    if len(plan.gpus) > 1:
        flags += ["-sm", "layer", "-ts", ",".join(map(str, plan.counts))]
    if in_ram_output:
        flags += output_override(model, "CPU")
    flags += expert_override(model, placement, settings)
    flags += _context(model, settings)
    return OffloadFlags(flags, environment(rig, plan))


def _context(model: Model, settings: Settings) -> list[str]:
    """Everything that shapes the buffers, defaults included, in this build's spelling."""
    s = settings
    flags = ["-fit", "off"] if s.build >= FIT else []
    flags += ["-c", str(s.ctx), "-b", str(s.batch), "-ub", str(s.ubatch)]
    if s.build >= FA_NEEDS_VALUE:
        flags += ["-fa", "on" if s.fa else "off"]
    elif s.fa:
        flags += ["-fa"]
    # A latent cache holds no V, and llama_init_from_model refuses two different types for it.
    ctv = s.ctk if model.hparams.is_mla else s.ctv
    flags += ["-ctk", s.ctk, "-ctv", ctv, "-np", str(s.parallel)]
    if s.build >= CRAM:
        flags += ["-cram", str(s.cram_mib)]
    if s.nkvo:
        flags += ["-nkvo"]
    return flags
