"""Tiny models that the real engine loads, and the demo model where pip can fetch it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from tiny import write_tiny


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the session's models."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def tiny(folder: Path) -> Path:
    """A tied f16 model."""
    return write_tiny(folder / "tiny.gguf")


@pytest.fixture(scope="session")
def tiny_f32(folder: Path) -> Path:
    """An untied f32 model."""
    return write_tiny(folder / "tiny-f32.gguf", tied=False, dtype=np.float32)


@pytest.fixture(scope="session")
def tiny_moe(folder: Path) -> Path:
    """A mixture of four experts."""
    return write_tiny(folder / "tiny-moe.gguf", experts=4)


@pytest.fixture(scope="session")
def text(folder: Path) -> Path:
    """A text of 4,000 bytes: three chunks of 512 and more, one token per byte."""
    from quantmix.texts import text as shipped

    path = folder / "text.txt"
    path.write_text(shipped("probe").read_text()[2000:6000])
    return path


@pytest.fixture(scope="session")
def tiny_imatrix(tiny: Path, text: Path, folder: Path) -> Path:
    """The tied model's importance matrix."""
    from quantmix.engine.imatrix import collect

    out = folder / "tiny.dat"
    collect(tiny, text, out, threads=1)
    return out


@pytest.fixture(scope="session")
def demo() -> Path:
    """The dithered 768-wide SmolLM2; skipped offline, required in CI."""
    from quantmix.demo import build
    from quantmix.errors import EngineError

    try:
        return build("dithered").path
    except EngineError as err:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(err))
