"""A model loaded by mainline's libllama: the same interface as `session.Session`.

Perplexities of the two engines differ by about 1e-3 for quantized weights (they quantize
activations differently), so numbers are compared inside one engine only.
"""

from __future__ import annotations

import ctypes as c
from pathlib import Path
from typing import Any, Final

import numpy as np

from quantmix.engine import mainline_abi as abi
from quantmix.engine.mainline_child import load
from quantmix.engine.mainline_find import Mainline, find_mainline
from quantmix.engine.session import (
    BatchBuffers,
    Logits,
    Tokens,
    cut,
    default_threads,
    logits_at,
    sequences,
)
from quantmix.errors import BadFile, EngineError

_MAX_UBATCH: Final = 512
_MMAP: Final = 1  # enum llama_load_mode


class Batch(c.Structure):
    """struct llama_batch of mainline."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.c_void_p),
        ("embd", c.c_void_p),
        ("pos", c.c_void_p),
        ("n_seq_id", c.c_void_p),
        ("seq_id", c.c_void_p),
        ("logits", c.c_void_p),
    )


class MainlineSession:
    """A loaded model and a context of `n_seq` sequences of `n_ctx` tokens, on the CPU.

    Only child processes should make one: a native assert ends the process.

    Args:
        path: GGUF file (first shard of a split one).
        n_ctx: tokens per chunk.
        n_seq: chunks per decode; fewer when their logits would pass 256 MiB.
        threads: compute threads; default all CPUs of the process.
        engine: which libllama; default the first found.

    Raises:
        BadFile: the engine cannot load the file.
        EngineMissing: no libllama was found.
        EngineError: no context can be made.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 512,
        n_seq: int = 1,
        threads: int | None = None,
        engine: Mainline | None = None,
    ) -> None:
        used = engine or find_mainline("memory")
        if used.library is None:
            raise EngineError(f"{used.origin} has no library to load")
        self._lib = _typed(load(str(used.library)))
        self._layouts = abi.detect(self._lib)
        self._lib.llama_backend_init()
        self.n_ctx = n_ctx
        self._context: int | None = None
        self._model: int | None = self._load(path)
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab: int = self._lib.llama_vocab_n_tokens(self._vocab)
        self.n_seq = sequences(n_seq, n_ctx, self.n_vocab)
        self._buffers = BatchBuffers(self.n_seq, n_ctx)
        self._context = self._open(threads or default_threads())

    def _load(self, path: Path) -> int:
        params = abi.defaults(self._lib, "llama_model_default_params", self._layouts.model)
        params.n_gpu_layers = 0
        no_devices = (c.c_void_p * 1)(None)
        params.devices = c.addressof(no_devices)
        if hasattr(params, "load_mode"):
            params.load_mode = _MMAP
        call = self._lib.llama_model_load_from_file
        call.argtypes, call.restype = [c.c_char_p, self._layouts.model], c.c_void_p
        model: int | None = call(str(path).encode(), params)
        if not model:
            raise BadFile(f"mainline cannot load {path}: truncated, malformed or not a model")
        return model

    def _open(self, threads: int) -> int:
        params = abi.defaults(self._lib, "llama_context_default_params", self._layouts.context)
        params.n_ctx = params.n_batch = self.n_ctx * self.n_seq
        params.n_ubatch = min(_MAX_UBATCH, params.n_batch)
        params.n_seq_max = self.n_seq
        params.n_threads = params.n_threads_batch = threads
        call = self._lib.llama_init_from_model
        call.argtypes, call.restype = [c.c_void_p, self._layouts.context], c.c_void_p
        context: int | None = call(self._model, params)
        if not context:
            self.close()
            raise EngineError("mainline could not make a context: out of memory?")
        return context

    def __enter__(self) -> MainlineSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free context and model; safe to call twice."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def tokenize(self, text: str) -> Tokens:
        """Return the tokens of `text`, int32 [n]: special tokens added, none parsed from it."""
        raw = text.encode()
        room = len(raw) + 8
        tokens = np.empty(room, np.int32)
        n = self._lib.llama_tokenize(
            self._vocab, raw, len(raw), tokens.ctypes.data, room, True, False
        )
        if n < 0:
            raise EngineError(f"mainline could not tokenize a text of {len(raw)} bytes")
        return tokens[:n].copy()

    def chunks(self, tokens: Tokens, limit: int | None = None) -> Tokens:
        """Return whole chunks, int32 [n_chunk, n_ctx], BOS first where the model adds one.

        Raises:
            UsageError: fewer than 2·n_ctx tokens, as the engines demand.
        """
        adds = self._lib.llama_vocab_get_add_bos(self._vocab)
        bos = self._lib.llama_vocab_bos(self._vocab) if adds else None
        return cut(tokens, self.n_ctx, limit, bos)

    def logits(self, chunks: Tokens, first: int, last: int) -> Logits:
        """Run chunks [n ≤ n_seq, n_ctx]; return logits of positions first..last-1.

        The result is a view [n, last-first, n_vocab] of the engine's own buffer, valid until the
        next call.

        Raises:
            EngineError: the decode failed.
        """
        n = len(chunks)
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        batch = self._buffers.fill(Batch(), chunks, first, last)
        status = self._lib.llama_decode(self._context, batch)
        if status:
            raise EngineError(f"mainline's llama_decode failed with status {status}")
        if last <= first:
            return np.empty((n, 0, self.n_vocab), np.float32)
        address = self._lib.llama_get_logits(self._context)
        return logits_at(address, n, last - first, self.n_vocab)


def _typed(lib: c.CDLL) -> Any:
    """Declare the functions that a session calls."""
    pointer, i32, flag = c.c_void_p, c.c_int32, c.c_bool
    for name, result, arguments in (
        ("llama_backend_init", None, []),
        ("llama_model_get_vocab", pointer, [pointer]),
        ("llama_vocab_n_tokens", i32, [pointer]),
        ("llama_vocab_get_add_bos", flag, [pointer]),
        ("llama_vocab_bos", i32, [pointer]),
        ("llama_tokenize", i32, [pointer, c.c_char_p, i32, pointer, i32, flag, flag]),
        ("llama_get_memory", pointer, [pointer]),
        ("llama_memory_clear", None, [pointer, flag]),
        ("llama_decode", i32, [pointer, Batch]),
        ("llama_get_logits", pointer, [pointer]),
        ("llama_free", None, [pointer]),
        ("llama_model_free", None, [pointer]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib
