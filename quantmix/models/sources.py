"""From what people type to a Model: catalog names, GGUF files, Hugging Face checkpoints, URLs."""

from __future__ import annotations

from typing import Final, cast, get_args

from quantmix.errors import UsageError
from quantmix.models.arch import mla, tensors_of
from quantmix.models.catalog import CatalogEntry, find
from quantmix.models.model import Layout, Model

LAYOUTS: Final[tuple[str, ...]] = get_args(Layout)


def load_model(spec: str, *, layout: str | None = None) -> Model:
    """Return the model that `spec` names, with its tensors in file order.

    Args:
        spec: a catalog id, alias or Hugging Face name.
        layout: for MLA models of the catalog `split` (default), `legacy` or `ik`.

    Raises:
        UnknownName: nobody knows `spec`; the nearest names are suggested.
        UsageError: the layout does not fit the model.
    """
    return from_catalog(find(spec), layout)


def from_catalog(entry: CatalogEntry, layout: str | None = None) -> Model:
    """Build the model of a catalog row.

    Raises:
        UsageError: the layout does not fit the model.
    """
    chosen = _layout_for(entry.arch, entry.id, layout)
    return Model(
        id=entry.id,
        arch=entry.arch,
        layout=chosen,
        hparams=entry.hparams,
        tensors=tensors_of(entry.hparams, entry.arch, chosen),
        source="catalog",
        display=entry.display,
        notes=(entry.notes,) if entry.notes else (),
    )


def _layout_for(arch: str, name: str, layout: str | None) -> Layout:
    """Return the layout asked for, or the default of the architecture."""
    if arch not in mla.ARCHS:
        if layout not in (None, "plain"):
            raise UsageError(f"layout {layout!r} is for MLA models only: {name} is {arch}")
        return "plain"
    if layout is None:
        return "split"
    if layout not in LAYOUTS or layout == "plain":
        raise UsageError(f"unknown layout {layout!r} for {name}: split, legacy or ik")
    return cast(Layout, layout)
