"""Offload flags for ik_llama.cpp, by build date."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from quantmix.emit.flags import (
    OffloadFlags,
    SplitPlan,
    environment,
    expert_override,
    output_override,
    split_plan,
)
from quantmix.emit.layers import (
    byte_slack,
    split_sizes,
    weights_by_bytes,
)
from quantmix.errors import UsageError
from quantmix.memory.head import head_device
from quantmix.memory.model import HOST, Placement
from quantmix.memory.settings import Settings
from quantmix.memory.split import splits_bytes
from quantmix.models.model import Model
from quantmix.rig.cards import cards
from quantmix.rig.device import Rig

FMOE_GONE: Final = "2025-10-25"  # PR 863: on by default, the flag is an error in the server
FA_NEEDS_VALUE: Final = "2025-11-13"  # PR 944
CRAM: Final = "2025-11-14"  # PR 954
MTP_IS_SPEC_TYPE: Final = "2026-08-01"  # `-mtp` rejected at 2026-08-15, accepted in 2026-04

_TURING: Final = 7.5  # compute capability; the README of ik_llama.cpp says what is supported
_BYTES_NOTE: Final = (
    "-ts is weighed by bytes in this build: unverified on a GPU, replayed with the rule read in "
    "the source of one build (2026-04); every boundary stays put for errors up to {slack:.0%} "
    "of a layer"
)


def offload_flags(
    model: Model,
    settings: Settings,
    rig: Rig,
    placement: Placement,
    *,
    sizes: Mapping[str, int],
) -> OffloadFlags:
    """Return the flags for ik_llama.cpp; `sizes` are file bytes per tensor.

    Raises:
        UsageError: the placement cannot be expressed in flags (`memory.head.head_device`).
    """
    in_ram = placement.layer_device[:1] == (HOST,)
    plan = split_plan(model, placement, with_output=not in_ram)
    if plan.output != head_device(model, settings, plan.first, plan.n_blocks, plan.output):
        raise UsageError("with these layers in RAM, no flags of ik put the output on a GPU")
    flags = ["-ngl", str(999 if plan.first == 0 else plan.n_blocks - plan.first)]
    notes: tuple[str, ...] = ()
    if len(plan.gpus) > 1:
        weights, notes = _tensor_split(model, settings, plan, sizes)
        flags += ["-sm", "layer", "-ts", ",".join(map(str, weights))]
    if plan.first and plan.output != HOST and plan.gpus:
        flags += output_override(model, f"CUDA{plan.gpus.index(plan.output)}")
    elif not plan.first and plan.output == HOST and plan.gpus:
        flags += output_override(model, "CPU")
    flags += expert_override(model, placement, settings)
    flags += _context(model, settings)
    notes += _unsupported([rig.gpus[i].card for i in plan.gpus])
    return OffloadFlags(flags, environment(rig, plan), notes)


def _unsupported(keys: Sequence[str]) -> tuple[str, ...]:
    """Name the cards that ik_llama.cpp is not made for; a card known by its size only is none."""
    known = [cards()[k] for k in dict.fromkeys(keys) if k in cards()]
    odd = [c.key for c in known if (c.compute_capability or 0.0) < _TURING]
    if not odd:
        return ()
    text = "ik_llama.cpp supports GPUs through CUDA only, Turing or newer"
    return (f"{text}, and not {', '.join(odd)}: use --engine mainline there",)


def _tensor_split(
    model: Model, settings: Settings, plan: SplitPlan, sizes: Mapping[str, int]
) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """`-ts` values for this build's rule, and the note that goes with them."""
    if not splits_bytes(settings):
        return plan.counts, ()
    weighed = split_sizes(model, settings, sizes)
    weights = weights_by_bytes(plan.counts, plan.first, weighed)
    slack = byte_slack(weights, plan.counts, plan.first, weighed)
    return weights, (_BYTES_NOTE.format(slack=slack),)


def _context(model: Model, settings: Settings) -> list[str]:
    """Everything that shapes the buffers, defaults included, in this build's spelling."""
    s = settings
    flags = ["-c", str(s.ctx), "-b", str(s.batch), "-ub", str(s.ubatch)]
    if s.build >= FA_NEEDS_VALUE:
        flags += ["-fa", "on" if s.fa else "off"]
    elif s.fa:
        flags += ["-fa"]
    if model.hparams.is_moe and s.build < FMOE_GONE:
        flags += ["-fmoe"]
    flags += ["-ctk", s.ctk, "-ctv", s.ctv]
    if model.hparams.is_mla:
        flags += ["-mla", str(s.mla), "-amb", str(s.amb)]
    flags += ["-np", str(s.parallel)]
    if s.build >= CRAM:
        flags += ["-cram", str(s.cram_mib)]
    if s.nkvo:
        flags += ["-nkvo"]
    if s.mtp:
        flags += ["--spec-type", "mtp:n_max=1"] if s.build >= MTP_IS_SPEC_TYPE else ["-mtp"]
    return flags
