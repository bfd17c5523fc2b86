"""A Model from a Hugging Face checkpoint that was never converted: what its GGUF would hold.

For known families the tensor list follows from `config.json`; the names in the safetensors index
or headers settle what a config does not say (a stored head although tied, MTP tensors, biases).
For unknown ones the shapes in the safetensors headers are taken and common names translated; the
notes say what was assumed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any, Final

from quantmix.errors import BadFile
from quantmix.ggml.types import drop_ones
from quantmix.models import hf_names
from quantmix.models.arch import base, tensors_of
from quantmix.models.catalog import identify, slug
from quantmix.models.from_gguf import blocks_in
from quantmix.models.hf_config import Config, architecture_of, read_config
from quantmix.models.model import HParams, Layout, Model
from quantmix.models.safetensors import Shape, parse_json, read_shapes
from quantmix.models.trained import expert_roles, mark

INDEX: Final = "model.safetensors.index.json"
_MAX_JSON_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Checkpoint:
    """What is known of the stored tensors: names, and shapes (HF order) when headers were read."""

    names: frozenset[str] = frozenset()
    shapes: Mapping[str, tuple[str, Shape]] = field(default_factory=dict)

    def has(self, pattern: str) -> bool:
        """Whether a name matches."""
        regex = re.compile(pattern)
        return any(regex.search(n) for n in self.names)


def model_from_folder(folder: Path, layout: str | None = None) -> Model:
    """Return the model of a local checkpoint.

    Raises:
        BadFile: no readable config.json, headers that contradict it, or nothing to go by.
        UsageError: the layout does not fit.
    """
    config = parse_json(_read(folder / "config.json"), str(folder / "config.json"))
    return model_from_config(
        config, read_checkpoint(folder), folder.resolve().name, str(folder), layout
    )


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read the index and the headers of all safetensors files that are there.

    Raises:
        BadFile: an index or header is malformed.
    """
    names: set[str] = set()
    shapes: dict[str, tuple[str, Shape]] = {}
    if (folder / INDEX).is_file():
        names |= index_names(_read(folder / INDEX), str(folder / INDEX))
    for file in sorted(folder.glob("*.safetensors")):
        shapes |= read_shapes(file)
    complete = bool(shapes) and names <= set(shapes)
    return Checkpoint(frozenset(names | set(shapes)), shapes if complete else {})


def index_names(raw: bytes, where: str) -> set[str]:
    """Return the tensor names of a safetensors index.

    Raises:
        BadFile: not an index.
    """
    weights = parse_json(raw, where).get("weight_map")
    if not isinstance(weights, dict):
        raise BadFile(f"{where} has no weight_map")
    return set(weights)


def model_from_config(
    raw: Mapping[str, Any], checkpoint: Checkpoint, name: str, source: str, layout: str | None
) -> Model:
    """Return the model that a config and what is known of the tensors describe.

    Raises:
        BadFile: a key is missing or wrong, or an unknown family without safetensors headers.
        UsageError: the layout does not fit.
    """
    from quantmix.models.sources import layout_for

    config = Config(raw, f"{source}: config.json")
    arch = architecture_of(config)
    if arch is None:
        return _unknown(config, checkpoint, name, source)
    h, notes = _settle(read_config(config), arch, checkpoint)
    chosen: Layout = layout_for(arch, name, layout)
    model = Model(
        id=name,
        arch=arch,
        layout=chosen,
        hparams=h,
        tensors=tensors_of(h, arch, chosen),
        source=source,
        display=name,
        notes=tuple(notes),
    )
    return _named(_compared(model, checkpoint))


def _settle(h: HParams, arch: str, stored: Checkpoint) -> tuple[HParams, list[str]]:
    """Replace assumptions by what the checkpoint's names show."""
    notes: list[str] = []
    if not stored.names:
        if h.nextn_in_gguf:
            notes.append(
                "no safetensors index: the MTP block is assumed to have no embedding or head of "
                "its own"
                if not h.nextn_embed
                else "no safetensors index: the MTP block is assumed to be complete"
            )
        if h.tied_embeddings:
            notes.append("no safetensors index: no head is stored, embeddings being tied")
        return h, notes
    changes: dict[str, Any] = {}
    if h.tied_embeddings:
        changes["output_in_gguf"] = stored.has(r"(^|\.)lm_head\.weight$")
    if h.nextn_in_gguf:
        mtp = rf"\.layers\.{h.n_layer}\."
        there = stored.has(mtp)
        changes |= {
            "nextn_in_gguf": there,
            "nextn_embed": stored.has(mtp + r"embed_tokens\.weight$"),
            "nextn_head": stored.has(mtp + r"shared_head\.head\.weight$"),
            "nextn_norm": stored.has(mtp + r"shared_head\.norm\.weight$"),
        }
    if arch in ("llama", "qwen3", "qwen3moe", "glm4moe"):
        changes["qkv_bias"] = stored.has(r"\.q_proj\.bias$")
    return replace(h, **changes), notes


