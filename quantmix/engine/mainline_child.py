"""The process in which libllama is loaded: one request on stdin, the engine's log on stderr.

Run as `python -m quantmix.engine.mainline_child`. A native assertion, or a header that the engine
chokes on, then ends this process and not its parent. The request is one JSON object with `do`:

    quantize   a dry run over a ghost: what every tensor would become is in the log
    memory     load without allocating and make a context: bytes per buffer type on stdout
    types      names and sizes of all ggml types on stdout
    about      version of the library and what it can do, on stdout

What goes to stdout is one JSON document. `mainline_ask.py` writes the request and reads the answer.
"""

from __future__ import annotations

import ctypes as c
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quantmix.engine import mainline_abi as abi
from quantmix.errors import QuantmixError, UnknownName

_FAILED = 3  # the engine refused; its log says why


def main() -> int:
    """Do the request on stdin; 0 when it worked, 3 when the engine refused."""
    request = json.load(sys.stdin)
    work = {"quantize": _quantize, "memory": _memory, "types": _types, "about": _about}
    try:
        return work[request["do"]](load(request["library"]), request)
    except (QuantmixError, OSError, AttributeError) as err:  # a symbol that is not there, too
        print(f"error: {err}", file=sys.stderr)
        return _FAILED


def load(path: str) -> c.CDLL:
    """Load libllama; what it needs lies beside it, or inside it when it is a Python extension."""
    file = Path(path)
    for name in ("libggml-base", "libggml"):
        for needed in sorted(file.parent.glob(f"{name}.*so*"))[:1]:
            c.CDLL(str(needed), c.RTLD_GLOBAL)
    lib = c.CDLL(str(file), c.RTLD_GLOBAL)
    if hasattr(lib, "ggml_backend_load_all_from_path"):
        lib.ggml_backend_load_all_from_path.argtypes = [c.c_char_p]
        lib.ggml_backend_load_all_from_path.restype = None
        lib.ggml_backend_load_all_from_path(str(file.parent).encode())
    return lib


def _quantize(lib: c.CDLL, request: dict[str, Any]) -> int:
    """Dry-run `llama_model_quantize` with tensor overrides; patterns as given."""
    layout = abi.detect(lib).quantize
    if layout is None:
        print("error: this libllama exports no llama_model_quantize", file=sys.stderr)
        return _FAILED
    params = abi.defaults(lib, "llama_model_quantize_default_params", layout)
    rules = overrides(lib, request["rules"])
    params.ftype = request["ftype"]
    params.nthread = 1
    params.dry_run = True
    params.allow_requantize = True
    params.tt_overrides = c.addressof(rules) if request["rules"] else None
    # Presets ask whether there is a matrix, a dry run never what is in it.
    value = c.c_float(1.0)
    matrix = (abi.ImatrixData * 2)(abi.ImatrixData(b"none", c.addressof(value), 1))
    if request["imatrix"]:
        params.imatrix = c.addressof(matrix)
    call = lib.llama_model_quantize
    call.argtypes = [c.c_char_p, c.c_char_p, c.POINTER(layout)]
    call.restype = c.c_uint32
    print(json.dumps([[name, block, size] for name, block, size in type_facts(lib)]))
    status = call(request["ghost"].encode(), b"nothing-is-written.gguf", c.byref(params))
    return 0 if status == 0 else _FAILED


def overrides(lib: c.CDLL, rules: Sequence[Sequence[str]]) -> Any:
    """Return rules (pattern, type) as the engine takes them; types in any case, as its program.

    Raises:
        UnknownName: a type that this library does not have.
    """
    ids = {name.lower(): i for i, (name, *_) in enumerate(type_facts(lib))}
    made = (abi.TensorOverride * (len(rules) + 1))()
    for slot, (pattern, type_name) in zip(made, rules, strict=False):
        if type_name.lower() not in ids:
            raise UnknownName.of("mainline type", type_name, ids)
        slot.pattern, slot.type = pattern.encode().lower(), ids[type_name.lower()]
    return made


def _memory(lib: c.CDLL, request: dict[str, Any]) -> int:
    """Load a model with `no_alloc` on the CPU alone and make a context."""
    layouts = abi.detect(lib)
    lib.llama_backend_init()
    model_params = abi.defaults(lib, "llama_model_default_params", layouts.model)
    model_params.no_alloc = True
    model_params.n_gpu_layers = 0
    model_params.use_extra_bufts = False  # repacked copies would count in place of the tensors
    model_params.load_mtp = bool(request["load_mtp"])  # older builds have no such field
    no_devices = (c.c_void_p * 1)(None)
    model_params.devices = c.addressof(no_devices)
    if hasattr(model_params, "load_mode"):
        model_params.load_mode = 0
    else:
        model_params.use_mmap = False
        model_params.use_direct_io = False
    lib.llama_model_load_from_file.argtypes = [c.c_char_p, layouts.model]
    lib.llama_model_load_from_file.restype = c.c_void_p
    model = lib.llama_model_load_from_file(request["ghost"].encode(), model_params)
    if not model:
        return _FAILED
    context_params = abi.defaults(lib, "llama_context_default_params", layouts.context)
    for name, value in request["context"].items():
        setattr(context_params, name, value)
    lib.llama_init_from_model.argtypes = [c.c_void_p, layouts.context]
    lib.llama_init_from_model.restype = c.c_void_p
    context = lib.llama_init_from_model(model, context_params)
    if not context:
        return _FAILED
    print(json.dumps(_breakdown(lib, context)))
    return 0


