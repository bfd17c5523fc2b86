"""Reads the data files beside this module and in `fit/`."""

from __future__ import annotations

import csv
from importlib.resources import files


def rows(name: str, package: str = "quantmix.loss") -> list[dict[str, str]]:
    """Return the rows of a CSV of the package, by column."""
    text = (files(package) / name).read_text(encoding="utf-8")
    return list(csv.DictReader(text.splitlines()))
