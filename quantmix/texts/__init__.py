"""Public-domain texts for measuring (see README.md beside): imatrix, probe, test."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path
from typing import Literal


def text(name: Literal["imatrix", "probe", "test"]) -> Path:
    """Return the path of a shipped text."""
    return Path(str(files("quantmix.texts") / f"{name}.txt"))
