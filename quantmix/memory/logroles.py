"""What each GPU of a logged run did: which layers and experts it held, whether it copied experts.

Layers come from the logged KV cache per device; experts from the `-ot` rules, else from how much
the host or the card holds; the type of the experts in RAM from the loader's list of types.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from quantmix.errors import UsageError
from quantmix.ggml import types as ggml
from quantmix.memory.compute import DeviceRole
from quantmix.memory.kv import kv_bytes
from quantmix.memory.logs import LogCase, LoggedDevice
from quantmix.models.arch.base import is_moe_layer
from quantmix.models.model import HParams
from quantmix.units import GIB, MIB

_EXPERTS: Final = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_BPW_IN_NAME: Final = re.compile(r"([\d.]+)\s*-?bpw", re.IGNORECASE)
_INTERLEAVED_KERNELS: Final = "2025-06-05"  # CUDA kernels of the IQ*_K_R4 types
_MAX_LARGEST_OVER_MEAN: Final = 1.25  # down against the mean of gate, up and down


@dataclass(frozen=True, slots=True)
class ExpertBytes:
    """Bytes of the expert tensors in RAM: one of gate and up, and the largest of all three."""

    gate_up: int
    largest: int
    has_cuda_kernel: bool


def gpu_roles(case: LogCase) -> dict[str, DeviceRole]:
    """Return the role of every GPU of the case by device name (model known)."""
    assert case.model is not None
    h, gpus = case.model.hparams, case.gpus
    homes = layer_homes(case)
    in_ram = experts_in_ram(case)
    with_layers = [g.name for g in gpus if _has_layers(g, case)]
    everything = case.offloaded is None or case.offloaded[0] >= case.offloaded[1]
    none = case.offloaded is not None and case.offloaded[0] == 0
    one_row = "-wgt 1" in case.flags
    # `-sm row` keeps graph and cache on the main GPU (docs/memory-model.md).
    last = (with_layers[0] if case.split_mode == "row" else with_layers[-1]) if with_layers else ""
    return {
        g.name: DeviceRole(
            first=g.name == gpus[0].name,
            layers=g.name in with_layers and not none,
            experts=h.is_moe and _holds_experts(case, g, homes),
            output=everything and g.name == last and not one_row,
            cpu_experts=in_ram,
            copies=case.copies,
            fused=case.fused,
        )
        for g in gpus
    }


def layer_homes(case: LogCase) -> dict[int, str]:
    """Return the GPU of each trunk layer as the logged cache shows it; empty when it does not."""
    assert case.model is not None
    per_layer = kv_bytes(case.model, case.settings)
    homes: dict[int, str] = {}
    layer, n = 0, case.model.hparams.n_layer
    held = [(g.name, (g.kv or 0.0) * MIB) for g in case.gpus]
    missing = sum(per_layer) - sum(b for _, b in held)
    while layer < n and missing > 0.5 * per_layer[layer]:  # the first layers stayed in RAM
        missing -= per_layer[layer]
        layer += 1
    for name, n_bytes in held:
        while layer < n and n_bytes > 0.5 * per_layer[layer]:
            n_bytes -= per_layer[layer]
            homes[layer] = name
            layer += 1
    return homes


def experts_in_ram(case: LogCase) -> bool:
    """Whether routed experts lay in RAM: by the rules, else by what host and graph show."""
    assert case.model is not None
    h = case.model.hparams
    if not h.is_moe:
        return False
    if re.search(r"--cpu-moe|-ncmoe|-cmoe", case.flags):
        return True
    if case.ot_rules:
        return any(_target(case, i, e) == "CPU" for i in range(h.n_layer) for e in _EXPERTS)
    if "CPU: blk" in case.notes or "CUDA_Host: blk" in case.notes:
        return True
    if "overrides in log" in case.notes and "CPU" not in case.notes.split("overrides in log")[1]:
        return False
    host = sum(d.weights or 0.0 for d in case.devices if not d.is_gpu)
    on_gpu = sum(d.weights or 0.0 for d in case.gpus)
    if host or on_gpu:
        return host > 3 * 4 * h.n_vocab * h.n_embd / MIB and host > 0.1 * on_gpu
    return case.graph_splits is not None and case.graph_splits > 4 * len(case.gpus) + 8


def expert_bytes(case: LogCase) -> ExpertBytes | None:
    """Return the sizes of the expert tensors in RAM, None when the post does not tell their type.

    From the loader's types where two of them number as many as gate plus up and as down; else from
    the size of the file, the bits per weight in its name, or the label.
    """
    assert case.model is not None
    h = case.model.hparams
    n_moe = sum(is_moe_layer(h, i) for i in range(h.n_layer))
    elements = h.n_expert * h.n_ff_exp * h.n_embd
    pair = [t for t, n in case.types.items() if n == 2 * n_moe]
    down = [t for t, n in case.types.items() if n == n_moe]
    if len(pair) == 1 and len(down) == 1:
        gate_up, largest = _bytes(pair[0], elements), _bytes(down[0], elements)
        if gate_up and largest:
            cuda = _cuda(pair[0], case) and _cuda(down[0], case)
            return ExpertBytes(gate_up, max(gate_up, largest), cuda)
    bpw, exact = _mean_bpw(case, h, n_moe)
    if bpw is None:
        return None
    mean = int(elements * bpw / 8)
    main = max(case.types, key=lambda t: case.types[t] if t != "f32" else 0, default="")
    cuda = _cuda(main, case) if main else _cuda(_label_type(case), case)
    return ExpertBytes(mean, int(mean * (1.0 if exact else _MAX_LARGEST_OVER_MEAN)), cuda)


def _mean_bpw(case: LogCase, h: HParams, n_moe: int) -> tuple[float | None, bool]:
    """Mean bits per weight of the routed experts, and whether they are all of one type."""
    if len([t for t in case.types if t != "f32"]) == 1:
        only = next(t for t in case.types if t != "f32")
        if only in ggml.table("ik"):
            return ggml.get(only, "ik").bpw, True
    experts = 3 * n_moe * h.n_expert * h.n_ff_exp * h.n_embd
    if case.file_gib and experts:
        others = _other_elements(h)
        bits = 8 * case.file_gib * GIB - 8.5 * others
        if bits > 0:
            return bits / experts, False
    label = re.search(r"([\d.]+) bpw", case.quant_label) or _BPW_IN_NAME.search(case.model_text)
    if label:
        return float(label.group(1).strip(".")), False
    name = _label_type(case)
    return (ggml.get(name, "ik").bpw, False) if name else (None, False)


def _label_type(case: LogCase) -> str:
    """The ggml type that the file's name or label shows, empty when none does."""
    text = f"{case.model_text} {case.quant_label}".lower()
    if "special_tensor" in text or "thireus" in text:
        return ""
    for name in sorted(ggml.table("ik"), key=len, reverse=True):
        if ggml.get(name, "ik").is_quantized and re.search(rf"(^|[-_. ]){name.lower()}", text):
            return name
    return ""


