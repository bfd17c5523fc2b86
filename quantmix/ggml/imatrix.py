"""Importance matrices: mean squared inputs of every matmul, in both file formats.

Legacy `.dat` (the only one ik reads), little endian: i32 entries; per entry i32 length, name,
i32 ncall, i32 nval, nval f32 (= mean · ncall); then i32 last chunk, i32 length, dataset.
GGUF (mainline): `general.type` = imatrix, tensors `<name>.in_sum2` [ncols, n_mat] and
`<name>.counts` [1, n_mat], keys `imatrix.datasets`, `.chunk_count`, `.chunk_size`.
(llama.cpp tools/imatrix; ik_llama.cpp examples/imatrix, quantize.cpp load_imatrix.)
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quantmix.errors import BadFile
from quantmix.files import write_bytes
from quantmix.ggml import types
from quantmix.ggml.header import DEFAULT_ALIGNMENT, MAGIC, read_header
from quantmix.ggml.writer import NewTensor, encode_header, encode_metadata
from quantmix.units import pad

FloatArray = NDArray[np.float32]

_MAX_ENTRIES: Final = 131_072
_MAX_NAME: Final = 256
_SUM: Final = ".in_sum2"
_COUNT: Final = ".counts"


@dataclass(frozen=True)
class Entry:
    """What flowed into one tensor.

    Attributes:
        sums: sum of squares of every input column, float32 [n_mat, ncols]; n_mat > 1 for experts.
        counts: rows summed, float32 [n_mat]; 0 where an expert never ran.
    """

    sums: FloatArray
    counts: FloatArray

    @property
    def missing(self) -> int:
        """Experts that never ran."""
        return int((self.counts == 0).sum())

    def means(self) -> FloatArray:
        """Return mean squares [n_mat, ncols]; ones for an expert that never ran (as mainline)."""
        seen = self.counts[:, None] > 0
        quotient = self.sums / np.where(seen, self.counts[:, None], 1)
        return np.where(seen, quotient, 1).astype(np.float32)


@dataclass(frozen=True)
class Imatrix:
    """An importance matrix: entries by tensor name, and where it came from."""

    entries: Mapping[str, Entry]
    dataset: str = ""
    chunks: int = 0
    chunk_size: int = 0
    source: str = field(default="", compare=False)


def read(path: str | Path) -> Imatrix:
    """Read an importance matrix of either format.

    Raises:
        BadFile: missing, truncated, malformed, or neither format.
    """
    file = Path(path)
    try:
        with file.open("rb") as f:
            magic = f.read(4)
            if magic != MAGIC:
                return _parse_dat(magic + f.read(), file)
    except OSError as err:
        raise BadFile(f"{file} cannot be read: {err.strerror}") from err
    return _read_gguf(file)


def write_dat(imatrix: Imatrix, path: str | Path) -> list[str]:
    """Write the legacy format; return names of MoE entries left out for lack of data.

    One count serves all experts there, so values are mean · ncall, and an expert that never ran
    gets ones. Like ik, an entry in which 5% or more of the experts never ran is left out.
    """
    kept = {n: e for n, e in imatrix.entries.items() if e.missing < 0.05 * len(e.counts)}
    parts = [struct.pack("<i", len(kept))]
    for name, entry in kept.items():
        ncall = max(1, imatrix.chunks)
        values = (entry.means() * np.float32(ncall)).astype("<f4").tobytes()
        raw = name.encode()
        parts.append(struct.pack("<i", len(raw)) + raw)
        parts.append(struct.pack("<ii", ncall, len(values) // 4) + values)
    dataset = imatrix.dataset.encode()
    parts.append(struct.pack("<ii", imatrix.chunks, len(dataset)) + dataset)
    write_bytes(path, b"".join(parts))
    return sorted(set(imatrix.entries) - set(kept))


def write_gguf(imatrix: Imatrix, path: str | Path) -> None:
    """Write mainline's GGUF format; counts stay per expert."""
    metadata = {
        "general.type": "imatrix",
        "imatrix.datasets": [imatrix.dataset],
        "imatrix.chunk_count": imatrix.chunks,
        "imatrix.chunk_size": imatrix.chunk_size,
    }
    f32 = types.get("f32")
    tensors, data = [], []
    for name in sorted(imatrix.entries):
        entry = imatrix.entries[name]
        n_mat, ncols = entry.sums.shape
        tensors.append(NewTensor(name + _SUM, (ncols, n_mat), f32))
        tensors.append(NewTensor(name + _COUNT, (1, n_mat), f32))
        data += [entry.sums, entry.counts]
    head, _ = encode_header(encode_metadata(metadata), tensors)
    body = b"".join(_padded(array.astype("<f4").tobytes()) for array in data)
    write_bytes(path, head + body)


