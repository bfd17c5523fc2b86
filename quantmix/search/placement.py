"""Which layers live on which GPU: a contiguous split, balanced by what the layers really weigh."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from quantmix.memory.model import HOST
from quantmix.models.model import Model


def layer_weights(model: Model, n_blocks: int) -> list[float]:
    """Return weights of the blocks by parameters, routed experts counted at a quarter."""
    weights = [0.0] * n_blocks
    for t in model.tensors:
        if t.layer is not None and t.layer < n_blocks:
            weights[t.layer] += t.n_elements * (1.0 if t.active_fraction == 1.0 else 0.25)
    return weights


def split_layers(
    weights: Sequence[float],
    capacities: Sequence[float],
    *,
    tail: float = 0.0,
    host_layers: int = 0,
) -> tuple[int, ...]:
    """Return a device per block, contiguous over the GPUs, each near its share of the total.

    Args:
        weights: bytes of each block, KV cache and derived tensors included.
        capacities: bytes that each GPU has for them.
        tail: bytes that lie on the last GPU besides (output matrix).
        host_layers: so many first blocks stay in RAM (`-ngl` below the number of layers); all do
            without GPUs.
    """
    n = len(weights)
    if not capacities:
        return (HOST,) * n
    held = np.maximum(np.asarray(capacities, dtype=np.float64), 0.0)
    if not held.sum() > 0:
        held = np.ones(len(held))
    mine = np.asarray(weights, dtype=np.float64)[host_layers:]
    ends = np.concatenate([[0.0], np.cumsum(mine)])
    total = ends[-1] + tail
    bounds = [0]
    for g in range(len(held) - 1):
        target = total * held[: g + 1].sum() / held.sum()
        best = int(np.argmin(np.abs(ends - target)))
        lowest = bounds[-1] + (1 if len(mine) >= len(held) else 0)
        highest = len(mine) - (len(held) - 1 - g if len(mine) >= len(held) else 0)
        bounds.append(min(max(best, lowest), highest))
    bounds.append(len(mine))
    device = [HOST] * host_layers
    for g in range(len(held)):
        device += [g] * (bounds[g + 1] - bounds[g])
    assert len(device) == n
    return tuple(device)


def move_boundary(layer_device: Sequence[int], left: int, towards_left: bool) -> tuple[int, ...]:
    """Return the split with one block moved across the boundary between `left` and `left + 1`.

    A GPU keeps at least one block; a split that cannot move comes back as it was.
    """
    device = list(layer_device)
    giver, taker = (left + 1, left) if towards_left else (left, left + 1)
    mine = [i for i, d in enumerate(device) if d == giver]
    if len(mine) <= 1:
        return tuple(device)
    device[mine[0] if towards_left else mine[-1]] = taker
    return tuple(device)


def ranges(layer_device: Sequence[int], names: Sequence[str]) -> str:
    """Return a split in words: `GPU0 0-30, GPU1 31-60`."""
    parts = []
    start = 0
    for i in range(1, len(layer_device) + 1):
        if i == len(layer_device) or layer_device[i] != layer_device[start]:
            span = f"{start}" if i - start == 1 else f"{start}-{i - 1}"
            parts.append(f"{names[layer_device[start]]} {span}")
            start = i
    return ", ".join(parts)


def number_ranges(numbers: Iterable[int]) -> str:
    """Return numbers in words: `3-18, 20`."""
    parts: list[list[int]] = []
    for n in sorted(set(numbers)):
        if parts and n == parts[-1][-1] + 1:
            parts[-1].append(n)
        else:
            parts.append([n])
    return ", ".join(f"{p[0]}" if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)
