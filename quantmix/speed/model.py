"""Speed of a plan: additive seconds for the search, tokens per second with a band for the summary.

The formula is `roofline`'s with every tensor on its own: bytes read per token over what the device
reaches, and on a CPU no faster than its type decodes. What does not depend on types (launches,
barriers, KV cache) is `fixed_seconds`. Constants: `constants.csv`, fitted on published logs by
`python -m quantmix.speed.fit`; the band is the 90 % quantile of the error of machines
left out of the fit (narrower once `scale` carries one measured row of the machine at hand).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import exp, inf
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quantmix.errors import UsageError
from quantmix.ggml.types import FLOATS, GgmlType
from quantmix.ggml.types import get as get_type
from quantmix.memory import kv
from quantmix.memory.compute import copied_from
from quantmix.memory.head import EMBEDDING, is_tied, multiplied_at
from quantmix.memory.homes import planned
from quantmix.memory.model import HOST, Placement
from quantmix.memory.settings import Settings
from quantmix.models.model import Model, Tensor
from quantmix.rig.cards import cards
from quantmix.rig.device import Device, Rig
from quantmix.speed.constants import class_of, constants
from quantmix.speed.prediction import Speed
from quantmix.speed.roofline import (
    Kind,
    Load,
    Reader,
    efficiency,
    prompt_seconds,
    slow_family,
)

FloatArray = NDArray[np.float64]

# For devices whose bandwidth is not known: they rank options, no speed is printed from them.
ASSUMED_GPU_GBS: Final = 900.0
ASSUMED_RAM_GBS: Final = 100.0
ASSUMED_CORES: Final = 16
_USUAL_PART: Final = 4
_PCIE_GBS: Final = 12.0  # a type without a CUDA kernel is fetched over the bus for every token


def cell_seconds(model: Model, types: Sequence[GgmlType], rig: Rig) -> FloatArray:
    """Return seconds per token, shape (devices, tensors, types): GPUs in order, then the host.

    Additive: a plan's seconds are the sum over its tensors plus `fixed_seconds`. Devices of
    unknown bandwidth count with a typical one.
    """
    return np.stack([device_seconds(model, types, device, rig) for device in rig.devices])


def device_seconds(model: Model, types: Sequence[GgmlType], device: Device, rig: Rig) -> FloatArray:
    """Return seconds per token of each tensor at each type on one device, (tensors, types)."""
    params = [_read_params(model, t) for t in model.tensors]
    return np.outer(params, [_weight_seconds(device, t, rig) for t in types])


def fixed_seconds(
    model: Model, settings: Settings, rig: Rig, placement: Placement, *, n_kv: int = 0
) -> float:
    """Seconds per token that types do not change: launches, barriers, and the KV cache at `n_kv`.

    Types of tensors matter only to weights, so this is a constant for one placement.
    """
    known = constants()
    homes = placement.layer_device[: model.hparams.n_layer]
    with_experts = {t.layer for t in model.tensors if t.role.endswith("_exps") and t.loaded}
    on_gpu = [i for i, d in enumerate(homes) if d != HOST]
    waiting = [i for i in on_gpu if i in placement.cpu_experts and i in with_experts]
    quantized = settings.ctk not in FLOATS and not settings.nkvo
    per_layer = known["og_ms", model_kind(model)] + known["kvq_ms", "layer"] * quantized
    seconds = 1e-3 * (
        len(on_gpu) * per_layer
        + (len(homes) - len(on_gpu)) * known["oc_ms", "layer"]
        + len(waiting) * known["oh_ms", "layer"]
    )
    return seconds + (_cache_seconds(model, settings, rig, homes, n_kv) if n_kv else 0.0)


def usual_fill(settings: Settings) -> int:
    """Return the tokens in the cache at which placements are compared: a quarter of a slot's.

    With none, layers whose attention and cache lie in RAM look as good as others.
    """
    return settings.ctx // max(1, settings.parallel) // _USUAL_PART


def predict(
    model: Model,
    settings: Settings,
    rig: Rig,
    placement: Placement,
    mix: Sequence[GgmlType | None],
    *,
    n_kv: int = 0,
    scale: float | None = None,
    where: Mapping[str, str] | None = None,
) -> Speed:
    """Return tokens per second of a plan with its 90 % band.

    Args:
        mix: one type per tensor of the model, None where it stays as in the source.
        n_kv: tokens already in the cache.
        where: device name per tensor when it is not what the placement says (pasted flags).
        scale: measured / predicted on this machine (`calibration`); narrows the band.

    A device of unknown bandwidth that holds weights gives an empty Speed.
    """
    where = where or planned(model, placement, rig, mtp=settings.mtp)
    if not where or of_unknown_bandwidth(model, rig, placement, where):
        return Speed()
    empty = plan_seconds(model, settings, rig, placement, mix, where=where)
    homes = placement.layer_device[: model.hparams.n_layer]

    def at(tokens: int) -> float:
        return (scale or 1.0) / (empty + _cache_seconds(model, settings, rig, homes, tokens))

    tps, fill = at(n_kv), usual_fill(settings)
    band = exp(constants()["band_ln", "calibrated" if scale else "plain"])
    return Speed(
        tg_tps=tps,
        tg_low=tps / band,
        tg_high=tps * band,
        pp_tps=_prompt_tps(model, settings, rig, _readers(model, rig, placement, where), mix),
        tg_filled_tps=at(fill),
        filled_tokens=fill,
    )


def of_unknown_bandwidth(
    model: Model, rig: Rig, placement: Placement, where: Mapping[str, str]
) -> list[Device]:
    """Return the devices that are read for every token and whose bandwidth is not known.

    `where` is the device name per tensor.
    """
    readers = _readers(model, rig, placement, where)
    used = {readers[t.name] for t in model.tensors if t.name in where and _read_params(model, t)}
    return [d for d in rig.devices if d.name in used and d.bandwidth_gbs is None]


def plan_seconds(
    model: Model,
    settings: Settings,
    rig: Rig,
    placement: Placement,
    mix: Sequence[GgmlType | None],
    *,
    n_kv: int = 0,
    where: Mapping[str, str] | None = None,
) -> float:
    """Seconds per token of a plan, unknown bandwidths assumed; see `predict` for the arguments."""
    where = where or planned(model, placement, rig, mtp=settings.mtp)
    readers = _readers(model, rig, placement, where)
    devices = {d.name: d for d in rig.devices}
    each: dict[tuple[str, str], float] = {}  # seconds per weight, by device and type
    seconds = fixed_seconds(model, settings, rig, placement, n_kv=n_kv)
    for t, chosen in zip(model.tensors, mix, strict=True):
        params = _read_params(model, t)
        if t.name not in readers or not params:
            continue
        qtype = chosen or get_type(t.source_type, settings.engine)
        key = readers[t.name], qtype.name
        if key not in each:
            each[key] = _weight_seconds(devices[key[0]], qtype, rig)
        seconds += params * each[key]
    return seconds


def calibration(measured_tps: float, predicted: Speed) -> float:
    """Return the `scale` that makes a prediction equal one measured row of the same plan.

    Raises:
        UsageError: nothing was predicted, or nothing sensible measured.
    """
    if not 0 < measured_tps < inf:
        raise UsageError(
            f"a measured speed of {measured_tps:g} cannot calibrate: give tokens/s, above zero"
        )
    if not predicted.tg_tps:
        raise UsageError("cannot calibrate: no speed is predicted for a rig of unknown bandwidths")
    return measured_tps / predicted.tg_tps


def model_kind(model: Model) -> Kind:
    """Kind of model in the terms of the fit."""
    h = model.hparams
    return "dense" if not h.is_moe else "mla" if h.is_mla else "moe"


def _readers(
    model: Model, rig: Rig, placement: Placement, where: Mapping[str, str]
) -> dict[str, str]:
    """Name of the device that reads a tensor for every token: where it lies, but for a tied head.

    `where` says where tensors lie; what is not loaded is in neither.
    """
    home = placement.output_device
    head = rig.gpus[home].name if home != HOST else rig.host.name
    return {
        t.name: multiplied_at(model, t, where[t.name], head)
        for t in model.tensors
        if t.name in where
    }


def _read_params(model: Model, t: Tensor) -> float:
    """Weights read per token: the active share; kv_b is resident but idle; a tied head is read."""
    if not t.loaded or (t.role == "attn_kv_b" and model.layout in ("ik", "split")):
        return 0.0
    if t.name == EMBEDDING:
        return float(t.n_elements) if is_tied(model) else 0.0
    return t.n_elements * t.active_fraction


def _gpu_rate(device: Device, qtype: GgmlType) -> float:
    """Bytes per second of weights of one type on a GPU."""
    if not qtype.cuda:
        return _PCIE_GBS * 1e9
    family = slow_family(qtype)
    slow = constants()["slow", family] if family else 1.0
    reader = _reader(device, ASSUMED_GPU_GBS)
    return reader.bandwidth_gbs * 1e9 * efficiency(constants(), reader, "eta_gpu") / slow


def _host_rate(device: Device) -> float:
    reader = _reader(device, ASSUMED_RAM_GBS)
    return reader.bandwidth_gbs * 1e9 * efficiency(constants(), reader, "eta_cpu")


def _weight_seconds(device: Device, qtype: GgmlType, rig: Rig) -> float:
    """Seconds that reading a weight of a type takes on a device; on a CPU, decoding if longer."""
    n_bytes = qtype.bpw / 8
    if device.kind == "gpu":
        return n_bytes / _gpu_rate(device, qtype)
    return max(n_bytes / _host_rate(device), _decode_seconds(qtype, rig))


def _decode_seconds(qtype: GgmlType, rig: Rig) -> float:
    """Seconds per weight that decoding takes on this CPU; 0 where bandwidth always limits."""
    if not qtype.cpu_gparams:
        return 0.0
    kappa = constants()["kappa", _isa(rig)]
    return 1 / (qtype.cpu_gparams * 1e9 * kappa * (rig.cpu_cores or ASSUMED_CORES))


def _reader(device: Device, assumed_gbs: float) -> Reader:
    what = "gpu" if device.kind == "gpu" else "cpu"
    card = cards().get(device.card)
    text = (card.arch if card else "") if what == "gpu" else device.card
    return Reader(
        weights_bytes=0.0,
        kv_bytes=0.0,
        bandwidth_gbs=device.bandwidth_gbs or assumed_gbs,
        device_class=class_of(what, text) if text else "",
        efficiency=device.efficiency,
        int8_tops=device.int8_tops,
    )


def _isa(rig: Rig) -> str:
    text = rig.cpu_class or rig.host.card
    return class_of("isa", text) if text else "zen4"


def _cache_seconds(
    model: Model, settings: Settings, rig: Rig, homes: Sequence[int], n_kv: int
) -> float:
    """Seconds to read the KV cache of `n_kv` tokens once."""
    known = constants()
    latent = "mla" if model.hparams.is_mla else "gqa"
    share = min(1.0, n_kv / kv.n_cells(settings))
    seconds = 0.0
    for n_bytes, home in zip(kv.kv_bytes(model, settings), homes, strict=False):
        if home == HOST or settings.nkvo:
            rate = _reader(rig.host, ASSUMED_RAM_GBS).bandwidth_gbs * known["eta_kv_cpu", latent]
        else:
            gpu = _reader(rig.gpus[home], ASSUMED_GPU_GBS)
            rate = gpu.bandwidth_gbs * known["eta_kv_gpu", latent]
        seconds += n_bytes * share / (rate * 1e9)
    return seconds


def _prompt_tps(
    model: Model,
    settings: Settings,
    rig: Rig,
    readers: Mapping[str, str],
    mix: Sequence[GgmlType | None],
) -> float | None:
    """Rough prompt speed at the design's ubatch (within a factor of two in 9 of 10 logs)."""
    h = model.hparams
    on_gpu = dict.fromkeys((g.name for g in rig.gpus), 0.0)
    on_cpu = experts = 0.0
    uploads = True
    for t, chosen in zip(model.tensors, mix, strict=True):
        params = _read_params(model, t)
        if not params or t.name not in readers:
            continue
        if readers[t.name] in on_gpu:
            on_gpu[readers[t.name]] += params
            continue
        on_cpu += params
        if t.role.endswith("_exps"):
            qtype = chosen or get_type(t.source_type, settings.engine)
            uploads = uploads and qtype.cuda
            experts += t.n_elements * qtype.bpw / 8
    gpus = tuple(
        Reader(
            on_gpu[g.name],
            0.0,
            g.bandwidth_gbs or ASSUMED_GPU_GBS,
            _reader(g, ASSUMED_GPU_GBS).device_class,
            int8_tops=g.int8_tops,
        )
        for g in rig.gpus
        if on_gpu[g.name]
    )
    load = Load(
        kind=model_kind(model),
        gpus=gpus,
        cpu=None,
        gpu_layers=0,
        cpu_layers=0,
        cpu_expert_layers=0,
        decode_core_seconds=0.0,
        cores=rig.cpu_cores or ASSUMED_CORES,
        isa=_isa(rig),
        active_params=on_cpu + sum(on_gpu.values()),
        cpu_params=on_cpu,
        ram_expert_bytes=experts,
        experts=h.n_expert,
        experts_used=h.n_expert_used,
        pcie_gbs=rig.pcie_gbs,
    )
    start = copied_from(settings.engine, settings.build, h.n_expert, h.n_expert_used)
    seconds = prompt_seconds(
        load, settings.ubatch, constants(), uploads_from=start if uploads else None
    )
    return settings.ubatch / seconds if seconds else None
