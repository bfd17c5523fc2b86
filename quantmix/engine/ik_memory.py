"""What the packaged ik_llama.cpp really allocates, asked on the CPU with a shortened ghost.

The compute buffer hardly depends on the number of layers, so a ghost of the first few is enough:
its weights are a hole in a sparse file, its KV cache is small, and the engine reserves its graph
as for the whole model. With everything on one device, the CPU's buffer is what one GPU that holds
everything would reserve, but for kernels that need scratch space of their own; it shows nothing
about op-offload copies.
"""

from __future__ import annotations

import ctypes as C
import re
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from quantmix.engine import child, native
from quantmix.errors import EngineError
from quantmix.ggml import types
from quantmix.memory.settings import Settings
from quantmix.models.ghost import write_ghost
from quantmix.models.model import Model, Tensor
from quantmix.units import MIB

_LINE: Final = re.compile(r"CPU\s+(KV buffer|output buffer|compute buffer) size\s*=\s*([\d.]+) MiB")
_LogCallback = C.CFUNCTYPE(None, C.c_int, C.c_char_p, C.c_void_p)


@dataclass(frozen=True, slots=True)
class IkMemory:
    """Bytes that the engine logged (two decimals of MiB)."""

    kv_bytes: int
    output_bytes: int
    compute_bytes: int


def shortened(model: Model, n_layer: int) -> Model:
    """Return the first `n_layer` layers of a model, MTP blocks left out."""
    h = replace(model.hparams, n_layer=n_layer, nextn_layers=0, nextn_in_gguf=False)
    kept = tuple(t for t in model.tensors if t.layer is None or t.layer < n_layer)
    return replace(model, hparams=h, tensors=kept, header_bytes=None)


def measure(model: Model, settings: Settings) -> IkMemory:
    """Return what ik allocates on the CPU for `model` with these settings.

    Give a `shortened` model: its whole KV cache is really allocated.

    Raises:
        EngineError: the engine cannot load the ghost, or allocates nothing that it logs.
        EngineMissing: the package is not installed.
    """
    with tempfile.TemporaryDirectory() as folder:
        ghost = Path(folder) / "ghost.gguf"
        write_ghost(ghost, model, _small)
        request = {
            "path": str(ghost),
            "n_ctx": settings.ctx,
            "n_ubatch": settings.ubatch,
            "n_batch": max(settings.batch, settings.ubatch),
            "n_seq_max": settings.parallel,
            "type_k": types.get(settings.ctk, "ik").id,
            "type_v": types.get(settings.ctv, "ik").id,
            "flash_attn": settings.fa,
            "mla_attn": settings.mla,
            "attn_max_batch": settings.amb,
        }
        answer = child.run("quantmix.engine.ik_memory:task", request)
    return IkMemory(answer["KV buffer"], answer["output buffer"], answer["compute buffer"])


def _small(t: Tensor) -> str:
    """The smallest plain type of a tensor: the loader pages through the whole hole."""
    if not t.quantizable:
        return "f32"
    return "q8_0" if t.ncols % 256 else "iq1_s"


def task(request: dict[str, Any], emit: child.Emit) -> dict[str, Any]:
    """Load the ghost, make a context, read the engine's log (runs in a child process).

    Raises:
        EngineError: no model, no context, or a log without the expected lines.
    """
    lib, lines = native.load(), list[str]()
    keep = _LogCallback(lambda level, text, user: lines.append(text.decode(errors="replace")))
    lib.llama_log_set(keep, None)
    params = lib.llama_model_default_params()
    params.n_gpu_layers, params.use_mmap, params.check_tensors = 0, True, False
    params.mla, params.flash_attn = request["mla_attn"], request["flash_attn"]
    model = lib.llama_model_load_from_file(request["path"].encode(), params)
    if not model:
        raise EngineError(f"ik cannot load the ghost: {''.join(lines).strip()[-300:]}")
    settings = lib.llama_context_default_params()
    for name, value in request.items():
        if name != "path":
            setattr(settings, name, value)
    if not lib.llama_init_from_model(model, settings):
        raise EngineError(f"ik makes no context: {''.join(lines).strip()[-300:]}")
    found = {what: round(float(n) * MIB) for what, n in _LINE.findall("".join(lines))}
    missing = {"KV buffer", "output buffer", "compute buffer"} - set(found)
    if missing:
        raise EngineError(f"ik did not log its {sorted(missing)[0]}: another build than expected")
    return found
