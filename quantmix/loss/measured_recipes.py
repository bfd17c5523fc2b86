"""Recipes whose file name carries what they measured: `Model.WHO-2.5545bpw-7.4781ppl….recipe`.

A folder (searched at any depth) or a `.tar.gz` of it. The body is `regex=type` lines.
"""

from __future__ import annotations

import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantmix.errors import BadFile, QuantmixError
from quantmix.ggml.types import table
from quantmix.loss import curve
from quantmix.models.catalog import find
from quantmix.models.model import Model
from quantmix.models.sources import load_model
from quantmix.rule_lines import resolve_rules

_NAME: Final = re.compile(r"^(?P<model>.+?)\.[A-Za-z0-9_]+-[\d.]+bpw-(?P<ppl>\d+\.\d+)ppl")
_BAD_MARK: Final = "incorrect ppl"


@dataclass(frozen=True, slots=True)
class MeasuredRecipe:
    """One recipe: its type per tensor (curve names; None = kept) and its measured perplexity."""

    id: str
    model: str
    ppl: float
    types: tuple[str | None, ...]
    bpw: float


def read(source: Path) -> tuple[list[MeasuredRecipe], list[tuple[str, str]]]:
    """Return the recipes of a folder or .tar.gz, and (id, why) of those that cannot be used.

    Raises:
        BadFile: there is no such folder or archive, or it is damaged.
    """
    recipes, skipped = [], []
    models: dict[str, Model] = {}
    for name, text in sorted(_files(source)):
        match = _NAME.match(name)
        if match is None or float(match["ppl"]) <= 1.0:
            skipped.append((name, "its name carries no measured ppl"))
            continue
        if _BAD_MARK in text.lower():
            skipped.append((name, "its author marks the measurement as incorrect"))
            continue
        try:
            model_id = find(match["model"]).id
            model = models.setdefault(model_id, load_model(model_id))
            recipes.append(_recipe(name, model, float(match["ppl"]), text))
        except QuantmixError as err:
            skipped.append((name, str(err)))
    return recipes, skipped


def _recipe(name: str, model: Model, ppl: float, text: str) -> MeasuredRecipe:
    asked = resolve_rules(text.splitlines(), model)
    known = table("ik")
    types: list[str | None] = []
    n_bytes = 0
    missing = [t.name for t in model.tensors if t.quantizable and t.loaded and t.name not in asked]
    if missing:
        raise BadFile(f"no rule for {len(missing)} tensors, {missing[0]} first")
    for tensor in model.tensors:
        qtype = known[asked.get(tensor.name, "f32")]
        fits = tensor.ncols % qtype.block_size == 0
        n_bytes += (qtype if fits else known["q8_0"]).tensor_bytes(tensor.shape)
        types.append(curve.own_name(qtype) if tensor.quantizable and tensor.loaded else None)
    return MeasuredRecipe(name, model.id, ppl, tuple(types), 8 * n_bytes / model.n_elements)


def _files(source: Path) -> Iterator[tuple[str, str]]:
    """Yield name and text of the recipes of a folder or .tar.gz.

    Raises:
        BadFile: neither is there, or it is damaged.
    """
    try:
        yield from _read(source)
    except (OSError, EOFError, tarfile.TarError, zlib.error) as err:
        raise BadFile(f"{source} is damaged or cannot be read: {err}") from err


def _read(source: Path) -> Iterator[tuple[str, str]]:
    if source.is_dir():
        for file in source.rglob("*.recipe*"):
            if file.is_file():
                yield file.name, file.read_text(encoding="utf-8", errors="replace")
        for archive in source.glob("*.tar.gz"):
            yield from _files(archive)
    elif source.is_file() and tarfile.is_tarfile(source):
        with tarfile.open(source) as tar:
            for member in tar:
                data = tar.extractfile(member) if member.isfile() else None
                if data is not None and ".recipe" in member.name:
                    yield Path(member.name).name, data.read().decode("utf-8", "replace")
    else:
        raise BadFile(f"{source} is neither a folder of recipes nor a .tar.gz of one")
