"""The header reader: equal to the gguf package on good files, clear and bounded on bad ones."""

from __future__ import annotations

import os
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantmix import demo
from quantmix.errors import BadFile
from quantmix.files import cache_folder
from quantmix.ggml.header import Header, RawArray, parse, read_header
from quantmix.ggml.types import get
from quantmix.ggml.writer import NewTensor, copy_metadata, encode_header, encode_metadata


class Bytes:
    """Bytes in memory as a source."""

    def __init__(self, data: bytes, size: int | None = None) -> None:
        self.data, self.name = data, "memory.gguf"
        self.size = len(data) if size is None else size

    def read(self, offset: int, count: int) -> bytes:
        return self.data[offset : offset + count]


def rich_file(path: Path) -> None:
    """Write, with the gguf package, a file that has every value type and several tensor types."""
    w = gguf.GGUFWriter(path, "llama")
    w.add_uint8("t.u8", 200)
    w.add_int8("t.i8", -5)
    w.add_uint16("t.u16", 60000)
    w.add_int16("t.i16", -300)
    w.add_uint32("t.u32", 4_000_000_000)
    w.add_int32("t.i32", -70000)
    w.add_uint64("t.u64", 1 << 60)
    w.add_int64("t.i64", -(1 << 60))
    w.add_float32("t.f32", 0.5)
    w.add_float64("t.f64", 1e-300)
    w.add_bool("t.bool", True)
    w.add_string("t.str", "blé 🦙")
    w.add_array("t.strings", ["", "a", "zwölf" * 50])
    w.add_array("t.ints", [1, -2, 3])
    w.add_array("t.floats", [0.25, 4.0])
    w.add_array("t.bools", [True, False])
    w.add_tensor("a.weight", np.zeros((3, 64), np.float32))
    w.add_tensor("b.bias", np.zeros(5, np.float16))
    w.add_tensor("c.weight", np.zeros((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()


def same_as_package(path: Path) -> None:
    """Compare field by field with the gguf package's reader."""
    ours, theirs = read_header(path), gguf.GGUFReader(path)
    fields = {k: f for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert list(ours.metadata) == list(fields)
    for key, f in fields.items():
        value = ours.metadata[key]
        mine = value.tolist() if isinstance(value, RawArray) else value
        real = f.contents()
        assert mine == (list(real) if isinstance(real, list) else real), key
    assert ours.alignment == theirs.alignment
    assert ours.data_offset == theirs.data_offset
    assert [
        (t.name, list(t.shape), t.type.id, t.n_bytes, ours.data_offset + t.offset)
        for t in ours.tensors
    ] == [
        (t.name, [int(n) for n in t.shape], int(t.tensor_type), int(t.n_bytes), int(t.data_offset))
        for t in theirs.tensors
    ]


def test_every_value_type_equals_the_gguf_package(tmp_path: Path) -> None:
    """All twelve value types and the tensor list read as the gguf package reads them."""
    rich_file(tmp_path / "rich.gguf")
    same_as_package(tmp_path / "rich.gguf")


@pytest.mark.slow
def test_a_real_file_equals_the_gguf_package() -> None:
    """SmolLM2 as published, vocabulary included, reads as the gguf package reads it."""
    demo.build("plain")
    published = cache_folder() / "SmolLM2-135M-Instruct.Q4_1.gguf"
    same_as_package(published if published.is_file() else demo.build("plain").path)


def test_copied_metadata_is_identical(tmp_path: Path) -> None:
    """A header copied through `copy_metadata` keeps its metadata byte for byte."""
    rich_file(tmp_path / "rich.gguf")
    ours = read_header(tmp_path / "rich.gguf")
    kv = copy_metadata(ours)
    assert (kv.count, kv.data) == (len(ours.metadata), ours.kv_bytes)
    fewer = copy_metadata(ours, ("t.str",))
    assert fewer.count == kv.count - 2


def small(**changes: Any) -> bytes:
    """A small valid file (header and data), with raw replacements of whole parts."""
    kv = encode_metadata({"general.architecture": "llama", "x.list": ["a", "bc"], "x.n": 7})
    head, data = encode_header(
        kv, [NewTensor("a.weight", (256, 4), get("q4_K")), NewTensor("b", (3,), get("f32"))]
    )
    raw = bytearray(head + bytes(data))
    for at, value in changes.get("patch", {}).items():
        raw[at : at + len(value)] = value
    return bytes(raw)


def at(needle: bytes) -> int:
    """Offset of `needle` in the small file."""
    return small().index(needle)


U64 = struct.Struct("<Q").pack
U32 = struct.Struct("<I").pack
NAME = at(b"a.weight")
DIMS = NAME + 8 + 4
LIE = {
    "counts of 2^60 tensors": ({8: U64(1 << 60)}, "claims"),
    "counts of 2^60 keys": ({16: U64(1 << 60)}, "claims"),
    "more tensors than bytes": ({8: U64(100_000)}, "ends too early"),
    "key of 4 GiB": ({24: U64(4 << 30)}, "a string of 4294967296 bytes"),
    "array of 2^60": ({at(b"x.list") + 14: U64(1 << 60)}, "more than"),
    "array of 2^60 numbers": (
        {at(b"x.list") + 10: U32(4), at(b"x.list") + 14: U64(1 << 60)},
        "ends too early",
    ),
    "unknown array type": ({at(b"x.list") + 10: U32(77)}, "unknown type 77"),
    "unknown value type": ({at(b"x.n") + 3: U32(99)}, "unknown value type 99"),
    "array string past the end": ({at(b"x.list") + 22: U64(1 << 62)}, "ends too early"),
    "name of 4 GiB": ({NAME - 8: U64(4 << 30)}, "a string of 4294967296 bytes"),
    "name not UTF-8": ({NAME: b"\xff\xfe"}, "not UTF-8"),
    "name with a zero byte": ({NAME: b"\0"}, "zero-holding"),
    "no dimension": ({NAME + 8: U32(0)}, "0 dimensions"),
    "nine dimensions": ({NAME + 8: U32(9)}, "9 dimensions"),
    "zero dimension": ({DIMS: U64(0)}, "impossible shape 0x4"),
    "overflowing shape": ({DIMS: U64(1 << 60)}, "impossible shape"),
    "row that does not divide": ({DIMS: U64(255)}, "does not divide"),
    "unknown ggml type": ({DIMS + 16: U32(4321)}, "type 4321"),
    "offset past the end": ({DIMS + 20: U64(1 << 50)}, "truncated, or the header lies"),
    "unaligned offset": ({DIMS + 20: U64(1)}, "multiple of 32"),
    "overlap": ({at(b"\x01\0\0\0\0\0\0\0b") + 9 + 16: U64(32)}, "overlaps"),
    "same name twice": ({at(b"x.list"): b"x.n\0\0\0"}, "zero-holding"),
    "magic": ({0: b"GGML"}, "not a GGUF file"),
    "version 1": ({4: U32(1)}, "version 1"),
    "big-endian": ({4: b"\0\0\0\3"}, "big-endian"),
}


@pytest.mark.parametrize("what", list(LIE))
def test_lie_is_named(what: str) -> None:
    """Each kind of lie is refused with its own words and the file's name."""
    patch, words = LIE[what]
    with pytest.raises(BadFile, match=words) as err:
        parse(Bytes(small(patch=patch)))
    assert "memory.gguf" in str(err.value)
    assert "\n" not in str(err.value)


def test_duplicates_are_refused() -> None:
    """A key or a tensor name that appears twice is refused."""
    kv = encode_metadata({"a": 1})
    twice = type(kv)(2, kv.data * 2)
    with pytest.raises(BadFile, match="the key 'a' twice"):
        parse(Bytes(encode_header(twice, [])[0]))
    head, data = encode_header(kv, [NewTensor("t", (1,), get("f32"))] * 2)
    with pytest.raises(BadFile, match="the tensor 't' twice"):
        parse(Bytes(head + bytes(data)))


def test_names_have_room_for_their_zero() -> None:
    """A tensor name has at most 63 bytes: GGML_MAX_NAME, 64, counts the zero at its end."""
    for n, ok in ((63, True), (64, False)):
        head, data = encode_header(
            encode_metadata({"a": 1}), [NewTensor("t" * n, (1,), get("f32"))]
        )
        if ok:
            assert len(parse(Bytes(head + bytes(data))).tensors[0].name) == n
        else:
            with pytest.raises(BadFile, match="a string of 64 bytes"):
                parse(Bytes(head + bytes(data)))


@pytest.mark.parametrize("cut", range(0, len(small()), 7))
def test_every_truncation_is_refused(cut: int) -> None:
    """A file cut anywhere before the last tensor byte is refused, never half read."""
    if cut >= len(small()) - 20:
        return
    with pytest.raises(BadFile):
        parse(Bytes(small()[:cut]))


def test_missing_and_odd_files(tmp_path: Path) -> None:
    """Absent files, folders, empty files and names with a zero byte are one clear error each."""
    (tmp_path / "empty.gguf").touch()
    for path, words in (
        (tmp_path / "absent.gguf", "is not a file"),
        (tmp_path, "is not a file"),
        (tmp_path / "empty.gguf", "is empty"),
        ("a\0b.gguf", "a"),
    ):
        with pytest.raises(BadFile, match=words):
            read_header(path)


def test_lies_on_a_huge_file_cost_little(tmp_path: Path) -> None:
    """A sparse terabyte cannot make the reader take much memory or time."""
    path = tmp_path / "huge.gguf"
    for patch in ({24: U64(1 << 39)}, {at(b"x.list") + 14: U64(1 << 35)}, {8: U64(131_072)}):
        path.write_bytes(small(patch=patch))
        os.truncate(path, 1 << 40)
        tracemalloc.start()
        start = time.process_time()
        with pytest.raises(BadFile):
            read_header(path)
        assert time.process_time() - start < 1
        assert tracemalloc.get_traced_memory()[1] < 256 << 20
        tracemalloc.stop()


def test_big_vocabulary_is_fast() -> None:
    """150,000 words with merges are walked in far less than 0.15 s of CPU time."""
    words = [f"word{i}" * (1 + i % 3) for i in range(150_000)]
    kv = encode_metadata(
        {
            "tokenizer.ggml.tokens": words,
            "tokenizer.ggml.merges": [f"{w} {w}" for w in words],
            "tokenizer.ggml.token_type": [1] * len(words),
        }
    )
    data = encode_header(kv, [])[0]
    times = []
    for _ in range(3):
        start = time.process_time()
        header = parse(Bytes(data))
        times.append(time.process_time() - start)
    assert min(times) < 0.15
    assert header.list_of("tokenizer.ggml.tokens") == words


def test_types_of_ik_are_known() -> None:
    """Types that the gguf package does not know are read with ik's sizes."""
    head, data = encode_header(
        encode_metadata({}),
        [NewTensor("w", (256, 8), get("iq2_kt")), NewTensor("v", (64, 2), get("iq2_bn"))],
    )
    header = parse(Bytes(head + bytes(data)))
    assert [(t.type.name, t.n_bytes) for t in header.tensors] == [
        ("iq2_kt", get("iq2_kt").tensor_bytes((256, 8))),
        ("iq2_bn", get("iq2_bn").tensor_bytes((64, 2))),
    ]


BASE = small()


@settings(max_examples=3000, deadline=1000, suppress_health_check=[HealthCheck.too_slow])
@given(
    edits=st.lists(
        st.tuples(
            st.integers(0, len(BASE) - 1),
            st.one_of(
                st.binary(min_size=1, max_size=9),
                st.sampled_from([U64(1 << 60), U64(0), U32(0xFFFFFFFF), U64((1 << 64) - 1)]),
            ),
        ),
        max_size=6,
    ),
    cut=st.integers(0, len(BASE)),
)
def test_mutated_headers_are_read_or_refused(edits: list[tuple[int, bytes]], cut: int) -> None:
    """Any mutation gives a header or a BadFile, nothing else."""
    raw = bytearray(BASE)
    for where, value in edits:
        raw[where : where + len(value)] = value
    try:
        header = parse(Bytes(bytes(raw[: len(raw) - cut // 4])))
    except BadFile:
        return
    assert isinstance(header, Header)
    for key in header.metadata:
        header.list_of(key)


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=20).filter(lambda s: "\0" not in s),
        st.one_of(
            st.booleans(),
            st.integers(-(1 << 63), (1 << 64) - 1),
            st.floats(width=32, allow_nan=False),
            st.text(max_size=40),
            st.lists(st.integers(-(1 << 31), (1 << 31) - 1), min_size=1, max_size=9),
            st.lists(st.text(max_size=9), min_size=1, max_size=9),
            st.lists(st.booleans(), min_size=1, max_size=9),
        ),
        max_size=12,
    )
)
def test_what_is_written_reads_back(metadata: dict[str, Any]) -> None:
    """Any metadata that the writer takes comes back equal."""
    header = parse(Bytes(encode_header(encode_metadata(metadata), [])[0]))
    assert {k: header.list_of(k) or v for k, v in header.metadata.items()} == metadata
