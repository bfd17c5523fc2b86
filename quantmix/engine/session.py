"""A model loaded by the native engine: tokens in, logits of scored positions out."""

from __future__ import annotations

import ctypes as C
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from quantmix.engine import native
from quantmix.errors import BadFile, EngineError, UsageError

Tokens = NDArray[np.int32]
Logits = NDArray[np.float32]
OnNode = Callable[[int, bool], bool]
B = TypeVar("B", bound=Any)  # the llama_batch of an engine

_F16 = 1  # ggml type id of the default KV cache

# Logits of one decode stay below this; at least one sequence is always decoded.
_LOGITS_BYTES = 256 << 20


def sequences(wanted: int, n_ctx: int, n_vocab: int) -> int:
    """Return how many of `wanted` chunks one decode takes: their logits stay below 256 MiB."""
    fits = max(1, _LOGITS_BYTES // (4 * n_vocab * (n_ctx // 2)))
    return max(1, min(wanted, fits))


def cut(tokens: Tokens, n_ctx: int, limit: int | None, bos: int | None) -> Tokens:
    """Return whole chunks, int32 [n_chunk, n_ctx], the first token of each replaced by `bos`.

    Raises:
        UsageError: fewer than 2·n_ctx tokens, as the engines demand.
    """
    if len(tokens) < 2 * n_ctx:
        raise UsageError(
            f"the text has {len(tokens)} tokens, perplexity at n_ctx {n_ctx} needs at "
            f"least {2 * n_ctx}: use a longer text or a smaller --ctx"
        )
    n = len(tokens) // n_ctx
    n = min(n, limit) if limit else n
    table = tokens[: n * n_ctx].reshape(n, n_ctx).copy()
    if bos is not None:
        table[:, 0] = bos
    return table


def logits_at(address: int, n: int, rows: int, n_vocab: int) -> Logits:
    """Return a view [n, rows, n_vocab] of the engine's own buffer."""
    flat = np.ctypeslib.as_array((C.c_float * (n * rows * n_vocab)).from_address(address))
    return flat.reshape(n, rows, n_vocab)


def default_threads() -> int:
    """Return the number of CPUs this process may use."""
    return len(os.sched_getaffinity(0))


class Session:
    """A loaded model and a context of `n_seq` sequences of `n_ctx` tokens.

    Args:
        path: GGUF file (first shard of a split one).
        n_ctx: tokens per chunk.
        n_seq: chunks per decode; fewer when their logits would pass 256 MiB.
        threads: compute threads; default all CPUs of the process.
        mmap: map the weights; False gives private copies, which `hotswap` may change.
        on_node: evaluation callback `(tensor pointer, ask) -> bool`, see `imatrix`.
        fused: let the engine fuse up and gate; False shows every matmul to `on_node`.
        reuse: keep the compute graph between decodes; off when weights change type in between.

    Raises:
        BadFile: the engine cannot load the file.
        EngineError: no context can be made.
    """

    def __init__(
        self,
        path: Path,
        *,
        n_ctx: int = 512,
        n_seq: int = 1,
        threads: int | None = None,
        mmap: bool = True,
        on_node: OnNode | None = None,
        fused: bool = True,
        reuse: bool = True,
    ) -> None:
        self._lib = native.load()
        self.n_ctx = n_ctx
        params = self._lib.llama_model_default_params()
        params.use_mmap = mmap
        self._model: int | None = self._lib.llama_model_load_from_file(str(path).encode(), params)
        self._ctx: int | None = None
        if not self._model:
            raise BadFile(f"the engine cannot load {path}: truncated, malformed or not a model")
        self.n_vocab: int = self._lib.llama_n_vocab(self._model)
        self.n_seq = sequences(n_seq, n_ctx, self.n_vocab)
        self._reuse = reuse
        self._fused = fused
        self._threads = threads or default_threads()
        self._buffers = BatchBuffers(self.n_seq, n_ctx)
        self._open_context(on_node, fused)

    def _open_context(self, on_node: OnNode | None, fused: bool) -> None:
        """Make the context, in place of the one before."""
        if self._ctx:
            self._lib.llama_free(self._ctx)
        self._callback = native.EvalCallback(
            (lambda tensor, ask, _: on_node(tensor, ask)) if on_node else 0
        )
        params = self._lib.llama_context_default_params()
        params.n_ctx = self.n_ctx * self.n_seq
        params.n_batch = self.n_ctx * self.n_seq
        params.n_ubatch = min(512, params.n_batch)
        params.n_seq_max = self.n_seq
        params.n_threads = params.n_threads_batch = self._threads
        params.cb_eval = self._callback
        params.fused_up_gate = params.fused_moe_up_gate = params.fused_mmad = fused
        params.graph_reuse = self._reuse
        self._ctx = self._lib.llama_init_from_model(self._model, params)
        if not self._ctx:
            self.close()
            raise EngineError("the engine could not make a context: out of memory?")

    def renew(self) -> None:
        """Make the context again, after weights changed type.

        The engine places a graph by the one before when both have as many nodes; but up and gate
        are one node where their types agree and several where not, so that with other types nodes
        of one number may be others: a crash, or one buffer over another.
        """
        self._open_context(None, fused=self._fused)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free context and model; safe to call twice."""
        if self._ctx:
            self._lib.llama_free(self._ctx)
        if self._model:
            self._lib.llama_free_model(self._model)
        self._ctx = self._model = None

    @property
    def lib(self) -> Any:
        """The typed native library."""
        return self._lib

    def tensor(self, name: str) -> int | None:
        """Return the address of a weight tensor by its GGUF name, None when not loaded."""
        address: int | None = self._lib.llama_get_model_tensor(self._model, name.encode())
        return address

    def weight_addresses(self, names: set[str]) -> dict[str, list[int]]:
        """Return every copy in memory of the named weights: addresses of ggml tensors.

        A tied head has its own copy under the same name, which no lookup by name returns, so one
        short run watches which tensors the graph really reads.
        """
        seen: dict[str, list[int]] = {}

        def watch(address: int, ask: bool) -> bool:
            node = native.Tensor.from_address(address)
            for source in node.src:
                if source:
                    label: bytes = native.Tensor.from_address(source).name
                    name = label.decode("utf-8", "replace")
                    if name in names and source not in seen.setdefault(name, []):
                        seen[name].append(source)
            return False

        self._open_context(watch, fused=False)
        self.logits(np.zeros((1, self.n_ctx), np.int32), self.n_ctx - 1, self.n_ctx)
        self._open_context(None, fused=True)
        return seen

    def tokenize(self, text: str) -> Tokens:
        """Return the tokens of `text`, int32 [n], with BOS where the model asks for it.

        As in both engines' perplexity tools: special tokens added, none parsed from the text
        (perplexity.cpp: `common_tokenize(ctx, prompt, true)`).
        """
        raw = text.encode()
        room = len(raw) + 8
        tokens = np.empty(room, np.int32)
        n = self._lib.llama_tokenize(
            self._model, raw, len(raw), tokens.ctypes.data, room, True, False
        )
        if n < 0:
            raise EngineError(f"the engine could not tokenize a text of {len(raw)} bytes")
        return tokens[:n].copy()

    def chunks(self, tokens: Tokens, limit: int | None = None) -> Tokens:
        """Return whole chunks, int32 [n_chunk, n_ctx], their first token replaced by BOS if the
        model adds one.

        Raises:
            UsageError: fewer than 2·n_ctx tokens, as the engines demand.
        """
        adds = self._lib.llama_add_bos_token(self._model) == 1
        bos = self._lib.llama_token_bos(self._model) if adds else None
        return cut(tokens, self.n_ctx, limit, bos)

    def logits(self, chunks: Tokens, first: int, last: int) -> Logits:
        """Run chunks [n ≤ n_seq, n_ctx]; return logits of positions first..last-1.

        The result is a view [n, last-first, n_vocab] of the engine's own buffer, valid until the
        next call.

        Raises:
            EngineError: the decode failed.
        """
        n = len(chunks)
        self._lib.llama_kv_cache_clear(self._ctx)
        batch = self._buffers.fill(native.Batch(), chunks, first, last)
        status = self._lib.llama_decode(self._ctx, batch)
        if status:
            raise EngineError(f"llama_decode failed with status {status}")
        if last <= first:
            return np.empty((n, 0, self.n_vocab), np.float32)
        address = self._lib.llama_get_logits(self._ctx)
        return logits_at(address, n, last - first, self.n_vocab)


class BatchBuffers:
    """Arrays that a llama_batch of either engine points into, made once per context."""

    def __init__(self, n_seq: int, n_ctx: int) -> None:
        self.token = np.zeros(n_seq * n_ctx, np.int32)
        self.pos = np.tile(np.arange(n_ctx, dtype=np.int32), n_seq)
        self.n_seq_id = np.ones(n_seq * n_ctx, np.int32)
        self.ids = np.repeat(np.arange(n_seq, dtype=np.int32), n_ctx)
        base, step = self.ids.ctypes.data, self.ids.itemsize
        self.seq_id = base + step * np.arange(n_seq * n_ctx, dtype=np.uint64)
        self.output = np.zeros((n_seq, n_ctx), np.int8)

    def fill(self, batch: B, chunks: Tokens, first: int, last: int) -> B:
        """Point a batch to chunks [n, n_ctx] with logits wanted at first..last-1."""
        n_tokens = chunks.size
        self.token[:n_tokens] = chunks.reshape(-1)
        self.output[:] = 0
        self.output[:, first:last] = 1
        batch.n_tokens = n_tokens
        for name, array in (
            ("token", self.token),
            ("pos", self.pos),
            ("n_seq_id", self.n_seq_id),
            ("seq_id", self.seq_id),
            ("logits", self.output),
        ):
            setattr(batch, name, array.ctypes.data)
        return batch
