"""Reads raw measurement tables: whole-model sweeps over types, and one tensor at a time.

Layout, one folder per model: `kld_results.csv` and `ppl_results.csv` (first column the type, one
column per tensor, 404 = not measured) and `group0/kld_results_partial.csv` (type, whole-model
KLD). Files without `_partial` beside it hold interpolated values and are never read.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from quantmix.errors import BadFile

_UNMEASURED: Final = 400.0
CREDIT: Final = (
    "Fitted from measurements by Thireus and the contributors of GGUF Tool Suite "
    "(https://github.com/Thireus/GGUF-Tool-Suite, commit 384c1f8)"
)


@dataclass(frozen=True, slots=True)
class Sweep:
    """Whole-model KLD in nats by type (names as measured, interleaved ones included)."""

    model: str
    kld: dict[str, float]


@dataclass(frozen=True, slots=True)
class TensorTable:
    """What the model with one tensor at `type` measures, by tensor name; None = not measured.

    KLD in nats, or ln PPL.
    """

    model: str
    type: str
    cells: dict[str, float | None]


def sweeps(tables: Path, measurements: list[dict[str, str]]) -> list[Sweep]:
    """Return every whole-model sweep: from the folders, and from the measurement rows.

    Raises:
        BadFile: there is no folder of models.
    """
    found: dict[str, dict[str, float]] = {}
    for row in measurements:
        label = row["label"]
        if label.startswith("pure ") and "group0" in label and row["kld_mean"]:
            found.setdefault(row["model"], {})[label.split()[1]] = float(row["kld_mean"])
    for folder in _folders(tables):
        file = folder / "group0" / "kld_results_partial.csv"
        if file.is_file():
            for name, value in _two_columns(file):
                if name != "bf16":
                    found.setdefault(folder.name, {})[name] = value
    return [Sweep(m, dict(sorted(k.items()))) for m, k in sorted(found.items())]


def kld_tables(tables: Path) -> list[TensorTable]:
    """Return the per-tensor KLD tables, one per model: the first row of a sane low-bit type."""
    return _tensor_tables(tables, "kld_results.csv", float)


def ppl_tables(tables: Path) -> list[TensorTable]:
    """Return the per-tensor tables of ln PPL, one per model, as `kld_tables` does."""
    return _tensor_tables(tables, "ppl_results.csv", lambda ppl: math.log(max(ppl, 1.0)))


def _tensor_tables(tables: Path, file: str, of: Callable[[float], float]) -> list[TensorTable]:
    out = []
    for path in (f / file for f in _folders(tables)):
        if not path.is_file():
            continue
        with path.open(encoding="utf-8", newline="") as f:
            header, *rows = list(csv.reader(f))
        for row in rows:
            if row and not row[0].endswith("_bn"):
                read = zip(header[1:], map(_cell, row[1:]), strict=True)
                cells = {n: None if v is None else of(v) for n, v in read}
                out.append(TensorTable(path.parent.name, row[0], cells))
                break
    return out


def _folders(tables: Path) -> list[Path]:
    root = tables / "models" if (tables / "models").is_dir() else tables
    folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    if not folders:
        raise BadFile(f"{tables} holds no model folders: point --tables at the raw tables")
    return folders


def _two_columns(file: Path) -> list[tuple[str, float]]:
    out = []
    with file.open(encoding="utf-8", newline="") as f:
        for row in csv.reader(f):
            value = _cell(row[1]) if len(row) > 1 else None
            if value is not None:
                out.append((row[0], value))
    return out


def _cell(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if 0.0 <= value < _UNMEASURED else None
