"""Perplexity through mainline's libllama: tokens, logits and scores against the other engine."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest

from quantmix import demo
from quantmix.engine.mainline_find import Mainline
from quantmix.engine.perplexity import Evaluation, evaluate
from quantmix.errors import BadFile, UsageError
from quantmix.ggml.types import Engine

pytestmark = [pytest.mark.engine, pytest.mark.slow]

N_CTX = 128
CHUNKS = 2


@pytest.fixture(scope="module")
def model() -> Path:
    """SmolLM2-135M in f16, 576 wide."""
    return demo.build("plain").path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The beginning of the shipped test text."""
    whole = (files("quantmix") / "texts" / "test.txt").read_text(encoding="utf-8")
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(whole[:4000], encoding="utf-8")
    return path


@pytest.fixture
def library(mainline: Mainline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the child use the engine of the fixture."""
    monkeypatch.setenv("QUANTMIX_LIBLLAMA", str(mainline.library))


def measure(model: Path, text: Path, engine: Engine, base: Path | None = None) -> Evaluation:
    """A short measurement."""
    return evaluate(model, text, base=base, n_ctx=N_CTX, chunks=CHUNKS, threads=1, engine=engine)


def test_both_engines_agree_on_floats(model: Path, text: Path, library: None) -> None:
    """On f16 weights the two engines give the same score for every token, within rounding."""
    ours = measure(model, text, "mainline")
    theirs = measure(model, text, "ik")
    assert ours.engine.name == "mainline"
    assert ours.engine.build
    assert ours.per_token.nll.shape == (CHUNKS * (N_CTX - 1 - N_CTX // 2),)
    assert np.abs(ours.per_token.nll - theirs.per_token.nll).max() < 0.05
    assert ours.perplexity.ppl == pytest.approx(theirs.perplexity.ppl, rel=1e-3)


def test_divergence_from_itself_is_zero(model: Path, text: Path, library: None) -> None:
    """A model measured against itself has no divergence, up to the 16 bits of the base rows."""
    found = measure(model, text, "mainline", base=model)
    assert found.divergence is not None
    assert abs(found.divergence.mean) < 1e-4
    assert found.divergence.same_top == 1.0


def test_short_text_and_bad_file(model: Path, text: Path, tmp_path: Path, library: None) -> None:
    """A text below two chunks, and a file that is no model, are refused by name."""
    short = tmp_path / "short.txt"
    short.write_text("Call me Ishmael.")
    with pytest.raises(UsageError, match="needs at least 256"):
        measure(model, short, "mainline")
    with pytest.raises(BadFile):
        measure(text, text, "mainline")
