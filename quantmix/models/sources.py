"""From what people type to a Model: catalog names, GGUF files, Hugging Face checkpoints, URLs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final, cast, get_args

from quantmix.errors import UsageError
from quantmix.ggml.shards import GgufSet, read_set
from quantmix.models.arch import mla, tensors_of
from quantmix.models.catalog import CatalogEntry, find
from quantmix.models.from_gguf import model_from_gguf
from quantmix.models.model import Layout, Model
from quantmix.models.trained import StoredData, expert_roles, mark

LAYOUTS: Final[tuple[str, ...]] = get_args(Layout)


def load_model(spec: str, *, layout: str | None = None) -> Model:
    """Return the model that `spec` names, with its tensors in file order.

    Args:
        spec: a GGUF file (any shard finds the rest), a folder of GGUF shards or of a Hugging Face
            checkpoint, an http(s) URL of a GGUF, `hf:org/name`, or a name of the catalog.
        layout: for MLA models that are not GGUF files: `split` (default), `legacy` or `ik`.

    Raises:
        UnknownName: nobody knows `spec`; the nearest names are suggested.
        BadFile: a file, folder or URL that cannot be read as a model.
        UsageError: the layout does not fit the model.
    """
    if spec.lower().startswith(("http://", "https://")):
        from quantmix.models.remote import read_url

        return _as_stored(read_url(spec), spec, layout)
    if spec.startswith("hf:"):
        from quantmix.models.hub import model_from_hub

        return model_from_hub(spec.removeprefix("hf:"), layout)
    path = Path(spec).expanduser() if spec and "\0" not in spec else None
    if path is not None and path.is_dir() and (path / "config.json").is_file():
        from quantmix.models.huggingface import model_from_folder

        if not any(path.glob("*.gguf")):
            return model_from_folder(path, layout)
    if path is not None and is_file_spec(spec):
        found = read_set(path)
        return _as_stored(found, str(path), layout, _stored(found))
    return from_catalog(find(spec), layout)


def is_file_spec(spec: str) -> bool:
    """Whether `spec` means a file, a folder, a URL or a repository, not a name of the catalog.

    Also where it is only written as a path and nothing is there.
    """
    if spec.lower().startswith(("http://", "https://", "hf:")):
        return True
    if spec.lower().endswith(".gguf") or spec.startswith((".", "/", "~")):
        return True
    return bool(spec) and "\0" not in spec and Path(spec).exists()


def first_file(model: Model) -> str | None:
    """Return the file that an engine is given to load the model, None when there is none here."""
    path = Path(model.source)
    if path.is_dir():
        return next((str(p) for p in sorted(path.glob("*.gguf"))), None)
    return str(path) if path.is_file() else None


def _stored(found: GgufSet) -> dict[str, StoredData]:
    """Return where the data of each tensor of local files lies."""
    return {
        info.name: StoredData(Path(header.name), header.data_offset + info.offset, info)
        for header in found.headers
        for info in header.tensors
    }


def _as_stored(
    found: GgufSet, source: str, layout: str | None, data: Mapping[str, StoredData] | None = None
) -> Model:
    """Build the model of GGUF headers; its layout is what it is."""
    model = model_from_gguf(found, source, data)
    if layout not in (None, model.layout):
        raise UsageError(
            f"layout {layout!r} was asked for, but {source} is stored as {model.layout!r}: "
            "leave --layout out for a GGUF file"
        )
    return model


def from_catalog(entry: CatalogEntry, layout: str | None = None) -> Model:
    """Build the model of a catalog row.

    Raises:
        UsageError: the layout does not fit the model.
    """
    chosen = layout_for(entry.arch, entry.id, layout)
    model = Model(
        id=entry.id,
        arch=entry.arch,
        layout=chosen,
        hparams=entry.hparams,
        tensors=tensors_of(entry.hparams, entry.arch, chosen),
        source="catalog",
        display=entry.display,
        notes=(entry.notes,) if entry.notes else (),
    )
    return mark(model, expert_roles(model, entry.exact_experts))


def layout_for(arch: str, name: str, layout: str | None) -> Layout:
    """Return the layout asked for, or the default of the architecture.

    Raises:
        UsageError: the layout does not fit the architecture.
    """
    if arch not in mla.ARCHS:
        if layout not in (None, "plain"):
            raise UsageError(f"layout {layout!r} is for MLA models only: {name} is {arch}")
        return "plain"
    if layout is None:
        return "split"
    if layout not in LAYOUTS or layout == "plain":
        raise UsageError(f"unknown layout {layout!r} for {name}: split, legacy or ik")
    return cast(Layout, layout)
