"""Importance-matrix files of both formats."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantmix.errors import BadFile
from quantmix.ggml import imatrix, types
from quantmix.ggml.imatrix import Entry, Imatrix
from quantmix.ggml.writer import NewTensor, encode_header, encode_metadata

SHAPES = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 40)), min_size=1, max_size=4)


def _made(shapes: list[tuple[int, int]], seed: int) -> Imatrix:
    rng = np.random.default_rng(seed)
    entries = {
        f"blk.{i}.ffn_up.weight": Entry(
            rng.random((n, c), np.float32) + np.float32(0.01),
            rng.integers(1, 900, n).astype(np.float32),
        )
        for i, (n, c) in enumerate(shapes)
    }
    return Imatrix(entries, "some text.txt", 7, 512)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 2**31))
def test_gguf_keeps_everything(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]], seed: int
) -> None:
    """Sums, counts per expert, dataset and chunks survive the GGUF format."""
    made, path = _made(shapes, seed), tmp_path_factory.mktemp("i") / "i.gguf"
    imatrix.write(made, path)
    found = imatrix.read(path)
    assert (found.dataset, found.chunks, found.chunk_size) == ("some text.txt", 7, 512)
    assert found.entries.keys() == made.entries.keys()
    for name, entry in made.entries.items():
        np.testing.assert_array_equal(found.entries[name].sums, entry.sums)
        np.testing.assert_array_equal(found.entries[name].counts, entry.counts)


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 2**31))
def test_legacy_keeps_the_means(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int]], seed: int
) -> None:
    """The legacy format has one count, but the means of every expert survive."""
    made, path = _made(shapes, seed), tmp_path_factory.mktemp("i") / "i.dat"
    imatrix.write(made, path)
    found = imatrix.read(path)
    for name, entry in made.entries.items():
        n, c = entry.sums.shape
        fitting = imatrix.shaped(found.entries[name], (c, 3, n))
        assert fitting is not None
        np.testing.assert_allclose(fitting.means(), entry.means(), rtol=1e-6)


def test_legacy_layout_is_the_engines(tmp_path: Path) -> None:
    """Byte for byte: counts, names, ncall, nval, values = mean · ncall, last chunk, dataset."""
    entry = Entry(np.array([[2.0, 4.0]], np.float32), np.array([4.0], np.float32))
    imatrix.write_dat(Imatrix({"t": entry}, "d", 3), tmp_path / "i.dat")
    want = struct.pack("<ii", 1, 1) + b"t" + struct.pack("<ii2f", 3, 2, 1.5, 3.0)
    want += struct.pack("<ii", 3, 1) + b"d"
    assert (tmp_path / "i.dat").read_bytes() == want


def test_an_expert_that_never_ran_gets_ones(tmp_path: Path) -> None:
    """One silent expert of 32 becomes ones; with two of 32 the entry is left out, as ik does."""

    def with_silent(n: int) -> Imatrix:
        counts = np.full(32, 5, np.float32)
        counts[:n] = 0
        sums = np.where(counts[:, None] > 0, 10, 0).repeat(4, axis=1).astype(np.float32)
        return Imatrix({"e": Entry(sums, counts)}, chunks=1)

    assert imatrix.write_dat(with_silent(1), tmp_path / "one.dat") == []
    means = imatrix.shaped(imatrix.read(tmp_path / "one.dat").entries["e"], (4, 1, 32))
    assert means is not None
    assert means.means()[0].tolist() == [1, 1, 1, 1]
    assert means.means()[1].tolist() == [2, 2, 2, 2]
    assert imatrix.write_dat(with_silent(2), tmp_path / "two.dat") == ["e"]


@given(st.integers(0, 200))
@settings(max_examples=60, deadline=None)
def test_truncated_files_are_refused(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """A legacy file cut anywhere but at its optional tail is refused."""
    folder = tmp_path_factory.mktemp("i")
    imatrix.write_dat(_made([(1, 20), (2, 15)], 0), folder / "i.dat")
    raw = (folder / "i.dat").read_bytes()
    tail = 8 + len("some text.txt")
    keep = (len(raw) - tail - 1) * cut // 200
    (folder / "cut.dat").write_bytes(raw[:keep])
    with pytest.raises(BadFile):
        imatrix.read(folder / "cut.dat")


@pytest.mark.parametrize("raw", [b"", b"nonsense" * 9, struct.pack("<i", 2**31 - 1)])
def test_noise_is_refused(tmp_path: Path, raw: bytes) -> None:
    """What is no imatrix is refused, without reading what it claims."""
    (tmp_path / "x").write_bytes(raw)
    with pytest.raises(BadFile):
        imatrix.read(tmp_path / "x")


def test_nan_is_refused(tmp_path: Path) -> None:
    """An imatrix with NaN is refused, since quantizers would write garbage from it."""
    entry = Entry(np.array([[np.nan]], np.float32), np.ones(1, np.float32))
    imatrix.write_dat(Imatrix({"t": entry}), tmp_path / "i.dat")
    with pytest.raises(BadFile, match="NaN"):
        imatrix.read(tmp_path / "i.dat")


@pytest.mark.parametrize("key", ["imatrix.chunk_count", "imatrix.chunk_size"])
def test_counts_that_are_no_numbers_are_refused(tmp_path: Path, key: str) -> None:
    """A string as the number of chunks, or their size, is one clear error."""
    f32 = types.get("f32")
    keys = {"general.type": "imatrix", key: "many"}
    names = [NewTensor("a.in_sum2", (4, 1), f32), NewTensor("a.counts", (1, 1), f32)]
    head, n_bytes = encode_header(encode_metadata(keys), names)
    (tmp_path / "i.gguf").write_bytes(head + bytes(n_bytes))
    with pytest.raises(BadFile, match=f"{key} is 'many', no whole number"):
        imatrix.read(tmp_path / "i.gguf")


def test_problems_names_what_a_run_would_trip_over() -> None:
    """Missing entries of types that need one, and entries of a wrong shape; the head is exempt."""
    entry = Entry(np.ones((1, 256), np.float32), np.ones(1, np.float32))
    matrix = Imatrix({"blk.0.ffn_up.weight": entry})
    iq2, q4 = types.get("iq2_kt"), types.get("q4_K")
    assert imatrix.problems(matrix, [("blk.0.ffn_up.weight", (256, 8), iq2)]) == []
    assert imatrix.problems(matrix, [("blk.0.ffn_down.weight", (256, 8), q4)]) == []
    assert imatrix.problems(matrix, [("output.weight", (256, 8), iq2)]) == []
    (missing,) = imatrix.problems(matrix, [("blk.0.ffn_down.weight", (256, 8), iq2)])
    assert "has none" in missing
    (unfit,) = imatrix.problems(matrix, [("blk.0.ffn_up.weight", (512, 8), q4)])
    assert "needs 512" in unfit


def test_mainline_borrows_nothing() -> None:
    """mainline looks up a tensor's own name alone (src/llama-quant.cpp), so gate lacks its data."""
    entry = Entry(np.ones((1, 256), np.float32), np.ones(1, np.float32))
    matrix = Imatrix({"blk.0.ffn_up.weight": entry})
    gate = "blk.0.ffn_gate.weight"
    assert imatrix.lookup(matrix, gate, "mainline") is None
    assert imatrix.lookup(matrix, "blk.0.ffn_up.weight", "mainline") is entry
    planned = [(gate, (256, 8), types.get("iq2_xs", "mainline"))]
    assert imatrix.problems(matrix, planned, "ik") == []
    assert imatrix.problems(matrix, planned, "mainline") == [
        f"{gate} as iq2_xs needs an entry and has none"
    ]


def test_gate_borrows_from_up_as_in_ik() -> None:
    """ik looks up ffn_up for ffn_gate, kv_b for v_b, and nothing for k_b."""
    entry = Entry(np.ones((1, 4), np.float32), np.ones(1, np.float32))
    matrix = Imatrix({"blk.0.ffn_up.weight": entry, "blk.0.attn_kv_b.weight": entry})
    assert imatrix.lookup(matrix, "blk.0.ffn_gate.weight") is entry
    assert imatrix.lookup(matrix, "blk.0.attn_v_b.weight") is entry
    assert imatrix.lookup(matrix, "blk.0.attn_k_b.weight") is None
    assert imatrix.lookup(matrix, "blk.0.ffn_down.weight") is None
