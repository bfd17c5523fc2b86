"""Layouts of libllama's structures: each known one is told from every other by its defaults."""

from __future__ import annotations

import ctypes as c
from itertools import permutations

import pytest

from quantmix.engine import mainline_abi as abi


def model_defaults(layout: type[c.Structure]) -> c.Structure:
    """What llama_model_default_params returns, in a layout."""
    p = layout()
    p.n_gpu_layers, p.split_mode, p.use_extra_bufts = -1, 1, True
    p.load_mode, p.lazy_mode, p.use_mmap = -1, 1, True
    return p


def context_defaults(layout: type[c.Structure]) -> c.Structure:
    """What llama_context_default_params returns, in a layout."""
    p = layout()
    p.n_ctx, p.n_batch, p.n_ubatch, p.n_seq_max = 512, 2048, 512, 1
    p.n_outputs_max_per_seq, p.n_threads, p.n_threads_batch = 1, 4, 4
    p.rope_scaling_type = p.pooling_type = p.attention_type = p.flash_attn_type = -1
    p.yarn_ext_factor = p.yarn_attn_factor = p.yarn_beta_fast = p.yarn_beta_slow = -1.0
    p.defrag_thold, p.type_k, p.type_v = -1.0, 1, 1
    p.offload_kqv = p.no_perf = p.op_offload = p.swa_full = True
    return p


def quantize_defaults(layout: type[c.Structure]) -> c.Structure:
    """What llama_model_quantize_default_params returns, in a layout."""
    p = layout()
    p.ftype, p.output_tensor_type, p.token_embedding_type = 7, 43, 43
    p.quantize_output_tensor, p.max_buf_size = True, 8 << 30
    return p


KINDS = (
    (abi.MODEL_LAYOUTS, model_defaults, abi._model_ok),
    (abi.CONTEXT_LAYOUTS, context_defaults, abi._context_ok),
    (abi.QUANTIZE_LAYOUTS, quantize_defaults, abi._quantize_ok),
)


def pairs() -> list[tuple[object, ...]]:
    """Every ordered pair of layouts of one structure."""
    return [(*kind, a, b) for kind in KINDS for a, b in permutations(kind[0], 2)]


@pytest.mark.parametrize(("layouts", "make", "fits"), KINDS, ids=("model", "context", "quantize"))
def test_defaults_fit_their_own_layout(layouts, make, fits) -> None:  # type: ignore[no-untyped-def]
    """The engine's defaults are accepted in the layout that they are in."""
    assert all(fits(make(layout)) for layout in layouts.values())


@pytest.mark.parametrize(("layouts", "make", "fits", "true", "other"), pairs())
def test_defaults_fit_no_other_layout(layouts, make, fits, true, other) -> None:  # type: ignore[no-untyped-def]
    """Defaults read in another layout of the same size are refused; other sizes are seen."""
    image = bytes(make(layouts[true])).ljust(512, b"\0")
    same_size = c.sizeof(layouts[true]) == c.sizeof(layouts[other])
    assert not (same_size and fits(layouts[other].from_buffer_copy(image)))


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_ctx", 0), ("type_k", 2), ("pooling_type", 0), ("n_ubatch", 4096), ("n_threads", 0)],
)
def test_shifted_context_is_refused(field: str, value: int) -> None:
    """A context default that is not the known one means another layout."""
    params = context_defaults(next(iter(abi.CONTEXT_LAYOUTS.values())))
    assert abi._context_ok(params)
    setattr(params, field, value)
    assert not abi._context_ok(params)


def test_presets_have_distinct_numbers() -> None:
    """No two presets share a number, and the float ones are among them."""
    assert len(set(abi.FTYPES.values())) == len(abi.FTYPES)
    assert set(abi.FTYPES) >= abi.FLOAT_FTYPES
