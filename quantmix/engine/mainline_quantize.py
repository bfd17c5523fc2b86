"""mainline's `llama-quantize` for those who have only its library.

`python -m quantmix.engine.mainline_quantize` takes the part of that program's command line which
quantmix uses, calls `llama_model_quantize` of the first libllama that can, and prints the engine's
own log. The file written is the same, byte for byte, as the program's (a test compares them):

    [--allow-requantize] [--imatrix FILE] [--tensor-type-file FILE] SOURCE OUT PRESET [THREADS]
"""

from __future__ import annotations

import argparse
import ctypes as c
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from quantmix.engine import mainline_abi as abi
from quantmix.engine.mainline_child import load, overrides
from quantmix.engine.mainline_find import find_mainline
from quantmix.errors import EngineError, QuantmixError, UnknownName, UsageError
from quantmix.ggml import imatrix as imatrices

_INT, _STR = 0, 3  # enum llama_model_kv_override_type
_STRING_BYTES: Final = 128


class KvOverride(c.Structure):
    """struct llama_model_kv_override, its union as bytes."""

    _fields_ = (
        ("tag", c.c_int32),
        ("key", c.c_char * _STRING_BYTES),
        ("value", c.c_uint64 * (_STRING_BYTES // 8)),
    )


def quantize(
    source: Path,
    out: Path,
    ftype: str,
    rules: Sequence[tuple[str, str]],
    *,
    imatrix: Path | None = None,
    allow_requantize: bool = False,
    threads: int = 0,
) -> None:
    """Write a quantized GGUF; call it in a process of its own, a native assert ends it.

    Args:
        rules: (pattern, ggml type), first match wins.
        threads: 0 = all of the machine.

    Raises:
        EngineMissing: no libllama that quantizes was found.
        EngineError: the engine refused; its log on stderr says why.
        UnknownName: a preset or type that mainline does not have.
        BadFile: the imatrix is malformed.
    """
    if ftype not in abi.FTYPES:
        raise UnknownName.of("mainline preset", ftype, abi.FTYPES)
    if out.exists() and source.exists() and out.samefile(source):
        raise UsageError(f"{out} is the source itself: choose another file")
    engine = find_mainline("quantize", libraries_only=True)
    lib = load(str(engine.library))
    layout = abi.detect(lib).quantize
    if layout is None:
        raise EngineError(f"{engine.origin} has no quantizer")
    params = abi.defaults(lib, "llama_model_quantize_default_params", layout)
    params.nthread = threads
    params.ftype = abi.FTYPES[ftype]
    params.allow_requantize = allow_requantize
    forced = overrides(lib, rules)
    if rules:
        params.tt_overrides = c.addressof(forced)
    matrix = _Imatrix(imatrix) if imatrix else None
    if matrix:
        params.imatrix, params.kv_overrides = matrix.addresses
    call = lib.llama_model_quantize
    call.argtypes, call.restype = [c.c_char_p, c.c_char_p, c.POINTER(layout)], c.c_uint32
    lib.llama_backend_init()
    if call(str(source).encode(), str(out).encode(), c.byref(params)):
        raise EngineError(f"mainline could not quantize {source}")


class _Imatrix:
    """The arrays that the parameters point into, kept alive as long as this object."""

    def __init__(self, path: Path) -> None:
        read = imatrices.read(path)
        self._values: list[NDArray[np.float32]] = []
        self._entries = (abi.ImatrixData * (len(read.entries) + 1))()
        for slot, (name, entry) in zip(self._entries, read.entries.items(), strict=False):
            values = np.ascontiguousarray(entry.means().reshape(-1), np.float32)
            self._values.append(values)
            slot.name, slot.data, slot.size = name.encode(), values.ctypes.data, values.size
        facts: list[tuple[str, int | str]] = [("file", str(path))]
        facts += [("dataset", read.dataset)] if read.dataset else []
        facts += [("entries_count", len(read.entries))]
        facts += [("chunks_count", read.chunks)] if read.chunks > 0 else []
        self._facts = (KvOverride * (len(facts) + 1))()
        for fact, (key, value) in zip(self._facts, facts, strict=False):
            fact.key = f"quantize.imatrix.{key}".encode()
            if isinstance(value, int):
                fact.tag, fact.value[0] = _INT, value
            else:
                text = value.encode()[: _STRING_BYTES - 1]
                fact.tag = _STR
                c.memmove(fact.value, text, len(text))

    @property
    def addresses(self) -> tuple[int, int]:
        """Addresses of the entries and of the metadata that names them in the file."""
        return c.addressof(self._entries), c.addressof(self._facts)


def _rules_in(path: Path) -> list[tuple[str, str]]:
    """Read `--tensor-type-file`: `pattern=type` between blanks, split at the first `=`."""
    rules = []
    for token in re.split(r"[ \t\r\n\v\f]+", path.read_text(encoding="utf-8").strip()):
        pattern, equals, type_name = token.partition("=")
        if not (pattern and equals and type_name):
            raise UsageError(f"{path}: {token!r} is not of the form pattern=type")
        rules.append((pattern, type_name))
    return rules


def main(arguments: Sequence[str] | None = None) -> int:
    """Run as a program; 0 when the file was written."""
    parser = argparse.ArgumentParser(prog="mainline_quantize", description=__doc__)
    parser.add_argument("--allow-requantize", action="store_true")
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--tensor-type-file", type=Path)
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("ftype")
    parser.add_argument("threads", nargs="?", type=int, default=0)
    given = parser.parse_args(arguments)
    try:
        quantize(
            given.source,
            given.out,
            given.ftype,
            _rules_in(given.tensor_type_file) if given.tensor_type_file else [],
            imatrix=given.imatrix,
            allow_requantize=given.allow_requantize,
            threads=given.threads,
        )
    except (QuantmixError, OSError) as err:
        print(f"error: {err}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