def _other_elements(h: HParams) -> int:
    """Rough number of weights outside the routed experts (attention, shared, dense, embeddings)."""
    if h.is_mla:
        nope = h.head_dim_k - h.rope_dim
        q = (
            h.q_lora_rank * (h.n_embd + h.n_head * h.head_dim_k)
            or h.n_embd * h.n_head * h.head_dim_k
        )
        kv = h.n_embd * (h.kv_lora_rank + h.rope_dim)
        kv += h.kv_lora_rank * h.n_head * (nope + h.head_dim_v)
        attention = q + kv + h.n_head * h.head_dim_v * h.n_embd
    else:
        attention = h.n_embd * h.head_dim_k * (2 * h.n_head + 2 * h.n_head_kv)
    shared = 3 * h.n_embd * h.n_ff_shexp
    dense = 3 * h.n_embd * h.n_ff * h.n_dense_lead
    return h.n_layer * (attention + shared) + dense + 2 * h.n_vocab * h.n_embd


def _bytes(name: str, elements: int) -> int | None:
    known = ggml.table("ik").get(name) or ggml.table("mainline").get(name)
    return int(elements * known.bpw / 8) if known else None


def _cuda(name: str, case: LogCase) -> bool:
    """Whether the card could compute with experts of that type (repacked ones often cannot)."""
    known = ggml.table("ik").get(name)
    if known is None:
        return True
    packs = case.rtr or known.interleave > 1
    if packs and case.settings.build < _INTERLEAVED_KERNELS:
        return False
    if case.rtr:
        packed = ggml.table("ik").get(f"{name.lower()}_r4") or ggml.table("ik").get(f"{name}_r8")
        known = packed or known
    return known.cuda


def _has_layers(gpu: LoggedDevice, case: LogCase) -> bool:
    if gpu.kv is not None:
        return gpu.kv > 0
    index = [g.name for g in case.gpus].index(gpu.name)
    if case.tensor_split and index < len(case.tensor_split):
        return case.tensor_split[index] > 0
    return not any(g.kv for g in case.gpus)


def _holds_experts(case: LogCase, gpu: LoggedDevice, homes: dict[int, str]) -> bool:
    """Whether routed experts of some layer lay on this GPU."""
    assert case.model is not None
    h = case.model.hparams
    moe = [i for i in range(h.n_layer) if is_moe_layer(h, i)]
    if case.ot_rules:
        for i in moe:
            for expert in _EXPERTS:
                target = _target(case, i, expert)
                if target == gpu.name or (target is None and homes.get(i) == gpu.name):
                    return True
        return False
    if re.search(r"--cpu-moe|-ncmoe 99|-cmoe", case.flags):
        return False
    if not experts_in_ram(case):
        return any(homes.get(i) == gpu.name for i in moe)
    if gpu.weights is None:
        return False
    mine = sum(1 for home in homes.values() if home == gpu.name) / max(1, h.n_layer)
    return gpu.weights * MIB > 1.6 * mine * _other_elements(h)


def _target(case: LogCase, layer: int, role: str) -> str | None:
    """Device that the first matching `-ot` rule names for a tensor; None when none matches."""
    name = f"blk.{layer}.{role}.weight"
    for rule in case.ot_rules:
        pattern, _, device = rule.rpartition("=")
        try:
            if re.search(pattern, name):
                return "CPU" if device.startswith(("CPU", "CUDA_Host")) else device
        except re.error as err:
            raise UsageError(f"-ot pattern {pattern!r} is not a regex: {err}") from err
    return None
