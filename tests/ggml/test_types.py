"""The type table against the real library of ik_llama.cpp, and the rules around it."""

from __future__ import annotations

import ctypes

import pytest

from quantmix.engine.find import package_folder
from quantmix.errors import UnknownName, UsageError
from quantmix.ggml import types

LENGTHS = (256, 512, 1536, 2048, 7168, 16384, 18432)


@pytest.fixture(scope="module")
def libggml() -> ctypes.CDLL:
    """The library inside the ik-llama-cpp-python package."""
    folder = package_folder()
    if folder is None:
        pytest.skip("ik-llama-cpp-python is not installed on this platform")
    lib = ctypes.CDLL(str(folder / "lib" / "libggml.so"))
    lib.ggml_type_name.restype = ctypes.c_char_p
    lib.ggml_row_size.restype = ctypes.c_size_t
    lib.ggml_row_size.argtypes = [ctypes.c_int, ctypes.c_int64]
    lib.ggml_blck_size.restype = ctypes.c_int64
    lib.ggml_type_size.restype = ctypes.c_size_t
    return lib


def test_every_type_equals_the_library(libggml: ctypes.CDLL) -> None:
    """Name, block, bytes and row sizes of every type the library knows are exactly ours."""
    compared = 0
    for t in types.table("ik").values():
        if libggml.ggml_blck_size(t.id) <= 0:
            assert t.name == "mxfp4_r8", f"{t.name} is unknown to the packaged build"
            continue
        compared += 1
        assert libggml.ggml_type_name(t.id).decode() == t.name
        assert libggml.ggml_blck_size(t.id) == t.block_size
        assert libggml.ggml_type_size(t.id) == t.type_size
        for n in LENGTHS:
            assert libggml.ggml_row_size(t.id, n) == t.row_bytes(n), (t.name, n)
    assert compared >= 91


def test_no_type_of_the_library_is_missing(libggml: ctypes.CDLL) -> None:
    """Every live enum value of the library has a row in our table."""
    ours = types.by_id("ik")
    live = [i for i in range(400) if i in ours or 0 < libggml.ggml_blck_size(i) < 4096]
    dead = {4, 5}
    named = [i for i in live if i not in ours and i not in dead]
    assert named == []


@pytest.mark.parametrize(
    ("shape", "name", "mib"),
    [
        ((2048, 7168, 256), "iq4_ks", 1911.00),
        ((7168, 2048, 256), "iq4_ks", 1906.00),
        ((7168, 2048), "iq6_k", 11.59),
        ((128, 65536), "q6_0", 6.50),
        ((128, 65536), "q8_0", 8.50),
    ],
)
def test_sizes_that_llama_quantize_printed(shape: tuple[int, ...], name: str, mib: float) -> None:
    """Sizes printed by llama-quantize itself come out."""
    assert round(types.get(name).tensor_bytes(shape) / 2**20, 2) == mib


def test_an_unknown_type_is_suggested_with_its_exact_case() -> None:
    """`q6_k` suggests `q6_K`, the spelling that ik takes."""
    with pytest.raises(UnknownName, match="q6_K"):
        types.get("q6_k")


def test_a_type_of_the_other_engine_is_named_as_such() -> None:
    """Asking mainline for an ik type says whose type it is."""
    with pytest.raises(UnknownName, match="ik"):
        types.get("iq2_kt", "mainline")


def test_rows_of_128_fall_back_as_the_engine_does() -> None:
    """attn_k_b of DeepSeek has rows of 128: 256-block types become 32-block ones."""
    shape = (128, 512, 128)
    name = "blk.0.attn_k_b.weight"
    assert types.resolve("iq2_kt", name, shape).name == "iq4_nl"
    assert types.resolve("iq4_k", name, shape).name == "q5_0"
    assert types.resolve("q6_K", name, shape).name == "q8_0"
    assert types.resolve("q8_0", name, shape).name == "q8_0"
    assert types.resolve("q5_K", name, shape, "mainline").name == "q5_1"


def test_interleaved_types_need_rows_that_divide_and_never_the_embedding() -> None:
    """250 rows, or the embedding, turn iq4_k_r4 into iq4_k."""
    assert types.resolve("iq4_k_r4", "blk.0.ffn_up.weight", (1024, 250)).name == "iq4_k"
    assert types.resolve("iq4_k_r4", "token_embd.weight", (1024, 256)).name == "iq4_k"
    assert types.resolve("iq4_k_r4", "blk.0.ffn_up.weight", (1024, 256)).name == "iq4_k_r4"


def test_a_row_that_no_block_divides_is_refused() -> None:
    """Rows of 100 fit no quantized type, and the message names the tensor."""
    with pytest.raises(UsageError, match=r"blk\.0\.x\.weight"):
        types.resolve("q8_0", "blk.0.x.weight", (100, 4))


def test_default_palette_keeps_its_promises() -> None:
    """No ternary, float or CPU-only type; of the interleaved only iq1_s_r4 and iq1_m_r4."""
    palette = types.default_palette("ik")
    names = {t.name for t in palette}
    assert {"iq1_s_r4", "iq2_kt", "iq4_ks", "q8_0"} <= names
    assert {t.name for t in palette if t.interleave > 1} == {"iq1_s_r4", "iq1_m_r4"}
    assert all(t.cuda and t.writable and t.family not in ("ternary", "float") for t in palette)


def test_without_an_imatrix_types_that_need_one_are_left_out() -> None:
    """The very-low-bit types abort without an imatrix."""
    names = {t.name for t in types.default_palette("ik", imatrix=False)}
    assert not names & {"iq1_s", "iq1_s_r4", "iq2_xxs", "iq2_kt", "iq1_kt"}
    assert "iq2_ks" in names
