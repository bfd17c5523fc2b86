"""Which GPU each block lands on where ik deals bytes, and `-ts` values that give a plan there.

From 2025-12 on ik deals blocks in order; a GPU takes blocks while the bytes dealt stay within its
cumulative share of Σ bytes, and one more when that lands nearer to the share. A block counts with
all its tensors (`-ot` is not looked at) and its KV cache; every GPU counts with one compute buffer
besides. Elsewhere blocks are dealt by number (`memory.split`), and the numbers are the values.

Sources: ik_llama.cpp src/llama.cpp llm_load_tensors and get_layer_sizes, read in one build
(2026-04, in the PyPI package); never run on a GPU here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from quantmix.errors import UsageError
from quantmix.memory import kv
from quantmix.memory.settings import Settings
from quantmix.memory.split import shares
from quantmix.models.model import Model

_Q8_0_ROW_512: Final = 544  # bytes of a q8_0 row of 512 weights
# A boundary is kept away from the edges of what the rule accepts by this share of the window.
_KEEP_OFF: Final = 0.3
_ENOUGH: Final = 0.5  # share of the window that must remain to satisfy both rules
_TOTALS: Final = (100, 200, 500, 1000, 2000, 5000, 10_000, 100_000)


@dataclass(frozen=True, slots=True)
class SplitSizes:
    """What ik's byte rule weighs.

    `blocks`: bytes per block, the output matrix last. `compute`: the compute buffer every GPU is
    charged with.
    """

    blocks: tuple[float, ...]
    compute: float


def split_sizes(model: Model, settings: Settings, sizes: Mapping[str, int]) -> SplitSizes:
    """Return the sizes ik computes for its byte rule; `sizes` are file bytes per tensor.

    MLA files without attn_kv_b are charged with ik's own (too large) figure for it, as the
    engine does: only its view counts here.
    """
    n = kv.n_blocks(model)
    h = model.hparams
    blocks = [0.0] * (n + 1)
    seen: list[set[str]] = [set() for _ in range(n)]
    for t in model.tensors:
        if t.layer is not None and t.layer < n and (t.loaded or settings.mtp):
            blocks[t.layer] += sizes[t.name]
            seen[t.layer].add(t.role)
    for i, roles in enumerate(seen):
        if {"attn_k_b", "attn_v_b"} <= roles and "attn_kv_b" not in roles:
            blocks[i] += _Q8_0_ROW_512 * (h.head_dim_v + h.kv_lora_rank) * h.n_head * 2
        elif "attn_kv_b" in roles and "attn_k_b" not in roles:
            blocks[i] += sizes[f"blk.{i}.attn_kv_b.weight"]
    for i, cache in enumerate(kv.kv_bytes(model, settings)):
        blocks[i] += cache
    compute = max((_layer_compute(model, settings, i, roles) for i, roles in enumerate(seen)))
    head = sizes.get("output.weight", sizes.get("token_embd.weight", 0))
    logits = 4 * h.n_vocab * settings.ubatch
    blocks[n] = head + max(0.0, logits - compute)
    return SplitSizes(tuple(blocks), compute)


def by_bytes(weights: Sequence[float], first: int, n_slots: int, sizes: SplitSizes) -> list[int]:
    """GPU of each of the slots `first … n_slots - 1` under ik's byte rule, in its arithmetic."""
    sums = shares(weights)
    devices = [len(weights) - 1] * (n_slots - first)
    total = sizes.compute * len(weights) + sum(sizes.blocks[first:n_slots])
    dealt, i = np.float32(0), first
    for gpu in range(len(weights)):
        dealt = np.float32(float(dealt) + sizes.compute)
        share = float(np.float32(float(sums[gpu]) * total))
        while i < n_slots:
            size = sizes.blocks[i]
            over = float(dealt) + size - share
            if over > 0 and over >= share - float(dealt):
                break
            devices[i - first] = gpu
            dealt = np.float32(float(dealt) + size)
            i += 1
            if over > 0:
                break
    return devices


