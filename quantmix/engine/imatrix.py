"""Collect an importance matrix in-process: squares of what flows into every matmul.

The engine calls back for every graph node. For `MUL_MAT` and `MUL_MAT_ID` the second source is
the input; its squares are summed per column, for experts by the ids that routed each row (as
llama-imatrix does, examples/imatrix/imatrix.cpp). Up/gate fusion is off so that every matmul
shows. The head is collected too, under `output.weight` or, when tied, `token_embd.weight`:
published files lack that entry and pay for it (docs/measuring.md, importance matrix).
"""

from __future__ import annotations

import ctypes as C
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quantmix.engine import child, native
from quantmix.engine.child import Emit
from quantmix.engine.perplexity import read_corpus
from quantmix.engine.session import Session
from quantmix.errors import EngineError
from quantmix.files import require_creatable
from quantmix.ggml import imatrix as files
from quantmix.ggml.imatrix import Entry, Imatrix
from quantmix.ggml.weights import open_weights
from quantmix.models.roles import is_quantizable

_F32 = 0  # ggml type id
_MIN_ROWS = 16  # as llama-imatrix: smaller batches are not worth counting


@dataclass(frozen=True, slots=True)
class Collected:
    """What was written: entries, chunks, MoE entries left out, tensors that got none."""

    path: Path
    n_entries: int
    chunks: int
    left_out: tuple[str, ...]
    without: tuple[str, ...]
    seconds: float


def collect(
    source: str | Path,
    corpus: str | Path,
    out: str | Path,
    *,
    n_ctx: int = 512,
    chunks: int | None = None,
    threads: int | None = None,
    on_event: Emit | None = None,
) -> Collected:
    """Compute an importance matrix of `source` on `corpus` in a child and write it to `out`.

    `.gguf` gives mainline's format, any other suffix the legacy one (which ik reads).

    Raises:
        BadFile, UsageError: bad source or text, text too short, `out` cannot be written.
        EngineError: the engine failed, or activations are NaN.
    """
    read_corpus(corpus)
    open_weights(source)
    require_creatable(out)
    request = {
        "model": str(source),
        "corpus": str(corpus),
        "out": str(out),
        "n_ctx": n_ctx,
        "chunks": chunks,
        "threads": threads,
    }
    result = child.run("quantmix.engine.imatrix:task", request, on_event)
    return Collected(
        Path(out),
        result["n_entries"],
        result["chunks"],
        tuple(result["left_out"]),
        tuple(result["without"]),
        result["seconds"],
    )


def task(request: dict[str, Any], emit: Emit) -> dict[str, Any]:
    """Child task of `collect`."""
    started = time.perf_counter()
    corpus = read_corpus(request["corpus"])
    weights = open_weights(request["model"])
    collector = Collector({n: i.shape for n, (i, _, _) in weights.tensors.items()})
    n_ctx = request["n_ctx"]
    with Session(
        Path(request["model"]),
        n_ctx=n_ctx,
        threads=request["threads"],
        on_node=collector.on_node,
        fused=False,
    ) as session:
        chunks = session.chunks(session.tokenize(corpus.text), request["chunks"])
        for i, chunk in enumerate(chunks):
            # Logits of all positions, so that the head sees them all, as in llama-imatrix.
            session.logits(chunk[None, :], 0, n_ctx)
            collector.raise_failure()
            emit({"chunk": i + 1, "of": len(chunks)})
    made = collector.result(corpus.path.name, len(chunks), n_ctx)
    left_out = files.write(made, request["out"])
    matrices = {n for n, (i, _, _) in weights.tensors.items() if is_quantizable(n, i.shape)}
    covered = {n for n in matrices if files.lookup(made, n)}
    if "output.weight" in covered:  # an untied embedding is looked up, never multiplied
        covered.add("token_embd.weight")
    return {
        "n_entries": len(made.entries) - len(left_out),
        "chunks": len(chunks),
        "left_out": left_out,
        "without": sorted(matrices - covered),
        "seconds": time.perf_counter() - started,
    }


@dataclass
class _Sum:
    """Running sums of one tensor."""

    sums: NDArray[np.float64]
    counts: NDArray[np.float64]


