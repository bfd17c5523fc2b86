"""Tiny models that the real engine quantizes and measures, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from .runs import write_models


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny model, its imatrix and a text."""
    return write_models(tmp_path_factory.mktemp("store"))
