"""What llama-quantize itself makes of a model by a preset (`Q4_K_M`), asked of the real engine.

A preset is no type: attention, heads and first layers get others than the rest, by rules that
differ between engines and builds. A dry run over a ghost tells them, tensor by tensor, in a tenth
of a second; some rules ask whether there is an importance matrix, so the engine is given one.
"""

from __future__ import annotations

import re
import struct
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Final

from quantmix.engine import ik_dry_run, mainline
from quantmix.engine.binaries import printed_for
from quantmix.engine.find import find_program
from quantmix.engine.mainline_abi import FLOAT_FTYPES, FTYPES
from quantmix.errors import EngineError, EngineMissing
from quantmix.ggml.types import Engine
from quantmix.models.ghost import write_ghost
from quantmix.models.model import Model

_HELP_LINE: Final = re.compile(r"^\s*\d+\s+or\s+(\w+)\s*:", re.MULTILINE)
_TRAINED_IN: Final = "mxfp4"
_FLOATS: Final = FLOAT_FTYPES | {"BF16_R16"}
# A .dat with one entry, of a tensor that no model has.
_SOME_MATRIX: Final = struct.pack("<ii4sii4fii1s", 1, 4, b"none", 1, 4, *(1.0,) * 4, 1, 1, b"-")


@cache
def names(engine: Engine) -> tuple[str, ...]:
    """Return the quantized presets of an engine, as its llama-quantize lists them.

    Raises:
        EngineMissing: there is no llama-quantize of ik.
        EngineError: it does not run, or lists none.
    """
    if engine == "mainline":
        return tuple(n for n in FTYPES if n not in _FLOATS)
    program = find_program("llama-quantize", engine="ik").path
    found = _HELP_LINE.findall(printed_for(program, "--help"))
    if not found:
        raise EngineError(
            f"{program} --help lists no presets: is it llama-quantize of ik_llama.cpp?"
        )
    return tuple(n for n in found if n not in _FLOATS)


def types_of(model: Model, preset: str, engine: Engine, *, imatrix: bool = True) -> dict[str, str]:
    """Return the type that a preset gives each quantizable tensor, by name.

    Experts that come as mxfp4 (gpt-oss) are taken to stay so: the engines refuse to quantize a
    second time unless told to.

    Raises:
        EngineMissing: no engine of that kind that can quantize was found.
        EngineError: it refuses the preset or the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        ghost = Path(folder) / "ghost.gguf"
        write_ghost(ghost, model, engine=engine)
        try:
            found = (
                _asked_of_ik(ghost, preset, imatrix)
                if engine == "ik"
                else mainline.dry_run(ghost, (), preset, imatrix=imatrix).tensors
            )
        except EngineMissing:
            raise
        except EngineError as err:
            other = "mainline" if engine == "ik" else "ik"
            raise EngineError(
                f"the {engine} engine here does not make {preset} of {model.arch}: use --engine "
                f"{other}, or a type as `quantmix types` lists them ({err})"
            ) from err
    return {
        t.name: t.source_type if t.source_type == _TRAINED_IN else found[t.name].type
        for t in model.tensors
        if t.quantizable and t.name in found
    }


def is_preset(name: str, engine: Engine) -> bool:
    """Whether a name means a preset: in capitals (`Q8_0`, `Q4_K_M`), and llama-quantize lists it.

    Raises:
        EngineMissing, EngineError: as `names`.
    """
    return name[:1].isupper() and name in names(engine)


def made(model: Model, preset: str, engine: Engine, *, imatrix: bool = True) -> Model:
    """Return the model of the file that a preset makes: its types are those of the tensors.

    Raises:
        EngineMissing, EngineError: as `types_of`.
    """
    found = types_of(model, preset, engine, imatrix=imatrix)
    tensors = tuple(
        replace(t, source_type=found[t.name]) if t.name in found else t for t in model.tensors
    )
    return replace(model, tensors=tensors)


def _asked_of_ik(ghost: Path, preset: str, imatrix: bool) -> ik_dry_run.Tensors:
    matrix = None
    if imatrix:
        matrix = ghost.with_name("some.dat")
        matrix.write_bytes(_SOME_MATRIX)
    return ik_dry_run.start(ghost, (), preset, imatrix=matrix).finish().tensors