def write(imatrix: Imatrix, path: str | Path) -> list[str]:
    """Write by suffix: `.gguf` gives GGUF, anything else the legacy format."""
    if Path(path).suffix == ".gguf":
        write_gguf(imatrix, path)
        return []
    return write_dat(imatrix, path)


def _padded(raw: bytes) -> bytes:
    return raw.ljust(pad(len(raw), DEFAULT_ALIGNMENT), b"\0")


class _Cursor:
    """Reads little-endian values and never beyond the end."""

    def __init__(self, raw: bytes, name: str) -> None:
        self.raw, self.name, self.at = raw, name, 0

    def take(self, count: int, what: str) -> bytes:
        if count < 0 or self.at + count > len(self.raw):
            raise BadFile(f"{self.name} is no imatrix, or truncated: {what} at byte {self.at}")
        piece = self.raw[self.at : self.at + count]
        self.at += count
        return piece

    def integer(self, low: int, high: int, what: str) -> int:
        (value,) = struct.unpack("<i", self.take(4, what))
        if not low <= value <= high:
            raise BadFile(f"{self.name} is no imatrix: {what} is {value}")
        return int(value)


def _parse_dat(raw: bytes, file: Path) -> Imatrix:
    """Parse the legacy format. It does not tell experts apart: n_mat is 1 until `shaped`."""
    cursor = _Cursor(raw, str(file))
    entries = {}
    for _ in range(cursor.integer(1, _MAX_ENTRIES, "number of entries")):
        length = cursor.integer(1, _MAX_NAME, "length of a name")
        name = cursor.take(length, "a name").decode("utf-8", "replace")
        ncall = cursor.integer(0, 2**31 - 1, f"call count of {name}")
        nval = cursor.integer(1, 2**29, f"value count of {name}")
        values = np.frombuffer(cursor.take(4 * nval, f"values of {name}"), "<f4")
        sums = values.astype(np.float32).reshape(1, nval)
        entries[name] = Entry(sums, np.full(1, max(ncall, 1), np.float32))
    chunks, dataset = 0, ""
    if cursor.at < len(raw):
        chunks = cursor.integer(-1, 2**31 - 1, "last chunk")
        length = cursor.integer(0, 1 << 16, "length of the dataset name")
        dataset = cursor.take(length, "dataset name").decode("utf-8", "replace")
    return Imatrix(_finite(entries, file), dataset, max(chunks, 0), source=str(file))


def shaped(entry: Entry, shape: tuple[int, ...]) -> Entry | None:
    """Return `entry` as [n_mat, ncols] of a tensor of `shape` (ggml order), None if unfit."""
    ncols = shape[0]
    n_mat = shape[2] if len(shape) > 2 else 1
    if entry.sums.shape == (n_mat, ncols):
        return entry
    if len(entry.sums) == 1 and entry.sums.size == ncols * n_mat:
        return Entry(entry.sums.reshape(n_mat, ncols), np.repeat(entry.counts, n_mat))
    return None


