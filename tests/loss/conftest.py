"""Models and packs that the tests of the loss model share."""

from __future__ import annotations

import functools

import pytest

from quantmix.models.model import Model
from quantmix.models.sources import load_model


@functools.cache
def catalog_model(name: str) -> Model:
    """A catalog model, built once per session."""
    return load_model(name)


@pytest.fixture
def r1() -> Model:
    """DeepSeek-R1 (split layout, 1086 tensors)."""
    return catalog_model("deepseek-r1")


@pytest.fixture
def small() -> Model:
    """Qwen3.5-0.8B: dense hybrid with tied embeddings."""
    return catalog_model("qwen3.5-0.8b")
