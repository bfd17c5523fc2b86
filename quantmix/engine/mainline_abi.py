"""The C structures of mainline's libllama, and which of their known layouts a library has.

mainline passes its parameters by value and reorders them between releases, so a layout that is
wrong by one field corrupts memory in silence. The layouts known here come from the public header
(llama.cpp include/llama.h, releases named below); `detect` takes the defaults that the library
itself returns, as raw bytes, and accepts a layout only when every default lies where that layout
says, and, where the calling convention shows it (x86-64), when the size agrees too.
"""

from __future__ import annotations

import ctypes as c
import platform
from dataclasses import dataclass
from typing import Any, Final

from quantmix.errors import EngineError

# enum llama_ftype of include/llama.h: the presets that `llama-quantize` offers, floats included.
FTYPES: Final[dict[str, int]] = {
    "F32": 0,
    "F16": 1,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q8_0": 7,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q2_K": 10,
    "Q3_K_S": 11,
    "Q3_K_M": 12,
    "Q3_K_L": 13,
    "Q4_K_S": 14,
    "Q4_K_M": 15,
    "Q5_K_S": 16,
    "Q5_K_M": 17,
    "Q6_K": 18,
    "IQ2_XXS": 19,
    "IQ2_XS": 20,
    "Q2_K_S": 21,
    "IQ3_XS": 22,
    "IQ3_XXS": 23,
    "IQ1_S": 24,
    "IQ4_NL": 25,
    "IQ3_S": 26,
    "IQ3_M": 27,
    "IQ2_S": 28,
    "IQ2_M": 29,
    "IQ4_XS": 30,
    "IQ1_M": 31,
    "BF16": 32,
    "TQ1_0": 36,
    "TQ2_0": 37,
    "MXFP4_MOE": 38,
    "Q1_0": 40,
    "Q2_0": 41,
}
FLOAT_FTYPES: Final = frozenset({"F32", "F16", "BF16"})

_RAW_BYTES: Final = 512
_MAX_TYPES: Final = (40, 128)  # where enum GGML_TYPE_COUNT may plausibly lie
_DEFAULT_BUFFER: Final = 8 << 30  # LLAMA_QUANT_MAX_BUF_SIZE


def _struct(name: str, fields: str) -> type[c.Structure]:
    """Build a structure from `kind name` words, kinds: p pointer, i int32, u uint32, f, b, z."""
    kinds = {"p": c.c_void_p, "i": c.c_int32, "u": c.c_uint32, "f": c.c_float, "b": c.c_bool}
    kinds["z"] = c.c_size_t
    words = fields.split()
    pairs = [(n, kinds[k]) for k, n in zip(words[::2], words[1::2], strict=True)]
    return type(name, (c.Structure,), {"_fields_": pairs})


_MODEL_HEAD = "p devices p tensor_buft_overrides i n_gpu_layers i split_mode"
_MODEL_TAIL = (
    "i main_gpu p tensor_split p progress_callback p progress_user_data p kv_overrides b vocab_only"
)
_MODEL_END = "b check_tensors b use_extra_bufts b no_host b no_alloc"
_CONTEXT_MIDDLE = (
    "i n_threads i n_threads_batch i ctx_type i rope_scaling_type i pooling_type i attention_type"
    " i flash_attn_type f rope_freq_base f rope_freq_scale f yarn_ext_factor f yarn_attn_factor"
    " f yarn_beta_fast f yarn_beta_slow u yarn_orig_ctx f defrag_thold p cb_eval p cb_eval_data"
    " i type_k i type_v p abort_callback p abort_data"
)
_CONTEXT_TAIL = (
    "b embeddings b offload_kqv b no_perf b op_offload b swa_full b kv_unified"
    " p samplers z n_samplers p ctx_other"
)
_CONTEXT_HEAD = "u n_ctx u n_batch u n_ubatch u n_seq_max u n_rs_seq u n_outputs_max"
_QUANTIZE = (
    "i nthread i ftype i output_tensor_type i token_embedding_type b allow_requantize"
    " b quantize_output_tensor b only_copy b pure b keep_split b dry_run"
    " p imatrix p kv_overrides p tt_overrides p prune_layers"
)

