"""A Model from GGUF headers: hyper-parameters from the metadata, the rest from the tensor list.

The inverse of metadata.py, for files of any origin: what a key does not say is read from the
shapes, and what neither says stays zero and is stated in the notes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from math import prod
from typing import Any, Final

from quantmix.errors import BadFile
from quantmix.ggml.header import RawArray
from quantmix.ggml.shards import GgufSet
from quantmix.models import trained
from quantmix.models.arch import ARCHITECTURES, base, trained_in
from quantmix.models.catalog import CatalogEntry, identify, slug
from quantmix.models.model import MAX_LAYERS, HParams, Layout, Model
from quantmix.units import ranges

Shapes = Mapping[str, tuple[int, ...]]
_QUANT_SUFFIX: Final = re.compile(
    r"[-._](bf16|f16|f32|fp16|fp8|u?d?-?i?q\d\w*|mxfp4\w*|moe|imat|i1|gguf)$", re.IGNORECASE
)


def model_from_gguf(
    found: GgufSet, source: str, data: Mapping[str, trained.StoredData] | None = None
) -> Model:
    """Build the model that headers describe; tensors keep their order and types.

    Args:
        data: where the data of local files lies: it says which weights were trained in 4 bits;
            without it the catalog does.

    Raises:
        BadFile: no tensors, or metadata that a model cannot have.
    """
    if not found.tensors:
        raise BadFile(f"{source} holds no tensors")
    kv = _Keys(found.metadata, source)
    arch = kv.text("general.architecture")
    if not arch:
        raise BadFile(
            f"{source}: general.architecture is missing, so nothing says what model it is"
        )
    shapes = {t.name: t.shape for t in found.tensors}
    h = hparams_of(kv.under(arch), shapes, arch)
    layout = layout_of(shapes)
    has_output = "output.weight" in shapes
    tensors = tuple(
        base.as_tensor(
            t.name,
            t.shape,
            t.type.name,
            h,
            has_output=has_output,
            has_k_b=layout == "ik",
            exact_type=trained_in(arch, t.type.name),
        )
        for t in found.tensors
    )
    name = kv.text("general.name")
    known = _known(arch, shapes, found.name, name, kv.text("general.basename"))
    notes: tuple[str, ...] = ()
    if arch not in ARCHITECTURES:
        notes = (
            f"architecture {arch!r} has no module of its own: tensors are taken as the file lists "
            "them, the KV cache is computed as plain attention",
        )
    model = Model(
        id=known.id if known else slug(found.name or name),
        arch=arch,
        layout=layout,
        hparams=h,
        tensors=tensors,
        source=source,
        header_bytes=found.header_bytes,
        display=known.display if known else name or found.name,
        notes=notes,
    )
    return trained.mark(model, _exact_types(model, known, data or {}))


def _exact_types(
    model: Model, known: CatalogEntry | None, data: Mapping[str, trained.StoredData]
) -> dict[str, str]:
    """Return by role the type that holds weights as trained: as the data says, else the catalog."""
    exact = trained.expert_roles(model, known.exact_experts) if known else {}
    seen = trained.roles_on_grid(model.tensors, data)
    exact |= {role: trained.GRID_TYPE for role, fits in seen.items() if fits}
    return {role: q for role, q in exact.items() if seen.get(role, True)}


def layout_of(shapes: Shapes) -> Layout:
    """Return which MLA tensors are there."""
    kinds = {n.split(".", 2)[2] for n in shapes if n.startswith("blk.") and n.count(".") > 1}
    has_kv_b, has_k_b = "attn_kv_b.weight" in kinds, "attn_k_b.weight" in kinds
    if has_kv_b:
        return "ik" if has_k_b else "legacy"
    return "split" if has_k_b else "plain"


def hparams_of(kv: _Keys, shapes: Shapes, arch: str) -> HParams:
    """Return the hyper-parameters from the keys of the architecture and the shapes.

    Raises:
        BadFile: a count is not a count, or the file cannot be a language model.
    """
    nextn = kv.count("nextn_predict_layers")
    blocks = kv.count("block_count") or blocks_in(shapes)
    if blocks > MAX_LAYERS:
        raise BadFile(f"{kv.source}: {blocks} blocks (at most {MAX_LAYERS} are believed)")
    in_file = 0 < nextn < blocks and any(n.startswith(f"blk.{blocks - 1}.nextn.") for n in shapes)
    n_layer = blocks - nextn if in_file else blocks
    embd = shapes.get("token_embd.weight", (kv.count("embedding_length"), 0))
    if len(embd) != 2:
        raise BadFile(f"{kv.source}: token_embd.weight has {len(embd)} dimensions, not 2")
    names = _Names(shapes, n_layer)
    if arch in ARCHITECTURES:
        _contradict(kv, names, blocks_in(shapes))
    return HParams(
        n_layer=n_layer,
        n_embd=embd[0],
        n_vocab=embd[1],
        **_attention(kv, names, arch, embd[0]),
        **_ffn(kv, names, arch),
        nextn_layers=nextn,
        nextn_in_gguf=in_file,
        nextn_embed=names.any("nextn.embed_tokens.weight"),
        nextn_head=names.any("nextn.shared_head_head.weight"),
        nextn_norm=names.any("nextn.shared_head_norm.weight"),
        tied_embeddings="output.weight" not in shapes,
        output_in_gguf="output.weight" in shapes,
        rope_freqs="rope_freqs.weight" in shapes,
        full_attn_interval=kv.count("full_attention_interval") or names.full_interval(),
        ssm_d_conv=kv.count("ssm.conv_kernel"),
        ssm_d_state=kv.count("ssm.state_size"),
        ssm_n_group=kv.count("ssm.group_count"),
        ssm_dt_rank=kv.count("ssm.time_step_rank"),
        indexer_n_head=kv.count("attention.indexer.head_count"),
        indexer_head_dim=kv.count("attention.indexer.key_length"),
        indexer_top_k=kv.count("attention.indexer.top_k"),
        indexer_layers=_ranges(names.layers_with("indexer.proj.weight"), blocks),
        ctx_train=kv.count("context_length"),
    )


def _contradict(kv: _Keys, names: _Names, blocks: int) -> None:
    """Refuse counts that the tensors contradict: an engine would, or plan no KV cache at all.

    Raises:
        BadFile: names key and tensors.
    """
    said = kv.metadata.get(f"{kv.prefix}block_count")
    if said is not None and kv.count("block_count") < blocks:
        raise BadFile(
            f"{kv.source}: {kv.prefix}block_count is {said}, but there are tensors of block "
            f"{blocks - 1}: convert the model again"
        )
    has_attention = names.any("attn_q.weight") or names.any("attn_qkv.weight")
    if has_attention and not max(kv.counts("attention.head_count"), default=0):
        raise BadFile(
            f"{kv.source}: {kv.prefix}attention.head_count is missing or zero: convert the model "
            "again"
        )


def _attention(kv: _Keys, names: _Names, arch: str, n_embd: int) -> dict[str, Any]:
    heads = kv.count("attention.head_count")
    mla = kv.count("attention.kv_lora_rank")
    even = n_embd // heads if heads else 0
    dk = kv.count("attention.key_length_mla") or kv.count("attention.key_length") or even
    dv = kv.count("attention.value_length_mla") or kv.count("attention.value_length") or even
    per_layer = kv.counts("attention.head_count_kv")
    kv_heads = max(per_layer, default=0) or heads
    norm = names.shape("attn_q_norm.weight")
    out: dict[str, Any] = {
        "n_head": heads,
        "n_head_kv": heads if mla else kv_heads,
        "head_dim_k": dk,
        "head_dim_v": dv,
        "q_lora_rank": kv.count("attention.q_lora_rank"),
        "kv_lora_rank": mla,
        "rope_dim": kv.count("rope.dimension_count") or dk,
        "qkv_bias": names.any("attn_q.bias"),
        "qk_norm": "" if norm is None or mla else "head" if norm[0] in (dk, 0) else "full",
        "attn_sinks": names.any("attn_sinks.weight"),
        "sliding_window": kv.count("attention.sliding_window"),
        "head_dim_swa": kv.count("attention.key_length_swa"),
    }
    if out["head_dim_swa"]:
        out["n_head_kv_full"] = min((n for n in per_layer if n), default=0)
        out["qk_norm"] = "head" if norm else ""
    out["swa_pattern"] = _swa_pattern(kv, arch) if out["sliding_window"] else ""
    return out


def _swa_pattern(kv: _Keys, arch: str) -> str:
    """Name the pattern as the catalog does, so that the KV model understands both alike."""
    if arch in ("gemma3", "gemma4"):
        return "5 SWA : 1 full (layer i full when (i+1)%6==0)"
    if arch == "gpt-oss":
        return "alternate: even layers SWA"
    if arch == "llama4":
        return "chunked: 3 of 4 layers (every 4th full/NoPE)"
    return str(kv.count("attention.sliding_window_pattern") or "")


def _ffn(kv: _Keys, names: _Names, arch: str) -> dict[str, Any]:
    is_moe = names.any("ffn_gate_inp.weight") or names.any("ffn_down_exps.weight")
    shexp = names.shape("ffn_up_shexp.weight")
    moe_layers = names.layers_with("ffn_down_exps.weight")
    step = kv.count("interleave_moe_layer_step") or 1
    shared = kv.count("expert_shared_count")
    down_exps = names.shape("ffn_down_exps.weight") or names.shape("ffn_down.0.weight")
    return {
        "n_ff": max(kv.counts("feed_forward_length"), default=0),
        "n_dense_lead": kv.count("leading_dense_block_count")
        or (moe_layers[0] if moe_layers and step == 1 else 0),
        "n_ff_exp": down_exps[0] if down_exps else 0,
        "n_ff_shexp": shexp[1] if shexp else 0,
        "n_expert": kv.count("expert_count") if is_moe else 0,
        "n_expert_used": kv.count("expert_used_count") if is_moe else 0,
        "n_expert_shared": shared or (1 if shexp else 0),
        "moe_layer_step": step,
        "exp_probs_b": names.any("exp_probs_b.bias"),
    }


class _Keys:
    """Metadata with checked kinds: a lying file must not become a traceback."""

    def __init__(self, metadata: Mapping[str, Any], source: str, prefix: str = "") -> None:
        self.metadata, self.source, self.prefix = metadata, source, prefix

    def under(self, arch: str) -> _Keys:
        """The keys of one architecture."""
        return _Keys(self.metadata, self.source, f"{arch}.")

    def text(self, key: str) -> str:
        """A string, empty when absent or of another kind."""
        value = self.metadata.get(self.prefix + key)
        return value if isinstance(value, str) else ""

    def counts(self, key: str) -> list[int]:
        """A count, or an array of counts, as a list; empty when absent."""
        value = self.metadata.get(self.prefix + key)
        items = value.tolist() if isinstance(value, RawArray) else [] if value is None else [value]
        for n in items:
            if type(n) not in (int, bool) or not 0 <= n < 1 << 31:
                raise BadFile(f"{self.source}: {self.prefix}{key} is {n!r}, not a count")
        return [int(n) for n in items]

    def count(self, key: str) -> int:
        """A count (the first of an array), zero when absent."""
        items = self.counts(key)
        return items[0] if items else 0


class _Names:
    """Which tensors the blocks hold."""

    def __init__(self, shapes: Shapes, n_layer: int) -> None:
        self.n_layer = n_layer
        self.by_suffix: dict[str, dict[int, tuple[int, ...]]] = {}
        for name, shape in shapes.items():
            parts = name.split(".", 2)
            if len(parts) == 3 and parts[0] == "blk" and parts[1].isdecimal():
                self.by_suffix.setdefault(parts[2], {})[int(parts[1])] = shape

    def any(self, suffix: str) -> bool:
        """Whether some block has it."""
        return suffix in self.by_suffix

    def shape(self, suffix: str) -> tuple[int, ...] | None:
        """Its shape in the last block that has it (Gemma 4 ends with a full layer)."""
        layers = self.by_suffix.get(suffix)
        return layers[max(layers)] if layers else None

    def layers_with(self, suffix: str) -> list[int]:
        """Blocks that have it."""
        return sorted(self.by_suffix.get(suffix, {}))

    def full_interval(self) -> int:
        """Every how many blocks a hybrid has full attention, zero for other models."""
        if not self.any("ssm_out.weight"):
            return 0
        full = self.layers_with("attn_q.weight")
        return full[0] + 1 if full else 0


def blocks_in(shapes: Shapes) -> int:
    """Count blocks by their highest number."""
    numbers = (n.split(".")[1] for n in shapes if n.startswith("blk."))
    return 1 + max((int(n) for n in numbers if n.isdecimal()), default=-1)


def _ranges(layers: list[int], n_blocks: int) -> str:
    """Write layers as the catalog does: `all` or `0-2,6,10` (`mla.indexer_layers` reads it)."""
    if layers and len(layers) == n_blocks:
        return "all"
    return ranges(layers, ",")


def _known(arch: str, shapes: Shapes, *names: str) -> CatalogEntry | None:
    """Return the catalog row that a file is of: a name says so, and its size agrees."""
    elements = sum(map(prod, shapes.values()))
    stems = filter(None, map(_stem, names))
    return next((e for s in stems if (e := identify(s, arch, elements))), None)


def _stem(name: str) -> str:
    """Cut quantization marks from the end: `DeepSeek-R1-UD-Q2_K_XL` → `DeepSeek-R1`."""
    text, before = "-".join(name.split()), ""
    while text != before:
        before, text = text, _QUANT_SUFFIX.sub("", text)
    return text
