"""Models known by name: the facts are rows of `catalog.csv` beside this module.

Each row carries its source and how far it was verified (`yes`: names and shapes equal to a real
file or log; `partial`: independent counts agree; `loader`: dimensions from the published config,
list accepted by an engine's loader). `n_tensors` and `total_params` are cross-checked by the tests
against the generated lists; for MLA models they describe the `split` layout.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from functools import cache
from importlib.resources import files
from typing import Any

from quantmix.errors import UnknownName
from quantmix.models.model import HParams

# Endings that name a file form, not a model: `DeepSeek-R1-GGUF`, `…-bf16`.
_FORM_SUFFIXES = ("-gguf", "-bf16", "-fp16", "-f16", "-fp8", "-hf", "-safetensors")


@dataclass(frozen=True, slots=True)
class CatalogEntry:
    """One known model: names, hyper-parameters, and how sure we are.

    `exact_experts` is the type that holds the routed experts as they were trained, if there is one.
    """

    id: str
    display: str
    aliases: tuple[str, ...]
    hf_repo: str
    arch: str
    hparams: HParams
    exact_experts: str
    n_tensors: int
    total_params: int
    verified: str
    verified_by: str
    source: str
    notes: str

    def to_json(self) -> dict[str, Any]:
        """Return the row as plain JSON values."""
        return asdict(self) | {"aliases": list(self.aliases)}


@cache
def catalog() -> dict[str, CatalogEntry]:
    """Return every known model by id, in the order of the table."""
    text = (files("quantmix.models") / "catalog.csv").read_text(encoding="utf-8")
    return {row["id"]: _entry(row) for row in csv.DictReader(text.splitlines())}


def find(name: str) -> CatalogEntry:
    """Return the entry that people mean by `name`: id, alias or Hugging Face name, any case.

    A form suffix (`-GGUF`, `-bf16`) and an owner (`unsloth/`) are ignored. The beginning of a name
    is enough when only one model begins so.

    Raises:
        UnknownName: nothing matches, or several do; the message suggests.
    """
    names = _names()
    wanted = _normal(name)
    if wanted in names:
        return catalog()[names[wanted]]
    starts = sorted({i for n, i in names.items() if wanted and n.startswith(wanted + "-")})
    if len(starts) == 1:
        return catalog()[starts[0]]
    if starts:
        some = ", ".join(starts[:6]) + (", …" if len(starts) > 6 else "")
        raise UnknownName(f"model {name!r} may be {some}: name one of them")
    raise UnknownName.of("model", wanted or name, names, "see `quantmix models`")


def is_known(name: str) -> bool:
    """Whether `find` finds an entry."""
    try:
        find(name)
    except UnknownName:
        return False
    return True


def identify(name: str, arch: str, n_elements: int) -> CatalogEntry | None:
    """Return the row that a model is of: a name says so, and architecture and size agree.

    The ik layout of MLA stores up to 2% twice, and vocabularies are padded differently.
    """
    try:
        entry = find(name)
    except UnknownName:
        return None
    near = abs(n_elements - entry.total_params) < 0.02 * entry.total_params
    return entry if entry.arch == arch and near else None


def slug(name: str) -> str:
    """Return an id made from the name of a file or folder."""
    return re.sub(r"[^a-z0-9._]+", "-", name.lower()).strip("-._") or "model"


def search(words: Iterable[str]) -> list[CatalogEntry]:
    """Return the entries of which one name or the architecture contains each of `words`."""
    wanted = [_normal(w) for w in words]
    return [
        e
        for e in catalog().values()
        if all(any(w in n for n in (*_all_names(e), e.arch)) for w in wanted)
    ]


def _all_names(entry: CatalogEntry) -> tuple[str, ...]:
    return tuple(map(_normal, (entry.id, *entry.aliases, entry.hf_repo)))


@cache
def _names() -> dict[str, str]:
    """Every accepted name, normalised, to its id; ids win over aliases over repository names."""
    names: dict[str, str] = {}
    for entry in catalog().values():
        names[_normal(entry.id)] = entry.id
    for entry in catalog().values():
        for alias in (*entry.aliases, entry.hf_repo):
            names.setdefault(_normal(alias), entry.id)
    return names


def _normal(name: str) -> str:
    """Lower case, owner dropped, `_` and blanks as `-`, form suffixes cut."""
    text = name.strip().lower().rstrip("/").rpartition("/")[2]
    text = "-".join(text.replace("_", "-").split())
    for suffix in _FORM_SUFFIXES:
        text = text.removesuffix(suffix)
    return text


def _entry(row: dict[str, str]) -> CatalogEntry:
    values: dict[str, object] = {}
    for f in fields(HParams):
        text = row[f.name]
        if f.type == "bool":
            values[f.name] = text == "1"
        elif f.type == "int":
            values[f.name] = int(text or 0)
        else:
            values[f.name] = text
    values["moe_layer_step"] = int(row["moe_layer_step"] or 1)
    return CatalogEntry(
        id=row["id"],
        display=row["display"],
        aliases=tuple(a for a in row["aliases"].split(";") if a),
        hf_repo=row["hf_repo"],
        arch=row["arch"],
        hparams=HParams(**values),  # type: ignore[arg-type]
        exact_experts=row["exact_experts"],
        n_tensors=int(row["n_tensors"]),
        total_params=int(row["total_params"]),
        verified=row["verified"],
        verified_by=row["verified_by"],
        source=row["source"],
        notes=row["notes"],
    )
