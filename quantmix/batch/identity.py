"""What a step's inputs are, as hashes: files by content, models, engines, values."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from quantmix.batch.state import State
from quantmix.errors import BadFile, QuantmixError
from quantmix.ggml.shards import numbers_of, shard_names

_WHOLE_BYTES: Final = 64 << 20  # files up to this size are hashed in full
_SAMPLES: Final = 64
_SAMPLE_BYTES: Final = 64 << 10
_CHECKPOINT: Final = ("*.gguf", "*.safetensors", "*.safetensors.index.json", "config.json")


def of_value(value: Any) -> str:
    """Return the hash of a JSON value."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, allow_nan=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def of_file(path: Path) -> str:
    """Return the hash of a file: of everything up to 64 MiB, else of its size and samples.

    64 samples of 64 KiB, the first and the last byte among them, tell two files of weights apart;
    reading 600 GB to see that nothing changed would take longer than what is saved.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(f"{size}\n".encode())
    with path.open("rb") as file:
        if size <= _WHOLE_BYTES:
            for piece in iter(lambda: file.read(1 << 20), b""):
                digest.update(piece)
        else:
            for i in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:32]


def of_input(state: State, path: Path) -> str:
    """Return the remembered hash of an input file.

    Raises:
        BadFile: it is not there.
    """
    try:
        return state.digest(path, of_file)
    except OSError as err:
        raise BadFile(f"{path} cannot be read: {err.strerror}") from err


def of_model(state: State, folder: Path, spec: str) -> str:
    """Return what a MODEL argument is: all its files, or its name for catalog, hub and URL.

    Raises:
        BadFile: one of its files cannot be read.
    """
    path = folder / Path(spec).expanduser()
    files = model_files(path) if "\0" not in spec and not _is_remote(spec) else []
    if files:
        return of_value([[f.name, of_input(state, f)] for f in files])
    return of_value(spec)


def model_files(path: Path) -> list[Path]:
    """Return the files of a local model: the shards of a GGUF, or what lies in a folder."""
    if path.is_dir():
        return sorted({f for pattern in _CHECKPOINT for f in path.glob(pattern)})
    if not path.is_file():
        return []
    shard = numbers_of(path.name)
    if not shard:
        return [path]
    prefix, _, count = shard
    names = shard_names(prefix, count)
    return [file for name in names if (file := path.parent / name).is_file()]


def _is_remote(spec: str) -> bool:
    return spec.startswith("hf:") or spec.lower().startswith(("http://", "https://"))


def of_engine(state: State, name: str) -> str:
    """Return what would quantize and check here: the hash of the program, `none` without one."""
    try:
        if name == "mainline":
            from quantmix.engine.mainline_find import find_mainline

            found = find_mainline("quantize")
            path = found.program or found.library
        else:
            from quantmix.engine.find import find_program

            path = find_program("llama-quantize", engine="ik").path
    except QuantmixError:
        return "none"
    return of_input(state, path) if path else "none"


def of_recipe(document: Mapping[str, Any]) -> str:
    """Return the hash of what a recipe says: all of it but when it was made and its check."""
    return of_value({k: v for k, v in document.items() if k not in ("created", "check")})


def of_mix(document: Mapping[str, Any]) -> str:
    """Return the hash of what a recipe makes of its source: types, rules, engine."""
    engine = document["engine"]
    return of_value(
        [
            [[t["name"], t["type"]] for t in document["tensors"]],
            document["rules"],
            [engine["name"], engine["ftype"]],
        ]
    )
