"""The roofline itself: seconds per token from what each device must read.

    t = Σ_gpu slow · bytes / (eta · BW)                          weights read from VRAM
      + layers · og                                              launches per layer on a GPU
      + full · max(bytes / (eta · BW), Σ params / (cores · rate · kappa))   weights read from RAM
      + cpu_expert_layers · oh + cpu_layers · oc                 barriers per layer
      + gpu_layers · kvq  (quantized cache)  + kv_bytes / (eta_kv · BW)

Devices work one after the other (layers are sequential), so their times add. eta and kappa are
per class of device, og per kind of model (dense, moe, mla), rates per type (`types.csv`,
gigaparams per second and Zen 4 core); `slow` is per family of types (1 for legacy and K types),
`full` applies when every core has a thread. Prompt processing (`prompt_seconds`) is coarser: one
ubatch costs its multiplications on each device, or the upload of the experts that lie in RAM.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

from quantmix.ggml.types import GgmlType
from quantmix.speed.constants import Constants

Kind = Literal["dense", "moe", "mla"]
_GB: Final = 1e9
_MS: Final = 1e-3
_ROWS_HALF_GPU: Final = 12.0  # rows per expert at which a GPU reaches half its rate
_ROWS_HALF_CPU: Final = 10.0


@dataclass(frozen=True, slots=True)
class Reader:
    """One memory: bytes of weights and of KV cache read per token, bandwidth, and its class.

    `family` is the family of the types read from a GPU (`slow_family`), empty for the plain ones
    or when the bytes were already weighted.
    """

    weights_bytes: float
    kv_bytes: float
    bandwidth_gbs: float
    device_class: str
    efficiency: float | None = None
    int8_tops: float | None = None
    family: str = ""


@dataclass(frozen=True, slots=True)
class Load:
    """All that decides the speed of one model on one machine.

    Attributes:
        kind: `dense`, `moe` or `mla` (MoE with latent attention).
        gpus: one reader per GPU in use. cpu: the host's reader, None when it reads nothing.
        gpu_layers: layers whose attention runs on a GPU. cpu_layers: layers wholly on the CPU.
        cpu_expert_layers: layers on a GPU whose experts are in RAM.
        decode_core_seconds: Σ params in RAM / (their type's rate · 1e9) per token, to be divided by
            cores and kappa.
        cores, isa: of the CPU. all_cores: as many threads as cores, none left for the system.
        quantized_cache: the KV cache is not 16-bit: a little slower on a GPU.
        active_params: all params used per token; cpu_params: those in RAM.
        ram_expert_bytes: routed experts in RAM, whole. experts, experts_used: of the model.
        pcie_gbs: bandwidth from RAM to a GPU, None: as fitted for its class.
    """

    kind: Kind
    gpus: tuple[Reader, ...]
    cpu: Reader | None
    gpu_layers: int
    cpu_layers: int
    cpu_expert_layers: int
    decode_core_seconds: float
    cores: int
    isa: str
    all_cores: bool = False
    quantized_cache: bool = False
    active_params: float = 0.0
    cpu_params: float = 0.0
    ram_expert_bytes: float = 0.0
    experts: int = 0
    experts_used: int = 0
    pcie_gbs: float | None = None


def slow_family(qtype: GgmlType | None) -> str:
    """Family of types that GPUs read slower than their bytes say; empty for the plain ones."""
    if qtype is None or qtype.family not in ("iq", "iqk", "trellis"):
        return ""
    return "iq1" if qtype.name.startswith("iq1") else qtype.family


def efficiency(constants: Constants, reader: Reader, what: str) -> float:
    """Share of the bandwidth reached: of the fitted class, else the device's own figure."""
    fitted = constants.get((what, reader.device_class))
    return fitted or reader.efficiency or constants[(what, "other")]


def token_seconds(load: Load, constants: Constants) -> float:
    """Seconds to generate one token."""
    latent = "mla" if load.kind == "mla" else "gqa"
    per_layer = constants[("og_ms", load.kind)]
    if load.quantized_cache:
        per_layer += constants[("kvq_ms", "layer")]
    t = load.gpu_layers * per_layer * _MS
    for gpu in load.gpus:
        rate = gpu.bandwidth_gbs * _GB
        slow = constants[("slow", gpu.family)] if gpu.family else 1.0
        t += slow * gpu.weights_bytes / (efficiency(constants, gpu, "eta_gpu") * rate)
        t += gpu.kv_bytes / (constants[("eta_kv_gpu", latent)] * rate)
    t += load.cpu_layers * constants[("oc_ms", "layer")] * _MS
    t += load.cpu_expert_layers * constants[("oh_ms", "layer")] * _MS
    if load.cpu is not None:
        rate = load.cpu.bandwidth_gbs * _GB
        read = load.cpu.weights_bytes / (efficiency(constants, load.cpu, "eta_cpu") * rate)
        decode = load.decode_core_seconds / (load.cores * constants[("kappa", load.isa)])
        t += max(read, decode) * (constants[("full", "cpu")] if load.all_cores else 1.0)
        t += load.cpu.kv_bytes / (constants[("eta_kv_cpu", latent)] * rate)
    return t


def prompt_seconds(
    load: Load, ubatch: int, constants: Constants, *, uploads_from: int | None
) -> float | None:
    """Seconds for one ubatch of a prompt, None when a GPU's int8 rate is unknown.

    `uploads_from`: as `memory.compute.copied_from`; None when types in RAM have no CUDA kernel.
    """
    share = load.experts_used / load.experts if load.experts else 1.0
    rows = ubatch * share
    on_cpu = load.cpu_params
    t = 0.0
    uploads = bool(load.gpus and load.ram_expert_bytes and uploads_from)
    uploads = uploads and ubatch >= (uploads_from or 0)
    if uploads:
        fitted = constants.get(("pcie_gbs", load.gpus[0].device_class))
        link = load.pcie_gbs or fitted or constants[("pcie_gbs", "other")]
        t += load.ram_expert_bytes / (link * _GB)
        on_cpu = 0.0
    if on_cpu:
        rate = load.cores * constants[("cpu_gflops", load.isa)] * 1e9
        t += 2 * on_cpu * ubatch / (rate * rows / (rows + _ROWS_HALF_CPU))
    on_gpu = load.active_params - on_cpu
    if load.gpus and on_gpu > 0:
        total = sum(g.weights_bytes for g in load.gpus) or 1.0
        moe = constants[("moe_gpu", "all")] if load.experts else 1.0
        for gpu in load.gpus:
            if not gpu.int8_tops:
                return None
            f = constants.get(("int8_share", gpu.device_class), constants[("int8_share", "other")])
            rate = f * gpu.int8_tops * 1e12 * moe * rows / (rows + _ROWS_HALF_GPU)
            t += 2 * on_gpu * (gpu.weights_bytes / total) * ubatch / rate
    return t
