"""Several GGUF models behind one name: a folder of quants, or a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from quantmix.errors import BadFile
from quantmix.ggml.shards import first_files

_DEPTH = 2  # publishers put every quant into a folder of its own, or all into one


def gguf_specs(spec: str) -> list[str]:
    """Return what `load_model` takes for every GGUF model behind `spec`.

    Args:
        spec: a GGUF file or its URL (which stand for themselves), a folder with GGUF models in it
            or one level below, `hf:org/name`, or `hf:org/name/folder`.

    Raises:
        BadFile: nothing there, or no GGUF in it.
        UsageError: `huggingface_hub` is not installed, or the name is not `org/name`.
    """
    if spec.startswith("hf:"):
        from quantmix.models.hub import gguf_files

        name = spec.removeprefix("hf:")
        return [spec] if name.endswith(".gguf") else gguf_files(name)
    if spec.lower().startswith(("http://", "https://")):
        return [spec]
    folder = Path(spec).expanduser()
    if not folder.is_dir():
        return [spec]
    try:
        inside = [p for depth in range(_DEPTH) for p in folder.glob("*/" * depth + "*.gguf")]
    except OSError as err:
        raise BadFile(f"{folder} cannot be listed: {err.strerror or err}") from err
    files = first_files(p.as_posix() for p in inside)
    if not files:
        raise BadFile(f"{folder} holds no GGUF model, nor do folders in it")
    return files
