"""Models from GGUF headers: the inverse of the ghost writer, and files of any origin."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from quantmix.errors import BadFile, UnknownName, UsageError
from quantmix.ggml.header import read_header
from quantmix.ggml.types import get
from quantmix.ggml.writer import NewTensor, encode_header, encode_metadata
from quantmix.models.arch import mla
from quantmix.models.catalog import catalog
from quantmix.models.ghost import write_ghost
from quantmix.models.model import HParams
from quantmix.models.sources import load_model


def plain(h: HParams) -> dict[str, Any]:
    """Hyper-parameters without what a file cannot tell."""
    values = asdict(h)
    values["indexer_layers"] = mla.indexer_layers(h)
    del values["indexer_proj_f32"]  # the dtype is in the tensor list
    if not h.nextn_in_gguf:  # dropped blocks leave no trace
        for name in ("nextn_layers", "nextn_embed", "nextn_head", "nextn_norm"):
            del values[name]
    if h.output_in_gguf:  # a stored head hides that the config ties it
        del values["tied_embeddings"]
    return values


@pytest.mark.parametrize("model_id", list(catalog()))
def test_file_tells_what_the_catalog_knows(model_id: str, tmp_path: Path) -> None:
    """A GGUF with a model's header gives back its id, hyper-parameters and tensors."""
    model = load_model(model_id)
    path = tmp_path / "m.gguf"
    write_ghost(path, model, lambda t: t.source_type)
    back = load_model(str(path))
    assert (back.id, back.arch, back.layout) == (model.id, model.arch, model.layout)
    assert back.tensors == model.tensors
    assert plain(back.hparams) == plain(model.hparams)
    assert back.header_bytes == read_header(path).data_offset
    assert back.source == str(path)


@pytest.mark.parametrize("layout", ["split", "legacy", "ik"])
def test_layout_is_read_from_the_tensors(layout: str, tmp_path: Path) -> None:
    """All three MLA layouts are recognised, and another one cannot be asked for."""
    path = tmp_path / "m.gguf"
    model = load_model("deepseek-r1", layout=layout)
    write_ghost(path, model, lambda t: t.source_type)
    back = load_model(str(path))
    assert (back.layout, back.id, back.tensors) == (layout, "deepseek-r1", model.tensors)
    assert back.hparams.head_dim_k == 192
    with pytest.raises(UsageError, match="stored as"):
        load_model(str(path), layout="legacy" if layout != "legacy" else "ik")


def write(path: Path, metadata: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> str:
    """Write a small file with f32 tensors."""
    new = [NewTensor(n, s, get("f32")) for n, s in shapes.items()]
    head, data = encode_header(encode_metadata(metadata), new)
    path.write_bytes(head + bytes(data))
    return str(path)


def test_unknown_architecture_is_taken_as_it_is(tmp_path: Path) -> None:
    """An architecture without a module keeps its tensors; the assumption is stated."""
    spec = write(
        tmp_path / "My Model-Q4_K_M.gguf",
        {"general.architecture": "newarch", "newarch.attention.head_count": 4},
        {
            "token_embd.weight": (64, 100),
            "blk.0.attn_q.weight": (64, 64),
            "blk.1.x.weight": (64, 2),
        },
    )
    model = load_model(spec)
    assert model.id == "my-model-q4_k_m"
    assert (model.hparams.n_layer, model.hparams.n_vocab, model.hparams.head_dim_k) == (2, 100, 16)
    assert "newarch" in model.notes[0]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "general.architecture is missing"),
        ({"general.architecture": 7}, "general.architecture is missing"),
        ({"general.architecture": "llama", "llama.block_count": "ten"}, "not a count"),
        ({"general.architecture": "llama", "llama.block_count": 1 << 40}, "not a count"),
        ({"general.architecture": "llama", "llama.block_count": 1 << 30}, "blocks"),
        ({"general.architecture": "llama", "llama.attention.head_count": -1}, "not a count"),
        (
            {"general.architecture": "llama", "llama.attention.head_count_kv": [1, -2]},
            "not a count",
        ),
    ],
)
def test_lying_metadata_is_refused(metadata: dict[str, Any], words: str, tmp_path: Path) -> None:
    """Keys of the wrong kind or size are named, never a traceback."""
    with pytest.raises(BadFile, match=words):
        load_model(write(tmp_path / "m.gguf", metadata, {"token_embd.weight": (8, 8)}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"llama.block_count": 0}, "block_count is 0, but there are tensors of block 1"),
        ({"llama.block_count": 1}, "block_count is 1, but there are tensors of block 1"),
        ({"llama.attention.head_count": 0}, "head_count is missing or zero"),
    ],
)
def test_counts_that_tensors_contradict_are_refused(
    changes: dict[str, Any], words: str, tmp_path: Path
) -> None:
    """An engine would refuse such a file, or a plan hold no KV cache."""
    meta = {"general.architecture": "llama", "llama.block_count": 2,
            "llama.attention.head_count": 2}  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (8, 9)}
    shapes |= {f"blk.{i}.attn_q.weight": (8, 8) for i in range(2)}
    assert load_model(write(tmp_path / "good.gguf", meta, shapes)).hparams.n_layer == 2
    with pytest.raises(BadFile, match=words):
        load_model(write(tmp_path / "m.gguf", {**meta, **changes}, shapes))