def weights_by_bytes(counts: Sequence[int], first: int, sizes: SplitSizes) -> tuple[int, ...]:
    """Short integer `-ts` values under which the byte rule gives GPU g its `counts[g]` slots.

    Every boundary is put where half a block more or less on either side would change nothing;
    values that satisfy the count rule as well are preferred, since the change of rule has no
    sharp date.

    Raises:
        UsageError: no value works (a GPU in the middle without any block).
    """
    n_slots = first + sum(counts)
    windows = _byte_windows(counts, first, sizes)
    slots = np.cumsum(counts)
    both = [
        (max(low, (b - 1) / slots[-1]), min(high, b / slots[-1]))
        for (low, high), b in zip(windows, slots[:-1], strict=True)
    ]
    roomy = all(b[1] - b[0] > _ENOUGH * (w[1] - w[0]) for b, w in zip(both, windows, strict=True))
    for wanted, limit in ((both if roomy else windows, 1000), (windows, _TOTALS[-1])):
        for total in (t for t in _TOTALS if t <= limit):
            weights = _integers(wanted, total)
            if weights and _counts(by_bytes(weights, first, n_slots, sizes), len(counts)) == list(
                counts
            ):
                return weights
    raise UsageError(
        "no -ts value gives this layer split: leave GPUs without layers out of the rig"
    )


def byte_slack(
    weights: Sequence[int], counts: Sequence[int], first: int, sizes: SplitSizes
) -> float:
    """How far the least sure boundary is from moving, as a share of one block's bytes."""
    total = sum(weights)
    worst, position = 0.5, first
    whole = sizes.compute * len(counts) + sum(sizes.blocks[first : first + sum(counts)])
    windows = _byte_windows(counts, first, sizes)
    for g, (low, high) in enumerate(windows):
        position += counts[g]
        block = max(*sizes.blocks[position - 1 : position + 1], 1.0)
        point = sum(weights[: g + 1]) / total
        worst = min(worst, (point - low) * whole / block, (high - point) * whole / block)
    return worst


def _byte_windows(
    counts: Sequence[int], first: int, sizes: SplitSizes
) -> list[tuple[float, float]]:
    """Per boundary the shares of the total between which the byte rule puts it there.

    Behind the last block there is nothing to deal: any larger share leaves that boundary there.
    """
    n_slots = first + sum(counts)
    total = sizes.compute * len(counts) + sum(sizes.blocks[first : first + sum(counts)])
    windows: list[tuple[float, float]] = []
    position, dealt = first, 0.0
    for count in counts[:-1]:
        dealt += sizes.compute + sum(sizes.blocks[position : position + count])
        position += count
        before = sizes.blocks[position - 1] / 2 if count else 0.0
        after = sizes.blocks[position] / 2 if position < n_slots else total - dealt
        windows.append(((dealt - before) / total, (dealt + after) / total))
    return windows


def _integers(windows: Sequence[tuple[float, float]], total: int) -> tuple[int, ...] | None:
    """Integers that add up to `total` with cumulative shares well inside the windows, or None."""
    points = [0]
    for low, high in windows:
        margin = _KEEP_OFF * (high - low)
        point = round(total * (low + high) / 2)
        if not (low + margin <= point / total <= high - margin) or point <= points[-1]:
            return None
        points.append(point)
    if points[-1] >= total:
        return None
    points.append(total)
    return tuple(b - a for a, b in pairwise(points))


def _counts(devices: Sequence[int], n: int) -> list[int]:
    return [list(devices).count(g) for g in range(n)]


def _layer_compute(model: Model, settings: Settings, layer: int, roles: set[str]) -> float:
    """ik's estimate of one layer's compute buffer (FFN rows, or the MLA prompt path)."""
    h = model.hparams
    u = 4.0 * settings.ubatch
    rows = {
        r.split(".")[0]: model.by_name[f"blk.{layer}.{r}.weight"].shape[1]
        for r in roles
        if r.startswith("ffn_")
        and f"blk.{layer}.{r}.weight" in model.by_name
        and len(model.by_name[f"blk.{layer}.{r}.weight"].shape) > 1
    }
    experts = sum(n for r, n in rows.items() if r.endswith("_exps")) * h.n_expert_used
    shared = sum(n for r, n in rows.items() if r.endswith("_shexp"))
    dense = sum(n for r, n in rows.items() if r in ("ffn_up", "ffn_gate", "ffn_down"))
    normed = any(r.endswith("_norm") for r in roles)
    best = u * (max(experts, shared, dense) + h.n_embd * (2 if normed else 1))
    if settings.mla == 3 and "attn_v_b" in roles:
        heads = _mla_heads(h.n_head, 8.0 * h.head_dim_v * settings.ctx, settings.amb)
        best = max(best, 8.0 * h.head_dim_v * heads * settings.ctx)
    return best


def _mla_heads(n_head: int, per_head_bytes: float, amb_mib: int) -> int:
    """Heads per group: the fewest groups whose K and V in f32 stay within `-amb`."""
    mib = n_head * per_head_bytes / (1 << 20)
    if amb_mib <= 0 or mib <= amb_mib:
        return n_head
    groups = (g for g in range(2, n_head) if n_head % g == 0 and mib / g <= amb_mib)
    return n_head // next(groups, n_head)