@dataclass
class Collector:
    """Adds up squared inputs; `shapes` are the GGUF shapes of all tensors, ggml order."""

    shapes: dict[str, tuple[int, ...]]
    failure: Exception | None = None
    _sums: dict[str, _Sum] = field(default_factory=dict)
    _ops: dict[int, str] = field(default_factory=dict)

    def on_node(self, address: int, ask: bool) -> bool:
        """Answer the engine's callback: want this node? then take its input."""
        try:
            node = native.Tensor.from_address(address)
            name = self._wanted(node)
            if name is None or ask:
                return name is not None
            self._add(name, node)
        except Exception as err:  # an exception must not unwind through C
            self.failure = err
        return True

    def raise_failure(self) -> None:
        """Raise what went wrong inside the callback, if anything did."""
        if self.failure is not None:
            raise EngineError(f"collecting the imatrix failed: {self.failure}") from self.failure

    def _wanted(self, node: native.Tensor) -> str | None:
        """Return the weight's GGUF name when `node` multiplies a weight with enough rows."""
        if node.op not in self._ops:
            self._ops[node.op] = native.load().ggml_op_name(node.op).decode()
        if self._ops[node.op] not in ("MUL_MAT", "MUL_MAT_ID") or not node.src[0]:
            return None
        # Views are named "blk.0.attn_k_b.weight (view)".
        label: bytes = native.Tensor.from_address(node.src[0]).name
        name = label.decode("utf-8", "replace").split(" ", 1)[0]
        if name not in self.shapes:
            return None
        source = native.Tensor.from_address(node.src[1])
        routed = self._ops[node.op] == "MUL_MAT_ID"
        if source.type != _F32 or (not routed and source.ne[1] * source.ne[2] < _MIN_ROWS):
            return None
        return name

    def _add(self, name: str, node: native.Tensor) -> None:
        shape = self.shapes[name]
        n_mat = shape[2] if len(shape) > 2 else 1
        total = self._sums.get(name)
        if total is None:
            total = _Sum(np.zeros((n_mat, shape[0])), np.zeros(n_mat))
            self._sums[name] = total
        x = _view(node.src[1], np.float32)[0]  # [ne2, ne1, ncols]
        if self._ops[node.op] == "MUL_MAT":
            if n_mat == len(x) and n_mat > 1:
                total.sums += np.einsum("mij,mij->mj", x, x)
                total.counts += x.shape[1]
            else:
                total.sums += np.einsum("mij,mij->j", x, x)
                total.counts += x.shape[0] * x.shape[1]
            return
        ids = _view(node.src[2], np.int32)[0, 0]  # [n_tokens, n_used]
        for slot in range(ids.shape[1]):
            rows = x[:, slot % x.shape[1]]
            squares = rows * rows
            for expert in np.unique(ids[:, slot]):
                chosen = ids[:, slot] == expert
                total.sums[expert] += squares[chosen].sum(axis=0)
                total.counts[expert] += chosen.sum()

    def result(self, dataset: str, chunks: int, chunk_size: int) -> Imatrix:
        """Return what was collected.

        Raises:
            EngineError: activations were NaN or infinite.
        """
        bad = [n for n, s in self._sums.items() if not np.isfinite(s.sums).all()]
        if bad:
            raise EngineError(f"the model's activations are NaN at {bad[0]}: a broken source")
        entries = {
            name: Entry(s.sums.astype(np.float32), s.counts.astype(np.float32))
            for name, s in self._sums.items()
        }
        return Imatrix(entries, dataset, chunks, chunk_size)


def _view(address: int, kind: type[Any]) -> NDArray[Any]:
    """Return a tensor in host memory as an array [ne3, ne2, ne1, ne0], strides respected."""
    tensor = native.Tensor.from_address(address)
    span = sum((tensor.ne[i] - 1) * tensor.nb[i] for i in range(4)) + np.dtype(kind).itemsize
    buffer = (C.c_char * span).from_address(tensor.data)
    return np.ndarray(tuple(reversed(tensor.ne)), kind, buffer, strides=tuple(reversed(tensor.nb)))