def _read_gguf(file: Path) -> Imatrix:
    header = read_header(file)
    if header.metadata.get("general.type") != "imatrix":
        raise BadFile(f"{file} is a GGUF but not an imatrix (general.type is not imatrix)")
    infos = {t.name: t for t in header.tensors}
    entries = {}
    with file.open("rb") as f:

        def values(name: str) -> FloatArray:
            info = infos.get(name)
            if info is None or info.type.name != "f32":
                raise BadFile(f"{file} lacks the f32 tensor {name}")
            f.seek(header.data_offset + info.offset)
            return np.frombuffer(f.read(info.n_bytes), "<f4").astype(np.float32)

        for name in infos:
            if not name.endswith(_SUM):
                continue
            stem = name.removesuffix(_SUM)
            counts = values(stem + _COUNT)
            sums = values(name)
            if not counts.size or sums.size % counts.size:
                raise BadFile(f"{file}: counts of {stem} do not fit its sums")
            entries[stem] = Entry(sums.reshape(counts.size, -1), counts)
    if not entries:
        raise BadFile(f"{file} is an imatrix without entries")
    datasets = header.list_of("imatrix.datasets")
    return Imatrix(
        _finite(entries, file),
        str(datasets[0]) if datasets else "",
        header.int_of("imatrix.chunk_count") or 0,
        header.int_of("imatrix.chunk_size") or 0,
        source=str(file),
    )


def _finite(entries: dict[str, Entry], file: Path) -> dict[str, Entry]:
    """Refuse NaN and infinities, which make a quantizer write garbage."""
    bad = [n for n, e in entries.items() if not np.isfinite(e.sums).all()]
    if bad:
        raise BadFile(f"{file} holds NaN or infinity for {', '.join(bad[:3])}: make it anew")
    return entries


def problems(
    imatrix: Imatrix,
    tensors: Iterable[tuple[str, tuple[int, ...], types.GgmlType]],
    engine: types.Engine = "ik",
) -> list[str]:
    """Return what is wrong with `imatrix` for writing tensors (name, shape, type), one line each.

    A type that requires data must have an entry of the right shape, by its own name or one that
    the engine falls back to (ik: gate↔up, attn_v_b↔attn_kv_b; mainline: none); any entry that is
    used must fit.
    """
    found = []
    for name, shape, kind in tensors:
        entry = lookup(imatrix, name, engine)
        needs = kind.imatrix in ("required", "asserted")
        if entry is None:
            exempt = name in ("token_embd.weight", "output.weight") and kind.imatrix != "asserted"
            if needs and not exempt:
                found.append(f"{name} as {kind.name} needs an entry and has none")
        elif kind.is_quantized and shaped(entry, shape) is None:
            want = shape[0] * (shape[2] if len(shape) > 2 else 1)
            found.append(f"{name} has {entry.sums.size} values, its shape needs {want}")
    return found


def lookup(imatrix: Imatrix, name: str, engine: types.Engine = "ik") -> Entry | None:
    """Return the entry that an engine uses for a tensor, None when it finds none.

    ik has name fallbacks (ik_llama.cpp src/llama-quantize.cpp, imatrix lookup), mainline looks up
    the tensor's own name alone (llama.cpp src/llama-quant.cpp).
    """
    for candidate in _aliases(name) if engine == "ik" else (name,):
        if candidate in imatrix.entries:
            return imatrix.entries[candidate]
    return None


def _aliases(name: str) -> list[str]:
    swaps = (
        ("ffn_gate_exps", "ffn_gate_up_exps"),
        ("ffn_up_exps", "ffn_gate_up_exps"),
        ("ffn_gate_up_exps", "ffn_gate_exps"),
        ("ffn_gate_up_exps", "ffn_up_exps"),
        ("ffn_gate_exps", "ffn_up_exps"),
        ("ffn_gate", "ffn_up"),
        ("attn_v_b", "attn_kv_b"),
        ("attn_kv_b", "attn_v_b"),
    )
    return [name, *(name.replace(f".{a}.", f".{b}.") for a, b in swaps if f".{a}." in name)]