def _compared(model: Model, stored: Checkpoint) -> Model:
    """Add a note when the safetensors headers hold another number of weights."""
    if not stored.shapes or any(hf_names.is_packed(n) for n in stored.shapes):
        return model
    kept = {n: s for n, (_, s) in stored.shapes.items() if hf_names.in_text_gguf(n, model.hparams)}
    counted = sum(prod(s) for s in kept.values())
    generated = sum(t.n_elements for t in model.tensors if t.role != "rope_freqs")
    if abs(counted - generated) <= 1e-4 * counted:
        return model
    note = (
        f"the safetensors headers hold {counted:,} weights for {len(kept)} tensors, the list made "
        f"from config.json {generated:,}: compare them before relying on sizes"
    )
    return replace(model, notes=(*model.notes, note))


def _named(model: Model) -> Model:
    """Take the catalog's id when name, architecture and size agree."""
    entry = identify(model.display, model.arch, model.n_elements)
    if entry is None:
        return replace(model, id=slug(model.id))
    known = replace(model, id=entry.id, display=entry.display)
    return mark(known, expert_roles(known, entry.exact_experts))


def _unknown(config: Config, stored: Checkpoint, name: str, source: str) -> Model:
    """Take shapes as they are, translating the names that most models share."""
    kind = config.model_type or "without model_type"
    if not stored.shapes:
        raise BadFile(
            f"{config.where}: architecture {kind!r} is unknown and no complete set of safetensors "
            "headers is there to read shapes from: convert it to GGUF first"
        )
    if any(hf_names.is_packed(n) for n in stored.shapes):
        raise BadFile(
            f"{config.where}: architecture {kind!r} is unknown and its weights are packed: "
            "convert it to GGUF first"
        )
    entries, dropped, untranslated = hf_names.translate(stored.shapes)
    h = _guess(config, dict(entries))
    has_output = any(n == "output.weight" for n, _ in entries)
    tensors = tuple(
        base.as_tensor(n, s, base.source_type(n, drop_ones(s), h, False), h, has_output=has_output)
        for n, s in entries
    )
    notes = [
        f"architecture {kind!r} is unknown: shapes are those of the safetensors headers, names "
        "were translated by convention, experts merged per layer, matrices assumed to become "
        "bf16; a converter may merge, split or transpose some",
        "the KV cache is computed as plain attention",
    ]
    if untranslated:
        notes.append(f"{len(untranslated)} names kept as they are, as {untranslated[0]!r}")
    if dropped:
        notes.append(f"{dropped} tensors left out (vision, audio, scales)")
    model = Model(
        id=name,
        arch=config.model_type or "unknown",
        layout="plain",
        hparams=h,
        tensors=tensors,
        source=source,
        display=name,
        notes=tuple(notes),
    )
    return _named(model)


def _guess(config: Config, shapes: Mapping[str, Shape]) -> HParams:
    """Read what most configs call alike; zero where they do not."""
    embd = shapes.get("token_embd.weight", (config.count("hidden_size", default=0), 0))
    heads = config.count("num_attention_heads", "n_head", default=0)
    dim = config.count("head_dim", default=embd[0] // heads if heads else 0)
    experts = config.count("num_experts", "n_routed_experts", "num_local_experts", default=0)
    return HParams(
        n_layer=config.count("num_hidden_layers", "n_layer", default=0) or blocks_in(shapes),
        n_embd=embd[0],
        n_vocab=embd[-1],
        n_head=heads,
        n_head_kv=config.count("num_key_value_heads", default=heads),
        head_dim_k=dim,
        head_dim_v=dim,
        n_ff=config.count("intermediate_size", default=0),
        n_expert=experts,
        n_expert_used=config.count("num_experts_per_tok", "moe_top_k", default=0),
        rope_dim=dim,
        tied_embeddings="output.weight" not in shapes,
        output_in_gguf="output.weight" in shapes,
        ctx_train=config.count("max_position_embeddings", default=0),
    )


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise BadFile(
                f"{path} is larger than {_MAX_JSON_BYTES >> 20} MiB: not what it should be"
            )
        return path.read_bytes()
    except OSError as err:
        raise BadFile(f"{path} cannot be read: {err.strerror or err}") from err
