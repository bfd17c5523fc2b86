"""Which GPU each layer lands on for a `-ts` list, by each engine's own rule.

By count (mainline; ik until 2025-12): the last `ngl` of `n_layer + 1` slots (the output is the
last) go to GPUs; slot `k` of those goes to the first device whose cumulative share exceeds
`k / slots` (llama.cpp src/llama-model.cpp, ik_llama.cpp src/llama.cpp: upper_bound).

By bytes (ik since PRs 1022, 1065, 1476 and 1498, 2025-12 to 2026-03): layers are taken in order
and a device is filled until its share of all bytes is reached. This is a simulation of described
behaviour, not checked against logs: plans keep a layer's slack or emit explicit `-ot`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Final

from quantmix.errors import UsageError
from quantmix.ggml.types import Engine
from quantmix.memory.model import HOST

COUNT_UNTIL: Final = "2025-12-01"


def splits_by_count(engine: Engine, build: str) -> bool:
    """Whether `-ts` divides the number of layers (True) or their bytes."""
    return engine == "mainline" or build < COUNT_UNTIL


def first_gpu_layer(n_layer: int, ngl: int, engine: Engine) -> int:
    """Index of the first layer on a GPU: ik counts the output last, mainline first.

    `-ngl n_layer` leaves the output in RAM in ik, layer 0 in mainline; above that all is on GPUs.
    """
    slots = n_layer if engine == "ik" else n_layer + 1
    return max(0, slots - ngl)


def layers_of(
    ts: Sequence[float], n_layer: int, ngl: int, engine: Engine, build: str
) -> tuple[int, ...]:
    """Return the GPU index (or HOST) of each of `n_layer` layers for builds that split by count.

    Raises:
        UsageError: shares that make no split, or a build that splits by bytes (`layers_by_bytes`).
    """
    if not splits_by_count(engine, build):
        raise UsageError(
            f"ik builds since {COUNT_UNTIL} split -ts by bytes: the sizes of the layers are needed"
        )
    bounds = _cumulative(ts)
    start, slots = first_gpu_layer(n_layer, ngl, engine), min(ngl, n_layer + 1)
    return tuple(
        HOST if i < start else min(bisect_right(bounds, (i - start) / slots), len(ts) - 1)
        for i in range(n_layer)
    )


def output_home(ts: Sequence[float], n_layer: int, ngl: int, engine: Engine, build: str) -> int:
    """Return the GPU of the output matrix (the slot after the last layer), or HOST.

    Raises:
        UsageError: shares that make no split.
    """
    bounds = _cumulative(ts)
    on_gpu = ngl > n_layer if engine == "ik" else ngl > 0
    if not on_gpu:
        return HOST
    if not splits_by_count(engine, build):
        return max(i for i, share in enumerate(ts) if share > 0)
    slots = min(ngl, n_layer + 1)
    start = first_gpu_layer(n_layer, ngl, engine)
    return min(bisect_right(bounds, (n_layer - start) / slots), len(ts) - 1)


def layers_by_bytes(
    ts: Sequence[float], layer_bytes: Sequence[int], output_bytes: int, ngl: int
) -> tuple[int, ...]:
    """Simulate ik's newer rule: the GPU (or HOST) of each layer when shares are of bytes.

    `layer_bytes` are weights plus cache per layer as the loader sees them before `-ot`. Unverified
    (module docstring).

    Raises:
        UsageError: shares that make no split.
    """
    bounds = _cumulative(ts)
    n_layer = len(layer_bytes)
    start = first_gpu_layer(n_layer, ngl, "ik")
    total = sum(layer_bytes[start:]) + (output_bytes if ngl > n_layer else 0)
    homes: list[int] = []
    used, gpu = 0, 0
    for i, n_bytes in enumerate(layer_bytes):
        if i < start:
            homes.append(HOST)
            continue
        while gpu < len(ts) - 1 and used + n_bytes > bounds[gpu] * total:
            gpu += 1
        used += n_bytes
        homes.append(gpu)
    return tuple(homes)


def _cumulative(ts: Sequence[float]) -> list[float]:
    """Cumulative shares, the last one 1.

    Raises:
        UsageError: no shares, a negative one, or all zero.
    """
    if not ts or min(ts) < 0 or sum(ts) <= 0:
        raise UsageError(f"-ts {','.join(map(str, ts))!r}: shares must be 0 or more, one above 0")
    total = sum(ts)
    return [c / total for c in accumulate(ts)]