# Newest first. 0.5: build 11434; the older ones are their predecessors in the same header.
MODEL_LAYOUTS: Final[dict[str, type[c.Structure]]] = {
    "load_mode+lazy_mode": _struct(
        "ModelLazy", f"{_MODEL_HEAD} i load_mode i lazy_mode {_MODEL_TAIL} {_MODEL_END} b load_mtp"
    ),
    "load_mode": _struct(
        "ModelLoadMode", f"{_MODEL_HEAD} i load_mode {_MODEL_TAIL} {_MODEL_END} b load_mtp"
    ),
    "use_mmap": _struct(
        "ModelUseMmap",
        f"{_MODEL_HEAD} {_MODEL_TAIL} b use_mmap b use_direct_io b use_mlock {_MODEL_END}",
    ),
}
CONTEXT_LAYOUTS: Final[dict[str, type[c.Structure]]] = {
    # Seen in build 11549: eight more bytes, zero by default, between the callbacks and the flags.
    "eight_more_bytes": _struct(
        "ContextEightMore",
        f"{_CONTEXT_HEAD} u n_outputs_max_per_seq {_CONTEXT_MIDDLE} p unnamed {_CONTEXT_TAIL}",
    ),
    "n_outputs_max_per_seq": _struct(
        "ContextPerSeq",
        f"{_CONTEXT_HEAD} u n_outputs_max_per_seq {_CONTEXT_MIDDLE} {_CONTEXT_TAIL}",
    ),
    "n_outputs_max": _struct(
        "ContextOutputs", f"{_CONTEXT_HEAD} {_CONTEXT_MIDDLE} {_CONTEXT_TAIL}"
    ),
}
QUANTIZE_LAYOUTS: Final[dict[str, type[c.Structure]]] = {
    "max_buf_size": _struct("QuantizeBuffer", f"{_QUANTIZE} z max_buf_size"),
    "dry_run": _struct("QuantizeDryRun", _QUANTIZE),
}


class ImatrixData(c.Structure):
    """struct llama_model_imatrix_data: one entry; a null name ends the list."""

    _fields_ = (("name", c.c_char_p), ("data", c.c_void_p), ("size", c.c_size_t))


class TensorOverride(c.Structure):
    """struct llama_model_tensor_override: a pattern and the ggml type it asks for."""

    _fields_ = (("pattern", c.c_char_p), ("type", c.c_int32))


@dataclass(frozen=True, slots=True)
class Abi:
    """Which layouts a library has; `quantize` is None when it cannot quantize or not dry-run."""

    model: type[c.Structure]
    context: type[c.Structure]
    quantize: type[c.Structure] | None
    names: tuple[str, ...]


def detect(lib: c.CDLL) -> Abi:
    """Find the layouts of a loaded libllama from the defaults it returns.

    Raises:
        EngineError: no known layout, or more than one, agrees with what the library returns.
    """
    model_name, model = _choose(lib, "llama_model_default_params", MODEL_LAYOUTS, _model_ok)
    context_name, context = _choose(
        lib, "llama_context_default_params", CONTEXT_LAYOUTS, _context_ok
    )
    if not (
        hasattr(lib, "llama_model_quantize") and hasattr(lib, "llama_model_quantize_default_params")
    ):
        return Abi(model, context, None, (model_name, context_name))
    quantize_name, quantize = _choose(
        lib, "llama_model_quantize_default_params", QUANTIZE_LAYOUTS, _quantize_ok
    )
    return Abi(model, context, quantize, (model_name, context_name, quantize_name))


def defaults(lib: c.CDLL, function: str, layout: type[c.Structure]) -> Any:
    """Call a `*_default_params` function and return its structure."""
    call = getattr(lib, function)
    call.argtypes = []
    call.restype = layout
    return call()


