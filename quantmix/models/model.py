"""What a model is to quantmix: hyper-parameters and a list of tensors, no weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Literal

Layout = Literal["split", "legacy", "ik", "plain"]

MAX_LAYERS = 4096  # more than any model has; bounds what a lying file can make us walk


@dataclass(frozen=True, slots=True)
class HParams:
    """Hyper-parameters that shape the tensor list, the KV cache and the compute graph.

    Names follow llama.cpp; zero or empty means "does not have it". For MLA models `head_dim_k` and
    `head_dim_v` are the decompressed sizes (`nope + rope`, `v`), as in `key_length_mla`.
    `n_layer` counts trunk layers only: an MTP block in the file is layer `n_layer`.
    """

    n_layer: int
    n_embd: int
    n_vocab: int
    n_head: int
    n_head_kv: int
    head_dim_k: int
    head_dim_v: int
    n_ff: int = 0
    n_dense_lead: int = 0
    n_ff_exp: int = 0
    n_ff_shexp: int = 0
    n_expert: int = 0
    n_expert_used: int = 0
    n_expert_shared: int = 0
    moe_layer_step: int = 1
    q_lora_rank: int = 0
    kv_lora_rank: int = 0
    rope_dim: int = 0
    nextn_layers: int = 0
    nextn_in_gguf: bool = False
    nextn_embed: bool = False
    nextn_head: bool = False
    nextn_norm: bool = False
    tied_embeddings: bool = False
    output_in_gguf: bool = True
    rope_freqs: bool = False
    qkv_bias: bool = False
    qk_norm: str = ""
    exp_probs_b: bool = False
    attn_sinks: bool = False
    sliding_window: int = 0
    swa_pattern: str = ""
    head_dim_swa: int = 0
    n_head_kv_full: int = 0
    full_attn_interval: int = 0
    ssm_d_conv: int = 0
    ssm_d_state: int = 0
    ssm_n_group: int = 0
    ssm_dt_rank: int = 0
    indexer_n_head: int = 0
    indexer_head_dim: int = 0
    indexer_top_k: int = 0
    indexer_layers: str = ""
    indexer_proj_f32: bool = False
    ctx_train: int = 0

    @property
    def is_mla(self) -> bool:
        """Whether attention keeps a compressed KV (DeepSeek's multi-head latent attention)."""
        return self.kv_lora_rank > 0

    @property
    def is_moe(self) -> bool:
        """Whether any layer has routed experts."""
        return self.n_expert > 0


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a GGUF file.

    Attributes:
        name: as in the file, `blk.3.ffn_down_exps.weight`.
        shape: ggml order, row length (ne0) first, trailing ones dropped.
        source_type: ggml type in the source (`bf16`, `f32`, `mxfp4`, …).
        role: the name without layer and `.weight` suffix: `ffn_down_exps`, `token_embd`;
            a bias keeps its suffix: `attn_q.bias`.
        layer: block index, None for tensors outside the blocks.
        active_fraction: share of its bytes read for one generated token (experts used / experts;
            0 for the input embedding and unloaded MTP blocks).
        quantizable: whether llama-quantize may change its type at all.
        loaded: False when it is in the file but not loaded for inference (MTP blocks).
        exact_type: ggml type that holds the weights as they were trained, when it is made with an
            importance matrix (models/trained.py); empty for most.
    """

    name: str
    shape: tuple[int, ...]
    source_type: str
    role: str
    layer: int | None
    active_fraction: float = 1.0
    quantizable: bool = True
    loaded: bool = True
    exact_type: str = ""

    @property
    def n_elements(self) -> int:
        """Number of weights."""
        return prod(self.shape)

    @property
    def ncols(self) -> int:
        """Row length (ne0)."""
        return self.shape[0]

    @property
    def nrows(self) -> int:
        """Number of rows over all further dimensions."""
        return prod(self.shape[1:])


@dataclass(frozen=True)
class Model:
    """A model: identity, hyper-parameters, tensors in file order.

    Attributes:
        id: catalog id, or a name made from the file.
        arch: GGUF `general.architecture`.
        layout: which of attn_kv_b / attn_k_b / attn_v_b an MLA file holds; else `plain`.
        source: `catalog`, or where the header came from.
        header_bytes: exact size of header and padding when a real header was read, else None.
        display: name for people.
        notes: what was assumed of it, one sentence each.
    """

    id: str
    arch: str
    layout: Layout
    hparams: HParams
    tensors: tuple[Tensor, ...]
    source: str = "catalog"
    header_bytes: int | None = None
    display: str = ""
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def n_elements(self) -> int:
        """Number of weights over all tensors."""
        return sum(t.n_elements for t in self.tensors)

    @cached_property
    def by_name(self) -> dict[str, Tensor]:
        """Tensors by name."""
        return {t.name: t for t in self.tensors}