def test_files_without_tensors_and_flat_embeddings_are_refused(tmp_path: Path) -> None:
    """A vocabulary-only file and an embedding that is not a matrix are refused."""
    with pytest.raises(BadFile, match="no tensors"):
        load_model(write(tmp_path / "v.gguf", {"general.architecture": "llama"}, {}))
    flat = write(
        tmp_path / "f.gguf", {"general.architecture": "llama"}, {"token_embd.weight": (8,)}
    )
    with pytest.raises(BadFile, match="1 dimensions"):
        load_model(flat)


def test_paths_that_are_not_there(tmp_path: Path) -> None:
    """What is written as a path is not taken for a name, and the other way round."""
    for spec in ("./absent.gguf", str(tmp_path / "x.gguf"), "absent.gguf", "~/nothing-here"):
        with pytest.raises(BadFile):
            load_model(spec)
    for spec in ("", "no-such-model", "a\0b"):
        with pytest.raises(UnknownName):
            load_model(spec)


def test_folder_of_shards(tmp_path: Path) -> None:
    """A folder with the shards of one model is that model."""
    meta = {"general.architecture": "llama", "llama.attention.head_count": 2}
    split = {"split.count": 2, "split.tensors.count": 2}
    write(
        tmp_path / "m-00001-of-00002.gguf",
        {**meta, **split, "split.no": 0},
        {"token_embd.weight": (8, 9)},
    )
    write(tmp_path / "m-00002-of-00002.gguf", {**split, "split.no": 1}, {"output.weight": (8, 9)})
    model = load_model(str(tmp_path))
    assert [t.name for t in model.tensors] == ["token_embd.weight", "output.weight"]
    assert model.tensors[0].active_fraction == 0


def test_experts_of_old_files_are_read_in_part(tmp_path: Path) -> None:
    """Files from before experts were merged have one tensor per expert; few are read per token."""
    kv = {
        "general.architecture": "llama",
        "llama.block_count": 1,
        "llama.attention.head_count": 2,
        "llama.expert_count": 8,
        "llama.expert_used_count": 2,
    }
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (8, 9), "output.weight": (8, 9)}
    shapes["blk.0.ffn_gate_inp.weight"] = (8, 8)
    shapes |= {f"blk.0.ffn_down.{e}.weight": (16, 8) for e in range(8)}
    model = load_model(write(tmp_path / "old.gguf", kv, shapes))
    assert model.by_name["blk.0.ffn_down.3.weight"].active_fraction == 0.25
    assert model.by_name["blk.0.ffn_gate_inp.weight"].active_fraction == 1
    assert (model.hparams.n_expert, model.hparams.n_ff_exp) == (8, 16)
