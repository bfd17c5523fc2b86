"""Rigs, models and file sizes that the tests of offload flags share."""

from __future__ import annotations

from functools import cache

from quantmix.ggml import types
from quantmix.models.model import Model
from quantmix.models.sources import load_model
from quantmix.rig.device import Device, Rig
from quantmix.units import GIB


def make_rig(*gib: int, ram_gib: int = 512) -> Rig:
    """A rig of GPUs of so many GiB, in CUDA order."""
    gpus = tuple(Device(f"GPU{i}", "gpu", size * GIB) for i, size in enumerate(gib))
    return Rig(gpus, Device("CPU", "host", ram_gib * GIB))


@cache
def model_of(name: str) -> Model:
    """A catalog model, built once."""
    return load_model(name)


@cache
def sizes_of(name: str, qtype: str = "iq4_ks") -> dict[str, int]:
    """File bytes per tensor with every matrix at one type, fallbacks applied."""
    kept = types.get("f32")
    return {
        t.name: (types.resolve(qtype, t.name, t.shape) if t.quantizable else kept).tensor_bytes(
            t.shape
        )
        for t in model_of(name).tensors
    }
