"""A stand-in for seconds per token when the rig's bandwidths are not known.

Only the ratio between GPU and RAM matters to the search; no speed is printed from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from quantmix.ggml.types import GgmlType
from quantmix.loss.model import FloatArray
from quantmix.models.model import Model
from quantmix.rig.device import Rig

GPU_BYTES_PER_SECOND = 700e9
RAM_BYTES_PER_SECOND = 60e9


def cell_seconds(model: Model, types: Sequence[GgmlType], rig: Rig) -> FloatArray:
    """Return (D, T, Q) seconds per token: active bytes over a typical bandwidth."""
    bits = np.array([t.bpw for t in types])
    active = np.array([t.n_elements * t.active_fraction * t.loaded for t in model.tensors])
    n_bytes = active[:, None] * bits[None, :] / 8
    rates = [
        (d.bandwidth_gbs or 0) * 1e9 * (d.efficiency or 0.7)
        or (GPU_BYTES_PER_SECOND if d.kind == "gpu" else RAM_BYTES_PER_SECOND)
        for d in rig.devices
    ]
    seconds: FloatArray = np.stack([n_bytes / r for r in rates])
    return seconds
