"""Whose facts are in the package's tables, counted from their `source` columns."""

from __future__ import annotations

import csv
from collections import Counter
from dataclasses import dataclass
from importlib.resources import files
from typing import Any, Final

CREDIT: Final = (
    "Sensitivity priors fitted from measurements by Thireus and the contributors of "
    "GGUF Tool Suite."
)

_TABLES: Final = (
    ("quant types", "quantmix.ggml", "types.csv", "source"),
    ("models", "quantmix.models", "catalog.csv", "source"),
    ("devices", "quantmix.rig", "devices.csv", "source"),
    ("perplexity", "quantmix.loss", "published.csv", "source"),
    ("memory", "quantmix.memory", "logs.csv", "source_url"),
    ("speed", "quantmix.speed", "logs.csv", "source_url"),
)


@dataclass(frozen=True, slots=True)
class Source:
    """One origin of facts: what about, where, how many rows."""

    what: str
    source: str
    count: int

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return {"what": self.what, "source": self.source, "rows": self.count}


def sources() -> tuple[Source, ...]:
    """Return every origin named in the package's tables, most rows first within a table."""
    found: list[Source] = []
    for what, package, name, column in _TABLES:
        path = files(package) / name
        if not path.is_file():
            continue
        rows = csv.DictReader(path.read_text(encoding="utf-8").splitlines())
        counts = Counter(text for r in rows for text in _origins(r.get(column) or ""))
        found += [Source(what, text, n) for text, n in counts.most_common()]
    return tuple(found)


def _origins(text: str) -> list[str]:
    """Return the origins in one cell; several are separated by semicolons."""
    return [part.strip() for part in text.split(";") if part.strip()]
