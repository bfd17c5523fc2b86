"""The compute buffer of one device, as the maximum of a few regimes.

The graph allocator keeps the largest set of tensors that live at one time, so the buffer is a
maximum, not a sum. Each line below was read off published logs (docs/memory-model.md lists the
cases). With ub = ubatch, n = context cells, E = n_embd, V = n_vocab, H = heads, Q = H·head_dim_k,
O = H·head_dim_v, X = experts used · E, F = experts used · n_ff_exp, u = 4·ub bytes (one float per
token), m16 = 2·n·ub (the f16 mask), m32 = 4·n·ub, S = bytes of one expert tensor in RAM:

    out       u·(V + E), sometimes u·(V + 2E)                 device with the output matrix
    attn      m16 + u·(2E + 2Q) [+ u·X]                       flash attention, no MLA; X on the
                                                              first GPU, experts in RAM
    attn      4·n·H·ub + m32 + u·(2E + 2Q)                    no flash attention
    mla       1.625·chunk + m16 + u·(Q + O + 3E)              `-mla 2/3 -fa`, ik since 2026-01-31
    mla       2·n·H·(dk+dv) + chunk + …                       the same before
    mla       m16 + u·(H·(R+r) + H·R + Q + 2E)                `-mla 1 -fa`, and ub < 128
    moe       m16 + u·(X + 2F)                                device with expert weights (ik before
                                                              2025-10-13: u·(X + F + E))
    copy_pair 2S + m16 + u·(F + 3E)                           first GPU, experts in RAM and ub at or
    copy_one  S + m16 + u·(F + 2X + 3E)                       above the op-offload threshold (ik
                                                              copies gate and up as a pair)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from quantmix.memory.kv import n_cells
from quantmix.memory.model import Regime
from quantmix.memory.settings import Settings
from quantmix.models.model import HParams, Model
from quantmix.units import MIB

IK_F16_MASK: Final = "2025-10-13"  # ik_llama.cpp PR 825
IK_COPY_THRESHOLD: Final = "2025-05-12"  # PR 405: 32·experts/used instead of 32
IK_MLA_IN_GROUPS: Final = "2026-01-31"  # PR 1211: K and V of all heads no longer held
_MIN_MLA_PREFILL_UBATCH: Final = 128
_COPY_MIN_BATCH: Final = 32  # GGML_CUDA_MIN_BATCH_OFFLOAD
_SOFTCAPPED: Final = frozenset(("gemma2", "gemma4", "grok"))  # a second copy of the logits lives


@dataclass(frozen=True, slots=True)
class DeviceRole:
    """What a device does in the graph.

    Attributes:
        first: the first GPU: op-offload copies go there, and graph inputs are converted there.
        layers: holds attention layers. experts: holds routed-expert weights of some layer.
        output: holds the output matrix. cpu_experts: some routed experts lie in RAM.
        host: is the host (RAM), computing with the CPU.
        copies: copies of the graph inputs kept for pipeline parallelism (masks count that often).
        fused: up and gate of the experts run as one operation (always in today's ik).
    """

    first: bool
    layers: bool
    experts: bool
    output: bool
    cpu_experts: bool = False
    host: bool = False
    copies: int = 1
    fused: bool = True


@dataclass(frozen=True, slots=True)
class _Sizes:
    """The quantities of the formulas, in bytes (u, m16, m32) or in elements per token."""

    u: int
    m16: int
    m32: int
    cells: int
    ubatch: int
    embd: int
    vocab: int
    q: int
    o: int
    x: int
    f: int


def copied_from(engine: str, build: str, experts: int, experts_used: int) -> int:
    """Least tokens at once for which experts in RAM are copied to a GPU (engines' op-offload).

    32; ik since PR 405 wants 32 per expert on average.
    """
    if engine == "ik" and build >= IK_COPY_THRESHOLD and experts_used:
        return -(-_COPY_MIN_BATCH * experts // experts_used)
    return _COPY_MIN_BATCH


def copies_experts(model: Model, settings: Settings) -> bool:
    """Whether prompt processing copies RAM-resident experts to the first GPU at this ubatch."""
    h = model.hparams
    least = copied_from(settings.engine, settings.build, h.n_expert, h.n_expert_used)
    return h.is_moe and min(settings.ubatch, n_cells(settings)) >= least


def regimes(
    model: Model, settings: Settings, role: DeviceRole, *, upper: bool = False
) -> tuple[Regime, ...]:
    """Return the regimes that apply to a device: best estimates, without safety margin.

    With `upper`, `out` counts the second vector of E per token that some graphs keep beside the
    logits; margins are added to that form (`margins.safe`).
    """
    h, z = model.hparams, _sizes(model, settings, role.copies)
    found: list[Regime] = []
    if role.output:
        logits = 2 if model.arch in _SOFTCAPPED else 1
        inputs = role.copies * (z.m16 // role.copies + z.u * z.embd) if role.copies > 1 else 0
        beside = z.embd * (2 if upper else 1)
        found.append(Regime("out", z.u * (logits * z.vocab + beside) + inputs))
    if role.layers:
        found.append(_attention(h, settings, z, role))
    if role.experts and h.is_moe:
        old = settings.engine == "ik" and settings.build < IK_F16_MASK
        live = z.u * (z.x + z.f + z.embd) if old else z.m16 + z.u * (z.x + 2 * z.f)
        found.append(Regime("moe", live))
    if role.first and not role.host and role.cpu_experts and copies_experts(model, settings):
        one = z.m16 + z.u * (z.f + 2 * z.x + 3 * z.embd)
        if settings.engine == "ik" and role.fused:
            found.append(Regime("copy_pair", z.m16 + z.u * (z.f + 3 * z.embd), 2.0))
        found.append(Regime("copy_one", one, 1.0))
    if role.host:
        found.extend(_host(z, settings, role))
    return tuple(found)


def mla_chunk_bytes(h: HParams, settings: Settings) -> int:
    """Bytes of decompressed K and V (f32) that `-amb` lets one head group hold.

    Heads are halved until the whole MiB of the chunk no longer exceed `-amb` (0 = no limit).
    """
    nope_and_v = h.head_dim_k - h.rope_dim + h.head_dim_v
    per_head = nope_and_v * n_cells(settings) * 4
    heads = h.n_head
    while settings.amb and per_head * heads // MIB > settings.amb and heads % 2 == 0:
        heads //= 2
    return per_head * heads


def output_bytes(model: Model, settings: Settings, n_outputs: int | None = None) -> int:
    """Bytes of the logits buffer on the host: `n_outputs` rows (default: one per slot) of f32."""
    rows = max(1, settings.parallel) if n_outputs is None else n_outputs
    return rows * model.hparams.n_vocab * 4


def _sizes(model: Model, settings: Settings, copies: int) -> _Sizes:
    h, cells = model.hparams, n_cells(settings)
    ubatch = min(settings.ubatch, cells)
    return _Sizes(
        u=4 * ubatch,
        m16=2 * cells * ubatch * copies,
        m32=4 * cells * ubatch * copies,
        cells=cells,
        ubatch=ubatch,
        embd=h.n_embd,
        vocab=h.n_vocab,
        q=h.n_head * h.head_dim_k,
        o=h.n_head * h.head_dim_v,
        x=h.n_expert_used * h.n_embd,
        f=h.n_expert_used * h.n_ff_exp,
    )


def _attention(h: HParams, settings: Settings, z: _Sizes, role: DeviceRole) -> Regime:
    """The attention regime of a device that holds layers."""
    f32_mask = settings.engine == "ik" and settings.build < IK_F16_MASK and role.first
    if h.is_mla and settings.engine == "ik" and settings.mla:
        return _mla(h, settings, z, role)
    if not settings.fa:
        scores = 4 * z.cells * h.n_head * z.ubatch
        return Regime("attn_nofa", scores + z.m32 + z.u * (2 * z.embd + 2 * z.q))
    mask = z.m16 + (z.m32 if f32_mask else 0)
    x = z.x if role.first and role.cpu_experts else 0
    if h.is_mla:
        # Mainline absorbs k_b: queries are R + r wide, outputs R wide.
        wide = h.n_head * (2 * h.kv_lora_rank + h.rope_dim)
        return Regime("attn", mask + z.u * (wide + z.q + 2 * z.embd + x))
    return Regime("attn", mask + z.u * (2 * z.embd + 2 * z.q + x))


def _mla(h: HParams, settings: Settings, z: _Sizes, role: DeviceRole) -> Regime:
    """The attention regime of ik's MLA modes 1 to 3."""
    if not settings.fa:
        scores = 4 * z.cells * h.n_head * z.ubatch
        bound = bool(settings.amb) and scores > settings.amb * MIB
        wide = h.n_head * (2 * h.kv_lora_rank + h.rope_dim + h.head_dim_k)
        extra = 2 * z.cells * h.kv_lora_rank if settings.mla > 1 else 0
        held = min(scores, settings.amb * MIB) if settings.amb else scores
        queries = int(z.u * wide * (1.5 if bound else 1.0))
        return Regime("mla_nofa", held + z.m32 + queries + z.u * 2 * z.embd + extra)
    if settings.mla == 1 or z.ubatch < _MIN_MLA_PREFILL_UBATCH:
        wide = h.n_head * (2 * h.kv_lora_rank + h.rope_dim)
        return Regime("mla1_fa", z.m16 + z.u * (wide + z.q + 2 * z.embd))
    chunk = mla_chunk_bytes(h, settings)
    if settings.build >= IK_MLA_IN_GROUPS:
        live = z.u * (z.q + z.o + 3 * z.embd)
        return Regime("mla_fa", int(1.625 * chunk) + z.m16 + live)
    all_heads = 2 * z.cells * h.n_head * (h.head_dim_k + h.head_dim_v)
    if role.first:
        return Regime("mla_fa", all_heads + chunk + z.m32 + z.m16 + z.u * (z.q + z.embd))
    return Regime("mla_fa", all_heads + chunk + z.m16 + z.u * (z.q + 3 * z.embd))


def _host(z: _Sizes, settings: Settings, role: DeviceRole) -> list[Regime]:
    """Host buffers: graph inputs always, expert activations when the CPU computes them."""
    old_mask = settings.engine == "ik" and settings.build < IK_F16_MASK
    mask = z.m32 if old_mask or not settings.fa else z.m16
    found = [Regime("host", mask + z.u * z.embd)]
    if role.cpu_experts:
        found.append(Regime("host", max(z.m16 + z.u * (z.x + z.f), z.m32 + z.u * z.x)))
    return found
