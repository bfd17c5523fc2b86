"""Fitted constants of the speed model: rows of `constants.csv`, and which class a device is in."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from functools import cache
from importlib.resources import files

Constants = Mapping[tuple[str, str], float]


@cache
def constants() -> dict[tuple[str, str], float]:
    """Return the fitted value of every (name, key); `python -m quantmix.speed.fit` refits them."""
    text = (files("quantmix.speed") / "constants.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return {(r["name"], r["key"]): float(r["value"]) for r in rows}


def class_of(what: str, text: str) -> str:
    """Return the class of a device: `what` is gpu (by arch), cpu (card key or name) or isa.

    Empty when no row of `classes.csv` matches.
    """
    for kind, pattern, name in _classes():
        if kind == what and pattern.search(text):
            return name
    return ""


@cache
def _classes() -> tuple[tuple[str, re.Pattern[str], str], ...]:
    text = (files("quantmix.speed") / "classes.csv").read_text(encoding="utf-8")
    rows = csv.DictReader(text.splitlines())
    return tuple((r["what"], re.compile(r["pattern"], re.IGNORECASE), r["class"]) for r in rows)
