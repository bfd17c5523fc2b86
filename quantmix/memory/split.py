"""Which GPU each block lands on for a `-ts` list that deals blocks by their number.

That is the rule of mainline, and of ik until 2025-11; ik deals bytes since (`emit.layers`). Checked
with the KV sizes of 22 published logs. Sources: llama.cpp src/llama-model.cpp load_tensors,
ik_llama.cpp src/llama.cpp llm_load_tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quantmix.errors import UsageError
from quantmix.ggml.types import Engine
from quantmix.memory.model import HOST
from quantmix.memory.settings import Settings

IK_SPLITS_BYTES: Final = "2025-12-01"  # ik_llama.cpp PRs 1022, 1065, 1476, 1498


def splits_bytes(settings: Settings) -> bool:
    """Whether this engine build deals blocks by bytes."""
    return settings.engine == "ik" and settings.build >= IK_SPLITS_BYTES


def gpu_slots(n_blocks: int, ngl: int, engine: Engine) -> tuple[int, int]:
    """Return first and end of the slots on GPUs; the output is slot `n_blocks`.

    `-ngl n_blocks` leaves the output in RAM in ik, block 0 in mainline; above that all is on GPUs.
    """
    if engine == "ik":
        return max(n_blocks - ngl, 0), n_blocks + (ngl > n_blocks)
    return max(n_blocks + 1 - ngl, 0), n_blocks + 1


def by_count(weights: Sequence[float], first: int, n_slots: int) -> list[int]:
    """GPU of each of the slots `first … n_slots - 1`.

    Block i goes to the first GPU whose cumulative share exceeds (i - first) / n.
    """
    sums = shares(weights)
    n = np.float32(n_slots - first)
    return [
        int(np.searchsorted(sums, np.float32(i) / n, side="right")) for i in range(n_slots - first)
    ]


def homes_by_count(ts: Sequence[float], n_blocks: int, ngl: int, engine: Engine) -> tuple[int, ...]:
    """Return the GPU index (or HOST) of each block.

    Raises:
        UsageError: shares that make no split.
    """
    if not ts or min(ts) < 0 or sum(ts) <= 0:
        raise UsageError(f"-ts {','.join(map(str, ts))!r}: shares must be 0 or more, one above 0")
    first, end = gpu_slots(n_blocks, ngl, engine)
    return ((HOST,) * first + tuple(by_count(ts, first, end)))[:n_blocks]


def shares(weights: Sequence[float]) -> NDArray[np.float32]:
    """Return cumulative shares as the engines hold them, the last one 1."""
    sums = np.cumsum(np.asarray(weights, dtype=np.float32), dtype=np.float32)
    return np.asarray(sums / sums[-1], dtype=np.float32)
