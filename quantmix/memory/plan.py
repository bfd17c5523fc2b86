"""What every device must hold besides the weights of the file, for a given placement."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Final

from quantmix.errors import UsageError
from quantmix.ggml import types
from quantmix.memory import compute, kv, mainline_graph
from quantmix.memory.head import held_twice
from quantmix.memory.margins import safe
from quantmix.memory.model import HOST, DeviceMemory, Placement, Regime
from quantmix.memory.settings import Settings
from quantmix.models.arch.base import is_moe_layer
from quantmix.models.model import Model
from quantmix.rig.device import Device, Rig
from quantmix.units import GIB, MIB

DESKTOP_BYTES: Final = 800 * MIB
_MIN_GPU_RESERVE_BYTES: Final = 512 * MIB
_MIN_RAM_RESERVE_BYTES: Final = 4 * GIB
_PIPELINE_COPIES: Final = 4  # GGML_SCHED_MAX_COPIES of mainline


def device_memory(
    model: Model,
    settings: Settings,
    rig: Rig,
    placement: Placement,
    *,
    derived_type: str = "q8_0",
    visible: Sequence[int] | None = None,
) -> tuple[DeviceMemory, ...]:
    """Return what each device holds besides file tensors: GPUs in order, then the host.

    All figures are upper bounds. `derived_type` is the type of MLA tensors built at load: q8_0
    unless attn_k_b and attn_v_b are both 16-bit floats (split layout), or the type of attn_kv_b
    (legacy layout). `visible` are the GPUs that the engine sees, in its order, by default those
    in use; the first of them copies experts from RAM. A hidden GPU holds nothing.

    Raises:
        UsageError: the placement names a device that the rig does not have, or has too few layers.
    """
    _check(model, rig, placement)
    cache = kv.kv_bytes(model, settings)
    derived = derived_bytes(model, settings, derived_type)
    home = placement.homes(len(cache))
    seen = placement.gpus if visible is None else tuple(visible)
    gpus = tuple(
        DeviceMemory(gpu.name, 0, 0, 0, ())
        if i not in seen
        else DeviceMemory(
            name=gpu.name,
            kv_bytes=0
            if settings.nkvo
            else sum(b for b, d in zip(cache, home, strict=True) if d == i),
            derived_bytes=sum(b for b, d in zip(derived, home, strict=True) if d == i),
            reserve_bytes=gpu_reserve_bytes(
                gpu, settings, first=i == seen[0], desktop=rig.desktop and i == 0
            ),
            compute=_bounds(model, settings, _gpu_role(model, settings, placement, seen, i)),
            duplicate_embedding=held_twice(model, settings, placement, i),
        )
        for i, gpu in enumerate(rig.gpus)
    )
    host = DeviceMemory(
        name=rig.host.name,
        kv_bytes=sum(b for b, d in zip(cache, home, strict=True) if d == HOST or settings.nkvo),
        derived_bytes=sum(b for b, d in zip(derived, home, strict=True) if d == HOST),
        reserve_bytes=host_reserve_bytes(rig, settings),
        compute=_host_compute(model, settings, placement, seen),
        duplicate_embedding=held_twice(model, settings, placement, HOST),
    )
    return (*gpus, host)


def derived_bytes(model: Model, settings: Settings, derived_type: str = "q8_0") -> tuple[int, ...]:
    """Bytes of MLA tensors that ik builds at load, per block of the file.

    Split layout: attn_kv_b for `-mla 2/3` (R1: 512 × 32768 q8_0 = 17 MiB). Legacy layout: attn_k_b
    (always q8_0) and attn_v_b for any MLA mode. ik layout and mainline: nothing.
    Source: ik_llama.cpp src/llama.cpp llm_prepare_mla; logs L033, L050, L249.
    """
    h, n = model.hparams, kv.n_blocks(model)
    if not h.is_mla or settings.engine != "ik" or settings.mla == 0:
        return (0,) * n
    nope, rank = h.head_dim_k - h.rope_dim, h.kv_lora_rank
    made = types.get(derived_type, "ik")
    if model.layout == "split" and settings.mla in (2, 3):
        per_layer = made.tensor_bytes((rank, h.n_head * (nope + h.head_dim_v)))
    elif model.layout == "legacy":
        k_b = types.get("q8_0", "ik").tensor_bytes((nope, rank * h.n_head))
        per_layer = k_b + made.tensor_bytes((rank, h.n_head * h.head_dim_v))
    else:
        per_layer = 0
    mtp = per_layer if settings.mtp else 0
    return (*([per_layer] * h.n_layer), *([mtp] * (n - h.n_layer)))


def gpu_reserve_bytes(gpu: Device, settings: Settings, *, first: bool, desktop: bool) -> int:
    """Bytes set aside on a GPU for what no model counts: CUDA context and run-time pools.

    300 MiB + 0.32·ubatch MiB on the first GPU, 0.10·ubatch on the others, at least 512 MiB; the
    one that drives a desktop, 800 MiB more. It covers the nine published differences between
    nvidia-smi and the logged buffers (docs/memory-model.md). `gpu.reserve_bytes` overrides all.
    """
    if gpu.reserve_bytes is not None:
        return gpu.reserve_bytes
    slope = 0.32 if first else 0.10
    auto = max(_MIN_GPU_RESERVE_BYTES, ceil((300 + slope * settings.ubatch) * MIB))
    return auto + (DESKTOP_BYTES if desktop else 0)


def host_reserve_bytes(rig: Rig, settings: Settings) -> int:
    """Bytes of RAM for the system (default max(4 GiB, 5 %)) and the server's prompt cache.

    A host whose RAM was not stated has no reserve of its own: only the prompt cache is counted.
    """
    cram = settings.cram_mib * MIB
    if rig.ram_reserve_bytes is not None:
        return rig.ram_reserve_bytes + cram
    capacity = rig.host.capacity_bytes
    return cram + (0 if capacity is None else max(_MIN_RAM_RESERVE_BYTES, ceil(capacity * 0.05)))


def _check(model: Model, rig: Rig, placement: Placement) -> None:
    homes = {*placement.layer_device, placement.output_device}
    wrong = sorted(d for d in homes if d != HOST and not 0 <= d < len(rig.gpus))
    if wrong:
        raise UsageError(f"placement names GPU{wrong[0]}, but the rig has {len(rig.gpus)} GPUs")
    if len(placement.layer_device) < model.hparams.n_layer:
        raise UsageError(
            f"placement has {len(placement.layer_device)} blocks, "
            f"{model.id} has {model.hparams.n_layer} layers"
        )


def _experts_in_ram(model: Model, placement: Placement) -> bool:
    """Whether routed experts of some layer lie in RAM, with their layer or without."""
    h = model.hparams
    return bool(placement.cpu_experts) or any(
        d == HOST and is_moe_layer(h, i) for i, d in enumerate(placement.layer_device)
    )


def _copies(settings: Settings, placement: Placement, seen: Sequence[int]) -> int:
    """Graph-input copies: mainline pipelines several GPUs unless tensors were overridden."""
    in_ram = bool(placement.cpu_experts) or HOST in placement.layer_device
    pipelined = settings.engine == "mainline" and len(seen) > 1 and not in_ram
    return _PIPELINE_COPIES if pipelined else 1


def _gpu_role(
    model: Model, settings: Settings, placement: Placement, seen: Sequence[int], gpu: int
) -> compute.DeviceRole:
    h = model.hparams
    mine = [i for i, d in enumerate(placement.layer_device) if d == gpu]
    return compute.DeviceRole(
        first=gpu == seen[0],
        layers=bool(mine),
        experts=any(is_moe_layer(h, i) and i not in placement.cpu_experts for i in mine),
        output=gpu == placement.output_device,
        cpu_experts=_experts_in_ram(model, placement),
        copies=_copies(settings, placement, seen),
    )


def _host_compute(
    model: Model, settings: Settings, placement: Placement, seen: Sequence[int]
) -> tuple[Regime, ...]:
    """Host regimes with their margin, each with the logits buffer on top."""
    experts = _experts_in_ram(model, placement)
    role = compute.DeviceRole(
        first=not seen,
        layers=HOST in placement.layer_device or settings.nkvo,
        experts=experts,
        output=placement.output_device == HOST,
        cpu_experts=experts,
        host=True,
        copies=_copies(settings, placement, seen),
    )
    logits = compute.output_bytes(model, settings)
    bounds: Sequence[Regime] = _bounds(model, settings, role)
    return tuple(Regime(r.name, r.constant_bytes + logits, r.coefficient) for r in bounds)


def _bounds(model: Model, settings: Settings, role: compute.DeviceRole) -> tuple[Regime, ...]:
    """Regimes of a device with their margins; mainline's graph has estimates of its own."""
    if settings.engine == "mainline":
        return safe(mainline_graph.regimes(model, settings, role))
    return safe(compute.regimes(model, settings, role, upper=True))