def _choose(
    lib: c.CDLL, function: str, layouts: dict[str, type[c.Structure]], fits: Any
) -> tuple[str, type[c.Structure]]:
    """Return the one layout of `layouts` that agrees with the library's defaults."""
    raw = bytes(defaults(lib, function, _Raw).data)
    size = _written_bytes(lib, function)
    good = [
        (name, layout)
        for name, layout in layouts.items()
        if (size is None or c.sizeof(layout) - 8 < size <= c.sizeof(layout))
        and fits(layout.from_buffer_copy(raw))
    ]
    if len(good) != 1:
        found = " and ".join(n for n, _ in good) or "none"
        raise EngineError(
            f"{function} of this libllama returns a structure that quantmix does not know "
            f"(layouts that fit: {found}): use the build that `python -m "
            "quantmix.engine.mainline_fetch` brings"
        )
    return good[0]


class _Raw(c.Structure):
    """Enough room for any of the structures; forces the by-reference return of large structures."""

    _fields_ = (("data", c.c_ubyte * _RAW_BYTES),)


def _written_bytes(lib: c.CDLL, function: str) -> int | None:
    """Bytes that the function writes, trailing padding left out; None where it cannot be seen.

    On x86-64 (System V) a large structure is written where the hidden first argument points, so
    two runs over two fill bytes show which bytes were touched.
    """
    if platform.machine() not in ("x86_64", "AMD64") or platform.system() == "Windows":
        return None
    call = c.CFUNCTYPE(c.c_void_p, c.c_void_p)((function, lib))
    images: list[bytes] = []
    for fill in (0x5A, 0xA5):
        buffer = (c.c_ubyte * _RAW_BYTES)(*([fill] * _RAW_BYTES))
        call(c.addressof(buffer))
        images.append(bytes(buffer))
    touched = {i for i in range(_RAW_BYTES) if images[0][i] == images[1][i]}
    return max(touched) + 1 if touched else 0


def _model_ok(p: Any) -> bool:
    """Whether default model parameters look right in this layout."""
    modes = not hasattr(p, "load_mode") or (-1 <= p.load_mode <= 4 and not p.main_gpu)
    mmap = not hasattr(p, "use_mmap") or p.use_mmap
    lazy = not hasattr(p, "lazy_mode") or 0 <= p.lazy_mode <= 2
    return bool(
        p.split_mode in (0, 1, 2, 3)
        and p.main_gpu == 0
        and not p.tensor_split
        and not p.kv_overrides
        and modes
        and mmap
        and lazy
        and p.use_extra_bufts
        and not (p.vocab_only or p.check_tensors or p.no_host or p.no_alloc)
    )


def _context_ok(p: Any) -> bool:
    """Whether default context parameters look right in this layout."""
    return bool(
        p.n_ctx == 512
        and p.n_batch >= p.n_ubatch >= 32
        and p.n_seq_max == 1
        and 1 <= p.n_threads <= 1024
        and 1 <= p.n_threads_batch <= 1024
        and p.ctx_type == 0
        and p.rope_scaling_type == p.pooling_type == p.attention_type == -1
        and p.flash_attn_type in (-1, 0, 1)
        and p.yarn_ext_factor == -1.0
        and p.type_k == p.type_v == 1
        and not p.cb_eval
        and not p.abort_callback
        and p.offload_kqv
        and p.op_offload
        and not p.embeddings
    )


def _quantize_ok(p: Any) -> bool:
    """Whether default quantization parameters look right in this layout."""
    low, high = _MAX_TYPES
    return bool(
        p.nthread == 0
        and p.ftype == FTYPES["Q8_0"]  # Q5_1 in builds whose overrides were C++ vectors
        and low <= p.output_tensor_type == p.token_embedding_type <= high
        and p.quantize_output_tensor
        and not (p.allow_requantize or p.only_copy or p.pure or p.keep_split or p.dry_run)
        and not (p.imatrix or p.kv_overrides or p.tt_overrides or p.prune_layers)
        and (not hasattr(p, "max_buf_size") or p.max_buf_size == _DEFAULT_BUFFER)
    )
