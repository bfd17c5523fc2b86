"""Swap tensors of a loaded model for their quantized form, and back, without a file or a reload.

A tensor's weights go through `ggml_quantize_chunk` with their imatrix row; the bytes are written
over the loaded copy (every copy: a tied head has its own) and the tensor's type and strides are
changed to match. They always fit, since a quantized tensor is smaller than its float source. The
engine then computes with the very kernels and bytes of a really quantized file, so its answers are
the same too. (Writing dequantized weights back misses the quantization of activations: KLD 2-5%
low.)

The graph must be rebuilt for every decode (`graph_reuse` off), and the context with every mix
(`Session.renew`). A native assert ends the process:
use only inside `child` tasks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quantmix.engine import native
from quantmix.engine.session import Session
from quantmix.errors import UsageError
from quantmix.ggml import imatrix as imatrices
from quantmix.ggml import types
from quantmix.ggml.imatrix import Imatrix
from quantmix.ggml.types import GgmlType
from quantmix.ggml.weights import WeightsFile
from quantmix.models.trained import decode_floats

Floats = NDArray[np.float32]

_CACHE_BYTES: Final = 1 << 30  # quantized tensors kept for the next probe
_SLICE_ROWS: Final = 64  # rows per quantization call; a multiple of every interleave


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """One tensor in one type: its bytes [n_rows · row_bytes] and its weighted relative error.

    `error` = Σ w·(x − x̂)² / Σ w·x² with w the imatrix's mean squares (ones without an entry).
    """

    type: GgmlType
    data: NDArray[np.uint8]
    error: float


class Quantizer:
    """Quantizes tensors of a file with the engine's own code, in threads, with a cache."""

    def __init__(self, weights: WeightsFile, imatrix: Imatrix | None, threads: int) -> None:
        self._lib = native.load()
        self._weights = weights
        self._imatrix = imatrix
        self._pool = ThreadPoolExecutor(max(1, threads))
        self._cache: OrderedDict[tuple[str, str], QuantizedTensor] = OrderedDict()

    def source(self, name: str) -> Floats:
        """Return a tensor's weights, float32 [n_rows, ncols].

        Raises:
            UsageError: the source is already quantized.
        """
        info = self._weights.tensors[name][0]
        raw = np.frombuffer(self._weights.read(name), np.uint8)
        return _decode_float(raw, info.type, name).reshape(-1, info.shape[0])

    def quantize(self, name: str, asked: str) -> QuantizedTensor:
        """Return tensor `name` as the engine would write it when asked for `asked`.

        Raises:
            UsageError: the type needs an imatrix entry that is not there, or does not fit; or the
                packaged engine does not know the type.
        """
        info = self._weights.tensors[name][0]
        kind = self._known(asked, name, info.shape)
        key = (name, kind.name)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        made = self._quantize(name, kind, self._means(name, info.shape, kind))
        self._cache[key] = made
        while sum(len(q.data) for q in self._cache.values()) > _CACHE_BYTES:
            self._cache.popitem(last=False)
        return made

    def _means(self, name: str, shape: tuple[int, ...], kind: GgmlType) -> Floats | None:
        """Return the imatrix's mean squares [n_mat, ncols] for a tensor, None without entry."""
        entry = imatrices.lookup(self._imatrix, name) if self._imatrix else None
        fitting = imatrices.shaped(entry, shape) if entry else None
        if fitting is None:
            if self._lib.ggml_quantize_requires_imatrix(kind.id):
                raise UsageError(
                    f"{kind.name} aborts without an imatrix and {name} has no entry: "
                    "give --imatrix (`quantmix imatrix` makes one, head included)"
                )
            return None
        return np.ascontiguousarray(fitting.means())

    def sample_error(self, name: str, asked: str, max_rows: int) -> float:
        """Return the weighted relative error of evenly spread rows of `name` as `asked`.

        Raises:
            UsageError: as `quantize`.
        """
        info = self._weights.tensors[name][0]
        kind = self._known(asked, name, info.shape)
        return self._quantize(name, kind, self._means(name, info.shape, kind), max_rows).error

    def _known(self, asked: str, name: str, shape: tuple[int, ...]) -> GgmlType:
        """Return the type that is written, sure to be one of the packaged engine's."""
        kind = types.resolve(asked, name, shape)
        if (self._lib.ggml_type_name(kind.id) or b"").decode() != kind.name:
            raise UsageError(f"{native.engine_id().build} does not know {kind.name}: leave it out")
        return kind

    def _quantize(
        self, name: str, kind: GgmlType, means: Floats | None, max_rows: int | None = None
    ) -> QuantizedTensor:
        """Quantize all rows, or only slices of about `max_rows` (the other bytes are not set)."""
        x = self.source(name)
        n_rows, ncols = x.shape
        row_bytes = kind.row_bytes(ncols)
        data = np.empty(n_rows * row_bytes, np.uint8)
        per_mat = n_rows // len(means) if means is not None else n_rows
        self._lib.ggml_quantize_init(kind.id)

        def work(start: int) -> tuple[float, float]:
            mat = start // per_mat
            stop = min(start + _SLICE_ROWS, (mat + 1) * per_mat)
            row = means[mat] if means is not None else None
            self._lib.ggml_quantize_chunk(
                kind.id,
                x.ctypes.data,
                data.ctypes.data,
                start * ncols,
                stop - start,
                ncols,
                row.ctypes.data if row is not None else None,
            )
            back = self._decode_rows(kind, data[start * row_bytes : stop * row_bytes], ncols)
            here = x[start:stop].astype(np.float64)
            weight = row if row is not None else 1.0
            return float((weight * (here - back) ** 2).sum()), float((weight * here**2).sum())

        n_mats = n_rows // per_mat
        starts = [
            mat * per_mat + i for mat in range(n_mats) for i in range(0, per_mat, _SLICE_ROWS)
        ]
        if max_rows is not None:
            starts = starts[:: max(1, len(starts) * _SLICE_ROWS // max_rows)]
        sums = np.array(list(self._pool.map(work, starts)))
        lost, total = sums.sum(axis=0)
        return QuantizedTensor(kind, data, float(lost / total) if total else 0.0)

    def _decode_rows(self, kind: GgmlType, data: NDArray[np.uint8], ncols: int) -> Floats:
        """Decode whole rows with the engine's `to_float`."""
        if kind.family == "float":
            return _decode_float(data, kind, "").reshape(-1, ncols)
        row_bytes = kind.row_bytes(ncols)
        n_rows = len(data) // row_bytes
        out = np.empty((n_rows, ncols), np.float32)
        decode = self._lib.ggml_internal_get_type_traits(kind.id).to_float
        # Types with row metadata decode one row (or one interleaved group) at a time.
        step = kind.interleave if kind.row_meta or kind.interleave > 1 else n_rows
        for i in range(0, n_rows, step):
            decode(data[i * row_bytes :].ctypes.data, out[i:].ctypes.data, step * ncols)
        return out


class Swapper:
    """Puts quantized weights into a session and takes them out again."""

    def __init__(self, session: Session, weights: WeightsFile, quantizer: Quantizer) -> None:
        self._session = session
        self._weights = weights
        self._quantizer = quantizer
        self._copies = session.weight_addresses(set(weights.tensors))
        self._now: dict[str, str] = {}
        self._errors: dict[str, float] = {}
        self._stale = False

    def set_mix(self, mix: Mapping[str, str]) -> dict[str, float]:
        """Make the loaded model the source with `mix` (tensor → type) applied; nothing else.

        Tensors whose type is already in place are left alone and not quantized again, others are
        restored or swapped.

        Returns:
            tensor → weighted relative error, for the tensors of `mix`.
        """
        for name in [n for n in self._now if n not in mix]:
            source = self._weights.tensors[name][0].type
            self._store(name, source, np.frombuffer(self._weights.read(name), np.uint8))
            del self._now[name]
        for name, asked in mix.items():
            shape = self._weights.tensors[name][0].shape
            if self._now.get(name) == types.resolve(asked, name, shape).name:
                continue
            made = self._quantizer.quantize(name, asked)
            self._store(name, made.type, made.data)
            self._now[name], self._errors[name] = made.type.name, made.error
        if self._stale:
            self._session.renew()
            self._stale = False
        return {name: self._errors[name] for name in mix}

    def unseen(self, names: Iterable[str]) -> list[str]:
        """Return those of `names` that the graph never reads, so swapping them does nothing."""
        return [n for n in names if not self._copies.get(n)]

    def _store(self, name: str, kind: GgmlType, raw: NDArray[np.uint8]) -> None:
        """Give every loaded copy of a tensor this type and these bytes."""
        lib = self._session.lib
        self._stale = True
        for address in self._copies.get(name, []):
            tensor = native.Tensor.from_address(address)
            tensor.type = kind.id
            tensor.nb[0] = kind.type_size
            tensor.nb[1] = kind.row_bytes(tensor.ne[0])
            tensor.nb[2] = tensor.nb[1] * tensor.ne[1]
            tensor.nb[3] = tensor.nb[2] * tensor.ne[2]
            lib.ggml_backend_tensor_set(address, raw.ctypes.data, 0, len(raw))


def _decode_float(raw: NDArray[np.uint8], kind: GgmlType, name: str) -> Floats:
    """Return f32, f16 or bf16 bytes as float32."""
    if kind.name not in types.FLOATS:
        raise UsageError(
            f"{name} of the source is {kind.name}: measure on an unquantized (f16, bf16, f32) GGUF"
        )
    return decode_floats(raw, kind.name)
