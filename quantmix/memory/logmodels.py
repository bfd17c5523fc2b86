"""Which model a published log is about: the names people use, to hyper-parameters.

Names are matched with the catalog first (the longest id or alias inside the text), then with
`log_models.csv`: models that appear in logs but that quantmix does not design for.
"""

from __future__ import annotations

import csv
import re
from functools import cache
from importlib.resources import files
from typing import Any

from quantmix.models.catalog import catalog
from quantmix.models.model import HParams, Layout, Model
from quantmix.rig.cards import slug

_SHORTEST_NAME = 5


def find_model(text: str, arch: str = "", layout: Layout | None = None) -> Model | None:
    """Return the model that `text` names, without tensors, or None when nobody knows it.

    `arch` (when the log states it) must agree. `layout` is that of the MLA tensors in the file.
    """
    found = _from_catalog(text, arch) or _from_table(text, arch)
    if found is None:
        return None
    name, its_arch, hparams = found
    mla: Layout = layout or "split"
    return Model(
        id=name,
        arch=its_arch,
        layout=mla if hparams.is_mla else "plain",
        hparams=hparams,
        tensors=(),
        source="log",
    )


@cache
def _names() -> dict[str, str]:
    """Catalog ids by normalised id, alias and repository name, longest first."""
    names: dict[str, str] = {}
    for entry in catalog().values():
        for name in (entry.id, *entry.aliases, entry.hf_repo.split("/")[-1]):
            if len(slug(name)) >= _SHORTEST_NAME:
                names.setdefault(slug(name), entry.id)
    return dict(sorted(names.items(), key=lambda item: -len(item[0])))


def _from_catalog(text: str, arch: str) -> tuple[str, str, HParams] | None:
    inside = f"-{slug(text)}-"
    for name, model_id in _names().items():
        entry = catalog()[model_id]
        if f"-{name}-" in inside and (not arch or entry.arch == arch):
            if name.startswith("deepseek") and _is_other_model(inside, name):
                continue
            return entry.id, entry.arch, entry.hparams
    return None


def _is_other_model(inside: str, name: str) -> bool:
    """Whether the text goes on, right after the name, to a distilled or draft model."""
    rest = inside.split(f"-{name}-", 1)[1]
    return re.match(r"(draft|distill|qwen|llama)", rest) is not None


def _from_table(text: str, arch: str) -> tuple[str, str, HParams] | None:
    inside = f"-{slug(text)}-"
    for row in _table():
        if not re.search(rf"-({row['pattern']})-", inside):
            continue
        if arch and row["arch"] != arch:
            continue
        if row["catalog"]:
            entry = catalog()[row["catalog"]]
            return entry.id, entry.arch, entry.hparams
        sizes: dict[str, Any] = {
            k: int(row[k]) for k in row if k in HParams.__dataclass_fields__ and row[k]
        }
        return row["pattern"], row["arch"], HParams(**sizes)
    return None


@cache
def _table() -> tuple[dict[str, str], ...]:
    text = (files("quantmix.memory") / "log_models.csv").read_text(encoding="utf-8")
    return tuple(csv.DictReader(text.splitlines()))
