"""From decided tensors to the recipe document: sums, rules, commands. Designs and clones alike."""

from __future__ import annotations

import datetime as dt
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import quantmix
from quantmix.emit.ftype import ftype_of
from quantmix.emit.rules import build_rules
from quantmix.ggml.header import DEFAULT_ALIGNMENT
from quantmix.loss.quality import Quality
from quantmix.recipe import (
    DeviceUse,
    EngineInfo,
    ModelInfo,
    Optimality,
    PlannedTensor,
    Recipe,
    Size,
)
from quantmix.speed.prediction import Speed
from quantmix.units import MIB, pad

if TYPE_CHECKING:
    from quantmix.emit.flags import OffloadFlags
    from quantmix.memory.model import DeviceMemory
    from quantmix.memory.settings import Settings
    from quantmix.models.model import Model
    from quantmix.rig.device import Device

UNKNOWN_HEADER_BYTES = 32 * MIB
"""What the header of a file may take when the source's was not read: part of what `--size` caps."""


def assemble(
    model: Model,
    settings: Settings,
    tensors: tuple[PlannedTensor, ...],
    *,
    name: str,
    budget: Mapping[str, Any],
    devices: tuple[DeviceUse, ...],
    quality: Quality,
    optimality: Optimality,
    speed: Speed,
    flags: OffloadFlags | None = None,
    imatrix: bool = True,
) -> Recipe:
    """Return the recipe whose file holds `tensors`, one per tensor of the model, in its order.

    `imatrix` says whether it is to be quantized with an importance matrix.

    Rules name every tensor that the engine may quantize, also those that keep the type of the
    source (gpt-oss' mxfp4 experts), which the preset would change otherwise.
    """
    types = types_table(tensors, model)
    ruled = {p.name: p.type for p, t in zip(tensors, model.tensors, strict=True) if t.quantizable}
    rules = [r.text for r in build_rules(model.tensors, ruled)]
    ftype = ftype_of({n: row["bytes"] for n, row in types.items()}, settings.engine, model.arch)
    return Recipe(
        name=name,
        quantmix=quantmix.__version__,
        created=dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        budget=dict(budget),
        model=ModelInfo(
            model.id, model.arch, model.layout, len(model.tensors), model.n_elements, model.source
        ),
        engine=EngineInfo(settings.engine, settings.build, ftype),
        settings=settings,
        size=size_of(model, tensors),
        devices=devices,
        quality=quality,
        optimality=optimality,
        speed=speed,
        types=types,
        rules=tuple(rules),
        commands=commands_of(settings, ftype, rules, flags, imatrix=imatrix),
        offload={
            "flags": flags.flags if flags else [],
            "env": flags.env if flags else {},
            "notes": list(flags.notes) if flags else [],
        },
        tensors=tensors,
    )


def device_use(
    device: Device, memory: DeviceMemory, weights: int, cpu_expert_bytes: int
) -> DeviceUse:
    """Return what a device holds; free is below zero where that is too much.

    `cpu_expert_bytes` are those of the largest routed-expert tensor in RAM.
    """
    use = DeviceUse(
        name=device.name,
        kind=device.kind,
        capacity_bytes=device.capacity_bytes,
        weights_bytes=weights,
        derived_bytes=memory.derived_bytes,
        kv_bytes=memory.kv_bytes,
        compute_bytes=memory.compute_bytes(cpu_expert_bytes),
        reserve_bytes=memory.reserve_bytes,
        free_bytes=None,
    )
    if device.capacity_bytes is None:
        return use
    return replace(use, free_bytes=device.capacity_bytes - use.used_bytes)


def types_table(tensors: Sequence[PlannedTensor], model: Model) -> dict[str, dict[str, int]]:
    """Count tensors, weights and bytes per type, largest first."""
    rows: dict[str, dict[str, int]] = defaultdict(
        lambda: {"n_tensors": 0, "n_elements": 0, "bytes": 0}
    )
    for planned, t in zip(tensors, model.tensors, strict=True):
        row = rows[planned.type]
        row["n_tensors"] += 1
        row["n_elements"] += t.n_elements
        row["bytes"] += planned.bytes
    return dict(sorted(rows.items(), key=lambda kv: (-kv[1]["bytes"], kv[0])))


def header_allowance(model: Model) -> int:
    """Return the bytes to allow for header and metadata of the written file."""
    return UNKNOWN_HEADER_BYTES if model.header_bytes is None else model.header_bytes + 4096


def size_of(model: Model, tensors: Sequence[PlannedTensor]) -> Size:
    """Return the sums over all tensors of the file."""
    total = sum(t.bytes for t in tensors)
    padded = sum(pad(t.bytes, DEFAULT_ALIGNMENT) for t in tensors)
    unloaded = sum(p.bytes for p, t in zip(tensors, model.tensors, strict=True) if not t.loaded)
    return Size(
        tensor_bytes=total,
        file_bytes=padded + header_allowance(model),
        file_bytes_exact=False,
        unloaded_bytes=unloaded,
        bpw=8 * total / model.n_elements,
    )


def commands_of(
    settings: Settings,
    ftype: str,
    rules: Sequence[str],
    flags: OffloadFlags | None,
    *,
    imatrix: bool = True,
) -> dict[str, list[str]]:
    """Return the three commands; SOURCE, IMATRIX, OUT, MODEL and CORPUS stand for files."""
    run_flags = list(flags.flags) if flags else []
    quantize = ["llama-quantize", *(["--imatrix", "IMATRIX"] if imatrix else [])]
    if settings.engine == "ik":
        quantize += ["--custom-q", ",".join(rules)]
        ppl = ["-c", "512", "--no-escape"]
    else:
        quantize += ["--tensor-type-file", "rules.args"]
        ppl = ["-c", "512"]
    return {
        "quantize": [*quantize, "SOURCE", "OUT", ftype],
        "serve": ["llama-server", "-m", "MODEL", *run_flags],
        "perplexity": [
            "llama-perplexity",
            *("-m", "MODEL", "-f", "CORPUS"),
            *ppl,
            *_perplexity_flags(run_flags),
        ],
    }


def _perplexity_flags(flags: Sequence[str]) -> list[str]:
    """Drop what belongs to a server or to a long context: perplexity runs at -c 512."""
    dropped = {"-c", "-np", "-cram", "-ctk", "-ctv", "-b", "-ub"}
    kept: list[str] = []
    skip = False
    for flag in flags:
        if skip:
            skip = False
        elif flag in dropped:
            skip = True
        else:
            kept.append(flag)
    return kept
