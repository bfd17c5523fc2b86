"""The compute buffer of mainline llama.cpp, from what its own graph allocator reserves.

The published logs of mainline are few and old, but its libllama can be asked on any machine:
`no_alloc` loads of ghosts of 59 geometries under 9 launches (531 buffers, release 0.5.0, CPU
backend) gave these lines. The graph is the same on a GPU; its allocator is the same code; only
operations that a backend splits or fuses can differ, which the margin must cover. Symbols as in
`compute`: with H heads, Q = H·head_dim_k, R and r the MLA ranks, D the experts' or dense FFN width,
K = min(index_top_k, cells)·layers of a DSA indexer, k its masks and scores (8·n·ub instead of m16):

    ml_out        m16 + u·(V + 4E)                        device with the output matrix
    ml_attn       m16 + u·(4E + 3Q)                       flash attention
    ml_attn       k + u·(1.5·H·(2R + r) + K)              MLA; k_b is absorbed, all heads wide
    ml_attn_nofa  4·n·H·ub + m32 + u·(2E + 2Q + K)        no flash attention
    ml_ffn        m16 + u·(3D + 4E)                       dense feed-forward: gate, up, product
    ml_moe        m16 + u·max(3F + 4E, 2X + F + 2E)       routed experts

Engine over estimate, by the line that is largest: ml_out 0.93 in the median and 1.09 at most (392
buffers), ml_attn 1.00 and 1.03 (48), ml_attn_nofa 1.01 and 1.06 (58), ml_ffn and ml_moe 1.00 and
1.00 (16 each). The margin of regimes without a row in `margins.csv` (1.25 and 64 MiB) covers all.
`python -m quantmix.engine.mainline_sweep` measures them again.
"""

from __future__ import annotations

from quantmix.memory import compute
from quantmix.memory.kv import n_cells
from quantmix.memory.model import Regime
from quantmix.memory.settings import Settings
from quantmix.models.model import HParams, Model

# What the generic model already says well: host inputs, and the copy of a RAM-resident expert.
_SHARED = frozenset({"host", "copy_one"})


def regimes(model: Model, settings: Settings, role: compute.DeviceRole) -> tuple[Regime, ...]:
    """Return the regimes of a device under mainline: best estimates, without safety margin."""
    h = model.hparams
    found = [r for r in compute.regimes(model, settings, role) if r.name in _SHARED]
    cells = n_cells(settings)
    ubatch = min(settings.ubatch, cells)
    u, mask = 4 * ubatch, 2 * cells * ubatch * role.copies
    embd = h.n_embd
    if role.output:
        found.append(Regime("ml_out", mask + u * (h.n_vocab + 4 * embd)))
    if role.layers:
        found.append(_attention(h, settings, cells, ubatch, mask))
        if h.n_ff and has_dense_layers(h):
            found.append(Regime("ml_ffn", mask + u * (3 * h.n_ff + 4 * embd)))
    if h.is_moe and role.experts:
        wide, out = h.n_expert_used * h.n_ff_exp, h.n_expert_used * embd
        live = max(3 * wide + 4 * embd, 2 * out + wide + 2 * embd)
        found.append(Regime("ml_moe", mask + u * live))
    return tuple(found)


def has_dense_layers(h: HParams) -> bool:
    """Whether some layer has a dense feed-forward block instead of experts."""
    return not h.is_moe or h.n_dense_lead > 0 or h.moe_layer_step > 1


def _attention(h: HParams, settings: Settings, cells: int, ubatch: int, mask: int) -> Regime:
    """The attention regime of a device that holds layers."""
    u = 4 * ubatch
    q = h.n_head * h.head_dim_k
    sparse = bool(h.indexer_n_head)
    top_k = min(h.indexer_top_k, cells) * h.n_layer if sparse else 0
    if not settings.fa:
        scores = 4 * cells * h.n_head * ubatch
        return Regime("ml_attn_nofa", scores + 2 * mask + u * (2 * h.n_embd + 2 * q + top_k))
    if h.is_mla:
        wide = 3 * h.n_head * (2 * h.kv_lora_rank + h.rope_dim) // 2
        return Regime("ml_attn", (4 if sparse else 1) * mask + u * (wide + top_k))
    return Regime("ml_attn", mask + u * (4 * h.n_embd + 3 * q))
