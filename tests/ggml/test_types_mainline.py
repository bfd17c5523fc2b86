"""The table of mainline's types against mainline's own library: sizes and fallbacks."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest

from quantmix.engine.mainline import dry_run, rules_of, type_sizes
from quantmix.engine.mainline_find import Mainline
from quantmix.errors import EngineError, UsageError
from quantmix.ggml import types

pytestmark = pytest.mark.engine

LENGTHS = (32, 64, 128, 256, 576, 768, 1408, 2880, 4096, 7168, 18432)
ODD_LENGTHS = (96, 100, 128, 576, 1408, 2880)


def ghost_with(path: Path, shapes: dict[str, tuple[int, int]]) -> Path:
    """Write a small llama GGUF that holds bf16 matrices of the given (columns, rows)."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(1)
    writer.add_context_length(4096)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(64)
    for name, (ncols, nrows) in shapes.items():
        data = np.zeros((nrows, ncols * 2), np.uint8)
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_row_is_what_the_library_says(mainline: Mainline) -> None:
    """Ids, names, block sizes, bytes per block and row bytes equal ggml's for every type."""
    facts = type_sizes(mainline, LENGTHS)
    live = {i: f for i, f in enumerate(facts) if f["block_size"]}
    assert {i: f["name"] for i, f in live.items()} == {
        t.id: t.name for t in types.table("mainline").values()
    }
    for i, fact in live.items():
        ours = types.by_id("mainline")[i]
        assert (ours.block_size, ours.type_size) == (fact["block_size"], fact["type_size"])
        assert ours.row_meta == 0
        for length, row_bytes in fact["row_bytes"].items():
            assert ours.row_bytes(int(length)) == row_bytes, (ours.name, length)


def test_resolve_is_what_the_quantizer_chooses(mainline: Mainline, tmp_path: Path) -> None:
    """For every writable type and odd row length, `resolve` names the type the engine takes."""
    asked, wanted = {}, {}
    for qtype in types.table("mainline").values():
        if not qtype.writable or not qtype.is_quantized:
            continue
        for ncols in (*ODD_LENGTHS, 256):
            name = f"blk.0.{qtype.name.lower()}_{ncols}.weight"
            try:
                wanted[name] = types.resolve(qtype.name, name, (ncols, 4), "mainline").name
            except UsageError:
                continue
            asked[name] = (qtype.name, ncols)
    ghost = ghost_with(tmp_path / "g.gguf", {n: (c, 4) for n, (_, c) in asked.items()})
    run = dry_run(ghost, rules_of({n: t for n, (t, _) in asked.items()}), engine=mainline)
    assert {n: t.type for n, t in run.tensors.items()} == wanted
    assert {n for n, t in run.tensors.items() if t.fell_back} == {
        n for n, (t, _) in asked.items() if wanted[n] != t
    }
    assert all(t.print_agrees for t in run.tensors.values())
    for name, tensor in run.tensors.items():
        assert tensor.bytes == types.get(tensor.type, "mainline").tensor_bytes(tensor.shape), name


def test_what_resolve_refuses_the_engine_refuses(mainline: Mainline, tmp_path: Path) -> None:
    """A type that has no fallback for a row length stops mainline, and `resolve` too."""
    refused = []
    for qtype in types.table("mainline").values():
        if not qtype.writable or not qtype.is_quantized:
            continue
        for ncols in ODD_LENGTHS:
            try:
                types.resolve(qtype.name, "blk.0.x.weight", (ncols, 4), "mainline")
            except UsageError:
                refused.append((qtype.name, ncols))
    assert refused
    for i, (name, ncols) in enumerate(refused):
        ghost = ghost_with(tmp_path / f"{i}.gguf", {"blk.0.x.weight": (ncols, 4)})
        with pytest.raises(EngineError, match="fallback"):
            dry_run(ghost, [("x", name)], engine=mainline)