class _MapHeader(c.Structure):
    """A std::map as libstdc++ lays it out: comparator, header node, size."""

    _fields_ = (
        ("comparator", c.c_void_p),
        ("colour", c.c_void_p),
        ("root", c.c_void_p),
        ("leftmost", c.c_void_p),
        ("rightmost", c.c_void_p),
        ("size", c.c_size_t),
    )


class _MapNode(c.Structure):
    """A node of that map: tree links, then the buffer type and its three sizes."""

    _fields_ = (
        ("colour", c.c_void_p),
        ("parent", c.c_void_p),
        ("left", c.c_void_p),
        ("right", c.c_void_p),
        ("buffer_type", c.c_void_p),
        ("model", c.c_size_t),
        ("context", c.c_size_t),
        ("compute", c.c_size_t),
    )


def _breakdown(lib: c.CDLL, context: int) -> list[dict[str, Any]]:
    """Bytes per buffer type, as `llama_get_memory_breakdown` counts them.

    The log of a `no_alloc` load shows buffers of size 0; this function is what mainline's own
    `--fit` reads. It is exported under its C++ name and returns a std::map, which is walked here;
    the caller compares the sums with the log.
    """
    call = lib["_Z26llama_get_memory_breakdownPK13llama_context"]
    call.argtypes = [c.c_void_p]
    call.restype = _MapHeader
    tree = call(context)
    lib.ggml_backend_buft_name.argtypes = [c.c_void_p]
    lib.ggml_backend_buft_name.restype = c.c_char_p
    found: list[dict[str, Any]] = []
    open_nodes = [tree.root]
    while open_nodes and len(found) < tree.size:
        address = open_nodes.pop()
        if not address:
            continue
        node = _MapNode.from_address(address)
        open_nodes += [node.right, node.left]
        name = lib.ggml_backend_buft_name(node.buffer_type).decode()
        found.append(
            {
                "buffer": name,
                "weights": node.model,
                "context": node.context,
                "compute": node.compute,
            }
        )
    return found


def _about(lib: c.CDLL, request: dict[str, Any]) -> int:
    """Print the version, and whether the library quantizes."""
    layouts = abi.detect(lib)
    version = ""
    for name in ("llama_version", "ggml_version"):
        if not version and hasattr(lib, name):
            call = getattr(lib, name)
            call.argtypes, call.restype = [], c.c_char_p
            version = f"{name.split('_')[0]} {(call() or b'').decode()}"
    quantizes = layouts.quantize is not None
    print(json.dumps({"version": version, "quantizes": quantizes, "layouts": layouts.names}))
    return 0


def _types(lib: c.CDLL, request: dict[str, Any]) -> int:
    """Print name, block size, type size and row bytes at the lengths asked for, by type id."""
    lib.ggml_row_size.argtypes = [c.c_int, c.c_int64]
    lib.ggml_row_size.restype = c.c_size_t
    facts = [
        {
            "name": name,
            "block_size": block,
            "type_size": size,
            "row_bytes": {
                n: lib.ggml_row_size(i, n) for n in request["lengths"] if block and n % block == 0
            },
        }
        for i, (name, block, size) in enumerate(type_facts(lib))
    ]
    print(json.dumps(facts))
    return 0


def type_facts(lib: c.CDLL) -> list[tuple[str, int, int]]:
    """Return (name, block size, bytes per block) of every ggml type; removed ones have block 0."""
    lib.ggml_type_name.argtypes = [c.c_int]
    lib.ggml_type_name.restype = c.c_char_p
    lib.ggml_blck_size.argtypes = [c.c_int]
    lib.ggml_blck_size.restype = c.c_int64
    lib.ggml_type_size.argtypes = [c.c_int]
    lib.ggml_type_size.restype = c.c_size_t
    layout = abi.detect(lib).quantize
    if layout is None:
        return []
    count = abi.defaults(lib, "llama_model_quantize_default_params", layout).output_tensor_type
    return [
        (
            (lib.ggml_type_name(i) or b"").decode(),
            int(lib.ggml_blck_size(i)),
            int(lib.ggml_type_size(i)),
        )
        for i in range(count)
    ]


if __name__ == "__main__":
    sys.exit(main())
