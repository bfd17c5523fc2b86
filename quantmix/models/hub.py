"""Models on the Hugging Face hub, through `huggingface_hub` (extra `hf`): headers only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from quantmix.errors import BadFile, UsageError
from quantmix.ggml.shards import first_files
from quantmix.models.from_gguf import model_from_gguf
from quantmix.models.hf_config import Config, architecture_of
from quantmix.models.huggingface import INDEX, Checkpoint, index_names, model_from_config
from quantmix.models.model import Model
from quantmix.models.remote import read_url
from quantmix.models.safetensors import parse_json


def model_from_hub(spec: str, layout: str | None = None) -> Model:
    """Return the model of `org/name`, or of one GGUF in it: `org/name/file.gguf`.

    Raises:
        UsageError: `huggingface_hub` is not installed, or the name is not `org/name`.
        BadFile: the hub has no such repository, or nothing in it can be read as a model.
    """
    repo, file, hub = _open(spec)
    try:
        if file:
            return _gguf(hub, repo, file)
        return _checkpoint(hub, repo, layout)
    except _errors(hub) as err:
        raise _unreadable(repo, err) from err


def gguf_files(spec: str) -> list[str]:
    """Return `hf:org/name/file.gguf` of every GGUF model in a repository or a folder of it.

    Raises:
        UsageError: `huggingface_hub` is not installed, or the name is not `org/name`.
        BadFile: the hub has no such repository, or it holds no GGUF there.
    """
    repo, folder, hub = _open(spec)
    try:
        names = hub.list_repo_files(repo)
    except _errors(hub) as err:
        raise _unreadable(repo, err) from err
    inside = [n for n in names if not folder or n.startswith(f"{folder}/")]
    files = first_files(inside)
    if not files:
        raise BadFile(f"hf:{spec} holds no GGUF model: name a repository of GGUF files")
    return [f"hf:{repo}/{f}" for f in files]


def _open(spec: str) -> tuple[str, str, Any]:
    """Return the repository, the path in it, and the library to read it with."""
    parts = spec.strip("/").split("/")
    if len(parts) < 2 or not all(parts):
        raise UsageError(f"hf:{spec} is not a repository: write hf:org/name")
    return "/".join(parts[:2]), "/".join(parts[2:]), _library()


def _errors(hub: Any) -> tuple[type[Exception], ...]:
    """Return what the library raises, its HTTP client's errors included: it lets some through.

    They are among the bases of its own.
    """
    family = hub.errors.HfHubHTTPError.__mro__
    theirs = tuple(c for c in family if c.__module__ != "builtins")
    return (*theirs, hub.errors.HFValidationError, OSError)


def _unreadable(repo: str, err: Exception) -> BadFile:
    first = str(err).strip().splitlines()[0] if str(err).strip() else type(err).__name__
    return BadFile(f"hf:{repo} cannot be read: {first}: check the name and the network")


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise UsageError(
            "hf:… needs the huggingface_hub package: pip install 'quantmix[hf]'"
        ) from None
    huggingface_hub.utils.logging.set_verbosity_error()  # it announces every retry
    return huggingface_hub


def _gguf(hub: Any, repo: str, file: str) -> Model:
    if not file.endswith(".gguf"):
        raise UsageError(f"hf:{repo}/{file} is not a GGUF file: name one, or only the repository")
    headers = hub.utils.build_hf_headers()
    found = read_url(hub.hf_hub_url(repo, file), headers=headers)
    return model_from_gguf(found, f"hf:{repo}/{file}")


def _checkpoint(hub: Any, repo: str, layout: str | None) -> Model:
    try:
        config_file = Path(hub.hf_hub_download(repo, "config.json"))
    except hub.errors.EntryNotFoundError:
        files = first_files(hub.list_repo_files(repo))
        some = ", ".join(files[:3]) + (", …" if len(files) > 3 else "")
        mend = (
            f"name one of its GGUF files ({some}), or let `quantmix choose` compare them"
            if files
            else "it holds no model"
        )
        raise BadFile(f"hf:{repo} has no config.json: {mend}") from None
    config = parse_json(config_file.read_bytes(), f"hf:{repo}: config.json")
    known = architecture_of(Config(config, repo)) is not None
    stored = _names(hub, repo) if known else None
    stored = stored or _shapes(hub, repo)
    return model_from_config(config, stored, repo.rpartition("/")[2], f"hf:{repo}", layout)


def _names(hub: Any, repo: str) -> Checkpoint | None:
    """Read the names in the index; None for a repository without one."""
    try:
        raw = Path(hub.hf_hub_download(repo, INDEX)).read_bytes()
    except hub.errors.EntryNotFoundError:
        return None
    return Checkpoint(frozenset(index_names(raw, f"hf:{repo}: {INDEX}")))


def _shapes(hub: Any, repo: str) -> Checkpoint:
    """Read the safetensors headers by range requests; nothing when there are none."""
    try:
        meta = hub.get_safetensors_metadata(repo)
    except hub.errors.NotASafetensorsRepoError:
        return Checkpoint()
    shapes = {
        name: (str(info.dtype), tuple(info.shape))
        for file in meta.files_metadata.values()
        for name, info in file.tensors.items()
    }
    return Checkpoint(frozenset(shapes), shapes)
